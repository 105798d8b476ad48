"""The preconditioner S^-1 of a layer, of each kind that a recipe names, from what a solver state knows of the layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kedit_fast.errors import StatisticsError
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.recipe import PreconditionerKind
from kedit_fast.solver.block_diagonal import EXPERT_RIDGE, expert_covariances, expert_null_spaces
from kedit_fast.solver.preconditioner import Covariance, Identity, NullSpace, Preconditioner

if TYPE_CHECKING:
    from kedit_fast.editing.solver_state import SolverState

NORM_SHARE = 0.1
"""update_norm_lambda = "auto": lambda_n as a share of lambda times the geometric mean of C's eigenvalues."""


def _identity(state: SolverState, layer: int) -> Preconditioner:
    return Identity(state.view.edited_shape(layer)[1], state.view.weight(layer).device)


def _covariance(state: SolverState, layer: int) -> Preconditioner:
    hparams, size = state.hparams, state.view.edited_shape(layer)[1]
    scale = 1.0
    if state.recipe.is_batched and hparams.mom2_update_weight != AUTO:
        scale = float(hparams.mom2_update_weight)
    automatic = hparams.update_norm_lambda == AUTO
    if not hparams.mom2_adjustment:
        norm_lambda = NORM_SHARE * scale if automatic else float(hparams.update_norm_lambda)
        return Identity(size, state.view.weight(layer).device, scale + norm_lambda)
    moment, ridge = state.moment(layer), hparams.mom2_ridge
    factored: Callable[..., Any] = Covariance.from_moment
    if state.view.experts(layer) is not None:
        ridge = ridge or EXPERT_RIDGE
        factored = functools.partial(expert_covariances, shared=state.shared_moment(layer))
    norm_lambda = (
        NORM_SHARE * scale * factored(moment, ridge).geometric_mean if automatic else float(hparams.update_norm_lambda)
    )
    dtype = getattr(torch, hparams.factor_dtype)
    return factored(moment, ridge, weight=scale, norm_lambda=norm_lambda, dtype=dtype)


def _null_space(state: SolverState, layer: int) -> Preconditioner:
    hparams = state.hparams
    ridge = 1.0 if hparams.L2 == AUTO else float(hparams.L2)
    if state.view.experts(layer) is not None:
        rule, shared = hparams.nullspace_rule, state.shared_moment(layer)
        return expert_null_spaces(state.moment(layer), hparams.nullspace_threshold, rule, ridge, shared=shared)
    override = state.null_space_overrides.get(layer)
    if override is None:
        return NullSpace.from_covariance(
            state.moment(layer), hparams.nullspace_threshold, hparams.nullspace_rule, ridge
        )
    size = state.view.edited_shape(layer)[1]
    if override.size != size:
        raise StatisticsError(f"its null space is of {override.size} dimensions, the weight takes {size} inputs")
    return replace(override, basis=override.basis.to(state.view.weight(layer).device), l2=ridge)


PRECONDITIONERS: dict[PreconditionerKind, Callable[[SolverState, int], Preconditioner]] = {
    "identity": _identity,
    "covariance": _covariance,
    "null_space": _null_space,
}
"""(state, layer) -> S^-1 of the layer."""
