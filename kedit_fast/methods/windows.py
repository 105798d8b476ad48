"""Windows: the layers that a trial edits on a model without published ones, and the statistics that all trials need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedit_fast.methods.presets import preset_hparams, text_config
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import RECIPES

DEEPEST_VALUES, DEEPEST_GRADIENTS = 0.65, 0.97
"""The last layer of a window is at most at this share of the depth: of methods with values, and with gradients."""
SPREAD_SHARE, MOST_LAYERS = 0.16, 5
"""Layers of a window: this share of the depth, at least 2 and at most 5, as in the published files."""
EVERY_END, ENDS = 12, 9
"""A model with up to 12 layers has a window that ends at every layer to the deepest; a deeper one has 9 windows."""


def windows(recipe: Recipe, num_layers: int) -> list[tuple[int, ...]]:
    """Sets of layers to try, from the first layers to the deepest that are of use to such a method.

    A window holds neighboring layers, zero-based and ascending; a single one for a method that edits one layer.
    """
    deepest = DEEPEST_VALUES if recipe.optimizes_values else DEEPEST_GRADIENTS
    last = min(num_layers - 1, max(1, round(deepest * (num_layers - 1))))
    size = 1 if recipe.edits_one_layer else min(MOST_LAYERS, max(2, round(SPREAD_SHARE * num_layers)))
    if num_layers <= EVERY_END:
        ends = list(range(last + 1))
    else:
        ends = sorted({round(size - 1 + i * (last - size + 1) / (ENDS - 1)) for i in range(ENDS)})
    return [tuple(range(max(0, end - size + 1), end + 1)) for end in ends]


def tried_layers(num_layers: int) -> tuple[int, ...]:
    """Every layer of a window of any method that uses statistics, ascending."""
    tried = (window for recipe in RECIPES.values() if recipe.uses_statistics for window in windows(recipe, num_layers))
    return tuple(sorted({layer for window in tried for layer in window}))


def statistics_layers(config: Any, editable: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers whose statistics let every method run on a model, ascending: those of its presets or guesses, and all
    that are tried.

    Args:
        config: the configuration of the model.
        editable: the layers that can be edited; None for all.
    """
    places = range(text_config(config).num_hidden_layers) if editable is None else editable
    preset = (preset_hparams(recipe, config)[0] for recipe in RECIPES.values() if recipe.uses_statistics)
    tried = [places[place] for place in tried_layers(len(places))]
    named = {min(places, key=lambda other: abs(other - layer)) for values in preset for layer in values["layers"]}
    return tuple(sorted({*tried, *named}))
