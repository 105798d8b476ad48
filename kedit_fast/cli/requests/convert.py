"""`kedit-fast requests convert`."""

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
    RequestSeedOption,
    SnippetsOption,
)
from kedit_fast.requests.problems import skipped_records
from kedit_fast.requests.reading import load_requests
from kedit_fast.requests.writing import check_suffix, save_requests


@command
def convert(
    file: Annotated[Path, typer.Argument(help=REQUESTS_HELP)],
    out: Annotated[Path, typer.Option(help="new file, .json or .jsonl")],
    form: FormOption = None,
    reading: ReadingOption = None,
    labels: LabelsOption = None,
    relation_prompts: RelationPromptsOption = None,
    snippets: SnippetsOption = None,
    seed: RequestSeedOption = 0,
    on_error: OnErrorOption = "raise",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the requests of a file of any form as records of this package."""
    check_suffix(out)
    check_file(out, overwrite=overwrite)
    requests = load_requests(
        file,
        on_error,
        form=form,
        reading=reading,
        seed=seed,
        labels=labels,
        relation_prompts=relation_prompts,
        snippets=snippets,
    )
    save_requests(requests, out)
    if as_json:
        print_json(
            {
                "file": str(file),
                "form": requests.form,
                "reading": reading,
                "requests": len(requests),
                "skipped": skipped_records(requests.skipped),
                "out": str(out),
            }
        )
        return
    say_skipped(requests.skipped, requests.total)
    output.print(f"{len(requests)} requests of the form {requests.form}: {out}", markup=False, soft_wrap=True)
