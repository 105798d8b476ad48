"""Every metric by its id: the catalog's families in one table, and the choice of some by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import TypeVar

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.evaluation.catalog import (
    choices,
    conflicts,
    counterfact,
    drift,
    easyedit,
    generation,
    knowedit,
    memory,
    mquake,
    negation,
    pitfalls,
    rippleedits,
    safety,
    unke,
    wild,
    zsre,
)
from kedit_fast.evaluation.metric import Derived, FittedScoring, Metric, Prompts, Scoring

T = TypeVar("T")

CATALOG: tuple[ModuleType, ...] = (
    counterfact,
    zsre,
    easyedit,
    generation,
    wild,
    knowedit,
    mquake,
    rippleedits,
    unke,
    pitfalls,
    conflicts,
    negation,
    choices,
    drift,
    safety,
    memory,
)
"""The families, in the order of tables. Each has mappings PROMPTS and SCORINGS by name, a tuple METRICS, and, where
some of its metrics need an optional package that is not installed, a mapping ABSENT from their ids to the reason."""

DEFINITIONS = 1
"""Version of the definitions: raised when a metric counts something else than before under the same id."""

DEFAULT = (
    "cf.success",
    "cf.magnitude",
    "cf.accuracy",
    "cf.score",
    "ee.token_accuracy",
    "ee.locality",
    "loc.kl/neighborhood",
    "text.nll",
)
"""What "default" stands for: teacher-forced numbers that cost the passes of the request's prompts alone."""

BESIDE = "default,memory"
"""What is measured by default where edits stand beside the weights."""


def _merged(tables: Iterable[Mapping[str, T]], kind: str) -> Mapping[str, T]:
    merged: dict[str, T] = {}
    for table in tables:
        if twice := merged.keys() & table.keys():
            raise InvalidArgumentError(f"two families of metrics define the {kind} {min(twice)!r}")
        merged.update(table)
    return MappingProxyType(merged)


PROMPTS: Mapping[str, Prompts] = _merged((family.PROMPTS for family in CATALOG), "prompts")
SCORINGS: Mapping[str, Scoring | FittedScoring] = _merged((family.SCORINGS for family in CATALOG), "scoring")
METRICS: Mapping[str, Metric | Derived] = _merged(
    ({metric.id: metric for metric in family.METRICS} for family in CATALOG), "metric"
)
ABSENT: Mapping[str, str] = _merged((getattr(family, "ABSENT", {}) for family in CATALOG), "metric")


def select(names: str | Iterable[str] = "default") -> tuple[Metric | Derived, ...]:
    """Metrics by name, in the order of the registry, with those that derived ones are made of.

    Args:
        names: ids ("cf.success/rewrite"), definitions ("cf.success": with all its prompts), families ("cf"),
            "default" or "all"; as one text, with commas between them.

    Raises:
        InvalidArgumentError: a name that none of these is, with those that are close to it.

    Example:
        >>> [metric.id for metric in select("cf.success")]
        ['cf.success/rewrite', 'cf.success/paraphrase', 'cf.success/neighborhood']
    """
    texts = names.split(",") if isinstance(names, str) else list(names)
    wanted: set[str] = set()
    for text in (text.strip() for text in texts):
        if text == "default":
            wanted.update(name for part in DEFAULT for name in _matching(part))
        elif text:
            matching = _matching(text)
            if not matching and text in ABSENT:
                raise InvalidArgumentError(f"the metric {text!r} {ABSENT[text]}")
            if not matching:
                raise InvalidArgumentError(f"no metric {text!r}: {_close(text)}")
            wanted.update(matching)
    if not wanted:
        raise InvalidArgumentError("no metrics chosen")
    pending = list(wanted)
    while pending:
        metric = METRICS[pending.pop()]
        parts = metric.of if isinstance(metric, Derived) else ()
        pending += [part for part in parts if part not in wanted]
        wanted.update(parts)
    return tuple(metric for name, metric in METRICS.items() if name in wanted)


def _matching(text: str) -> list[str]:
    if text == "all":
        return list(METRICS)
    begin = (f"{text}/",) if "." in text else (f"{text}/", f"{text}.")
    return [name for name in METRICS if name == text or name.startswith(begin)]


def _close(text: str) -> str:
    known = {part for name in METRICS for part in (name, name.partition("/")[0], name.partition(".")[0])}
    close = difflib.get_close_matches(text, sorted(known), n=4)
    if close:
        return f"did you mean {', '.join(close)}?"
    families = dict.fromkeys(name.partition(".")[0] for name in METRICS)
    return f"choose ids, definitions or families: {', '.join(families)}"
