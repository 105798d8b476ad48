"""The activation of the Llama family in one pass."""

from __future__ import annotations

import torch

from kedit_fast.ops._gated import define
from kedit_fast.reference import gated_silu as reference

OP = "gated_silu"
_op = define(OP, reference.gated_silu, reference.gated_silu_backward)


def gated_silu(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """`silu(gate) * up`, differentiable once in both: its backward is one pass, too.

    Equivalent to `torch.nn.functional.silu(gate) * up`, including the rounding after silu and after the product. Of
    gradients nothing is rounded in between.

    Args:
        gate: [.., d] float32, float64, bfloat16 or float16.
        up: [.., d] of the same shape and dtype.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [.., d] of the same dtype, contiguous. The C++ kernel computes silu in fp32 to 4 ulp and gives the same bits for
        any number of threads. Gates below -88, whose silu is below 1e-36 in size, give 0; minus infinity gives NaN.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        BackendUnavailableError: `backend` cannot run.
        GradientError: in the backward pass, where a second derivative is asked for.

    Cost: reads both inputs once and writes the result once; backward reads three and writes two. For a gradient gate
    and up stay in memory, as they are.
    Source: arXiv 2002.05202, eq. 6 (SwiGLU).

    Example:
        >>> gate, up = torch.randn(4, 16), torch.randn(4, 16)
        >>> torch.allclose(gated_silu(gate, up), torch.nn.functional.silu(gate) * up)
        True
    """
    return _op(gate, up, backend or "")
