"""The tables of `kedit-fast locate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.console import notices, output
from kedit_fast.locating.linear_probes import LinearProbes
from kedit_fast.locating.logit_lens import LogitLens
from kedit_fast.locating.tracing import AverageEffects, LikelyLayers
from kedit_fast.reports.circuit_comparison import CircuitComparison
from kedit_fast.reports.circuit_statistics import Estimate
from kedit_fast.reports.locating import CircuitReport, Located
from kedit_fast.reports.locating_pictures import LAST, LAST_SUBJECT, place_of, title_of
from kedit_fast.reports.search import named_layers

MOST_SHOWN = 12
"""Edges of a circuit that are listed."""


def print_located(located: Located) -> None:
    """What a user wants first: the layers, how sure they are, the effects; then a table of each part."""
    if located.averages:
        print_trace(located)
    for lens in located.lenses:
        print_lens(lens)
    if located.circuit is not None:
        print_circuit(located.circuit)
    if located.probes is not None:
        print_probes(located.probes)


def print_trace(located: Located) -> None:
    """Which layers a trace speaks for, the effects, and tables by groups of tokens and by layer."""
    first = located.averages[0]
    assert located.likely is not None
    likely = located.likely.layers
    output.print(headline(located.likely, located.window), markup=False)
    output.print(
        f"Total effect {_with_interval(first.total[0], first.total[1:])}: what noise at the subject takes of the "
        f"answer's probability. Means over {first.count} prompts, 95 % intervals.",
        markup=False,
    )
    table = _table("Mean indirect effect, what restoring a state brings back: where it is largest", "tokens")
    for heading in ("restored", "layer", "effect"):
        table.add_column(heading, justify="left" if heading == "restored" else "right", no_wrap=True)
    for one in located.averages:
        for row, group in enumerate(one.groups):
            layer = best_layer(one, row)
            if layer is not None:
                table.add_row(group, title_of(one.kind, one.window), str(layer), _cell(one, row, layer))
        table.add_section()
    output.print(table)
    for place in (LAST_SUBJECT, LAST):
        row = first.groups.index(place)
        if not first.counts[row]:
            continue
        note = "; * layers that the trace speaks for" if place == located.likely.group else ""
        table = _table(f"Mean indirect effect by layer at the {place}{note}", "layer")
        for one in located.averages:
            table.add_column(escape(title_of(one.kind, one.window)), justify="right", no_wrap=True)
        for layer in range(first.mean.shape[1]):
            mark = "*" if note and layer in likely else " "
            table.add_row(f"{layer}{mark}", *(_cell(one, row, layer) for one in located.averages))
        output.print(table)


def headline(likely: LikelyLayers, window: int) -> str:
    """The layers that a trace speaks for, and how sure that is, as a sentence."""
    low, high = likely.interval
    effect = f"{likely.effect:.2f} [{low:.2f}, {high:.2f}]"
    restored = {"mlp": "the MLP", "attention": "the attention", "block": "the block's output"}[likely.kind]
    if likely.kind != "block" and window > 1:
        restored += f" of {window} layers around it"
    place = f"restoring {restored} at the {likely.group} brings back"
    if not likely.layers:
        return (
            f"The trace speaks for no layer: at best, in layer {likely.peak}, {place} {effect}, which may be nothing."
        )
    others = ", and its neighbors there cannot be told from it" if len(likely.layers) > 1 else ""
    return (
        f"The trace speaks for {named_layers(likely.layers)}: {place} most, {effect}, in layer {likely.peak}{others}."
    )


def best_layer(effects: AverageEffects, row: int) -> int | None:
    """The layer of the largest mean effect of a group of tokens; None for a group that no prompt has."""
    values = effects.mean[row].double().tolist()
    known = [layer for layer, value in enumerate(values) if math.isfinite(value)]
    return max(known, key=values.__getitem__) if known else None


def print_lens(lens: LogitLens) -> None:
    """Median rank and mean probability of the answer after each layer, at one position."""
    ranks, probabilities = lens.rank.double(), lens.probability.double()
    first = (ranks == 1).double().mean(0).tolist()
    table = _table(f"Logit lens at {place_of(lens)}, {ranks.shape[0]} prompts", "after layer")
    for heading in ("mean probability", "median rank", "share of rank 1"):
        table.add_column(heading, justify="right")
    rows = zip(probabilities.mean(0).tolist(), ranks.median(0).values.tolist(), first, strict=True)
    for stage, (probability, rank, share) in enumerate(rows):
        table.add_row(
            "embedding" if stage == 0 else str(stage - 1), f"{probability:.3f}", f"{rank:,.0f}", f"{share:.2f}"
        )
    output.print(table)


def print_circuit(report: CircuitReport) -> None:
    """How faithful a circuit is, and its largest edges."""
    result, scores = report.faithfulness, report.scores
    value = "not defined: " + result.reason if result.value is None else f"{result.value:.2f}"
    output.print(
        f"Circuit of {report.circuit.edge_count:,} of {scores.graph.edge_count:,} edges ({report.asked:,} before "
        f"pruning), {len(report.pairs)} pairs of prompts: faithfulness {value}",
        markup=False,
    )
    output.print(
        f"{scores.metric}: clean {result.clean:.3f}, corrupted {result.corrupted:.3f}, the circuit alone "
        f"{result.circuit:.3f}",
        markup=False,
    )
    table = _table(f"Largest edges, {scores.scoring}", "from")
    table.add_column("to")
    table.add_column("score", justify="right")
    for source, target, score in report.circuit.listed()[:MOST_SHOWN]:
        table.add_row(source, escape(target), f"{score:+.4f}")
    output.print(table)


def print_comparison(comparison: CircuitComparison, left_out: Mapping[str, str]) -> None:
    """What can be claimed of an edit's effect on circuits first; then the numbers with their floors and controls."""
    for name, reason in list(left_out.items())[:MOST_SHOWN]:
        notices.print(f"kedit-fast: left out {name}: {reason}", markup=False)
    if len(left_out) > MOST_SHOWN:
        notices.print(f"kedit-fast: {len(left_out)} requests left out", markup=False)
    for claim in comparison.claims:
        output.print(f"- {claim}", markup=False)
    output.print(
        f"{comparison.pairs} edited prompts, {comparison.control_pairs} unedited ones; {comparison.scoring}, "
        f"{comparison.steps} steps; {comparison.splits} halvings; edited: {', '.join(comparison.edited) or 'nothing'}",
        markup=False,
    )
    for side in (comparison.before, comparison.after):
        output.print(
            f"{side.model}: {comparison.metric} of {side.sign}: clean {side.clean:.3f}, "
            f"corrupted {side.corrupted:.3f}; "
            f"{side.right} of {side.pairs} answers are the model's",
            markup=False,
        )
    table = _table("How alike scores are before and after, and in halves of the prompts", "edges by |score|")
    for heading in ("edited", "halves, before", "halves, after", "unedited", "chance", "beyond"):
        table.add_column(heading, justify="right")
    for one in comparison.overlaps:
        cells = [_value(part) for part in (one.edited, one.floor_before, one.floor_after, one.control)]
        table.add_row(one.name, *cells, f"{one.chance:.2f}", "yes" if one.is_beyond else "no")
    output.print(table)
    table = _table("What circuits do of what the model does", "circuit")
    for heading in ("in the model", "edges", "faithfulness"):
        table.add_column(heading, justify="right")
    for run in comparison.runs:
        limits = None if run.low is None or run.high is None else (run.low, run.high)
        does = run.reason if run.value is None else _with_interval(run.value, limits)
        table.add_row(run.circuit, run.model, f"{run.edges:,}", escape(does))
    output.print(table)
    table = _table("Share of all |score| that leaves a part; * edited", "part")
    for heading in ("before", "after", "halves differ by", "unedited changed by", "beyond"):
        table.add_column(heading, justify="right")
    for share in comparison.shares:
        control = "" if share.control is None else f"{share.control:+.3f}"
        cells = (f"{share.before:.3f}", f"{share.after:.3f}", f"{share.floor:.3f}", control)
        table.add_row(f"{share.name}{'*' if share.is_edited else ' '}", *cells, "yes" if share.is_beyond else "no")
    output.print(table)
    if comparison.no_edges:
        output.print(f"No table of edges: {comparison.no_edges}", markup=False)
        return
    table = _table("Edges that changed most, scores as parts of m(clean) - m(corrupted)", "from")
    table.add_column("to")
    for heading in ("before", "after", "any edge of halves", "unedited changed by", "beyond"):
        table.add_column(heading, justify="right")
    for edge in comparison.edges[:MOST_SHOWN]:
        control = "" if edge.control is None else f"{edge.control:+.3f}"
        cells = (f"{edge.before:+.3f}", f"{edge.after:+.3f}", f"{edge.floor_of_all:.3f}", control)
        table.add_row(edge.source, escape(edge.target), *cells, "yes" if edge.is_beyond else "no")
    output.print(table)


def _value(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.2f}"


def _table(title: str, heading: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(heading)
    return table


def _cell(one: AverageEffects, row: int, layer: int) -> str:
    mean, low, high = (float(tensor[row][layer]) for tensor in (one.mean, one.low, one.high))
    return "" if not math.isfinite(mean) else _with_interval(mean, (low, high), sign=True)


def _with_interval(mean: float, interval: Sequence[float] | None, sign: bool = False) -> str:
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    if interval is None or not all(map(math.isfinite, interval)):
        return text
    return f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]".replace("-0.00", "0.00")


def print_probes(probes: LinearProbes) -> None:
    """From which layer on objects can be read linearly, and accuracies by layer."""
    if probes.from_layer is None:
        headline = "Linear probes: in no layer is the object told from shuffled ones up to the last layer"
    else:
        headline = f"Linear probes: the object is told from shuffled ones from layer {probes.from_layer} on"
    output.print(
        f"{headline}; {probes.count:,} facts of {probes.subjects:,} held-out subjects, "
        f"{len(probes.relations)} relations, a constant answer gives {probes.majority:.2f}",
        markup=False,
    )
    table = _table("Accuracy of linear probes", "layer")
    table.add_column("held-out subjects", justify="right")
    table.add_column("shuffled objects", justify="right")
    for place, layer in enumerate(probes.layers):
        accuracy, low, high = probes.accuracy[place], probes.low[place], probes.high[place]
        control, control_low, control_high = (
            values[place] for values in (probes.control, probes.control_low, probes.control_high)
        )
        table.add_row(
            str(layer), _with_interval(accuracy, (low, high)), _with_interval(control, (control_low, control_high))
        )
    output.print(table)
