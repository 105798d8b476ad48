"""Running normalizers of gradient methods: mean and spread of keys and gradients over all turns so far.

`Normalizer` is UltraEdit's. `WhitenedNormalizer` is StableEdit's, which also whitens the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kedit_fast.errors import InvalidArgumentError, SolveError, StatisticsError
from kedit_fast.solver.least_squares import solve_update
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.preconditioner import Identity, require_finite
from kedit_fast.support.torch_state import plain_torch

WHITENING_FLOOR = 1e-6  # least eigenvalue of the gradients' covariance, as published


@dataclass(frozen=True)
class Normalizer:
    """Mean and sum of squared deviations of features over rows; `updated` returns a new one."""

    count: int
    """Number of rows."""
    mean: torch.Tensor
    """[f] fp64."""
    squares: torch.Tensor
    """[f] fp64, the published `var`: divided by count - 1 it is the variance."""

    @classmethod
    @plain_torch()
    def empty(cls, features: int, device: torch.device | str = "cpu", outputs: int = 0) -> Normalizer:
        """The state before any row of f features, of which the last `outputs` are gradients."""
        zero = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(0, zero, zero)

    @plain_torch()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as tensors on the CPU."""
        return {
            "count": torch.tensor(self.count),
            "mean": self.mean.cpu().clone(),
            "squares": self.squares.cpu().clone(),
        }

    @classmethod
    @plain_torch()
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], features: int, where: str, outputs: int = 0
    ) -> Normalizer:
        """From the result of `tensors`; raises StatisticsError, naming `where`, when it is damaged."""
        count, mean, squares = (tensors.get(name) for name in ("count", "mean", "squares"))
        if count is None or mean is None or squares is None or int(count) < 2:
            raise StatisticsError(f"{where} is damaged: a part of the normalizer is missing")
        for tensor in (mean, squares):
            if tensor.dtype != torch.float64 or tuple(tensor.shape) != (features,):
                raise StatisticsError(f"{where} is damaged: {tensor.dtype} {list(tensor.shape)}, not [{features}]")
        if not bool(torch.isfinite(mean).all() and torch.isfinite(squares).all() and (squares >= 0).all()):
            raise StatisticsError(f"{where} is damaged: values that are not finite or negative squares")
        return cls(int(count), mean, squares)

    @plain_torch()
    def updated(self, rows: torch.Tensor) -> Normalizer:
        """With rows [n, f] added by the published rule: n times their own variance, and the shift of the mean."""
        n = rows.shape[0]
        if rows.ndim != 2 or rows.shape[1] != self.mean.shape[0]:
            raise InvalidArgumentError(f"rows must be [n, {self.mean.shape[0]}]; got {list(rows.shape)}")
        if n == 0:
            return self
        require_finite("keys and gradients", rows)
        wide = rows.double()
        if n + self.count < 2:
            raise SolveError("the normalizer needs more than one token in its first batch: give it more requests")
        total, shift = self.count + n, wide.mean(0) - self.mean
        squares = self.squares + n * self._spread(wide) + self.count * n * shift**2 / total
        return Normalizer(total, self.mean + n * shift / total, squares)

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Variance [f] of rows [n, f] by themselves, as the published code adds it up."""
        return rows.var(0) if len(rows) > 1 else torch.zeros_like(rows[0])

    @plain_torch()
    def whitening(self, floor: float = WHITENING_FLOOR) -> torch.Tensor | None:
        """What gradients are multiplied with in place of the division by their deviations; None for no such matrix."""
        return None

    @plain_torch()
    def normalized(self, rows: torch.Tensor, whitening: torch.Tensor | None = None) -> torch.Tensor:
        """(x - mean) / deviation [n, f], fp64; 0 for a feature that never changed.

        With a matrix from `whitening` [out, out] the last `out` features are (x - mean) times it instead.
        """
        deviation = (self.squares / max(1, self.count - 1)).sqrt()
        shifted = rows.double() - self.mean
        divided = torch.where(deviation > 0, shifted / deviation, 0.0)
        if whitening is None:
            return divided
        out = len(whitening)
        return torch.cat([divided[:, :-out], shifted[:, -out:] @ whitening], 1)

    def to(self, device: torch.device) -> Normalizer:
        """The same on another device."""
        return replace(self, mean=self.mean.to(device), squares=self.squares.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.mean.nbytes + self.squares.nbytes


@dataclass(frozen=True)
class Scatter:
    """Sum of the outer products of rows' deviations from their mean; `updated` returns a new one.

    Rows give the same in one part or several, up to rounding.
    """

    count: int
    """Number of rows."""
    mean: torch.Tensor
    """[f] fp64."""
    products: torch.Tensor
    """[f, f] fp64."""

    @classmethod
    @plain_torch()
    def empty(cls, features: int, device: torch.device | str = "cpu") -> Scatter:
        """The state before any row."""
        zeros = torch.zeros(features + 1, features, dtype=torch.float64, device=device)
        return cls(0, zeros[0], zeros[1:])

    @plain_torch()
    def updated(self, rows: torch.Tensor) -> Scatter:
        """With rows [n, f] added: 2 n f^2 flops."""
        n, wide = len(rows), rows.to(self.mean)
        if n == 0:
            return self
        total, mean = self.count + n, wide.mean(0)
        shift, deviations = mean - self.mean, wide - mean
        between = torch.outer(shift, shift) * (self.count * n / total)
        return Scatter(total, self.mean + n * shift / total, self.products + deviations.T @ deviations + between)


@dataclass(frozen=True)
class WhitenedNormalizer(Normalizer):
    """StableEdit's: variances of the whole population, and gradients whitened by their covariance.

    The gradients g [out] become C^-1/2 (g - mean), with C their scatter over all n rows divided by n - out - 1, and its
    eigenvalues raised to a floor; up to n = out + 1 they are divided by their deviations. Keys always are.

    Source: StableEdit (arXiv 2605.11836), its released `RunningMeanStd`.
    """

    scatter: Scatter | None = None
    """Of the gradients; None where it is left out of a copy to save memory (8 out^2 bytes)."""

    @classmethod
    @plain_torch()
    def empty(cls, features: int, device: torch.device | str = "cpu", outputs: int = 0) -> WhitenedNormalizer:
        """The state before any row of f features, of which the last `outputs` are gradients."""
        zero = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(0, zero, zero, Scatter.empty(outputs, device))

    @plain_torch()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as tensors on the CPU, without a scatter that is left out."""
        if self.scatter is None:
            return super().tensors()
        scatter = {"scatter": self.scatter.products, "scatter_mean": self.scatter.mean}
        return {**super().tensors(), **{name: tensor.cpu().clone() for name, tensor in scatter.items()}}

    @classmethod
    @plain_torch()
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], features: int, where: str, outputs: int = 0
    ) -> WhitenedNormalizer:
        """From the result of `tensors`; raises StatisticsError, naming `where`, when it is damaged."""
        base = Normalizer.from_tensors(tensors, features, where)
        mean, products = tensors.get("scatter_mean"), tensors.get("scatter")
        if mean is None or products is None:
            raise StatisticsError(f"{where} is damaged: a part of the normalizer is missing")
        for tensor, shape in ((mean, [outputs]), (products, [outputs, outputs])):
            if tensor.dtype != torch.float64 or list(tensor.shape) != shape:
                raise StatisticsError(f"{where} is damaged: {tensor.dtype} {list(tensor.shape)}, not {shape}")
        if not bool(torch.isfinite(products).all() and torch.isfinite(mean).all() and (products.diagonal() >= 0).all()):
            raise StatisticsError(f"{where} is damaged: values that are not finite or negative squares")
        return cls(base.count, base.mean, base.squares, Scatter(base.count, mean, products))

    @plain_torch()
    def updated(self, rows: torch.Tensor) -> WhitenedNormalizer:
        """With rows [n, f] added."""
        assert self.scatter is not None
        base = super().updated(rows)
        if base is self:
            return self
        return WhitenedNormalizer(
            base.count, base.mean, base.squares, self.scatter.updated(rows[:, -len(self.scatter.mean) :])
        )

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.var(0, correction=0)

    @plain_torch()
    def whitening(self, floor: float = WHITENING_FLOOR) -> torch.Tensor | None:
        """C^-1/2 [out, out] of the gradients; None up to out + 1 rows. About 9 out^3 flops.

        Args:
            floor: least eigenvalue of C; smaller ones are raised to it.
        """
        assert self.scatter is not None
        freedom = self.count - len(self.scatter.mean) - 1
        if freedom <= 0:
            return None
        values, vectors = torch.linalg.eigh(self.scatter.products / freedom)
        return (vectors * values.clamp(min=floor).rsqrt()) @ vectors.T

    def to(self, device: torch.device) -> WhitenedNormalizer:
        """The same on another device."""
        assert self.scatter is not None
        mean, products = self.scatter.mean.to(device), self.scatter.products.to(device)
        return replace(
            self,
            mean=self.mean.to(device),
            squares=self.squares.to(device),
            scatter=Scatter(self.scatter.count, mean, products),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return super().nbytes + (0 if self.scatter is None else self.scatter.products.nbytes)


@plain_torch()
def gradient_update(
    keys: torch.Tensor,
    gradients: torch.Tensor,
    normalizer: Normalizer,
    lr: float,
    ridge: float = 1.0,
    whitening: torch.Tensor | None = None,
) -> LowRankUpdate:
    """A gradient method's update of one linear layer: Delta^T = (H^T H + ridge I)^-1 H^T V, by the n x n dual system.

    V = -lr |h|^2 g row by row, with h and g the normalized key and gradient; H holds the keys without normalization.

    Args:
        keys: H [n, d], the layer's inputs, one row per token.
        gradients: [n, out] of the loss with respect to the layer's outputs there.
        normalizer: over [keys, gradients], with these rows in it.
        lr: of the published files (1e-6).
        ridge: 1 as UltraEdit has it, 10 in StableEdit's runs.
        whitening: what `normalizer.whitening` gives, for StableEdit; None for UltraEdit.

    Returns:
        LowRankUpdate, fp64.

    Cost: n^2 d + n^3 / 3 + 2 n^2 d flops (d n^2 + d^3 / 3 + 2 d^2 out as published).
    Source: UltraEdit (arXiv 2505.14679), its released `editor/ultraedit.py`; StableEdit, its `editor/stableedit.py`.
    """
    both = normalizer.normalized(torch.cat([keys.double(), gradients.double()], 1), whitening)
    h, g = both[:, : keys.shape[1]], both[:, keys.shape[1] :]
    values = -lr * h.square().sum(1, keepdim=True) * g
    return solve_update(keys.T, values.T, Identity(keys.shape[1], keys.device, ridge))
