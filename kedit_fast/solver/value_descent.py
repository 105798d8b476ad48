"""Descent of values: Adam with a clamp, row by row, on a loss that the caller defines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch

from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.support.messages import comma_list
from kedit_fast.support.torch_state import plain_torch

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, torch's defaults


class Status(IntEnum):
    """How the descent of one value stands, or how it ended. Files of values hold these integers."""

    RUNNING = 0
    """It takes further steps."""
    COMPLETED = 1
    """It ran all iterations."""
    STOPPED = 2
    """The stopping rule ended it."""
    PREDICTED = 3
    """The stopping rule ended it before its first step: the model says the target already."""
    BAD_LOSS = 4
    """Its loss was not finite."""
    BAD_GRADIENT = 5
    """Its gradient was not finite."""


@plain_torch(leave_inference_mode=False)
def clamped_step(
    delta: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    active: torch.Tensor,
    lr: float | torch.Tensor,
    max_norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of Adam, then the clamp |delta| <= max_norm along the last dimension, in rows that are `active`.

    The host never waits for the device.

    Args:
        delta: [.., h] the point.
        gradient: [.., h] at the point.
        mean: [.., h] Adam's running mean of the gradients.
        square: [.., h] Adam's running mean of their squares.
        count: [.., 1] number of steps, this one included.
        active: [.., 1] bool; the other rows keep what they have.
        lr: Adam's step size, a number or [.., 1].
        max_norm: [.., 1] bound of |delta|.

    Returns:
        delta, mean and square after the step.
    """
    count = count.to(delta.dtype)  # a power of an integer would have torch's default dtype
    mean = torch.where(active, torch.lerp(gradient, mean, BETAS[0]), mean)
    square = torch.where(active, torch.lerp(gradient.square(), square, BETAS[1]), square)
    scale = (square / (1 - BETAS[1] ** count)).sqrt() + EPSILON
    stepped = delta - lr * (mean / (1 - BETAS[0] ** count)) / scale
    norm = stepped.norm(dim=-1, keepdim=True)
    stepped = torch.where(norm > max_norm, stepped * (max_norm / norm), stepped)
    return torch.where(active, stepped, delta), mean, square


@dataclass(frozen=True)
class OptimizedValues:
    """The result of `optimize_values` for b requests."""

    deltas: torch.Tensor
    """[b, h] fp32."""
    targets: torch.Tensor
    """[b, h] h0 + delta, fp64."""
    losses: torch.Tensor
    """[b] fp32, the loss at each row's last forward pass, weight decay included."""
    steps: torch.Tensor
    """[b] int64, optimizer steps taken."""
    predicted: torch.Tensor
    """[b] bool, whether the loss was below `v_stop_loss` before the first step."""


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
    """Values by the published loop, on a forward pass of your own.

    For every row i, minimize `forward(delta)[i] + v_weight_decay |delta_i| / |h0_i|^2` by Adam, with |delta_i| at most
    `clamp_norm_factor |h0_i|`. An iteration computes the losses, stops rows whose loss is below `v_stop_loss`, and
    takes a step in the others; the last iteration takes no step. Rows must not depend on each other: their losses are
    summed, so each row gets its own gradient.

    Args:
        forward: takes deltas [b, h] fp32, which require grad, and returns losses [b]. Run your model with delta_i added
            to the state of request i (`h0[i]`) and return its likelihood term, plus a KL term if you want one. It is
            called with all rows until the last one has stopped; losses of rows that have stopped are ignored.
        h0: [b, h] the states without deltas; floating, finite, no row of zeros.
        v_num_grad_steps: iterations.
        v_lr: Adam's step size.
        v_weight_decay: weight of |delta| / |h0|^2.
        clamp_norm_factor: bound of |delta| in units of |h0|.
        v_stop_loss: a row stops when its loss is below this.

    Returns:
        OptimizedValues on the device of h0. The residuals [h, b] that `solve_update` takes are `targets.T` minus the
        layer's outputs.

    Raises:
        InvalidArgumentError: a wrong shape or hyper-parameter, or losses that do not depend on the deltas.
        EditError: a loss or gradient that is not finite; the error names the rows.

    Example:
        >>> h0, goal = torch.ones(2, 8), torch.zeros(2, 8)
        >>> values = optimize_values(lambda delta: (h0 + delta - goal).square().sum(1), h0, v_lr=0.1)
        >>> values.targets.shape, values.steps.tolist()
        (torch.Size([2, 8]), [24, 24])
        >>> assert (values.targets.norm(dim=1) < 0.5 * h0.norm(dim=1)).all()

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
    _require_in_range("v_num_grad_steps", v_num_grad_steps, v_num_grad_steps >= 1)
    _require_in_range("v_lr", v_lr, v_lr > 0)
    _require_in_range("v_weight_decay", v_weight_decay, v_weight_decay >= 0)
    _require_in_range("clamp_norm_factor", clamp_norm_factor, clamp_norm_factor > 0)
    b = len(h0)
    norm = h0.detach().float().norm(dim=1, keepdim=True)  # [b, 1]
    delta, mean, square = (torch.zeros(h0.shape, dtype=torch.float32, device=h0.device) for _ in range(3))
    losses, steps = (torch.zeros(b, dtype=dtype, device=h0.device) for dtype in (torch.float32, torch.int64))
    status = torch.full((b,), Status.RUNNING, device=h0.device)
    for iteration in range(v_num_grad_steps):
        running = status == Status.RUNNING
        with torch.enable_grad():
            point = delta.clone().requires_grad_(True)
            loss = forward(point)
            if not isinstance(loss, torch.Tensor) or loss.shape != (b,):
                result = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise InvalidArgumentError(f"forward must return losses [{b}], one for each row; got {result}")
            loss = loss.to(delta.device).float()
        size = delta.norm(dim=1, keepdim=True)
        total = loss.detach() + v_weight_decay * size[:, 0] / norm[:, 0].square()
        losses = torch.where(running, total, losses)
        _require_finite("loss", running & ~torch.isfinite(total))
        below = running & (total < v_stop_loss)
        status = torch.where(below, Status.STOPPED if iteration else Status.PREDICTED, status)
        running = running & ~below
        if iteration == v_num_grad_steps - 1 or not bool(running.any()):
            break
        gradient = None
        if loss.requires_grad:
            with torch.enable_grad():
                running_loss = torch.where(running, loss, 0.0).sum()
            (gradient,) = torch.autograd.grad(running_loss, point, allow_unused=True)
        if gradient is None:
            raise InvalidArgumentError(
                "forward must return losses that depend on the deltas: were they added, and with grad?"
            )
        gradient = gradient + v_weight_decay * delta / size.clamp(min=1e-30) / norm.square()
        _require_finite("gradient", running & ~torch.isfinite(gradient).all(1))
        steps = steps + running
        active, count = running[:, None], steps.clamp(min=1)[:, None]
        delta, mean, square = clamped_step(delta, gradient, mean, square, count, active, v_lr, clamp_norm_factor * norm)
    return OptimizedValues(delta, h0.detach().double() + delta.double(), losses, steps, status == Status.PREDICTED)


def _require_in_range(name: str, value: float, is_valid: bool) -> None:
    if not is_valid:
        raise InvalidArgumentError(f"{name} = {value} is out of range")


def _require_finite(name: str, bad: torch.Tensor) -> None:
    if rows := torch.nonzero(bad)[:, 0].tolist():
        raise EditError(f"the {name} of {'row' if len(rows) == 1 else 'rows'} {comma_list(rows)} is not finite")
