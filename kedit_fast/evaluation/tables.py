"""The table of metrics on this room's page, made from the registry.

`python -m kedit_fast.evaluation.tables` prints it; with the page's path it replaces the table there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from kedit_fast.evaluation.metric import Derived, Metric, Scoring
from kedit_fast.evaluation.registry import ABSENT, METRICS, PROMPTS, SCORINGS

BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"
_HEADER = ("id", "value", "mean over", "scale", "good is", "from")
_PACKAGES = {".nltk": "nltk", ".sklearn": "scikit-learn"}
"""Endings of ids of metrics that are there where an optional package is."""


def metrics_table() -> str:
    """A row per metric; one for metrics of the same definition and source, with all their prompts."""
    rows = [_HEADER, tuple("---" for _ in _HEADER), *_rows()]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    ids = sorted(id for id in {*METRICS, *ABSENT} if _package(id))
    beside = ", ".join(f"`{id}` ({_package(id)})" for id in ids)
    return f"{table}\n\nWhere the packages are installed there are, too: {beside}.\n"


def with_table(page: str) -> str:
    """A page with its table replaced."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", flags=re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{metrics_table()}\n{END}", page)


def _package(id: str) -> str:
    """The optional package that a metric needs; empty for most."""
    return next((package for ending, package in _PACKAGES.items() if id.endswith(ending)), "")


def _rows() -> Iterator[tuple[str, ...]]:
    merged: dict[tuple[str, ...], list[str]] = {}
    for metric in METRICS.values():
        if not _package(metric.id):
            definition, _, prompts = metric.id.partition("/")
            merged.setdefault((definition, *_cells(metric)), []).append(prompts)
    for (definition, *cells), prompts in merged.items():
        yield (f"`{definition}{_alternatives(prompts)}`", *cells)


def _alternatives(prompts: list[str]) -> str:
    """What stands behind an id's slash, in braces where it is several things."""
    if len(prompts) == 1:
        return f"/{prompts[0]}" if prompts[0] else ""
    return "/{" + ", ".join(prompts) + "}"


def _cells(metric: Metric | Derived) -> tuple[str, ...]:
    return (
        metric.definition.rstrip(".").replace("|", "\\|"),
        _records(metric),
        "percent" if _percent(metric) else f"{metric.scale:g}",
        metric.better or "-",
        re.sub(r"arXiv[ :](\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", metric.source).replace("|", "\\|"),
    )


def _records(metric: Metric | Derived) -> str:
    """What is averaged over, and which other state of the model it is compared with."""
    if isinstance(metric, Derived):
        return f"made of {', '.join(f'`{part}`' for part in metric.of)}"
    over = PROMPTS[metric.prompts].over
    unit = {"choices": "items", "texts": "texts"}.get(over) or {"prompt": "prompts", "group": "groups"}.get(metric.unit)
    scoring = SCORINGS[metric.scoring]
    states = scoring.states if isinstance(scoring, Scoring) else ()
    return (unit or over) + (f", against {' and '.join(states)}" if states else "")


def _percent(metric: Metric | Derived) -> bool:
    if isinstance(metric, Derived):
        return all(_percent(METRICS[part]) for part in metric.of)
    return metric.scale == 100 and metric.share


if __name__ == "__main__":
    if sys.argv[1:]:
        path = Path(sys.argv[1])
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(metrics_table(), end="")
