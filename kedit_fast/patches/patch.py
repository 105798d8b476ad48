"""Patches: the updates of a run of edits as one file, which any copy of the model can take up and give back.

One safetensors file: `{module}.left` [out, k] and `{module}.right` [in, k], Delta = left right^T, for a masked update
(RECT) also `{module}.mask` [out, ceil(in / 8)] uint8; metadata `format_version`, `kedit_fast`, `kind`, `method`,
`configuration`, `requests` and, of every module, the SHA-256 of the matrix W_0 it applies to, of the one the editor
left, their dtype, and whether it is stored transposed (transformers' Conv1D).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kedit_fast._version import __version__
from kedit_fast.errors import InvalidArgumentError, PatchError, UnsupportedModelError
from kedit_fast.models.editable import require_own
from kedit_fast.models.view import linear_weight
from kedit_fast.solver.low_rank import LowRankUpdate, MaskedUpdate, Update
from kedit_fast.solver.shaping import compact
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.files import read_file, write_file
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.timing import synchronize
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION = "1"
KIND = "kedit_fast patch"
_HASHED = 1 << 26  # bytes of a matrix that are hashed at once


@plain_torch()
@dataclass(frozen=True)
class Target:
    """The matrix an update belongs to."""

    original: str  # sha256 W_0 [out, in]
    result: str  # sha256 what the editor left; "" where that is not known
    dtype: str
    transposed: bool  # stored [in, out]


@dataclass(frozen=True)
class Patch:
    """Updates by module path, with what they belong to."""

    updates: Mapping[str, Update]
    targets: Mapping[str, Target]
    method: str
    configuration: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[Mapping[str, Any], ...] = ()  # prompt, subject, target_new of each

    def __post_init__(self):
        if set(self.updates) != set(self.targets) or not self.updates:
            raise PatchError("a patch needs updates, each with its target")
        for name, update in self.updates.items():
            if not update.is_finite():
                raise PatchError(f"the update of {name} is not finite")

    @plain_torch()
    def save(self, path: str | os.PathLike) -> None:
        """Write the file, at once or not at all; raises PatchError when it cannot be written."""
        tensors = {}
        for name, update in self.updates.items():
            tensors[f"{name}.left"] = update.left.detach().cpu().contiguous()
            tensors[f"{name}.right"] = update.right.detach().cpu().contiguous()
            if isinstance(update, MaskedUpdate):
                tensors[f"{name}.mask"] = update.bits.cpu().contiguous()
        metadata = {
            "format_version": FORMAT_VERSION, "kind": KIND, "kedit_fast": __version__, "method": self.method,
            "configuration": json.dumps(dict(self.configuration), default=str),
            "requests": json.dumps([dict(request) for request in self.requests], ensure_ascii=False),
            "targets": json.dumps({name: vars(target) for name, target in self.targets.items()}),
        }  # fmt: skip
        write_file(path, tensors, metadata, PatchError)

    @classmethod
    @plain_torch()
    def load(cls, path: str | os.PathLike) -> Patch:
        """Read a file that `save` wrote.

        Raises:
            PatchError: it cannot be read, is damaged, of another kind or of a later format; by its name.
        """
        tensors, metadata = read_file(path, PatchError)
        if metadata.get("kind") != KIND:
            raise PatchError(f"{path} is not a patch of kedit_fast")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise PatchError(
                f"{path} has patch format {metadata.get('format_version')}, this version reads {FORMAT_VERSION}"
            )
        try:
            targets = {name: Target(**about) for name, about in json.loads(metadata["targets"]).items()}
            updates: dict[str, Update] = {}
            for name in targets:
                left, right = tensors.pop(f"{name}.left"), tensors.pop(f"{name}.right")
                bits = tensors.pop(f"{name}.mask", None)
                updates[name] = LowRankUpdate(left, right) if bits is None else MaskedUpdate(left, right, bits)
            if tensors:
                raise ValueError(f"it holds {sorted(tensors)[0]}, which belongs to no module")
            requests = tuple(json.loads(metadata["requests"]))
            configuration = json.loads(metadata["configuration"])
            return cls(updates, targets, metadata["method"], configuration, requests)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PatchError(f"{path} is damaged: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the modules, factors and masks: what the patch adds."""
        digest = hashlib.sha256()
        for name, update in sorted(self.updates.items()):
            digest.update(f"{name} {sha256(update.left)} {sha256(update.right)}".encode())
            if isinstance(update, MaskedUpdate):
                digest.update(sha256(update.bits).encode())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """What `kedit-fast patch show --json` prints."""
        modules = {}
        for name, update in self.updates.items():
            target = self.targets[name]
            modules[name] = {
                "shape": [update.left.shape[0], update.right.shape[0]], "rank": update.rank,
                "masked": isinstance(update, MaskedUpdate), "norm": update.norm(), **vars(target),
            }  # fmt: skip
        return {
            "method": self.method, "edits": len(self.requests), "modules": modules, "bytes": self.nbytes,
            "configuration": dict(self.configuration), "requests": [dict(request) for request in self.requests],
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and masks."""
        masks = sum(u.bits.nbytes for u in self.updates.values() if isinstance(u, MaskedUpdate))
        return masks + sum(update.left.nbytes + update.right.nbytes for update in self.updates.values())

    @plain_torch()
    def compacted(self, tolerance: float = 0.0, rank: int | None = None) -> Patch:
        """The same patch with the fewest factors that leave each Delta within a tolerance.

        Args:
            tolerance: of |Delta - Delta'| / |Delta| (Frobenius) of each module; 0 drops what is rounding alone.
            rank: at most so many factors a module, however far that is from Delta; None for no limit.

        Cost: a QR of both factors and an SVD of [k, k] a module; of a masked update an SVD of Delta.
        """
        if not 0 <= tolerance < 1:
            raise PatchError(f"tolerance must be at least 0 and below 1; got {tolerance}")
        if rank is not None and rank < 1:
            raise PatchError(f"rank must be at least 1; got {rank}")
        targets = {name: replace(target, result="") for name, target in self.targets.items()}
        updates = {name: compact(update, tolerance, rank) for name, update in self.updates.items()}
        return replace(self, updates=updates, targets=targets)

    @plain_torch()
    def prepare(self, model: torch.nn.Module, force: bool = False) -> Prepared:
        """Compute the matrices that a model will have, beside those it has: nothing in it changes until `swap_`.

        Each is computed in fp32 (fp64 for fp64) and rounded once.

        Args:
            model: has the modules, with weights in a float dtype, on any devices.
            force: take other matrices than those it was made for: the edits may then say something else, or harm.

        Raises:
            PatchError: a module that is not there, quantised, or has another shape, dtype or W_0; a weight that a hook
                computes again, that another module shares or that cannot be written; or a result that is not finite.
        """
        found = {}
        for name in self.updates:
            weight, transposed = _weight(model, name)
            self.check(name, weight, transposed, force)
            found[name] = weight
        try:
            require_own(model, found)
        except UnsupportedModelError as error:
            raise PatchError(str(error)) from None
        with torch.no_grad():
            return Prepared(model, {name: (w.clone(), added(self.updates[name], w, name)) for name, w in found.items()})

    def apply_(self, model: torch.nn.Module, force: bool = False) -> Applied:
        """Put the edits into a model in memory, all or none: `prepare`, then `swap_`."""
        return self.prepare(model, force).swap_()

    def check(self, name: str, weight: torch.Tensor, transposed: bool, force: bool = False) -> None:
        """Raise PatchError when a matrix [out, in] is not the one that a module's update is for."""
        update, target = self.updates[name], self.targets[name]
        shape = [update.left.shape[0], update.right.shape[0]]
        if list(weight.shape) != shape or transposed != target.transposed:
            stored = " stored transposed" if transposed else ""
            raise PatchError(f"{name} is {list(weight.shape)}{stored}, the patch is for {shape}"
                             + (" stored transposed" if target.transposed else ""))  # fmt: skip
        if force:
            return
        dtype = str(weight.dtype).removeprefix("torch.")
        if dtype != target.dtype:
            raise PatchError(
                f"{name} is {dtype}, the patch was made for {target.dtype}: load the model in that, or force it "
                "(its result then differs from the edited model's by rounding)"
            )
        here = sha256(weight)
        if here == target.original:
            return
        if here == target.result:
            raise PatchError(f"{name} has this patch's edits already")
        raise PatchError(
            f"{name} is not the matrix that the patch was made for: another model, or one with other edits in it (of "
            "patches that follow each other, merge first). Forced, the edits may say something else, or harm"
        )


def _weight(model: torch.nn.Module, name: str) -> tuple[torch.Tensor, bool]:
    try:
        return linear_weight(model, name)
    except (InvalidArgumentError, UnsupportedModelError) as error:
        raise PatchError(str(error)) from None


@plain_torch()
def added(update: Update, weight: torch.Tensor, name: str, alpha: float = 1.0) -> torch.Tensor:
    """A matrix [out, in] plus alpha times an update; raises PatchError when that is not finite."""
    result = weight.clone()
    moved = update.to(accumulation_dtype(weight))
    factors = [t.to(weight.device) for t in (moved.left, moved.right)]
    if isinstance(moved, MaskedUpdate):
        MaskedUpdate(*factors, moved.bits.to(weight.device)).apply_(result, alpha)
    else:
        LowRankUpdate(*factors).apply_(result, alpha)
    if not bool(torch.isfinite(result).all()):
        raise PatchError(f"{name} is not finite with the patch")
    return result


class Prepared:
    """Matrices [out, in] to be swapped into a model: what they are and what they will be."""

    def __init__(self, model: torch.nn.Module, matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]):
        self._model, self._matrices = model, matrices

    @plain_torch(leave_inference_mode=False)
    def swap_(self) -> Applied:
        """Copy them into the model, all or none; comparing and copying is all that a model in use has to wait for.

        Returns:
            what takes it back, to the bit.

        Raises:
            PatchError: a matrix has changed since `prepare`, or the model was moved or cast; nothing is written.
        """
        weights = {name: _same(self._model, name, original, "prepared") for name, (original, _) in
                   self._matrices.items()}  # fmt: skip
        applied = Applied(self._model, self._matrices)
        try:
            _copy({name: (weight, self._matrices[name][1]) for name, weight in weights.items()})
        except BaseException:
            applied.revert_(force=True)
            raise
        return applied


class Applied:
    """Edits that a model has taken up, with the matrices it had."""

    def __init__(self, model: torch.nn.Module, matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]):
        self._model, self._matrices = model, matrices

    @plain_torch(leave_inference_mode=False)
    def revert_(self, force: bool = False) -> None:
        """Put the matrices back, to the bit; a second call does nothing.

        Args:
            force: also where something else has changed a matrix since; that is lost.

        Raises:
            PatchError: something else has changed a matrix since, or the model was cast; nothing is written.
        """
        weights = {}
        for name, (original, result) in self._matrices.items():
            weights[name] = _weight(self._model, name)[0] if force else _same(self._model, name, result, "applied")
            if weights[name].dtype != original.dtype:
                raise PatchError(f"{name} is {weights[name].dtype} now, the patch was applied to {original.dtype}")
        _copy({name: (weight, self._matrices[name][0]) for name, weight in weights.items()})
        self._matrices = {}


def _same(model: torch.nn.Module, name: str, expected: torch.Tensor, when: str) -> torch.Tensor:
    """The model's matrix, if it is what is expected."""
    weight = _weight(model, name)[0]
    if weight.dtype != expected.dtype or not torch.equal(weight, expected.to(weight.device)):
        raise PatchError(f"{name} has changed since the patch was {when}: do that again, or take the change back first")
    return weight


@torch.no_grad()
def _copy(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy matrices; on GPUs nothing that runs elsewhere overlaps with it."""
    devices = {weight.device for weight, _ in pairs.values()}
    for device in devices:
        synchronize(device)
    for weight, value in pairs.values():
        weight.copy_(value)
    for device in devices:
        synchronize(device)


@plain_torch()
def merge(patches: Sequence[Patch], force: bool = False) -> Patch:
    """One patch that does what the patches do one after another, to rounding.

    They may follow each other (each was made on what the one before left) or be made on the same model side by side:
    then their updates add up.

    Args:
        patches: at least one.
        force: merge patches of which neither is known to hold, or one of which holds another.

    Raises:
        PatchError: patches of different matrices; or a patch that begins with another one's updates, as later patches
            of one editor do: merged, those would count twice.
    """
    if not patches:
        raise PatchError("no patches to merge")
    updates: dict[str, list[Update]] = {}
    targets: dict[str, Target] = {}
    for number, patch in enumerate(patches, 1):
        for name, update in patch.updates.items():
            target, before = patch.targets[name], targets.get(name)
            if before is None:
                updates[name], targets[name] = [update], target
                continue
            shapes = {(len(u.left), len(u.right)) for u in (update, updates[name][0])}
            if len(shapes) > 1 or target.transposed != before.transposed:
                raise PatchError(f"patch {number} is for another shape of {name}")
            follows, beside = (
                before.result != "" and target.original == before.result,
                target.original == before.original,
            )
            if not (follows or beside or force):
                raise PatchError(
                    f"patch {number} is for another {name} than the ones before it: neither the same matrix nor what "
                    "they leave. Forced, the merged edits may say something else, or harm"
                )
            if not force and not follows and any(_begins(update, other) for other in updates[name]):
                raise PatchError(
                    f"patch {number} and one before it begin with the same updates of {name}: patches of one editor "
                    "hold all it wrote, so the last one is enough"
                )
            updates[name].append(update)
            targets[name] = replace(before, result=target.result if follows else "")
    methods = list(dict.fromkeys(patch.method for patch in patches))
    configurations = [dict(patch.configuration) for patch in patches]
    return Patch(
        {name: _sum(parts) for name, parts in updates.items()}, targets, ", ".join(methods),
        configurations[0] if all(c == configurations[0] for c in configurations) else {"merged": configurations},
        tuple(request for patch in patches for request in patch.requests),
    )  # fmt: skip


def _begins(one: Update, other: Update) -> bool:
    """Whether the shorter of two updates' factors are the first ones of the longer."""
    k = min(one.rank, other.rank)
    return k > 0 and all(
        torch.equal(getattr(one, side)[:, :k].cpu(), getattr(other, side)[:, :k].cpu()) for side in ("left", "right")
    )


def _sum(parts: Sequence[Update]) -> Update:
    """One update that is the sum; factors side by side, or the matrix itself where a mask is among several."""
    if len(parts) == 1:
        return parts[0]
    parts = [part.cpu() for part in parts]
    if any(isinstance(part, MaskedUpdate) for part in parts):
        dense = sum(part.dense() for part in parts)
        return LowRankUpdate(dense, torch.eye(dense.shape[1], dtype=dense.dtype)).compacted()
    left, right = (torch.cat([getattr(part, side).float() if part.left.dtype != torch.float64 else getattr(part, side)
                              for part in parts], 1) for side in ("left", "right"))  # fmt: skip
    return LowRankUpdate(left, right).compacted()
