"""How some methods change an update before or after it is written: masks, attenuated directions, spectra, limits."""

from __future__ import annotations

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import magnitude_bound
from kedit_fast.solver.expert_update import ExpertUpdate, stacked_matrix
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, MaskedUpdate, Update
from kedit_fast.support.torch_state import plain_torch

RECT_EPSILON = 1e-8  # added to the weight, as published and as `magnitude_bound` has it
ROW_EPSILON = 1e-8  # added to the norms of the weight's rows, as published


@plain_torch()
def rect(update: LowRankUpdate, weight: torch.Tensor, share: float = 0.4) -> MaskedUpdate:
    """The entries with the largest relative change |Delta / (W + 1e-8)|: a share of all entries.

    Args:
        update: Delta [out, in].
        weight: W [out, in] before the write.
        share: in (0, 1]; entries that tie with the smallest one written are written too.

    Cost: the dense Delta and one selection over its entries.
    Source: RECT (arXiv 2401.04700), its released `memit_rect_main.py`.
    """
    if not 0 < share <= 1:
        raise InvalidArgumentError(f"share must be in (0, 1]; got {share}")
    change = update.dense()
    rank = max(1, int(change.numel() * (1 - share)))  # of the smallest one written, counted from the smallest entry
    bound = magnitude_bound(change, change.numel() - rank + 1, weight.to(change.device))
    if bool(bound.isnan()):
        raise InvalidArgumentError("rect: Delta / (W + 1e-8) has entries that are NaN, so none is the largest")
    change = change.div_(weight.to(change) + RECT_EPSILON).abs_()
    return MaskedUpdate.from_mask(update, change >= bound)


def spectrum(update: LowRankUpdate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition U [out, r], s [r], V [in, r] of Delta, from the QR of its factors, fp64.

    Cost: 2 (out + in) k^2 flops and an SVD of a k x k matrix, instead of one of out x in.
    """
    update = update.compacted()
    q_left, r_left = torch.linalg.qr(update.left.double())
    q_right, r_right = torch.linalg.qr(update.right.double())
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, q_right @ vh.T


@plain_torch()
def compact(update: Update, tolerance: float = 0.0, rank: int | None = None) -> LowRankUpdate | ExpertUpdate:
    """The fewest factors that give Delta within a tolerance; each direction's norm is split evenly between both sides.

    Of experts, those of their stacked matrix [out, E in]; an `ExpertUpdate` stays as it is where these would take more
    memory, unless a rank is given.

    Args:
        update: Delta [out, in], or [E, out, in] of experts.
        tolerance: bound of |Delta - Delta'| / |Delta| (Frobenius); 0 drops only what is rounding.
        rank: upper limit of the number of factors, whatever the error; None for no limit.

    Cost: that of `spectrum`; of a masked or dense update an SVD of Delta.
    """
    if len(update.shape) == 3:
        return _compact_experts(update, tolerance, rank)
    if not isinstance(update, LowRankUpdate):
        u, s, vh = torch.linalg.svd(update.dense().double(), full_matrices=False)
        v = vh.T
    else:
        u, s, v = spectrum(update.to(torch.float64))
    sizes = s.cpu()  # torch's cumulative sums on a GPU have no fixed order
    left_out = sizes.square().flip(0).cumsum(0).flip(0).sqrt()  # |Delta - Delta'| when the directions from here on go
    rounding = torch.finfo(torch.float64).eps * max(update.shape)
    k = int((left_out > max(tolerance, rounding) * sizes.norm()).sum())
    k = k if rank is None else min(k, rank)
    root, dtype = s[:k].sqrt(), (update.delta if isinstance(update, DenseUpdate) else update.left).dtype
    return LowRankUpdate((u[:, :k] * root).to(dtype), (v[:, :k] * root).to(dtype))


def _compact_experts(update: Update, tolerance: float, rank: int | None) -> ExpertUpdate:
    """`compact` of an update [E, out, in]."""
    if isinstance(update, ExpertUpdate):
        stacked: Update = LowRankUpdate(update.left, update.stacked_right())
    else:
        stacked = DenseUpdate(stacked_matrix(update.dense()))
    smaller = compact(stacked, tolerance, rank)
    assert isinstance(smaller, LowRankUpdate)
    compacted = ExpertUpdate.of_stacked(smaller, update.shape[0])
    if isinstance(update, ExpertUpdate) and rank is None:
        sizes = [one.left.numel() + one.right.numel() for one in (compacted, update)]
        return compacted if sizes[0] < sizes[1] else update
    return compacted


@plain_torch()
def spectral_norm(matrix: torch.Tensor) -> float:
    """The largest singular value of W [out, in], from the eigenvalues of its smaller Gram matrix, fp64."""
    wide = matrix.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()) if gram.numel() else 0.0


@plain_torch()
def prune(total: LowRankUpdate, largest: float) -> LowRankUpdate:
    """What to add to W_0 + Delta so that Delta's singular values above `largest` are restrained.

    s > s_0 becomes log s - log s_0 + s_0; the others do not change. The result is the difference, whose rank is the
    number of values that changed. W_0 + Delta + result is W_0 plus the restrained Delta; the released code adds the
    restrained Delta to W_0 + Delta instead.

    Args:
        total: Delta [out, in], the sum of all updates of W_0.
        largest: s_0, the largest singular value of W_0.

    Source: PRUNE (arXiv 2405.16821), AlphaEdit's `experiments/evaluate.py`.
    """
    if not largest > 0:
        raise InvalidArgumentError(f"the largest singular value of W_0 must be positive; got {largest}")
    u, s, v = spectrum(total)
    change = torch.where(s > largest, (s / largest).clamp(min=1).log() + largest - s, 0.0)
    changed = change != 0
    return LowRankUpdate((u * change)[:, changed], v[:, changed])


@plain_torch()
def limit_spectrum(update: LowRankUpdate, largest: float) -> LowRankUpdate:
    """Delta with its singular values clipped at `largest`: the nearest matrix of that L2 (operator) norm."""
    if not largest > 0:
        raise InvalidArgumentError(f"a limit must be positive; got {largest}")
    u, s, v = spectrum(update)
    if not s.numel() or float(s[0]) <= largest:
        return update
    return LowRankUpdate(u * s.clamp(max=largest), v)


@plain_torch()
def limit_norm(update: LowRankUpdate, largest: float) -> LowRankUpdate:
    """Delta scaled so that |Delta| (Frobenius) is at most `largest`."""
    if not largest > 0:
        raise InvalidArgumentError(f"a limit must be positive; got {largest}")
    norm = update.norm()
    return update if norm <= largest else LowRankUpdate(update.left * (largest / norm), update.right)


@plain_torch()
def main_directions(weight: torch.Tensor, energy: float = 0.5) -> torch.Tensor:
    """The input directions [d, r] along which most neurons of W point, fp64, with orthonormal columns.

    With W^ the rows of W [out, d] at unit length, the columns are the top r eigenvectors of W^^T W^ / out, where r is 1
    plus the number of leading eigenvalues whose sum is at most `energy` of the trace. Taken from the smaller of the two
    Gram matrices of W^: of W^ W^^T the eigenvectors q give the directions W^^T q.

    Args:
        weight: W [out, d], a row per output, whichever way the module stores it.
        energy: eta, between 0 and 1.

    Cost: min(out, d)^2 max(out, d) flops for the Gram matrix and about 9 min(out, d)^3 for its eigenvectors; fp64.

    Source: SPHERE (arXiv 2510.01172), its released `project_B_into_soft_dirs`. For a Conv1D, which stores W transposed,
        the released code normalizes and projects the outputs instead of the inputs.
    """
    if not 0 < energy < 1:
        raise InvalidArgumentError(f"energy must be between 0 and 1; got {energy}")
    rows = weight.double()
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + ROW_EPSILON)
    out, d = rows.shape
    values, vectors = torch.linalg.eigh((rows @ rows.T if out < d else rows.T @ rows) / out)
    descending = values.cpu().clamp(min=0).flip(0)  # torch's cumulative sums on a GPU have no fixed order
    rank = int((descending.cumsum(0) <= energy * descending.sum()).sum()) + 1
    top = vectors[:, -rank:]
    return torch.linalg.qr(rows.T @ top).Q if out < d else top


@plain_torch()
def attenuate(update: LowRankUpdate, directions: torch.Tensor, strength: float) -> LowRankUpdate:
    """Delta (I - strength U U^T): the update with its part along some input directions scaled down; of the same rank.

    Args:
        update: Delta [out, d].
        directions: U [d, r] with orthonormal columns, as `main_directions` gives them.
        strength: alpha in [0, 1]; 1 removes that part.

    Cost: 4 d r k flops for an update of k factors.

    Source: SPHERE (arXiv 2510.01172).

    Example:
        >>> weight, update = torch.randn(8, 12), LowRankUpdate(torch.randn(8, 2), torch.randn(12, 2))
        >>> directions = main_directions(weight, 0.5)
        >>> smaller = attenuate(update, directions, 1.0)
        >>> float((smaller.dense().double() @ directions).abs().max()) < 1e-6
        True
    """
    if not 0 <= strength <= 1:
        raise InvalidArgumentError(f"strength must be in [0, 1]; got {strength}")
    right = update.right.to(directions)
    right = right - strength * directions @ (directions.T @ right)
    return LowRankUpdate(update.left.to(directions), right)
