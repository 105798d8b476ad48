"""The matrix that is tuned, beside the model: its numbers, what may change of it, and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from kedit_fast.ops import masked_adam_, masked_descent_
from kedit_fast.support.dtypes import accumulation_dtype

Optimizer = Literal["sgd", "adam"]


@dataclass
class Steps:
    """The optimizer of one matrix."""

    kind: Optimizer
    """"sgd" without momentum, or "adam"."""
    lr: float
    """Step size."""
    decay: float = 0.0
    """Weight decay of "sgd": lr decay W is subtracted, too."""
    decay_all: bool = False
    """Whether entries that are masked out decay, too, as in the code of WISE."""
    bound: float = 0.0
    """After every step, entries stay within +-bound of the origin; 0 for no bound."""
    clip: float = 0.0
    """The gradient's norm is at most this; 0 for no limit."""


@dataclass
class TunedMatrix:
    """A matrix [h, d] that is tuned, in fp32 (fp64 of fp64 models). The model's own matrix is not touched."""

    weight: torch.Tensor
    """[h, d], contiguous; written by `step`."""
    origin: torch.Tensor
    """[h, d] what the bound is around, in any float dtype; read when there is a bound."""
    steps: Steps
    """How it is tuned."""
    entries: torch.Tensor | None = None
    """[ceil(h d / 8)] uint8, bits of the entries that may change: entry 8 j + i, row after row, is bit i of byte j.
    None for all."""
    computes_in: torch.dtype | None = None
    """The 16-bit dtype that products are computed in, by a copy of the weight; None for the weight's own."""
    finite: torch.Tensor = field(init=False)
    """[] bool on the device, whether every step so far left finite numbers."""

    def __post_init__(self):
        self.finite = torch.ones((), dtype=torch.bool, device=self.weight.device)
        self._copy = None if self.computes_in is None else self.weight.to(self.computes_in)
        self._mean = self._square = self._count = None
        self.restart()

    @classmethod
    def of(
        cls, weight: torch.Tensor, steps: Steps, entries: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> TunedMatrix:
        """A tuned copy of a matrix [h, d] of any dtype and stride; `dtype` is that of the passes (`computes_in`)."""
        copied = weight.to(accumulation_dtype(weight), copy=True, memory_format=torch.contiguous_format)
        halves = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return cls(copied, weight, steps, entries, halves)

    def restart(self) -> None:
        """Begin with a new optimizer, as depth-first tuning does for each request."""
        if self.steps.kind == "adam":
            if self._mean is None:
                self._mean, self._square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
                self._count = torch.zeros((), dtype=torch.float32, device=self.weight.device)
            else:
                for part in (self._mean, self._square, self._count):
                    assert part is not None
                    part.zero_()

    def snapshot(self) -> torch.Tensor:
        """A copy of the numbers, for `set`."""
        return self.weight.clone()

    def set(self, weight: torch.Tensor) -> None:
        """Take these numbers [h, d]; the optimizer stays as it is."""
        self.weight.copy_(weight)
        self.finite = torch.ones_like(self.finite)
        if self._copy is not None:
            self._copy.copy_(self.weight)

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [N, h] of inputs [N, d], without bias, in the dtype of the copy or of the weight."""
        weight = self.weight if self._copy is None else self._copy
        return x.to(weight) @ weight.T

    @torch.no_grad()
    def step(self, left: torch.Tensor, right: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """One step down the gradient left^T right, which is never formed, then the bound.

        Args:
            left: [N, h] gradients by the outputs.
            right: [N, d] the inputs.
            active: [] bool on the device; where it is false no number and no state of the optimizer changes, but the
                bound still holds. None for true.
        """
        if self.steps.clip:
            left = left * clip_factor(left, right, self.steps.clip)
        origin, bound = (self.origin, self.steps.bound) if self.steps.bound else (None, None)
        if self.steps.kind == "adam":
            assert self._mean is not None and self._square is not None and self._count is not None
            finite = masked_adam_(
                self.weight, self._mean, self._square, self._count, self.steps.lr, left=left, right=right,
                entries=self.entries, origin=origin, bound=bound, active=active, copy=self._copy,
            )  # fmt: skip
        else:
            assert active is None, "plain descent always steps"
            finite = masked_descent_(
                self.weight, self.steps.lr, left=left, right=right, entries=self.entries, decay=self.steps.decay,
                decay_all=self.steps.decay_all, origin=origin, bound=bound, copy=self._copy,
            )  # fmt: skip
        self.finite = self.finite & finite


def clip_factor(left: torch.Tensor, right: torch.Tensor, most: float) -> torch.Tensor:
    """[] what a gradient left^T right is multiplied by for its Frobenius norm to be at most `most`.

    Cost: two Gram matrices [N, N] in place of the gradient.
    """
    dtype = accumulation_dtype(left)
    left, right = left.to(dtype), right.to(dtype)
    square = ((left @ left.T) * (right @ right.T)).sum()
    return (most / (square.clamp(min=0).sqrt() + 1e-6)).clamp(max=1.0)
