"""Stand-ins for the fused steps, until these are there."""

from __future__ import annotations

import torch


def _entries(bits, like):
    flat = (bits[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).flatten()
    return flat[: like.numel()].view(like.shape).to(like.dtype)


def _bounded(weight, origin, bound, copy):
    if bound is not None:
        w0 = origin.to(weight)
        weight.copy_(torch.minimum(torch.maximum(weight, w0 - bound), w0 + bound))
    if copy is not None:
        copy.copy_(weight)
    return torch.isfinite(weight).all()


def masked_descent_(weight, lr, *, grad=None, left=None, right=None, entries=None, decay=0.0, decay_all=False,
                    origin=None, bound=None, copy=None, backend=None):  # fmt: skip
    """See DESIGN."""
    k = 1.0 if entries is None else _entries(entries, weight)
    g = left.to(weight).T @ right.to(weight) if grad is None else grad.to(weight)
    weight.sub_(lr * (k * g + decay * weight * (1.0 if decay_all else k)))
    return _bounded(weight, origin, bound, copy)


def masked_adam_(weight, mean, square, count, lr, *, betas=(0.9, 0.999), eps=1e-8, grad=None, left=None, right=None,
                 entries=None, origin=None, bound=None, active=None, copy=None, backend=None):  # fmt: skip
    """See DESIGN."""
    on = torch.ones((), dtype=torch.bool, device=weight.device) if active is None else active
    g = left.to(weight).T @ right.to(weight) if grad is None else grad.to(weight)
    if entries is not None:
        g = g * _entries(entries, weight)
    count.add_(on.to(count))
    mean.copy_(torch.where(on, betas[0] * mean + (1 - betas[0]) * g, mean))
    square.copy_(torch.where(on, betas[1] * square + (1 - betas[1]) * g * g, square))
    c = count.clamp(min=1).to(torch.float64)
    scale, root = lr / (1 - betas[0] ** c), (1 - betas[1] ** c).sqrt()
    step = scale.to(weight) * mean / (square.sqrt() / root.to(weight) + eps)
    weight.copy_(torch.where(on, weight - step, weight))
    return _bounded(weight, origin, bound, copy)
