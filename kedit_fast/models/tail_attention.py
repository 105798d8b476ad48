"""Attention of tail tokens over prefixes that do not change, with the tail tokens of all rows packed into one row.

transformers' own path pads rows to one length, concatenates prefix and tail again for every layer and pass, repeats
keys and values for grouped heads, makes a mask, and computes gradients for the prefix. Here the blocks see the tail
tokens of all rows as one row without padding. Only the attention between them is laid out by rows, in memory that holds
the prefix already, and gradients go to the tail alone. The function replaces the model's attention function through
transformers' registry; models or versions of transformers without one keep their own, see `usable`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.patching import replaced_attention, takes_attention_functions
from kedit_fast.models.view import ModelView
from kedit_fast.support.dtypes import accumulation_dtype

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
    """Keys and values of one layer: R rows of P places for prefixes, then S places that each pass overwrites."""

    keys: torch.Tensor
    """[R, groups, P + S, size]."""
    values: torch.Tensor
    """[R, groups, P + S, size]."""

    def padded(self, before: int, behind: int) -> KeysValues:
        """The same with more places, of zeros, before and behind."""
        return KeysValues(*(torch.nn.functional.pad(part, (0, 0, before, behind)) for part in (self.keys, self.values)))

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


class Layout:
    """Where the packed tail tokens of R rows belong, and which tokens each of them attends to.

    Args:
        inside: [R, S] bool, which places of the tails hold a token; packed tokens are in this order.
        positions: [R, S] of the tokens in their own prompts.
        prefix: P, the places for prefixes; those of a row end where its tail begins.
        lookup: [R] position of each tail's first token, which is the length of its prefix.
    """

    def __init__(self, inside: torch.Tensor, positions: torch.Tensor, prefix: int, lookup: torch.Tensor):
        self.row, self.place = torch.nonzero(inside, as_tuple=True)  # of every packed token [N]
        self.shape = inside.shape
        self.slot = prefix + self.place
        """[N] where a packed token's key stands among those of its row."""
        slots = torch.arange(prefix, device=inside.device) - (prefix - lookup)[:, None]  # [R, P] positions
        self.keys_at = torch.cat([slots, positions], 1)  # [R, P + S]
        self.is_key = torch.cat([slots >= 0, inside], 1)
        self.queries_at = positions
        self._bias: dict[int | None, torch.Tensor] = {}

    def write_(self, rows: torch.Tensor, other: Layout) -> None:
        """Lay out some rows as those of another layout, in this one's own memory. All places of tails hold tokens.

        Args:
            rows: [n] int64.
            other: of n rows, with as many places.
        """
        self.keys_at[rows], self.is_key[rows], self.queries_at[rows] = other.keys_at, other.is_key, other.queries_at
        for window, bias in self._bias.items():
            bias[rows] = other.bias(window)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that attention was called with; None for calls without one."""
        return set(self._bias)

    def bias(self, window: int | None) -> torch.Tensor:
        """[R, 1, S, P + S] added to scores: 0, or the lowest fp32 number where a query does not attend to a key.

        Args:
            window: length of the sliding window in tokens; None without one.
        """
        if window not in self._bias:
            distance = self.queries_at[:, :, None] - self.keys_at[:, None]  # [R, S, P + S]
            visible = self.is_key[:, None] & (distance >= 0)
            if window is not None:
                visible = visible & (distance < window)
            bias = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device)
            self._bias[window] = bias.masked_fill_(~visible, torch.finfo(torch.float32).min)[:, None]
        return self._bias[window]


@dataclass(frozen=True)
class _Tail:
    """What the cache gives the attention function instead of keys."""

    keys: torch.Tensor
    """[1, groups, N, size] of the packed tail tokens."""
    storage: KeysValues | None
    """Where they belong, beside the prefixes; None where there are no prefixes."""
    layout: Layout
    """How they are laid out there."""


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
    scale = module.scaling if scaling is None else scaling
    bias = key.layout.bias(sliding_window)
    packed = (part[0].transpose(0, 1) for part in (query, key.keys, value))  # [N, heads, size]
    output = _TailAttention.apply(*packed, key.storage, key.layout, bias, scale, softcap or 0.0)
    return output[None], None  # [1, N, heads, size]


class _TailAttention(torch.autograd.Function):
    """softmax(cap(scale Q [Kp, K]^T) + bias) [Vp, V] for every row, differentiable in Q, K and V of the tail.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped heads by Ainslie et al. 2023, arXiv 2305.13245.
    """

    @staticmethod
    def forward(ctx, query, key, value, storage: KeysValues | None, layout: Layout, bias, scale: float, softcap: float):
        rows, tail = layout.shape
        heads, groups = query.shape[1], key.shape[1]
        row, place = layout.row.to(query.device), layout.place.to(query.device)
        if storage is None:
            storage = KeysValues(*(_laid_out(part, rows, tail, row, place) for part in (key, value)))
        else:
            slot = layout.slot.to(query.device)
            storage.keys[row, :, slot] = key
            storage.values[row, :, slot] = value
        keys, values = (part.flatten(0, 1) for part in (storage.keys, storage.values))  # [R groups, P + S, size]
        queries = _laid_out(query, rows, tail, row, place).view(rows * groups, -1, query.shape[2])
        scores = torch.bmm(queries, keys.mT)  # [R groups, heads / groups * S, P + S]
        wide = scores.to(accumulation_dtype(scores))
        wide = wide.mul_(scale)
        capped = ()
        if softcap:
            capped = (torch.tanh(wide / softcap),)
            wide = capped[0] * softcap
        wide.view(rows, heads, tail, -1).add_(bias.to(wide.device))
        weights = torch.softmax(wide, -1).to(query.dtype)
        ctx.save_for_backward(queries, weights, row, place, *capped)
        ctx.keys_values, ctx.scale, ctx.shape = (keys, values), scale, (rows, heads, groups, tail)
        return torch.bmm(weights, values).view(rows, heads, tail, -1)[row, :, place]

    @staticmethod
    def backward(ctx, gradient):
        queries, weights, row, place, *capped = ctx.saved_tensors
        keys, values = ctx.keys_values
        rows, heads, groups, tail = ctx.shape
        out = _laid_out(gradient, rows, tail, row, place).view(queries.shape)
        of_weights = torch.bmm(out, values.mT)
        wide = weights.to(accumulation_dtype(weights))
        # torch makes no public function of this kernel.
        of_scores = torch._softmax_backward_data(of_weights.to(wide.dtype), wide, -1, wide.dtype)  # pyright: ignore[reportPrivateImportUsage]
        if capped:
            of_scores = of_scores * (1 - capped[0].square())
        of_scores = of_scores.mul_(ctx.scale).to(queries.dtype)
        of_query = torch.bmm(of_scores, keys).view(rows, heads, tail, -1)[row, :, place]
        of_key = torch.bmm(of_scores[..., -tail:].mT, queries).view(rows, groups, tail, -1)[row, :, place]
        of_value = torch.bmm(weights[..., -tail:].mT, out).view(rows, groups, tail, -1)[row, :, place]
        return of_query, of_key, of_value, None, None, None, None, None


def _laid_out(packed: torch.Tensor, rows: int, tail: int, row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Packed tokens [N, heads, size] laid out as [rows, heads, tail, size], zero elsewhere."""
    rows_first = packed.new_zeros(rows, packed.shape[1], tail, packed.shape[2])
    rows_first[row, :, place] = packed
    return rows_first
