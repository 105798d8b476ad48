"""Optimised values on disk, so that a run can be repeated or taken up again without optimising them again.

Our file: one safetensors file, tensors `targets` [n, sites, h] fp64, `deltas` [n, sites, h] fp32, `losses`, `steps` and
`status` [n], and metadata with a key for each. A key is a hash of what a value depends on: the model's configuration,
dtype, samples of its weights and sums over the bits of its edited matrices as they are, the request's tokens, the layer
and sites, and the numbers of the loop.

memit's files: one npz a request with `v_star` [h], at a path with three {} for layer, clamp and case id. They say
nothing of the model they were made with; the path is all there is to tell them apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from kedit_fast._version import __version__
from kedit_fast.editing.values.loop import STOPPED, USED_UP, Values
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.fingerprint import fingerprint, with_values
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.files import write_file, write_npz
from kedit_fast.support.matrix_bits import edit_fingerprint
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION = "1"
# Of a configuration, what says nothing of what the model computes.
_NOISE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache",
    "_attn_implementation_autoset", "attn_implementation",
}  # fmt: skip
SAVE_EVERY = 30.0  # seconds between writes while values are being optimised
# Numbers that change what a value is; the others change where it is written, or how fast it is found.
_LOOP = (
    "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "v_stop_loss",
    "most_probable_steps",
)  # fmt: skip


@dataclass(frozen=True)
class ValueRun:
    """What a store is asked about: one call of the value loop."""

    view: ModelView
    tokenizer: Any
    layer: int
    sites: tuple[str, ...]
    hparams: Hparams
    requests: Sequence[PreparedRequest]


class ValueStore(Protocol):
    """Where values are looked up before they are optimised, and put after."""

    def begin(self, run: ValueRun) -> None:
        """What the next calls are about."""

    def load(self, request: PreparedRequest) -> Values | None:
        """The value of a request, or None."""

    def store(self, requests: Sequence[PreparedRequest], values: Values) -> None:
        """Take values that were just optimised."""

    def flush(self) -> None:
        """Write what has been taken."""


class ValueFile:
    """Our file of values; made when it is not there. With `path` None they are kept in memory alone.

    Raises:
        EditError: it cannot be read or written, or is not ours.
    """

    @plain_torch()
    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else Path(path)
        self.entries: dict[str, dict[str, torch.Tensor]] = {}
        self._sites: tuple[str, ...] = ()
        self._context, self._dirty, self._saved = "", False, time.monotonic()
        if self.path is None:
            return
        if self.path.exists():
            self._read()
        elif not os.access(self.path.absolute().parent, os.W_OK):
            raise EditError(f"cannot write {self.path}: its folder is not there or read-only")

    def begin(self, run: ValueRun) -> None:
        """What the next calls are about. Cost: one pass over all matrices that editing writes."""
        view = run.view
        numbers = {name: value for name, value in asdict(run.hparams).items() if name in _LOOP}
        config = {name: value for name, value in view.config.to_dict().items() if name not in _NOISE}
        about = {"model": fingerprint(view, run.tokenizer), "config": config, "edited": edited_hash(view),
                 "dtype": str(computing_dtype(view.base)), "layer": run.layer, "sites": run.sites,
                 "numbers": numbers}  # fmt: skip
        self._sites, self._context = run.sites, json.dumps(about, sort_keys=True, default=str)

    def load(self, request: PreparedRequest) -> Values | None:
        """The value of a request, or None."""
        entry = self.entries.get(self._key(request))
        if entry is None:
            return None
        return Values(self._sites, entry["targets"][:, :, None], entry["deltas"][:, :, None],
                      entry["losses"][None], entry["steps"][None], entry["status"][None])  # fmt: skip

    def store(self, requests: Sequence[PreparedRequest], values: Values) -> None:
        """Take values that were just optimised and are usable; write them when the last write is a while ago."""
        for i, request in _usable(requests, values):
            self.entries[self._key(request)] = {
                "targets": values.all_targets[:, :, i].cpu().clone(),
                "deltas": values.all_deltas[:, :, i].cpu().clone(),
                "losses": values.losses[i].clone(), "steps": values.steps[i].clone(),
                "status": values.status[i].clone(),
            }  # fmt: skip
        self._dirty = True
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.flush()

    @plain_torch()
    def flush(self) -> None:
        """Write the file anew, in the place of the old one only when it is complete."""
        if not self._dirty or self.path is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        shapes: dict[str, list[str]] = {}
        for key, entry in self.entries.items():
            shapes.setdefault("x".join(map(str, entry["targets"].shape)), []).append(key)
        for shape, keys in shapes.items():
            for name in ("targets", "deltas", "losses", "steps", "status"):
                tensors[f"{shape}.{name}"] = torch.stack([self.entries[key][name] for key in keys])
        metadata = {"format_version": FORMAT_VERSION, "kedit_fast": __version__, "values": json.dumps(shapes)}
        write_file(self.path, tensors, metadata, EditError)
        self._dirty, self._saved = False, time.monotonic()

    def _read(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format_version") != FORMAT_VERSION or "values" not in metadata:
                    raise EditError(f"{self.path} is not a file of values (format {FORMAT_VERSION})")
                for shape, keys in json.loads(metadata["values"]).items():
                    names = ("targets", "deltas", "losses", "steps", "status")
                    columns = {name: file.get_tensor(f"{shape}.{name}") for name in names}
                    for i, key in enumerate(keys):
                        self.entries[key] = {name: column[i] for name, column in columns.items()}
        except (SafetensorError, ValueError, KeyError, IndexError) as error:
            raise EditError(f"{self.path} is damaged: {error}; remove it to optimise its values again") from error
        except OSError as error:
            raise EditError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _key(self, request: PreparedRequest) -> str:
        tokens = [[list(p.ids), p.lookup] for p in (*request.rewriting, request.kl)] + [list(request.target)]
        return hashlib.sha256((self._context + json.dumps(tokens)).encode()).hexdigest()


class MemitCache:
    """The files that memit's `cache_template` names: `..._layer_{}_clamp_{}_case_{}.npz`, one request each.

    Raises:
        EditError: a template without three {}, a request without an id, or a file that is damaged.
    """

    def __init__(self, template: str):
        if template.count("{}") != 3:
            raise EditError(f"{template!r} must hold three {{}}: layer, clamp_norm_factor and case id")
        self.template = template
        self._layer, self._clamp, self._size = 0, 0.0, 0
        self._sites: tuple[str, ...] = ()

    def begin(self, run: ValueRun) -> None:
        """What the next calls are about."""
        if len(run.sites) > 1:
            raise EditError("memit's npz files hold one value a request; these values have two")
        names = [request.request.id for request in run.requests if request.request.id is not None]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise EditError(f"memit's value files are named by case id, and several requests have the id {twice[0]!r}")
        self._sites = run.sites
        self._layer, self._clamp = run.layer, run.hparams.clamp_norm_factor
        self._size = run.view.weight(run.layer).shape[0]

    def load(self, request: PreparedRequest) -> Values | None:
        """The value of a request, or None. A file has no delta: `all_deltas` is not a number."""
        path = self._path(request)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                target = torch.from_numpy(file["v_star"]).double()
        except (OSError, ValueError, KeyError) as error:
            raise EditError(f"{path} is not one of memit's value files: {error}") from error
        if target.shape != (self._size,) or not bool(torch.isfinite(target).all()):
            raise EditError(f"{path}: v_star is {list(target.shape)}, a finite [{self._size}] is needed")
        nothing = torch.full((1, self._size, 1), float("nan"), dtype=torch.float32)
        return Values(self._sites, target[None, :, None], nothing, nothing[0, 0], torch.tensor([0]),
                      torch.tensor([USED_UP]))  # fmt: skip

    def store(self, requests: Sequence[PreparedRequest], values: Values) -> None:
        """Write each usable value at once, in the place of an older file only when it is complete."""
        for i, request in _usable(requests, values):
            path = self._path(request)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise EditError(f"cannot write {path}: {error.strerror or error}") from error
            write_npz(path, {"v_star": values.targets[:, i].float().cpu().numpy()}, EditError)

    def flush(self) -> None:
        """Nothing waits."""

    def _path(self, request: PreparedRequest) -> Path:
        if request.request.id is None:
            raise EditError(f"{request.name}: memit's value files are named by case id, and it has none")
        spelled = dict.fromkeys((f"{self._clamp:g}", str(self._clamp)))  # 4 or 4.0, as the file of numbers had it
        paths = [Path(self.template.format(self._layer, clamp, request.request.id)) for clamp in spelled]
        return next((path for path in paths if path.exists()), paths[0])


def open_values(path: str | os.PathLike) -> ValueFile | MemitCache:
    """Our file, or memit's files where the path is a template with {}."""
    return MemitCache(str(path)) if "{}" in str(path) else ValueFile(path)


def _usable(requests: Sequence[PreparedRequest], values: Values) -> list[tuple[int, PreparedRequest]]:
    """Requests whose values can be written to a model, with their numbers."""
    good = [code in (USED_UP, STOPPED) for code in values.status.tolist()]
    return [(i, request) for i, request in enumerate(requests) if good[i]]


def edited_hash(view: ModelView, layers: Sequence[int] | None = None) -> str:
    """`edit_fingerprint` of the matrices of `layers` that editing writes; None for all layers."""
    matrices = []
    for layer in range(view.num_layers) if layers is None else layers:
        weight = with_values(view, view.weight_name(layer), view.edited_module(layer).weight.detach())
        matrices.append(weight.T if view.spec.transposed else weight)
    return edit_fingerprint(matrices)
