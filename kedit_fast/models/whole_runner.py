"""Forward passes over whole prompts with deltas added at one token: for models whose tails cannot run alone.

A pass does what the model itself does with a batch of prompts that are padded on the right, with hooks that add the
deltas. No assumption is made about caches, masks, positions or what blocks hand to each other. Where blocks can start
from the states that entered them, those below the delta are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad as pad_with_zeros

from kedit_fast.models.fixed_deltas import FixedDeltas
from kedit_fast.models.forward import (
    Entering,
    Site,
    TokenBatch,
    as_rows,
    did_not_run,
    hidden_of,
    last_states,
    module_at,
    pad,
    starts_midway,
    stubs,
    with_hidden,
)
from kedit_fast.models.head import sample_rows
from kedit_fast.models.patching import output_hooks, replaced_forwards
from kedit_fast.models.view import ModelView
from kedit_fast.support.torch_state import plain_torch


@dataclass
class WholeRunner:
    """R prompts, ready to run whole again and again with deltas at their lookup tokens.

    `record_whole` makes one. The interface is `TailRunner`'s: the tail of a row are its tokens from the lookup token
    on.
    """

    view: ModelView
    """The model."""
    sites: tuple[Site, ...]
    """Where deltas are added at the lookup token."""
    lookup: torch.Tensor
    """[R] int64, position of the lookup token in each prompt."""
    rows: torch.Tensor
    """[R, T] int64, token ids of whole prompts, padded on the right."""
    mask: torch.Tensor
    """[R, T] int64, 1 at tokens."""
    ids: torch.Tensor
    """[R, S] int64, token ids of the tails."""
    entering: Entering | None
    """States [R, T, h] that enter the first block that a delta changes; None to run from the embeddings."""
    fixed: FixedDeltas | None = None
    """Other deltas at the same sites, which every pass adds, too."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the recorded states."""
        return 0 if self.entering is None else self.entering.states.nbytes

    def select(self, rows: torch.Tensor) -> WholeRunner:
        """A runner with some of the rows [n] int64, no longer than they need."""
        rows = rows.to(self.lookup.device)
        mask, lookup = self.mask[rows], self.lookup[rows]
        lengths = mask.sum(1)
        length, tail = int(lengths.max()), int((lengths - lookup).max())
        entering = self.entering
        if entering is not None:
            states = entering.states[rows.to(entering.states.device), :length]
            entering = Entering(entering.layer, states, entering.as_tuple)
        return WholeRunner(
            self.view,
            self.sites,
            lookup,
            self.rows[rows, :length],
            mask[:, :length],
            self.ids[rows, :tail],
            entering,
            None if self.fixed is None else self.fixed.select(rows),
        )

    def append(self, other: WholeRunner) -> WholeRunner:
        """A runner with the rows of both, which are of one model and have the same sites."""
        length = max(self.rows.shape[1], other.rows.shape[1])
        tail = max(self.ids.shape[1], other.ids.shape[1])

        def joined(name: str, size: int) -> torch.Tensor:
            parts = [getattr(runner, name) for runner in (self, other)]
            return torch.cat([pad_with_zeros(part, (0, size - part.shape[1])) for part in parts])

        entering = self.entering
        if entering is not None and other.entering is not None:
            parts = [entering.states, other.entering.states]
            beyond = (0, 0) * (parts[0].ndim - 2)  # what comes behind the places: streams, and sizes
            states = torch.cat([pad_with_zeros(part, (*beyond, 0, length - part.shape[1])) for part in parts])
            entering = Entering(entering.layer, states, entering.as_tuple)
        return WholeRunner(
            self.view,
            self.sites,
            torch.cat([self.lookup, other.lookup]),
            joined("rows", length),
            joined("mask", length),
            joined("ids", tail),
            entering,
            None if self.fixed is None or other.fixed is None else self.fixed.append(other.fixed),
        )

    @plain_torch()
    def run(self, delta: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Last states of some tail tokens with deltas added at the sites' lookup token; see `TailRunner.run`.

        Args:
            delta: [R, sites, h].
            wanted: [n] index into the flattened [R * S] tail tokens.

        Returns:
            [n, h], or [n, V] where passes give logits (`Head.matrix` is None).
        """
        row, place = wanted // self.ids.shape[1], wanted % self.ids.shape[1]
        batch = TokenBatch(self.rows, self.mask)

        def add(index: int) -> Callable[..., Any]:
            def hook(module: torch.nn.Module, args: tuple, output: Any) -> Any:
                hidden = hidden_of(output)
                states = as_rows(hidden, self.rows.shape)
                at = self.lookup.to(states.device) + torch.arange(len(states), device=states.device) * states.shape[1]
                change = delta[:, index].to(states.dtype).to(states.device)
                return with_hidden(output, states.flatten(0, 1).index_add(0, at, change).view(hidden.shape))

            return hook

        start = earlier = contextlib.nullcontext()
        if self.entering is not None:
            start = replaced_forwards(stubs(self.view, self.entering))
        if self.fixed is not None:
            earlier = self.fixed.added(self.view, self.sites, self.rows.shape)
        with start, earlier, output_hooks([(module_at(self.view, site), add(i)) for i, site in enumerate(self.sites)]):
            states = last_states(self.view, batch)
        place = place + self.lookup.to(place.device)[row]
        return states[row.to(states.device), place.to(states.device)]


@plain_torch()
@torch.no_grad()
def record_whole(
    view: ModelView,
    batch: TokenBatch,
    lookups: Sequence[int],
    sites: Sequence[Site],
    references: Sequence[int] = (),
    fixed: FixedDeltas | None = None,
) -> tuple[WholeRunner, torch.Tensor, torch.Tensor]:
    """A runner of R prompts; the sites' outputs [R, sites, h] at the lookup tokens; last states of references there.

    Args:
        view: the model, in evaluation mode.
        batch: R prompts.
        lookups: index of the lookup token in each.
        sites: of one layer, where deltas will be added.
        references: rows whose last states at the lookup token are returned.
        fixed: other deltas at the same sites, which all passes add.

    Raises:
        UnsupportedModelError: a site did not run.

    Cost: one forward pass.
    """
    assert batch.attention_mask is not None
    lookup = torch.tensor(list(lookups), device=view.device)
    lengths = batch.attention_mask.sum(1)
    offsets = torch.arange(int((lengths - lookup).max()), device=view.device)
    places = (lookup[:, None] + offsets).clamp(max=batch.input_ids.shape[1] - 1)
    rows = torch.arange(len(lookup), device=lookup.device)
    outputs: dict[Site, torch.Tensor] = {}
    entered: list[Entering] = []

    def record(site: Site) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
            states = as_rows(hidden_of(output), batch.input_ids.shape)
            outputs[site] = states[rows.to(states.device), lookup.to(states.device)]

        return hook

    first = sites[0].layer
    hooks = [(module_at(view, site), record(site)) for site in sites]
    if first > 0 and view.once(starts_midway):

        def record_entering(module: torch.nn.Module, args: tuple, output: Any) -> None:
            entered.append(Entering(first, hidden_of(output), isinstance(output, tuple | list)))

        hooks.append((view.block(first - 1), record_entering))
    earlier = contextlib.nullcontext() if fixed is None else fixed.added(view, sites, batch.input_ids.shape)
    with earlier, output_hooks(hooks):
        states = last_states(view, batch)
    if missing := [site for site in sites if site not in outputs]:
        raise did_not_run(view, missing[0])
    chosen = torch.tensor(list(references), dtype=torch.int64, device=states.device)
    runner = WholeRunner(
        view,
        tuple(sites),
        lookup,
        batch.input_ids,
        batch.attention_mask,
        batch.input_ids.gather(1, places),
        entered[-1] if entered else None,
        fixed,
    )
    at_sites = torch.stack([outputs[site].to(view.device) for site in sites], 1)
    return runner, at_sites, states[chosen, lookup.to(states.device)[chosen]]


@plain_torch()
def run_outputs(
    view: ModelView,
    layer: int,
    batch: TokenBatch,
    places: torch.Tensor,
    entering: torch.Tensor | None,
    outputs: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Last states of some tokens with other outputs of a layer's edited module, differentiable in them.

    Args:
        view: the model, in evaluation mode.
        layer: whose edited module's outputs are replaced.
        batch: R rows of at most T tokens.
        places: [N] int64, the places of the flattened [R * T] that hold a token.
        entering: [N, h] states that enter the block; None to run from the embeddings.
        outputs: [N, out] with the module's bias, in the dtype that passes compute in.
        wanted: [n] int64, indices into the N tokens.

    Returns:
        [n, h], or [n, V] where passes give logits (`Head.matrix` is None).

    Cost: the block and those above it; or all blocks.
    """
    shape = batch.input_ids.shape

    def laid_out(packed: torch.Tensor) -> torch.Tensor:
        here = places.to(packed.device)
        return packed.new_zeros(shape.numel(), packed.shape[1]).index_copy(0, here, packed).view(*shape, -1)

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        states = laid_out(outputs).to(hidden.device)
        return states if hidden.ndim == 3 else states.flatten(0, 1)

    start = {}
    if entering is not None:
        start = stubs(view, Entering(layer, laid_out(entering).to(outputs.dtype), view.once(_returns_tuple)))
    with replaced_forwards({**start, view.edited_module(layer): forward}):
        states = last_states(view, batch)
    return states.flatten(0, 1)[places[wanted.to(places.device)].to(states.device)]


def _returns_tuple(view: ModelView) -> bool:
    """Whether blocks of this version of transformers return tuples."""
    seen: list[bool] = []

    def see(module: torch.nn.Module, args: tuple, output: Any) -> None:
        seen.append(isinstance(output, tuple | list))

    with torch.no_grad(), output_hooks([(view.block(0), see)]):
        last_states(view, pad([sample_rows(view.model.config, view.vocabulary)[0][:2]], view.device))
    return seen[-1]
