"""A step of gradient descent on chosen entries of a matrix, within a box, in one pass."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import require_finite_number
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.ops._step import check_memory, check_numbers, check_step, mark_written
from kedit_fast.reference import masked_descent as reference

OP = "masked_descent_"
LIBRARY.define(
    f"{OP}(Tensor(a!) weight, float lr, Tensor? grad, Tensor? left, Tensor? right, Tensor? entries, float decay, "
    "bool decay_all, Tensor? origin, float? bound, Tensor(b!)? copy, str backend) -> Tensor"
)
_op = torch.ops.kedit_fast.masked_descent_.default


def masked_descent_(
    weight: torch.Tensor,
    lr: float,
    *,
    grad: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
    decay: float = 0.0,
    decay_all: bool = False,
    origin: torch.Tensor | None = None,
    bound: float | None = None,
    copy: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`weight -= lr (g + decay weight)` on chosen entries, then held within `bound` of `origin`; in place.

    The gradient g is `grad`, or left^T right, which is then never stored. Equivalent, with a bool `mask` for `entries`,
    to `weight -= lr * mask * (g + decay * weight); weight.copy_(weight.clamp(origin - bound, origin + bound))`.

    Args:
        weight: [h, d] float32 or float64, any strides (pass the transposed view of a Conv1D weight); written.
        lr: size of the step.
        grad: [h, d] of a floating dtype, any strides. Either this or the factors are given.
        left: [N, h] of a floating dtype, any strides: the derivative by the outputs of N tokens.
        right: [N, d] likewise: the inputs of those tokens.
        entries: uint8 [ceil(h d / 8)], the entries that move, row-major: entry 8 j + i is bit i of byte j
            (`kedit_fast.ops.pack_bits`). None: all. An entry whose bit is 0 has no gradient, not even NaN.
        decay: factor of the weight's own part of the gradient, on the chosen entries alone.
        decay_all: it acts on all entries, as a weight decay of torch.optim would.
        origin: [h, d] of a floating dtype, any strides; read only where there is a bound.
        bound: half the width of the box, 0 or more. None: no box.
        copy: [h, d] bfloat16 or float16, or None. Only with a float32 `weight`: it receives the new weight, rounded.
            Written.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        bool [], on the device: whether all entries were finite before the box was applied. A NaN stays a NaN; an
        infinite entry would hide in the box, and makes this False.
        The C++ kernels give the same bits for any number of threads. Backends differ by the rounding of sums, at most
        N 2^-23 |lr| |left|^T |right| per entry in fp32, and of the step itself.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or number, overlapping memory, or not one gradient.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: 2 h d N flops from factors; reads and writes `weight` once, reads `grad`, `origin` and the bits once.
    Source: the step of WISE (arXiv 2405.14768, section 3.2), and its clamp.

    Example:
        >>> weight, grad = torch.ones(2, 2), torch.tensor([[1.0, 2.0], [3.0, 40.0]])
        >>> bits = torch.tensor([0b1011], dtype=torch.uint8)
        >>> finite = masked_descent_(weight, 0.1, grad=grad, entries=bits, origin=torch.ones(2, 2), bound=0.5)
        >>> weight, bool(finite)
        (tensor([[0.9000, 0.8000],
                [1.0000, 0.5000]]), True)
    """
    require_finite_number("decay", decay)
    check_numbers(
        OP, lr, bound, weight=weight, grad=grad, left=left, right=right, entries=entries, origin=origin, copy=copy
    )
    scalars = float(decay), bool(decay_all), origin, None if bound is None else float(bound)
    return _op(weight, float(lr), grad, left, right, entries, *scalars, copy, backend or "")


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    weight: torch.Tensor,
    lr: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    decay: float,
    decay_all: bool,
    origin: torch.Tensor | None,
    bound: float | None,
    copy: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    check_step(weight, grad, left, right, entries, origin, bound, copy)
    read = {"grad": grad, "left": left, "right": right, "entries": entries, "origin": origin}
    check_memory({"weight": weight, "copy": copy}, read)
    tensors = (weight, grad, left, right, origin)
    step = (weight, lr, grad, left, right, entries, decay, decay_all, origin, bound, copy)
    finite = dispatch(OP, backend, tensors, *step)
    mark_written(weight, copy)
    return finite


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    weight: torch.Tensor,
    lr: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    decay: float,
    decay_all: bool,
    origin: torch.Tensor | None,
    bound: float | None,
    copy: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    check_step(weight, grad, left, right, entries, origin, bound, copy)
    return weight.new_empty((), dtype=torch.bool)


def _cpu_declines(weight: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_older(OP, weight)


def _triton_declines(weight: torch.Tensor, *others: torch.Tensor | None) -> str:
    return triton.declines_device(weight) or triton.declines_float64(weight, *others)


register(Implementation(OP, "torch", reference.masked_descent_))
register(
    Implementation(OP, "cpu", native.cpu.masked_descent_, lambda weight, *_: native.cpu.declines_older(OP, weight))
)
register(Implementation(OP, "triton", triton.lazy("masked_step", OP), _triton_declines))
