"""What stores of values have in common: the call of the loop that they serve, and their interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kedit_fast.editing.values.result import Values
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import StopRule
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest


@dataclass(frozen=True)
class ValueRun:
    """One call of the value loop, which a store serves."""

    view: ModelView
    """The model."""
    tokenizer: Any
    """Its tokenizer."""
    layer: int
    """Where the deltas are added."""
    sites: tuple[str, ...]
    """The kinds of the sites, as in `Values.sites`."""
    stop_rule: StopRule
    """The recipe's stopping rule."""
    hparams: Hparams
    """Hyper-parameters of the loop."""
    requests: Sequence[PreparedRequest]
    """All requests of the call."""


class ValueStore(Protocol):
    """Where values are looked up before they are optimized, and written afterwards."""

    def begin(self, run: ValueRun) -> None:
        """Say which call of the value loop the next calls belong to."""

    def load(self, request: PreparedRequest) -> Values | None:
        """The value of a request, or None."""

    def store(self, requests: Sequence[PreparedRequest], values: Values) -> None:
        """Take values that were just optimized."""

    def flush(self) -> None:
        """Write what has been taken."""


class HeldValues(Protocol):
    """A store that can wait: a run with a checkpoint writes its values when the batches they are of are safe.

    A batch that is begun again then finds what it found before, and optimizes the same requests together: the same
    bits.
    """

    def hold(self) -> None:
        """Write nothing until `release`."""

    def drain(self) -> dict[str, torch.Tensor]:
        """The values that were taken since the last call, for `absorb`; names may hold any characters."""
        ...

    def absorb(self, drained: Mapping[str, torch.Tensor]) -> None:
        """Take values that `drain` has given."""

    def release(self) -> None:
        """Write the values that were drained or absorbed, and go on as a store that is not held."""


def usable_requests(requests: Sequence[PreparedRequest], values: Values) -> list[tuple[int, PreparedRequest]]:
    """Requests whose values can be written to a model, with their indices."""
    usable = values.usable
    return [(i, request) for i, request in enumerate(requests) if usable[i]]
