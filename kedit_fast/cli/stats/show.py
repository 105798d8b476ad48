"""`kedit-fast stats show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.console import command, notices, output, print_json
from kedit_fast.cli.options import JsonOption
from kedit_fast.cli.stats.experts import expert_table
from kedit_fast.errors import KeditError
from kedit_fast.reports import spectra
from kedit_fast.support.messages import comma_list


@command
def show(
    folder: Annotated[Path, typer.Argument(help="folder with statistics")],
    png: Annotated[Path | None, typer.Option(help="draw the spectra here; by default FOLDER/spectra.png")] = None,
    draw: Annotated[bool, typer.Option(help="draw the spectra (needs matplotlib)")] = True,
    as_json: JsonOption = False,
) -> None:
    """Show counts, traces, condition numbers, effective ranks and null spaces, and draw the spectra."""
    layer_spectra, output_spectra = spectra.spectra(folder), spectra.output_spectra(folder)
    target = png or folder / "spectra.png"
    if draw:
        try:
            spectra.draw(layer_spectra, target)
        except KeditError as error:
            if png is not None:
                raise
            notices.print(f"kedit-fast: no picture: {error}", markup=False)
            draw = False
    if as_json:
        layers, metrics = ([spectrum.as_dict() for spectrum in part] for part in (layer_spectra, output_spectra))
        png_path = str(target) if draw else None
        print_json({"folder": str(folder), "layers": layers, "output_metrics": metrics, "png": png_path})
        return
    spaces = Table(title="Null-space dimensions", title_justify="left", show_header=False)
    spaces.add_row("layer", *(s.name for s in layer_spectra))
    for name in dict.fromkeys(name for s in layer_spectra for name in s.null_dimensions):
        spaces.add_row(name, *(str(s.null_dimensions.get(name, "")) for s in layer_spectra))
    output.print(_table(str(folder), layer_spectra))
    if output_spectra:
        labels = comma_list(dict.fromkeys(spectrum.labels for spectrum in output_spectra))
        output.print(_table(f"Output metrics: gradients at the outputs, {labels} labels", output_spectra))
    output.print("* effective: exp of the entropy of the eigenvalues", markup=False)
    if experts := {s.layer: (s.experts, s.condition) for s in layer_spectra if s.experts is not None}:
        output.print(expert_table(experts))
    output.print(spaces)
    if draw:
        output.print(f"Spectra: {target}", markup=False)


def _table(title: str, layer_spectra: list[spectra.Spectrum]) -> Table:
    """A row of figures for each layer."""
    table = Table(title=escape(title), title_justify="left")
    for name in ("layer", "d", "tokens", "trace", "condition", "rank*", "largest", "median", "smallest"):
        table.add_column(name, justify="right")
    for s in layer_spectra:
        values = (s.eigenvalues[-1], s.eigenvalues[s.size // 2], s.eigenvalues[0])
        table.add_row(
            s.name,
            str(s.size),
            str(s.count),
            f"{s.trace:.4g}",
            "singular" if s.condition is None else f"{s.condition:.2g}",
            f"{s.effective_rank:.1f}",
            *(f"{float(v):.2g}" for v in values),
        )
    return table
