"""How many tokens chose the experts of each layer, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from kedit_fast.statistics.expert_moments import ExpertTokens

NAMED = 8
"""Experts that are named; of more, the first ones."""


def expert_table(layers: Mapping[int, tuple[ExpertTokens, float | None]]) -> Table:
    """A row for each layer: its experts, and the condition number of their second moments with a solve's ridge."""
    table = Table(title="Tokens that chose each expert", title_justify="left")
    for name in ("layer", "experts", "least", "median", "never chosen", "condition*"):
        table.add_column(name, justify="right")
    for layer, (tokens, condition) in sorted(layers.items()):
        table.add_row(
            str(layer),
            str(tokens.experts),
            f"{tokens.least:,}",
            f"{tokens.median:,g}",
            _named(tokens.never),
            "" if condition is None else f"{condition:.2g}",
        )
    table.caption = "* with the ridge that a solve adds"
    return table


def _named(experts: tuple[int, ...]) -> str:
    """How many experts, and which."""
    if not experts:
        return "0"
    names = ", ".join(map(str, experts[:NAMED]))
    return f"{len(experts)} ({names}{', ...' if len(experts) > NAMED else ''})"
