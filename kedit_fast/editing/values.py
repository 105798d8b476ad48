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
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.models.suffix import TailRunner
from kedit_fast.ops import distribution_kl, target_log_probs

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, torch's defaults
LEAVE_SHARE = 0.8  # prompts of stopped requests leave the batch when no more than this share still moves


@dataclass(frozen=True)
class Values:
    """Optimised values of u requests."""

    targets: torch.Tensor  # [h, u] h0 + delta, fp64
    deltas: torch.Tensor  # [h, u] fp32
    losses: torch.Tensor  # [u] at the last forward pass
    steps: torch.Tensor  # [u] optimiser steps taken


class _Prompts:
    """The prompts of a few requests on a TailRunner, and where to look in their tails."""

    def __init__(self, view: ModelView, prepared: Sequence[PreparedRequest], site: Site):
        rows: list[tuple[int, ...]] = []
        lookups: list[int] = []
        owner: list[int] = []  # request of each row
        targets: list[tuple[int, int, int, int, float]] = []  # row, tail index, token, request, weight
        kl_rows: list[int] = []
        bare_rows: list[int] = []
        for i, request in enumerate(prepared):
            bare_rows.append(len(rows))
            weight = 1.0 / (len(request.rewriting) * len(request.target))
            for prompt in request.rewriting:
                last = len(prompt.ids) - 1 - prompt.lookup
                targets += [(len(rows), last + t, token, i, weight) for t, token in enumerate(request.target)]
                rows.append((*prompt.ids, *request.target[:-1]))
                lookups.append(prompt.lookup)
                owner.append(i)
            kl_rows.append(len(rows))
            rows.append(request.kl.cut().ids)
            lookups.append(request.kl.lookup)
            owner.append(i)
        self.device = view.head.device
        self.runner = TailRunner(view, rows, lookups, site)
        self.count = len(prepared)
        self.owner = torch.tensor(owner, device=self.device)
        self.kl_rows = torch.tensor(kl_rows, device=self.device)
        row, index, token, request, weight = zip(*targets, strict=True)
        self.target_rows = torch.tensor(row, device=self.device)
        self.target_index = torch.tensor(index, device=self.device)
        self.target_ids = torch.tensor(token, device=self.device)
        self.target_owner = torch.tensor(request, device=self.device)
        self.target_weights = torch.tensor(weight, device=self.device)
        self.h0 = self.runner.site_output.to(self.device)[torch.tensor(bare_rows, device=self.device)].float()  # [u, h]
        self.reference = self.runner.start.to(self.device)[self.kl_rows, 0]  # [u, h]

    def select(self, keep: torch.Tensor) -> _Prompts:
        """The prompts of some of the requests, `keep` [v] in increasing order."""
        chosen = object.__new__(_Prompts)
        number = torch.full((self.count,), -1, device=self.device)
        number[keep] = torch.arange(keep.numel(), device=self.device)
        rows = torch.nonzero(number[self.owner] >= 0)[:, 0]
        row_number = torch.full((self.owner.numel(),), -1, device=self.device)
        row_number[rows] = torch.arange(rows.numel(), device=self.device)
        targets = torch.nonzero(number[self.target_owner] >= 0)[:, 0]
        chosen.device, chosen.count = self.device, keep.numel()
        chosen.runner = self.runner.select(rows)
        chosen.owner = number[self.owner[rows]]
        chosen.kl_rows = row_number[self.kl_rows[keep]]
        chosen.target_rows = row_number[self.target_rows[targets]]
        chosen.target_index = self.target_index[targets]
        chosen.target_ids = self.target_ids[targets]
        chosen.target_owner = number[self.target_owner[targets]]
        chosen.target_weights = self.target_weights[targets]
        chosen.h0, chosen.reference = self.h0[keep], self.reference[keep]
        return chosen

    def losses(self, view: ModelView, delta: torch.Tensor, hparams: Hparams) -> torch.Tensor:
        """The objective of each request [u] at delta [u, h]."""
        hidden = self.runner.run(delta[self.owner]).to(self.device)  # [R, S, h]
        at_targets = hidden[self.target_rows, self.target_index]
        log_probs = target_log_probs(at_targets, view.head, self.target_ids, view.head_bias, view.softcap).log_prob
        nll = torch.zeros(self.count, device=self.device, dtype=log_probs.dtype)
        nll = nll.index_add(0, self.target_owner, -log_probs * self.target_weights.to(log_probs))
        kl = distribution_kl(hidden[self.kl_rows, 0], self.reference, view.head, view.head_bias, view.softcap)
        decay = hparams.v_weight_decay * torch.linalg.vector_norm(delta, dim=1) / self.h0.norm(dim=1) ** 2
        return (nll + hparams.kl_factor * kl + decay).float()


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
        what: "block" (MEMIT) or "mlp" (ROME, and every method where a norm follows the MLP: Gemma 2 and 3, OLMo 2).
        hparams: the numbers of the loop; `values_batch` requests are optimised together.
        progress: show a bar on stderr.

    Raises:
        EditError: a loss or gradient that is not finite, naming the request; the site "block" in a model with a norm
            between the MLP and the residual sum.

    Cost: one full pass over the prompts, then for each iteration a forward and a backward pass of the blocks above
        `layer` over the tokens from the subject's last one on, for requests that have not stopped; the head runs on
        target rows alone.
    """
    if not prepared:
        raise EditError("no requests")
    if what == "block" and view.spec.post_norm:
        raise EditError(
            f"{view.spec.name} has a norm between the edited layer and the residual sum, so no write can produce a "
            'value at a block\'s output: use the site "mlp", before that norm'
        )
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
        steps=torch.cat([p.steps for p in parts])[back],
    )


def _optimise(view: ModelView, prepared: Sequence[PreparedRequest], site: Site, hparams: Hparams) -> Values:
    prompts = _Prompts(view, prepared, site)
    u, device, h0 = prompts.count, prompts.device, prompts.h0
    limit = hparams.clamp_norm_factor * h0.norm(dim=1)
    delta, mean, square = (torch.zeros_like(h0) for _ in range(3))
    losses, steps = (torch.zeros(u, device=device) for _ in range(2))
    going = torch.ones(u, dtype=torch.bool, device=device)  # requests that have not stopped
    held = torch.arange(u, device=device)  # requests whose prompts still run
    for iteration in range(hparams.v_num_grad_steps):
        current = delta[held].requires_grad_(True)
        loss = prompts.losses(view, current, hparams)
        measured = loss.detach()
        _require_finite(measured, held, prepared, "loss")
        live = going[held]
        losses[held] = torch.where(live, measured, losses[held])
        if iteration == hparams.v_num_grad_steps - 1:
            break
        live = live & (measured >= hparams.v_stop_loss)
        going[held] = live
        if not bool(live.any()):
            break
        (gradient,) = torch.autograd.grad(loss[live].sum(), current)
        moving, gradient = held[live], gradient[live]
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
        if moving.numel() <= LEAVE_SHARE * held.numel():
            prompts, held = prompts.select(torch.nonzero(live)[:, 0]), moving
    return Values(
        targets=(h0.double() + delta.double()).T.contiguous(),
        deltas=delta.T.contiguous(),
        losses=losses.cpu(),
        steps=steps.long().cpu(),
    )


def _require_finite(values: torch.Tensor, which: torch.Tensor, prepared: Sequence[PreparedRequest], name: str) -> None:
    bad = torch.nonzero(~torch.isfinite(values))
    if bad.numel():
        request = prepared[int(which[int(bad[0])])].request
        label = f"request {request.id!r}" if request.id is not None else f"the request on {request.subject!r}"
        raise EditError(f"{label}: the {name} of its value is not finite; is the model's output finite on its prompt?")
