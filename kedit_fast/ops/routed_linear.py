"""A linear layer whose rows go through the matrix that each one's route names."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import describe, require, require_dtype, require_no_grad, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import routed_linear as reference
from kedit_fast.support.dtypes import FLOATS

OP = "routed_linear"
LIBRARY.define(
    f"{OP}(Tensor x, Tensor? weight, Tensor memories, Tensor route, Tensor? output, Tensor? bias, str backend) "
    "-> Tensor"
)
_op = torch.ops.kedit_fast.routed_linear.default


def routed_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    *,
    output: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Row n of `x` through `memories[route[n]]`, or through `weight` where the route is -1.

    Equivalent to `torch.where((route == m)[:, None], F.linear(x, memories[m], bias), out)` for every m in turn, from
    `out = F.linear(x, weight, bias)`.

    Args:
        x: [N, d] of a floating dtype: tokens.
        weight: [h, d] of a floating dtype, any strides; or None where `output` is given.
        memories: [M, h, d] of a floating dtype.
        route: int64 [N] on the device: -1 to M - 1. Checked on a CPU alone; on a GPU a row of any other route is NaN.
        output: [N, h] of the dtype of `x`: what the rows of route -1 get as it is, instead of a product. A layer of any
            kind, a quantized one for example, can so be what is beside the memories.
        bias: [h] of a floating dtype, added to products; or None.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [N, h] of the dtype of `x`, contiguous: sums in fp32 (fp64 for fp64), rounded once. The host never waits for a
        GPU.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or route, or not one of `weight` and `output`.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: 2 N h d flops; reads each matrix that has rows once, on a GPU once for every block of rows.
    Source: the side memories of WISE (arXiv 2405.14768, eq. 2).

    Example:
        >>> x, memories = torch.ones(3, 2), torch.stack([2 * torch.eye(2), 3 * torch.eye(2)])
        >>> routed_linear(x, torch.eye(2), memories, torch.tensor([-1, 1, 0]))
        tensor([[1., 1.],
                [3., 3.],
                [2., 2.]])
    """
    require_no_grad(OP, x=x, weight=weight, memories=memories, output=output, bias=bias)
    return _op(x, weight, memories, route, output, bias, backend or "")


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    require(x.ndim == 2, lambda: f"x must be [N, d]; got {describe(x)}")
    require_dtype("x", x, FLOATS)
    rows, d = x.shape
    require(
        memories.ndim == 3 and memories.shape[2] == d, lambda: f"memories must be [M, h, {d}]; got {describe(memories)}"
    )
    require_dtype("memories", memories, FLOATS)
    h = memories.shape[1]
    require((weight is None) != (output is None), lambda: "pass either weight or output")
    if weight is not None:
        require(tuple(weight.shape) == (h, d), lambda: f"weight must be [{h}, {d}]; got {describe(weight)}")
        require_dtype("weight", weight, FLOATS)
    if output is not None:
        require(tuple(output.shape) == (rows, h), lambda: f"output must be [{rows}, {h}]; got {describe(output)}")
        require_dtype("output", output, (x.dtype,))
    require(tuple(route.shape) == (rows,), lambda: f"route must be [{rows}]; got {describe(route)}")
    require_dtype("route", route, (torch.int64,))
    if bias is not None:
        require(tuple(bias.shape) == (h,), lambda: f"bias must be [{h}]; got {describe(bias)}")
        require_dtype("bias", bias, FLOATS)
    require_same_device(x=x, weight=weight, memories=memories, route=route, output=output, bias=bias)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(x, weight, memories, route, output, bias)
    count = memories.shape[0]
    if route.device.type == "cpu" and route.numel():
        low, high = (int(end) for end in route.aminmax())
        require(low >= -1 and high < count, lambda: f"route must be -1 to {count - 1}; got {low} to {high}")
    tensors = (x, weight, memories, route, output, bias)
    return dispatch(OP, backend, tensors, x, weight, memories, route, output, bias)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(x, weight, memories, route, output, bias)
    return x.new_empty((x.shape[0], memories.shape[1]))


def _cpu_declines(x: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_older(OP, x)


def _cpu_is_slower(x: torch.Tensor, _weight: object = None, memories: torch.Tensor | None = None, *_: object) -> str:
    """Measured: products of torch's library are faster where they need no other dtype."""
    plain = memories is not None and x.dtype == memories.dtype == torch.float32
    return "torch's products are faster on float32" if plain else ""


def _triton_declines(x: torch.Tensor, *others: torch.Tensor | None) -> str:
    return triton.declines_device(x) or triton.declines_float64(x, *others)


register(Implementation(OP, "torch", reference.routed_linear))
register(Implementation(OP, "cpu", native.cpu.routed_linear, _cpu_declines, _cpu_is_slower))
register(Implementation(OP, "triton", triton.lazy("row_products", OP), _triton_declines))
