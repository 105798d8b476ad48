"""What an evaluation found: each metric's value by state, and the scores of every record and case behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kedit_fast.evaluation.asks import Answer
from kedit_fast.evaluation.metric import Case, Derived, Measured, Metric, State, Unit, Within
from kedit_fast.support.intervals import bootstrap, wilson

STATES: tuple[State, ...] = ("pre", "context", "first", "post", "final")
"""In the order of tables."""


@dataclass(frozen=True)
class CaseScore:
    """One case of a record, in every state in which it counts."""

    case: Case
    scores: Mapping[State, float]
    """By state; a state in which the case does not count is absent."""
    answers: Mapping[str, tuple[Answer, ...]]
    """What the model answered in each state that was measured, in the order of the asks."""
    weights: Mapping[State, float]
    """How much the case counts in means, by state."""


@dataclass(frozen=True)
class RecordScore:
    """One record, or group of requests, in every state."""

    number: int
    """Of its first record, from 1."""
    name: str
    """Its id, or what messages call it."""
    scores: Mapping[State, float]
    """Not scaled; a state in which nothing of the record counts is absent."""
    cases: tuple[CaseScore, ...]


@dataclass(frozen=True)
class Result:
    """One metric in every state that was measured."""

    metric: Metric | Derived
    states: Mapping[State, Measured]
    unit: Unit | None
    """What was averaged over; None of a derived number."""
    reason: str = ""
    """Why a state is missing, where one is."""


@dataclass(frozen=True)
class Evaluation:
    """All metrics of a run, with the scores behind them."""

    metrics: Mapping[str, Result]
    """By id, in the order of the registry."""
    scores: Mapping[str, tuple[RecordScore, ...]]
    """By id: every record that has what the metric needs. Derived numbers have none."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, and how: model, records, separators, mean."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """Index of each request that could not be measured -> why."""

    def value(self, id: str, state: State = "final") -> float | None:
        """A metric's value; None where nothing counts or the state was not measured."""
        measured = self.metrics[id].states.get(state)
        return None if measured is None else measured.value

    def as_dict(self, records: bool = False) -> dict[str, Any]:
        """As JSON has it.

        Args:
            records: with the scores of each record and prompt.
        """
        result: dict[str, Any] = {"context": dict(self.context), "metrics": {}}
        for id, one in self.metrics.items():
            entry: dict[str, Any] = {
                "definition": one.metric.definition,
                "source": one.metric.source,
                "mean_over": one.unit,
                "better": one.metric.better,
                "states": {state: _measured(measured) for state, measured in one.states.items()},
            }
            result["metrics"][id] = entry | ({"reason": one.reason} if one.reason else {})
        if records:
            result["records"] = list(self.rows())
        return result

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every case of every record, as CSV has it: metric, record, case, prompt, and the scores by state, scaled."""
        for id, records in self.scores.items():
            scale = getattr(self.metrics[id].metric, "scale", 1.0)
            for record in records:
                for number, one in enumerate(record.cases, 1):
                    yield {
                        "metric": id,
                        "record": record.number,
                        "id": record.name,
                        "case": number,
                        "name": one.case.name,
                        "prompt": one.case.prompt,
                        "new": one.case.new,
                        "true": one.case.true,
                        **{state: _scaled(one.scores.get(state), scale) for state in self.states},
                    }

    def __str__(self) -> str:
        """A table: each metric in each state, with interval and number of records of the last one."""
        lines = [["metric", *self.states, "95 %", "n"]]
        for id, one in self.metrics.items():
            last = one.states.get(self.states[-1]) if self.states else None
            limits = "" if last is None or last.interval is None else "{:.4g} to {:.4g}".format(*last.interval)
            values = [one.states[state].value if state in one.states else None for state in self.states]
            cells = ["" if value is None else f"{value:.4g}" for value in values]
            lines.append([id, *cells, limits, "" if last is None else str(last.records)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            ).rstrip()
            for line in lines
        )

    @property
    def states(self) -> tuple[State, ...]:
        """The states that were measured, in the order of tables."""
        there = {state for one in self.metrics.values() for state in one.states}
        return tuple(state for state in STATES if state in there)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _measured(measured: Measured) -> dict[str, Any]:
    interval = None if measured.interval is None else list(measured.interval)
    return {"value": measured.value, "records": measured.records, "prompts": measured.prompts, "interval": interval}


def record_score(within: Within, cases: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """The score of one record and its weight, from its cases' names, scores and weights; at least one case.

    With weights, each mean is a weighted one; "any" is the largest score and "all" the smallest one.
    """
    weight = sum(w for _, _, w in cases)
    if within == "any":
        return max(score for _, score, _ in cases), weight
    if within == "all":
        return min(score for _, score, _ in cases), weight
    if within == "mean of names":
        names = dict.fromkeys(name for name, _, _ in cases)
        parts = [_mean([(s, w) for other, s, w in cases if other == name]) for name in names]
        return sum(parts) / len(parts), weight
    return _mean([(score, weight) for _, score, weight in cases]), weight


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    weight = sum(w for _, w in pairs)
    return sum(s * w for s, w in pairs) / weight if weight else 0.0


def measured(
    records: Sequence[tuple[float, float]],
    cases: int,
    unit: Unit,
    scale: float = 1.0,
    seed: int = 0,
    share: bool = True,
) -> Measured:
    """A metric's value from the scores and weights of its records.

    Args:
        records: of each that counts, its score and the weight of its cases.
        cases: how many cases count.
        unit: "prompt": records count by their weight; else all alike.
        scale: of value and interval.
        seed: of the bootstrap.
        share: whether scores lie between 0 and 1.
    """
    if not records:
        return Measured(None, 0, 0, None)
    weights = [weight if unit == "prompt" else 1.0 for _, weight in records]
    scores = [score for score, _ in records]
    value = _mean(list(zip(scores, weights, strict=True)))
    if share and all(score in (0.0, 1.0) for score in scores) and len(set(weights)) == 1:
        low, high = wilson(sum(scores), len(scores))
    elif len(scores) == 1:
        return Measured(value * scale, 1, cases, None)
    else:
        low, high = bootstrap(scores, weights, seed)
    low, high = sorted((low * scale, high * scale))
    return Measured(value * scale, len(records), cases, (low, high))
