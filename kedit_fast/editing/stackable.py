"""Which methods and hyper-parameters go with stacked experts, and with shared experts behind a gate."""

from __future__ import annotations

from collections.abc import Mapping

from kedit_fast.errors import MethodError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.models.view import ModelView
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.support.messages import comma_list


def require_stackable(
    view: ModelView, recipe: Recipe, hparams: Hparams, null_spaces: Mapping[int, NullSpace] | None = None
) -> None:
    """Raise MethodError when a method, or a hyper-parameter, does not go with the experts of an edited layer."""
    stacks = {layer: stack for layer in hparams.layers if (stack := view.experts(layer)) is not None}
    problems = {
        f"{recipe.name} tunes one matrix by gradient steps": recipe.tuning is not None,
        f"memory_window = {hparams.memory_window} folds earlier keys into a d x d system": bool(hparams.undo_window),
        "memory_form = primal is a d x d system": recipe.memory and hparams.memory_form == "primal",
        "nullspace_rule = absolute compares eigenvalues that depend on how often an expert is chosen (set "
        "nullspace_rule to relative or energy, and nullspace_threshold for it)": recipe.uses_null_space
        and hparams.nullspace_rule == "absolute",
        "a null space that was given (null_spaces, a projector file) is of one matrix": bool(
            stacks.keys() & set(null_spaces or ())
        ),
        "the output at a mean key is not known where experts have biases (method rome sets it at the bare key)": (
            recipe.value_key == "mean" and any(stack.module.has_bias for stack in stacks.values())
        ),
    }
    if view.is_gated and recipe.tuning is not None:
        raise MethodError(
            f"{view.spec.edit} is of shared experts behind a gate, and {recipe.name} tunes one matrix by gradient "
            "steps: use a closed-form method"
        )
    if stacks and (problem := next((text for text, is_so in problems.items() if is_so), "")):
        raise MethodError(f"layers {comma_list(stacks)} have experts, whose keys are stacked: {problem}")
