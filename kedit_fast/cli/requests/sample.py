"""`kedit-fast requests sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kedit_fast.cli.checks import check_file
from kedit_fast.cli.console import command, output, print_json, say_skipped
from kedit_fast.cli.options import (
    REQUESTS_HELP,
    FormOption,
    JsonOption,
    LabelsOption,
    OnErrorOption,
    OverwriteOption,
    ReadingOption,
    RelationPromptsOption,
)
from kedit_fast.requests.problems import skipped_records
from kedit_fast.requests.reading import load_requests
from kedit_fast.requests.sampling import sampled
from kedit_fast.requests.writing import check_suffix, save_requests


@command
def sample(
    file: Annotated[Path, typer.Argument(help=REQUESTS_HELP)],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="requests to draw; a case of several counts once")],
    out: Annotated[Path, typer.Option(help="new file, .json or .jsonl")],
    seed: Annotated[int, typer.Option(help="of the draw, and of new answers of forms that come without")] = 0,
    form: FormOption = None,
    reading: ReadingOption = None,
    labels: LabelsOption = None,
    relation_prompts: RelationPromptsOption = None,
    on_error: OnErrorOption = "raise",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw some of a file's requests, whole cases together, and write them as records of this package."""
    check_suffix(out)
    check_file(out, overwrite=overwrite)
    requests = load_requests(
        file, on_error, form=form, reading=reading, seed=seed, labels=labels, relation_prompts=relation_prompts
    )
    drawn = sampled(requests, count, seed)
    save_requests(drawn, out)
    if as_json:
        print_json(
            {
                "file": str(file),
                "form": requests.form,
                "reading": reading,
                "seed": seed,
                "requests": len(drawn),
                "of": len(requests),
                "skipped": skipped_records(requests.skipped),
                "out": str(out),
            }
        )
        return
    say_skipped(requests.skipped, requests.total)
    output.print(f"{len(drawn)} of {len(requests)} requests: {out}", markup=False, soft_wrap=True)
