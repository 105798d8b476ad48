"""The table of metrics on this room's page, made from the registry: `python -m kedit_fast.evaluation.tables`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kedit_fast.evaluation.metric import Derived, Metric
from kedit_fast.evaluation.registry import METRICS, PROMPTS, SCORINGS

_HEADER = ("id", "value", "of", "scale", "good is", "from")


def metrics_table() -> str:
    """A row per metric; one for metrics of the same definition and source, with all their prompts."""
    rows = [_HEADER, tuple("---" for _ in _HEADER), *_rows()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _rows() -> Iterator[tuple[str, ...]]:
    merged: dict[tuple[str, ...], list[str]] = {}
    for metric in METRICS.values():
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
        re.sub(r"arXiv[ :](\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", metric.source),
    )


def _records(metric: Metric | Derived) -> str:
    """What is averaged over, and which other state of the model it is compared with."""
    if isinstance(metric, Derived):
        return f"other metrics: {', '.join(f'`{part}`' for part in metric.of)}"
    over = PROMPTS[metric.prompts].over
    unit = {"prompt": "prompts", "group": "groups"}.get(metric.unit, over)
    unit = {"choices": "items", "texts": "texts"}.get(over, unit)
    states = SCORINGS[metric.scoring].states
    return f"{unit}, against {' and '.join(states)}" if states else unit


def _percent(metric: Metric | Derived) -> bool:
    if isinstance(metric, Derived):
        return all(_percent(METRICS[part]) for part in metric.of)
    return metric.scale == 100 and metric.share


if __name__ == "__main__":
    print(metrics_table())
