"""One request after another in one layer: the output at the value's key becomes the value exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kedit_fast.editing.batch_run import BatchRun
from kedit_fast.editing.keys import KeyPass, KeysAndOutputs
from kedit_fast.editing.values.chunks import Columns
from kedit_fast.editing.values.slots import RecordedIteration
from kedit_fast.methods.recipe import ValueKey
from kedit_fast.models.forward import Site
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.support.dtypes import accumulation_dtype


def _at_bare_key(
    matrix: torch.Tensor, measured: KeysAndOutputs, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return measured.bare_keys[:, 0], residual


def _at_mean_key(
    matrix: torch.Tensor, measured: KeysAndOutputs, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """No prompt shows what the layer puts out at the mean key, so it is computed from the output at the bare key."""
    key = measured.keys[:, 0]
    dtype = accumulation_dtype(matrix)
    difference = matrix.to(dtype) @ (key - measured.bare_keys[:, 0]).to(matrix.device, dtype)
    return key, residual - difference.to(residual)


VALUE_KEYS: dict[
    ValueKey, Callable[[torch.Tensor, KeysAndOutputs, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
] = {"bare": _at_bare_key, "mean": _at_mean_key}
"""(edited matrix [out, d], keys and outputs, residual [out] at the bare key) -> the key [d] at which the output is set,
and the residual [out] there."""


def write_one_by_one(batch: BatchRun) -> None:
    """Write every request of the batch before the value of the next one is looked for."""
    recorded = batch.recorded_iteration()
    for index in range(len(batch.prepared)):
        _write_one(batch, index, recorded)


def _write_one(batch: BatchRun, index: int, recorded: RecordedIteration | None) -> None:
    context, recipe = batch.context, batch.context.recipe
    (layer,) = context.hparams.layers
    site = Site(layer, context.site)
    prepared, values = batch.find_values([index], layer, recorded)
    if not prepared:
        return
    with batch.timed("keys"):
        measured = KeyPass(context.view, prepared, site, recipe.key_weights, context.state_budget).at(layer)
    residual = (values.targets.to(measured.outputs) - measured.outputs)[:, 0]
    key, residual = VALUE_KEYS[recipe.value_key](context.view.edited_matrix(layer), measured, residual)
    with batch.timed("solve"):
        update, pivot = context.solver_state.solve_rank_one(layer, measured.keys[:, 0], key, residual)
    batch.residual_before += float(residual.square().sum())
    if update is None:
        batch.skipped[index] = f"{prepared[0].name}: a bad pivot, cosine {pivot:.1e}"
        batch.residual_after += float(residual.square().sum())
        return
    batch.record(values, Columns.of(prepared, None))
    written = batch.write(context.view.module_name(layer), update)
    # With one layer the output changes by Delta k_v, so no second pass is needed.
    right = written.stacked_right() if isinstance(written, ExpertUpdate) else written.right
    undone = residual.to(written.left) - written.left @ (right.T @ key.to(right))
    batch.residual_after += float(undone.square().sum())
