"""The toy language model of golden_memories.safetensors behind the interface of captured rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file

from kedit_fast.editing.tuning.captured import CapturedRows, TuningRow
from kedit_fast.models.head import Head
from kedit_fast.models.row_runner import RowPass

GOLDEN = load_file(Path(__file__).parent / "data" / "golden_memories.safetensors")


def _running_mean(part: torch.Tensor) -> torch.Tensor:
    return part.cumsum(0) / torch.arange(1, len(part) + 1, dtype=part.dtype)[:, None]


class ToyRows(CapturedRows):
    """Rows of the toy model, in fp64: `hidden` gives z = s + tanh((running mean of s) A^T), s = c + outputs."""

    def hidden(self, outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        assert self.beside is not None
        states = (self.beside + outputs).split(self.lengths)
        mixed = [part + torch.tanh(_running_mean(part) @ GOLDEN["toy.A"].T) for part in states]
        return torch.cat(mixed)[wanted]


def toy_rows(rows: Sequence[TuningRow], weight: torch.Tensor | None = None) -> ToyRows:
    """Captured rows of the toy model."""
    embedded = [GOLDEN["toy.E"][list(row.ids)] for row in rows]
    beside = torch.cat([(part + _running_mean(part)) / 2 for part in embedded])
    x = torch.nn.functional.silu(beside @ GOLDEN["toy.P"].T)
    cpu = torch.device("cpu")
    view = SimpleNamespace(head=Head(cpu, GOLDEN["toy.U"]), device=cpu, row_device=lambda layer: cpu)
    original = x @ (GOLDEN["toy.W0"] if weight is None else weight).T
    return ToyRows(cast(Any, view), 0, RowPass("packed rows"), tuple(rows), x, original, beside)
