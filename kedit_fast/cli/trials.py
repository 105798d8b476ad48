"""The trials that choose hyper-parameters: their tables, and what `edit`, `demo` and `plan` do before they start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.console import interactive, notices
from kedit_fast.reports.choice import REQUESTS, Choice, choose
from kedit_fast.reports.search import named_layers, span
from kedit_fast.reports.trials import StoredStatistics
from kedit_fast.support.process_group import world

SHARES = {"efficacy": "effi-\ncacy", "paraphrase": "para-\nphrase", "neighborhood": "neigh-\nborhood"}
"""A share's field -> the heading of its column."""
MEASURES = {**SHARES, "drift": "drift", "norm": "norm"}


def table_of_trials(
    title: str, trials: Sequence[Mapping[str, Any]], best: int | None, measures: Mapping[str, str] = MEASURES
) -> tuple[Table, list[str]]:
    """A table of trials, 80 columns wide at most, and a line for each reason of failures, which rows name by number.

    Args:
        title: the line above.
        trials: the fields of each `Trial`.
        best: the index of the trial that gets a star; None for none.
        measures: field -> heading of the columns.
    """
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial")
    shown = {name: text for name, text in measures.items() if any(trial[name] is not None for trial in trials)}
    for heading in (*shown.values(), "score"):
        table.add_column(heading, justify="right")
    table.add_column("")
    reasons: list[str] = []
    for index, trial in enumerate(trials):
        cells = ["" if trial[name] is None else f"{trial[name]:.3f}".replace("-0.000", "0.000") for name in shown]
        if trial["failure"]:
            if trial["failure"] not in reasons:
                reasons.append(trial["failure"])
            cells.append(f"failed {reasons.index(trial['failure']) + 1}")
        else:
            cells.append(f"{trial['score']:.3f}")
        table.add_row(escape(label(trial)), *cells, "*" if index == best else "")
    return table, [f"failed {number}: {reason}" for number, reason in enumerate(reasons, 1)]


def label(trial: Mapping[str, Any]) -> str:
    """What a trial varied: "layers 4-8", or "residual_share 0.35, 4-8" with its layers."""
    if trial["stage"] == "layers":
        return named_layers(trial["layers"])
    if trial["stage"] == "preset":
        return f"preset, layers {span(trial['layers'])}"
    value = trial["value"]
    return f"{trial['stage']} {value if isinstance(value, str) else format(value, '.3g')}, {span(trial['layers'])}"


@dataclass(frozen=True)
class Chosen:
    """What trials chose for a command."""

    choice: Choice
    """The choice."""
    where: str
    """Where it is from, or what became of its file."""

    def as_dict(self) -> dict[str, Any]:
        """The entry `chosen` of a command's JSON object."""
        choice = self.choice
        names = ("layers", *SHARES, "score", "failure")
        return {
            "numbers": choice.hparams,
            "edits": choice.edits,
            "trials": [{name: trial[name] for name in names} for trial in choice.trials],
            "notes": list(choice.notes),
            "file": self.where,
        }


def chosen_by_trials(
    model: Any,
    tokenizer: Any,
    records: Sequence[Any],
    method: str,
    overrides: Mapping[str, Any],
    statistics: StoredStatistics | None,
    folder: str | os.PathLike | None,
    off: str = "--no-trial, or --layers, edits without",
    **options: Any,
) -> Chosen:
    """Choose hyper-parameters for a model without a preset, and say on stderr which and why.

    Args:
        model, tokenizer, records, method: of the command.
        overrides: hyper-parameters that the user has given.
        statistics: of the layers to try; None where the method uses none.
        folder: where the choice is stored.
        off: what to do instead, for the message.
        options: seed, prompt_format, target_separator, on_error and spec of `choose`.
    """
    if speaks := world()[0] == 0:
        count = min(REQUESTS, len(records))
        notices.print(
            f"kedit-fast: no preset for this model: trials on {count} of {len(records)} requests choose its "
            f"hyper-parameters ({off})",
            markup=False,
        )
    choice, where = choose(
        model,
        tokenizer,
        records,
        method,
        statistics=statistics,
        hparams=overrides,
        folder=folder,
        progress=interactive(),
        **options,
    )
    if speaks:
        _say(choice, where)
    return Chosen(choice, where)


def _say(choice: Choice, where: str) -> None:
    table, reasons = table_of_trials("Trials", choice.trials, choice.best, SHARES)
    notices.print(table, soft_wrap=False)
    best = choice.trials[choice.best]
    changed = ", ".join(
        f"{name} {span(value) if name == 'layers' else format(value, '.3g') if isinstance(value, float) else value}"
        for name, value in choice.hparams.items()
    )
    shares = ", ".join(f"{name} {best[name]:.2f}" for name in SHARES if best[name] is not None)
    notices.print(f"kedit-fast: chose {changed}: the best of {len(choice.trials)} ({shares}); {where}", markup=False)
    for line in (*reasons, *choice.notes):
        notices.print(f"kedit-fast: {line}", markup=False)
