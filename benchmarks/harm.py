"""Predicted against measured KL divergence of edits of the demo model.

    python -m benchmarks.harm [--methods memit,emmet] [--edits 1,10,30,100] [--json FILE]

Each group of requests is written into the unedited model at once, measured, and undone. `predicted_kl` is that of
`kedit_fast.workflow.predicted_harm`, from the factors alone; `measured_kl` is the metric loc.kl/text, the mean over all
positions of KL(unedited || edited) on held-out documents that name no edited subject. Both are nats a token. `ratio` is
measured over predicted; of several groups the median, with the lowest and the highest. At last the same is measured of
MEMIT's largest group with other lambdas, and of its update scaled down: the prediction is the term of second order.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, provenance, require_clean, save
from kedit_fast import Editor, EditRequest, collect_statistics, demo, evaluate
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.methods.registry import find_recipe
from kedit_fast.statistics.labels import OutputGradients
from kedit_fast.workflow import predicted_harm

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=160, highlight=False)
METHODS = ("memit", "emmet", "pmet", "alphaedit")
GROUPS = {1: 10, 10: 3, 30: 2, 100: 1}
"""Edits -> how many groups of so many requests are measured."""
VALIDATION = 100
"""The first requests: presets were chosen on them."""
TOKENS = 16_000
"""Of the output metric: more than the default, so that its own error does not count."""
SENTENCES, DOCUMENTS = 4, 400
"""Of the held-out text: documents of the form of those that the statistics are of."""
FACTOR = 4.0
"""Between predicted and measured: what is asked for. Not all groups of 10 and more edits are within it."""
LAMBDAS = (100.0, 316.0, 562.0, 750.0, 1000.0)
"""Of MEMIT's largest group; the preset has 100."""
SCALES = (0.1, 0.3, 0.6, 1.0)
"""Of the update whose parts are measured."""


class Demo:
    """The demo model, its statistics with output metrics, and held-out text."""

    def __init__(self, requests: Sequence[EditRequest], tokens: int = TOKENS):
        self.requests = requests
        self.model, self.tokenizer = demo.load()
        layers = range(self.model.config.num_hidden_layers)
        metric = OutputGradients(tokens=tokens)
        self.statistics = collect_statistics(
            self.model, self.tokenizer, demo.corpus(), layers, output_metric=metric, progress=False
        )
        sentences = demo.held_out([request.subject for request in requests], SENTENCES * DOCUMENTS)
        self.text = [" ".join(sentences[i : i + SENTENCES]) for i in range(0, len(sentences), SENTENCES)]
        self.store = ValueFile(None)
        self.prefixes: dict[tuple, tuple[str, ...]] = {}

    def measure(self, method: str, requests: Sequence[EditRequest], **hparams: float) -> Row | None:
        """Predicted and measured divergence, and norm, of some edits; None where every request is skipped."""
        contexts = find_recipe(method).contexts
        editor = Editor(
            self.model, self.tokenizer, method, statistics=self.statistics,
            hparams={"on_predicted": "allow", **hparams}, prefixes=self.prefixes.get(contexts), values=self.store,
        )  # fmt: skip
        self.prefixes[contexts] = editor.prefixes
        try:
            if not editor.edit(requests, "skip").batch:
                return None
            editor.finish()
            harm, patch = predicted_harm(editor, self.statistics), editor.patch()
        finally:
            editor.restore()
        after = evaluate(self.model, self.tokenizer, [], "loc.kl/text", texts=self.text, patches=[patch])
        measured = after.value("loc.kl/text")
        assert harm.predicted_kl is not None and measured is not None
        return {"predicted_kl": harm.predicted_kl, "measured_kl": measured, "norm": harm.norm}

    def row(self, method: str, edits: int) -> Row:
        """One row: medians over the groups, and the range of the ratio."""
        groups = [self.requests[i * edits : (i + 1) * edits] for i in range(GROUPS[edits])]
        results = [result for group in groups if (result := self.measure(method, group)) is not None]
        ratios = [result["measured_kl"] / result["predicted_kl"] for result in results]
        medians = {name: statistics.median(result[name] for result in results) for name in results[0]}
        return {
            "method": method, "edits": edits, "groups": len(results), **medians,
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        }  # fmt: skip


def regularized(on: Demo, method: str, edits: int) -> list[Row]:
    """A row for each of LAMBDAS: what the same edits are predicted to do, and do."""
    rows = []
    for weight in LAMBDAS:
        row = on.measure(method, on.requests[:edits], mom2_update_weight=weight)
        assert row is not None
        rows.append({"lambda": weight, **row, "ratio": row["measured_kl"] / row["predicted_kl"]})
    return rows


def scaled(on: Demo, method: str, edits: int) -> list[Row]:
    """A row for each of SCALES: what that part of an update is predicted to do, and does."""
    editor = Editor(
        on.model, on.tokenizer, method, statistics=on.statistics, hparams={"on_predicted": "allow"}, values=on.store
    )
    before = {name: weight.detach().clone() for name, weight in editor.modules.items()}
    editor.edit(on.requests[:edits], "skip")
    whole = predicted_harm(editor, on.statistics).predicted_kl
    change = {name: weight.detach() - before[name] for name, weight in editor.modules.items()}
    editor.restore()
    assert whole is not None
    evaluator, rows = Evaluator(on.model, on.tokenizer, [], ["loc.kl/text"], texts=on.text), []
    evaluator.measure("pre")
    for scale in SCALES:
        with torch.no_grad():
            for name, weight in editor.modules.items():
                weight.copy_(before[name] + scale * change[name])
        evaluator.measure("final")
        measured, predicted = evaluator.result().value("loc.kl/text"), scale**2 * whole
        assert measured is not None
        ratio = measured / predicted
        rows.append({"scale": scale, "predicted_kl": predicted, "measured_kl": measured, "ratio": ratio})
    with torch.no_grad():
        for name, weight in editor.modules.items():
            weight.copy_(before[name])
    return rows


def show(rows: Sequence[Row]) -> None:
    table = Table("method", "edits", "groups", "predicted", "measured", "ratio", "lowest", "highest", "norm")
    for row in rows:
        cells = (f"{row[name]:.3g}" for name in ("predicted_kl", "measured_kl", "ratio", "lowest", "highest", "norm"))
        table.add_row(row["method"], str(row["edits"]), str(row["groups"]), *cells)
    console.print(table)


@app.command()
def run(
    methods: Annotated[str, typer.Option(help="names, comma-separated")] = ",".join(METHODS),
    edits: Annotated[str, typer.Option(help="numbers of GROUPS, comma-separated")] = ",".join(map(str, GROUPS)),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the rows here, replacing what is there")
    ] = None,
) -> None:
    """Measure, print a table, and write the rows to a file when asked; exit 1 where one is further off than FACTOR."""
    names, counts = [find_recipe(name).name for name in methods.split(",")], [int(count) for count in edits.split(",")]
    if unknown := [count for count in counts if count not in GROUPS]:
        raise typer.BadParameter(f"--edits {unknown[0]}: choose from {', '.join(map(str, GROUPS))}")
    origin = provenance("cpu")
    require_clean(json_file, origin)
    subject = Demo(demo.requests()[VALIDATION:])
    rows: list[Row] = []
    for name in names:
        for count in counts:
            rows.append({**subject.row(name, count), "threads": torch.get_num_threads(), **origin})
            show(rows[-1:])
    show(rows)
    lambdas, parts = (measure(subject, METHODS[0], max(GROUPS)) for measure in (regularized, scaled))
    for row in lambdas:
        console.print(f"{max(GROUPS)} edits by {METHODS[0]}, lambda {row['lambda']:g}: {row['ratio']:.2f}")
    for row in parts:
        console.print(f"{row['scale']} of {max(GROUPS)} edits by {METHODS[0]}: {row['ratio']:.2f}")
    if json_file is not None:
        save(json_file, {"peaks": {}, "rows": rows, "lambdas": lambdas, "scales": parts, "about": origin})
    far = [row for row in rows if not 1 / FACTOR <= row["lowest"] <= row["highest"] <= FACTOR]
    for row in far:
        console.print(f"{row['method']}, {row['edits']} edits: further off than a factor of {FACTOR:g}")
    if far:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
