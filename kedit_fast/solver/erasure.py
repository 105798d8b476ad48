"""Erasing a concept from what a linear layer puts out: equality constraints whose residuals undo the outputs.

LEACE folded into a layer and ProFS are EMMET with rho = 0 and R = -W K: Delta K = -W K, of all such Delta the one with
the least tr(Delta S Delta^T). They differ in the directions K and in S.
"""

from __future__ import annotations

import torch

from kedit_fast.errors import InvalidArgumentError, SolveError
from kedit_fast.solver.least_squares import solve_update
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.preconditioner import Preconditioner, require_finite
from kedit_fast.support.torch_state import plain_torch

DEPENDENT = 1e-9  # singular value, as a share of the largest, below which whitened directions depend on the others


@plain_torch()
def label_directions(keys: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The covariance of a layer's inputs with their labels, Sigma_xz [d, c]: LEACE's directions, fp64.

    Column z is p_z (mean of the inputs with label z - mean of all), with p_z the share of that label. The columns sum
    to zero, so they span c - 1 directions at most.

    Args:
        keys: X [d, n], an input a column.
        labels: [n] integers; the c labels are the distinct ones, in order.

    Raises:
        InvalidArgumentError: shapes that do not match, or one label alone.
        SolveError: inputs that are not finite.
    """
    _check(keys, labels)
    names, places = labels.unique(return_inverse=True)
    if len(names) < 2:
        raise InvalidArgumentError(f"a concept needs two labels or more; got {len(names)}")
    inputs = keys.double()
    member = torch.nn.functional.one_hot(places, len(names)).to(inputs)
    shares = member.mean(0)
    return (inputs @ member) / inputs.shape[1] - inputs.mean(1, keepdim=True) * shares


@plain_torch()
def difference_directions(keys: torch.Tensor, others: torch.Tensor, rank: int = 1) -> torch.Tensor:
    """The top left singular vectors [d, rank] of paired differences of inputs, fp64: ProFS's directions.

    Args:
        keys: [d, n] inputs that show the concept.
        others: [d, n] inputs of texts that differ from these by the concept alone, in the same order.
        rank: how many directions.
    """
    if keys.shape != others.shape or keys.ndim != 2:
        raise InvalidArgumentError(f"pairs need the same shape [d, n]; got {list(keys.shape)} and {list(others.shape)}")
    if not 1 <= rank <= min(keys.shape):
        raise InvalidArgumentError(f"rank must be 1 to {min(keys.shape)}; got {rank}")
    require_finite("inputs", keys)
    require_finite("inputs", others)
    return torch.linalg.svd(keys.double() - others.double(), full_matrices=False).U[:, :rank]


@plain_torch()
def shrunk_covariance(keys: torch.Tensor) -> torch.Tensor:
    """The centered covariance of inputs X [d, n], shrunk towards a multiple of I: [d, d] fp64, positive definite.

    a C + (1 - a) mean(diag C) I with C = cov(X) (sums divided by n) and a = 1 - (tr C)^2 / (n (|C|^2 - (tr C)^2 / d)),
    at least 0: the optimal linear shrinkage for a target of unknown scale.

    Source: Bodnar, Gupta and Parolya 2014 (arXiv 1308.2608), which LEACE (arXiv 2306.03819) uses, too.
    """
    if keys.ndim != 2 or keys.shape[1] < 2:
        raise InvalidArgumentError(f"a covariance needs two inputs [d, n] or more; got {list(keys.shape)}")
    require_finite("inputs", keys)
    d, n = keys.shape
    covariance = torch.cov(keys.double(), correction=0).reshape(d, d)
    trace = float(covariance.trace())
    if not trace > 0:
        raise SolveError("the inputs are all the same: they have no covariance")
    spread = float(covariance.square().sum()) - trace**2 / d
    share = max(0.0, 1 - trace**2 / (n * spread)) if spread > 0 else 0.0
    return share * covariance + (1 - share) * trace / d * torch.eye(d, dtype=torch.float64, device=keys.device)


@plain_torch()
def erasing_update(
    weight: torch.Tensor, directions: torch.Tensor, preconditioner: Preconditioner, still: torch.Tensor | None = None
) -> LowRankUpdate:
    """The update after which the layer puts out nothing along some directions of its inputs: (W + Delta) K = 0.

    Of all such updates the one with the least tr(Delta S Delta^T). With LEACE's directions Sigma_xz the outputs have no
    covariance with the labels any more, so that no linear classifier predicts these from them better than by a
    constant; this holds for any S. With S = Sigma_xx it is LEACE's map folded into the weight, without its bias and
    without the constraint of its trace.

    Args:
        weight: W [out, d].
        directions: K [d, c]; columns that depend on others are no further constraints.
        preconditioner: S^-1.
        still: m [d] with (W + Delta) m = W m, such as the mean input: in place of LEACE's bias, it leaves the mean
            output as it is.

    Returns:
        LowRankUpdate of rank c at most, fp64.

    Raises:
        SolveError: directions that are zero or not finite, or `still` among them.

    Example:
        >>> keys, labels = torch.randn(6, 40), torch.arange(40) % 2
        >>> weight, directions = torch.randn(4, 6), label_directions(keys, labels)
        >>> update = erasing_update(weight, directions, Identity(6))
        >>> float(((weight + update.dense()) @ directions).abs().max()) < 1e-9
        True
    """
    if directions.ndim != 2 or weight.ndim != 2 or weight.shape[1] != directions.shape[0]:
        raise InvalidArgumentError(f"directions must be [{weight.shape[-1]}, c]; got {list(directions.shape)}")
    require_finite("directions", directions)
    _, sizes, vh = torch.linalg.svd(preconditioner.whiten(directions), full_matrices=False)
    independent = sizes > DEPENDENT * sizes[0] if len(sizes) else sizes > 0
    if not bool(independent.any()):
        raise SolveError("the directions are zero: the inputs do not depend on the concept")
    keys = directions.to(vh) @ (vh[independent].T / sizes[independent])  # whitened they are orthonormal
    residuals = -(weight.double() @ keys.to(weight.device)).to(keys.device)
    count = keys.shape[1]
    if still is not None:
        column = still.to(keys)[:, None]
        keys, residuals = torch.cat([keys, column], 1), torch.cat([residuals, torch.zeros_like(residuals[:, :1])], 1)
    update = solve_update(keys, residuals, preconditioner, rho=0.0, form="dual")
    return LowRankUpdate(update.left[:, :count], update.right[:, :count])


def _check(keys: torch.Tensor, labels: torch.Tensor) -> None:
    if keys.ndim != 2 or labels.shape != keys.shape[1:] or labels.is_floating_point():
        raise InvalidArgumentError(
            f"inputs must be [d, n] and labels [n] integers; got {list(keys.shape)}, {labels.dtype} "
            f"{list(labels.shape)}"
        )
    require_finite("inputs", keys)
