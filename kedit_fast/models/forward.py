"""Partial forward passes: what goes into and comes out of modules, stopping as soon as it is known.

Batches are padded on the right by this module, whatever the tokenizer's own side, so positions count from the left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.models.architectures import ModelView


@dataclass(frozen=True)
class TokenBatch:
    """Token ids [rows, T], padded on the right, with the attention mask [rows, T]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions [rows, T], counted from 0 at each row's first token."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)


@dataclass(frozen=True)
class Site:
    """A place in the model: `what` is "key" (input of the edited linear layer), "mlp" or "block" (their outputs)."""

    layer: int
    what: str


def pad(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> TokenBatch:
    """A TokenBatch of rows of token ids; what `fill` is does not matter, it is masked."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), fill, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return TokenBatch(ids.to(device), mask.to(device))


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of a tuple in older transformers."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """What a block returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class _Enough(Exception):
    """Raised by a hook to leave the forward pass when all has been seen."""


def module_at(view: ModelView, site: Site) -> torch.nn.Module:
    """The module whose hook sees `site`."""
    if site.what == "key":
        return view.edited_module(site.layer)
    return view.mlp(site.layer) if site.what == "mlp" else view.block(site.layer)


@torch.no_grad()
def capture(
    view: ModelView, batch: TokenBatch, sites: Sequence[Site], positions: torch.Tensor | None = None
) -> dict[Site, torch.Tensor]:
    """Run the model until all `sites` are seen and return them.

    Args:
        view: the model.
        batch: R rows of tokens.
        sites: what to look at.
        positions: [R] one position for each row, or None for all positions.

    Returns:
        for each site [R, size] at the positions, or [R, T, size].

    Cost: the blocks up to the last site; the head never runs.
    """
    seen: dict[Site, torch.Tensor] = {}
    rows = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device)

    def keep(site: Site, states: torch.Tensor) -> None:
        if positions is not None:
            states = states[rows.to(states.device), positions.to(states.device)]
        seen[site] = states
        if len(seen) == len(set(sites)):
            raise _Enough

    with contextlib.ExitStack() as stack:
        for site in set(sites):
            if site.what == "key":
                hook = module_at(view, site).register_forward_pre_hook(
                    lambda module, args, site=site: keep(site, args[0])
                )
            else:
                hook = module_at(view, site).register_forward_hook(
                    lambda module, args, output, site=site: keep(site, hidden_of(output))
                )
            stack.callback(hook.remove)
        with contextlib.suppress(_Enough):
            _run_base(view, batch)
    return seen


def last_hidden(view: ModelView, batch: TokenBatch) -> torch.Tensor:
    """The states [R, T, h] that the head takes: all blocks and the final norm, without the head."""
    return _run_base(view, batch).last_hidden_state


def _run_base(view: ModelView, batch: TokenBatch):
    return view.base(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )


@contextlib.contextmanager
def evaluating(view: ModelView) -> Iterator[None]:
    """Evaluation mode, and no gradients kept for parameters, as long as the block lasts."""
    training = [module for module in view.model.modules() if module.training]
    required = [p for p in view.model.parameters() if p.requires_grad]
    try:
        view.model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
