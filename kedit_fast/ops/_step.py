"""Checks that `masked_descent_` and `masked_adam_` share."""

from __future__ import annotations

import math

import torch

from kedit_fast.ops._checks import (
    describe,
    require,
    require_apart,
    require_dtype,
    require_finite_number,
    require_no_grad,
    require_not_overlapping,
    require_same_device,
)
from kedit_fast.support.dtypes import FLOATS


def check_numbers(op: str, lr: float, bound: float | None, **tensors: torch.Tensor | None) -> None:
    """What can be checked without a tensor's shape."""
    require_finite_number("lr", lr)
    require(
        bound is None or (math.isfinite(bound) and bound >= 0), lambda: f"bound must be 0 or more, or None; got {bound}"
    )
    require_no_grad(op, **tensors)


def check_step(
    weight: torch.Tensor,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    origin: torch.Tensor | None,
    bound: float | None,
    copy: torch.Tensor | None,
    **more: torch.Tensor | None,
) -> None:
    """Shapes, dtypes and devices of a step's tensors; `more` are the optimizer's own."""
    require(weight.ndim == 2, lambda: f"weight must be [h, d]; got {describe(weight)}")
    require_dtype("weight", weight, (torch.float32, torch.float64))
    h, d = weight.shape
    require(
        (grad is None) != (left is None) and (left is None) == (right is None),
        lambda: "pass either grad, or left and right",
    )
    require_like("grad", grad, weight)
    if left is not None and right is not None:
        require(left.ndim == 2 and left.shape[1] == h, lambda: f"left must be [N, {h}]; got {describe(left)}")
        rows = left.shape[0]
        require(tuple(right.shape) == (rows, d), lambda: f"right must be [{rows}, {d}]; got {describe(right)}")
        require_dtype("left", left, FLOATS)
        require_dtype("right", right, FLOATS)
    if entries is not None:
        size = -(-h * d // 8)
        require(tuple(entries.shape) == (size,), lambda: f"entries must be [{size}]; got {describe(entries)}")
        require_dtype("entries", entries, (torch.uint8,))
    require(bound is None or origin is not None, lambda: "bound needs origin, the middle of the box")
    require_like("origin", origin, weight)
    if copy is not None:
        require(weight.dtype == torch.float32, lambda: f"copy needs a float32 weight; got {describe(weight)}")
        require_like("copy", copy, weight, (torch.bfloat16, torch.float16))
    tensors = {"grad": grad, "left": left, "right": right, "entries": entries, "origin": origin, "copy": copy}
    require_same_device(weight=weight, **tensors, **more)


def require_like(
    name: str,
    tensor: torch.Tensor | None,
    weight: torch.Tensor,
    accepted: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Raise unless `tensor` is None or has the shape of `weight` and a dtype of `accepted`."""
    if tensor is not None:
        shape = list(weight.shape)
        require(tensor.shape == weight.shape, lambda: f"{name} must be {shape}; got {describe(tensor)}")
        require_dtype(name, tensor, accepted)


def check_memory(written: dict[str, torch.Tensor | None], read: dict[str, torch.Tensor | None]) -> None:
    """Raise where what is written overlaps itself, another written tensor, or what is read."""
    others = dict(written)
    for name, tensor in written.items():
        others.pop(name)
        if tensor is not None:
            require_not_overlapping(name, tensor)
            require_apart(name, tensor, **others, **read)


def mark_written(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that these were written."""
    for tensor in tensors:
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)
