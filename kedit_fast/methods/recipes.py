"""Recipes: what makes a method, as a record of strategies of the one pipeline.

To add a method, add one Recipe to RECIPES (and a golden row to its test).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kedit_fast.errors import MethodError


@dataclass(frozen=True)
class Recipe:
    """A closed-form editing method. Every field but the texts names a strategy of the pipeline."""

    name: str
    title: str
    source: str
    preset: str  # the preset file; methods that differ in the solve alone share one
    values: str = "block"  # where values are optimised: "block", "mlp", "attention and mlp"; or "gradients"
    key_weights: str = "bare_half"  # half the bare prompt, half the mean of the others; "mean" over all contexts
    schedule: str = "mass"  # a batch at once, layer after layer; "single": one request at a time, one layer
    preconditioner: str = "covariance"  # S = lambda C (+ lambda_n I); "null_space": S^-1 = P / L2; "identity"
    rho: str = "one"  # "one"; "emmet_lambda"; "equality" (rank-one)
    memory: bool = False  # keys of earlier batches stay in the system
    value_key: str = "bare"  # rank-one: the key whose output is set, "bare" or "mean"
    spread: str = "linear"  # residual over the layers left: 1 / n, "sqrt": 1 / sqrt(n), or "none" for one layer
    merge: bool = False  # requests on one subject share one value and one key
    shaping: str = "none"  # "rect": the largest relative changes alone; "prune": the total restrained at the end
    contexts: tuple[tuple[int, int], ...] = ((10, 5),)  # published (tokens, count) of generated prefixes
    keeps: str = "nothing"  # between batches, beside the ledger

    @property
    def needs_subject(self) -> bool:
        """Whether a request must say where its subject stands; gradients are of whole prompts."""
        return self.values != "gradients"

    def values_on(self, post_norm: bool) -> str:
        """Where values are optimised on a model with or without a norm between the MLP and the residual sum.

        No write can produce a value that lives behind a norm: in front of it, at the MLP's output, one can.
        """
        return "mlp" if self.values == "block" and post_norm else self.values

    def as_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


_KEYS = "keys of all earlier batches, with a factor: 8 (d n + n^2) bytes a layer after n edits"
_ROME_CONTEXTS = ((5, 10), (10, 10))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "rome", "Rank-one model editing", "Meng et al. 2022, arXiv 2202.05262", "rome", values="mlp",
            key_weights="mean", schedule="single", rho="equality", spread="none", contexts=_ROME_CONTEXTS,
        ),
        Recipe(
            "r-rome", "ROME with one key in both places", "Gupta et al. 2024, arXiv 2403.07175", "r-rome",
            values="mlp", key_weights="mean", schedule="single", rho="equality", value_key="mean", spread="none",
            contexts=_ROME_CONTEXTS,
        ),
        Recipe("memit", "Mass-editing memory in a transformer", "Meng et al. 2023, arXiv 2210.07229", "memit"),
        Recipe(
            "memit-sequential", "MEMIT with the keys of earlier batches in its system",
            "baseline of Fang et al. 2025 (AlphaEdit's repository, MEMIT_seq), arXiv 2410.02355", "memit-sequential",
            memory=True, keeps=_KEYS,
        ),
        Recipe(
            "memit-merge", "MEMIT with one value for all requests on a subject", "Dong et al. 2025, arXiv 2502.07322",
            "memit", merge=True,
        ),
        Recipe(
            "pmet", "Precise model editing: attention's and MLP's parts optimised together",
            "Li et al. 2024, arXiv 2308.08742", "pmet", values="attention and mlp", spread="sqrt",
        ),
        Recipe(
            "emmet", "Equality-constrained mass editing", "Gupta et al. 2024, arXiv 2403.14236", "emmet",
            rho="emmet_lambda",
        ),
        Recipe(
            "rect", "MEMIT whose update keeps its largest relative changes alone", "Gu et al. 2024, arXiv 2401.04700",
            "memit", shaping="rect",
        ),
        Recipe(
            "prune", "MEMIT whose total update has its largest singular values restrained at the end",
            "Ma et al. 2025, arXiv 2405.16821", "memit", shaping="prune",
        ),
        Recipe(
            "alphaedit", "Null-space constrained editing", "Fang et al. 2025, arXiv 2410.02355", "alphaedit",
            preconditioner="null_space", memory=True,
            keeps=f"a basis of the null space or of the rest, whichever is thinner; {_KEYS}",
        ),
        Recipe(
            "encore", "MEMIT with earlier keys, a ridge and most-probable early stopping",
            "Gupta et al. 2025, arXiv 2502.01636", "encore", memory=True, keeps=_KEYS,
        ),
        Recipe(
            "ultraedit", "Gradients as values under a running normaliser", "Gu et al. 2025, arXiv 2505.14679",
            "ultraedit", values="gradients", preconditioner="identity", spread="none", contexts=(),
            keeps="mean and variance of keys and gradients: 16 (d + out) bytes a shape of module",
        ),
    )
}  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """The recipe of a method; raises MethodError with the known names."""
    recipe = RECIPES.get(name.lower().replace("_", "-"))
    if recipe is None:
        raise MethodError(f"unknown method {name!r}: choose from {', '.join(sorted(RECIPES))}")
    return recipe
