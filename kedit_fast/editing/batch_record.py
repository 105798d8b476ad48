"""What one batch has added to an editor, as JSON and tensors, so that another process can add it again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.editing.ledger import Entry
from kedit_fast.editing.solver_state import Committed
from kedit_fast.solver.low_rank import update_of
from kedit_fast.solver.normalizer import Normalizer


@dataclass(frozen=True)
class BatchRecord:
    """A batch of a ledger, and what it has added to the state between batches. `Editor.recorded` makes one."""

    entries: tuple[Entry, ...]
    """Its writes, in order."""
    committed: Committed
    """What it has added to the solver state."""
    bits: dict[str, int]
    """Name of a matrix -> the sum over its bits after the batch; {} where matrices are split over processes."""
    chosen: dict[str, float]
    """Hyper-parameters of the values that are "auto" -> the number that was chosen."""

    def facts(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {
            "entries": [{"name": entry.name, "backend": entry.backend} for entry in self.entries],
            "bits": self.bits,
            "chosen": self.chosen,
            "scales": {str(layer): scale for layer, scale in self.committed.scales.items()},
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What tensors hold of it. None is copied."""
        tensors = {f"keys.{layer}": keys for layer, keys in self.committed.keys.items()}
        for number, entry in enumerate(self.entries):
            tensors |= {f"entry.{number}.{name}": tensor for name, tensor in vars(entry.update).items()}
        for shape, normalizer in self.committed.normalizers.items():
            tensors |= {f"normalizer.{shape}.{name}": tensor for name, tensor in normalizer.tensors().items()}
        for shape, parts in self.committed.gradients.items():
            tensors |= {f"gradients.{shape}.{number}": rows for number, rows in enumerate(parts)}
        return tensors

    @classmethod
    def from_parts(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> BatchRecord:
        """From the results of `facts` and `tensors`.

        Raises:
            KeyError, ValueError, TypeError: they are damaged.
        """
        entries = []
        for number, about in enumerate(facts["entries"]):
            start = f"entry.{number}."
            parts = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            entries.append(Entry(about["name"], update_of(parts), about["backend"]))
        keys = {int(n.removeprefix("keys.")): tensor for n, tensor in tensors.items() if n.startswith("keys.")}
        normalizers = {}
        for shape in dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith("normalizer.")):
            count, mean, squares = (tensors[f"normalizer.{shape}.{name}"] for name in ("count", "mean", "squares"))
            normalizers[shape] = Normalizer(int(count), mean, squares)
        gradients: dict[str, list[torch.Tensor]] = {}
        taken = [name.split(".")[1:] for name in tensors if name.startswith("gradients.")]
        for shape, number in sorted(taken, key=lambda place: int(place[1])):
            gradients.setdefault(shape, []).append(tensors[f"gradients.{shape}.{number}"])
        scales = {int(layer): float(scale) for layer, scale in facts["scales"].items()}
        bits = {str(name): int(value) for name, value in facts["bits"].items()}
        chosen = {str(name): float(number) for name, number in facts["chosen"].items()}
        return cls(tuple(entries), Committed(keys, normalizers, scales, gradients), bits, chosen)
