"""The circuit of some facts before and after an edit: what changed, beside what would differ anyway.

Two halves of the same prompts give circuits that differ, in one and the same model. That is the floor: an overlap of
the circuits before and after says nothing unless it is below the overlaps of halves. And an edit may change the
circuits of facts that nobody edited: those are the control. `CircuitComparison.claims` has sentences for what is beyond
both alone.

Scores of the two models are compared as shares, as ranks, or divided by m(clean) - m(corrupted) of their model, because
the edit changes that difference itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kedit_fast.errors import EvaluationError, InvalidArgumentError, RequestError
from kedit_fast.locating.circuit import Circuit
from kedit_fast.locating.circuits import EdgeScores, Scoring, edge_scores
from kedit_fast.locating.faithfulness import NEAR_ZERO, check_pairs, run_circuit
from kedit_fast.locating.graph import Graph
from kedit_fast.locating.metrics import Metric, check_metric, metric_values
from kedit_fast.locating.prompt_pairs import PromptPair, prompt_pairs
from kedit_fast.locating.pruning import top_edges
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import evaluating, last_states, pad
from kedit_fast.models.view import ModelView
from kedit_fast.patches.patch import Patch
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.request import EditRequest
from kedit_fast.support.dtypes import accumulation_dtype, describe_tensor
from kedit_fast.support.intervals import DRAWS
from kedit_fast.support.torch_state import plain_torch

TOP = (50, 100, 200)
"""How many of the largest edges are compared."""
CIRCUIT_EDGES = 200
"""Edges of the circuits that are run."""
GROUPS = 16
"""Parts that pairs are scored in; a half is made of some of them."""
FEWEST_PAIRS = 4
"""Pairs that can be halved in more than one way."""
FEWEST_SPLITS = 20
"""Different halvings below which a floor is too coarse to claim anything."""
NOTHING = "nothing is claimed"
_TOKENS = 2048  # of one pass for answers


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


@dataclass(frozen=True)
class Run:
    """What a circuit does of what a model does: (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted))."""

    circuit: str
    """"before", "after" or "random", the circuit; random ones have as many edges."""
    model: str
    """"before" or "after", the model that it ran in, with that side's metric."""
    edges: int
    """Of the circuit."""
    value: float | None
    """Of all pairs; None where `reason` says why."""
    low: float | None
    """Lower end of the 95 % interval, by bootstrap over pairs; of random circuits, the lowest."""
    high: float | None
    """Its upper end; of random circuits, the highest."""
    reason: str
    """Why there is no value; "" where there is one."""


@dataclass(frozen=True)
class Side:
    """One of the two models, on the edited prompts."""

    model: str
    """"before" or "after"."""
    sign: str
    """What the metric compares, the first minus the second."""
    pairs: int
    """Prompts."""
    right: int
    """Prompts to which the model says the answer that the metric counts."""
    clean: float
    """Mean metric of the clean prompts."""
    corrupted: float
    """Mean metric of the corrupted prompts."""
    control_right: int | None
    """Control prompts to which it says their answer; None without them."""


@dataclass(frozen=True, eq=False)
class CircuitComparison:
    """Circuits before and after an edit, with what they would differ by anyway."""

    before: Side
    """The unedited model."""
    after: Side
    """The edited model."""
    metric: str
    """What scores are of."""
    scoring: str
    """How edges were scored; see `edge_scores`."""
    steps: int
    """Of the scoring."""
    pairs: int
    """Edited prompts, the same ones before and after."""
    control_pairs: int
    """Unedited prompts."""
    groups: int
    """Parts that the pairs were scored in."""
    splits: int
    """Different halvings that floors are made of."""
    seed: int
    """Of halvings, random circuits and bootstraps."""
    overlaps: tuple[Overlap, ...]
    """Of the largest edges, and the rank correlation."""
    runs: tuple[Run, ...]
    """Faithfulness of the circuits: each in its model, each in the other one, random ones in both."""
    lost: tuple[float, float, float] | None
    """Of the edited model: what its circuit does minus what the one from before does, and the 95 % interval by
    bootstrap over pairs; None where there is none."""
    shares: tuple[Share, ...]
    """By layer and kind of node, the edited ones marked."""
    edges: tuple[EdgeChange, ...]
    """The largest changes of normalized scores, the largest first; none where scores cannot be normalized."""
    no_edges: str
    """Why there are no `edges`; "" where there are."""
    edited: tuple[str, ...]
    """Parts whose weights differ: "mlp1", "attn0", "layer 3" for others of a layer, or names of other weights."""
    claims: tuple[str, ...]
    """Sentences about what is beyond the floor and the control; else "nothing is claimed" alone."""
    circuits: Mapping[str, Circuit]
    """"before" and "after"."""
    scores: Mapping[str, EdgeScores]
    """"before" and "after", of the edited prompts."""

    def as_record(self) -> dict[str, Any]:
        """All numbers and sentences as one JSON object, without the circuits and scores themselves."""
        record: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("circuits", "scores"):
                record[field.name] = _plain(value)
        return record


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Overlap | Share | EdgeChange):
            record["is_beyond"] = value.is_beyond
        return record
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class ComparedPairs:
    """The same prompts for both models, with the sign of each side, and unedited ones."""

    before: tuple[PromptPair, ...]
    """Answer: `target_true`; wrong: `target_new`."""
    after: tuple[PromptPair, ...]
    """Answer: `target_new`; wrong: `target_true`."""
    control: tuple[PromptPair, ...]
    """Of requests that were not edited; answer: what the unedited model says."""
    skipped: Mapping[str, str]
    """Request -> why it has no pair."""


def pairs_to_compare(
    base: Any,
    edited: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    control: Sequence[EditRequest] = (),
    others: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    spec: ArchSpec | None = None,
) -> ComparedPairs:
    """Pairs of the edited requests for both models, and of control requests.

    A request is left out unless the unedited model says `target_true` and the edited one says `target_new`.

    Args:
        base: the unedited model.
        edited: the edited model.
        tokenizer: of both.
        requests: what was edited.
        control: what was not; their prompts and subjects are used.
        others: subjects that were not edited, by relation: where a relation has some, corrupted prompts have these
            alone. Otherwise they have the subjects of other requests, of which the edit changed the answers, too.
        seed: of the choice of other subjects.
        prompt_format: from a prompt to the text that the model reads.
        spec: module names of the models.

    Raises:
        RequestError: no pair is left, with the reasons; or a control request is one of the edited ones.

    Cost: see `prompt_pairs`.

    Example:
        >>> from kedit_fast import demo
        >>> model, tokenizer = demo.load()
        >>> pairs_to_compare(model, model, tokenizer, demo.requests(3))
        Traceback (most recent call last):
            ...
        kedit_fast.errors.RequestError: no prompt whose answer was edited is left: ...
    """
    facts = {(request.prompt, request.subject) for request in requests}
    for request in control:
        if (request.prompt, request.subject) in facts:
            raise RequestError(f"the control request on {request.label!r} is one of the edited ones")
    skipped: dict[str, str] = {}
    old, new = (ModelView(model, spec) for model in (base, edited))
    made = list(_pairs(old, tokenizer, requests, "true", others, seed, prompt_format, skipped))
    said = _Answers.of(new, [_swapped(pair) for pair, _ in made], "logit-difference").right if made else []
    before = []
    for (pair, name), right in zip(made, said, strict=True):
        if right:
            before.append(pair)
        else:
            skipped[name] = "the edited model does not say target_new: there is no edit to explain"
    if not before:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise RequestError(f"no prompt whose answer was edited is left: {reasons}")
    unedited = [pair for pair, _ in _pairs(old, tokenizer, control, "model", others, seed, prompt_format, skipped)]
    return ComparedPairs(tuple(before), tuple(map(_swapped, before)), tuple(unedited), skipped)


def _pairs(
    view: ModelView,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    answers: Any,
    others: Mapping[str, Sequence[str]] | None,
    seed: int,
    prompt_format: PromptFormat | None,
    skipped: dict[str, str],
) -> Iterator[tuple[PromptPair, str]]:
    """Each request's pair with the request's name; what has none goes to `skipped`."""
    alone = [i for i, request in enumerate(requests) if _relation(request) in (others or {})]
    together = [i for i in range(len(requests)) if i not in set(alone)]
    pairs: dict[int, PromptPair] = {}
    reasons: dict[int, str] = {}
    for part in [[i] for i in alone] + ([together] if together else []):
        chosen = [requests[i] for i in part]
        pool = {name: subjects for name, subjects in (others or {}).items() if name == _relation(chosen[0])}
        try:
            result = prompt_pairs(
                view, tokenizer, chosen, answers=answers, others=pool, seed=seed, prompt_format=prompt_format,
                on_error="skip",
            )  # fmt: skip
        except RequestError as error:  # of all of them
            reasons |= {i: str(error) for i in part}
            continue
        pairs |= {part[place]: pair for place, pair in zip(result.places, result, strict=True)}
        reasons |= {part[place]: reason for place, reason in result.skipped.items()}
    for i, request in enumerate(requests):
        name = f"request {request.id!r}" if request.id is not None else f"the request on {request.label!r}"
        if i in pairs:
            yield pairs[i], name
        else:
            skipped[name] = reasons[i]


def _relation(request: EditRequest) -> str:
    return request.prompt if request.relation is None else request.relation


def _swapped(pair: PromptPair) -> PromptPair:
    return dataclasses.replace(pair, answer=pair.wrong, wrong=pair.answer)


@plain_torch()
def compare_circuits(
    base: Any,
    edited: Any,
    pairs_before: Sequence[PromptPair],
    pairs_after: Sequence[PromptPair],
    control_pairs: Sequence[PromptPair] = (),
    *,
    top: Sequence[int] = TOP,
    circuit_edges: int = CIRCUIT_EDGES,
    scoring: Scoring = "eap-ig",
    steps: int = 5,
    metric: Metric = "logit-difference",
    groups: int = GROUPS,
    splits: int = 100,
    random_circuits: int = 3,
    largest: int = 20,
    seed: int = 0,
    batch_size: int | None = None,
    patch: Patch | None = None,
    spec: ArchSpec | None = None,
    progress: Callable[[str], Any] | None = None,
) -> CircuitComparison:
    """What an edit changed in the circuit of the edited facts, with the floor and the control of every number.

    Args:
        base: the unedited model.
        edited: the edited model, of the same architecture.
        pairs_before: prompts with the sign of the unedited model: answer the old target, wrong the new one.
        pairs_after: the same prompts in the same order with the sign of the edited model; see `pairs_to_compare`.
        control_pairs: prompts about facts that were not edited, with the same answers on both sides.
        top: how many of the largest edges are compared; those that the graph has no more than are left out.
        circuit_edges: edges that the circuits are pruned from, at most all of the graph.
        scoring: see `edge_scores`.
        steps: see `edge_scores`.
        metric: see `edge_scores`.
        groups: parts that the pairs are scored in; halves are made of parts, so that more halvings cost no more passes.
        splits: random halvings, as many as there are different ones at most.
        random_circuits: of as many edges as each circuit, run beside it.
        largest: edges in the table of changes.
        seed: of halvings, random circuits and bootstraps.
        batch_size: pairs of one pass; None for what fits.
        patch: the edits, where the two models' weights cannot be compared, or are the same in memory.
        spec: module names of the models; None to find them.
        progress: called with a line before each step.

    Returns:
        CircuitComparison.

    Raises:
        RequestError: fewer than 4 pairs, pairs that are not the same prompts on both sides, or that a model refuses.
        InvalidArgumentError: models of different graphs, a wrong number or metric.
        UnsupportedModelError: attention that cannot be opened, by the module's name.
        EvaluationError: logits or gradients that are not finite.

    Cost: `edge_scores` of all pairs in both models, four runs of the circuits, 2 `random_circuits` random ones; one
        comparison of all weights, unless there is a patch. Statistics: `splits` sorts of all edges.

    Example:
        >>> import copy
        >>> from kedit_fast import demo
        >>> model, tokenizer = demo.load()
        >>> edited = copy.deepcopy(model)
        >>> applied = Patch.load("patch.safetensors").apply_(edited)    # doctest: +SKIP
        >>> pairs = pairs_to_compare(model, edited, tokenizer, demo.requests(40))    # doctest: +SKIP
        >>> print(compare_circuits(model, edited, pairs.before, pairs.after).claims)    # doctest: +SKIP
    """
    _check(pairs_before, pairs_after, top, circuit_edges, groups, splits, random_circuits, largest, metric)
    say = progress or (lambda line: None)
    old, new = (ModelView(model, spec) for model in (base, edited))
    changed = edited_parts(old, new, patch)
    n = len(pairs_before)
    parts = _parts(n, groups, random.Random(f"{seed} parts"))
    control_parts = _parts(len(control_pairs), groups, random.Random(f"{seed} control"))
    options: dict[str, Any] = {"scoring": scoring, "steps": steps, "metric": metric, "batch_size": batch_size}

    def scored(view: ModelView, pairs: Sequence[PromptPair], of: Sequence[Sequence[int]], which: str) -> PartScores:
        say(f"scores of edges, {which}")
        return PartScores.of([edge_scores(view, [pairs[i] for i in part], **options) for part in of])

    before = scored(old, pairs_before, parts, "before")
    after = scored(new, pairs_after, parts, "after")
    if before.graph != after.graph:
        raise InvalidArgumentError(
            "the two models have different graphs: compare a model with an edited copy of itself"
        )
    controls = None
    if control_pairs:
        controls = tuple(scored(view, control_pairs, control_parts, "control") for view in (old, new))
    halvings = halves(before.sizes, splits, random.Random(f"{seed} halves"))
    control_halvings = halves(controls[0].sizes, splits, random.Random(f"{seed} halves")) if controls else []
    graph = before.graph
    say("overlaps and floors")
    overlaps = overlaps_of(
        before, after, controls, [k for k in top if k < graph.edge_count], halvings, control_halvings
    )
    shares = shares_of(before, after, controls, halvings, changed)
    say("answers")
    sides = [_Answers.of(old, pairs_before, metric), _Answers.of(new, pairs_after, metric)]
    control_sides = [_Answers.of(view, control_pairs, metric) for view in (old, new)] if control_pairs else [None, None]
    reason = next((why for side in sides if (why := side.reason)), "")
    changes: tuple[EdgeChange, ...] = ()
    if not reason:
        if controls and any(side is None or side.reason for side in control_sides):
            normalized = None  # the control's own scores cannot be normalized
        else:
            normalized = controls
        changes = changes_of(before, after, normalized, halvings, largest)
    circuits = {
        name: top_edges(part.total(scoring, metric), min(circuit_edges, graph.edge_count))
        for name, part in (("before", before), ("after", after))
    }
    runs, lost = _runs(
        old, new, circuits, (pairs_before, pairs_after), sides, metric, random_circuits, seed, batch_size, say
    )
    names = ("before", "after")
    signs = ("old target - new target", "new target - old target")
    if metric == "kl":
        signs = ("KL(clean || run)", "KL(clean || run)")
    described = [
        Side(name, sign, n, sum(side.right), side.clean_mean, side.corrupted_mean, None if c is None else sum(c.right))
        for name, sign, side, c in zip(names, signs, sides, control_sides, strict=True)
    ]
    enough = min(len(halvings), len(control_halvings) if controls else len(halvings)) >= FEWEST_SPLITS
    return CircuitComparison(
        described[0], described[1], metric, scoring, before.steps, n, len(control_pairs), len(parts), len(halvings),
        seed, overlaps, runs, lost, shares, changes, reason, changed,
        claims_of(overlaps, shares, changes, runs, lost) if enough else (NOTHING,), circuits,
        {"before": before.total(scoring, metric), "after": after.total(scoring, metric)},
    )  # fmt: skip


def _check(
    before: Sequence[PromptPair],
    after: Sequence[PromptPair],
    top: Sequence[int],
    circuit_edges: int,
    groups: int,
    splits: int,
    random_circuits: int,
    largest: int,
    metric: str,
) -> None:
    check_metric(metric)
    whole = [("circuit_edges", circuit_edges, 1), ("groups", groups, FEWEST_PAIRS), ("splits", splits, 1)]
    whole += [("random_circuits", random_circuits, 0), ("largest", largest, 0), *(("top", k, 1) for k in top)]
    for name, value, least in whole:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidArgumentError(f"{name} must be a whole number of at least {least}; got {value!r}")
    if len(before) != len(after):
        raise RequestError(
            f"there are {len(before)} pairs before and {len(after)} after: they must be the same prompts"
        )
    if len(before) < FEWEST_PAIRS:
        raise RequestError(
            f"{len(before)} prompt pairs cannot be halved for a floor: give at least {FEWEST_PAIRS}, better 40"
        )
    for one, other in zip(before, after, strict=True):
        if (one.clean, one.corrupted) != (other.clean, other.corrupted):
            raise RequestError(f"{one.label}: the pair after has other prompts than the one before")


class _Partial(Protocol):
    """What `edge_scores` gives of a part of the pairs."""

    @property
    def graph(self) -> Graph: ...
    @property
    def scores(self) -> torch.Tensor: ...
    @property
    def pairs(self) -> int: ...
    @property
    def clean(self) -> float: ...
    @property
    def corrupted(self) -> float: ...
    @property
    def steps(self) -> int: ...


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
    def of(cls, parts: Sequence[_Partial]) -> PartScores:
        """The parts together."""
        graph, sizes = parts[0].graph, tuple(part.pairs for part in parts)
        values = torch.stack([part.scores.cpu()[graph.mask] for part in parts])
        if not bool(torch.isfinite(values).all()):
            raise EvaluationError("scores of edges are not finite: nothing can be compared")
        means = [sum(part.pairs * value(part) for part in parts) / sum(sizes) for value in (_clean, _corrupted)]
        return cls(graph, values, sizes, means[0], means[1], parts[0].steps)

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


def _clean(part: _Partial) -> float:
    return part.clean


def _corrupted(part: _Partial) -> float:
    return part.corrupted


def _parts(n: int, groups: int, generator: random.Random) -> list[list[int]]:
    """Indices of pairs in parts of about the same size, at random."""
    order = list(range(n))
    generator.shuffle(order)
    return [part for g in range(groups) if (part := sorted(order[g::groups]))]


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
    sets = [set(torch.argsort(v.abs(), descending=True, stable=True)[:k].tolist()) for v in (scores, others)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def chance_jaccard(k: int, edges: int) -> float:
    """What two random sets of k of so many edges have in common, k^2 / edges, over the rest of their union."""
    return k / (2 * edges - k)


def spearman(scores: torch.Tensor, others: torch.Tensor) -> float:
    """Rank correlation of |score| in two lists [E]; edges with equal scores share their mean rank. 0 for constants.

    Example:
        >>> round(spearman(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([10.0, 30.0, -20.0])), 6)
        0.5
    """
    ranks = [_ranks(values.abs()) for values in (scores, others)]
    one, other = (rank - rank.mean() for rank in ranks)
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size > 0 else 0.0


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
    controls: tuple[PartScores, ...] | None,
    top: Sequence[int],
    halvings: Sequence[Halving],
    control_halvings: Sequence[Halving] = (),
) -> tuple[Overlap, ...]:
    """Jaccard indices of the largest edges and the rank correlation, each with its floors, control and chance."""
    measures: list[tuple[str, Callable[..., float], float]] = [
        (f"top {k}", lambda a, b, k=k: jaccard(a, b, k), chance_jaccard(k, before.graph.edge_count)) for k in top
    ]
    measures.append(("spearman", spearman, 0.0))

    def across(one: PartScores, other: PartScores, ways: Sequence[Halving], measure: Callable[..., float]) -> Estimate:
        samples = [measure(one.mean(half), other.mean(half)) for way in ways for half in way]
        whole = measure(one.mean(), other.mean())
        return _estimate(whole, samples or [whole])

    result = []
    for name, measure, chance in measures:
        floors = [_estimate(None, [measure(m.mean(a), m.mean(b)) for a, b in halvings]) for m in (before, after)]
        control = None if controls is None else across(controls[0], controls[1], control_halvings, measure)
        result.append(Overlap(name, across(before, after, halvings, measure), floors[0], floors[1], control, chance))
    return tuple(result)


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


@dataclass(frozen=True)
class _Answers:
    """What a model says to the prompts of pairs."""

    right: list[bool]
    """Whether the most probable token after each clean prompt is the pair's answer."""
    clean: torch.Tensor
    """[n] the metric, fp64."""
    corrupted: torch.Tensor
    """[n]"""
    metric: str

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, pairs: Sequence[PromptPair], metric: Metric) -> _Answers:
        check_pairs(view, pairs)
        right = [False] * len(pairs)
        values = torch.zeros(2, len(pairs), dtype=torch.float64)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].clean), reverse=True)
        with evaluating(view):
            while order:
                count = max(1, _TOKENS // len(pairs[order[0]].clean))
                chunk, order = order[:count], order[count:]
                part = [pairs[i] for i in chunk]
                ends = torch.tensor([len(pair.clean) - 1 for pair in part])
                logits = []
                for rows in ([pair.clean for pair in part], [pair.corrupted for pair in part]):
                    hidden = last_states(view, pad(rows, view.device))
                    at = torch.arange(len(part), device=hidden.device)
                    at_ends = view.head.logits(hidden[at, ends.to(hidden.device)])
                    logits.append(at_ends.to(accumulation_dtype(at_ends)))
                answers = torch.tensor([pair.answer for pair in part], device=logits[0].device)
                wrongs = torch.tensor([pair.wrong for pair in part], device=logits[0].device)
                said = logits[0].argmax(-1) == answers
                for row, some in zip(values, logits, strict=True):
                    row[chunk] = metric_values(metric, some, answers, wrongs, logits[0]).double().cpu()
                for i, good in zip(chunk, said.tolist(), strict=True):
                    right[i] = good
        if not bool(torch.isfinite(values).all()):
            first = int(torch.nonzero(~torch.isfinite(values).all(0))[0])
            raise EvaluationError(f"{pairs[first].label}: the model's output is not finite on its prompts")
        return cls(right, values[0], values[1], metric)

    @property
    def clean_mean(self) -> float:
        return float(self.clean.mean())

    @property
    def corrupted_mean(self) -> float:
        return float(self.corrupted.mean())

    @property
    def reason(self) -> str:
        """Why nothing can be divided by m(clean) - m(corrupted); "" where it can."""
        gap = self.clean_mean - self.corrupted_mean
        size = float(torch.cat([self.clean, self.corrupted]).abs().mean())
        if abs(gap) > NEAR_ZERO * size:
            return ""
        return (
            f"the mean {self.metric} is {self.clean_mean:.3g} on the clean and {self.corrupted_mean:.3g} on the "
            "corrupted prompts: too small a difference to divide by"
        )


def _runs(
    old: ModelView,
    new: ModelView,
    circuits: Mapping[str, Circuit],
    pairs: tuple[Sequence[PromptPair], Sequence[PromptPair]],
    sides: Sequence[_Answers],
    metric: Metric,
    random_circuits: int,
    seed: int,
    batch_size: int | None,
    say: Callable[[str], Any],
) -> tuple[tuple[Run, ...], tuple[float, float, float] | None]:
    """Faithfulness of every circuit in every model, and what the edited model's circuit does beyond the old one."""
    runs: list[Run] = []
    drawn: dict[str, torch.Tensor] = {}  # of the edited model: circuit -> its faithfulness in samples of the pairs
    lost = None
    for name, view, some, side in zip(("before", "after"), (old, new), pairs, sides, strict=True):
        for which, circuit in circuits.items():
            say(f"the circuit {which} in the model {name}")
            result = run_circuit(view, circuit, some, metric, batch_size=batch_size).double()
            if side.reason:
                runs.append(Run(which, name, circuit.edge_count, None, None, None, side.reason))
                continue
            value = faithfulness_of(result, side.clean, side.corrupted)
            drawn[which] = sampled_faithfulness(result, side.clean, side.corrupted, seed)
            low, high = _range(drawn[which])
            runs.append(Run(which, name, circuit.edge_count, value, low, high, ""))
        if not random_circuits:
            continue
        count = circuits[name].edge_count
        say(f"random circuits in the model {name}")
        others = [
            run_circuit(
                view, random_circuit(circuits[name].graph, count, seed + i), some, metric, batch_size=batch_size
            )
            for i in range(random_circuits)
        ]
        if side.reason:
            runs.append(Run("random", name, count, None, None, None, side.reason))
            continue
        shares = [faithfulness_of(result.double(), side.clean, side.corrupted) for result in others]
        runs.append(Run("random", name, count, sum(shares) / len(shares), min(shares), max(shares), ""))
    after = {run.circuit: run.value for run in runs if run.model == "after"}
    if after["after"] is not None and after["before"] is not None:
        lost = after["after"] - after["before"], *_range(drawn["after"] - drawn["before"])
    return tuple(runs), lost


def faithfulness_of(circuit: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> float:
    """(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)) of metrics [n] of pairs."""
    return float((circuit.mean() - corrupted.mean()) / (clean.mean() - corrupted.mean()))


def sampled_faithfulness(
    circuit: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor, seed: int, draws: int = DRAWS
) -> torch.Tensor:
    """The same of samples of the pairs, drawn with replacement [draws]: the same samples for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(clean), (draws, len(clean)), generator=generator)
    parts = [(values[drawn].mean(1)) for values in (circuit, corrupted, clean)]
    return (parts[0] - parts[1]) / (parts[2] - parts[1])


def _range(samples: torch.Tensor) -> tuple[float, float]:
    finite = samples[torch.isfinite(samples)]
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def random_circuit(graph: Graph, count: int, seed: int) -> Circuit:
    """So many edges of a graph, drawn at random."""
    places = torch.nonzero(graph.mask)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]
    edges = torch.zeros_like(graph.mask)
    edges[places[order, 0], places[order, 1]] = True
    return Circuit(graph, edges, torch.zeros(edges.shape), f"{count} random edges, seed {seed}")


def edited_parts(old: ModelView, new: ModelView, patch: Patch | None = None) -> tuple[str, ...]:
    """The parts of a model whose weights an edit changed: "mlp1", "attn0", "layer 3", or the name of another weight.

    Args:
        old: the unedited model.
        new: the edited one.
        patch: the edits; then weights are not compared.

    Raises:
        InvalidArgumentError: weights of other names or sizes, or weights that are not in memory.

    Cost: reads all weights of both models once, without a patch.
    """
    if patch is not None:
        names = [f"{name}.weight" for name in patch.updates]
    elif old.model is new.model:
        names = []
    else:
        theirs = dict(new.model.named_parameters())
        ours = dict(old.model.named_parameters())
        if set(theirs) != set(ours):
            other = sorted(set(theirs) ^ set(ours))[0]
            raise InvalidArgumentError(f"the models have different weights: {other} is in one of them alone")
        names = [name for name, weight in ours.items() if _differs(name, weight, theirs[name])]
    order = {"attn": 0, "mlp": 1, "layer ": 2}
    parts: dict[str, tuple] = {}
    for name in names:
        rest = name.removeprefix(f"{old.spec.blocks}.")
        if rest == name:
            parts[name] = (math.inf, 0, name)
            continue
        layer, _, path = rest.partition(".")
        is_in = [
            kind
            for kind, at in (("attn", old.spec.attention), ("mlp", old.spec.mlp))
            if f"{path}.".startswith(f"{at}.")
        ]
        kind = is_in[0] if is_in else "layer "
        parts[f"{kind}{layer}"] = (int(layer), order[kind], "")
    return tuple(sorted(parts, key=lambda part: parts[part]))


def _differs(name: str, weight: torch.Tensor, other: torch.Tensor) -> bool:
    if weight.shape != other.shape or weight.dtype != other.dtype:
        raise InvalidArgumentError(
            f"{name} is {describe_tensor(weight)} in one model and {describe_tensor(other)} in the other"
        )
    if "meta" in (weight.device.type, other.device.type):
        raise InvalidArgumentError(
            f"{name} is not in memory, so the models cannot be compared: give the edits as `patch`"
        )
    return not torch.equal(weight, other.to(weight.device))


def claims_of(
    overlaps: Sequence[Overlap],
    shares: Sequence[Share],
    changes: Sequence[EdgeChange],
    runs: Sequence[Run],
    lost: tuple[float, float, float] | None,
) -> tuple[str, ...]:
    """A sentence for everything that is beyond its floor and its control; else "nothing is claimed"."""
    claims = []
    for overlap in overlaps:
        if overlap.is_beyond:
            floor = min(overlap.floor_before.low, overlap.floor_after.low)
            measure = (
                "rank correlation of |score|"
                if overlap.name == "spearman"
                else f"Jaccard index of the {overlap.name} edges"
            )
            control = "" if overlap.control is None else f", unedited prompts to {overlap.control.value:.2f}"
            claims.append(
                f"The {measure} before and after the edit is {overlap.edited.value:.2f}; halves of the same prompts "
                f"agree to {floor:.2f} or more in either model{control}."
            )
    for share in shares:
        if share.is_beyond:
            control = "" if share.control is None else f", on unedited prompts it changed by {share.control:+.3f}"
            claims.append(
                f"{share.name}{' (edited)' if share.is_edited else ''} has {share.after:.3f} of |score| after the edit "
                f"and {share.before:.3f} before; halves of the prompts differ by {share.floor:.3f} at most{control}."
            )
    if lost is not None and (lost[1] > 0 or lost[2] < 0):
        values = {(run.circuit, run.model): run.value for run in runs}
        claims.append(
            f"In the edited model the circuit from before does {values['before', 'after']:.2f} of what the model does, "
            f"its own circuit {values['after', 'after']:.2f} (difference {lost[1]:.2f} to {lost[2]:.2f})."
        )
    for change in changes:
        if change.is_beyond:
            claims.append(
                f"The edge {change.source} -> {change.target} has {change.after:+.3f} of the effect after the edit and "
                f"{change.before:+.3f} before; no edge differs by more than {change.floor_of_all:.3f} between halves."
            )
    return tuple(claims) or (NOTHING,)
