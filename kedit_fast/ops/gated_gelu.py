"""The activation of the Gemma family in one pass."""

from __future__ import annotations

import torch

from kedit_fast.ops._gated import define
from kedit_fast.reference import gated_gelu as reference

OP = "gated_gelu"
_op = define(OP, reference.gated_gelu, reference.gated_gelu_backward)


def gated_gelu(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """`gelu(gate) * up`, gelu in its tanh form; differentiable once in both: its backward is one pass, too.

    Equivalent to `torch.nn.functional.gelu(gate, approximate="tanh") * up`, including the rounding after gelu and after
    the product. Of gradients nothing is rounded in between.

    Args:
        gate: [.., d] float32, float64, bfloat16 or float16.
        up: [.., d] of the same shape and dtype.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [.., d] of the same dtype, contiguous. The C++ kernel computes gelu in fp32 as
        gate * sigmoid(2 sqrt(2 / pi) (gate + 0.044715 gate^3)), which does not cancel for negative gates, and gives the
        same bits for any number of threads. Minus infinity gives NaN.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        BackendUnavailableError: `backend` cannot run.
        GradientError: in the backward pass, where a second derivative is asked for.

    Cost: reads both inputs once and writes the result once; backward reads three and writes two. For a gradient gate
    and up stay in memory, as they are.
    Source: arXiv 2002.05202, eq. 6 (GEGLU), with the tanh form of arXiv 1606.08415.

    Example:
        >>> gate, up = torch.randn(4, 16), torch.randn(4, 16)
        >>> torch.allclose(gated_gelu(gate, up), torch.nn.functional.gelu(gate, approximate="tanh") * up, atol=1e-6)
        True
    """
    return _op(gate, up, backend or "")
