"""`kedit-fast methods`."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.console import command, output, print_json
from kedit_fast.cli.options import JsonOption
from kedit_fast.methods.hparams import describe
from kedit_fast.methods.registry import RECIPES


@command
def methods(as_json: JsonOption = False) -> None:
    """List the methods, where each is from, and what it keeps between batches; as JSON also their hyper-parameters."""
    if as_json:
        print_json({name: {**recipe.as_dict(), "hparams": describe(recipe)} for name, recipe in RECIPES.items()})
        return
    table = Table.grid(padding=(0, 2))
    for recipe in RECIPES.values():
        how = "One request at a time, one layer" if not recipe.is_batched else "A batch at once"
        how = "A batch at once, several modules" if recipe.gathers_gradients else how
        text = f"{recipe.title}\n{recipe.source}\n{how}; keeps {recipe.keeps}\n"
        table.add_row(recipe.name, escape(text))
    output.print(table)
