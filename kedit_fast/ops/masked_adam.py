"""A step of Adam on chosen entries of a matrix, within a box, in one pass."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import describe, require, require_dtype, require_finite_number
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.ops._step import check_memory, check_numbers, check_step, mark_written, require_like
from kedit_fast.reference import masked_adam as reference

OP = "masked_adam_"
LIBRARY.define(
    f"{OP}(Tensor(a!) weight, Tensor(b!) mean, Tensor(c!) square, Tensor(d!) count, float lr, float beta1, "
    "float beta2, float eps, Tensor? grad, Tensor? left, Tensor? right, Tensor? entries, Tensor? origin, "
    "float? bound, Tensor? active, Tensor(e!)? copy, str backend) -> Tensor"
)
_op = torch.ops.kedit_fast.masked_adam_.default


def masked_adam_(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    grad: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
    bound: float | None = None,
    active: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """One step of `torch.optim.Adam` on `weight`, which is then held within `bound` of `origin`; in place.

    The gradient is `grad`, or left^T right, which is then never stored; 0 where the bit of `entries` is 0. Equivalent
    to `torch.optim.Adam([weight], lr, betas, eps).step()` followed by
    `weight.copy_(weight.clamp(origin - bound, origin + bound))`.

    Args:
        weight: [h, d] float32 or float64, any strides (pass the transposed view of a Conv1D weight); written.
        mean: [h, d] of its dtype, any strides (fastest with the weight's): the running mean of gradients, zeros before
            the first step; written.
        square: likewise that of their squares; written.
        count: float32 or int64 [], on the device: steps taken so far; written.
        lr: size of the step.
        betas: decay of `mean` and `square`, in [0, 1).
        eps: added to the root, 0 or more.
        grad, left, right, entries, origin, bound, copy: as in `masked_descent_`.
        active: bool [] on the device, or None for True. False: mean, square and count do not move, and the weight is
            only held in its box. A loss on the device can so skip a step without the host waiting for it.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        bool [], on the device: whether all weights were finite before the box was applied. A NaN stays a NaN.
        The C++ kernels give the same bits for any number of threads. Backends differ by rounding.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or number, overlapping memory, or not one gradient.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: 2 h d N flops from factors; reads and writes `weight`, `mean` and `square` once, reads `grad`, `origin` and
    the bits once.
    Source: Adam (arXiv 1412.6980, algorithm 1), with eps after the correction of the root, as in torch.

    Example:
        >>> weight, mean, square = torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(1, 3)
        >>> count = torch.zeros((), dtype=torch.int64)
        >>> finite = masked_adam_(weight, mean, square, count, 0.1, grad=torch.tensor([[3.0, -1.0, 0.0]]))
        >>> weight, int(count), bool(finite)
        (tensor([[0.9000, 1.1000, 1.0000]]), 1, True)
    """
    first, second = betas
    for name, beta in (("betas[0]", first), ("betas[1]", second)):
        require(0 <= beta < 1, lambda name=name, beta=beta: f"{name} must be in [0, 1); got {beta}")
    require_finite_number("eps", eps)
    require(eps >= 0, lambda: f"eps must not be negative; got {eps}")
    state = {"mean": mean, "square": square, "count": count, "active": active}
    check_numbers(
        OP, lr, bound, weight=weight, grad=grad, left=left, right=right, entries=entries, origin=origin, copy=copy,
        **state,
    )  # fmt: skip
    scalars = float(lr), float(first), float(second), float(eps)
    box = origin, None if bound is None else float(bound)
    return _op(weight, mean, square, count, *scalars, grad, left, right, entries, *box, active, copy, backend or "")


def _check(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    origin: torch.Tensor | None,
    bound: float | None,
    active: torch.Tensor | None,
    copy: torch.Tensor | None,
) -> None:
    more = {"mean": mean, "square": square, "count": count, "active": active}
    check_step(weight, grad, left, right, entries, origin, bound, copy, **more)
    require_like("mean", mean, weight, (weight.dtype,))
    require_like("square", square, weight, (weight.dtype,))
    require(count.ndim == 0, lambda: f"count must be []; got {describe(count)}")
    require_dtype("count", count, (torch.float32, torch.int64))
    if active is not None:
        require(active.ndim == 0, lambda: f"active must be []; got {describe(active)}")
        require_dtype("active", active, (torch.bool,))


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    origin: torch.Tensor | None,
    bound: float | None,
    active: torch.Tensor | None,
    copy: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(weight, mean, square, count, grad, left, right, entries, origin, bound, active, copy)
    read = {"grad": grad, "left": left, "right": right, "entries": entries, "origin": origin, "active": active}
    check_memory({"weight": weight, "mean": mean, "square": square, "count": count, "copy": copy}, read)
    tensors = (weight, grad, left, right, origin)
    step = (lr, beta1, beta2, eps, grad, left, right, entries, origin, bound, active, copy)
    finite = dispatch(OP, backend, tensors, weight, mean, square, count, *step)
    mark_written(weight, mean, square, count, copy)
    return finite


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    origin: torch.Tensor | None,
    bound: float | None,
    active: torch.Tensor | None,
    copy: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(weight, mean, square, count, grad, left, right, entries, origin, bound, active, copy)
    return weight.new_empty((), dtype=torch.bool)


def _cpu_declines(weight: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_older(OP, weight)


def _triton_declines(weight: torch.Tensor, *others: torch.Tensor | None) -> str:
    return triton.declines_device(weight) or triton.declines_float64(weight, *others)


register(Implementation(OP, "torch", reference.masked_adam_))
register(Implementation(OP, "cpu", native.cpu.masked_adam_, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("masked_step", OP), _triton_declines))
