"""Pitfalls of knowledge editing (arXiv 2310.02129): edits that contradict each other, and edits that are taken back.

A group of requests is a record of ConflictEdit or RoundEdit: its edits in order, with the probes of its first request
(`kedit_fast.requests.datasets.pitfalls`). p is exp(-NLL), averaged over the prompt and the paraphrases of a fact: p_0
in the unedited model ("pre"), p_1 after the group's first edit ("first"), p_2 in the state that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from kedit_fast.evaluation.asks import Ask, Forced
from kedit_fast.evaluation.catalog.counterfact import Answers, forced, forced_answers, probability, probes_of
from kedit_fast.evaluation.metric import Better, Case, Metric, Prompts, Scoring, State
from kedit_fast.requests.probes import Probe, ProbeKind
from kedit_fast.requests.request import EditRequest

Group = Sequence[EditRequest]
Fact = tuple[tuple[str, ...], str]
"""Prompts, and the answer that is scored behind each of them."""
UNDONE = 0.5
"""The share of less probable answers above which a group counts as failed."""


def phrasings(request: EditRequest) -> tuple[Case, ...]:
    """The prompt and the paraphrase prompts."""
    new, true = request.target_new, request.target_true
    return tuple(Case(prompt, new, true, record=request) for prompt in _prompts(request))


def _prompts(request: EditRequest) -> tuple[str, ...]:
    return (request.text, *request.paraphrase_prompts)


def _probes(group: Group, kind: ProbeKind, name: str) -> tuple[Probe, ...]:
    return tuple(probe for probe in probes_of(group[0], kind) if probe.name == name)


def _probed(probe: Probe) -> Fact:
    """What a probe asks: one answer behind each of its prompts."""
    return probe.prompts, probe.questions[0].answers[0][0]


def conflict_of(group: Group) -> Literal["reverse", "composite", "coverage", ""]:
    """How the second edit of a group contradicts the first one; "" where it does not, as far as the requests say."""
    if len(group) != 2 or round_of(group):
        return ""
    first, second = group
    if first.text == second.text:
        return "coverage"
    if second.subject == first.target_new and second.target_true == first.subject:
        return "reverse"
    return "composite" if _probes(group, "tied", "prerequisite") else ""


def round_of(group: Group) -> Literal["one", "all", ""]:
    """How later edits of a group take the first one back: with the old answer, with all true ones at once; or not."""
    first, *later = group
    others = _others(group)
    if not later or any(request.text != first.text for request in later) or not others:
        return ""
    written = {request.target_new for request in later}
    if first.target_true not in written:
        return ""
    return "one" if len(written) == 1 else "all"


def _others(group: Group) -> tuple[Fact, ...]:
    """True answers beside the old one."""
    return tuple(_probed(probe) for probe in _probes(group, "locality", "true_objects"))


def _one_case(accepts: Callable[[Group], bool]) -> Callable[[Group], tuple[Case, ...]]:
    def cases(group: Group) -> tuple[Case, ...]:
        first = group[0]
        return (Case(first.text, first.target_new, first.target_true, record=group),) if accepts(group) else ()

    return cases


PROMPTS = {
    "phrasings": Prompts("requests", phrasings),
    "conflicts": Prompts("groups", _one_case(lambda group: conflict_of(group) != "")),
    "composites": Prompts("groups", _one_case(lambda group: conflict_of(group) == "composite")),
    "rounds": Prompts("groups", _one_case(lambda group: round_of(group) == "one")),
    "rounds of all": Prompts("groups", _one_case(lambda group: round_of(group) == "all")),
}


def _new_of(request: EditRequest) -> Fact:
    return _prompts(request), request.target_new


def _true_of(request: EditRequest) -> Fact:
    assert request.target_true is not None  # `round_of` has compared it
    return _prompts(request), request.target_true


def _explicit(group: Group) -> tuple[Fact, ...]:
    return _new_of(group[0]), _new_of(group[1])


def _implicit(group: Group) -> tuple[Fact, ...]:
    implied = _probes(group, "portability", "implicit")
    if implied:
        return _new_of(group[0]), _probed(implied[0])
    return _explicit(group) if conflict_of(group) == "coverage" else ()


def _prerequisite(group: Group) -> tuple[Fact, ...]:
    return tuple(_probed(probe) for probe in _probes(group, "tied", "prerequisite")[:1])


def _both_answers(group: Group) -> tuple[Fact, ...]:
    return _new_of(group[0]), _true_of(group[0])


def _true_answers(group: Group) -> tuple[Fact, ...]:
    return (_true_of(group[0]), *_others(group))


def _scoring(facts: Callable[[Group], tuple[Fact, ...]], score: Callable[..., float | None], *states: State) -> Scoring:
    """The score of facts' probabilities: a list for the measured state, then one for each of `states`."""

    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        separator = case.record[0].target_separator
        return tuple(Forced(prompt, answer, separator) for prompts, answer in facts(case.record) for prompt in prompts)

    def by_fact(case: Case, answers: Answers, state: str) -> list[float]:
        given = iter(forced_answers(answers, state))
        return [sum(probability(next(given)) for _ in prompts) / len(prompts) for prompts, _ in facts(case.record)]

    def scored(case: Case, answers: Answers) -> float | None:
        if not answers["now"]:
            return None
        return score(*(by_fact(case, answers, state) for state in ("now", *states)))

    return Scoring(asks, scored, states=states)


def _second_is_larger(now: Sequence[float]) -> float:
    return float(now[1] > now[0])


def _loss(before: float, now: float) -> float | None:
    return (before - now) / before if before > 0 else None


def _damage(now: Sequence[float], first: Sequence[float]) -> float | None:
    loss = _loss(first[0], now[0])
    return None if loss is None else max(loss, -1.0)


def _damage_without_limit(now: Sequence[float], before: Sequence[float]) -> float | None:
    return _loss(before[0], now[0])


def _both_edits_took(now: Sequence[float], first: Sequence[float]) -> float:
    return ((first[0] > first[1]) + (now[1] > now[0])) / 2


def _share_less_probable(now: Sequence[float], before: Sequence[float]) -> float:
    lower = [a < b for a, b in zip(now[1:], before[1:], strict=True)]
    return sum(lower) / len(lower)


def _failed(now: Sequence[float], before: Sequence[float]) -> float:
    return float(_share_less_probable(now, before) > UNDONE)


def js_nats(one: Iterable[float], other: Iterable[float]) -> float | None:
    """Jensen-Shannon divergence in nats of two lists of weights, each divided by its sum; None where a sum is 0."""
    pair = [list(values) for values in (one, other)]
    sums = [sum(values) for values in pair]
    if not all(total > 0 for total in sums):
        return None
    p, q = ([value / total for value in values] for values, total in zip(pair, sums, strict=True))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(weights: Sequence[float]) -> float:
        return sum(a * math.log(a / m) for a, m in zip(weights, middle, strict=True) if a > 0)

    return (kl(p) + kl(q)) / 2


def _divided_by_count(now: Sequence[float], before: Sequence[float]) -> float | None:
    divergence = js_nats(now, before)
    return None if divergence is None else divergence / len(now)


def _probability_of(attribute: str) -> Scoring:
    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        target = getattr(case, attribute)
        return () if target is None else (forced(case, target),)

    def score(case: Case, answers: Answers) -> float | None:
        given = forced_answers(answers)
        return probability(given[0]) if given else None

    return Scoring(asks, score)


SCORINGS = {
    "pit.p, new": _probability_of("new"),
    "pit.p, true": _probability_of("true"),
    "pit.CS, explicit": _scoring(_explicit, _second_is_larger),
    "pit.CS, implicit": _scoring(_implicit, _second_is_larger),
    "pit.CM": _scoring(lambda group: (_new_of(group[0]),), _damage, "first"),
    "pit.TFD": _scoring(_prerequisite, _damage_without_limit, "pre"),
    "pit.Succ": _scoring(_both_answers, _both_edits_took, "first"),
    "pit.D": _scoring(_true_answers, js_nats, "pre"),
    "pit.D.published": _scoring(_true_answers, _divided_by_count, "pre"),
    "pit.IR": _scoring(_true_answers, _share_less_probable, "pre"),
    "pit.FR": _scoring(_true_answers, _failed, "pre"),
}

_SUMMARY = "PitfallsKnowledgeEditing experiments/summarize.py"


def _p(name: str, better: Better) -> Metric:
    return Metric(
        id=f"pit.p/{name}",
        prompts="phrasings",
        scoring=f"pit.p, {name}",
        definition=f"exp(-NLL) of the {name} target, mean over the prompt and its paraphrases.",
        source="PitfallsKnowledgeEditing experiments/py/eval_utils_conflictedit.py:50-90",
        better=better,
    )


def _conflict_score(name: str, answer: str) -> Metric:
    return Metric(
        id=f"pit.CS/{name}",
        prompts="conflicts",
        scoring=f"pit.CS, {name}",
        definition="Share of groups of two contradicting edits with a larger p_2 of "
        f"{answer} than of the first edit's target.",
        source=f"{_SUMMARY}:35-40, CS; experiments/evaluate_conflictedit.py:53-77",
        unit="group",
        scale=100.0,
    )


def _round_metrics(prefix: str, prompts: str, edits: str) -> tuple[Metric, ...]:
    def metric(name: str, lines: str, better: Better, definition: str, scale: float = 1.0) -> Metric:
        return Metric(
            id=f"pit.{prefix}{name}",
            prompts=prompts,
            scoring=f"pit.{name}",
            definition=f"{definition}; of groups of {edits}.",
            source=f"{_SUMMARY}:{lines}, {name.partition('.')[0]}",
            unit="group",
            scale=scale,
            better=better,
            share=scale == 100,
        )

    return (
        metric(
            "Succ",
            "105-106",
            "higher",
            "Mean of the shares with p_1(new) > p_1(old), and with p_2(old) > p_2(new)",
            100.0,
        ),
        metric("D", "67-75", "lower", "Jensen-Shannon divergence in nats of p_2 and p_0 over the true answers"),
        metric("D.published", "67-75", "lower", "pit.D divided by the number of true answers"),
        metric("IR", "92-116", "lower", "Share of the other true answers with p_2 < p_0, mean over groups", 100.0),
        metric(
            "FR", "92-116", "lower", "Share of groups in which most of the other true answers have p_2 < p_0", 100.0
        ),
    )


METRICS = (
    _p("new", "higher"),
    _p("true", ""),
    _conflict_score("explicit", "the second edit's target"),
    _conflict_score(
        "implicit", "the answer that the second one implies at the first one's prompt (coverage: its target)"
    ),
    Metric(
        id="pit.CM",
        prompts="conflicts",
        scoring="pit.CM",
        definition="(p_1 - p_2) / p_1 of the first edit's target, at least -1; of groups of two contradicting edits.",
        source=f"{_SUMMARY}:41, CM",
        unit="group",
        better="",
        share=False,
    ),
    Metric(
        id="pit.TFD",
        prompts="composites",
        scoring="pit.TFD",
        definition="(p_0 - p_2) / p_0 of the fact that ties two composite edits together and that no edit changes, "
        "without a lower limit.",
        source=f"{_SUMMARY}:42-47, FFD",
        unit="group",
        better="lower",
        share=False,
    ),
    *_round_metrics("", "rounds", "an edit and its reverse"),
    *_round_metrics("MLE.", "rounds of all", "an edit and then a batch of all true answers"),
)
