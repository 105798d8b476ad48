"""What each method does to the demo model: how well edits take, spread, leave the rest alone, and last.

    python -m benchmarks.quality [--methods memit,alphaedit] [--scenarios 1,100,500,sequence,singly] [--json FILE]
    python -m benchmarks.quality --variants [--methods NAMES] [--json FILE]   what VARIANTS switch on, in two sequences
    python -m benchmarks.quality --tuning ...                      see benchmarks/quality_tuning.py
    python -m benchmarks.quality --frontier [--json FILE]          see benchmarks/frontier.py
    python -m benchmarks.quality markdown FILE

Presets were chosen on the demo's first 100 requests; this measures on the other 500. Scenarios: `1`, twenty single
edits, each of the unedited model; `100` and `500` in one batch; `sequence`, 500 in batches of 50; `singly`, 200 one at
a time; `subjects`, 100 requests of which five share each subject. Methods without a batch form have no batches.

Columns: efficacy, paraphrase, neighborhood (METRICS, over all prompts alike) of all requests on the final model;
drift, what a token of held-out text that names no edited subject costs more than before, in nats; seconds of editing
without evaluation (methods with the same values of one batch optimize them once, and all count that time); retention,
efficacy of all requests on the final model over that of each right after its batch. Of VARIANTS the neighborhood is
measured on the prompts after the first `NEIGHBORS` of each request, which some of them use for editing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, provenance, read, require_clean, save
from kedit_fast import Editor, EditRequest, collect_statistics, demo, evaluate
from kedit_fast.demo import world
from kedit_fast.editing.batch_run import ANCHOR_REQUESTS
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.evaluation.metrics import mean_nll
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.registry import RECIPES, find_recipe
from kedit_fast.statistics.collect import Statistics
from kedit_fast.statistics.labels import OutputGradients

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=160, highlight=False)
VALIDATION = 100  # the first requests: presets were chosen on them
SINGLE_EDITS = 20
# name -> (requests, a batch); None for a batch is all at once
SCENARIOS: dict[str, tuple[int, int | None]] = {
    "1": (SINGLE_EDITS, 1), "100": (100, None), "500": (500, None), "sequence": (500, 50), "singly": (200, 1),
    "subjects": (100, None),
}  # fmt: skip
TITLES = {
    "1": "1",
    "100": "100",
    "500": "500",
    "sequence": "500 by 50",
    "singly": "200 by 1",
    "subjects": "5 a subject",
}
VALUES_DEPEND_ON = ("v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "v_stop_loss",
                    "most_probable_steps")  # fmt: skip
METRICS = {
    "efficacy": "cf.accuracy/rewrite",
    "paraphrase": "cf.accuracy/paraphrase",
    "neighborhood": "cf.accuracy/neighborhood",
}
FLOOR = 0.9  # of retention, for methods made for sequences
NEIGHBORS = 2
"""Neighborhood prompts of each request that neighbor columns are made of."""
CLOSED_FORMS = tuple(name for name, recipe in RECIPES.items() if recipe.tuning is None)
"""The methods of this table; of the others see `quality_tuning.py`."""
SEQUENCES = ("sequence", "singly")
"""The scenarios of VARIANTS."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "memit": ("memit", {}),
    "memit, 3 rounds": ("memit", {"rounds": 3}),
    "memit, neighbor columns": ("memit", {"neighbor_columns": NEIGHBORS}),
    "memit, norm anchor": ("memit", {"norm_anchor": "auto"}),
    "memit, attenuation": ("memit", {"sphere_strength": 0.5}),
    "memit, output metric": ("memit", {"output_metric": True}),
    "memit, KL of the original at temperature 2": ("memit", {"kl_direction": "original", "kl_temperature": 2.0}),
    "memit-sequential": ("memit-sequential", {}),
    "memit-sequential, 3 rounds": ("memit-sequential", {"rounds": 3}),
    "memit-sequential, neighbor columns": ("memit-sequential", {"neighbor_columns": NEIGHBORS}),
    "memit-sequential, norm anchor": ("memit-sequential", {"norm_anchor": "auto"}),
    "memit-sequential, output metric": ("memit-sequential", {"output_metric": True}),
    "rlsedit, lambda^2 = 10": ("rlsedit", {"update_norm_lambda": 10.0}),
    "anyedit": ("anyedit", {}),
    "alphaedit": ("alphaedit", {}),
    "nas": ("nas", {}),
    "sphere": ("sphere", {}),
    "anyedit-alphaedit": ("anyedit-alphaedit", {}),
    "ultraedit": ("ultraedit", {}),
    "stableedit": ("stableedit", {}),
}
"""Name -> (method, hyper-parameters): what beside the methods can be switched on, and the methods it is compared with.
`rlsedit` with its published lambda of 0 is `memit-sequential`."""


@dataclass
class Subject:
    """The demo model, its statistics, and the requests."""

    model: Any
    tokenizer: Any
    moments: Statistics
    requests: list[EditRequest]
    text: list[str]
    before: float
    """Mean negative log likelihood of the text in the unedited model, nats a token."""
    store: ValueFile
    """Values of the unedited model."""
    value_seconds: dict[tuple, float]
    """Seconds of optimizing the values, by what they depend on."""
    prefixes: dict[tuple, tuple[str, ...]]


def subject(validation: bool = False, loaded: tuple[Any, Any] | None = None) -> Subject:
    """Everything that the methods share; with `validation` the requests presets were chosen on.

    `loaded` is another model of the demo's world in place of the demo model, with its tokenizer.
    """
    model, tokenizer = loaded or demo.load()
    every = demo.requests()
    requests = every[:VALIDATION] if validation else every[VALIDATION:]
    text = demo.held_out([request.subject for request in [*requests, *shared_subjects(100)]])
    moments = collect_statistics(model, tokenizer, demo.corpus(), range(model.config.num_hidden_layers), progress=False)
    before = mean_nll(model, tokenizer, text)
    return Subject(model, tokenizer, moments, requests, text, before, ValueFile(None), {}, {})


def shared_subjects(count: int) -> list[EditRequest]:
    """Requests on five relations of each of some people, none of whom another request names."""
    here = world.world()
    named = {request.subject for request in demo.requests()}
    groups = here.by_object()
    facts = [fact for fact in here.facts if fact.relation.kind == "person" and fact.subject not in named]
    people = list(dict.fromkeys(fact.subject for fact in facts))[: count // 5]
    requests = []
    for person in people:
        for fact in (fact for fact in facts if fact.subject == person):
            objects = fact.relation.objects
            new = objects[(objects.index(fact.object) + 7) % len(objects)]
            others = [f for f in groups[fact.relation.name, fact.object] if f.subject not in people][:5]
            prompt = fact.relation.phrasings[0]
            near = tuple(prompt.format(other.subject) for other in others)
            requests.append(
                EditRequest(prompt, person, new, fact.object, (), near, id=f"{person} {fact.relation.name}")
            )
    return requests[:count]


def measure_variant(on: Subject, name: str, scenario: str) -> Row:
    """One row of VARIANTS."""
    method, overrides = VARIANTS[name]
    if overrides.get("output_metric") and not on.moments.outputs:
        layers = sorted(on.moments.layers)
        gradients = OutputGradients(tokens=on.moments.layers[layers[0]].count)  # as many as the second moments are of
        on.moments = collect_statistics(
            on.model, on.tokenizer, demo.corpus(), layers, output_metric=gradients, progress=False
        )
    return {"variant": name, **measure(on, method, scenario, NEIGHBORS, **overrides)}


def measure(on: Subject, method: str, scenario: str, withheld: int = 0, **overrides: Any) -> Row:
    """One row of the table; the first `withheld` neighborhood prompts of each request are not measured."""
    recipe = find_recipe(method)
    count, size = SCENARIOS[scenario]
    row: Row = {"method": method, "scenario": scenario}
    if not recipe.is_batched and size != 1:
        return {**row, "n/a": "one request at a time"}
    if not recipe.optimizes_values and (scenario == "subjects" or size == 1):
        return {**row, "n/a": "no keys of subjects" if size is None else "its normalizer needs more than one token"}
    requests = shared_subjects(count) if scenario == "subjects" else on.requests[:count]
    editor = Editor(
        on.model, on.tokenizer, method, statistics=on.moments, hparams={"on_predicted": "allow", **overrides},
        prefixes=on.prefixes.get(recipe.contexts), values=on.store if size is None else None,
    )  # fmt: skip
    on.prefixes[recipe.contexts] = editor.prefixes
    try:
        if scenario == "1":
            return {**row, **singles(on, editor, requests)}
        return {**row, **together(on, editor, requests, size or count, withheld)}
    finally:
        editor.restore()


def singles(on: Subject, editor: Editor, requests: Sequence[EditRequest]) -> Row:
    """Every request alone on the unedited model: means over them."""
    measured: list[dict[str, Any]] = []
    drifts, seconds, skipped = [], [], 0
    for request in requests:
        spent, result = timed_edit(editor, [request])
        if not result.batch:  # for example a bad pivot
            skipped += 1
            continue
        seconds.append(spent)
        measured.append(shares(on, [request]))
        drifts.append(mean_nll(on.model, on.tokenizer, on.text) - on.before)
        editor.restore()
    means = {name: statistics.mean(metrics[name] for metrics in measured) for name in METRICS}
    return {**means, "drift": statistics.mean(drifts), "seconds": sum(seconds), "retention": None, "skipped": skipped}


def together(on: Subject, editor: Editor, requests: Sequence[EditRequest], size: int, withheld: int = 0) -> Row:
    """Requests in batches, measured at the end."""
    efficacies, seconds, skipped, norm = [], 0.0, 0, 0.0
    if editor.recipe.optimizes_values and editor.hparams.norm_anchor == AUTO and size < ANCHOR_REQUESTS:
        begin = time.perf_counter()
        editor.measure_norm_anchor(on.requests[:ANCHOR_REQUESTS], "skip")
        seconds = time.perf_counter() - begin
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    for batch in batches:
        spent, result = timed_edit(editor, batch)
        if editor.values is not None and editor.recipe.optimizes_values:
            loop = [getattr(editor.hparams, name) for name in VALUES_DEPEND_ON]
            shared = editor.recipe.merge and len({r.subject for r in requests}) < len(requests)
            key = (editor.value_sites, editor.hparams.layers[-1], len(requests), requests[0].subject, shared, *loop)
            values_seconds = on.value_seconds.setdefault(key, result.seconds["values"])
            spent += max(0.0, values_seconds - result.seconds["values"])
        seconds += spent
        skipped += len(result.skipped)
        norm = max([norm, *result.relative_norms.values()])
        if len(batches) > 1:
            efficacies.append(shares(on, batch)["efficacy"])
    begin = time.perf_counter()
    editor.finish()
    seconds += time.perf_counter() - begin
    metrics = shares(on, [replace(one, neighborhood_prompts=one.neighborhood_prompts[withheld:]) for one in requests])
    retention = metrics["efficacy"] / max(statistics.mean(efficacies), 1e-9) if efficacies else None
    return {
        **metrics,
        "drift": mean_nll(on.model, on.tokenizer, on.text) - on.before, "seconds": seconds, "retention": retention,
        "skipped": skipped, "own_efficacy": statistics.mean(efficacies) if efficacies else None, "norm": norm,
        "state_bytes": editor.solver_state.nbytes,
    }  # fmt: skip


def shares(on: Subject, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """METRICS of the model as it is, as shares of all prompts alike."""
    measured = evaluate(on.model, on.tokenizer, requests, METRICS.values(), average="prompt")
    values = {name: measured.value(id) for name, id in METRICS.items()}
    return {name: None if value is None else value / 100 for name, value in values.items()}


def timed_edit(editor: Editor, requests: Sequence[EditRequest]):
    begin = time.perf_counter()
    result = editor.edit(requests, "skip")
    return time.perf_counter() - begin, result


def markdown_table(rows: Sequence[Row]) -> str:
    """A row a method, a column a scenario."""
    scenarios = [name for name in TITLES if any(row["scenario"] == name for row in rows)]
    lines = ["| method | " + " | ".join(TITLES[name] for name in scenarios) + " |", "|---" * (len(scenarios) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        by_scenario = {row["scenario"]: row for row in rows if row["method"] == method}
        lines.append(f"| `{method}` | " + " | ".join(cell(by_scenario.get(name)) for name in scenarios) + " |")
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    """Efficacy, paraphrase, neighborhood; drift; seconds; retention where there is one."""
    if row is None:
        return ""
    if "n/a" in row:
        return "n/a"
    parts = " / ".join(short(row[name]) for name in METRICS)
    retention = "" if row["retention"] is None else f"; kept {short(row['retention'])}"
    return f"{parts}; {row['drift']:+.3f}; {row['seconds']:.0f} s{retention}"


def short(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}".removeprefix("0")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def name_of(row: Row) -> str:
    """The variant of a row, or its method."""
    return row.get("variant", row["method"])


def show_rows(rows: Sequence[Row]) -> None:
    table = Table("method", "edits", "efficacy", "paraphrase", "neighborhood", "drift", "seconds", "retention", "norm")
    for row in rows:
        if "n/a" in row:
            table.add_row(name_of(row), TITLES[row["scenario"]], "n/a", "", "", "", "", "", "")
            continue
        cells = [number(row[name]) for name in ("efficacy", "paraphrase", "neighborhood", "drift")]
        cells += [f"{row['seconds']:.1f}", number(row["retention"]), number(row.get("norm"))]
        table.add_row(name_of(row), TITLES[row["scenario"]], *cells)
    console.print(table)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    methods: Annotated[str, typer.Option(help="names, comma-separated; with --variants separated by ;")] = "",
    scenarios: Annotated[str, typer.Option(help="names, comma-separated")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the rows here, adding to what is there")
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="measure on the requests presets were chosen on")
    ] = False,
    variants: Annotated[bool, typer.Option("--variants", help="instead: VARIANTS, in the scenarios SEQUENCES")] = False,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="instead: MEMIT with and without the output metric along lambda")
    ] = False,
    values: Annotated[Path | None, typer.Option(help="with --frontier: where optimized values are stored")] = None,
    tuning: Annotated[
        bool, typer.Option("--tuning", help="instead: the rows of quality_tuning.py; names separated by ;")
    ] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="with --tuning and --json: leave out rows that the file has")
    ] = False,
) -> None:
    """Measure, print a table, and write the rows to a file when asked."""
    if context.invoked_subcommand is not None:
        return
    if frontier:
        from benchmarks.frontier import run as run_frontier

        run_frontier(json_file, values)
        return
    if tuning:
        from benchmarks import quality_tuning as rows_of_tuning

        known, usual = tuple(rows_of_tuning.ROWS), rows_of_tuning.TUNING_SCENARIOS
    else:
        known, usual = (tuple(VARIANTS), SEQUENCES) if variants else (CLOSED_FORMS, tuple(SCENARIOS))
    names = methods.split(";" if variants or tuning else ",") if methods else list(known)
    chosen = [(scenario, name) for scenario in (scenarios.split(",") if scenarios else usual) for name in names]
    for scenario, name in chosen:
        if name not in known:
            raise typer.BadParameter(f"unknown name {name!r}: choose from {'; '.join(known)}")
        if scenario not in SCENARIOS:
            raise typer.BadParameter(f"unknown scenario {scenario!r}: choose from {', '.join(SCENARIOS)}")
    if tuning:
        rows_of_tuning.run(chosen, json_file, missing, validation)
        return
    origin = provenance("cpu")
    require_clean(json_file, origin)
    on = subject(validation)
    rows: list[Row] = []
    for scenario, name in chosen:
        row = measure_variant(on, name, scenario) if variants else measure(on, name, scenario)
        rows.append({**row, "threads": torch.get_num_threads(), **origin})
        show_rows(rows[-1:])
        if json_file is not None:
            older = read(json_file)["rows"] if json_file.exists() else []
            others = [row for row in older if (name_of(row), row["scenario"]) != (name, scenario)]
            save(json_file, {"peaks": {}, "rows": [*others, rows[-1]], "about": origin})
    show_rows(rows)
    sequential = [m for m, recipe in RECIPES.items() if recipe.memory]
    low = [row for row in rows if name_of(row) in sequential and (row.get("retention") or 1) < FLOOR]
    for row in low:
        console.print(f"{name_of(row)}, {TITLES[row['scenario']]}: retention {row['retention']:.2f} is below {FLOOR}")
    if low:
        raise typer.Exit(1)


@app.command()
def markdown(file: Path) -> None:
    """One table of every metric, compact; the page has one metric a table."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    order = {name: i for i, name in enumerate(RECIPES)}
    print(markdown_table(sorted(rows, key=lambda row: order[row["method"]])))


if __name__ == "__main__":
    app()
