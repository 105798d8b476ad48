"""Steps that stay where the loss on ordinary text is flat.

Around the model's weight the loss on ordinary text is a quadratic form of the change. Its Kronecker-factored
approximation is A (x) B, with A = E[x x^T] of the layer's inputs and B = E[g g^T] of the gradients at its outputs. In
the bases of their eigenvectors, M = U_B^T Delta U_A, the curvature along entry (i, j) is b_i a_j. Entries of high
curvature, which hold a share of its sum, must stay 0; the others may change.

CrispEdit projects the gradient and hands it to Adam, which divides every entry by a size of its own, so what is applied
leaves the subspace. Here Adam's entries are those of M, so the change never leaves it.

Source: CrispEdit (arXiv 2602.15823), which tunes five layers; K-FAC, Martens and Grosse 2015 (arXiv 1503.05671).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.ops import pack_bits
from kedit_fast.solver.preconditioner import require_finite_moment
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.torch_state import plain_torch


@dataclass(frozen=True)
class LowCurvature:
    """The changes [h, d] of a matrix along which the loss on ordinary text is flat."""

    inputs: torch.Tensor
    """U_A [d, d] fp64, an eigenvector of A in each column."""
    outputs: torch.Tensor
    """U_B [h, h] fp64, likewise of B."""
    free: torch.Tensor
    """[h, d] bool, entries of M = U_B^T Delta U_A that may change."""

    @classmethod
    @plain_torch()
    def of(cls, inputs: torch.Tensor, outputs: torch.Tensor, energy: float) -> LowCurvature:
        """The entries without those of largest curvature that hold a share of the sum of all.

        Args:
            inputs: A [d, d] symmetric.
            outputs: B [h, h] symmetric.
            energy: the share, above 0 and below 1.

        Raises:
            InvalidArgumentError: an energy out of range.
            StatisticsError: a moment that is not finite or zero.

        Cost: two symmetric eigendecompositions, 9 (d^3 + h^3) flops in fp64; a sort of h d numbers.
        """
        if not 0 < energy < 1:
            raise InvalidArgumentError(f"curvature_energy must be above 0 and below 1; got {energy}")
        for moment in (inputs, outputs):
            require_finite_moment(moment)
        (of_inputs, in_basis), (of_outputs, out_basis) = (torch.linalg.eigh(m.double()) for m in (inputs, outputs))
        curvature = torch.outer(of_outputs.clamp(min=0), of_inputs.clamp(min=0).to(of_outputs.device))
        ordered = curvature.flatten().sort(descending=True).values
        sums = ordered.cumsum(0)
        if not float(sums[-1]) > 0:
            raise StatisticsError("the curvature is zero: the moments of inputs or outputs are")
        last = min(int(torch.searchsorted(sums, energy * sums[-1])), len(ordered) - 1)
        return cls(in_basis, out_basis, curvature < ordered[last])

    def projected(self, change: torch.Tensor) -> torch.Tensor:
        """A change [h, d] without its part of high curvature."""
        dtype = accumulation_dtype(change)
        inputs, outputs = (basis.to(change.device, dtype) for basis in (self.inputs, self.outputs))
        return outputs @ ((outputs.T @ change.to(dtype) @ inputs) * self.free.to(change.device)) @ inputs.T


class ConstrainedMatrix:
    """A matrix [h, d] that is tuned where curvature is low: W = W0 + U_B M U_A^T, with the steps of M.

    The interface is that of `TunedMatrix`.

    Args:
        origin: W0 [h, d].
        curvature: which entries of M may change.
        steps: how M is tuned; without a bound, which would be one of M.

    Cost: a product takes 2 N (2 d h + d^2 + h^2) flops, a step as much for its factors. Memory: U_A and U_B in the
        dtype of the tuned matrix, and M with its optimizer.
    """

    def __init__(self, origin: torch.Tensor, curvature: LowCurvature, steps: Steps):
        if steps.bound:
            raise InvalidArgumentError("norm_constraint does not go with curvature_energy: the steps are in a basis")
        dtype = accumulation_dtype(origin)
        self.origin = origin.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.core = TunedMatrix.of(torch.zeros_like(self.origin), steps, pack_bits(curvature.free.to(origin.device)))
        self._inputs, self._outputs = (b.to(origin.device, dtype) for b in (curvature.inputs, curvature.outputs))

    @property
    def weight(self) -> torch.Tensor:
        """W [h, d]. Cost: 2 h d (h + d) flops."""
        return self.origin + self._outputs @ self.core.weight @ self._inputs.T

    @property
    def finite(self) -> torch.Tensor:
        """[] bool, whether every step so far left finite numbers."""
        return self.core.finite

    def snapshot(self) -> torch.Tensor:
        """What `set` takes."""
        return self.core.snapshot()

    def set(self, snapshot: torch.Tensor) -> None:
        """Have the numbers of a snapshot again."""
        self.core.set(snapshot)

    def restart(self) -> None:
        """Begin with a new optimizer."""
        self.core.restart()

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [N, h] of inputs [N, d], without bias."""
        x = x.to(self.origin)
        return x @ self.origin.T + (x @ self._inputs @ self.core.weight.T) @ self._outputs.T

    @torch.no_grad()
    def step(self, left: torch.Tensor, right: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """One step down the gradient left^T right; see `TunedMatrix.step`."""
        self.core.step(left.to(self.origin) @ self._outputs, right.to(self.origin) @ self._inputs, active)
