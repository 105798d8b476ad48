"""What an editor tunes, and what it keeps from batch to batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kedit_fast.errors import MethodError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.models.view import ModelView
from kedit_fast.statistics.collect import Statistics

if TYPE_CHECKING:
    from kedit_fast.editing.batch_run import BatchRun


class TuningState:
    """The tuning of one editor.

    Args:
        view: the model.
        tokenizer: its tokenizer.
        recipe: the method; it has a `tuning`.
        hparams: its hyper-parameters.
        statistics: second moments of inputs and outputs, where steps are constrained by them.
        seed: of masks, orders and first values.
        irrelevant: texts that have nothing to do with the edits; None for built-in ones.
    """

    def __init__(
        self,
        view: ModelView,
        tokenizer: Any,
        recipe: Recipe,
        hparams: Hparams,
        statistics: Statistics | None,
        seed: int,
        irrelevant: Sequence[str] | None = None,
    ):
        assert recipe.tuning is not None
        self.view, self.tokenizer, self.recipe, self.hparams = view, tokenizer, recipe, hparams
        self.tuning, self.statistics, self.seed, self.irrelevant = recipe.tuning, statistics, seed, irrelevant
        self.memory: Any = None
        """What stands beside the weights, as after the last committed batch; None without any."""

    def write(self, batch: BatchRun) -> None:
        """Tune on the requests of a batch; write the result into the weight, or hold it for `commit`."""
        raise MethodError(f"{self.recipe.name} is not there yet")

    def commit(self) -> None:
        """Count the open batch: what it has made belongs to the state, and a memory answers in the model."""

    def settle(self, batches: int) -> None:
        """Drop an open batch, and return to the state after so many batches, bit for bit."""
