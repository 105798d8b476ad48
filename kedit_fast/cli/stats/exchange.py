"""Statistics and projectors in the formats of other programs: `kedit-fast stats import | export | project`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kedit_fast.cli.checks import check_file, make_folder
from kedit_fast.cli.console import command, output, print_json
from kedit_fast.cli.options import (
    LAYERS_HELP,
    JsonOption,
    MergeAdapter,
    ModelArgument,
    SpecOption,
    choice,
    parsed_layers,
    read_spec,
)
from kedit_fast.errors import KeditError, StatisticsError
from kedit_fast.methods.hparams import DECLARATIONS
from kedit_fast.models.loading import load_model
from kedit_fast.solver.alphaedit_projector import save_projector
from kedit_fast.solver.preconditioner import RULES, NullSpace, NullSpaceRule
from kedit_fast.statistics import memit_npz
from kedit_fast.statistics.store import layer_of, load_statistics, modules_in, read_layer, save_statistics

PRECISIONS = ("float32", "float64")


@command
def import_(
    model: ModelArgument,
    source: Annotated[Path, typer.Option("--from", help="a `..._stats` folder with npz files of memit or EasyEdit")],
    out: Annotated[Path, typer.Option(help="folder for the statistics")],
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP + "; all that are there by default")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="where a layer has several files, take the one with this mom2_n_samples")
    ] = None,
    precision: Annotated[
        str | None, choice(PRECISIONS, "where a layer has several files, take the one with this mom2_dtype")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="accept the files as this model's; they do not record their model")
    ] = False,
    merge_adapter: MergeAdapter = False,
    spec: SpecOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take over statistics of memit, AlphaEdit or EasyEdit."""
    if out.exists():
        raise KeditError(f"{out} exists: choose another --out")
    architecture = read_spec(spec)
    make_folder(out.absolute().parent)
    loaded, tokenizer = load_model(model, merge_adapter=merge_adapter)
    layer_numbers = None if layers is None else parsed_layers(layers)
    statistics = load_statistics(
        source, loaded, tokenizer, layer_numbers, architecture, trust, samples=samples, precision=precision
    )
    _written(save_statistics(statistics, out), as_json)


@command
def export(
    folder: Annotated[Path, typer.Argument(help="folder with statistics")],
    out: Annotated[Path, typer.Option(help="the other program's stats_dir")],
    model_name: Annotated[str, typer.Option(help="last part of the model's path there, for example gpt-j-6B")],
    data_set: Annotated[str, typer.Option(help="its mom2_dataset")] = "wikipedia",
    samples: Annotated[
        int, typer.Option(min=0, help="its mom2_n_samples, by which it looks for the file; 0 for none")
    ] = 100_000,
    precision: Annotated[str, choice(PRECISIONS, "its mom2_dtype")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Write statistics where memit, AlphaEdit or EasyEdit look for their own."""
    written = []
    for module in modules_in(folder):
        file = read_layer(folder, module)
        path = memit_npz.path_of(out, model_name, data_set, module, samples or None, precision)
        memit_npz.write(path, file.second, file.metadata, samples or None, precision)
        written.append(path)
    _written(written, as_json)


@command
def project(
    folder: Annotated[Path, typer.Argument(help="folder with statistics")],
    out: Annotated[Path, typer.Option(help="the projector file, null_space_project.pt")],
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP + "; all that are there by default")] = None,
    threshold: Annotated[float, typer.Option(help="nullspace_threshold")] = DECLARATIONS["nullspace_threshold"].default,
    rule: Annotated[NullSpaceRule, choice(RULES, "nullspace_rule")] = DECLARATIONS["nullspace_rule"].default,
    as_json: JsonOption = False,
) -> None:
    """Write the projections on null spaces as AlphaEdit's null_space_project.pt."""
    check_file(out)
    layer_numbers = None if layers is None else parsed_layers(layers)
    spaces = {}
    for module in modules_in(folder):
        layer = layer_of(module)
        if layer_numbers is not None and layer not in layer_numbers:
            continue
        file = read_layer(folder, module)
        if file.second.moment.ndim != 2:
            raise StatisticsError(
                f"{file.path} is of {len(file.second.moment)} experts: AlphaEdit's projector file has room for one "
                "matrix a layer, and AlphaEdit's program edits no mixtures of experts"
            )
        try:
            spaces[layer] = NullSpace.from_covariance(file.second.moment, threshold, rule)
        except StatisticsError as error:
            raise StatisticsError(f"{file.path}: {error}") from None
    if missing := sorted(set(layer_numbers or ()) - set(spaces)):
        raise StatisticsError(f"{folder} has no statistics of layer {missing[0]}")
    save_projector(out, spaces)
    if as_json:
        print_json({"out": str(out), "null_space_dimensions": {n: s.dimension for n, s in sorted(spaces.items())}})
        return
    dimensions = ", ".join(
        f"layer {layer} {space.dimension} of {space.size}" for layer, space in sorted(spaces.items())
    )
    output.print(f"Null space dimensions: {dimensions}. Saved to {out}", markup=False)


def _written(paths: list[Path], as_json: bool) -> None:
    if as_json:
        print_json({"files": [str(path) for path in paths]})
        return
    for path in paths:
        output.print(str(path), markup=False, soft_wrap=True)
