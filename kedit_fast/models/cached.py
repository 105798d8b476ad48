"""Passes over the beginnings of rows, and over what follows them: with the keys and values of the decoder's own cache.

Rows are laid out as [beginning, gap, what follows, ...]: gaps are masked and positions are given explicitly, so that
every token attends to what it would attend to in its own unpadded row. That takes for granted how a model makes masks,
counts positions and uses its cache. So before it is trusted, short rows run both ways (`cache_limit`); where the
results differ, whole rows run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kedit_fast.models.forward import evaluating, fused_modules, last_states, pad
from kedit_fast.models.head import error_limit, relative_error, sample_rows
from kedit_fast.models.routes import carry_rows, suspended
from kedit_fast.models.view import ModelView
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_NEEDED = ("attention_mask", "position_ids", "past_key_values", "use_cache")
_SPANS = ("window", "chunk_size", "local_attention")  # in names of a configuration's spans of tokens
_LEAST_SPAN = 16  # of rows in parts; in shorter ones a gap soon reaches past a window
_COUNTS = ("layers", "pattern", "feed_forward")  # in names of what else such names count


class RoomyCache(DynamicCache):
    """Keys and values by layer, in memory that has room for what follows: nothing is copied when tokens are added.

    Args:
        room: number of places to make memory for when tokens are first added to states.
    """

    def __init__(self, room: int = 0):
        super().__init__()
        self._room = room
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._filled: dict[int, int] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Add keys and values [R, groups, T, size] of a layer; returns those of all its tokens so far."""
        filled = self._filled.get(layer_idx, 0)
        end = filled + key_states.shape[2]
        self._filled[layer_idx] = end
        stored = self._states.get(layer_idx)
        if stored is None and end >= self._room:
            self._states[layer_idx] = key_states, value_states
            return key_states, value_states
        if stored is None or stored[0].shape[2] < end:
            old = stored
            places = max(self._room, end)
            stored = _with_places(key_states, places), _with_places(value_states, places)
            for part, before in zip(stored, old or (), strict=False):
                part[:, :, :filled] = before[:, :, :filled]
            self._states[layer_idx] = stored
        keys, values = stored
        keys[:, :, filled:end] = key_states
        values[:, :, filled:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        """Number of places that a layer holds."""
        return self._filled.get(layer_idx or 0, 0)

    def get_mask_sizes(self, query: Any, layer_idx: int = 0, *args, **kwargs) -> tuple[int, int]:
        """Number of keys, and the place of the first one, for masks of so many (or these) queries."""
        count = query if isinstance(query, int) else query.shape[0]
        return self.get_seq_length(layer_idx) + count, 0

    @property
    def bytes_of_a_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        parts = (part for stored in self._states.values() for part in stored)
        return sum(part.shape[1] * part.shape[3] * part.element_size() for part in parts)

    def select(self, rows: torch.Tensor, width: int, room: int) -> RoomyCache:
        """A cache with the first `width` places of some rows [n] int64, and with room for more."""
        result = RoomyCache(max(width, room))
        for layer, stored in self._states.items():
            at = rows.to(stored[0].device)
            parts = []
            for part in stored:
                made = part.new_empty(len(at), part.shape[1], result._room, part.shape[3])
                made[:, :, :width] = part[:, :, :width].index_select(0, at)
                parts.append(made)
            result._states[layer] = (parts[0], parts[1])
            result._filled[layer] = width
        carry_rows(self, result, rows)
        return result


def _with_places(like: torch.Tensor, places: int) -> torch.Tensor:
    rows, groups, _, size = like.shape
    return like.new_empty(rows, groups, places, size)


class Beginnings:
    """R rows of tokens that have run, ready to be followed by more; `run_beginnings` makes it.

    The model must stay in evaluation mode, with the same weights, as long as it is used.
    """

    def __init__(self, view: ModelView, cache: RoomyCache, lengths: torch.Tensor, mask: torch.Tensor):
        self._view, self._cache = view, cache
        self.lengths = lengths
        """[R] int64, number of tokens in each row."""
        self._mask = mask  # [R, places] int64, 1 where a token is

    @property
    def bytes_of_a_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return self._cache.bytes_of_a_token

    def select(self, rows: Sequence[int], lengths: Sequence[int] | None = None, room: int = 0) -> Beginnings:
        """Some rows, each as often as it is named.

        Args:
            rows: n indices.
            lengths: how many of the first tokens to take of each, if nothing has followed them yet; None for all.
            room: number of tokens that will follow.

        Cost: a copy of their keys and values.
        """
        at = torch.tensor(list(rows), dtype=torch.int64, device=self._mask.device)
        if lengths is None:
            counts, width = self.lengths[at], self._mask.shape[1]
            mask = self._mask[at]
        else:
            counts = torch.tensor(list(lengths), dtype=torch.int64, device=at.device)
            width = max(lengths)
            mask = (torch.arange(width, device=at.device) < counts[:, None]).long()
        return Beginnings(self._view, self._cache.select(at, width, width + room), counts, mask)

    def follow(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run the tokens that follow each row, of R lists; they belong to the rows from now on.

        Returns:
            [R, T, h] last states of these tokens, T of the longest list; those of padding mean nothing.
        """
        if all(len(row) == 1 for row in tokens):
            ids = torch.tensor(tokens, dtype=torch.int64).to(self._view.device)
            mask = torch.ones_like(ids)
        else:
            batch = pad(tokens, self._view.device)
            assert batch.attention_mask is not None
            ids, mask = batch.input_ids, batch.attention_mask
        self._mask = torch.cat([self._mask, mask], 1)
        positions = self.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
        states = _run(self._view, ids, self._mask, positions, self._cache)
        self.lengths = self.lengths + mask.sum(1)
        return states


def run_beginnings(view: ModelView, rows: Sequence[Sequence[int]], room: int = 0) -> tuple[torch.Tensor, Beginnings]:
    """Run the first tokens of R rows; `cache_limit` says of how many tokens a row may be in the end.

    Args:
        view: the model, in evaluation mode.
        rows: token ids; the longest row and what follows must not be longer than `cache_limit(view)`.
        room: number of tokens that will follow each row, where these are known not to be selected first.

    Returns:
        [R, T, h] last states, those of padding mean nothing; and what can be followed.

    Cost: one forward pass, without the head.
    """
    batch = pad(rows, view.device)
    assert batch.attention_mask is not None
    width = batch.input_ids.shape[1]
    cache = RoomyCache(width + room if room else 0)
    states = _run(view, batch.input_ids, batch.attention_mask, batch.position_ids, cache)
    return states, Beginnings(view, cache, batch.attention_mask.sum(1), batch.attention_mask)


@plain_torch()
def _run(
    view: ModelView, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: RoomyCache
) -> torch.Tensor:
    # The positions of padding may be past the last one that the model has.
    positions = positions.clamp(max=view.max_length - 1)
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    with fused_modules(view):
        return view.base(input_ids=ids, **given).last_hidden_state


def cache_limit(view: ModelView) -> int:
    """The number of tokens, gaps included, up to which rows may run in parts; 0 where they must run whole.

    Tried with a few tokens for the first call of a view, and said at INFO where whole rows run.
    """
    return view.once(_tried)[0]


def cache_bytes(view: ModelView) -> int:
    """Bytes of the keys and values of one token; 0 where `cache_limit` is."""
    return view.once(_tried)[1]


@plain_torch()
@torch.no_grad()
def _tried(view: ModelView) -> tuple[int, int]:
    """The limit, and the bytes of a token."""
    limit, obstacle = _span(view.config), _obstacle(view)
    if not obstacle:
        rows = [row[: _LEAST_SPAN // 2] for row in sample_rows(view.model.config, view.vocabulary)]
        with evaluating(view), suspended(view.model):
            try:
                error, size = _difference(view, rows)
                if error <= error_limit(view.head.matrix.dtype, view.head.rounding):  # pyright: ignore[reportOptionalMemberAccess]
                    return min(limit, view.max_length), size
                obstacle = f"their states differ by {error:.1g}"
            except Exception as error:  # it may be any code
                obstacle = f"it does not run in parts with its cache ({type(error).__name__}: {first_line(error)})"
    _log.info("%s: prompts run anew for each of their targets and tokens: %s", view.spec.name, obstacle)
    return 0, 0


def _difference(view: ModelView, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
    """The relative difference of last states of rows that run in three parts, from those of whole rows; and the bytes
    of a token's keys and values."""
    first = [max(1, len(row) - 3 - i) for i, row in enumerate(rows)]
    second = [min(len(row), begin + 1 + i % 2) for i, (row, begin) in enumerate(zip(rows, first, strict=True))]
    order = [*range(len(rows)), 0][::-1]  # one of them twice
    whole = last_states(view, pad(rows, view.device))
    _, beginnings = run_beginnings(
        view, [row[: end + (i == 1)] for i, (row, end) in enumerate(zip(rows, first, strict=True))]
    )
    part = beginnings.select(order, [first[i] for i in order], room=1)
    results, expected = [], []
    for begin, end in ((first, second), (second, [len(row) for row in rows])):
        states = part.follow([rows[i][begin[i] : end[i]] for i in order])
        for r, i in enumerate(order):
            results.append(states[r, : end[i] - begin[i]])
            expected.append(whole[i, begin[i] : end[i]])
        part = part.select(range(len(order)))
    return relative_error(torch.cat(results), torch.cat(expected)), part.bytes_of_a_token


def _obstacle(view: ModelView) -> str:
    """Why rows cannot run in parts; "" if that is to be tried."""
    if view.head.matrix is None:
        return "the model runs whole"
    if missing := [name for name in _NEEDED if name not in view.base_takes]:
        return f"its decoder takes no {missing[0]}"
    if (limit := _span(view.config)) < _LEAST_SPAN:
        return f"its attention reaches {limit} tokens"
    return ""


def _span(config: Any) -> int:
    """The shortest span of tokens that a configuration names, such as a sliding window: rows may be that long.

    Within it, a window shuts nothing out, so it does not matter that a gap counts in it.
    """
    spans = [
        value
        for name, value in vars(config).items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value > 0
        and any(part in name for part in _SPANS)
        and not any(part in name for part in _COUNTS)
        and not (name == "sliding_window" and getattr(config, "use_sliding_window", True) is False)
    ]
    return min(spans, default=2**31)
