"""Checks that the ops share: each names the argument, what it got and what it accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from kedit_fast.errors import GradientError, InvalidArgumentError
from kedit_fast.support.dtypes import describe_tensor as describe
from kedit_fast.support.dtypes import dtype_name


def require(ok: bool, message: Callable[[], str]) -> None:
    """Raise InvalidArgumentError(message()) unless ok."""
    if not ok:
        raise InvalidArgumentError(message())


def require_finite_number(name: str, number: float) -> None:
    """Raise InvalidArgumentError unless a number, such as alpha or eps, is finite."""
    if not math.isfinite(number):
        raise InvalidArgumentError(f"{name} must be finite; got {number}")


def require_dtype(name: str, tensor: torch.Tensor, accepted: Sequence[torch.dtype]) -> None:
    """Raise InvalidArgumentError unless the tensor is dense and its dtype is one of `accepted`."""
    if tensor.layout is not torch.strided:
        raise InvalidArgumentError(f"{name} must be a dense tensor; got {tensor.layout}")
    if tensor.dtype not in accepted:
        names = ", ".join(map(dtype_name, accepted))
        raise InvalidArgumentError(f"{name} must be {names}; got {describe(tensor)}")


def require_same_device(**tensors: torch.Tensor | None) -> None:
    """Raise InvalidArgumentError unless the tensors are on one device; a fake tensor is where it claims to be."""
    device = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            places = ", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
            raise InvalidArgumentError(f"all tensors must be on one device; got {places}")


def require_no_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise GradientError when grad mode is on and one of the tensors requires grad."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise GradientError(
                    f"{op} has no derivative with respect to {name}, which requires grad: "
                    f"call it under torch.no_grad() or pass {name}.detach()"
                )


def refuse_second_derivative(op: str) -> None:
    """Raise GradientError in a backward pass that is itself to be differentiated (create_graph=True)."""
    if torch.is_grad_enabled():
        raise GradientError(f"{op} has no second derivative: call backward() or grad() without create_graph=True")


def require_not_overlapping(name: str, tensor: torch.Tensor) -> None:
    """Raise when two entries of a written tensor share memory, as those of an expanded tensor do."""
    if tensor.is_contiguous():
        return
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            raise InvalidArgumentError(
                f"{name} overlaps itself (shape {list(tensor.shape)}, strides {list(tensor.stride())}): pass a copy"
            )
        reach = stride * (size - 1) + reach


def require_apart(name: str, written: torch.Tensor, **read: torch.Tensor | None) -> None:
    """Raise when the memory range of a written tensor intersects that of another argument."""
    begin, end = _range(written)
    for other_name, other in read.items():
        if other is None or other.device != written.device:
            continue
        other_begin, other_end = _range(other)
        if begin < other_end and other_begin < end:
            raise InvalidArgumentError(
                f"{name} and {other_name} share memory (their ranges intersect): pass {other_name}.clone()"
            )


def require_offsets(name: str, offsets: torch.Tensor, groups: int) -> None:
    """Raise InvalidArgumentError unless the tensor is int64 [groups + 1]: where the rows of each group begin."""
    fits = tuple(offsets.shape) == (groups + 1,)
    require(fits, lambda: f"{name} must be [{groups + 1}], one more than groups; got {describe(offsets)}")
    require_dtype(name, offsets, (torch.int64,))


def require_rising(name: str, offsets: torch.Tensor, rows: int, of: str) -> None:
    """Raise InvalidArgumentError unless offsets on a CPU rise from 0 to `rows`; those on a GPU are not waited for."""
    if offsets.device.type != "cpu":
        return
    begins = offsets.tolist()
    rises = begins[0] == 0 and begins[-1] == rows and begins == sorted(begins)
    require(rises, lambda: f"{name} must rise from 0 to {rows}, {of}; got {begins}")


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return begin, begin + tensor.nbytes
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
