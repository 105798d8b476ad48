"""Values: the output at the subject's last token that makes the model say the target, found by gradient descent.

For each request, minimise over delta in R^h, added to the site's output h0 at the subject's last token,

    mean over contexts of -(1/T) sum_t log p(target_t)
    + kl_factor KL(p_delta || p_0) at the subject's last token of "{subject} is a"
    + v_weight_decay |delta| / |h0|^2

by Adam, and keep |delta| <= clamp_norm_factor |h0|. The order is the published loop's: forward, loss, stop if it is
below v_stop_loss before the step, no step in the last iteration. Requests do not see each other: a batch of them
gives what one at a time gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from kedit_fast.editing.prompts import PreparedRequest
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.architectures import ModelView
from kedit_fast.models.forward import Site, adding, capture, evaluating, last_hidden, pad
from kedit_fast.ops import distribution_kl, target_log_probs

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, torch's defaults


@dataclass(frozen=True)
class Values:
    """Optimised values of u requests."""

    targets: torch.Tensor  # [h, u] h0 + delta, fp64
    deltas: torch.Tensor  # [h, u] fp32
    losses: torch.Tensor  # [u] at the last forward pass
    first_losses: torch.Tensor  # [u] at delta = 0
    steps: torch.Tensor  # [u] optimiser steps taken


class _Rows:
    """The padded prompts of a few requests, and where to look in them."""

    def __init__(self, view: ModelView, prepared: Sequence[PreparedRequest]):
        ids: list[tuple[int, ...]] = []
        lookup, owner, target_rows, target_positions, target_ids, target_weights, target_owner = [], [], [], [], [], [], []
        kl_rows, kl_positions = [], []
        for i, request in enumerate(prepared):
            contexts, length = len(request.rewriting), len(request.target)
            for prompt in request.rewriting:
                for t, token in enumerate(request.target):
                    target_rows.append(len(ids))
                    target_positions.append(len(prompt.ids) - 1 + t)
                    target_ids.append(token)
                    target_weights.append(1.0 / (contexts * length))
                    target_owner.append(i)
                ids.append((*prompt.ids, *request.target[:-1]))
                lookup.append(prompt.lookup)
                owner.append(i)
            kl_rows.append(len(ids))
            kl_positions.append(request.kl.lookup)
            ids.append(request.kl.ids)
            lookup.append(request.kl.lookup)
            owner.append(i)
        device = view.head.device
        self.count = len(prepared)
        self.batch = pad(ids, view.device)
        self.lookup = torch.tensor(lookup, device=device)
        self.owner = torch.tensor(owner, device=device)
        self.target_rows = torch.tensor(target_rows, device=device)
        self.target_positions = torch.tensor(target_positions, device=device)
        self.target_ids = torch.tensor(target_ids, device=device)
        self.target_weights = torch.tensor(target_weights, device=device)
        self.target_owner = torch.tensor(target_owner, device=device)
        self.kl_rows = torch.tensor(kl_rows, device=device)
        self.kl_positions = torch.tensor(kl_positions, device=device)
        self.bare_rows = torch.tensor(
            [next(r for r, o in enumerate(owner) if o == i) for i in range(self.count)], device=device
        )


def optimise_values(
    view: ModelView,
    prepared: Sequence[PreparedRequest],
    layer: int,
    what: str,
    hparams: Hparams,
    *,
    progress: bool = False,
) -> Values:
    """Optimise the value of each request at the output of block or MLP `layer`.

    Args:
        view: the model; nothing in it changes.
        prepared: u requests.
        layer: where the delta is added.
        what: "block" (MEMIT) or "mlp" (ROME).
        hparams: the numbers of the loop; `values_batch` requests are optimised together.
        progress: show a bar on stderr.

    Raises:
        EditError: a loss or gradient that is not finite, naming the request.

    Cost: for each iteration a forward pass of every context and a backward pass above `layer`, for the requests that
        have not stopped; the head runs on target rows alone.
    """
    if not prepared:
        raise EditError("no requests")
    parts = []
    bar = tqdm(total=len(prepared), unit="edit", desc="values", disable=not progress, leave=False)
    with evaluating(view), bar:
        # Neighbours in length share a batch, so little of it is padding.
        order = sorted(range(len(prepared)), key=lambda i: max(len(p.ids) for p in prepared[i].rewriting))
        for begin in range(0, len(order), hparams.values_batch):
            chosen = order[begin : begin + hparams.values_batch]
            parts.append(_optimise(view, [prepared[i] for i in chosen], Site(layer, what), hparams))
            bar.update(len(chosen))
    back = torch.argsort(torch.tensor(order))
    return Values(
        targets=torch.cat([p.targets for p in parts], 1)[:, back.to(parts[0].targets.device)],
        deltas=torch.cat([p.deltas for p in parts], 1)[:, back.to(parts[0].deltas.device)],
        losses=torch.cat([p.losses for p in parts])[back],
        first_losses=torch.cat([p.first_losses for p in parts])[back],
        steps=torch.cat([p.steps for p in parts])[back],
    )


def _optimise(view: ModelView, prepared: Sequence[PreparedRequest], site: Site, hparams: Hparams) -> Values:
    rows = _Rows(view, prepared)
    u, device = rows.count, view.head.device
    start = capture(view, rows.batch, [site], rows.lookup)[site].to(device)  # [rows, h]
    h0 = start[rows.bare_rows].float()  # [u, h]
    reference = _kl_states(view, rows).to(device)  # [u, h]
    limit = hparams.clamp_norm_factor * h0.norm(dim=1)

    delta, mean, square = (torch.zeros_like(h0) for _ in range(3))
    losses, first, steps = (torch.zeros(u, device=device) for _ in range(3))
    active = torch.arange(u, device=device)
    here = rows
    for iteration in range(hparams.v_num_grad_steps):
        current = delta[active].requires_grad_(True)
        loss = _losses(view, here, site, current, h0[active], reference[active], hparams)  # [active]
        _require_finite(loss.detach(), active, prepared, "loss")
        losses[active] = loss.detach()
        if iteration == 0:
            first[active] = loss.detach()
        if iteration == hparams.v_num_grad_steps - 1:
            break
        going = loss.detach() >= hparams.v_stop_loss
        if not bool(going.any()):
            break
        (gradient,) = torch.autograd.grad(loss[going].sum(), current)
        gradient, moving = gradient[going], active[going]
        _require_finite(gradient.sum(1), moving, prepared, "gradient")
        steps[moving] += 1
        count = steps[moving][:, None]
        mean[moving] = BETAS[0] * mean[moving] + (1 - BETAS[0]) * gradient
        square[moving] = BETAS[1] * square[moving] + (1 - BETAS[1]) * gradient**2
        corrected = mean[moving] / (1 - BETAS[0] ** count)
        scale = (square[moving] / (1 - BETAS[1] ** count)).sqrt() + EPSILON
        moved = delta[moving] - hparams.v_lr * corrected / scale
        norm = moved.norm(dim=1)
        delta[moving] = torch.where((norm > limit[moving])[:, None], moved * (limit[moving] / norm)[:, None], moved)
        if moving.numel() < active.numel():
            active = moving
            here = _Rows(view, [prepared[i] for i in active.tolist()])
    return Values(
        targets=(h0.double() + delta.double()).T.contiguous(),
        deltas=delta.T.contiguous(),
        losses=losses.cpu(),
        first_losses=first.cpu(),
        steps=steps.long().cpu(),
    )


def _losses(view, rows: _Rows, site: Site, delta, h0, reference, hparams: Hparams) -> torch.Tensor:
    with adding(view, site, rows.lookup, delta[rows.owner.to(delta.device)]):
        hidden = last_hidden(view, rows.batch).to(view.head.device)
    at_targets = hidden[rows.target_rows, rows.target_positions]
    log_probs = target_log_probs(at_targets, view.head, rows.target_ids, view.head_bias, view.softcap).log_prob
    nll = torch.zeros(rows.count, device=hidden.device, dtype=log_probs.dtype)
    nll = nll.index_add(0, rows.target_owner, -log_probs * rows.target_weights.to(log_probs))
    kl = distribution_kl(
        hidden[rows.kl_rows, rows.kl_positions], reference, view.head, view.head_bias, view.softcap
    )
    decay = hparams.v_weight_decay * _safe_norm(delta) / h0.norm(dim=1) ** 2
    return (nll + hparams.kl_factor * kl + decay).float()


def _safe_norm(delta: torch.Tensor) -> torch.Tensor:
    """|delta| a row, with the gradient 0 at delta = 0 that torch.norm gives."""
    return torch.linalg.vector_norm(delta, dim=1)


@torch.no_grad()
def _kl_states(view: ModelView, rows: _Rows) -> torch.Tensor:
    """The unedited model's last hidden states [u, h] at the lookup token of "{subject} is a"."""
    from kedit_fast.models.forward import TokenBatch

    at = rows.kl_rows.to(rows.batch.input_ids.device)
    batch = TokenBatch(rows.batch.input_ids[at], rows.batch.attention_mask[at])
    hidden = last_hidden(view, batch)
    return hidden[torch.arange(rows.count, device=hidden.device), rows.kl_positions.to(hidden.device)]


def _require_finite(values: torch.Tensor, which: torch.Tensor, prepared: Sequence[PreparedRequest], name: str) -> None:
    bad = torch.nonzero(~torch.isfinite(values))
    if bad.numel():
        request = prepared[int(which[int(bad[0])])].request
        label = f"request {request.id!r}" if request.id is not None else f"the request on {request.subject!r}"
        raise EditError(f"{label}: the {name} of its value is not finite; is the model's output finite on its prompt?")
