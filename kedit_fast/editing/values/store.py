"""Optimized values on disk, so that a run can be repeated or resumed without optimizing them again.

One safetensors file with tensors `targets` [n, sites, h] fp64, `deltas` [n, sites, h] fp32, `losses`, `steps` and
`status` [n], and metadata with a key for each value. A key is a hash of everything that a value depends on: the model's
configuration, dtype, samples of its weights and sums over the bits of its edited matrices as they are now, the
request's tokens, the layer and sites, and the hyper-parameters of the loop.

The file also holds blocks of methods that tune a matrix: named tensors of what was computed together, which are used
again whole, so that results are those of a run without the file, bit for bit. A file with blocks has format 2.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kedit_fast._version import __version__
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.editing.values.protocol import ValueRun, usable_requests
from kedit_fast.editing.values.result import Values
from kedit_fast.errors import EditError
from kedit_fast.methods.recipe import StopRule
from kedit_fast.models.fingerprint import difference, fingerprint, with_values
from kedit_fast.models.sharded import whole
from kedit_fast.models.view import ModelView
from kedit_fast.models.weight_names import weight_name_of
from kedit_fast.models.widened import computing_dtype
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.files import write_file
from kedit_fast.support.matrix_bits import aligned, edit_fingerprint, sha256
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION, WITH_BLOCKS = "1", "2"
# Fields of a configuration that do not change what the model computes.
_NOISE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
    "_attn_implementation_autoset",
    "attn_implementation",
}
SAVE_EVERY = 30.0
"""Seconds between writes while values are being optimized."""

_USUAL_RULE: dict[tuple[str, ...], StopRule] = {("attention", "mlp"): "pmet"}
"""Sites -> the stopping rule that keys of format 1 do not name; of all other sites it is "below_loss"."""


class ValueFile:
    """A file of values, created when it does not exist. With `path` None the values stay in memory.

    Raises:
        EditError: it cannot be read or written, or is no file of values.
    """

    @plain_torch()
    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else Path(path)
        self.entries: dict[str, dict[str, torch.Tensor]] = {}
        self._blocks: dict[str, dict[str, torch.Tensor]] = {}
        self._sums: dict[str, dict[str, str]] = {}  # SHA-256 of the tensors of blocks that are in the file
        self._unchecked: set[str] = set()  # keys of blocks that were read, and not compared with their sums yet
        self._model: dict[str, str] | None = None  # whose the blocks are, where there are any
        self._sites: tuple[str, ...] = ()
        self._context, self._dirty, self._saved = "", False, time.monotonic()
        self._held: list[str] | None = None  # keys of values that were taken since `drain`, while nothing is written
        if self.path is None:
            return
        if self.path.exists():
            self._read()
        elif not os.access(self.path.absolute().parent, os.W_OK):
            raise EditError(f"cannot write {self.path}: its folder does not exist or is read-only")

    def begin(self, run: ValueRun) -> None:
        """Say which call of the value loop the next calls belong to.

        Cost: one pass over all matrices that editing writes.
        """
        identity = {
            **model_identity(run.view, run.tokenizer),
            "layer": run.layer,
            "sites": run.sites,
            "numbers": run.hparams.identity("value"),
        }
        if run.stop_rule != _USUAL_RULE.get(run.sites, "below_loss"):
            identity["stop_rule"] = run.stop_rule
        self._sites, self._context = run.sites, json.dumps(identity, sort_keys=True, default=str)

    def load(self, request: PreparedRequest) -> Values | None:
        """The value of a request, or None."""
        entry = self.entries.get(self._key(request))
        if entry is None:
            return None
        return Values(
            self._sites,
            entry["targets"][:, :, None],
            entry["deltas"][:, :, None],
            entry["losses"][None],
            entry["steps"][None],
            entry["status"][None],
        )

    def store(self, requests: Sequence[PreparedRequest], values: Values) -> None:
        """Take the usable ones of values that were just optimized; write them when the last write is a while ago."""
        for i, request in usable_requests(requests, values):
            key = self._key(request)
            if self._held is not None:
                self._held.append(key)
            self.entries[key] = {
                "targets": values.all_targets[:, :, i].cpu().clone(),
                "deltas": values.all_deltas[:, :, i].cpu().clone(),
                "losses": values.losses[i].clone(),
                "steps": values.steps[i].clone(),
                "status": values.status[i].clone(),
            }
        self._dirty = True
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.flush()

    def require_model(self, view: ModelView, tokenizer: Any) -> None:
        """Raise EditError where the file has blocks of another model. They are large, so they are of one model."""
        current = fingerprint(view, tokenizer)
        if self._model is not None and (different := difference(self._model, current)):
            raise EditError(f"{self.path} holds rows of another model: different {different}; give another file")
        self._model = current

    def load_block(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors that were stored under a key, or None.

        Raises:
            EditError: they are not what was written.
        """
        block = self._blocks.get(key)
        if key in self._unchecked:
            assert block is not None
            if any(_sum(part) != self._sums[key][name] for name, part in block.items()):
                raise EditError(f"{self.path} is damaged: a block differs from its checksum; remove the file")
            self._unchecked.discard(key)
        return None if block is None else {name: aligned(part) for name, part in block.items()}

    def store_block(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors that were just computed; write them when the last write is a while ago.

        Args:
            key: a hash of everything that their bits depend on.
            tensors: name -> tensor on any device; they are copied.
        """
        self._blocks[key] = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        self._dirty = True
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.flush()

    @plain_torch()
    def flush(self) -> None:
        """Write the file; the old one is replaced only when the new one is complete."""
        if not self._dirty or self.path is None or self._held is not None:
            return
        tensors: dict[str, torch.Tensor] = {}
        shapes: dict[str, list[str]] = {}
        for key, entry in sorted(self.entries.items()):  # in whatever order they came
            shapes.setdefault("x".join(map(str, entry["targets"].shape)), []).append(key)
        for shape, keys in shapes.items():
            for name in ("targets", "deltas", "losses", "steps", "status"):
                tensors[f"{shape}.{name}"] = torch.stack([self.entries[key][name] for key in keys])
        metadata = {"format_version": FORMAT_VERSION, "kedit_fast": __version__, "values": json.dumps(shapes)}
        if self._blocks:
            tensors |= {f"{key}.{name}": part for key, block in self._blocks.items() for name, part in block.items()}
            for key in self._blocks.keys() - self._sums.keys():
                self._sums[key] = {name: _sum(part) for name, part in self._blocks[key].items()}
            about = {"blocks": self._sums, "model": self._model}
            metadata |= {name: json.dumps(part, sort_keys=True) for name, part in about.items()}
            metadata["format_version"] = WITH_BLOCKS
        write_file(self.path, tensors, metadata, EditError)
        self._dirty, self._saved = False, time.monotonic()

    def hold(self) -> None:
        """Write nothing until `release`; see `HeldValues`."""
        self._held = []

    def drain(self) -> dict[str, torch.Tensor]:
        """The values that were taken since the last call, for `absorb`."""
        keys, self._held = dict.fromkeys(self._held or ()), []
        return {f"{key}.{name}": tensor for key in keys for name, tensor in self.entries[key].items()}

    def absorb(self, drained: Mapping[str, torch.Tensor]) -> None:
        """Take values that `drain` has given."""
        for name, tensor in drained.items():
            key, _, part = name.partition(".")
            self.entries.setdefault(key, {})[part] = tensor
        self._dirty = self._dirty or bool(drained)

    def release(self) -> None:
        """Write the values that were drained or absorbed; the others, of a batch that failed, are forgotten."""
        for key in self._held or ():
            self.entries.pop(key, None)
        self._held = None
        self.flush()

    def _read(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format_version") not in (FORMAT_VERSION, WITH_BLOCKS) or "values" not in metadata:
                    raise EditError(f"{self.path} is not a file of values (format {FORMAT_VERSION} or {WITH_BLOCKS})")
                for shape, keys in json.loads(metadata["values"]).items():
                    names = ("targets", "deltas", "losses", "steps", "status")
                    columns = {name: file.get_tensor(f"{shape}.{name}") for name in names}
                    for i, key in enumerate(keys):
                        self.entries[key] = {name: column[i] for name, column in columns.items()}
                if metadata["format_version"] == WITH_BLOCKS:
                    self._model = dict(json.loads(metadata["model"]))
                    self._sums = json.loads(metadata["blocks"])
                    for key, sums in self._sums.items():
                        self._blocks[key] = {name: file.get_tensor(f"{key}.{name}") for name in sums}
                    self._unchecked = set(self._blocks)
        except (SafetensorError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise EditError(f"{self.path} is damaged: {error}; remove it to optimize its values again") from error
        except OSError as error:
            raise EditError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _key(self, request: PreparedRequest) -> str:
        tokens = [[list(p.ids), p.lookup] for p in (*request.rewriting, request.kl)] + [list(request.target)]
        return hashlib.sha256((self._context + json.dumps(tokens)).encode()).hexdigest()


def _sum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor, with its dtype and shape."""
    return sha256(tensor if tensor.ndim == 2 else tensor.reshape(1, -1))


def open_values(path: str | os.PathLike) -> ValueFile | MemitCache:
    """A file of values, or the files of memit where the path is a template with {}."""
    return MemitCache(str(path)) if "{}" in str(path) else ValueFile(path)


def model_identity(view: ModelView, tokenizer: Any, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """What is computed with a model depends on: the model, and the matrices of `layers` (None for all) as they are.

    Cost: one pass over these matrices.
    """
    return {
        "model": fingerprint(view, tokenizer),
        "config": {name: value for name, value in view.config.to_dict().items() if name not in _NOISE},
        "edited": edited_hash(view, layers),
        "dtype": str(computing_dtype(view.base)),
    }


def edited_hash(view: ModelView, layers: Sequence[int] | None = None) -> str:
    """`edit_fingerprint` of the matrices that editing writes in `layers`; None for all layers."""

    def matrices() -> Iterator[torch.Tensor]:
        for layer in view.editable if layers is None else layers:
            stored = whole(with_values(view, view.weight_name(layer), view.stored_weight(layer)))
            weight = view.oriented(layer, stored)
            yield from weight if weight.ndim == 3 else [weight]  # of each expert
            if (shared := view.shared_experts(layer)) is not None:
                yield with_values(view, weight_name_of(shared.path), shared.weight)

    return edit_fingerprint(matrices())
