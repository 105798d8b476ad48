"""Checks that the ops share: each raises with the argument's name, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kedit_fast.backends import Implementation
from kedit_fast.errors import GradientError, InvalidArgumentError
from kedit_fast.support.torch_state import plain_torch

LIBRARY = torch.library.Library("kedit_fast", "DEF")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def run_stated(chosen: Implementation, *args: Any) -> Any:
    """Run an implementation on its arguments, in the dtypes and on the devices that its code names."""
    with plain_torch(leave_inference_mode=False):
        return chosen.run(*args)


def require(ok: bool, message: Callable[[], str]) -> None:
    """Raise InvalidArgumentError(message()) unless ok."""
    if not ok:
        raise InvalidArgumentError(message())


def require_finite(name: str, number: float) -> None:
    """Raise unless the number is finite."""
    if not math.isfinite(number):
        raise InvalidArgumentError(f"{name} must be finite; got {number}")


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and device in a few characters."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def require_dtype(name: str, tensor: torch.Tensor, accepted: Sequence[torch.dtype]) -> None:
    """Raise unless the tensor is dense and its dtype one of `accepted`."""
    if tensor.layout is not torch.strided:
        raise InvalidArgumentError(f"{name} must be a dense tensor; got {tensor.layout}")
    if tensor.dtype not in accepted:
        names = ", ".join(str(d).removeprefix("torch.") for d in accepted)
        raise InvalidArgumentError(f"{name} must be {names}; got {describe(tensor)}")


def require_same_device(**tensors: torch.Tensor | None) -> None:
    """Raise unless all given tensors are on one device; meta and fake tensors count as where they claim to be."""
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


def require_not_overlapping(name: str, tensor: torch.Tensor) -> None:
    """Raise when two indices of a written tensor share memory (an expanded tensor, for example)."""
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
    """Raise when a written tensor's memory range intersects that of another argument."""
    begin, end = _range(written)
    for other_name, other in read.items():
        if other is None or other.device != written.device:
            continue
        other_begin, other_end = _range(other)
        if begin < other_end and other_begin < end:
            raise InvalidArgumentError(
                f"{name} and {other_name} share memory (their ranges intersect): pass {other_name}.clone()"
            )


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return begin, begin + tensor.nbytes
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
