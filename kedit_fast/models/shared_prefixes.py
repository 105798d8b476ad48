"""Rows that begin alike: each distinct beginning runs once, and the rows go on from its keys and values.

MEMIT's contexts, "{sampled text}. {prompt}", begin with the same few texts for every request. Here the tokens of all
rows stand in one packed row: first those of the prefixes that several rows share, then what follows in each row. In
every block, a row's own tokens attend to the keys and values that its prefix's tokens have just been given. So a token
that many rows have in common is computed once, and no row is padded. The function is that of whole rows.

Which models run so is tried first; see `prompt_runner.shares_prefixes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.models import tail_attention
from kedit_fast.models.view import ModelView

LEAST_TOKENS = 32
"""Tokens that sharing must save in a pass; below, laying rows out takes longer than it saves."""
LEAST_SHARE = 0.1
"""Share of a pass's tokens that sharing must save."""


@dataclass(frozen=True)
class Split:
    """R rows of tokens, taken apart into prefixes that several of them share, and what follows in each."""

    prefixes: tuple[tuple[int, ...], ...]
    """D distinct prefixes, token ids."""
    of_row: tuple[int, ...]
    """[R] the prefix of each row; -1 for a row without one."""
    saved: int
    """Tokens that need not be computed again."""

    @property
    def lengths(self) -> list[int]:
        """[R] tokens of each row's prefix; 0 for a row without one."""
        return [len(self.prefixes[i]) if i >= 0 else 0 for i in self.of_row]


def split_rows(
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    least_tokens: int | None = None,
    least_share: float | None = None,
) -> Split | None:
    """The prefixes to run once; None where they save too little.

    Of a prefix that n rows share, and longer ones inside these rows, those are taken that save more tokens.

    Args:
        rows: token ids of R rows.
        limits: [R] tokens of each row, from its first on, that may be in its prefix; below the row's length.
        least_tokens: tokens to save at least; None for `LEAST_TOKENS`.
        least_share: share of all tokens to save at least; None for `LEAST_SHARE`.

    Returns:
        the split, or None.

    Cost: a sort of the rows, and a comparison of neighbors.

    Example:
        >>> split = split_rows([(7, 8, 1), (7, 8, 2, 3), (5, 6)], (2, 3, 1), least_tokens=1)
        >>> split.prefixes, split.of_row, split.saved
        (((7, 8),), (0, 0, -1), 2)
    """
    begins = [tuple(row[:limit]) for row, limit in zip(rows, limits, strict=True)]
    order = sorted(range(len(rows)), key=begins.__getitem__)
    common = [_common(begins[a], begins[b]) for a, b in itertools.pairwise(order)]
    saved, groups = _best_groups(common)
    least = max(
        1,
        LEAST_TOKENS if least_tokens is None else least_tokens,
        (LEAST_SHARE if least_share is None else least_share) * sum(map(len, rows)),
    )
    if saved < least:
        return None
    of_row = [-1] * len(rows)
    for number, (first, end, _) in enumerate(groups):
        for place in range(first, end):
            of_row[order[place]] = number
    prefixes = tuple(begins[order[first]][:length] for first, _, length in groups)
    return Split(prefixes, tuple(of_row), saved)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of first tokens that two rows share."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


_Group = tuple[int, int, int]  # sorted rows [first, end) that share a prefix of this length


def _best_groups(common: Sequence[int]) -> tuple[int, list[_Group]]:
    """Tokens saved, and the groups of sorted rows whose neighbors share `common` [R - 1] first tokens.

    Rows that share a prefix are an interval of the sorted rows, and such intervals are nested: an interval is taken as
    a whole, or the best of those inside it.
    """
    # Of intervals that are open: length, first row, tokens saved inside, and the groups that save them.
    stack: list[tuple[int, int, int, list[_Group]]] = [(0, 0, 0, [])]
    for end, length in enumerate((*common, 0), start=1):
        first, saved, groups = end - 1, 0, []
        while stack[-1][0] > length:
            shared, first, inside, inner = stack.pop()
            saved, groups = saved + inside, [*inner, *groups]
            if (whole := (end - first - 1) * shared) >= saved:
                saved, groups = whole, [(first, end, shared)]
        if stack[-1][0] < length:
            stack.append((length, first, saved, groups))
        else:
            shared, first, inside, inner = stack.pop()
            stack.append((shared, first, inside + saved, [*inner, *groups]))
    return stack[0][2], stack[0][3]


class SharedRows:
    """R rows that run with what they share once: a batch of one packed row of N tokens, for passes without gradients.

    Args:
        rows: token ids of R rows.
        split: their prefixes.
        device: of the model's embedding.
    """

    def __init__(self, rows: Sequence[Sequence[int]], split: Split, device: torch.device):
        count, lengths = len(split.prefixes), split.lengths
        parts = [*split.prefixes, *(tuple(row[n:]) for row, n in zip(rows, lengths, strict=True))]

        def column(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device="cpu").to(device)

        sizes, before = column([len(part) for part in parts]), column([0] * count + lengths)
        starts = sizes.cumsum(0) - sizes  # of each part among the packed tokens
        width, prefix = max(map(len, parts)), max(lengths)
        offsets = torch.arange(width, device=device)
        inside = offsets < sizes[:, None]  # [D + R, S]
        positions = before[:, None] + offsets
        self.input_ids = column([token for part in parts for token in part])[None]
        """[1, N] int64, the tokens of prefixes, then of rows."""
        self.position_ids = positions[inside][None]
        """[1, N] int64, positions in their rows."""
        self.attention_mask = None
        """None: which token attends to which is the layout's."""
        self.prefixes, self.prefix = count, prefix
        self.lengths = before[count:]
        """[R] int64, tokens of each row's prefix."""
        self.layout = tail_attention.Layout.of_tails(inside, prefix, before)
        self._starts = starts[count:]
        self._row = torch.nonzero(inside)[:, 0] - count  # of each packed token; below 0 of those of prefixes
        # [D + R, P + S] the packed token whose keys stand in a slot; N, for zeros, where there is none.
        none = self.input_ids.numel()
        of_row = column([*range(count), *(max(i, 0) for i in split.of_row)])
        slots = torch.arange(prefix, device=device) - (prefix - before)[:, None]  # [D + R, P] positions
        earlier = torch.where(slots >= 0, starts[of_row][:, None] + slots, none)
        self._sources = torch.cat([earlier, torch.where(inside, starts[:, None] + offsets, none)], 1)

    def index(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The packed tokens at positions of rows, behind their prefixes; those past a row's end mean nothing."""
        at = self._starts[rows] + positions - self.lengths[rows]
        return at.clamp(max=self.input_ids.numel() - 1)

    def up_to(self, limits: torch.Tensor) -> torch.Tensor:
        """The packed tokens at most at position limits [R] of their rows, with all of the prefixes."""
        limit = limits[self._row.clamp(min=0)]
        return torch.nonzero((self._row < 0) | (self.position_ids[0] <= limit))[:, 0]

    def run(self, view: ModelView, cache: SharingCache | None = None) -> torch.Tensor:
        """Last states [1, N, h] of the packed tokens.

        Args:
            view: the model, in evaluation mode.
            cache: a new one that records layers; None to record none.
        """
        with tail_attention.installed(view):
            return view.base(
                input_ids=self.input_ids,
                attention_mask=None,
                position_ids=self.position_ids,
                past_key_values=SharingCache(self) if cache is None else cache,
                use_cache=True,
            ).last_hidden_state

    def laid_out(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values [1, groups, N, size] as [D + R, groups, P + S, size], in all slots where they stand."""
        packed = states[0].transpose(0, 1)
        packed = torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])])
        return packed[self._sources.to(packed.device)].transpose(1, 2).contiguous()


class SharingCache(tail_attention.TailCache):
    """The cache of one pass over `SharedRows`.

    Args:
        rows: what runs.
        layers: whose keys and values are recorded.
    """

    def __init__(self, rows: SharedRows, layers: Collection[int] = ()):
        super().__init__(lambda layer: (self._states, rows.layout))
        self.rows = rows
        """What runs."""
        self._layers = layers
        self._states: tail_attention.KeysValues | None = None
        self.recorded: dict[int, tail_attention.KeysValues] = {}
        """Keys and values [D + R, groups, P + S, size] by recorded layer."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Lay the keys and values of all tokens out by rows; returns them as the attention function takes them."""
        self._states = tail_attention.KeysValues(*map(self.rows.laid_out, (key_states, value_states)))
        if layer_idx in self._layers:
            self.recorded[layer_idx] = self._states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
