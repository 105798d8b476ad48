"""What an edit does to the circuit of the edited facts: MEMIT, AlphaEdit and LocFT-BF on the demo model.

    python -m benchmarks.circuits_after_edits [--methods NAMES] [--edits N] [--control N] [--json FILE]
    python -m benchmarks.circuits_after_edits plot FILE FOLDER

Each method writes the same requests in one batch into a copy of the model. Then the circuits of the edited facts, and
of as many facts that were not edited, are compared by `kedit_fast.reports.circuit_comparison`: edge scores by EAP-IG in
both models, with the sign of each side (before: old - new target; after: new - old target). Corrupted prompts have
subjects that no request names. A request counts where the unedited model says the old target and the edited one the
new one. FILE has the comparison of each method, with its floors, control and claims.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, provenance, read, require_clean, save
from benchmarks.plots import circuit_bars
from kedit_fast import Editor, EditRequest, collect_statistics, demo
from kedit_fast.demo import world
from kedit_fast.methods.hparams import reads
from kedit_fast.methods.registry import find_recipe
from kedit_fast.reports.circuit_comparison import CircuitComparison, compare_circuits, pairs_to_compare
from kedit_fast.statistics.collect import Statistics

METHODS = ("memit", "alphaedit", "locft-bf")
VALIDATION = 100  # the first requests: presets were chosen on them
console = Console(width=160, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def unedited_subjects() -> dict[str, list[str]]:
    """Relation -> subjects that no request of the demo names."""
    named = {request.subject for request in demo.requests()}
    subjects: dict[str, list[str]] = {}
    for fact in world.world().facts:
        if fact.subject not in named:
            subjects.setdefault(fact.relation.name, []).append(fact.subject)
    return subjects


def compare(
    method: str,
    requests: list[EditRequest],
    control: list[EditRequest],
    statistics: Statistics | None = None,
    **options: Any,
) -> tuple[Row, CircuitComparison]:
    """Edit a copy of the demo model and compare circuits; `options` are those of `compare_circuits`."""
    base, tokenizer = demo.load()
    model, _ = demo.load()
    recipe = find_recipe(method)
    editor = Editor(
        model, tokenizer, method, statistics=statistics if recipe.uses_statistics else None,
        hparams={"on_predicted": "allow"} if reads(recipe, "on_predicted") else {},
    )  # fmt: skip
    result = editor.edit(requests, "skip")
    editor.finish()
    pairs = pairs_to_compare(base, model, tokenizer, requests, control=control, others=unedited_subjects())
    comparison = compare_circuits(base, model, pairs.before, pairs.after, pairs.control, **options)
    row = {
        "method": method, "requests": len(requests), "not_written": len(result.skipped),
        "skipped": dict(pairs.skipped), **comparison.as_record(),
    }  # fmt: skip
    return row, comparison


def show(method: str, comparison: CircuitComparison) -> None:
    """Print the tables of one comparison."""
    table = Table("of |score|", "edited", "halves, before", "halves, after", "unedited", "chance", title=method)
    for overlap in comparison.overlaps:
        control = "" if overlap.control is None else f"{overlap.control.value:.2f}"
        values = (overlap.edited.value, overlap.floor_before.value, overlap.floor_after.value)
        table.add_row(overlap.name, *(f"{value:.2f}" for value in values), control, f"{overlap.chance:.2f}")
    console.print(table)
    table = Table("circuit", "in the model", "edges", "does", "95 %")
    for run in comparison.runs:
        does = run.reason if run.value is None else f"{run.value:.2f}"
        table.add_row(run.circuit, run.model, str(run.edges), does, f"{run.low or 0:.2f} to {run.high or 0:.2f}")
    console.print(table)
    for claim in comparison.claims:
        console.print(f"- {claim}")


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    methods: Annotated[str, typer.Option(help="names, comma-separated")] = ",".join(METHODS),
    edits: Annotated[int, typer.Option(help="requests")] = 40,
    control: Annotated[int, typer.Option(help="requests that are not edited")] = 40,
    steps: Annotated[int, typer.Option(help="of EAP-IG")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the comparisons here, adding to what is there")
    ] = None,
) -> None:
    """Edit, compare, print, and write the comparisons to a file when asked."""
    if context.invoked_subcommand is not None:
        return
    origin = provenance("cpu")
    require_clean(json_file, origin)
    names = methods.split(",")
    every = demo.requests()[VALIDATION:]
    if edits + control > len(every):
        raise typer.BadParameter(f"the demo has {len(every)} requests for --edits and --control together")
    statistics = None
    if any(find_recipe(name).uses_statistics for name in names):
        model, tokenizer = demo.load()
        layers = range(model.config.num_hidden_layers)
        statistics = collect_statistics(model, tokenizer, demo.corpus(), layers, progress=False)
    for name in names:
        row, comparison = compare(name, every[:edits], every[edits : edits + control], statistics, steps=steps)
        show(name, comparison)
        if json_file is not None:
            older = read(json_file)["rows"] if json_file.exists() else []
            others = [one for one in older if one["method"] != name]
            save(json_file, {"peaks": {}, "rows": [*others, {**row, **origin}], "about": origin})


@app.command()
def plot(file: Path, folder: Path) -> None:
    """Draw how the shares of scores by node changed, as PNG and SVG named as the file."""
    for path in circuit_bars(read(file), folder / file.stem):
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    app()
