"""`kedit-fast stats converge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.checks import check_device_map, checked_device, make_folder
from kedit_fast.cli.console import command, interactive, notices, output, print_json, say_skipped
from kedit_fast.cli.options import (
    DTYPE_NAMES,
    LAYERS_HELP,
    TEXT_HELP,
    ArgumentsOption,
    ChatOption,
    DeviceMapOption,
    DeviceOption,
    FormOption,
    JsonOption,
    MergeAdapter,
    ModelArgument,
    OnErrorOption,
    ReadingOption,
    SeparatorOption,
    SetOption,
    SpecOption,
    SystemOption,
    TemplateOption,
    assignments,
    chat_options,
    choice,
    parsed_layers,
    read_spec,
)
from kedit_fast.errors import KeditError
from kedit_fast.models.loading import DTYPES, load_model
from kedit_fast.reports import convergence
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.problems import skipped_records
from kedit_fast.requests.reading import load_requests
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.sources import open_texts


@command
def converge(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help=TEXT_HELP)],
    requests: Annotated[Path, typer.Option(help=".json, .jsonl, .csv or .tsv of requests whose update is followed")],
    out: Annotated[Path, typer.Option(help="folder for convergence.csv and convergence.png")],
    method: Annotated[str, typer.Option(help="a method with statistics")] = "memit",
    tokens: Annotated[str | None, typer.Option(help="counts, 1000,10000,...; by default doubled from 1000")] = None,
    edits: Annotated[int, typer.Option(min=1, help="requests to follow, the first ones")] = 16,
    field: Annotated[str, typer.Option(help="field of a record, or column, that holds the text")] = "text",
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP)] = None,
    set_: SetOption = None,
    seed: Annotated[int | None, typer.Option(help="take documents in this random order; else in their own")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="cut documents to this many tokens")] = 1024,
    form: FormOption = None,
    reading: ReadingOption = None,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    dtype: Annotated[str, choice(DTYPE_NAMES, "dtype the model runs in")] = "auto",
    device: DeviceOption = "cpu",
    device_map: DeviceMapOption = None,
    on_error: OnErrorOption = "raise",
    merge_adapter: MergeAdapter = False,
    spec: SpecOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the report in an existing --out")] = False,
    as_json: JsonOption = False,
) -> None:
    """Report how an update, the null space and the condition change as statistics see more text."""

    chatting = chat_options(chat, system, template, template_arg)
    check_device_map(device_map, device)
    architecture = read_spec(spec)
    table_path, picture_path = out / "convergence.csv", out / "convergence.png"
    if not overwrite and (table_path.exists() or picture_path.exists()):
        raise KeditError(f"{out} has a report: choose another --out or pass --overwrite")
    records = load_requests(requests, on_error, need_subject=True, form=form, reading=reading).first(edits)
    overrides = assignments(set_)
    make_folder(out)
    documents = open_texts(text, field)
    loaded, tokenizer = load_model(model, DTYPES[dtype], checked_device(device), device_map, merge_adapter)
    rows = convergence.convergence(
        loaded,
        tokenizer,
        Corpus(documents, max_length=max_length, seed=seed),
        records,
        method,
        counts=None if tokens is None else _counts(tokens),
        layers=None if layers is None else parsed_layers(layers),
        hparams=overrides,
        on_error=on_error,
        prompt_format=None if chatting is None else chat_format(tokenizer, **chatting),
        target_separator=target_separator,
        progress=interactive(),
        spec=architecture,
    )
    say_skipped(rows.skipped, records.total)
    convergence.write_csv(rows, table_path)
    try:
        convergence.draw(rows, picture_path)
    except KeditError as error:
        notices.print(f"kedit-fast: no picture: {error}", markup=False)
        picture_path = None
    if as_json:
        print_json(
            {
                "rows": [asdict(row) for row in rows],
                "skipped": skipped_records(rows.skipped),
                "csv": str(table_path),
                "png": None if picture_path is None else str(picture_path),
            }
        )
        return
    table = Table(
        title=escape(f"{method.upper()}: {records.total - len(rows.skipped)} edits of {model}"), title_justify="left"
    )
    for name in ("tokens", "layer", "to last", "from previous", "null dim.", "overlap", "condition"):
        table.add_column(name, justify="right")
    for row in rows:
        changes = (row.change_to_last, row.change_from_previous)
        table.add_row(
            f"{row.tokens:,}",
            str(row.layer),
            *("" if v is None else f"{v:.4f}" for v in changes),
            str(row.null_dimension),
            "" if row.null_overlap is None else f"{row.null_overlap:.3f}",
            "singular" if row.condition is None else f"{row.condition:.3g}",
        )
    output.print(table)
    output.print("To last, from previous: relative change of the update. Null spaces: AlphaEdit's rule.", markup=False)
    for note in dict.fromkeys(f"{row.tokens:,} tokens: {row.note}" for row in rows if row.note):
        output.print(note, markup=False)
    output.print(f"Saved to {out}", markup=False)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--tokens takes counts, 1000,10000; got {text!r}") from None
