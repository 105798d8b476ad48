"""The descent of values: Adam and a clamp, each value for itself, on a loss that is the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.support.torch_state import plain_torch

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, torch's defaults
# How a value's descent stands or ended: it runs; all iterations; below the loss that stops it; below it before the
# first step; a loss or gradient that is not finite.
GOING, USED_UP, STOPPED, PREDICTED, BAD_LOSS, BAD_GRADIENT = range(6)


@plain_torch(leave_inference_mode=False)
def clamped_step(
    delta: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    moving: torch.Tensor,
    lr: float,
    limit: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of Adam and the clamp |delta| <= limit along the last dimension, where `moving`; nothing is read back.

    Args:
        delta, gradient, mean, square: [.., h], the last two of Adam.
        count: [.., 1] steps, this one included.
        moving: [.., 1] bool.
        lr: of Adam.
        limit: [.., 1].

    Returns:
        delta, mean and square after it.
    """
    count = count.to(delta.dtype)  # a power of an integer would be one of torch's default dtype
    mean = torch.where(moving, torch.lerp(gradient, mean, BETAS[0]), mean)
    square = torch.where(moving, torch.lerp(gradient.square(), square, BETAS[1]), square)
    scale = (square / (1 - BETAS[1] ** count)).sqrt() + EPSILON
    moved = delta - lr * (mean / (1 - BETAS[0] ** count)) / scale
    norm = moved.norm(dim=-1, keepdim=True)
    moved = torch.where(norm > limit, moved * (limit / norm), moved)
    return torch.where(moving, moved, delta), mean, square


@dataclass(frozen=True)
class OptimizedValues:
    """What `optimize_values` found for b requests."""

    deltas: torch.Tensor  # [b, h] fp32
    targets: torch.Tensor  # [b, h] h0 + delta, fp64
    losses: torch.Tensor  # [b] at the last forward pass of each, decay included
    steps: torch.Tensor  # [b] taken
    predicted: torch.Tensor  # [b] bool: the loss was below `v_stop_loss` before the first step


@plain_torch(leave_inference_mode=False)
def optimize_values(
    forward: Callable[[torch.Tensor], torch.Tensor],
    h0: torch.Tensor,
    *,
    v_num_grad_steps: int = 25,
    v_lr: float = 0.5,
    v_weight_decay: float = 0.5,
    clamp_norm_factor: float = 4.0,
    v_stop_loss: float = 0.05,
) -> OptimizedValues:
    """Values by the published loop, on a forward pass of the caller's own.

    For every row i, minimise `forward(delta)[i] + v_weight_decay |delta_i| / |h0_i|^2` by Adam, with |delta_i| kept
    within `clamp_norm_factor |h0_i|`: forward, loss, stop a row below `v_stop_loss` before its step, no step in the
    last iteration. Rows must not depend on each other: their losses are summed, so each gets its own gradient.

    Args:
        forward: from deltas [b, h] fp32, which require grad, to losses [b]: run your model with delta_i added to the
            state of request i (`h0[i]`), and return its likelihood term, with a KL term if you want one. It is called
            with all rows until the last one has stopped; of those that have, the result is not looked at.
        h0: [b, h] the states without deltas; floating, finite.
        v_num_grad_steps: iterations.
        v_lr, v_weight_decay, clamp_norm_factor, v_stop_loss: by the names of the memit repository.

    Returns:
        OptimizedValues, on the device of h0. The residuals of `solve_update` are `targets.T` less what the layer puts
        out, [h, b].

    Raises:
        InvalidArgumentError: a wrong shape or number, or losses that do not depend on the deltas.
        EditError: a loss or gradient that is not finite, naming the rows.

    Cost: at most `v_num_grad_steps` calls of `forward` and one fewer of its backward pass.
    Source: MEMIT (arXiv 2210.07229), its released `compute_z.py`.
    """
    if h0.ndim != 2 or not h0.is_floating_point() or not h0.numel():
        raise InvalidArgumentError(f"h0 must be [b, h] of a floating dtype; got {list(h0.shape)} {h0.dtype}")
    if not bool(torch.isfinite(h0).all()):
        raise InvalidArgumentError("h0 has values that are not finite")
    if torch.is_inference_mode_enabled():
        raise EditError("values need gradients: call optimize_values() outside torch.inference_mode()")
    if bool((h0 == 0).all(1).any()):
        raise InvalidArgumentError("h0 has rows of zeros: |delta| is measured by |h0|")
    checks = {
        "v_num_grad_steps": v_num_grad_steps >= 1, "v_lr": v_lr > 0, "v_weight_decay": v_weight_decay >= 0,
        "clamp_norm_factor": clamp_norm_factor > 0,
    }  # fmt: skip
    if wrong := [name for name, ok in checks.items() if not ok]:
        raise InvalidArgumentError(f"{wrong[0]} = {locals()[wrong[0]]} is out of range")
    b = len(h0)
    norm = h0.detach().float().norm(dim=1, keepdim=True)  # [b, 1]
    delta, mean, square = (torch.zeros(h0.shape, dtype=torch.float32, device=h0.device) for _ in range(3))
    losses, steps = (torch.zeros(b, dtype=dtype, device=h0.device) for dtype in (torch.float32, torch.int64))
    status = torch.full((b,), GOING, device=h0.device)
    for iteration in range(v_num_grad_steps):
        going = status == GOING
        with torch.enable_grad():
            current = delta.clone().requires_grad_(True)
            loss = forward(current)
            if not isinstance(loss, torch.Tensor) or loss.shape != (b,):
                shown = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise InvalidArgumentError(f"forward must return losses [{b}], one for each row; got {shown}")
            loss = loss.to(delta.device).float()
        size = delta.norm(dim=1, keepdim=True)
        found = loss.detach() + v_weight_decay * size[:, 0] / norm[:, 0].square()
        losses = torch.where(going, found, losses)
        _require_finite("loss", going & ~torch.isfinite(found))
        below = going & (found < v_stop_loss)
        status = torch.where(below, STOPPED if iteration else PREDICTED, status)
        going = going & ~below
        if iteration == v_num_grad_steps - 1 or not bool(going.any()):
            break
        gradient = None
        if loss.requires_grad:
            with torch.enable_grad():
                total = torch.where(going, loss, 0.0).sum()
            (gradient,) = torch.autograd.grad(total, current, allow_unused=True)
        if gradient is None:
            raise InvalidArgumentError(
                "forward must return losses that depend on the deltas: were they added, and with grad?"
            )
        gradient = gradient + v_weight_decay * delta / size.clamp(min=1e-30) / norm.square()
        _require_finite("gradient", going & ~torch.isfinite(gradient).all(1))
        steps = steps + going
        moving, count = going[:, None], steps.clamp(min=1)[:, None]
        delta, mean, square = clamped_step(delta, gradient, mean, square, count, moving, v_lr, clamp_norm_factor * norm)
    return OptimizedValues(delta, h0.detach().double() + delta.double(), losses, steps, status == PREDICTED)


def _require_finite(what: str, bad: torch.Tensor) -> None:
    if rows := torch.nonzero(bad)[:, 0].tolist():
        raise EditError(
            f"the {what} of {'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows))} is not finite"
        )
