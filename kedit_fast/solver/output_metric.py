"""What a change of a layer's outputs costs: B [out, out], beside S [d, d] for its inputs.

The update minimizes

    |Delta K - R|^2 + rho tr(B Delta S Delta^T)

For B = I it is R G^T with G = S^-1 K (rho I + K^T S^-1 K)^-1, the update of every other solve here. For any other B the
same G stays the right factor, and only R changes. With B = Q diag(b) Q^T and K^T G = V diag(e) V^T, symmetric with
eigenvalues from 0 to 1,

    left = Q [(Q^T R V)_ji / (e_i + b_j (1 - e_i))] V^T

e_i is the share of its residual that the update with B = I reaches along v_i: where it is 1 (rho = 0) B has no effect.
Every form of the system gives K^T G, also one with the keys of earlier batches in S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.solver.preconditioner import require_finite_moment
from kedit_fast.support.torch_state import plain_torch

NEGATIVE = -1e-6  # share of the largest eigenvalue; a lower eigenvalue is not rounding: the matrix is no second moment
SINGULAR = 1e-10  # share of the mean eigenvalue below which a direction counts as free


@dataclass(frozen=True)
class OutputMetric:
    """B = Q diag(b) Q^T with mean b = 1, so that rho and the weight of S have the same meaning as without it.

    Example:
        >>> metric = OutputMetric.from_moment(torch.diag(torch.tensor([3.0, 1.0])), mix=0.2)
        >>> metric.values
        tensor([0.6000, 1.4000], dtype=torch.float64)
        >>> residuals, keys = torch.randn(2, 3), torch.randn(8, 3)
        >>> metric.size, solve_update(keys, residuals, Identity(8), output_metric=metric).rank
        (2, 3)
    """

    basis: torch.Tensor
    """Q [out, out] fp64, an eigenvector in each column."""
    values: torch.Tensor
    """b [out] fp64, ascending, positive, with mean 1 before the clamp at 0."""

    @classmethod
    @plain_torch()
    def from_moment(cls, moment: torch.Tensor, mix: float = 0.1) -> OutputMetric:
        """The metric of a second moment of the gradients at a layer's outputs.

        It is normalized to trace out, eigenvalues are clamped at 0, and b becomes (1 - mix) b + mix.

        Args:
            moment: B [out, out] symmetric, of any scale. Behind a LayerNorm it is singular: gradients sum to 0 there.
            mix: share of the identity, 0 to 1. It bounds the ratio of costs; with 1 there is no metric.

        Raises:
            InvalidArgumentError: not square, or a mix out of range.
            StatisticsError: zero, not finite, not positive semi-definite, or singular with a mix of 0.

        Cost: a symmetric eigendecomposition, about 9 out^3 flops in fp64; 8 out^2 bytes.
        """
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not len(moment):
            raise InvalidArgumentError(f"the moment of outputs must be [out, out]; got {list(moment.shape)}")
        if not 0 <= mix <= 1:
            raise InvalidArgumentError(f"mix must be from 0 to 1; got {mix}")
        require_finite_moment(moment)
        values, basis = torch.linalg.eigh(moment.double())
        mean, largest = float(values.mean()), float(values[-1])
        if largest <= 0:
            raise StatisticsError("the second moment of the outputs' gradients is zero, or no text was counted")
        if float(values[0]) < NEGATIVE * largest:
            raise StatisticsError(
                "the second moment of the outputs' gradients has a negative eigenvalue, "
                f"{float(values[0]):.2e}: it is no second moment"
            )
        values = (values / mean).clamp_(min=0).mul_(1 - mix).add_(mix)
        if float(values[0]) < SINGULAR:
            raise StatisticsError(
                "the second moment of the outputs' gradients is singular, as it is behind a LayerNorm: some changes "
                "would cost nothing. A mix (metric_mix) above 0 bounds them"
            )
        return cls(basis, values)

    @property
    def size(self) -> int:
        """out."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of Q and b."""
        return self.basis.nbytes + self.values.nbytes

    @plain_torch()
    def probe(self) -> torch.Tensor:
        """x^T B x of eight fixed vectors, [8]: metrics of different statistics have different probes."""
        place = torch.arange(1, self.size + 1, dtype=torch.float64, device=self.basis.device)
        vectors = torch.stack([torch.sin(place * (0.7 + i)) for i in range(8)], 1)
        return (self.values[:, None] * (self.basis.T @ vectors).square()).sum(0).cpu()

    @plain_torch()
    def left(self, residuals: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
        """The left factor [out, u] fp64 that takes the place of the residuals.

        Args:
            residuals: R [out, u].
            reached: K^T G [u, u] of the right factor G [d, u] = S^-1 K (rho I + K^T S^-1 K)^-1; its symmetric part
                is used.

        Raises:
            InvalidArgumentError: residuals of another size.

        Cost: a symmetric eigendecomposition of u, about 9 u^3 flops, and 4 out^2 u + 4 out u^2.
        """
        if residuals.shape[0] != self.size:
            raise InvalidArgumentError(
                f"the output metric is of {self.size} outputs, residuals are of {len(residuals)}"
            )
        shares, vectors = torch.linalg.eigh((reached + reached.T) / 2)
        shares = shares.clamp(0.0, 1.0)
        cost = shares + self.values[:, None] * (1 - shares)  # [out, u]
        return self.basis @ ((self.basis.T @ residuals.double() @ vectors) / cost) @ vectors.T
