"""The activation of the Llama family in one pass."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native
from kedit_fast.ops._checks import describe, require, require_dtype, require_no_grad, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import gated_silu as reference
from kedit_fast.support.dtypes import FLOATS

OP = "gated_silu"
LIBRARY.define(f"{OP}(Tensor gate, Tensor up, str backend) -> Tensor")
_op = torch.ops.kedit_fast.gated_silu.default


def gated_silu(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """`silu(gate) * up`, without a derivative: for forward passes that need no gradient.

    Equivalent to `torch.nn.functional.silu(gate) * up`, including the rounding after silu and after the product.

    Args:
        gate: [.., d] float32, float64, bfloat16 or float16.
        up: [.., d] of the same shape and dtype.
        backend: "torch", "cpu" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [.., d] of the same dtype, contiguous. The C++ kernel computes silu in fp32 to 4 ulp and gives the same bits for
        any number of threads. Gates below -88, whose silu is below 1e-36 in size, give 0; minus infinity gives NaN.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: reads both inputs once and writes the result once.
    Source: arXiv 2002.05202, eq. 6 (SwiGLU).

    Example:
        >>> gate, up = torch.randn(4, 16), torch.randn(4, 16)
        >>> torch.allclose(gated_silu(gate, up), torch.nn.functional.silu(gate) * up)
        True
    """
    require_no_grad(OP, gate=gate, up=up)
    return _op(gate, up, backend or "")


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    require(gate.ndim >= 1, lambda: f"gate must be [.., d]; got {describe(gate)}")
    require_dtype("gate", gate, FLOATS)
    require(up.shape == gate.shape, lambda: f"up must be {list(gate.shape)}; got {describe(up)}")
    require_dtype("up", up, (gate.dtype,))
    require_same_device(gate=gate, up=up)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
    _check(gate, up)
    return dispatch(OP, backend, (gate, up), gate, up).contiguous()


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
    _check(gate, up)
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


register(Implementation(OP, "torch", reference.gated_silu))
register(Implementation(OP, "cpu", native.cpu.gated_silu, native.cpu.declines_float64))
