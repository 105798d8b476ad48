"""What the references of `masked_descent_` and `masked_adam_` share: the gradient, and the end of a step."""

from __future__ import annotations

import torch

from kedit_fast.reference.entry_bits import unpack_bits


def gradient(
    weight: torch.Tensor,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient [h, d] in the dtype of `weight`: `grad` or left^T right, 0 where the bits of `entries` are."""
    if grad is not None:
        full = grad.to(weight.dtype)
    else:
        assert left is not None and right is not None
        full = left.to(weight.dtype).T @ right.to(weight.dtype)
    return full if entries is None else torch.where(chosen(weight, entries), full, 0.0)


def chosen(weight: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The bits of `entries` as bool [h, d]."""
    return unpack_bits(entries, weight.numel()).view(weight.shape)


def finish(
    weight: torch.Tensor,
    value: torch.Tensor,
    origin: torch.Tensor | None,
    bound: float | None,
    copy: torch.Tensor | None,
) -> torch.Tensor:
    """Write `value`, held within `bound` of `origin`, to `weight` and `copy`; whether all of `value` was finite."""
    finite = torch.isfinite(value).all()
    if bound is not None:
        assert origin is not None
        center = origin.to(weight.dtype)
        value = torch.minimum(torch.maximum(value, center - bound), center + bound)  # a NaN stays one
    weight.copy_(value)
    if copy is not None:
        copy.copy_(weight)
    return finite
