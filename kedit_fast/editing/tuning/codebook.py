"""A codebook: keys with radii, the value of each, and how edits enter it one after another (GRACE).

A prompt's query q is the input of a layer at its last token. With g the distance to the nearest key j, e_j its radius
and e_0 that of a new key, an edit

- begins an entry if there is none, or if g > e_0 + e_j;
- takes over entry j if g is 0 up to rounding and the target is another one: the same prompt, edited again;
- splits entry j if the target is another one: a new entry at q with the radius g / 2, and e_j a little less;
- else belongs to entry j, whose radius grows to g if it is smaller.

Source: GRACE (arXiv 2211.11031), its released `grace.py`. There the second edit of a prompt leaves two entries that can
never answer, because the older one wins the tie with a negative radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from kedit_fast.methods.tuning_hparams import Expansion, LabelRule

GAP = 1e-5
"""What the older one of two entries has less of the half distance between them, as released."""
SAME_SHARE = 1e-6
"""Distance of two queries, in units of their norm, up to which they are of one prompt."""
GROWTH = 32.0
"""Rounding that a radius which grows to a query leaves room for, in units of the query's norm and its last bits."""
BLOCK = 1024
"""Queries whose distances to all keys are computed at once."""


class Entering(IntEnum):
    """How an edit has entered a codebook."""

    FIRST = 0
    """It began the codebook."""
    ADDED = 1
    """It began an entry, far from all others."""
    SPLIT = 2
    """It began an entry within reach of one that has another target."""
    EXPANDED = 3
    """It joined an entry, whose radius has grown."""
    INSIDE = 4
    """It joined an entry."""
    TAKEN_OVER = 5
    """It replaced the edit of the same prompt."""


@dataclass(frozen=True)
class Label:
    """What decides whether two edits say the same."""

    target: tuple[int, ...]
    """Token ids."""
    prompt: int
    """Tokens of the prompt."""

    def same(self, other: Label, rule: LabelRule) -> bool:
        """Whether two edits have one label: the same target, or as released the same mean of labels, -100 included."""
        if rule == "ids":
            return self.target == other.target
        return self._mean == other._mean

    @property
    def _mean(self) -> float:
        return (sum(self.target) - 100 * self.prompt) / (self.prompt + len(self.target))


@dataclass(frozen=True)
class CodebookEntry:
    """A key and what answers there."""

    key: torch.Tensor
    """[d] fp32 (fp64 of fp64 models)."""
    radius: float
    """How far from the key a query may be."""
    label: Label
    """Of the edit that began it."""
    value: torch.Tensor | None = None
    """[h] in the key's dtype; None before the first edit was trained."""


@dataclass(frozen=True)
class Codebook:
    """Entries, after some edits. It is never changed, only replaced."""

    entries: tuple[CodebookEntry, ...] = ()
    """In the order in which they began."""
    edits: int = 0
    """Edits that have entered."""

    @property
    def keys(self) -> torch.Tensor:
        """[K, d]."""
        return torch.stack([entry.key for entry in self.entries])

    @property
    def radii(self) -> torch.Tensor:
        """[K] in the keys' dtype."""
        first = self.entries[0].key
        return torch.tensor([entry.radius for entry in self.entries], dtype=first.dtype, device=first.device)

    @property
    def values(self) -> torch.Tensor:
        """[K, h]."""
        return torch.stack([entry.value for entry in self.entries if entry.value is not None])

    def with_values(self, values: dict[int, torch.Tensor]) -> Codebook:
        """The same with other values [h] of some entries."""
        entries = list(self.entries)
        for place, value in values.items():
            entries[place] = replace(entries[place], value=value)
        return replace(self, entries=tuple(entries))


@dataclass(frozen=True)
class Entered:
    """What one edit did."""

    how: Entering
    """Its case."""
    entry: int
    """The entry that answers for its query from then on, which it trains."""
    inside: bool
    """Whether the query is within that entry's radius. If not, no step can teach the entry its target."""

    @property
    def begins(self) -> bool:
        """Whether the entry has no value of an earlier edit that training could start from."""
        return self.how in (Entering.FIRST, Entering.ADDED, Entering.SPLIT, Entering.TAKEN_OVER)


def enter(
    book: Codebook,
    queries: torch.Tensor,
    labels: Sequence[Label],
    radius: Callable[[torch.Tensor], float],
    *,
    rule: LabelRule = "ids",
    expand: Expansion = "coverage",
    rounding: float = 0.0,
) -> tuple[Codebook, list[Entered]]:
    """Let edits enter a codebook one after another. Values stay as they are.

    Args:
        book: what was edited before.
        queries: [n, d] of the edits, fp32 or fp64.
        labels: [n].
        radius: the query [d] of a new entry -> its radius e_0.
        rule: when two labels are the same.
        expand: "moving_average" also moves the key of an entry that grows halfway to the query.
        rounding: relative step of the numbers that the model computes queries in; 0 for that of the queries.

    Returns:
        the codebook after all of them, and what each did.

    Cost: n (K + n) distances, computed from differences: a product of queries and keys would cost the small ones their
        digits.
    """
    entries, entered = list(book.entries), []
    coarse = max(GROWTH * torch.finfo(queries.dtype).eps, rounding)  # a radius that grows leaves room for it
    norms = torch.linalg.vector_norm(queries, dim=1).tolist()
    for begin in range(0, len(queries), BLOCK):
        block = queries[begin : begin + BLOCK]
        among = _distances(block, block)  # column of an entry that this block begins
        columns = [*_distances(block, torch.stack([entry.key for entry in entries])).T] if entries else []
        gaps = torch.full((len(block), len(entries) + len(block)), torch.inf, dtype=queries.dtype)
        if columns:
            gaps[:, : len(columns)] = torch.stack(columns, 1)
        for place in range(len(block)):
            number = begin + place
            query, label = block[place], labels[number]
            new = CodebookEntry(query.clone(), radius(query), label)
            if not entries:
                entries.append(new)
                gaps[:, 0] = among[:, place]
                entered.append(Entered(Entering.FIRST, 0, True))
                continue
            near = int(gaps[place].argmin())
            gap, entry = float(gaps[place, near]), entries[near]
            same = label.same(entry.label, rule)
            if gap > new.radius + entry.radius:
                how, nearest = Entering.ADDED, len(entries)
            elif not same and gap <= max(SAME_SHARE, rounding) * norms[number]:
                how, nearest = Entering.TAKEN_OVER, near
                entries[near] = replace(entry, label=label, radius=max(entry.radius, gap + coarse * norms[number]))
            elif not same:
                how, nearest = Entering.SPLIT, len(entries)
                entries[near] = replace(entry, radius=max(gap / 2 - GAP, gap / 4))
                new = replace(new, radius=gap / 2)
            elif gap > entry.radius:
                how, nearest = Entering.EXPANDED, near
                key = entry.key
                if expand == "moving_average":
                    key = (query + key) / 2
                    gaps[:, near] = _distances(block, key[None])[:, 0]
                entries[near] = replace(entry, key=key, radius=gap + coarse * norms[number])
            else:
                how, nearest = Entering.INSIDE, near
            if nearest == len(entries):
                entries.append(new)
                gaps[:, nearest] = among[:, place]
            answering = int(gaps[place].argmin())
            inside = bool(gaps[place, answering] <= entries[answering].radius)
            entered.append(Entered(how, answering, inside))
    return Codebook(tuple(entries), book.edits + len(queries)), entered


def _distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[n, K] on the host, from differences."""
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").cpu()
