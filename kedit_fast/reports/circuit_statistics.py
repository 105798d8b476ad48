"""How alike the scores of edges are in two models, beside what they differ by anyway: overlaps, shares, changes.

Two halves of the same prompts give scores that differ, in one and the same model. That is the floor of each number
here. The control is what prompts that nobody edited change by. Scores are compared as shares, as ranks, or divided by
m(clean) - m(corrupted) of their model, because an edit changes that difference itself.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kedit_fast.errors import EvaluationError
from kedit_fast.locating.circuits import EdgeScores
from kedit_fast.locating.graph import Graph
from kedit_fast.support.intervals import DRAWS


@dataclass(frozen=True)
class Estimate:
    """A value with the range of 95 % of random halves."""

    value: float
    """Of all pairs; of a floor, the mean over halvings."""
    low: float
    """2.5 % of halvings are below it."""
    high: float
    """2.5 % of halvings are above it."""


@dataclass(frozen=True)
class Overlap:
    """How alike the edges' scores are, before and after, and where nothing was edited. 1 is the same."""

    name: str
    """"top 50": Jaccard index of the 50 edges with the largest |score|; "spearman": rank correlation of |score|."""
    edited: Estimate
    """Edited prompts, before against after. Its range is of halves: each half before against the same half after."""
    floor_before: Estimate
    """Two halves of the prompts, both in the unedited model."""
    floor_after: Estimate
    """Two halves of the prompts, both in the edited model."""
    control: Estimate | None
    """Unedited prompts, before against after; None without them."""
    chance: float
    """What random scores give on average."""

    @property
    def is_beyond(self) -> bool:
        """Whether the edited prompts agree less than halves in either model do, and less than the control."""
        control = math.inf if self.control is None else self.control.low
        return self.edited.value < min(self.floor_before.low, self.floor_after.low, control)


@dataclass(frozen=True)
class Share:
    """The part of all |score| on edges that leave the nodes of one kind in one layer."""

    name: str
    """"input", "attn0", "mlp0", .."""
    before: float
    """In the unedited model."""
    after: float
    """In the edited model."""
    floor: float
    """By how much two halves of the prompts differ in one model: 97.5 % of halvings differ less, in either model."""
    control: float | None
    """By how much unedited prompts differ, before against after; None without them."""
    is_edited: bool
    """Whether weights of these nodes differ between the models."""

    @property
    def is_beyond(self) -> bool:
        """Whether the share changed by more than halves differ, and by more than that of the control."""
        return abs(self.after - self.before) > max(self.floor, abs(self.control or 0.0))


@dataclass(frozen=True)
class EdgeChange:
    """An edge whose score changed; scores are divided by m(clean) - m(corrupted) of their model."""

    source: str
    """The node that writes."""
    target: str
    """The input that reads."""
    before: float
    """Normalized score in the unedited model."""
    after: float
    """Normalized score in the edited model."""
    floor: float
    """By how much halves differ on this edge: 97.5 % of halvings differ less, in either model."""
    floor_of_all: float
    """By how much halves differ on any edge: 97.5 % of halvings have no edge that differs more, in either model."""
    control: float | None
    """The change on unedited prompts; None without them."""

    @property
    def is_beyond(self) -> bool:
        """Whether the change is larger than that of any edge between halves, and than that of the control."""
        return abs(self.after - self.before) > max(self.floor_of_all, abs(self.control or 0.0))


@dataclass(frozen=True, eq=False)
class PartScores:
    """Scores of the edges that exist, of each part of some pairs in one model."""

    graph: Graph
    """Of the model."""
    values: torch.Tensor
    """[G, E] mean scores of G parts, in the order of `graph.mask`."""
    sizes: tuple[int, ...]
    """Pairs of each part."""
    clean: float
    """Mean metric of all clean prompts."""
    corrupted: float
    """Mean metric of all corrupted prompts."""
    steps: int
    """Of the scoring."""

    @classmethod
    def of(cls, parts: Sequence[EdgeScores]) -> PartScores:
        """The parts together."""
        graph, sizes = parts[0].graph, tuple(part.pairs for part in parts)
        values = torch.stack([part.scores.cpu()[graph.mask] for part in parts])
        if not bool(torch.isfinite(values).all()):
            raise EvaluationError("scores of edges are not finite: nothing can be compared")
        clean = sum(part.pairs * part.clean for part in parts) / sum(sizes)
        corrupted = sum(part.pairs * part.corrupted for part in parts) / sum(sizes)
        return cls(graph, values, sizes, clean, corrupted, parts[0].steps)

    def mean(self, members: Sequence[int] | None = None) -> torch.Tensor:
        """[E] fp64, the mean over pairs of some parts; of all for None."""
        chosen = list(range(len(self.sizes)) if members is None else members)
        weights = torch.tensor([self.sizes[i] for i in chosen], dtype=torch.float64)
        return weights.div_(weights.sum()) @ self.values[chosen].double()

    @property
    def gap(self) -> float:
        """m(clean) - m(corrupted), without its sign."""
        return abs(self.clean - self.corrupted)

    def total(self, scoring: str, metric: str) -> EdgeScores:
        """The scores of all pairs as `edge_scores` would give them."""
        scores = torch.zeros(self.graph.mask.shape, dtype=self.values.dtype)
        scores[self.graph.mask] = self.mean().to(scores.dtype)
        return EdgeScores(self.graph, scores, scoring, self.steps, metric, sum(self.sizes), self.clean, self.corrupted)


Halving = tuple[tuple[int, ...], tuple[int, ...]]
"""The parts of one half and those of the other."""


def halves(sizes: Sequence[int], splits: int, generator: random.Random) -> list[Halving]:
    """Different ways to divide parts into two halves with about as many pairs, at most `splits` of them.

    Example:
        >>> len(halves([1, 1, 1, 1], 100, random.Random(0)))
        3
    """
    count = len(sizes)
    if count < 2:
        return []
    every = math.comb(count, count // 2) // (1 if count % 2 else 2)
    if every <= 2 * splits:
        first = [one for one in itertools.combinations(range(count), count // 2) if count % 2 or 0 in one]
        generator.shuffle(first)
        return [(one, tuple(i for i in range(count) if i not in one)) for one in first[:splits]]
    chosen: dict[tuple[int, ...], Halving] = {}
    while len(chosen) < splits:
        order = list(range(count))
        generator.shuffle(order)
        one, other = tuple(sorted(order[: count // 2])), tuple(sorted(order[count // 2 :]))
        if not count % 2 and 0 not in one:
            one, other = other, one
        chosen.setdefault(one, (one, other))
    return list(chosen.values())


def jaccard(scores: torch.Tensor, others: torch.Tensor, k: int) -> float:
    """Of the k edges with the largest |score| in two lists [E]: those in both over those in either.

    Example:
        >>> jaccard(torch.tensor([3.0, -2.0, 1.0]), torch.tensor([3.0, 1.0, -2.0]), 2)
        0.3333333333333333
    """
    return _Ranked.of(scores, k).likeness(_Ranked.of(others, k), [k])[0]


def chance_jaccard(k: int, edges: int) -> float:
    """What two random sets of k of so many edges have in common, k^2 / edges, over the rest of their union."""
    return k / (2 * edges - k)


def spearman(scores: torch.Tensor, others: torch.Tensor) -> float:
    """Rank correlation of |score| in two lists [E]; edges with equal scores share their mean rank. 0 for constants.

    Example:
        >>> round(spearman(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([10.0, 30.0, -20.0])), 6)
        0.5
    """
    return _Ranked.of(scores, 0).likeness(_Ranked.of(others, 0), [])[0]


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Edges in the order of their |score|, sorted once for all that is asked of it."""

    largest: list[int]
    """The edges with the largest |score|."""
    ranks: torch.Tensor
    """[E] fp64, less their mean."""

    @classmethod
    def of(cls, scores: torch.Tensor, most: int) -> _Ranked:
        """The order of scores [E], with the `most` largest."""
        sizes = scores.abs()
        ranks = _ranks(sizes)
        return cls(torch.argsort(sizes, descending=True, stable=True)[:most].tolist(), ranks - ranks.mean())

    def likeness(self, other: _Ranked, top: Sequence[int]) -> list[float]:
        """The Jaccard index of each of `top` edges, and the rank correlation."""
        values = []
        for k in top:
            one, two = set(self.largest[:k]), set(other.largest[:k])
            values.append(len(one & two) / len(one | two))
        size = float(self.ranks.norm() * other.ranks.norm())
        return [*values, float(self.ranks @ other.ranks) / size if size > 0 else 0.0]


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks [E] fp64 from 0, the mean rank for equal values."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts + 1) / 2)[which]


def _estimate(value: float | None, samples: Sequence[float]) -> Estimate:
    """With the range of 95 % of the samples; their mean, for a value of None."""
    sample = torch.tensor(samples, dtype=torch.float64)
    low, high = sample.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(sample.mean()) if value is None else value, low, high)


def overlaps_of(
    before: PartScores,
    after: PartScores,
    controls: tuple[PartScores, PartScores] | None,
    top: Sequence[int],
    halvings: Sequence[Halving],
    control_halvings: Sequence[Halving] = (),
) -> tuple[Overlap, ...]:
    """Jaccard indices of the largest edges and the rank correlation, each with its floors, control and chance.

    Cost: two sorts of all edges for each half in each model, and as many for the control.
    """
    names = [*(f"top {k}" for k in top), "spearman"]
    chances = [*(chance_jaccard(k, before.graph.edge_count) for k in top), 0.0]
    most = max(top, default=0)

    def compared(one: PartScores, other: PartScores, ways: Sequence[Halving]) -> list[tuple[Estimate, ...]]:
        """By measure: one against the other, and halves of each against each other, where there are any."""
        across, within, beyond = [], [], []
        for way in ways:
            (a, b), (c, d) = ([_Ranked.of(model.mean(half), most) for half in way] for model in (one, other))
            across += [a.likeness(c, top), b.likeness(d, top)]
            within.append(a.likeness(b, top))
            beyond.append(c.likeness(d, top))
        whole = _Ranked.of(one.mean(), most).likeness(_Ranked.of(other.mean(), most), top)
        result = []
        for i, value in enumerate(whole):
            estimates = [_estimate(value, [row[i] for row in across] or [value])]
            estimates += [_estimate(None, [row[i] for row in rows]) for rows in (within, beyond) if rows]
            result.append(tuple(estimates))
        return result

    edited = compared(before, after, halvings)
    control = [None] * len(names) if controls is None else [row[0] for row in compared(*controls, control_halvings)]
    rows = zip(names, edited, control, chances, strict=True)
    return tuple(
        Overlap(name, whole, floor_before, floor_after, unedited, chance)
        for name, (whole, floor_before, floor_after), unedited, chance in rows
    )


def shares_of(
    before: PartScores,
    after: PartScores,
    controls: tuple[PartScores, ...] | None,
    halvings: Sequence[Halving],
    edited: Sequence[str] = (),
) -> tuple[Share, ...]:
    """The part of |score| that leaves the nodes of a kind in a layer, before and after, with floor and control."""
    graph = before.graph
    names = ["input"]
    for layer in range(graph.layers):
        names += [f"attn{layer}", f"mlp{layer}"]
    kinds = []
    for source, layer in zip(graph.sources, graph.source_layers, strict=True):
        kinds.append(0 if layer < 0 else 1 + 2 * layer + source.startswith("m"))
    owner = torch.tensor(kinds)[torch.nonzero(graph.mask)[:, 0]]  # [E]

    def of(values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, owner, values.abs())
        total = float(sums.sum())
        if not total > 0:
            raise EvaluationError("all scores of edges are 0: there are no shares")
        return sums / total

    floor = torch.zeros(len(names), dtype=torch.float64)
    for model in (before, after):
        apart = torch.stack([(of(model.mean(a)) - of(model.mean(b))).abs() for a, b in halvings])
        floor = torch.maximum(floor, apart.quantile(0.975, dim=0))
    change = None if controls is None else (of(controls[1].mean()) - of(controls[0].mean())).tolist()
    rows = zip(names, of(before.mean()).tolist(), of(after.mean()).tolist(), floor.tolist(), strict=True)
    return tuple(
        Share(name, old, new, bound, None if change is None else change[i], name in edited)
        for i, (name, old, new, bound) in enumerate(rows)
    )


def changes_of(
    before: PartScores,
    after: PartScores,
    controls: tuple[PartScores, ...] | None,
    halvings: Sequence[Halving],
    largest: int = 20,
) -> tuple[EdgeChange, ...]:
    """The edges whose normalized scores changed most, with the floor of each edge and of all edges."""
    one, other = before.mean() / before.gap, after.mean() / after.gap
    order = torch.argsort((other - one).abs(), descending=True, stable=True)[:largest]
    floor = torch.zeros(len(order), dtype=torch.float64)
    floor_of_all = 0.0
    for model in (before, after):
        at, most = [], []
        for a, b in halvings:
            apart = (model.mean(a) - model.mean(b)).abs_() / model.gap
            at.append(apart[order])
            most.append(float(apart.max()))
        floor = torch.maximum(floor, torch.stack(at).quantile(0.975, dim=0))
        floor_of_all = max(floor_of_all, _estimate(None, most).high)
    change = None
    if controls is not None:
        change = (controls[1].mean() / controls[1].gap - controls[0].mean() / controls[0].gap)[order].tolist()
    graph = before.graph
    places = torch.nonzero(graph.mask)[order].tolist()
    return tuple(
        EdgeChange(
            graph.sources[source], graph.targets[target], float(one[edge]), float(other[edge]), float(floor[i]),
            floor_of_all, None if change is None else change[i],
        )
        for i, ((source, target), edge) in enumerate(zip(places, order.tolist(), strict=True))
    )  # fmt: skip


def faithfulness_of(circuit: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> float:
    """(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)) of metrics [n] of pairs."""
    return float((circuit.mean() - corrupted.mean()) / (clean.mean() - corrupted.mean()))


def sampled_faithfulness(
    circuit: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor, seed: int, draws: int = DRAWS
) -> torch.Tensor:
    """The same of samples of the pairs, drawn with replacement [draws]: the same samples for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(clean), (draws, len(clean)), generator=generator)
    parts = [values[drawn].mean(1) for values in (circuit, corrupted, clean)]
    return (parts[0] - parts[1]) / (parts[2] - parts[1])


def range_of(samples: torch.Tensor) -> tuple[float, float]:
    """2.5 % of the finite samples are below the first, and 2.5 % above the second."""
    finite = samples[torch.isfinite(samples)]
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
