"""Patches: the updates of a run of edits as one file, to be applied to any copy of the model and reverted there.

It is a safetensors file. Tensors: `{module}.left` [out, k] and `{module}.right` [in, k] with Delta = left right^T, and
for a masked update (RECT) `{module}.mask` [out, ceil(in / 8)] uint8. Metadata: `format_version`, `kedit_fast`, `kind`,
`method`, `configuration`, `requests`, and `targets`: for each module the SHA-256 of the matrix W_0 that the update is
for, the SHA-256 of the matrix that the editor left, their dtype, and whether it is stored transposed (transformers'
Conv1D).
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
from kedit_fast.errors import PatchError, UnsupportedModelError
from kedit_fast.models.editable import require_own
from kedit_fast.patches.swap import Applied, Prepared, linear_weight_of
from kedit_fast.solver.low_rank import LowRankUpdate, MaskedUpdate, Update
from kedit_fast.solver.shaping import compact
from kedit_fast.support.dtypes import accumulation_dtype, dtype_name
from kedit_fast.support.files import read_file, write_file
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION = "1"
KIND = "kedit_fast patch"


@dataclass(frozen=True)
class Target:
    """The matrix that an update is for."""

    original: str
    """SHA-256 of W_0 [out, in], the matrix without the update."""
    result: str
    """SHA-256 of the matrix that the editor left; "" where that is not known."""
    dtype: str
    """For example "bfloat16"."""
    transposed: bool
    """Whether the model stores it as [in, out]."""


@dataclass(frozen=True)
class Patch:
    """The updates of a run of edits, by module path, with the matrices they are for.

    `Editor.patch()` makes one.

    Example:
        >>> editor = Editor(model, tokenizer, "memit", layers=[0, 1], statistics=statistics,
        ...                 hparams={"v_num_grad_steps": 3})
        >>> result = editor.edit(requests)
        >>> editor.patch().save("facts.safetensors")
        >>> editor.restore()                                # the model is unedited again
        >>> patch = Patch.load("facts.safetensors")
        >>> applied = patch.apply_(model)
        >>> len(patch.requests), sorted(patch.updates)[0]
        (4, 'model.layers.0.mlp.down_proj')
        >>> applied.revert_()                               # bit for bit
    """

    updates: Mapping[str, Update]
    """Module path -> Delta [out, in], as factors."""
    targets: Mapping[str, Target]
    """Module path -> the matrix it is for."""
    method: str
    """The method's name, for example "memit"."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """The hyper-parameters of the run."""
    requests: tuple[Mapping[str, Any], ...] = ()
    """prompt, subject and target_new of each edit."""

    def __post_init__(self):
        if set(self.updates) != set(self.targets) or not self.updates:
            raise PatchError("a patch needs updates, each with its target")
        for name, update in self.updates.items():
            if not update.is_finite():
                raise PatchError(f"the update of {name} is not finite")

    @plain_torch()
    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all; raises PatchError when it cannot be written."""
        tensors = {}
        for name, update in self.updates.items():
            tensors[f"{name}.left"] = update.left.detach().cpu().contiguous()
            tensors[f"{name}.right"] = update.right.detach().cpu().contiguous()
            if isinstance(update, MaskedUpdate):
                tensors[f"{name}.mask"] = update.bits.cpu().contiguous()
        metadata = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "kedit_fast": __version__,
            "method": self.method,
            "configuration": json.dumps(dict(self.configuration), default=str),
            "requests": json.dumps([dict(request) for request in self.requests], ensure_ascii=False),
            "targets": json.dumps({name: vars(target) for name, target in self.targets.items()}),
        }
        write_file(path, tensors, metadata, PatchError)

    @classmethod
    @plain_torch()
    def load(cls, path: str | os.PathLike) -> Patch:
        """Read a file that `save` wrote.

        Raises:
            PatchError: the file cannot be read, is damaged, is no patch, or has a later format; the message names it.
        """
        tensors, metadata = read_file(path, PatchError)
        if metadata.get("kind") != KIND:
            raise PatchError(f"{path} is not a patch of kedit_fast")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise PatchError(
                f"{path} has patch format {metadata.get('format_version')}, this version reads {FORMAT_VERSION}"
            )
        try:
            targets = {name: Target(**fields) for name, fields in json.loads(metadata["targets"]).items()}
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
        """SHA-256 of everything that the patch adds: module paths, factors and masks."""
        digest = hashlib.sha256()
        for name, update in sorted(self.updates.items()):
            digest.update(f"{name} {sha256(update.left)} {sha256(update.right)}".encode())
            if isinstance(update, MaskedUpdate):
                digest.update(sha256(update.bits).encode())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """A summary as plain data: what `kedit-fast patch show --json` prints."""
        modules = {}
        for name, update in self.updates.items():
            target = self.targets[name]
            modules[name] = {
                "shape": [update.left.shape[0], update.right.shape[0]],
                "rank": update.rank,
                "masked": isinstance(update, MaskedUpdate),
                "norm": update.norm(),
                **vars(target),
            }
        return {
            "method": self.method,
            "edits": len(self.requests),
            "modules": modules,
            "bytes": self.nbytes,
            "configuration": dict(self.configuration),
            "requests": [dict(request) for request in self.requests],
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and masks."""
        masks = sum(u.bits.nbytes for u in self.updates.values() if isinstance(u, MaskedUpdate))
        return masks + sum(update.left.nbytes + update.right.nbytes for update in self.updates.values())

    @plain_torch()
    def compacted(self, tolerance: float = 0.0, rank: int | None = None) -> Patch:
        """This patch with as few factors as a tolerance allows.

        Args:
            tolerance: largest |Delta - Delta'| / |Delta| (Frobenius norms) per module; 0 drops only what is rounding.
            rank: most factors per module, however far the result is from Delta; None for no limit.

        Raises:
            PatchError: a tolerance outside [0, 1), or a rank below 1.

        Cost: per module a QR of both factors and an SVD of a [k, k] matrix; for a masked update an SVD of Delta.
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
        """Compute the edited matrices beside the model's own; the model does not change until `swap_`.

        Each is computed in fp32 (fp64 for fp64 weights) and rounded once.

        Args:
            model: has the modules, with weights in a float dtype, on any devices.
            force: accept other matrices than those the patch was made for. The edits may then say something else, or
                harm the model.

        Raises:
            PatchError: a module that is missing or quantized, or has another shape, dtype or W_0; a weight that a hook
                recomputes, that another module shares or that cannot be written; or a result that is not finite.
        """
        weights = {}
        for name in self.updates:
            weight, transposed = linear_weight_of(model, name)
            self.check(name, weight, transposed, force)
            weights[name] = weight
        try:
            require_own(model, weights)
        except UnsupportedModelError as error:
            raise PatchError(str(error)) from None
        with torch.no_grad():
            matrices = {name: (w.clone(), patched(self.updates[name], w, name)) for name, w in weights.items()}
        return Prepared(model, matrices)

    def apply_(self, model: torch.nn.Module, force: bool = False) -> Applied:
        """Write the edits into a model in memory, all or none: `prepare`, then `swap_`.

        Returns:
            an object whose `revert_()` restores the model bit for bit.
        """
        return self.prepare(model, force).swap_()

    def check(self, name: str, weight: torch.Tensor, transposed: bool, force: bool = False) -> None:
        """Raise PatchError when a matrix [out, in] is not the one that a module's update is for.

        Args:
            name: the module's path.
            weight: its matrix.
            transposed: whether the model stores it as [in, out].
            force: check shape and orientation only.
        """
        update, target = self.updates[name], self.targets[name]
        shape = [update.left.shape[0], update.right.shape[0]]
        if list(weight.shape) != shape or transposed != target.transposed:
            here, there = (" stored transposed" if flag else "" for flag in (transposed, target.transposed))
            raise PatchError(f"{name} is {list(weight.shape)}{here}, the patch is for {shape}{there}")
        if force:
            return
        dtype = dtype_name(weight.dtype)
        if dtype != target.dtype:
            raise PatchError(
                f"{name} is {dtype}, the patch was made for {target.dtype}: load the model in that, or force it "
                "(its result then differs from the edited model's by rounding)"
            )
        digest = sha256(weight)
        if digest == target.original:
            return
        if digest == target.result:
            raise PatchError(f"{name} has this patch's edits already")
        raise PatchError(
            f"{name} is not the matrix that the patch was made for: another model, or one with other edits in it (of "
            "patches that follow each other, merge first). `patch apply --force` (force=True) applies it: the "
            "edits may then say something else, or harm"
        )


@plain_torch()
def patched(update: Update, weight: torch.Tensor, name: str, alpha: float = 1.0) -> torch.Tensor:
    """A matrix [out, in] plus alpha times an update; raises PatchError when that is not finite.

    Args:
        update: Delta, in any dtype and on any device.
        weight: W [out, in]; not changed.
        name: of the module, for the message.
        alpha: 1 applies the update, -1 subtracts it.
    """
    result = weight.clone()
    wide = update.to(accumulation_dtype(weight))
    left, right = wide.left.to(weight.device), wide.right.to(weight.device)
    if isinstance(wide, MaskedUpdate):
        MaskedUpdate(left, right, wide.bits.to(weight.device)).apply_(result, alpha)
    else:
        LowRankUpdate(left, right).apply_(result, alpha)
    if not bool(torch.isfinite(result).all()):
        raise PatchError(f"{name} is not finite with the patch")
    return result


@plain_torch()
def merge(patches: Sequence[Patch], force: bool = False) -> Patch:
    """One patch that does what several do one after another, up to rounding.

    Each may have been made on the model that the ones before it left, or all of them on the same model; then their
    updates add up.

    Args:
        patches: at least one, in the order they would be applied.
        force: merge also patches that neither follow each other nor are for the same matrices, and patches of which
            one contains another.

    Raises:
        PatchError: patches of different matrices, or a patch that begins with another one's updates, as later patches
            of one editor do: those would count twice.
    """
    if not patches:
        raise PatchError("no patches to merge")
    updates: dict[str, list[Update]] = {}
    targets: dict[str, Target] = {}
    for number, patch in enumerate(patches, 1):
        for name, update in patch.updates.items():
            if name not in targets:
                updates[name], targets[name] = [update], patch.targets[name]
                continue
            follows = _check_mergeable(number, name, patch, updates[name], targets[name], force)
            updates[name].append(update)
            targets[name] = replace(targets[name], result=patch.targets[name].result if follows else "")
    methods = list(dict.fromkeys(patch.method for patch in patches))
    configurations = [dict(patch.configuration) for patch in patches]
    same = all(configuration == configurations[0] for configuration in configurations)
    return Patch(
        {name: _sum(parts) for name, parts in updates.items()},
        targets,
        ", ".join(methods),
        configurations[0] if same else {"merged": configurations},
        tuple(request for patch in patches for request in patch.requests),
    )


def _check_mergeable(
    number: int, name: str, patch: Patch, earlier: Sequence[Update], merged: Target, force: bool
) -> bool:
    """Whether a patch was made on what the ones before it left; raises PatchError where it cannot be merged."""
    update, target = patch.updates[name], patch.targets[name]
    shapes = {(len(u.left), len(u.right)) for u in (update, earlier[0])}
    if len(shapes) > 1 or target.transposed != merged.transposed:
        raise PatchError(f"patch {number} is for another shape of {name}")
    follows = merged.result != "" and target.original == merged.result
    same_original = target.original == merged.original
    if not (follows or same_original or force):
        raise PatchError(
            f"patch {number} is for another {name} than the ones before it: neither the same matrix nor what "
            "they leave. Forced, the merged edits may say something else, or harm"
        )
    if not force and not follows and any(_begins_alike(update, other) for other in earlier):
        raise PatchError(
            f"patch {number} and one before it begin with the same updates of {name}: patches of one editor "
            "hold all it wrote, so the last one is enough"
        )
    return follows


def _begins_alike(one: Update, other: Update) -> bool:
    """Whether the factors of one of two updates are the first ones of the other."""
    k = min(one.rank, other.rank)
    return (
        k > 0
        and torch.equal(one.left[:, :k].cpu(), other.left[:, :k].cpu())
        and torch.equal(one.right[:, :k].cpu(), other.right[:, :k].cpu())
    )


def _sum(parts: Sequence[Update]) -> Update:
    """The sum of updates: their factors side by side; the matrix itself where one of several has a mask."""
    if len(parts) == 1:
        return parts[0]
    parts = [part.cpu() for part in parts]
    if any(isinstance(part, MaskedUpdate) for part in parts):
        matrices = [part.dense() for part in parts]
        dense = torch.zeros_like(matrices[0])
        for matrix in matrices:
            dense = dense + matrix
        return LowRankUpdate(dense, torch.eye(dense.shape[1], dtype=dense.dtype)).compacted()
    left = torch.cat([part.left.to(accumulation_dtype(part.left)) for part in parts], 1)
    right = torch.cat([part.right.to(accumulation_dtype(part.right)) for part in parts], 1)
    return LowRankUpdate(left, right).compacted()
