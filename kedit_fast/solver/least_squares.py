"""Delta = R (rho I + K^T G)^-1 G^T with G = S^-1 K: every closed-form method's update."""

from __future__ import annotations

import torch

from kedit_fast.errors import InvalidArgumentError, SolveError
from kedit_fast.ops import mirror_, spd_solve, symmetric_rank_k_update_
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.preconditioners import Preconditioner, require_finite

PRIMAL_ABOVE = 0.67  # u / d above which refactoring S costs fewer flops than two solves with its kept factor


def ridge_update(
    preconditioner: Preconditioner,
    keys: torch.Tensor,
    residuals: torch.Tensor,
    rho: float,
    *,
    form: str = "auto",
) -> LowRankUpdate:
    """The update that minimises |Delta K - R|^2 + rho tr(Delta S Delta^T).

    Args:
        preconditioner: S^-1.
        keys: K [d, u].
        residuals: R [out, u].
        rho: weight of what should not change; for MEMIT the published `mom2_update_weight`, lambda.
        form: "dual" (u x u system), "primal" (d x d system) or "auto" (primal when u > 0.67 d).

    Returns:
        LowRankUpdate with left = R and right = (rho S + K K^T)^-1 K, fp64.

    Raises:
        SolveError: input or solution not finite, or a system that is not positive definite.

    Cost: dual 2 d^2 u + 2 d u^2 + u^3 / 3 flops; primal d^2 u + d^3 / 3 + 2 d^2 u.
    Source: MEMIT (arXiv 2210.07229, eq. 14); the dual form is Woodbury's identity.
    """
    keys, residuals = _inputs(keys, residuals)
    d, u = keys.shape
    if form not in ("auto", "dual", "primal"):
        raise InvalidArgumentError(f"form must be auto, dual or primal; got {form!r}")
    if not rho > 0:
        raise InvalidArgumentError(f"rho must be positive; got {rho}")
    if form == "primal" or (form == "auto" and u > PRIMAL_ABOVE * d):
        system = rho * preconditioner.matrix().to(keys)
        symmetric_rank_k_update_(system, keys.T.contiguous())
        right = spd_solve(mirror_(system), keys)
    else:
        g = preconditioner.apply(keys)  # [d, u]
        right = spd_solve(keys.T @ g, g.T.contiguous(), rho).T  # [d, u]
    require_finite("the solution", right)
    return LowRankUpdate(residuals, right)


def rank_one_equality(
    preconditioner: Preconditioner,
    key_update: torch.Tensor,
    key_value: torch.Tensor,
    residual: torch.Tensor,
    *,
    on_bad_pivot: str = "raise",
    least_pivot: float = 1e-6,
) -> tuple[LowRankUpdate | None, float]:
    """The rank-one update with (W + Delta) k_v = v*: Delta = (v* - W k_v) g^T / (k_v^T g), g = S^-1 k_u.

    Args:
        preconditioner: S^-1.
        key_update: k_u [d], the key the direction is made from (ROME: the mean over contexts).
        key_value: k_v [d], the key whose output is set (ROME: the bare prompt; R-ROME: k_u).
        residual: v* - W k_v, [out].
        on_bad_pivot: "raise", "skip" (no update) or "allow" when the pivot is not above `least_pivot`.
        least_pivot: of the pivot divided by |k_v| |g|, the cosine of the two.

    Returns:
        the update (None when skipped) and the relative pivot.

    Raises:
        SolveError: input not finite, or a bad pivot with "raise".

    Source: ROME (arXiv 2202.05262, eq. 2), its released `compute_u.py` and `compute_v.py`.
    """
    keys, residuals = _inputs(torch.stack([key_update, key_value], 1), torch.stack([residual, residual], 1))
    if on_bad_pivot not in ("raise", "skip", "allow"):
        raise InvalidArgumentError(f"on_bad_pivot must be raise, skip or allow; got {on_bad_pivot!r}")
    g = preconditioner.apply(keys[:, :1])  # [d, 1]
    g = g / g.norm()
    key = keys[:, 1]
    pivot = float(key @ g[:, 0])
    relative = pivot / float(key.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if not relative > least_pivot and on_bad_pivot != "allow":
        if on_bad_pivot == "skip":
            return None, relative
        raise SolveError(
            f"the pivot k_v^T S^-1 k_u is {relative:.2e} of |k_v| |S^-1 k_u|: the update would be huge or reversed "
            "(on_bad_pivot = skip leaves such an edit out, allow writes it)"
        )
    update = LowRankUpdate(residuals[:, :1] / pivot, g)
    if not update.is_finite():
        raise SolveError("the rank-one update is not finite")
    return update, relative


def _inputs(keys: torch.Tensor, residuals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if keys.ndim != 2 or residuals.ndim != 2 or keys.shape[1] != residuals.shape[1]:
        raise InvalidArgumentError(
            f"keys must be [d, u] and residuals [out, u]; got {list(keys.shape)} and {list(residuals.shape)}"
        )
    require_finite("keys", keys)
    require_finite("residuals", residuals)
    return keys.double(), residuals.double()
