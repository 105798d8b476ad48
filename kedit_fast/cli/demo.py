"""`kedit-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast import demo as bundled
from kedit_fast.cli.console import command, interactive, output, print_json
from kedit_fast.cli.options import JsonOption, MethodOption, OverwriteOption, SeedOption
from kedit_fast.cli.report import print_report, require_change
from kedit_fast.cli.trials import chosen_by_trials
from kedit_fast.errors import KeditError, MethodError
from kedit_fast.methods.presets import is_guess, make_hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.methods.windows import statistics_layers
from kedit_fast.reports.trials import in_memory
from kedit_fast.statistics.collect import collect_statistics
from kedit_fast.support.files import check_new
from kedit_fast.support.timing import timed
from kedit_fast.workflow import complete, run_edits, save_edited


@command
def demo(
    method: MethodOption = "memit",
    edits: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="requests to write, of 600; default 100; 5 for rome and r-rome, 20 where each is tuned by itself",
        ),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="save the edited model here")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Change facts inside the bundled demo model and show what changed. Saves nothing without --out."""
    recipe = find_recipe(method)
    edits = edits or _usual_edits(recipe)
    if out is not None:
        check_new(out, overwrite, KeditError)
    requests = bundled.requests()
    if edits > len(requests):
        raise MethodError(f"--edits {edits}: the demo has {len(requests)} requests")
    requests = requests[:edits]
    model, tokenizer = bundled.load()
    hparams, origin = make_hparams(method, model.config)
    tries = is_guess(origin)
    seconds = {"statistics": 0.0}
    statistics, sources, overrides = None, None, None
    if hparams.uses_statistics:
        layers = statistics_layers(model.config) if tries else hparams.layers
        with timed(seconds, "statistics"):
            statistics = collect_statistics(
                model, tokenizer, bundled.corpus(), layers, output_metric=True, progress=interactive()
            )
        sources = in_memory(statistics)
    if tries:
        tried = chosen_by_trials(model, tokenizer, requests, recipe.name, {}, sources, None, seed=seed)
        overrides = tried.choice.hparams
    samples = requests[:3]
    before = [complete(model, tokenizer, request.text) for request in samples]
    report = run_edits(
        model,
        tokenizer,
        requests,
        recipe.name,
        statistics=statistics,
        statistics_seconds=seconds["statistics"],
        hparams=overrides,
        seed=seed,
        progress=interactive(),
    )
    require_change(report)
    after = [complete(model, tokenizer, request.text) for request in samples]
    if out is not None:
        save_edited(model, tokenizer, out, overwrite, report.editor if recipe.makes_memory else None)
    if as_json:
        print_json(report.as_dict())
        return
    print_report(report, f"{recipe.name.upper()}: {report.edits} edits of the demo model")
    table = Table(title="Completions", title_justify="left")
    for column in ("prompt", "before", "after", "asked for"):
        table.add_column(column)
    for request, old, new in zip(samples, before, after, strict=True):
        table.add_row(*map(escape, (request.text, old, new, request.target_new)))
    output.print(table)
    if out is not None:
        output.print(f"Saved to {out}", markup=False)


def _usual_edits(recipe: Recipe) -> int:
    """How many requests a demonstration writes in about a quarter of a minute."""
    if recipe.tuning is not None and recipe.tuning.order == "depth":
        return 20
    return 100 if recipe.is_batched else 5
