"""The table of a finished run of edits."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.console import notices, output
from kedit_fast.errors import EditError
from kedit_fast.evaluation.results import Evaluation
from kedit_fast.reports.evaluation import interval, number, scale_of, titles
from kedit_fast.reports.harm import in_words
from kedit_fast.solver.harm import Harm

LOW_EFFICACY = 0.5
"""Below it, a run warns."""


def require_change(report: Any) -> None:
    """Raise EditError when a `workflow.Report` is of edits that changed no bit of any weight, and left no memory."""
    if not report.changed_anything:
        raise EditError(
            f"the {report.edits} edits changed no weight: the model says their targets already, or the updates are too "
            "small for the dtype of the weights; nothing was saved"
        )


def warn_of_efficacy(report: Any, model: str) -> None:
    """Warn on stderr when fewer than half of the targets came through."""
    if report.after.efficacy < LOW_EFFICACY:
        notices.print(
            f"kedit-fast: efficacy is {report.after.efficacy:.2f}: most targets did not come through; `kedit-fast "
            f"suggest {model} --method {report.method} --requests FILE` looks for better hyper-parameters",
            markup=False,
        )


def print_report(report: Any, title: str) -> None:
    """Shares of prompts before and after, seconds, and the dimensions of null spaces, of a `workflow.Report`."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("share of prompts")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = report.before.as_dict(), report.after.as_dict()
    for name, value in after.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{before[name]:.3f}", f"{value:.3f}")
    output.print(table)
    if report.evaluation is not None:
        print_metrics(report.evaluation, "Metrics")
    if report.retention is not None:
        curve = report.retention
        shares = "; ".join(
            f"{name} {share:.3f}"
            for name, share in (("kept", curve.retained), ("forgetting", curve.forgetting))
            if share is not None
        )
        output.print(f"Retention of {curve.batches} batches in {curve.metric}: {shares}", markup=False)
    if report.tuning is not None:
        for line in report.tuning.lines():
            output.print(line, markup=False)
    spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    output.print(f"Seconds: {spent}", markup=False)
    if report.harm is not None:
        print_harm(report.harm, "Update")
    if report.routing:
        last = report.routing[-1]
        output.print(
            f"Routing: {last.share:.1%} of the choices of experts are others than before, of {last.tokens:,} tokens in "
            f"{len(last.changed)} layers above the lowest edited one",
            markup=False,
        )
    if joined := sum(request["target_separator"] != " " for request in report.requests):
        output.print(f"Targets: {joined} of {report.edits} follow their prompts without a space", markup=False)
    if report.resolved:
        scaled = "; ".join(f"{name} {_in_words(value)}" for name, value in report.resolved.items())
        output.print(f"Scaled to the model: {scaled}", markup=False)
    if report.null_spaces:
        dimensions = ", ".join(f"layer {layer} {count}" for layer, count in sorted(report.null_spaces.items()))
        output.print(f"Null space dimensions: {dimensions}", markup=False)


def print_harm(harm: Harm, name: str) -> None:
    """The line of an update: its norm, and its predicted KL divergence or why there is none."""
    output.print(f"{name}: {in_words(harm)}", markup=False)
    if harm.missing:
        output.print(f"No predicted KL: {harm.missing}", markup=False)


def _in_words(value: Any) -> str:
    """A number, or a number for each layer."""
    if isinstance(value, dict):
        return ", ".join(f"{number:.4g} at layer {layer}" for layer, number in value.items())
    return f"{value:.4g}"


def print_metrics(evaluation: Evaluation, title: str) -> None:
    """The table of an evaluation: each metric in each state, with the interval and the records of the last one."""
    states = evaluation.states
    rows = [["metric", *titles(states).values(), "95 %", "n"]]
    absent = {}
    for id, one in evaluation.metrics.items():
        scale = scale_of(evaluation, id)
        last = one.states.get(states[-1]) if states else None
        if not any(measured.records for measured in one.states.values()):
            absent[id] = one.reason or "no record has what it needs"
            continue
        values = [number(m.value, scale) if (m := one.states.get(state)) is not None else "" for state in states]
        rows.append([escape(id), *values, interval(last, scale), "" if last is None else f"{last.records:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, (heading, width) in enumerate(zip(rows[0], widths, strict=True)):
        table.add_column(heading, justify="right" if place else "left", width=width)
    for row in rows[1:]:
        table.add_row(*row)
    # On a narrow terminal lines go on in the next one: a number that is cut off would be another one.
    Console(highlight=False, width=max(output.width, sum(widths) + 3 * len(widths))).print(table)
    for reason in dict.fromkeys(absent.values()):
        ids = ", ".join(id for id, why in absent.items() if why == reason)
        output.print(f"Not measured, {reason}: {ids}", markup=False)
