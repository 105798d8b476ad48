"""The objective of values: likelihood of the targets, drift at "{subject} is a", and the size of the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kedit_fast.models.forward import Site
from kedit_fast.models.tail_runner import TailRunner
from kedit_fast.models.view import ModelView
from kedit_fast.ops import distribution_kl, target_log_probs
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.sums import add_by_owner_


class Terms(NamedTuple):
    """The terms of the objective, of v requests."""

    nll: torch.Tensor  # [v] mean over contexts of -(1/T) sum_t log p(target_t)
    kl: torch.Tensor  # [v] KL(p_delta || p_0) at the subject's last token of "{subject} is a"
    decay: torch.Tensor  # [v] sum over sites of |delta| / |h0|^2
    predicted: torch.Tensor | None  # [v] whether every target token is the argmax in every context, when asked for
    prefixed: torch.Tensor | None  # [v] the same in the contexts with a prefix alone, where there are any


class Objective:
    """The prompts of u requests on a TailRunner, where their targets stand in the tails, and the loss over them."""

    owner: torch.Tensor  # [R] request of each row
    kl_rows: torch.Tensor  # [u] row of "{subject} is a"
    target_rows: torch.Tensor  # [n] row of each target token in each context
    target_index: torch.Tensor  # [n] place in that row's tail that predicts it
    target_ids: torch.Tensor  # [n] the token
    target_owner: torch.Tensor  # [n] its request
    target_weights: torch.Tensor  # [n] 1 / (contexts * T)
    target_bare: torch.Tensor  # [n] 1 in the context without a prefix, where there are others; else 0
    wanted: torch.Tensor  # [n + u] places whose hidden states the terms need

    def __init__(self, view: ModelView, prepared: Sequence[PreparedRequest], sites: Sequence[Site]):
        rows: list[tuple[int, ...]] = []
        lookups: list[int] = []
        owner: list[int] = []  # request of each row
        targets: list[tuple[int, int, int, int, float, int]] = []  # row, tail index, token, request, weight, bare
        kl_rows: list[int] = []
        bare_rows: list[int] = []
        for i, request in enumerate(prepared):
            bare_rows.append(len(rows))
            weight = 1.0 / (len(request.rewriting) * len(request.target))
            for c, prompt in enumerate(request.rewriting):
                last, bare = len(prompt.ids) - 1 - prompt.lookup, int(c == 0 and len(request.rewriting) > 1)
                targets += [(len(rows), last + t, token, i, weight, bare) for t, token in enumerate(request.target)]
                rows.append((*prompt.ids, *request.target[:-1]))
                lookups.append(prompt.lookup)
                owner.append(i)
            kl_rows.append(len(rows))
            rows.append(request.kl.cut().ids)
            lookups.append(request.kl.lookup)
            owner.append(i)
        self.view, self.count = view, len(prepared)
        self.device = view.head.device
        self.runner = TailRunner(view, rows, lookups, sites, kl_rows)

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(
                values, dtype=torch.float32 if isinstance(values[0], float) else None, device=self.device
            )

        self.owner, self.kl_rows = column(owner), column(kl_rows)
        names = ("target_rows", "target_index", "target_ids", "target_owner", "target_weights", "target_bare")
        for name, values in zip(names, zip(*targets, strict=True), strict=True):
            setattr(self, name, column(values))
        bare = column(bare_rows)
        self.h0 = self.runner.site_outputs.to(self.device)[bare].float()  # [u, sites, h]
        self.reference = self.runner.reference.to(self.device)  # [u, h]
        self._place()

    def _place(self) -> None:
        length = self.runner.ids.shape[1]
        self.wanted = torch.cat([self.target_rows * length + self.target_index, self.kl_rows * length])

    def select(self, keep: torch.Tensor) -> Objective:
        """The objective of some of the requests, `keep` [v] in increasing order."""
        chosen = object.__new__(Objective)
        number = torch.full((self.count,), -1, device=self.device)
        number[keep] = torch.arange(keep.numel(), device=self.device)
        rows = torch.nonzero(number[self.owner] >= 0)[:, 0]
        row_number = torch.full((self.owner.numel(),), -1, device=self.device)
        row_number[rows] = torch.arange(rows.numel(), device=self.device)
        targets = torch.nonzero(number[self.target_owner] >= 0)[:, 0]
        chosen.view, chosen.device, chosen.count = self.view, self.device, keep.numel()
        chosen.runner = self.runner.select(rows)
        chosen.owner = number[self.owner[rows]]
        chosen.kl_rows = row_number[self.kl_rows[keep]]
        chosen.target_rows = row_number[self.target_rows[targets]]
        chosen.target_owner = number[self.target_owner[targets]]
        for name in ("target_index", "target_ids", "target_weights", "target_bare"):
            setattr(chosen, name, getattr(self, name)[targets])
        chosen.h0, chosen.reference = self.h0[keep], self.reference[keep]
        chosen._place()
        return chosen

    def joined(self, other: Objective) -> Objective:
        """The objective of the requests of both."""
        whole = object.__new__(Objective)
        whole.view, whole.device, whole.count = self.view, self.device, self.count + other.count
        whole.runner = self.runner.joined(other.runner)
        rows = self.owner.numel()
        for name, shift in (("owner", self.count), ("target_owner", self.count), ("kl_rows", rows),
                            ("target_rows", rows), ("target_index", 0), ("target_ids", 0), ("target_weights", 0),
                            ("target_bare", 0), ("h0", 0), ("reference", 0)):  # fmt: skip
            setattr(whole, name, torch.cat([getattr(self, name), getattr(other, name) + shift]))
        whole._place()
        return whole

    def terms(self, delta: torch.Tensor, predicted: bool = False) -> Terms:
        """The terms at delta [u, sites, h], differentiable in it; with `predicted`, also who is right already."""
        view = self.view
        hidden = self.runner.run(delta[self.owner], self.wanted).to(self.device)  # [targets + u, h]
        at_targets, at_subjects = hidden[: self.target_ids.numel()], hidden[self.target_ids.numel() :]
        found = target_log_probs(at_targets, view.head, self.target_ids, view.head_bias, view.softcap, predicted)
        nll = torch.zeros(self.count, device=self.device, dtype=found.log_prob.dtype)
        nll = add_by_owner_(nll, self.target_owner, -found.log_prob * self.target_weights.to(found.log_prob))
        kl = distribution_kl(at_subjects, self.reference, view.head, view.head_bias, view.softcap)
        decay = (torch.linalg.vector_norm(delta, dim=2) / self.h0.norm(dim=2) ** 2).sum(1)
        right = prefixed = None
        if predicted:
            wrong = (found.top1 != self.target_ids).to(torch.int32)
            none = torch.zeros(2, self.count, device=self.device, dtype=torch.int32)
            right = add_by_owner_(none[0], self.target_owner, wrong) == 0
            prefixed = add_by_owner_(none[1], self.target_owner, wrong * (1 - self.target_bare).to(wrong)) == 0
        return Terms(nll.float(), kl.float(), decay, right, prefixed)
