"""What the gradient steps of a run of edits did, for reports."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kedit_fast.editing.result import EditResult
from kedit_fast.editing.tuning.plateau import LEARNED
from kedit_fast.memories.memory import ActivationMemory, FingerprintMemory, KeyValueMemory, SideMemory


@dataclass(frozen=True)
class TuningSummary:
    """Steps and losses of the requests of a run, and what stands beside the weights after it."""

    steps: tuple[int, ...]
    """[u] steps of each request that was written, in their order."""
    losses: tuple[float, ...]
    """[u] loss of each at its last step, in nats."""
    unlearned: tuple[int, ...]
    """Places among these of requests that were not learned."""
    memory: dict[str, Any] | None
    """Its kind, entries and bytes, and what routes to it; None where edits are in the weights."""

    @classmethod
    def of(cls, results: Iterable[EditResult], memory: SideMemory | None) -> TuningSummary:
        """The summary of calls of `edit`, in their order."""
        steps: list[int] = []
        losses: list[float] = []
        unlearned: list[int] = []
        first = 0
        for result in results:
            steps += result.steps
            losses += result.losses
            unlearned += [first + place for place in unlearned_places(result)]
            first += len(result.requests)
        return cls(tuple(steps), tuple(losses), tuple(unlearned), None if memory is None else described(memory))

    def as_dict(self) -> dict[str, Any]:
        """The entry `tuning` of JSON: `unlearned` are places in `requests`."""
        return {
            "steps": sum(self.steps),
            "loss": {"median": statistics.median(self.losses), "largest": max(self.losses)} if self.losses else None,
            "unlearned": list(self.unlearned),
            "memory": self.memory,
        }

    def lines(self) -> list[str]:
        """The summary in words."""
        text = f"Tuning: {sum(self.steps):,} steps"
        if self.losses:
            text += f"; last losses {statistics.median(self.losses):.3g} in the median, {max(self.losses):.3g} at most"
        lines = [f"{text}; {len(self.unlearned)} of {len(self.steps)} requests were not learned"]
        if self.memory is not None:
            about = dict(self.memory)
            lines.append(
                f"Memory ({about.pop('kind')}): {about.pop('entries'):,} entries, {about.pop('bytes') / 2**20:.2f} MiB"
                + "".join(f"; {name.replace('_', ' ')} {_in_words(value)}" for name, value in about.items())
            )
        return lines


def unlearned_places(result: EditResult) -> list[int]:
    """Places among the requests of a call that were not learned: their targets' loss stayed above `LEARNED`."""
    above = {place for place, loss in enumerate(result.losses) if not loss <= LEARNED}
    return sorted(above | set(result.unlearned))


def described(memory: SideMemory) -> dict[str, Any]:
    """Kind, entries and bytes of a memory, and what a text is compared with to be routed to it."""
    about: dict[str, Any] = {"kind": memory.kind, "entries": memory.entries, "bytes": memory.nbytes}
    if isinstance(memory, ActivationMemory):
        return {**about, "thresholds": memory.thresholds.tolist(), "act_ratio": memory.act_ratio}
    if isinstance(memory, FingerprintMemory):
        return {**about, "features": memory.top_k, "threshold": memory.threshold}
    if isinstance(memory, KeyValueMemory) and not memory.empty:
        return {**about, "radii": [float(memory.radii.min()), float(memory.radii.max())]}
    return about


def _in_words(value: Any) -> str:
    return ", ".join(f"{each:.3g}" for each in value) if isinstance(value, list) else f"{value:.3g}"
