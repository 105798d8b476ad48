"""The commands about statistics: `kedit-fast stats MODEL ...` collects; show, converge, import, export, project."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from kedit_fast.cli.console import (
    ON_ERROR_HELP,
    ArgumentsOption,
    ChatOption,
    Dtype,
    MergeAdapter,
    OnError,
    SeparatorOption,
    SystemOption,
    TemplateOption,
    assignments,
    chat_options,
    check_file,
    check_range,
    checked_device,
    command,
    interactive,
    notices,
    output,
    parsed_layers,
    print_json,
    processes,
    say_skipped,
)
from kedit_fast.errors import KeditError, StatisticsError
from kedit_fast.support import process_group

COLLECT = "collect"
TEXT_HELP = ".txt (a document a line), .jsonl, .json, .csv or .tsv, also .gz; or datasets:NAME[:CONFIG[:SPLIT]]"
LAYERS_HELP = "zero-based, 4-8 (both ends count) or 3,5,7"


class _CollectByDefault(TyperGroup):
    """`stats MODEL ...` is `stats collect MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [COLLECT, *args]
        return super().parse_args(ctx, args)


class Masters(str, Enum):
    """Where the fp64 sums are kept."""

    auto = "auto"
    device = "device"
    cpu = "cpu"


class Rule(str, Enum):
    """What a null-space threshold is a threshold of."""

    absolute = "absolute"
    relative = "relative"
    energy = "energy"


class Precision(str, Enum):
    """Of the sum in an npz file."""

    float32 = "float32"
    float64 = "float64"


app = typer.Typer(
    cls=_CollectByDefault, no_args_is_help=True,
    help="Second moments of layer inputs. `stats MODEL ...` collects them (`stats collect --help` has its options).",
)  # fmt: skip


@app.command(COLLECT)
@command
def collect(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    text: Annotated[str, typer.Option(help=TEXT_HELP)],
    layers: Annotated[str, typer.Option(help=LAYERS_HELP)],
    out: Annotated[Path, typer.Option(help="folder for the statistics and, while it runs, for checkpoints")],
    field: Annotated[str, typer.Option(help="field of a record, or column, that holds the text")] = "text",
    tokens: Annotated[int | None, typer.Option(min=1, help="stop after this many tokens")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="stop after this many documents")] = None,
    seed: Annotated[int | None, typer.Option(help="take documents in this random order; else in their own")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="cut documents to this many tokens")] = 1024,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens of a batch, padding included")] = 4096,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where the same command stopped; start if it never began")
    ] = False,
    checkpoint_every: Annotated[float, typer.Option(min=0, help="seconds between checkpoints")] = 60.0,
    masters: Annotated[Masters, typer.Option(help="where the fp64 sums are kept")] = Masters.auto,
    dtype: Annotated[Dtype, typer.Option(help="dtype the model runs in")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    merge_adapter: MergeAdapter = False,
    device_map: Annotated[
        str | None, typer.Option(help="spread the model over devices: auto, balanced, sequential (needs accelerate)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start anew in an existing --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Collect the second moments an edit needs, in one pass over a text, with checkpoints.

    Under torchrun every process takes its share of the batches.
    """
    from kedit_fast.models.loading import DTYPES, load_config, load_model
    from kedit_fast.statistics.corpus import Corpus
    from kedit_fast.statistics.resumable import check_folder, collect_into
    from kedit_fast.statistics.sources import open_texts

    wanted = parsed_layers(layers)
    if device_map is not None and device != "cpu":
        raise KeditError("--device-map places the model: leave --device out")
    check_folder(out, resume, overwrite)
    documents = open_texts(text, field)
    check_range(wanted, load_config(model, merge_adapter))
    try:
        with processes(device) as (rank, where):
            if device_map is not None and process_group.world()[1] > 1:
                raise KeditError("--device-map spreads one process over all devices: use it without torchrun")
            loaded, tokenizer = load_model(model, DTYPES[dtype.value], where, device_map, merge_adapter)
            found = collect_into(
                out, loaded, tokenizer, Corpus(documents, tokens, samples, max_length, seed), wanted,
                batch_tokens=batch_tokens, checkpoint_every=checkpoint_every, resume=resume, overwrite=overwrite,
                masters=masters.value, progress=interactive(),
            )  # fmt: skip
    except KeyboardInterrupt:
        notices.print(f"kedit-fast: interrupted; --resume goes on from the last checkpoint in {out}", markup=False)
        raise typer.Exit(130) from None
    if rank:
        return  # the first process speaks
    if as_json:
        print_json(
            {"layers": list(found.layers), "tokens": found.tokens, "documents": found.documents,
             "files": [path.name for path in found.files], "out": str(out), "resumed_tokens": found.resumed,
             "passes": found.passes, "seconds": round(found.seconds, 3),
             "checkpoint_seconds": round(found.checkpoint_seconds, 3)}
        )  # fmt: skip
        return
    how = "was finished" if not found.passes else f"{found.seconds:.1f} s"
    if found.passes and found.resumed:
        how += f", {found.resumed:,} tokens from a checkpoint"
    numbers = ", ".join(map(str, found.layers))
    output.print(f"{found.tokens:,} tokens, layers {numbers}, {how}: {out}", markup=False)


@app.command()
@command
def show(
    folder: Annotated[Path, typer.Argument(help="folder with statistics")],
    png: Annotated[Path | None, typer.Option(help="draw the spectra here; by default FOLDER/spectra.png")] = None,
    draw: Annotated[bool, typer.Option(help="draw the spectra (needs matplotlib)")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show counts, traces, condition numbers, effective ranks and null spaces, and draw the spectra."""
    from kedit_fast.reports import spectra

    found = spectra.spectra(folder)
    target = png or folder / "spectra.png"
    if draw:
        try:
            spectra.draw(found, target)
        except KeditError as error:
            if png is not None:
                raise
            notices.print(f"kedit-fast: no picture: {error}", markup=False)
            draw = False
    if as_json:
        layers = [spectrum.as_dict() for spectrum in found]
        print_json({"folder": str(folder), "layers": layers, "png": str(target) if draw else None})
        return
    table = Table(title=escape(str(folder)), title_justify="left")
    for name in ("layer", "d", "tokens", "trace", "condition", "rank*", "largest", "median", "smallest"):
        table.add_column(name, justify="right")
    spaces = Table(title="Null-space dimensions", title_justify="left", show_header=False)
    spaces.add_row("layer", *(str(s.layer) for s in found))
    for s in found:
        values = (s.eigenvalues[-1], s.eigenvalues[s.size // 2], s.eigenvalues[0])
        table.add_row(
            str(s.layer), str(s.size), str(s.count), f"{s.trace:.4g}",
            "singular" if s.condition is None else f"{s.condition:.2g}", f"{s.effective_rank:.1f}",
            *(f"{float(v):.2g}" for v in values),
        )  # fmt: skip
    for name in found[0].null_dimensions:
        spaces.add_row(name, *(str(s.null_dimensions[name]) for s in found))
    output.print(table)
    output.print("* effective: exp of the entropy of the eigenvalues", markup=False)
    output.print(spaces)
    if draw:
        output.print(f"Spectra: {target}", markup=False)


@app.command()
@command
def converge(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    text: Annotated[str, typer.Option(help=TEXT_HELP)],
    requests: Annotated[Path, typer.Option(help=".json, .jsonl, .csv or .tsv of requests whose update is followed")],
    out: Annotated[Path, typer.Option(help="folder for convergence.csv and convergence.png")],
    method: Annotated[str, typer.Option(help="a method with statistics")] = "memit",
    tokens: Annotated[str | None, typer.Option(help="counts, 1000,10000,...; by default doubled from 1000")] = None,
    edits: Annotated[int, typer.Option(min=1, help="requests to follow, the first ones")] = 16,
    field: Annotated[str, typer.Option(help="field of a record, or column, that holds the text")] = "text",
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="hyper-parameter, key=value; repeatable")] = None,
    seed: Annotated[int | None, typer.Option(help="take documents in this random order; else in their own")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="cut documents to this many tokens")] = 1024,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype the model runs in")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    on_error: Annotated[OnError, typer.Option(help=ON_ERROR_HELP)] = OnError.stop,
    merge_adapter: MergeAdapter = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the report in an existing --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Report how an update, the null space and the condition change as statistics see more text."""
    from dataclasses import asdict

    from kedit_fast.models.loading import DTYPES, load_model
    from kedit_fast.reports import convergence
    from kedit_fast.requests.chat import chat_format
    from kedit_fast.requests.problems import skipped_records
    from kedit_fast.requests.reading import load_requests
    from kedit_fast.statistics.corpus import Corpus
    from kedit_fast.statistics.sources import open_texts

    chatting = chat_options(chat, system, template, template_arg)
    table_path, picture_path = out / "convergence.csv", out / "convergence.png"
    if not overwrite and (table_path.exists() or picture_path.exists()):
        raise KeditError(f"{out} has a report: choose another --out or pass --overwrite")
    records = load_requests(requests, on_error.value, need_subject=True).first(edits)
    overrides = assignments(set_)
    _make_folder(out)
    documents = open_texts(text, field)
    loaded, tokenizer = load_model(model, DTYPES[dtype.value], checked_device(device), merge_adapter=merge_adapter)
    rows = convergence.convergence(
        loaded, tokenizer, Corpus(documents, max_length=max_length, seed=seed), records, method,
        counts=None if tokens is None else _counts(tokens),
        layers=None if layers is None else parsed_layers(layers), hparams=overrides, on_error=on_error.value,
        prompt_format=None if chatting is None else chat_format(tokenizer, **chatting),
        target_separator=target_separator, progress=interactive(),
    )  # fmt: skip
    say_skipped(rows.skipped, records.total)
    convergence.write_csv(rows, table_path)
    try:
        convergence.draw(rows, picture_path)
    except KeditError as error:
        notices.print(f"kedit-fast: no picture: {error}", markup=False)
        picture_path = None
    if as_json:
        print_json({"rows": [asdict(row) for row in rows], "skipped": skipped_records(rows.skipped),
                    "csv": str(table_path),
                    "png": None if picture_path is None else str(picture_path)})  # fmt: skip
        return
    table = Table(
        title=escape(f"{method.upper()}: {records.total - len(rows.skipped)} edits of {model}"), title_justify="left"
    )
    for name in ("tokens", "layer", "to last", "from previous", "null dim.", "overlap", "condition"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row.change_to_last, row.change_from_previous)
        table.add_row(
            f"{row.tokens:,}", str(row.layer), *("" if v is None else f"{v:.4f}" for v in numbers),
            str(row.null_dimension), "" if row.null_overlap is None else f"{row.null_overlap:.3f}",
            "singular" if row.condition is None else f"{row.condition:.3g}",
        )  # fmt: skip
    output.print(table)
    output.print("To last, from previous: relative change of the update. Null spaces: AlphaEdit's rule.", markup=False)
    for note in dict.fromkeys(f"{row.tokens:,} tokens: {row.note}" for row in rows if row.note):
        output.print(note, markup=False)
    output.print(f"Saved to {out}", markup=False)


@app.command("import")
@command
def import_(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    source: Annotated[Path, typer.Option("--from", help="a `..._stats` folder with npz files of memit or EasyEdit")],
    out: Annotated[Path, typer.Option(help="folder for the statistics")],
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP + "; all that are there by default")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="of several files of a layer that with this mom2_n_samples")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="of several files of a layer that with this mom2_dtype")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="the files carry no fingerprint: take them for this model's")
    ] = False,
    merge_adapter: MergeAdapter = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Take over statistics of memit, AlphaEdit or EasyEdit."""
    from kedit_fast.models.loading import load_model
    from kedit_fast.statistics.store import load_statistics, save_statistics

    if out.exists():
        raise KeditError(f"{out} exists: choose another --out")
    _make_folder(out.absolute().parent)
    loaded, tokenizer = load_model(model, merge_adapter=merge_adapter)
    wanted = None if layers is None else parsed_layers(layers)
    kind = None if precision is None else precision.value
    found = load_statistics(source, loaded, tokenizer, wanted, trust=trust, samples=samples, precision=kind)
    _written(save_statistics(found, out), as_json)


@app.command("export")
@command
def export(
    folder: Annotated[Path, typer.Argument(help="folder with statistics")],
    out: Annotated[Path, typer.Option(help="the other program's stats_dir")],
    model_name: Annotated[str, typer.Option(help="last part of the model's path there, for example gpt-j-6B")],
    data_set: Annotated[str, typer.Option(help="its mom2_dataset")] = "wikipedia",
    samples: Annotated[
        int, typer.Option(min=0, help="its mom2_n_samples, by which it looks for the file; 0 for none")
    ] = 100_000,
    precision: Annotated[Precision, typer.Option(help="its mom2_dtype")] = Precision.float32,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Write statistics where memit, AlphaEdit or EasyEdit look for their own."""
    from kedit_fast.statistics import memit_npz
    from kedit_fast.statistics.store import modules_in, read_layer

    written = []
    for module in modules_in(folder):
        file = read_layer(folder, module)
        path = memit_npz.path_of(out, model_name, data_set, module, samples or None, precision.value)
        memit_npz.write(path, file.second, file.metadata, samples or None, precision.value)
        written.append(path)
    _written(written, as_json)


@app.command()
@command
def project(
    folder: Annotated[Path, typer.Argument(help="folder with statistics")],
    out: Annotated[Path, typer.Option(help="the projector file, null_space_project.pt")],
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP + "; all that are there by default")] = None,
    threshold: Annotated[float, typer.Option(help="nullspace_threshold")] = 2e-2,
    rule: Annotated[Rule, typer.Option(help="nullspace_rule")] = Rule.absolute,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Write the projections on null spaces as AlphaEdit's null_space_project.pt."""
    from kedit_fast.solver.alphaedit_projector import save_projector
    from kedit_fast.solver.preconditioner import NullSpace
    from kedit_fast.statistics.store import layer_of, modules_in, read_layer

    check_file(out)
    wanted = None if layers is None else parsed_layers(layers)
    spaces = {}
    for module in modules_in(folder):
        layer = layer_of(module)
        if wanted is not None and layer not in wanted:
            continue
        file = read_layer(folder, module)
        try:
            spaces[layer] = NullSpace.from_covariance(file.second.moment, threshold, rule.value)
        except StatisticsError as error:
            raise StatisticsError(f"{file.path}: {error}") from None
    if missing := sorted(set(wanted or ()) - set(spaces)):
        raise StatisticsError(f"{folder} has no statistics of layer {missing[0]}")
    save_projector(out, spaces)
    if as_json:
        print_json({"out": str(out), "null_space_dimensions": {n: s.dimension for n, s in sorted(spaces.items())}})
        return
    shown = ", ".join(f"layer {layer} {space.dimension} of {space.size}" for layer, space in sorted(spaces.items()))
    output.print(f"Null space dimensions: {shown}. Saved to {out}", markup=False)


def _written(paths: list[Path], as_json: bool) -> None:
    if as_json:
        print_json({"files": [str(path) for path in paths]})
        return
    for path in paths:
        output.print(str(path), markup=False, soft_wrap=True)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--tokens takes counts, 1000,10000; got {text!r}") from None


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeditError(f"cannot write {path}: {error.strerror or error}") from error
