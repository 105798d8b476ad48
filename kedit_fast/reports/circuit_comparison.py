"""The circuit of some facts before and after an edit: what changed, beside what would differ anyway.

Two halves of the same prompts give circuits that differ, in one and the same model. That is the floor: an overlap of
the circuits before and after says nothing unless it is below the overlaps of halves. And an edit may change the
circuits of facts that nobody edited: those are the control. `CircuitComparison.claims` has sentences for what is beyond
both alone.

Here is what is compared and claimed, and how prompts are made; the numbers are those of `circuit_statistics`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError, RequestError
from kedit_fast.locating.circuit import Circuit
from kedit_fast.locating.circuits import EdgeScores, Scoring, check_pairs, edge_scores
from kedit_fast.locating.faithfulness import batches_of, end_logits, metric_of_pairs, no_gap, run_circuit
from kedit_fast.locating.graph import Graph
from kedit_fast.locating.metrics import Metric, check_metric
from kedit_fast.locating.prompt_pairs import PromptPair, prompt_pairs, relation_of
from kedit_fast.locating.pruning import top_edges
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import evaluating, pad
from kedit_fast.models.view import ModelView, view_without_memory
from kedit_fast.patches.patch import Patch
from kedit_fast.reports.circuit_statistics import (
    EdgeChange,
    Overlap,
    PartScores,
    Share,
    changes_of,
    faithfulness_of,
    halves,
    overlaps_of,
    range_of,
    sampled_faithfulness,
    shares_of,
)
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.request import EditRequest
from kedit_fast.support.dtypes import describe_tensor
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
        UnsupportedModelError: a memory is attached to a model.

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
    old, new = (view_without_memory(model, spec) for model in (base, edited))
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
    alone = [i for i, request in enumerate(requests) if relation_of(request) in (others or {})]
    together = [i for i in range(len(requests)) if i not in set(alone)]
    pairs: dict[int, PromptPair] = {}
    reasons: dict[int, str] = {}
    for part in [[i] for i in alone] + ([together] if together else []):
        chosen = [requests[i] for i in part]
        pool = {name: subjects for name, subjects in (others or {}).items() if name == relation_of(chosen[0])}
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
        UnsupportedModelError: attention that cannot be opened, by the module's name; or a memory is attached.
        EvaluationError: logits or gradients that are not finite.

    Cost: `edge_scores` of all pairs in both models, four runs of the circuits, 2 `random_circuits` random ones; one
        comparison of all weights, unless there is a patch. Statistics: 8 sorts of all edges for each of `splits`,
        16 with a control.

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
    old, new = (view_without_memory(model, spec) for model in (base, edited))
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
        controls = (
            scored(old, control_pairs, control_parts, "control"),
            scored(new, control_pairs, control_parts, "control"),
        )
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
    totals = {"before": before.total(scoring, metric), "after": after.total(scoring, metric)}
    circuits = {name: top_edges(total, min(circuit_edges, graph.edge_count)) for name, total in totals.items()}
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
        totals,
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


def _parts(n: int, groups: int, generator: random.Random) -> list[list[int]]:
    """Indices of pairs in parts of about the same size, at random."""
    order = list(range(n))
    generator.shuffle(order)
    return [part for g in range(groups) if (part := sorted(order[g::groups]))]


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
        with evaluating(view):
            for chunk in batches_of(pairs):
                part = [pairs[i] for i in chunk]
                clean, corrupted = (
                    end_logits(view, pad(rows, view.device), part)
                    for rows in ([pair.clean for pair in part], [pair.corrupted for pair in part])
                )
                for row, logits in zip(values, (clean, corrupted), strict=True):
                    row[chunk] = metric_of_pairs(logits, clean, part, metric).double().cpu()
                for i, token in zip(chunk, clean.argmax(-1).tolist(), strict=True):
                    right[i] = token == pairs[i].answer
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
        return no_gap(self.clean, self.corrupted, self.metric)


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
            low, high = range_of(drawn[which])
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
        lost = after["after"] - after["before"], *range_of(drawn["after"] - drawn["before"])
    return tuple(runs), lost


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
