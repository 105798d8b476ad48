"""What one call of `Editor.edit` did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kedit_fast.requests.request import EditRequest
from kedit_fast.solver.low_rank import Update


@dataclass(frozen=True)
class EditResult:
    """One batch of edits: what was written, and how well the method could write it."""

    batch: int
    """Number of the batch in the ledger, from 1; 0 when every request was skipped."""
    requests: tuple[EditRequest, ...]
    """The u requests that were written."""
    separators: tuple[str, ...]
    """[u] the text between each request's prompt and its target."""
    targets: tuple[tuple[int, ...], ...]
    """[u] the tokens of each request's target."""
    updates: dict[str, tuple[Update, ...]]
    """Name of a weight -> what was added to it, in order; on the host."""
    losses: tuple[float, ...]
    """[u] loss of each value at its last forward pass, in nats; of each target where gradients stand in for values."""
    steps: tuple[int, ...]
    """[u] optimizer steps of each value."""
    relative_norms: dict[str, float]
    """Name of a weight -> |Delta| / |W|, with W as it was before the batch."""
    residual: float
    """|z - h| after the write over |z - h| before it, of all requests together: the share of the residual that the
    write left undone. 0 for methods without values (UltraEdit)."""
    collisions: tuple[tuple[int, int], ...]
    """Pairs of requests that have nearly the same key at the last layer."""
    skipped: dict[int, str]
    """Index of a request in the call -> why it was left out (`on_error` or `on_bad_pivot` is "skip")."""
    prefixes: tuple[str, ...]
    """The context prefixes that were used."""
    seconds: dict[str, float]
    """Seconds of each phase: values, keys, solve, write."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters that are "auto" -> what the first batch has made of them; see `Editor.resolved`."""
    rounds: tuple[int, ...] = ()
    """Number of requests that each round wrote; one entry unless the hyper-parameter `rounds` allows more. Empty for
    methods that write no batch at once."""
    unlearned: tuple[int, ...] = ()
    """Of methods that tune a matrix, the places among the u requests of those that ended without learning their target:
    its tokens have, in the geometric mean, a probability below a half."""
