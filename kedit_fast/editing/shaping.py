"""What a method does to its updates after they were solved: of each batch, or of the total after the last batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Shaping
from kedit_fast.solver.expert_update import ExpertUpdate, by_expert, stacked_matrix
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, Update
from kedit_fast.solver.shaping import prune, rect, spectral_norm


def _write_largest_changes(update: LowRankUpdate | ExpertUpdate, weight: torch.Tensor, hparams: Hparams) -> Update:
    """RECT's part of an update. Of experts it is chosen in the stacked matrix, and stored as a matrix for each."""
    if isinstance(update, LowRankUpdate):
        return rect(update, weight, hparams.rect_keep)
    stacked = LowRankUpdate(update.left, update.stacked_right())
    shaped = rect(stacked, stacked_matrix(weight), hparams.rect_keep)
    return DenseUpdate(by_expert(shaped.dense(), len(weight)))


def _restrain_spectrum(total: Update, original: torch.Tensor) -> LowRankUpdate | ExpertUpdate:
    """PRUNE's change of a total; of experts, that of the stacked matrix."""
    if isinstance(total, ExpertUpdate):
        stacked = LowRankUpdate(total.left, total.stacked_right())
        return ExpertUpdate.of_stacked(prune(stacked, spectral_norm(stacked_matrix(original))), len(original))
    assert isinstance(total, LowRankUpdate)  # a method that restrains totals masks no update
    return prune(total, spectral_norm(original))


@dataclass(frozen=True)
class ShapingSteps:
    """The steps of one kind of shaping; None where it has no such step."""

    of_batch: Callable[[LowRankUpdate | ExpertUpdate, torch.Tensor, Hparams], Update] | None = None
    """(update, weight [out, in] or [E, out, m] before the batch, hparams) -> the part of the update that is written.
    Called once all layers of a batch were solved with whole updates in place."""
    of_total: Callable[[Update, torch.Tensor], LowRankUpdate | ExpertUpdate] | None = None
    """(total update of all batches, original weight [out, in] or [E, out, m]) -> the change to add after the last
    batch."""


SHAPINGS: dict[Shaping, ShapingSteps] = {
    "none": ShapingSteps(),
    "rect": ShapingSteps(of_batch=_write_largest_changes),
    "prune": ShapingSteps(of_total=_restrain_spectrum),
}
