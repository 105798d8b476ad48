"""From which layer on a relation's object is linearly there: ridge probes on states, subjects held out.

A probe is a linear map from the states [d] at a subject's last token to the classes, the relation's objects: least
squares with a ridge onto centered one-hot rows, the solve of every closed-form edit. It is trained on some subjects and
asked about others. What it says of subjects it never saw is what the layer holds of the relation; a probe with shuffled
objects says how much of that any labels would give.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tqdm.auto import tqdm

from kedit_fast.errors import InvalidArgumentError, RequestError, StatisticsError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import Site, capture, evaluating, pad, unknown_token
from kedit_fast.models.view import ModelView, view_without_memory
from kedit_fast.ops import spd_solve
from kedit_fast.requests.problems import numbered
from kedit_fast.requests.prompts import Prompt, PromptFormat, continuation, fill, is_plain
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.tokens import non_words
from kedit_fast.solver.preconditioner import Covariance
from kedit_fast.statistics.moments import cross_moment, second_moment
from kedit_fast.support.intervals import wilson
from kedit_fast.support.torch_state import plain_torch

ProbeSite = Literal["block", "mlp", "attention"]
"""Of a layer: its output, or what its MLP or its attention puts out."""
ProbePosition = Literal["subject-last", "last"]
"""Where states are read: at the subject's last token, or at the last token of the prompt."""
RIDGE = 0.1
"""Of the probes, as a share of the mean variance of the states' entries."""
TOKENS = 8192
"""Tokens of one pass, with padding, at most."""


@dataclass(frozen=True)
class ProbeAccuracy:
    """What probes say by layer, over the facts of one relation or of all."""

    layers: tuple[int, ...]
    """The layers whose states were probed; all lists below are in their order."""
    accuracy: tuple[float, ...]
    """Share of facts whose object the probe names while their subject is held out."""
    low: tuple[float, ...]
    """Lower end of the 95 % interval of `accuracy`, Wilson's over subjects."""
    high: tuple[float, ...]
    """Its upper end."""
    control: tuple[float, ...]
    """Mean accuracy of probes of shuffled objects."""
    control_low: tuple[float, ...]
    """Lower end of what one shuffle gives: Wilson's interval of `control` over subjects, and all that was measured."""
    control_high: tuple[float, ...]
    """Its upper end."""
    classes: int
    """Objects of all relations; a probe chooses from those of its relation."""
    majority: float
    """Share of facts that have the most frequent object of their relation: what a constant answer gives."""
    count: int
    """Facts that were asked about, each once, when its subject was held out."""
    subjects: int
    """Subjects of these facts."""

    @property
    def from_layer(self) -> int | None:
        """The first layer from which on `low` is above `control_high` and `majority`; None where there is none."""
        first = None
        for layer, low, bound in sorted(zip(self.layers, self.low, self.control_high, strict=True), reverse=True):
            if low <= max(bound, self.majority):
                break
            first = layer
        return first


@dataclass(frozen=True)
class RelationProbes(ProbeAccuracy):
    """What probes of one relation say, by layer."""

    relation: str
    """The relation's id or name."""
    left_out: int
    """Facts that were not used, because their object has one subject alone: no probe could have seen it before."""


@dataclass(frozen=True)
class LinearProbes(ProbeAccuracy):
    """What probes say, by layer: the average over the facts of all relations, and each relation."""

    site: str
    """Which output of a layer was probed."""
    position: str
    """At which token."""
    relations: tuple[RelationProbes, ...]
    """Each relation."""
    skipped: Mapping[str, str]
    """Relations that could not be probed -> why."""
    ridge: float
    """Of the probes, as a share of the mean variance."""
    folds: int
    """Parts that the subjects were divided into."""
    controls: int
    """Shuffles."""
    seed: int
    """Of folds and shuffles."""


@dataclass(frozen=True)
class _Fact:
    """One row of states."""

    row: int
    """Which of the distinct prompts."""
    subject: str
    object: str


@dataclass(frozen=True)
class _Scores:
    """Shares of right answers of one relation."""

    accuracy: torch.Tensor
    """[L]"""
    control: torch.Tensor
    """[L, shuffles]"""


@plain_torch()
def linear_probes(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    labels: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    site: ProbeSite = "block",
    position: ProbePosition = "subject-last",
    ridge: float = RIDGE,
    folds: int = 5,
    controls: int = 10,
    seed: int = 0,
    spec: ArchSpec | None = None,
    prompt_format: PromptFormat | None = None,
    progress: bool = False,
) -> LinearProbes:
    """Accuracy on held-out subjects, layer by layer, of linear probes for the objects of relations.

    Every relation has probes of its own. Its subjects are divided into `folds` parts, the subjects of each object over
    as many parts as possible; all facts of a subject are in one part. Each part is asked about once, by a probe that
    was trained on the others. Controls go through the same folds with the objects shuffled among subjects.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        requests: facts; their prompts, subjects and relations are used, and `target_true` as the object.
        labels: the object of every request, in place of `target_true`.
        layers: whose states are probed; None for all.
        site: the output of the block, of its MLP or of its attention.
        position: "subject-last", where nothing that follows the subject matters; or "last".
        ridge: added to the diagonal of the states' covariance, as a share of its mean.
        folds: parts of the subjects, at least 2; a relation with fewer subjects has a part for each.
        controls: shuffles, at least 1.
        seed: of folds and shuffles.
        spec: module names of the model; see `ModelView`.
        prompt_format: from a prompt to the text that the model reads.
        progress: show a bar of the passes.

    Returns:
        all relations together and each one; relations with fewer than 4 usable facts or with one object are `skipped`.

    Raises:
        RequestError: a request without an object, or without a relation where others have one, or whose subject has no
            tokens; or no relation can be probed.
        InvalidArgumentError: a wrong number of labels, folds, controls, a ridge that is not positive, no such layer.
        UnsupportedModelError: a layer whose states cannot be read; or a memory is attached to the model.
        StatisticsError: states that are not finite.

    Cost: a pass of every distinct prompt up to the last layer. A probe takes min(n d^2 + d^3 / 3, n^2 d + n^3 / 3)
        flops in fp64 for n training facts; controls share its factor.

    Example:
        >>> from kedit_fast import demo
        >>> model, tokenizer = demo.load()
        >>> probes = linear_probes(model, tokenizer, demo.requests(60), layers=[0, 5], controls=3)
        >>> probes.layers, len(probes.accuracy)
        ((0, 5), 2)
    """
    _check(requests, labels, folds, controls, ridge, site, position)
    view = view_without_memory(model, spec)
    chosen = tuple(range(view.num_layers) if layers is None else dict.fromkeys(layers))
    if not chosen or not all(isinstance(layer, int) and 0 <= layer < view.num_layers for layer in chosen):
        raise InvalidArgumentError(f"layers must be some of 0 to {view.num_layers - 1}; got {list(layers or ())}")
    prompts, by_relation = _facts(view, tokenizer, requests, labels, position, prompt_format)
    usable: dict[str, tuple[list[_Fact], int]] = {}
    skipped: dict[str, str] = {}
    for relation, facts in by_relation.items():
        shared, problem = _usable(facts)
        if problem:
            skipped[relation] = problem
        else:
            usable[relation] = shared, len(facts) - len(shared)
    if not usable:
        reasons = "; ".join(f"{relation}: {problem}" for relation, problem in skipped.items())
        raise RequestError(f"no relation can be probed ({reasons}): give more facts of a relation, of several objects")
    states = _states(view, prompts, [Site(layer, site) for layer in chosen], progress)  # of each site [rows, d]
    results, scores = [], []
    for relation, (facts, left_out) in usable.items():
        score = _score(facts, states, ridge, folds, controls, seed)
        scores.append((facts, score))
        results.append(RelationProbes(chosen, **_summary([(facts, score)]), relation=relation, left_out=left_out))
    return LinearProbes(
        chosen, **_summary(scores), site=site, position=position, relations=tuple(results), skipped=skipped,
        ridge=ridge, folds=folds, controls=controls, seed=seed,
    )  # fmt: skip


@plain_torch()
def ridge_probe(states: torch.Tensor, targets: torch.Tensor, ridge: float = RIDGE) -> Callable:
    """The affine map x -> y of least squares with a ridge, as a function of rows.

    (E[x x^T] + ridge mean(diag) I)^-1 E[x y^T] of centered rows. With fewer rows than dimensions the same map is found
    from the products of rows: x^T (X X^T / n + ..)^-1 Y / n.

    Args:
        states: x, [n, d].
        targets: y, [n, e].
        ridge: as a share of the mean variance of the entries of x; positive.

    Returns:
        a function from rows [m, d] to [m, e] fp64.

    Raises:
        StatisticsError: the states do not vary, or are not finite.

    Cost: min(n d^2 + d^3 / 3, n^2 d + n^3 / 3) flops in fp64, and those of `targets`.

    Example:
        >>> x = torch.randn(100, 5)
        >>> probe = ridge_probe(x, x @ torch.ones(5, 1), ridge=1e-9)
        >>> torch.allclose(probe(x).float(), x.sum(1, keepdim=True), atol=1e-4)
        True
    """
    x, y = states.double(), targets.double()
    center, mean = x.mean(0), y.mean(0)
    x, y = x - center, y - mean
    n, d = x.shape
    variance = float(x.square().mean())
    if not (variance > 0 and math.isfinite(variance)):
        raise StatisticsError(f"the states of {n} facts are the same or not finite: a probe has nothing to read")
    if n > d:
        mapping = Covariance.from_moment(second_moment(x), ridge).apply(cross_moment(x, y))  # [d, e]
    else:
        mapping = x.T @ spd_solve(x @ x.T / n, y, ridge * variance) / n
    return lambda rows: (rows.double() - center) @ mapping + mean


def _check(
    requests: Sequence[EditRequest],
    labels: Sequence[str] | None,
    folds: int,
    controls: int,
    ridge: float,
    site: str,
    position: str,
) -> None:
    if not requests:
        raise RequestError("no requests were given: a probe needs facts of a relation")
    if labels is not None and len(labels) != len(requests):
        raise InvalidArgumentError(f"labels must be one for each of {len(requests)} requests; got {len(labels)}")
    for name, value, least in (("folds", folds, 2), ("controls", controls, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidArgumentError(f"{name} must be a whole number of at least {least}; got {value!r}")
    if not (ridge > 0 and math.isfinite(ridge)):
        raise InvalidArgumentError(f"ridge must be positive; got {ridge!r}")
    for name, value, kinds in (("site", site, get_args(ProbeSite)), ("position", position, get_args(ProbePosition))):
        if value not in kinds:
            raise InvalidArgumentError(f"{name} must be {', '.join(kinds)}; got {value!r}")


def _facts(
    view: ModelView,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    labels: Sequence[str] | None,
    position: str,
    prompt_format: PromptFormat | None,
) -> tuple[list[Prompt], dict[str, list[_Fact]]]:
    """The distinct prompts, and the facts of each relation."""
    rows: dict[Prompt, int] = {}
    by_relation: dict[str, list[_Fact]] = {}
    has_relations = any(request.relation is not None for request in requests)
    for i, request in enumerate(requests):
        name = numbered(request.id, i)
        label = request.target_true if labels is None else labels[i]
        if not isinstance(label, str) or not label.strip():
            raise RequestError(f"{name} has no target_true, the object that a probe is to name: give it, or `labels`")
        if has_relations and request.relation is None:
            raise RequestError(f"{name} has no relation, and others have one: give every request its relation, or none")
        prompt = _prompt(view, tokenizer, request, name, position, prompt_format)
        fact = _Fact(rows.setdefault(prompt, len(rows)), request.subject or request.prompt, label.strip())
        relation = request.relation if request.relation is not None else "all requests"
        by_relation.setdefault(relation, []).append(fact)
    return list(rows), by_relation


def _prompt(
    view: ModelView,
    tokenizer: Any,
    request: EditRequest,
    name: str,
    position: str,
    prompt_format: PromptFormat | None,
) -> Prompt:
    """A request's tokens up to the one whose states are read."""
    if request.subject is None:
        if position == "subject-last":
            raise RequestError(f'{name} has no subject: probe at position "last"')
        ids, _ = continuation(tokenizer, request.prompt, "", prompt_format)
        prompt = Prompt(tuple(ids), len(ids) - 1)
    else:
        try:
            prompt = fill(tokenizer, request.prompt, request.subject, "", prompt_format)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None
        if position == "subject-last":
            prompt = prompt.cut()
        else:
            if is_plain(prompt_format):
                prompt = prompt.open_ended(tokenizer, non_words(tokenizer).closing)
            prompt = Prompt(prompt.ids, len(prompt.ids) - 1)
    if not 0 < len(prompt.ids) <= view.max_length:
        raise RequestError(f"{name}: {len(prompt.ids)} tokens, the model takes 1 to {view.max_length}")
    if problem := unknown_token(tokenizer, prompt.ids, view.vocabulary):
        raise RequestError(f"{name}: {problem}")
    return prompt


def _usable(facts: Sequence[_Fact]) -> tuple[list[_Fact], str]:
    """The facts whose object several subjects have, and why these cannot be probed; "" if they can."""
    of_object: dict[str, set[str]] = {}
    for fact in facts:
        of_object.setdefault(fact.object, set()).add(fact.subject)
    shared = [fact for fact in facts if len(of_object[fact.object]) > 1]
    objects, subjects = {fact.object for fact in shared}, {fact.subject for fact in shared}
    if len(of_object) < 2:
        return shared, f"one class: all {len(facts)} facts have the object {facts[0].object!r}"
    if len(objects) < 2 or len(subjects) < 4:
        return shared, (
            f"too few subjects: of {len(facts)} facts with {len(of_object)} objects, {len(objects)} objects have two "
            f"subjects or more, {len(subjects)} in all; two objects of two subjects each are needed"
        )
    return shared, ""


def _states(view: ModelView, prompts: Sequence[Prompt], sites: Sequence[Site], progress: bool) -> list[torch.Tensor]:
    """States [rows, d] on the CPU of each site, at each prompt's lookup token."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))  # prompts of similar length share a pass
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * len(prompts[i].ids) > TOKENS:
            batches.append([])
        batches[-1].append(i)
    states: list[torch.Tensor] = []
    with evaluating(view):
        for batch in tqdm(batches, desc="states", disable=not progress):
            positions = torch.tensor([prompts[i].lookup for i in batch])
            captured, _ = capture(view, pad([prompts[i].ids for i in batch], view.device), sites, positions)
            for s, site in enumerate(sites):
                rows = captured[site].cpu()
                if len(states) <= s:
                    states.append(rows.new_empty(len(prompts), rows.shape[1]))
                states[s][batch] = rows
    for site, rows in zip(sites, states, strict=True):
        if not bool(torch.isfinite(rows).all()):
            raise StatisticsError(f"layer {site.layer}: states ({site.kind}) of the prompts are not finite")
    return states


def _folds(facts: Sequence[_Fact], count: int, generator: random.Random) -> list[int]:
    """The part of each fact: all facts of a subject in one, the subjects of an object in as many as possible."""
    of_subject = {fact.subject: fact.object for fact in facts}
    subjects = sorted(of_subject)
    generator.shuffle(subjects)
    subjects.sort(key=lambda subject: of_subject[subject])  # stable: shuffled within an object
    part = {subject: i % min(count, len(subjects)) for i, subject in enumerate(subjects)}
    return [part[fact.subject] for fact in facts]


def _score(
    facts: Sequence[_Fact], states: Sequence[torch.Tensor], ridge: float, folds: int, controls: int, seed: int
) -> _Scores:
    """Accuracy of the facts' probes and of the controls."""
    generator = random.Random(f"{seed} {len(facts)} {facts[0].object}")
    parts = torch.tensor(_folds(facts, folds, generator))
    objects = sorted({fact.object for fact in facts})
    classes = torch.tensor([objects.index(fact.object) for fact in facts])
    columns = [classes, *(_shuffled(facts, classes, generator) for _ in range(controls))]
    targets = torch.cat([torch.nn.functional.one_hot(column, len(objects)) for column in columns], 1)  # [n, C (1 + S)]
    rows = torch.tensor([fact.row for fact in facts])
    shares = torch.zeros(len(states), len(columns), dtype=torch.float64)
    for layer, of_layer in enumerate(states):
        x = of_layer[rows]
        for part in sorted(set(parts.tolist())):
            held_out = parts == part
            probe = ridge_probe(x[~held_out], targets[~held_out], ridge)
            named = probe(x[held_out]).unflatten(1, (len(columns), len(objects))).argmax(2)  # [m, 1 + S]
            right = named == torch.stack(columns, 1)[held_out]
            shares[layer] += right.sum(0)
    shares /= len(facts)
    return _Scores(shares[:, 0], shares[:, 1:])


def _shuffled(facts: Sequence[_Fact], classes: torch.Tensor, generator: random.Random) -> torch.Tensor:
    """The classes of facts, dealt to other subjects: those of one subject stay together where they are as many."""
    of_subject: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        of_subject.setdefault(fact.subject, []).append(i)
    by_size: dict[int, list[list[int]]] = {}
    for places in of_subject.values():
        by_size.setdefault(len(places), []).append(places)
    shuffled = classes.clone()
    for groups in by_size.values():
        givers = list(groups)
        generator.shuffle(givers)
        for places, giver in zip(groups, givers, strict=True):
            shuffled[places] = classes[giver]
    return shuffled


def _summary(scores: Sequence[tuple[Sequence[_Fact], _Scores]]) -> dict[str, Any]:
    """Means over the facts of some relations, with intervals over their subjects."""
    count = sum(len(facts) for facts, _ in scores)
    subjects = len({fact.subject for facts, _ in scores for fact in facts})
    accuracy = sum(len(facts) / count * score.accuracy for facts, score in scores)
    control = sum(len(facts) / count * score.control for facts, score in scores)
    assert isinstance(accuracy, torch.Tensor) and isinstance(control, torch.Tensor)
    frequent = sum(max(Counter(fact.object for fact in facts).values()) for facts, _ in scores)
    intervals = [wilson(share * subjects, subjects) for share in accuracy.tolist()]
    bounds = [
        (min(low, *shuffles), max(high, *shuffles))
        for shuffles in control.tolist()
        for low, high in [wilson(sum(shuffles) / len(shuffles) * subjects, subjects)]
    ]
    return {
        "accuracy": tuple(accuracy.tolist()),
        "low": tuple(low for low, _ in intervals),
        "high": tuple(high for _, high in intervals),
        "control": tuple(control.mean(1).tolist()),
        "control_low": tuple(low for low, _ in bounds),
        "control_high": tuple(high for _, high in bounds),
        "classes": sum(len({fact.object for fact in facts}) for facts, _ in scores),
        "majority": frequent / count,
        "count": count,
        "subjects": subjects,
    }
