"""The objective of values: likelihood of the targets, drift at "{subject} is a", and the size of the deltas."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch

from kedit_fast.editing.values.slot_shape import SlotShape
from kedit_fast.models.fixed_deltas import FixedDeltas
from kedit_fast.models.forward import Site
from kedit_fast.models.head import Head
from kedit_fast.models.prompt_runner import PromptRunner, record_prompts
from kedit_fast.models.tail_runner import TailRunner
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.sums import add_by_owner_


class Terms(NamedTuple):
    """The terms of the objective, of v requests."""

    nll: torch.Tensor
    """[v] mean over contexts of -(1/T) sum_t log p(target_t)."""
    kl: torch.Tensor
    """[v] the drift at the subject's last token of "{subject} is a"; see `Drift`."""
    decay: torch.Tensor
    """[v] sum over sites of |delta| / |h0|^p, with p the objective's `decay_power`."""
    all_top1: torch.Tensor | None
    """[v] bool, whether every target token is the most probable one in every context; None unless requested."""
    prefixed_top1: torch.Tensor | None
    """[v] bool, the same in the contexts with a prefix alone, where there are any; None unless requested."""


class Drift(NamedTuple):
    """How far the distribution p_delta of the next token is from the unedited p_0: T^2 KL, with both at temperature T.

    The factor is Hinton's (arXiv 1503.02531): the term's gradients keep their size at any temperature.
    """

    temperature: float = 1.0
    """T; 1 as published."""
    reverse: bool = False
    """KL(p_0 || p_delta), the mean over what the original model says, as in distillation; else KL(p_delta || p_0), as
    published."""

    def of(self, head: Head, states: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """[u] the drift from `reference` [u, h] to `states` [u, h], differentiable in these."""
        kl = head.distribution_kl(states, reference, temperature=self.temperature, reverse=self.reverse)
        return kl if self.temperature == 1 else self.temperature**2 * kl


PUBLISHED = Drift()
"""Temperature 1, averaged over what the edited model says."""


@dataclass(frozen=True)
class TargetTokens:
    """The n target tokens of u requests, in every context; a tail is the part of a row that is run."""

    row: torch.Tensor
    """[n] int64, the row that a token belongs to."""
    place: torch.Tensor
    """[n] int64, the place in that row's tail that predicts it."""
    token: torch.Tensor
    """[n] int64, its id."""
    request: torch.Tensor
    """[n] int64, its request."""
    weight: torch.Tensor
    """[n] fp32, 1 / (contexts * T): its part of the request's likelihood term."""
    is_bare: torch.Tensor
    """[n] int64, 1 in the context without a prefix of a request that has others; else 0."""

    def select(self, chosen: torch.Tensor, row: torch.Tensor, request: torch.Tensor) -> TargetTokens:
        """Some of the tokens, with rows and requests renumbered: `row` [R] and `request` [u] are the new numbers."""
        part = TargetTokens(*(getattr(self, item.name)[chosen] for item in fields(self)))
        return TargetTokens(row[part.row], part.place, part.token, request[part.request], part.weight, part.is_bare)

    def append(self, other: TargetTokens, rows: int, requests: int) -> TargetTokens:
        """The tokens of both, where those of `other` come after `rows` rows of `requests` requests."""
        shifted = TargetTokens(
            other.row + rows, other.place, other.token, other.request + requests, other.weight, other.is_bare
        )
        return TargetTokens(
            *(torch.cat([getattr(self, item.name), getattr(shifted, item.name)]) for item in fields(self))
        )


@dataclass(frozen=True)
class EarlierChunks:
    """The deltas of the m chunks of a request's target before the one whose value is looked for; they stay."""

    distances: tuple[int, ...]
    """[m] tokens from the lookup token of each of them to this chunk's."""
    deltas: torch.Tensor
    """[m, sites, h]."""


@dataclass
class Objective:
    """The prompts of u requests, ready to run their tails, and the loss over them."""

    view: ModelView
    """The model."""
    runner: PromptRunner
    """The R rows: of each request its contexts with the target, then "{subject} is a"."""
    owner: torch.Tensor
    """[R] int64, the request of each row."""
    kl_rows: torch.Tensor
    """[u] int64, the row of "{subject} is a"."""
    targets: TargetTokens
    """Where the targets stand."""
    h0: torch.Tensor
    """[u, sites, h] fp32, the sites' outputs at the subject's last token, without a delta."""
    reference: torch.Tensor
    """[u, h] last states at the subject's last token of "{subject} is a", without a delta; logits [u, V] where passes
    give these."""
    decay_power: int = 2
    """Power of |h0| by which |delta| is divided: 2 as published; with 1 the term has no scale."""
    drift: Drift = PUBLISHED
    """How the drift at "{subject} is a" is measured."""
    wanted: torch.Tensor = field(init=False)
    """[n + u] int64, places of all tails whose hidden states the terms need."""

    def __post_init__(self):
        self.wanted = self._wanted()

    def _wanted(self) -> torch.Tensor:
        length = self.runner.ids.shape[1]
        return torch.cat([self.targets.row * length + self.targets.place, self.kl_rows * length])

    @classmethod
    def build(
        cls,
        view: ModelView,
        prepared: Sequence[PreparedRequest],
        sites: Sequence[Site],
        decay_power: int = 2,
        drift: Drift = PUBLISHED,
        earlier: Sequence[EarlierChunks] | None = None,
        shape: SlotShape | None = None,
    ) -> Objective:
        """The objective of some requests, with deltas at `sites`; runs the full pass over their prompts.

        `earlier` has the deltas of earlier chunks of each request, the same number of all; None without any. With a
        `shape` every request takes as much as any other: rows get more tokens behind their own, which no earlier token
        sees, and targets get more tokens, without weight.
        """
        rows: list[tuple[int, ...]] = []
        lookups: list[int] = []
        owner: list[int] = []
        targets: list[tuple[int, int, int, int, float, int]] = []  # in the order of the fields of TargetTokens
        kl_rows: list[int] = []
        bare_rows: list[int] = []
        for i, request in enumerate(prepared):
            bare_rows.append(len(rows))
            weight = 1.0 / (len(request.rewriting) * len(request.target))
            weights = dict.fromkeys(range(len(request.target)), weight)
            padding = 0 if shape is None else shape.target - len(request.target)
            # Repeated, not any token: one that the head never says would make the loss infinite.
            target = (*request.target, *(request.target[-1],) * padding)
            for c, prompt in enumerate(request.rewriting):
                last, is_bare = len(prompt.ids) - 1 - prompt.lookup, int(c == 0 and len(request.rewriting) > 1)
                targets += [
                    (len(rows), last + t, token, i, weights.get(t, 0.0), is_bare) for t, token in enumerate(target)
                ]
                rows.append((*prompt.ids, *request.target[:-1]))
                lookups.append(prompt.lookup)
                owner.append(i)
            kl_rows.append(len(rows))
            rows.append(request.kl.cut().ids)
            lookups.append(request.kl.lookup)
            owner.append(i)
        if shape is not None:
            ends = (lookup + shape.tail for lookup in lookups)
            rows = [(*row, *(row[-1],) * (end - len(row))) for row, end in zip(rows, ends, strict=True)]
        fixed = None if earlier is None else _fixed(earlier, owner, lookups, set(kl_rows))
        recorded = record_prompts(view, rows, lookups, sites, kl_rows, fixed)
        runner = recorded.runner
        if shape is not None and isinstance(runner, TailRunner):
            runner = runner.padded(shape.prefix - runner.prefix, 0)
        device = view.head.device

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else None, device=device)

        return cls(
            view=view,
            runner=runner,
            owner=column(owner),
            kl_rows=column(kl_rows),
            targets=TargetTokens(*(column(values) for values in zip(*targets, strict=True))),
            h0=recorded.site_outputs.to(device)[column(bare_rows)].float(),
            reference=recorded.reference.to(device),
            decay_power=decay_power,
            drift=drift,
        )

    def __len__(self) -> int:
        return self.kl_rows.numel()

    @property
    def device(self) -> torch.device:
        """Where the head is, and the tensors of this class."""
        return self.h0.device

    def select(self, requests: torch.Tensor) -> Objective:
        """The objective of some of the requests, [v] int64 in increasing order."""
        request = _new_numbers(requests, len(self))
        rows = torch.nonzero(request[self.owner] >= 0)[:, 0]
        row = _new_numbers(rows, self.owner.numel())
        tokens = torch.nonzero(request[self.targets.request] >= 0)[:, 0]
        return Objective(
            view=self.view,
            runner=self.runner.select(rows),
            owner=request[self.owner[rows]],
            kl_rows=row[self.kl_rows[requests]],
            targets=self.targets.select(tokens, row, request),
            h0=self.h0[requests],
            reference=self.reference[requests],
            decay_power=self.decay_power,
            drift=self.drift,
        )

    def append(self, other: Objective) -> Objective:
        """The objective of the requests of both."""
        rows, requests = self.owner.numel(), len(self)
        return Objective(
            view=self.view,
            runner=self.runner.append(other.runner),  # pyright: ignore[reportArgumentType]  one kind in one model
            owner=torch.cat([self.owner, other.owner + requests]),
            kl_rows=torch.cat([self.kl_rows, other.kl_rows + rows]),
            targets=self.targets.append(other.targets, rows, requests),
            h0=torch.cat([self.h0, other.h0]),
            reference=torch.cat([self.reference, other.reference]),
            decay_power=self.decay_power,
            drift=self.drift,
        )

    def write_(self, requests: torch.Tensor, other: Objective) -> None:
        """Put the requests of another objective in the place of some of these, in this one's own memory.

        Args:
            requests: [n] int64, of those that go.
            other: of n requests; both were built with one `shape`, without `select` or `append` since.
        """
        runner, new = self.runner, other.runner
        assert isinstance(runner, TailRunner) and isinstance(new, TailRunner)
        runner.write_(_members(requests, self.owner.numel() // len(self)), new)
        tokens = _members(requests, self.targets.token.numel() // len(self))
        for name in ("place", "token", "weight", "is_bare"):  # rows and requests stay
            getattr(self.targets, name)[tokens] = getattr(other.targets, name)
        self.h0[requests], self.reference[requests] = other.h0, other.reference
        self.wanted.copy_(self._wanted())

    def terms(self, delta: torch.Tensor, top1: bool = False) -> Terms:
        """The terms at delta [u, sites, h], differentiable in it; with `top1`, also which targets are right already."""
        view, targets, count = self.view, self.targets, len(self)
        hidden = self.runner.run(delta[self.owner], self.wanted).to(self.device)  # [n + u, h]
        at_targets, at_subjects = hidden[: targets.token.numel()], hidden[targets.token.numel() :]
        scores = view.head.target_log_probs(at_targets, targets.token, top1)
        nll = torch.zeros(count, device=self.device, dtype=scores.log_prob.dtype)
        nll = add_by_owner_(nll, targets.request, -scores.log_prob * targets.weight.to(scores.log_prob))
        kl = self.drift.of(view.head, at_subjects, self.reference)
        decay = (torch.linalg.vector_norm(delta, dim=2) / self.h0.norm(dim=2) ** self.decay_power).sum(1)
        all_top1 = prefixed_top1 = None
        if top1:
            wrong = ((scores.top1 != targets.token) & (targets.weight > 0)).to(torch.int32)
            none = torch.zeros(2, count, device=self.device, dtype=torch.int32)
            all_top1 = add_by_owner_(none[0], targets.request, wrong) == 0
            prefixed_top1 = add_by_owner_(none[1], targets.request, wrong * (1 - targets.is_bare).to(wrong)) == 0
        return Terms(nll.float(), kl.float(), decay, all_top1, prefixed_top1)


def _fixed(
    earlier: Sequence[EarlierChunks], owner: Sequence[int], lookups: Sequence[int], kl_rows: Set[int]
) -> FixedDeltas:
    """The deltas of earlier chunks in each row; zeros in the rows of "{subject} is a", which hold no target."""
    scored = [row not in kl_rows for row in range(len(owner))]
    positions = [
        [lookup - distance if has else 0 for distance in earlier[i].distances]
        for i, lookup, has in zip(owner, lookups, scored, strict=True)
    ]
    deltas = torch.stack([one.deltas for one in earlier])  # [u, m, sites, h]
    of_rows = deltas[torch.tensor(list(owner), device=deltas.device)]
    of_rows = of_rows * torch.tensor(scored, device=deltas.device)[:, None, None, None]
    return FixedDeltas(torch.tensor(positions, device=deltas.device), of_rows)


def _members(groups: torch.Tensor, size: int) -> torch.Tensor:
    """[n size] the numbers in groups [n] int64 of `size` neighbors each."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _new_numbers(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """[count] int64: the place of each number in `chosen`, -1 where it is not there."""
    place = torch.full((count,), -1, device=chosen.device)
    place[chosen] = torch.arange(chosen.numel(), device=chosen.device)
    return place
