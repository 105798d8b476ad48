"""Deltas that stay as they are in every pass over some prompts, beside those that are optimized."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.models.forward import Site, as_rows, hidden_of, module_at, with_hidden
from kedit_fast.models.patching import output_hooks
from kedit_fast.models.view import ModelView


@dataclass(frozen=True)
class FixedDeltas:
    """m deltas in each of R prompts, at the outputs of sites. A place that is not used has a delta of zeros."""

    positions: torch.Tensor
    """[R, m] int64, the tokens they are added at."""
    deltas: torch.Tensor
    """[R, m, sites, h]."""

    def select(self, rows: torch.Tensor) -> FixedDeltas:
        """Those of some of the rows, [n] int64."""
        return FixedDeltas(self.positions[rows.to(self.positions.device)], self.deltas[rows.to(self.deltas.device)])

    def append(self, other: FixedDeltas) -> FixedDeltas:
        """Those of the rows of both, which have the same number of places."""
        return FixedDeltas(torch.cat([self.positions, other.positions]), torch.cat([self.deltas, other.deltas]))

    def added(
        self, view: ModelView, sites: Sequence[Site], shape: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the block, passes over the rows, padded on the right to `shape` [R, T], run with the deltas."""

        def add(index: int) -> Callable[..., Any]:
            def hook(module: torch.nn.Module, args: tuple, output: Any) -> Any:
                hidden = hidden_of(output)
                states = as_rows(hidden, shape)
                at = self.positions.to(states.device)
                at = (at + torch.arange(len(at), device=at.device)[:, None] * states.shape[1]).flatten()
                change = self.deltas[:, :, index].flatten(0, 1).to(states.device, states.dtype)
                return with_hidden(output, states.flatten(0, 1).index_add(0, at, change).view(hidden.shape))

            return hook

        return output_hooks([(module_at(view, site), add(i)) for i, site in enumerate(sites)])
