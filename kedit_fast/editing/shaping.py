"""What a method does to its updates after they were solved: of each batch, or of the total after the last batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Shaping
from kedit_fast.solver.low_rank import LowRankUpdate, Update
from kedit_fast.solver.shaping import prune, rect, spectral_norm


def _write_largest_changes(update: LowRankUpdate, weight: torch.Tensor, hparams: Hparams) -> Update:
    return rect(update, weight, hparams.rect_keep)


def _restrain_spectrum(total: Update, original: torch.Tensor) -> LowRankUpdate:
    assert isinstance(total, LowRankUpdate)  # a method that restrains totals masks no update
    return prune(total, spectral_norm(original))


@dataclass(frozen=True)
class ShapingSteps:
    """The steps of one kind of shaping; None where it has no such step."""

    of_batch: Callable[[LowRankUpdate, torch.Tensor, Hparams], Update] | None = None
    """(update, weight [out, in] before the batch, hparams) -> the part of the update that is written. Called once all
    layers of a batch were solved with whole updates in place."""
    of_total: Callable[[Update, torch.Tensor], LowRankUpdate] | None = None
    """(total update of all batches, original weight [out, in]) -> the change to add after the last batch."""


SHAPINGS: dict[Shaping, ShapingSteps] = {
    "none": ShapingSteps(),
    "rect": ShapingSteps(of_batch=_write_largest_changes),
    "prune": ShapingSteps(of_total=_restrain_spectrum),
}
