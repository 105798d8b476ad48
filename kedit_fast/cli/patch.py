"""`kedit-fast patch`: edits as files that travel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.checks import check_file
from kedit_fast.cli.console import command, output, print_json
from kedit_fast.cli.options import JsonOption, OverwriteOption, choice
from kedit_fast.cli.report import print_harm
from kedit_fast.patches.checkpoint import Checkpoint
from kedit_fast.patches.dequantized import apply_dequantized
from kedit_fast.patches.lora import export_lora
from kedit_fast.patches.patch import Patch
from kedit_fast.patches.patch import merge as merge_patches
from kedit_fast.reports.harm import patch_harm
from kedit_fast.support.messages import comma_list

app = typer.Typer(
    help="Edits as files: show, apply, revert, merge, export.", no_args_is_help=True, add_completion=False
)
PATCH_HELP = "file that `kedit-fast edit --patch` wrote"
FOLDER_HELP = "folder of a safetensors checkpoint, sharded or not; the model is not loaded"
FORCE_HELP = (
    "also on other matrices than the patch was made for: the edits may then say something else, or harm the model"
)


HARM_HELP = (
    "folder of the model's statistics with output metrics: the KL divergence that the edits are predicted to cause"
)
FORMATS = ("lora",)


@app.command()
@command
def show(
    patch: Annotated[Path, typer.Argument(help=PATCH_HELP)],
    stats: Annotated[Path | None, typer.Option(help=HARM_HELP)] = None,
    requests: Annotated[int, typer.Option(min=0, help="requests to show")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Say what a patch writes, where, and which model it is for."""
    loaded = Patch.load(patch)
    about, harm = loaded.about(), patch_harm(loaded, stats)
    if as_json:
        print_json({"patch": str(patch), **about, "harm": harm.as_dict()})
        return
    table = Table(title=escape(f"{about['method']}: {about['edits']} edits, {patch}"), title_justify="left")
    quantities = ("rank", "norm", *(() if stats is None else ("predicted KL",)))
    for column in ("module", "shape", *quantities, "for dtype", "for W_0 (SHA-256)"):
        table.add_column(column, justify="right" if column in quantities else "left", overflow="fold")
    for name, module in about["modules"].items():
        shape = " x ".join(map(str, module["shape"])) + (", transposed" if module["transposed"] else "")
        rank = f"{module['rank']}{', masked' if module['masked'] else ', dense' if module['dense'] else ''}"
        rank += f", {module['changed_experts']} experts" if "changed_experts" in module else ""
        kl = harm.modules[name].predicted_kl
        predicted = [] if stats is None else ["" if kl is None else f"{kl:.3g}"]
        table.add_row(name, shape, rank, f"{module['norm']:.4g}", *predicted, module["dtype"], module["original"][:16])
    output.print(table)
    print_harm(harm, "All modules")
    for request in about["requests"][:requests]:
        text = request["prompt"].replace("{}", request["subject"] or "")
        output.print(f"  {text} -> {request['target_new'].strip()}", markup=False)
    if about["edits"] > requests:
        output.print(f"  and {about['edits'] - requests} more", markup=False)


@app.command()
@command
def apply(
    patch: Annotated[Path, typer.Argument(help=PATCH_HELP)],
    model: Annotated[Path, typer.Argument(help=FOLDER_HELP)],
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    keep_originals: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep", help="keep what the matrices were in the folder, so that `revert` gives back their bits"
        ),
    ] = True,
    dequantize_into: Annotated[
        Path | None,
        typer.Option(
            help="of a quantized checkpoint (fp8, bitsandbytes): leave it, and write a copy to this folder in which "
            "the patched matrices alone are 16-bit"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a patch into a checkpoint on disk, all of it or nothing."""
    loaded = Patch.load(patch)
    if dequantize_into is None:
        number = Checkpoint(model).apply(loaded, patch.name, force, keep_originals)
    else:
        number = apply_dequantized(loaded, model, dequantize_into, patch.name, force, keep_originals)
        model = dequantize_into
    if as_json:
        print_json({"patch": str(patch), "model": str(model), "number": number, "modules": sorted(loaded.updates)})
        return
    how = (
        f"kedit-fast patch revert {model}" if keep_originals else f"kedit-fast patch revert {model} --subtract {patch}"
    )
    output.print(f"{len(loaded.updates)} matrices of {model} patched; back: {how}", markup=False)


@app.command()
@command
def revert(
    model: Annotated[Path, typer.Argument(help=FOLDER_HELP)],
    subtract: Annotated[
        Path | None, typer.Option(help="a patch applied with --no-keep: it is subtracted, exact up to rounding")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="also where something else changed a matrix since")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take the newest patch out of a checkpoint on disk, bit for bit."""
    checkpoint = Checkpoint(model)
    if subtract is not None:
        checkpoint.subtract(Patch.load(subtract), force)
        name = subtract.name
    else:
        name = checkpoint.revert(force)
    if as_json:
        print_json({"patch": name, "model": str(model), "exact": subtract is None, "left": len(checkpoint.records())})
        return
    output.print(
        f"{name} taken out of {model}, {'bit for bit' if subtract is None else 'up to rounding'}", markup=False
    )


@app.command()
@command
def merge(
    patches: Annotated[list[Path], typer.Argument(help="patches, in the order they would be applied")],
    out: Annotated[Path, typer.Option(help="file of the merged patch")],
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="make the factors as few as |Delta - Delta'| / |Delta| allows; 0: up to rounding"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    as_json: JsonOption = False,
) -> None:
    """Make one patch of several."""
    check_file(out)
    merged_patch = merge_patches([Patch.load(path) for path in patches], force)
    if tolerance is not None:
        merged_patch = merged_patch.compacted(tolerance)
    merged_patch.save(out)
    _print_patch(merged_patch, out, as_json)


@app.command()
@command
def export(
    patch: Annotated[Path, typer.Argument(help=PATCH_HELP)],
    out: Annotated[Path, typer.Option(help="folder of the adapter")],
    format_: Annotated[str, choice(FORMATS, "lora: an adapter that peft loads", "--format")] = "lora",
    tolerance: Annotated[float, typer.Option(min=0.0, help="of |Delta - Delta'| / |Delta| of each matrix")] = 0.0,
    rank: Annotated[int | None, typer.Option(min=1, help="at most; however far from the edit that is")] = None,
    base_model: Annotated[str | None, typer.Option(help="name or path of the model, for the configuration")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a patch as a LoRA adapter."""
    loaded = Patch.load(patch)
    modules = export_lora(loaded, out, base_model=base_model, tolerance=tolerance, rank=rank, overwrite=overwrite)
    ranks = {name: module.rank for name, module in modules.items()}
    errors = {name: module.error for name, module in modules.items()}
    if as_json:
        about = {"patch": str(patch), "out": str(out), "format": format_}
        print_json({**about, "ranks": ranks, "errors": errors})
        return
    left_out = f"|Delta - B A| / |Delta| {max(errors.values()):.2g} at most"
    output.print(f"Ranks {comma_list(ranks.values())}, {left_out}; saved to {out}", markup=False)


def _print_patch(patch: Patch, out: Path, as_json: bool) -> None:
    about = patch.about()
    if as_json:
        print_json({"out": str(out), **about})
        return
    ranks = ", ".join(str(module["rank"]) for module in about["modules"].values())
    output.print(f"{about['edits']} edits, ranks {ranks}; saved to {out}", markup=False)
