"""Attention of tail tokens over prefixes that do not change, with the tail tokens of all rows packed into one row.

transformers' own path pads rows to one length, concatenates prefix and tail again for every layer and pass, repeats
keys and values for grouped heads, makes a mask, and computes gradients for the prefix. Here the blocks see the tail
tokens of all rows as one row without padding, attention between them is the op `tail_attention`, which reads prefixes
where they are, and gradients go to the tail alone. The function replaces the model's attention function through
transformers' registry; models or versions of transformers without one keep their own, see `usable`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.patching import replaced_attention, takes_attention_functions
from kedit_fast.models.view import ModelView
from kedit_fast.ops import tail_attention

_POSITIONS = ("position_ids", "cache_position")  # tensors that models pass on and attention does not use


def usable(view: ModelView) -> bool:
    """Whether the model takes its attention from transformers' registry, and states its scaling."""
    return (
        takes_attention_functions(view.base, view.config)
        and not getattr(view.config, "use_bidirectional_attention", False)
        and bool(view.spec.attention)
        and all(hasattr(view.attention(layer), "scaling") for layer in range(view.num_layers))
    )


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one layer: R rows of P places for prefixes."""

    keys: torch.Tensor
    """[R, groups, P, size]."""
    values: torch.Tensor
    """[R, groups, P, size]."""

    def padded(self, before: int) -> KeysValues:
        """The same with more places, of zeros, before them."""
        return KeysValues(*(torch.nn.functional.pad(part, (0, 0, before, 0)) for part in (self.keys, self.values)))

    def write_(self, rows: torch.Tensor, other: KeysValues) -> None:
        """Put the rows of another in the place of some of these, in their memory."""
        for part, new in ((self.keys, other.keys), (self.values, other.values)):
            part[rows.to(part.device)] = new

    def select(self, rows: torch.Tensor, begin: int, end: int) -> KeysValues:
        """Some of the rows, from place `begin` up to place `end`."""
        return KeysValues(*(part[rows.to(part.device), :, begin:end].contiguous() for part in (self.keys, self.values)))

    @staticmethod
    def cat(parts: Sequence[KeysValues]) -> KeysValues:
        """The rows of all, which have the same length."""
        return KeysValues(torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts]))


@dataclass(frozen=True)
class Layout:
    """Which packed tail tokens belong to which of R rows, and which places of a prefix come before them."""

    starts: torch.Tensor
    """[R + 1] int64, where each row's tokens begin among the N packed ones, and N."""
    longest: int
    """Tokens of the longest tail, or more."""
    spans: torch.Tensor
    """[R, 2] int64: from which place, and before which, the prefix of each row lies."""
    prefix_rows: torch.Tensor | None = None
    """[R] int64, the row of the prefixes' keys that each row has; None where it is its own."""
    windows: set[int | None] = field(default_factory=set)
    """The sliding windows that attention was called with; None for calls without one."""

    @staticmethod
    def of_tails(inside: torch.Tensor, prefix: int, lookup: torch.Tensor) -> Layout:
        """The layout of tails whose prefixes end in one place.

        Args:
            inside: [R, S] bool, which places of the tails hold a token: the first ones of each.
            prefix: P, the places for prefixes; those of a row end where its tail begins.
            lookup: [R] position of each tail's first token, which is the length of its prefix.
        """
        starts = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))
        spans = torch.stack([prefix - lookup, torch.full_like(lookup, prefix)], 1)
        return Layout(starts, inside.shape[1], spans)

    def write_(self, rows: torch.Tensor, other: Layout) -> None:
        """Lay out some rows as those of another layout, in this one's own memory. All places of tails hold tokens.

        Args:
            rows: [n] int64.
            other: of n rows, with as many places.
        """
        self.spans[rows] = other.spans

    def repeated(self, copies: int, tokens: int) -> Layout:
        """The layout of so many copies of all rows, one behind the other; a copy has so many tokens."""
        begin = torch.arange(copies, device=self.starts.device)[:, None] * tokens
        starts = torch.nn.functional.pad((begin + self.starts[:-1]).flatten(), (0, 1), value=copies * tokens)
        rows = torch.arange(len(self.spans), device=self.spans.device) if self.prefix_rows is None else self.prefix_rows
        spans = self.spans.repeat(copies, 1)
        return dataclasses.replace(self, starts=starts, spans=spans, prefix_rows=rows.repeat(copies))


@dataclass(frozen=True)
class _Tail:
    """What the cache gives the attention function instead of keys."""

    keys: torch.Tensor
    """[1, groups, N, size] of the packed tail tokens."""
    prefixes: KeysValues | None
    """The prefixes of their rows; None where there are none."""
    layout: Layout
    """Which row and prefix each token belongs to."""


class TailCache(DynamicCache):
    """A cache whose prefixes are fixed: `update` returns the tail's keys with the places that they belong to.

    Args:
        of_layer: from a layer to its prefixes' keys and values, None where there are none, and to its rows' layout.
    """

    def __init__(self, of_layer: Callable[[int], tuple[KeysValues | None, Layout]]):
        super().__init__()
        self._of_layer = of_layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # noqa: D102
        return _Tail(key_states, *self._of_layer(layer_idx)), value_states

    def get_seq_length(self, *args, **kwargs) -> int:  # noqa: D102
        return 0

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:  # noqa: D102
        return 0, 0


@contextlib.contextmanager
def installed(view: ModelView) -> Iterator[None]:
    """Inside the block the model's attention is `_attention`."""
    with replaced_attention(view.base, _attention):
        yield


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: _Tail,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    unknown = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in _POSITIONS]
    if unknown:  # sinks, biases of positions: `prompt_runner` then runs the model's own attention
        raise UnsupportedModelError(f"attention that takes {unknown[0]} does not run over packed tails")
    layout, device = key.layout, query.device
    scale: Any = module.scaling if scaling is None else scaling
    prefixes: dict[str, Any] = {}
    layout.windows.add(sliding_window)
    if key.prefixes is not None:
        prefixes = {
            "prefix_keys": key.prefixes.keys,
            "prefix_values": key.prefixes.values,
            "spans": layout.spans.to(device),
            "prefix_rows": None if layout.prefix_rows is None else layout.prefix_rows.to(device),
        }
    output = tail_attention(
        query[0].transpose(0, 1),  # [N, heads, size]
        key.keys[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.starts.to(device),
        layout.longest,
        scale=scale,
        softcap=softcap or 0.0,
        window=sliding_window,
        **prefixes,
    )
    return output[None], None  # [1, N, heads, size]
