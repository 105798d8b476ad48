"""What updates will do to the model's distributions of the next token, from their factors and two second moments.

With A = E[k k^T] of a layer's inputs and B = E[g g^T] of the gradients g of -sum_s log p(y_s) by its outputs, labels y
drawn from the model itself, the KL divergence of the edited model from the unedited one has the second-order term

    1/2 tr(B Delta A Delta^T)    nats a token of such text.

This is K-FAC's approximation of the Fisher information (arXiv 1503.05671): inputs and gradients count as independent,
and products of two positions, or of two layers, are left out. Several matrices add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.solver.low_rank import LowRankUpdate, Update
from kedit_fast.support.torch_state import plain_torch

_ROWS = 1024  # of a moment that are on the update's device at a time
Moments = tuple[torch.Tensor, torch.Tensor]
"""A [d, d], or [E, m, m] of experts, and B [out, out] of a module."""


@plain_torch()
def predicted_kl(update: Update | torch.Tensor, input_moment: torch.Tensor, output_moment: torch.Tensor) -> float:
    """1/2 tr(B Delta A Delta^T): the KL divergence, in nats a token, that a change of one matrix is predicted to cause.

    Args:
        update: Delta [out, d]: factors of rank k, factors with a mask, or the matrix itself; on any device. Or
            [E, out, m] of experts: their harms are summed, products of two experts are left out.
        input_moment: A [d, d], the second moment of the layer's inputs, fp32 or fp64, on any device; [E, m, m] of
            experts.
        output_moment: B [out, out], the raw second moment of the gradients at its outputs: neither normalized nor
            mixed with the identity.

    Raises:
        InvalidArgumentError: shapes that do not fit.

    Cost: 2 k (d^2 + out^2) flops from factors, or 2 out d (out + d) where that is less and for masks and matrices; in
    the moments' dtypes, on the update's device, 1,024 rows of a moment at a time.

    Example:
        >>> update = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.0], [4.0]]))
        >>> predicted_kl(update, torch.eye(3), torch.eye(2))  # both moments the identity: half of |Delta|^2
        62.5
    """
    shape = list(update.shape)
    moments = [list(output_moment.shape), list(input_moment.shape)]
    if len(shape) == 3 and moments[1] == [shape[0], shape[2], shape[2]]:
        if isinstance(update, ExpertUpdate):
            parts = ((expert, LowRankUpdate(left, right)) for expert, left, right in update.parts())
        else:
            parts = enumerate(update if isinstance(update, torch.Tensor) else update.dense())
        return math.fsum(predicted_kl(part, input_moment[expert], output_moment) for expert, part in parts)
    if len(shape) != 2 or moments != [[n, n] for n in shape]:
        raise InvalidArgumentError(
            f"update is {shape}, so output_moment must be [out, out] and input_moment [d, d], or [E, m, m] of "
            f"experts, for these; got "
            f"{moments[0]} and {moments[1]}"
        )
    out, d = shape
    if isinstance(update, LowRankUpdate) and update.rank * (d * d + out * out) <= out * d * (out + d):
        product = _quadratic(update.left, output_moment) * _quadratic(update.right, input_moment)  # [k, k]
        return 0.5 * max(float(product.sum()), 0.0)
    dense = (update if isinstance(update, torch.Tensor) else update.dense()).to(input_moment.dtype)
    through = torch.cat([part.to(dense) @ dense for part in output_moment.split(_ROWS)])  # B Delta [out, d]
    total = dense.new_zeros(())
    for part, columns in zip(input_moment.split(_ROWS), through.split(_ROWS, 1), strict=True):
        total += ((dense @ part.to(dense).T) * columns).sum()
    return 0.5 * max(float(total), 0.0)


def _quadratic(factor: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """factor^T moment factor [k, k] of a factor [n, k], on its device."""
    factor = factor.to(moment.dtype)
    parts = zip(moment.split(_ROWS), factor.split(_ROWS), strict=True)
    return sum((rows.T @ (part.to(factor) @ factor) for part, rows in parts), factor.new_zeros(()))


@dataclass(frozen=True)
class ModuleHarm:
    """What is predicted of one matrix's update."""

    norm: float
    """|Delta| (Frobenius)."""
    predicted_kl: float | None
    """`predicted_kl`, in nats a token; None where a second moment is missing."""


@dataclass(frozen=True)
class Harm:
    """What is predicted of the updates of several matrices."""

    modules: Mapping[str, ModuleHarm]
    """By module path."""
    missing: str = ""
    """Why a prediction is missing; empty where none is, or none was asked for."""

    @classmethod
    def of(cls, updates: Iterable[tuple[str, Update]], moments: Callable[[str], Moments | str] | None = None) -> Harm:
        """The harm of updates by module path.

        Args:
            updates: the path of each module and its Delta [out, d]; taken one at a time.
            moments: a module's path -> its A [d, d] and B [out, out], or why one is missing; called for one module at a
                time. None for norms alone.

        Raises:
            InvalidArgumentError: moments of another size.
        """
        modules, missing = {}, ""
        for name, update in updates:
            given = "" if moments is None else moments(name)
            kl = None if isinstance(given, str) else predicted_kl(update, *given)
            missing = missing or (given if isinstance(given, str) else "")
            modules[name] = ModuleHarm(update.norm(), kl)
        return cls(modules, missing)

    @property
    def norm(self) -> float:
        """|Delta| of all matrices together."""
        return math.hypot(*(module.norm for module in self.modules.values()))

    @property
    def predicted_kl(self) -> float | None:
        """The sum over all matrices, in nats a token; None where one is missing."""
        values = [module.predicted_kl for module in self.modules.values()]
        return None if None in values else math.fsum(value for value in values if value is not None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {
            "norm": self.norm,
            "predicted_kl": self.predicted_kl,
            "modules": {name: vars(module) for name, module in self.modules.items()},
            **({"missing": self.missing} if self.missing else {}),
        }
