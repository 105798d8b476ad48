"""Recipes: what makes a method, as a record of strategies of the one pipeline.

To add a method, add one Recipe to RECIPES (and a golden row to its test).
"""

from __future__ import annotations

from dataclasses import dataclass

from kedit_fast.errors import MethodError


@dataclass(frozen=True)
class Recipe:
    """A closed-form editing method."""

    name: str
    title: str
    source: str
    site: str  # where the value is optimised and measured: "block" or "mlp" output
    key_weights: str  # "bare_half": half the bare prompt, half the mean of the others; "mean" over all contexts
    solve: str  # "ridge": R (rho I + K^T G)^-1 G^T over a batch; "rank_one": equality, one request at a time
    spread: str  # residual over the layers left: "linear", or "none" for one layer
    contexts: tuple[tuple[int, int], ...]  # published (tokens, count) of generated prefixes


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "memit",
            "Mass-editing memory in a transformer",
            "Meng et al. 2023, arXiv 2210.07229",
            site="block",
            key_weights="bare_half",
            solve="ridge",
            spread="linear",
            contexts=((10, 5),),
        ),
        Recipe(
            "rome",
            "Rank-one model editing",
            "Meng et al. 2022, arXiv 2202.05262",
            site="mlp",
            key_weights="mean",
            solve="rank_one",
            spread="none",
            contexts=((5, 10), (10, 10)),
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a method; raises MethodError with the known names."""
    recipe = RECIPES.get(name.lower().replace("_", "-"))
    if recipe is None:
        raise MethodError(f"unknown method {name!r}: choose from {', '.join(sorted(RECIPES))}")
    return recipe
