"""The methods by name. To add one, add a Recipe here, a golden row to its test and a row to the page of this room."""

from __future__ import annotations

from kedit_fast.errors import MethodError
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.tuning_recipe import TuningRecipe

_KEYS = "keys of all earlier batches, with a factor: 8 (d n + n^2) bytes a layer after n edits"
_ROME_CONTEXTS = ((5, 10), (10, 10))


def _tuned(
    name: str,
    title: str,
    source: str,
    preset: str,
    tuning: TuningRecipe,
    contexts: tuple[tuple[int, int], ...] = (),
    keeps: str = "nothing",
) -> Recipe:
    """A method without a closed form."""
    return Recipe(
        name,
        title,
        source,
        preset,
        values="none",
        schedule="tuning",
        preconditioner="identity",
        spread="none",
        contexts=contexts,
        keeps=keeps,
        tuning=tuning,
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "rome",
            "Rank-one model editing",
            "Meng et al. 2022, arXiv 2202.05262",
            "rome",
            values="mlp",
            key_weights="mean",
            schedule="single",
            constraint="equality",
            spread="none",
            contexts=_ROME_CONTEXTS,
        ),
        Recipe(
            "r-rome",
            "ROME with one key in both places",
            "Gupta et al. 2024, arXiv 2403.07175",
            "r-rome",
            values="mlp",
            key_weights="mean",
            schedule="single",
            constraint="equality",
            value_key="mean",
            spread="none",
            contexts=_ROME_CONTEXTS,
        ),
        Recipe("memit", "Mass-editing memory in a transformer", "Meng et al. 2023, arXiv 2210.07229", "memit"),
        Recipe(
            "memit-sequential",
            "MEMIT with the keys of earlier batches in its system",
            "baseline of Fang et al. 2025 (AlphaEdit's repository, MEMIT_seq), arXiv 2410.02355",
            "memit-sequential",
            memory=True,
            keeps=_KEYS,
        ),
        Recipe(
            "memit-merge",
            "MEMIT with one value for all requests on a subject",
            "Dong et al. 2025, arXiv 2502.07322",
            "memit",
            merge=True,
        ),
        Recipe(
            "pmet",
            "Precise model editing: attention's and MLP's parts optimized together",
            "Li et al. 2024, arXiv 2308.08742",
            "pmet",
            values="attention and mlp",
            spread="sqrt",
            stop_rule="pmet",
        ),
        Recipe(
            "emmet",
            "Equality-constrained mass editing",
            "Gupta et al. 2024, arXiv 2403.14236",
            "emmet",
            constraint="soft_equality",
        ),
        Recipe(
            "rect",
            "MEMIT whose update keeps its largest relative changes alone",
            "Gu et al. 2024, arXiv 2401.04700",
            "memit",
            shaping="rect",
        ),
        Recipe(
            "prune",
            "MEMIT whose total update has its largest singular values restrained at the end",
            "Ma et al. 2025, arXiv 2405.16821",
            "memit",
            shaping="prune",
        ),
        Recipe(
            "alphaedit",
            "Null-space constrained editing",
            "Fang et al. 2025, arXiv 2410.02355",
            "alphaedit",
            preconditioner="null_space",
            memory=True,
            keeps=f"a basis of the null space or of the rest, whichever is thinner; {_KEYS}",
        ),
        Recipe(
            "sphere",
            "AlphaEdit without half of each update along the weight's main directions",
            "Liu et al. 2026, arXiv 2510.01172",
            "sphere",
            preconditioner="null_space",
            memory=True,
            keeps=f"a basis of the null space or of the rest, whichever is thinner; {_KEYS}",
        ),
        Recipe(
            "encore",
            "MEMIT with earlier keys, a ridge and most-probable early stopping",
            "Gupta et al. 2025, arXiv 2502.01636",
            "encore",
            memory=True,
            keeps=_KEYS,
        ),
        Recipe(
            "anyedit",
            "MEMIT with a value before each chunk of a long target",
            "Jiang et al. 2025, arXiv 2502.05628",
            "anyedit",
            anchor="target",
            contexts=(),
        ),
        Recipe(
            "anyedit-alphaedit",
            "Null-space constrained editing with a value before each chunk of a long target",
            "Jiang et al. 2025, arXiv 2502.05628",
            "anyedit-alphaedit",
            preconditioner="null_space",
            anchor="target",
            contexts=(),
        ),
        Recipe(
            "rlsedit",
            "Recursive least squares over all edits: MEMIT with earlier keys and a ridge",
            "Wang et al. 2026, arXiv 2601.15686",
            "rlsedit",
            memory=True,
            keeps=_KEYS,
        ),
        Recipe(
            "nas",
            "AlphaEdit with values scaled to a norm of the unedited model",
            "Liu et al. 2026, arXiv 2602.02543",
            "nas",
            preconditioner="null_space",
            memory=True,
            keeps=f"a basis of the null space or of the rest, whichever is thinner; {_KEYS}",
        ),
        Recipe(
            "ultraedit",
            "Gradients as values under a running normalizer",
            "Gu et al. 2025, arXiv 2505.14679",
            "ultraedit",
            values="gradients",
            schedule="gradients",
            preconditioner="identity",
            spread="none",
            contexts=(),
            keeps="mean and variance of keys and gradients: 16 (d + out) bytes a shape of module",
        ),
        Recipe(
            "stableedit",
            "UltraEdit with whitened gradients, a ridge and statistics that can be warmed up",
            "Ma et al. 2026, arXiv 2605.11836",
            "stableedit",
            values="gradients",
            schedule="gradients",
            preconditioner="identity",
            spread="none",
            normalizer="whitened",
            contexts=(),
            keeps="mean and variance of keys and gradients, covariance of gradients: 16 (d + out) + 8 out^2 bytes a "
            "shape of module; 4 out bytes a token, to undo batches",
        ),
        _tuned(
            "locft-bf",
            "Fine-tuning of one matrix on all requests at once, in epochs of mini-batches",
            "Yang et al. 2026, arXiv 2509.22072",
            "locft-bf",
            TuningRecipe(order="breadth", stop="below and skip", eos=True),
        ),
        _tuned(
            "ft-l",
            "Fine-tuning of one matrix on the last prompt token's distribution, within a box",
            "baseline of Meng et al. 2022, arXiv 2202.05262",
            "ft",
            TuningRecipe(likelihood="last", stop="below and skip"),
        ),
        _tuned(
            "ft-m",
            "Fine-tuning of one matrix on the target's tokens",
            "baseline of Zhang et al. 2024, arXiv 2401.01286",
            "ft",
            TuningRecipe(stop="below and skip"),
        ),
        _tuned(
            "dinm",
            "Detoxification: the layer in which a safe and an unsafe answer differ most is tuned to the safe one",
            "Wang et al. 2024, arXiv 2403.14472",
            "dinm",
            TuningRecipe(where="located", extra_rows="general", extra_term="kl"),
        ),
        _tuned(
            "wise",
            "A copy of one matrix in which each edit changes few entries, and a router by its activations",
            "Wang et al. 2024, arXiv 2405.14768",
            "wise",
            TuningRecipe(
                extra_rows="irrelevant",
                extra_term="margin",
                optimizer="sgd",
                mask="entries",
                stop="plateau",
                placement="replaces",
                router="activation",
                decoding="greedy",
            ),
            contexts=((5, 5), (10, 5)),
            keeps="a memory beside the weights: the tuned copies of the matrix, a threshold each",
        ),
        _tuned(
            "memoir",
            "A matrix beside one of the model's, of which each edit changes the columns of its features",
            "Wang et al. 2025, arXiv 2506.07899",
            "memoir",
            TuningRecipe(
                trains="residual",
                extra_rows="irrelevant",
                optimizer="sgd",
                mask="features",
                stop="plateau",
                placement="adds",
                router="fingerprint",
                decoding="greedy",
            ),
            contexts=((5, 5), (10, 5)),
            keeps="a memory beside the weights: one matrix, and d / 8 bytes an edit",
        ),
        _tuned(
            "grace",
            "A codebook of a layer's inputs and of the outputs that take the place of its own",
            "Hartvigsen et al. 2023, arXiv 2211.11031",
            "grace",
            TuningRecipe(trains="value", order="codebook", stop="used up", placement="token", router="nearest key"),
            keeps="a memory beside the weights: 4 (d + out) bytes an entry",
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a method; raises MethodError with the known names."""
    recipe = RECIPES.get(name.lower().replace("_", "-"))
    if recipe is None:
        raise MethodError(f"unknown method {name!r}: choose from {', '.join(sorted(RECIPES))}")
    return recipe
