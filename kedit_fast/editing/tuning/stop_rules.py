"""When the steps of a request end before the last one, as the published loops have it.

A rule is asked before the forward pass, with the losses of the steps so far, and again after it, with the loss of this
pass. A request that ends takes no further step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.tuning_recipe import TuningStop


class StopRule(Protocol):
    """When a request ends."""

    def before(self, losses: Sequence[float]) -> bool:
        """Whether it ends before a forward pass; `losses` are those of the steps taken so far, in order."""
        ...

    def after(self, loss: float) -> bool:
        """Whether it ends without the step of a pass that had this loss."""
        ...


@dataclass(frozen=True)
class Plateau:
    """WISE and MEMOIR: the last loss is small and no longer changes.

    Both losses are those before the pass that the published code runs and then discards, so none is run here.
    """

    most: float
    """Loss of the last step at most."""
    change: float
    """Difference of the last two losses at most."""

    def before(self, losses: Sequence[float]) -> bool:
        """See `StopRule.before`. Before the first step the losses count as 0 and 10^9, as published."""
        second, last = [0.0, 1e9, *losses][-2:]
        return abs(last - second) <= self.change and last <= self.most

    def after(self, loss: float) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Below:
    """FT and DINM: the loss of this pass is below a number."""

    limit: float
    """The number."""

    def before(self, losses: Sequence[float]) -> bool:
        """Never."""
        return False

    def after(self, loss: float) -> bool:
        """See `StopRule.after`."""
        return loss < self.limit


@dataclass(frozen=True)
class UsedUp:
    """Steps end when all are taken."""

    def before(self, losses: Sequence[float]) -> bool:
        """Never."""
        return False

    def after(self, loss: float) -> bool:
        """Never."""
        return False


def stop_rule(kind: TuningStop, hparams: Hparams) -> StopRule:
    """The rule of a recipe. In depth-first order "below and skip" ends a request where "below" does."""
    if kind == "plateau":
        return Plateau(hparams.stop_loss, hparams.stop_change)
    return UsedUp() if kind == "used up" else Below(hparams.stop_loss)
