"""`kedit-fast requests paraphrase`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kedit_fast.cli.checks import check_file
from kedit_fast.cli.console import command, notices, output, print_json, say_skipped
from kedit_fast.cli.options import REQUESTS_HELP, FormOption, JsonOption, OnErrorOption, OverwriteOption, ReadingOption
from kedit_fast.requests.paraphrase import add_paraphrases
from kedit_fast.requests.problems import first_problems, skipped_records
from kedit_fast.requests.reading import load_requests
from kedit_fast.requests.relations import load_templates
from kedit_fast.requests.writing import check_suffix, save_requests


@command
def paraphrase(
    file: Annotated[Path, typer.Argument(help=REQUESTS_HELP)],
    relations: Annotated[
        list[Path],
        typer.Option(help="JSON of templates by relation, as of LRE's or Pitfalls' files; repeatable"),
    ],
    out: Annotated[Path, typer.Option(help="new file, .json or .jsonl")],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="phrasings for each request")] = 2,
    seed: Annotated[int, typer.Option(help="of the draw, and of new answers of forms that come without")] = 0,
    form: FormOption = None,
    reading: ReadingOption = None,
    on_error: OnErrorOption = "raise",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add other phrasings to requests, from templates of the same relation; needs no model."""
    check_suffix(out)
    check_file(out, overwrite=overwrite)
    templates = load_templates(relations)
    requests = load_requests(file, on_error, form=form, reading=reading, seed=seed)
    result = add_paraphrases(requests, templates, number, seed)
    save_requests(result.requests, out)
    lacking = {index: f"record {requests.records[index] + 1}: {why}" for index, why in result.lacking.items()}
    if as_json:
        print_json(
            {
                "file": str(file),
                "form": requests.form,
                "seed": seed,
                "requests": len(requests),
                "added": result.added,
                "lacking": [
                    {"record": requests.records[index] + 1, "reason": why} for index, why in result.lacking.items()
                ],
                "skipped": skipped_records(requests.skipped),
                "out": str(out),
            }
        )
        return
    say_skipped(requests.skipped, requests.total)
    for line in first_problems(lacking):
        notices.print(f"kedit-fast: fewer than {number} phrasings: {line}", markup=False)
    output.print(f"{result.added} phrasings for {len(requests)} requests: {out}", markup=False, soft_wrap=True)
