"""Delta = R (rho I + K^T G)^-1 G^T with G = S^-1 K: every closed-form method's update."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import torch

from kedit_fast.errors import InvalidArgumentError, SolveError, StatisticsError
from kedit_fast.ops import mirror_, spd_solve, symmetric_rank_k_update_
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.output_metric import OutputMetric
from kedit_fast.solver.preconditioner import Preconditioner, require_finite
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
SystemForm = Literal["auto", "dual", "primal"]
"""Which system is solved: u x u (dual), d x d (primal), or the cheaper one."""
OnBadPivot = Literal["raise", "skip", "allow"]
"""What a rank-one edit does whose pivot is not positive enough."""
PRIMAL_ABOVE = 0.67  # u / d above which a d x d system costs fewer flops than one of the edits
ALIKE = 1e-9  # exact constraints are refused for a key whose squared share outside the span of the others is below this
SAME_KEY = 0.99  # cosine above which two keys count as the same
CROWDED_ABOVE = 0.5  # edits and unmoved columns, as a share of d, above which an update has little freedom left
SPARSE_CONDITION = 1e4  # of a system above which a sparse solution would lose digits in float32
COLUMNS_AT_ONCE = 1024  # whose cosines with all others are in memory together
SAME_SPAN = 1e-10  # singular value, as a share of the largest, below which a direction is no part of a span


@plain_torch()
def solve_update(
    keys: torch.Tensor,
    residuals: torch.Tensor,
    preconditioner: Preconditioner,
    rho: float = 1.0,
    *,
    weights: torch.Tensor | None = None,
    unmoved: torch.Tensor | None = None,
    form: SystemForm = "auto",
    output_metric: OutputMetric | None = None,
    sparse: bool = False,
) -> LowRankUpdate:
    """The update that minimizes sum_i w_i |Delta k_i - r_i|^2 + tr(B Delta (K_p K_p^T + rho S) Delta^T).

    For rho = 0, Delta K = R and Delta K_p = 0.

    Args:
        keys: K [d, u].
        residuals: R [out, u].
        preconditioner: S^-1; for MEMIT S = lambda C and rho = 1, for EMMET S = lambda C and rho = lambda_E.
        rho: weight of what should not change. 0 makes every edit an equality constraint and gives, of all updates that
            satisfy them, the one with the least tr(Delta S Delta^T): the limit of EMMET as lambda_E -> 0.
        weights: w [u], one per edit, positive; None for 1. They have no meaning with rho = 0.
        unmoved: K_p [d, p], inputs whose output should stay as it is: edits whose residual is 0. None for none. p may
            exceed d. A warning is logged when u + p > d / 2.
        form: "dual" (u x u system), "primal" (d x d, of whitened keys) or "auto" (primal when u + p > 0.67 d).
        output_metric: B [out, out], which weighs the damage; None for I.
        sparse: give the same Delta with factors whose right one is S^-1 K, and so zero in the blocks of a
            `BlockDiagonal` in which a key is zero, where that is possible: in the dual form, with rho > 0, without
            `unmoved` and `output_metric`, and if the condition number of the system is at most 1e4.

    Returns:
        LowRankUpdate of rank u with left = R and right = S_p^-1 K (rho I + K^T S_p^-1 K)^-1, fp64, where
        rho S_p = rho S + K_p K_p^T. With an output metric left is what `OutputMetric.left` returns. A sparse one has
        left = R (rho I + K^T S^-1 K)^-1 and right = S^-1 K.

    Raises:
        SolveError: input or solution not finite, or a system that is not positive definite: keys that are alike, or
            more constraints than dimensions, with rho = 0.

    Cost: the whitening of u keys and back; dual d u^2 + u^3 / 3 + 2 u^2 d flops; primal d^2 u + d^3 / 3 +
        2 d^2 u. With `unmoved` u + p stands for u, and the last term is 2 (u + p) u d.
    Source: MEMIT (arXiv 2210.07229, eq. 14), EMMET (arXiv 2403.14236, eq. 12); the dual form is Woodbury's identity.

    Example:
        >>> keys, residuals = torch.randn(16, 3), torch.randn(8, 3)
        >>> update = solve_update(keys, residuals, Identity(16), rho=0.0)  # exact: Delta K = R
        >>> torch.allclose(update.dense() @ keys.double(), residuals.double())
        True
    """
    keys, residuals = checked(keys, residuals, weights)
    d, u = keys.shape
    unmoved = checked_unmoved(unmoved, keys)
    check_form(form)
    if not rho >= 0 or rho == float("inf"):
        raise InvalidArgumentError(f"rho must be finite and not negative; got {rho}")
    if rho == 0 and weights is not None:
        raise InvalidArgumentError("weights have no meaning where every edit is an equality constraint (rho = 0)")
    coordinates = preconditioner.whiten(keys)  # [d, u]
    others = preconditioner.whiten(unmoved)  # [d, p]
    p = others.shape[1]
    if form == "primal" or (form == "auto" and rho > 0 and u + p > PRIMAL_ABOVE * d):
        system = torch.zeros(d, d, dtype=torch.float64, device=coordinates.device)
        system.diagonal().fill_(rho)
        for columns in (coordinates, others):
            symmetric_rank_k_update_(system, columns.T.contiguous())
        solved = spd_solve(mirror_(system), coordinates)
    else:
        part = coordinates  # of the keys, what the unmoved columns leave free
        gram = coordinates.T @ coordinates  # [u, u]
        scale = gram.diagonal().clone()
        if p and rho == 0:
            basis, values, _ = torch.linalg.svd(others, full_matrices=False)
            basis = basis[:, values > SAME_SPAN * values[0]]
            part = coordinates - basis @ (basis.T @ coordinates)
            gram = part.T @ part
        elif p:
            across = others.T @ coordinates  # [p, u]
            solution = spd_solve(others.T @ others, across, rho)
            part = coordinates - others @ solution
            gram = gram - across.T @ solution
            gram = (gram + gram.T) / 2
        if rho == 0:
            _require_apart(gram, scale)
        if sparse and rho > 0 and not p and output_metric is None and _is_well_conditioned(gram, rho):
            left, right = spd_solve(gram, residuals.T.contiguous(), rho).T, preconditioner.unwhiten(coordinates)
            require_finite("the solution", right)
            require_finite("the solution", left)
            return LowRankUpdate(left.contiguous(), right)
        solved = spd_solve(gram, part.T.contiguous(), rho).T
    right = preconditioner.unwhiten(solved)
    left = residuals if output_metric is None else output_metric.left(residuals, coordinates.T @ solved)
    require_finite("the solution", right)
    require_finite("the solution", left)
    return LowRankUpdate(left, right)


def system_flops(d: int, u: int, p: int = 0, form: SystemForm = "auto") -> float:
    """Flops of the system of `solve_update` between whitening and its way back, for keys [d, u] and p unmoved columns.

    Multiplication and addition count as one each, and of a symmetric product one half is needed. In the dual form these
    are d n^2 for K^T K, n^3 / 3 for its factor and 2 u n d for the solutions, with n = u + p; in the primal one d^2 n,
    d^3 / 3 and 2 d^2 u.

    Args:
        d: inputs of the layer.
        u: columns with a residual.
        p: columns without one.
        form: as in `solve_update`.

    Example:
        >>> system_flops(3, 2, form="dual") == 3 * 2**2 + 2**3 / 3 + 2 * 2 * 2 * 3
        True
        >>> system_flops(3, 1, 2) == system_flops(3, 1, 2, form="primal")
        True
    """
    n = u + p
    if form == "primal" or (form == "auto" and n > PRIMAL_ABOVE * d):
        return d * d * n + d**3 / 3 + 2.0 * d * d * u
    return d * n * n + n**3 / 3 + 2.0 * u * n * d


@plain_torch()
def scale_of_share(keys: torch.Tensor, preconditioner: Preconditioner, share: float, rho: float = 1.0) -> float:
    """The factor of S with which an edit alone leaves `share` of its residual undone, in the median over keys.

    Alone, an edit with key k leaves rho / (rho + k^T S^-1 k) of its residual. So for a factor c of S the share is
    rho c / (rho c + q) with q = k^T S^-1 k, whatever the scale of keys and S.

    Args:
        keys: K [d, u].
        preconditioner: S^-1.
        share: between 0 and 1.
        rho: as in `solve_update`; with 0 nothing is left undone, and the factor is 1.

    Raises:
        StatisticsError: the keys have no part in the directions that S leaves free, or q is not finite.

    Example:
        >>> keys = torch.randn(16, 5)
        >>> scale = scale_of_share(keys, Identity(16), share=0.2)
        >>> round(scale / (scale + float(keys.double().square().sum(0).median())), 3)
        0.2
    """
    if rho == 0:
        return 1.0
    q = float(preconditioner.whiten(keys).square().sum(0).quantile(0.5))
    if not 0 < q < float("inf"):
        raise StatisticsError(
            f"the median over the batch's keys of k^T S^-1 k is {q:.1e}: they have no part in the directions that the "
            "method leaves free"
        )
    return share / (1 - share) * q / rho


@plain_torch()
def rank_one_equality(
    preconditioner: Preconditioner,
    key_update: torch.Tensor,
    key_value: torch.Tensor,
    residual: torch.Tensor,
    *,
    on_bad_pivot: OnBadPivot = "raise",
    least_pivot: float = 1e-6,
) -> tuple[LowRankUpdate | None, float]:
    """The rank-one update with (W + Delta) k_v = v*: Delta = (v* - W k_v) g^T / (k_v^T g), g = S^-1 k_u.

    Args:
        preconditioner: S^-1.
        key_update: k_u [d], the key that gives the direction (ROME: the mean over contexts).
        key_value: k_v [d], the key whose output is set (ROME: the bare prompt; R-ROME: k_u).
        residual: v* - W k_v, [out].
        on_bad_pivot: what to do when the pivot is not above `least_pivot`: "raise", "skip" (no update) or "allow".
        least_pivot: bound of the relative pivot k_v^T g / (|k_v| |g|), a cosine.

    Returns:
        The update (None when skipped) and the relative pivot.

    Raises:
        SolveError: input not finite, or a bad pivot with "raise".

    Source: ROME (arXiv 2202.05262, eq. 2), its released `compute_u.py` and `compute_v.py`; R-ROME (arXiv 2403.07175).
    """
    keys, residuals = checked(torch.stack([key_update, key_value], 1), torch.stack([residual, residual], 1))
    if on_bad_pivot not in get_args(OnBadPivot):
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


@plain_torch()
def collisions(keys: torch.Tensor, above: float = SAME_KEY) -> list[tuple[int, int]]:
    """Pairs of columns of `keys` [d, u] whose cosine is above a bound: requests that compete for one key.

    Cost: d u^2 flops; the cosines of 1024 columns with all later ones are in memory at a time.
    """
    unit = torch.nn.functional.normalize(keys, dim=0)
    pairs: list[tuple[int, int]] = []
    for begin in range(0, unit.shape[1], COLUMNS_AT_ONCE):
        cosines = unit[:, begin : begin + COLUMNS_AT_ONCE].T @ unit[:, begin:]  # [b, u - begin]
        pairs += [(begin + i, begin + j) for i, j in torch.nonzero(torch.triu(cosines, 1) > above).tolist()]
    return pairs


@plain_torch()
def merge_columns(
    keys: torch.Tensor, residuals: torch.Tensor, groups: Sequence[Hashable]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One column for each group, the mean of its members' columns, in the order of first members.

    Args:
        keys: K [d, u].
        residuals: R [out, u].
        groups: u names; columns with the same name belong together.

    Returns:
        K [d, t] and R [out, t].

    Source: MEMIT-Merge (arXiv 2502.07322): edits on one subject have one key, so they must share one value.
    """
    if len(groups) != keys.shape[1]:
        raise InvalidArgumentError(f"{len(groups)} group names for {keys.shape[1]} keys")
    first: dict[Hashable, int] = {}
    group = torch.tensor([first.setdefault(name, len(first)) for name in groups], device=keys.device)
    share = torch.zeros(keys.shape[1], len(first), dtype=keys.dtype, device=keys.device)
    share[torch.arange(len(groups), device=keys.device), group] = 1.0
    share /= share.sum(0, keepdim=True)
    return keys @ share, residuals @ share.to(residuals)


def check_form(form: str) -> None:
    """Raise InvalidArgumentError unless `form` is a SystemForm."""
    if form not in get_args(SystemForm):
        raise InvalidArgumentError(f"form must be auto, dual or primal; got {form!r}")


def _is_well_conditioned(gram: torch.Tensor, rho: float) -> bool:
    """Whether the condition number of rho I + Gram [u, u] is at most SPARSE_CONDITION."""
    if not gram.numel():
        return True
    values = torch.linalg.eigvalsh(gram)
    return float(values[-1]) + rho <= SPARSE_CONDITION * (float(values[0].clamp(min=0)) + rho)


def _require_apart(gram: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise SolveError when a key lies in the span of others: equality constraints would contradict each other.

    Args:
        gram: [u, u] products of the keys, less their parts in the span of unmoved columns.
        scale: [u] squared norms of the whole keys.
    """
    scale = scale.clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    factor, info = torch.linalg.cholesky_ex(gram / scale[:, None] / scale)
    outside = factor.diagonal().square()  # of each key, the share outside the span of those before it
    bad = int(info) - 1 if int(info) else int(outside.argmin())
    if int(info) or float(outside[bad]) < ALIKE:
        raise SolveError(
            f"key {bad + 1} of {len(gram)} lies in the span of those before it, as keys of one subject do, or of "
            "columns that must not move: their edits cannot all be exact; merge them, or let rho (EMMET's lambda) be "
            "positive"
        )


def checked_unmoved(unmoved: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    """Columns [d, p] that must not move, fp64; p = 0 for None. Warns when they and the keys [d, u] leave little free.

    Raises:
        InvalidArgumentError, SolveError: another shape, or values that are not finite.
    """
    d, u = keys.shape
    if unmoved is None:
        return keys.new_empty(d, 0)
    if unmoved.ndim != 2 or unmoved.shape[0] != d:
        raise InvalidArgumentError(f"unmoved must be [{d}, p]; got {list(unmoved.shape)}")
    require_finite("unmoved", unmoved)
    if u + unmoved.shape[1] > CROWDED_ABOVE * d:
        _log.warning(
            "%d edits and %d columns that must not move share %d dimensions: so many leave little room between them, "
            "and updates grow",
            u,
            unmoved.shape[1],
            d,
        )
    return unmoved.to(keys)


def checked(
    keys: torch.Tensor, residuals: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and residuals in fp64, each column times the square root of its weight.

    Raises:
        InvalidArgumentError, SolveError: shapes that do not match, weights that are not positive, or values that are
            not finite.
    """
    if keys.ndim != 2 or residuals.ndim != 2 or keys.shape[1] != residuals.shape[1]:
        raise InvalidArgumentError(
            f"keys must be [d, u] and residuals [out, u]; got {list(keys.shape)} and {list(residuals.shape)}"
        )
    require_finite("keys", keys)
    require_finite("residuals", residuals)
    keys, residuals = keys.double(), residuals.double()
    if weights is None:
        return keys, residuals
    if weights.shape != keys.shape[1:] or not bool((weights > 0).all() and torch.isfinite(weights).all()):
        raise InvalidArgumentError(f"weights must be {list(keys.shape[1:])} positive numbers; got {weights}")
    root = weights.to(keys).sqrt()
    return keys * root, residuals * root
