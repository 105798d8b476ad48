"""`kedit-fast stats show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.console import command, notices, output, print_json
from kedit_fast.cli.options import JsonOption
from kedit_fast.errors import KeditError
from kedit_fast.reports import spectra


@command
def show(
    folder: Annotated[Path, typer.Argument(help="folder with statistics")],
    png: Annotated[Path | None, typer.Option(help="draw the spectra here; by default FOLDER/spectra.png")] = None,
    draw: Annotated[bool, typer.Option(help="draw the spectra (needs matplotlib)")] = True,
    as_json: JsonOption = False,
) -> None:
    """Show counts, traces, condition numbers, effective ranks and null spaces, and draw the spectra."""
    layer_spectra = spectra.spectra(folder)
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
        layers = [spectrum.as_dict() for spectrum in layer_spectra]
        print_json({"folder": str(folder), "layers": layers, "png": str(target) if draw else None})
        return
    table = Table(title=escape(str(folder)), title_justify="left")
    for name in ("layer", "d", "tokens", "trace", "condition", "rank*", "largest", "median", "smallest"):
        table.add_column(name, justify="right")
    spaces = Table(title="Null-space dimensions", title_justify="left", show_header=False)
    spaces.add_row("layer", *(str(s.layer) for s in layer_spectra))
    for s in layer_spectra:
        values = (s.eigenvalues[-1], s.eigenvalues[s.size // 2], s.eigenvalues[0])
        table.add_row(
            str(s.layer),
            str(s.size),
            str(s.count),
            f"{s.trace:.4g}",
            "singular" if s.condition is None else f"{s.condition:.2g}",
            f"{s.effective_rank:.1f}",
            *(f"{float(v):.2g}" for v in values),
        )
    for name in layer_spectra[0].null_dimensions:
        spaces.add_row(name, *(str(s.null_dimensions[name]) for s in layer_spectra))
    output.print(table)
    output.print("* effective: exp of the entropy of the eigenvalues", markup=False)
    output.print(spaces)
    if draw:
        output.print(f"Spectra: {target}", markup=False)
