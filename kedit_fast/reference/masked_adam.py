"""Reference of `masked_adam_`: one step of Adam on chosen entries, within a box."""

from __future__ import annotations

import torch

from kedit_fast.reference._step import finish, gradient


def masked_adam_(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    grad: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
    bound: float | None = None,
    active: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step on `weight`, `mean` and `square` [h, d] in their dtype; see `kedit_fast.ops.masked_adam`."""
    slope = gradient(weight, grad, left, right, entries)
    on = torch.ones((), dtype=torch.bool, device=weight.device) if active is None else active
    step, root = advance_(count, on, lr, beta1, beta2)
    mean.copy_(torch.where(on, beta1 * mean + (1 - beta1) * slope, mean))
    square.copy_(torch.where(on, beta2 * square + (1 - beta2) * slope * slope, square))
    moved = weight - step.to(weight.dtype) * mean / (square.sqrt() * root.to(weight.dtype) + eps)
    return finish(weight, torch.where(on, moved, weight), origin, bound, copy)


def advance_(
    count: torch.Tensor, on: torch.Tensor, lr: float, beta1: float, beta2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add 1 to `count` where `on`; lr / (1 - beta1^count) and 1 / sqrt(1 - beta2^count), float64 scalars."""
    count.add_(on.to(count.dtype))
    steps = count.clamp(min=1).double()  # no step was ever taken: what follows is not used
    return lr / (1 - beta1**steps), (1 - beta2**steps).rsqrt()
