"""`kedit-fast memory`: edits beside the weights, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.checks import check_file
from kedit_fast.cli.console import command, output, print_json
from kedit_fast.cli.options import JsonOption, ModelArgument, choice
from kedit_fast.editing.tuning.summary import described
from kedit_fast.errors import SideMemoryError
from kedit_fast.memories.memory import SideMemory
from kedit_fast.memories.merging import merge as merge_memory
from kedit_fast.methods.tuning_hparams import MergeRule
from kedit_fast.models.loading import load_model
from kedit_fast.patches.checkpoint import Checkpoint
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.workflow import MEMORY_FILE

app = typer.Typer(
    help="Edits beside the weights as files: show, apply, revert, merge.", no_args_is_help=True, add_completion=False
)
MEMORY_HELP = "file that `kedit-fast edit --memory` wrote"
FOLDER_HELP = "folder of a safetensors checkpoint, sharded or not; the model is not loaded"


@app.command()
@command
def show(
    memory: Annotated[Path, typer.Argument(help=MEMORY_HELP)],
    requests: Annotated[int, typer.Option(min=0, help="requests to show")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Say what a memory holds, how texts are routed to it, and which matrix it is for."""
    loaded = SideMemory.load(memory)
    about = {**loaded.about(), **described(loaded)}
    if as_json:
        print_json({"memory": str(memory), **about})
        return
    table = Table(title=escape(f"{loaded.method}: {len(loaded.requests)} edits, {memory}"), title_justify="left")
    for column in ("module", "shape", "kind", "entries", "MiB", "for dtype", "for W_0 (SHA-256)"):
        table.add_column(column, justify="right" if column in ("entries", "MiB") else "left", overflow="fold")
    shape = "{} x {}".format(*loaded.shape) + (", transposed" if loaded.transposed else "")
    size = f"{loaded.nbytes / 2**20:.2f}"
    cells = (shape, loaded.kind, f"{loaded.entries:,}", size, loaded.dtype, loaded.original[:16])
    table.add_row(escape(loaded.module), *cells)
    output.print(table)
    known = {"kind", "entries", "bytes"}
    for name, value in described(loaded).items():
        if name not in known:
            text = ", ".join(f"{each:.4g}" for each in value) if isinstance(value, list) else f"{value:.4g}"
            output.print(f"{name.replace('_', ' ')}: {text}", markup=False)
    for request in loaded.requests[:requests]:
        text = str(request["prompt"]).replace("{}", request["subject"] or "")
        output.print(f"  {text} -> {str(request['target_new']).strip()}", markup=False)
    if len(loaded.requests) > requests:
        output.print(f"  and {len(loaded.requests) - requests} more", markup=False)


@app.command()
@command
def apply(
    memory: Annotated[Path, typer.Argument(help=MEMORY_HELP)],
    model: Annotated[Path, typer.Argument(help=FOLDER_HELP)],
    force: Annotated[
        bool,
        typer.Option("--force", help="also beside another matrix than the memory was made for: routes may be wrong"),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the memory that is there")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put a memory beside the weights of a checkpoint on disk, for `kedit_fast.attach`; no weight changes."""
    loaded, place = SideMemory.load(memory), model / MEMORY_FILE
    matrix = Checkpoint(model).stored(loaded.module).read(loaded.transposed)
    if sha256(matrix) != loaded.original and not force:
        raise SideMemoryError(
            f"{loaded.module} of {model} is not the matrix that {memory} was made beside: another model or layer, or "
            "one with edits in it (--force puts it there all the same)"
        )
    check_file(place, "model, or `kedit-fast memory revert`, which takes it away", overwrite)
    loaded.save(place)
    if as_json:
        print_json({"memory": str(memory), "model": str(model), "file": str(place), "module": loaded.module})
        return
    output.print(f"{len(loaded.requests)} edits beside {loaded.module} of {model}: {place}", markup=False)


@app.command()
@command
def revert(
    model: Annotated[Path, typer.Argument(help=FOLDER_HELP)],
    as_json: JsonOption = False,
) -> None:
    """Take the memory beside a checkpoint's weights away: its file is deleted."""
    place = model / MEMORY_FILE
    if not place.is_file():
        raise SideMemoryError(f"{model} has no {MEMORY_FILE}")
    loaded = SideMemory.load(place)  # refuses what is no memory
    place.unlink()
    if as_json:
        print_json({"model": str(model), "file": str(place), "edits": len(loaded.requests)})
        return
    output.print(f"{len(loaded.requests)} edits of {loaded.method} are gone from {model}", markup=False)


@app.command()
@command
def merge(
    memory: Annotated[Path, typer.Argument(help=f"{MEMORY_HELP}, of wise")],
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="file of the patch")],
    rule: Annotated[str, choice(get_args(MergeRule), "how the memory's matrices become one")] = "ties",
    density: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="share of each matrix's entries that is taken, the largest changes")
    ] = 0.53,
    as_json: JsonOption = False,
) -> None:
    """Make a patch of a memory of wise: its edits then answer every text, and what routing left alone may change."""
    check_file(out)
    loaded, _ = load_model(model)
    patch = merge_memory(SideMemory.load(memory), loaded, rule, density)
    patch.save(out)
    if as_json:
        print_json({"memory": str(memory), "out": str(out), "rule": rule, "density": density, **patch.about()})
        return
    norms = ", ".join(f"{module['norm']:.4g}" for module in patch.about()["modules"].values())
    output.print(
        f"{len(patch.requests)} edits, |Delta| {norms}, without a route: measure what else they change; saved to {out}",
        markup=False,
    )
