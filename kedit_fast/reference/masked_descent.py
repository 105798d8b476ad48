"""Reference of `masked_descent_`: one step of gradient descent on chosen entries, within a box."""

from __future__ import annotations

import torch

from kedit_fast.reference._step import chosen, finish, gradient


def masked_descent_(
    weight: torch.Tensor,
    lr: float,
    grad: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
    decay: float = 0.0,
    decay_all: bool = False,
    origin: torch.Tensor | None = None,
    bound: float | None = None,
    copy: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight` [h, d] -= lr (gradient + decay weight), in its dtype; see `kedit_fast.ops.masked_descent`."""
    slope = gradient(weight, grad, left, right, entries)
    if decay:
        shrunk = decay * weight
        slope = slope + (shrunk if decay_all or entries is None else torch.where(chosen(weight, entries), shrunk, 0.0))
    return finish(weight, weight - lr * slope, origin, bound, copy)
