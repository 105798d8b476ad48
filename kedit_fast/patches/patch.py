"""Patches: the updates of a run of edits as one file, to be applied to any copy of the model and reverted there.

It is a safetensors file. Tensors: `{module}.left` [out, k] and `{module}.right` [in, k] with Delta = left right^T, and
for a masked update (RECT) `{module}.mask` [out, ceil(in / 8)] uint8; or, of a tuned matrix, `{module}.delta` [out, in].
Of a layer's experts, whose module is `{experts}.down_proj`: `{module}.left` [out, u] for all experts, `{module}.right`
[n, in] with rows by expert, `{module}.columns` [n] int64 and `{module}.offsets` [E + 1] int64 (`ExpertUpdate`); or
`{module}.delta` [E, out, in]. A file with experts has format 3, one with a tuned matrix format 2, others have format 1.
Metadata: `format_version`, `kedit_fast`, `kind`, `method`, `configuration`, `requests`, and `targets`: for each module
the SHA-256 of the matrix W_0 that the update is for, the SHA-256 of the matrix that the editor left, their dtype, and
whether it is stored transposed (transformers' Conv1D, GPT-OSS's experts).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kedit_fast._version import __version__
from kedit_fast.errors import PatchError, UnsupportedModelError
from kedit_fast.models.editable import require_own
from kedit_fast.models.routes import attached_routes
from kedit_fast.patches.swap import Applied, Prepared, edited_weight_of
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.solver.low_rank import DenseUpdate, MaskedUpdate, Update, total_of, update_of
from kedit_fast.solver.shaping import compact
from kedit_fast.support.dtypes import accumulation_dtype, dtype_name
from kedit_fast.support.files import read_file, write_file
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION, DENSE_VERSION, EXPERTS_VERSION = "1", "2", "3"
_PARTS = ("left", "right", "bits", "delta", "columns", "offsets")
_ENDS = {part: "mask" if part == "bits" else part for part in _PARTS}  # field of an update -> end of its name
KIND = "kedit_fast patch"


@dataclass(frozen=True)
class Target:
    """The matrix that an update is for."""

    original: str
    """SHA-256 of W_0 [out, in], the matrix without the update; of experts [E, out, in]."""
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
    """Module path -> Delta [out, in], as factors; of experts Delta [E, out, in]."""
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
        tensors = {
            f"{name}.{_ENDS[part]}": tensor.detach().cpu().contiguous()
            for name, update in self.updates.items()
            for part, tensor in vars(update).items()
        }
        metadata = {
            "format_version": _version_of(self.updates.values()),
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
        if metadata.get("format_version") not in (FORMAT_VERSION, DENSE_VERSION, EXPERTS_VERSION):
            raise PatchError(
                f"{path} has patch format {metadata.get('format_version')}, this version reads {FORMAT_VERSION} to "
                f"{EXPERTS_VERSION}"
            )
        try:
            targets = {name: Target(**fields) for name, fields in json.loads(metadata["targets"]).items()}
            updates: dict[str, Update] = {}
            for name in targets:
                ends = {part: f"{name}.{end}" for part, end in _ENDS.items()}
                updates[name] = update_of({part: tensors.pop(end) for part, end in ends.items() if end in tensors})
            if tensors:
                raise ValueError(f"it holds {sorted(tensors)[0]}, which belongs to no module")
            requests = tuple(json.loads(metadata["requests"]))
            configuration = json.loads(metadata["configuration"])
            return cls(updates, targets, metadata["method"], configuration, requests)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PatchError(f"{path} is damaged: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the patch adds: module paths, factors, masks and matrices."""
        digest = hashlib.sha256()
        for name, update in sorted(self.updates.items()):
            hashes = {part: sha256(tensor) for part, tensor in vars(update).items()}
            digest.update(" ".join([name, *(hashes[part] for part in hashes if part != "bits")]).encode())
            digest.update(hashes.get("bits", "").encode())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """A summary as plain data: what `kedit-fast patch show --json` prints."""
        modules = {}
        for name, update in self.updates.items():
            target = self.targets[name]
            modules[name] = {
                "shape": list(update.shape),
                "rank": update.rank,
                "masked": isinstance(update, MaskedUpdate),
                "dense": isinstance(update, DenseUpdate),
                "norm": update.norm(),
                **({"changed_experts": _changed_experts(update)} if is_stacked(update) else {}),
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
        """Bytes of the factors, masks and matrices."""
        return sum(tensor.nbytes for update in self.updates.values() for tensor in vars(update).values())

    @plain_torch()
    def compacted(self, tolerance: float = 0.0, rank: int | None = None) -> Patch:
        """This patch with as few factors as a tolerance allows.

        Args:
            tolerance: largest |Delta - Delta'| / |Delta| (Frobenius norms) per module; 0 drops only what is rounding.
            rank: most factors per module, however far the result is from Delta; None for no limit. Of experts both
                are of their stacked matrix [out, E in].

        Raises:
            PatchError: a tolerance outside [0, 1), or a rank below 1.

        Cost: per module a QR of both factors and an SVD of a [k, k] matrix; for others an SVD of Delta.
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
        routes = attached_routes(model)
        for name in self.updates:
            if routes is not None and routes.path == name:
                raise PatchError(f"a memory is attached to {name}, for the matrix that is there now: detach it first")
            weight, transposed = edited_weight_of(model, name)
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
        """Raise PatchError when a matrix [out, in], or a stack [E, out, in], is not the one that an update is for.

        Args:
            name: the module's path.
            weight: its matrix.
            transposed: whether the model stores it as [in, out].
            force: check shape and orientation only.
        """
        target, shape = self.targets[name], list(self.updates[name].shape)
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


def is_stacked(update: Update) -> bool:
    """Whether an update is of the stack of a layer's experts, [E, out, in]."""
    return len(update.shape) == 3


def _version_of(updates: Iterable[Update]) -> str:
    """The format of a file with these updates."""
    updates = list(updates)
    if any(map(is_stacked, updates)):
        return EXPERTS_VERSION
    return DENSE_VERSION if any(isinstance(update, DenseUpdate) for update in updates) else FORMAT_VERSION


def _changed_experts(update: Update) -> int:
    """Number of experts that an update changes."""
    if isinstance(update, ExpertUpdate):
        return int((update.offsets.diff() > 0).sum())
    return sum(bool(delta.any()) for delta in update.dense())


@plain_torch()
def patched(update: Update, weight: torch.Tensor, name: str, alpha: float = 1.0) -> torch.Tensor:
    """A matrix [out, in] plus alpha times an update; raises PatchError when that is not finite.

    Args:
        update: Delta, in any dtype and on any device.
        weight: W [out, in], or [E, out, in] of experts; not changed.
        name: of the module, for the message.
        alpha: 1 applies the update, -1 subtracts it.
    """
    result = weight.clone()
    wide = update.to(accumulation_dtype(weight))
    update_of({part: tensor.to(weight.device) for part, tensor in vars(wide).items()}).apply_(result, alpha)
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
    merged: dict[str, list[Patch]] = {}
    targets: dict[str, Target] = {}
    for number, patch in enumerate(patches, 1):
        for name in patch.updates:
            if name not in targets:
                merged[name], targets[name] = [patch], patch.targets[name]
                continue
            follows = _check_mergeable(number, name, patch, merged[name], targets[name], force)
            merged[name].append(patch)
            targets[name] = replace(targets[name], result=patch.targets[name].result if follows else "")
    methods = list(dict.fromkeys(patch.method for patch in patches))
    configurations = [dict(patch.configuration) for patch in patches]
    same = all(configuration == configurations[0] for configuration in configurations)
    return Patch(
        {name: _sum([part.updates[name] for part in parts]) for name, parts in merged.items()},
        targets,
        ", ".join(methods),
        configurations[0] if same else {"merged": configurations},
        tuple(request for patch in patches for request in patch.requests),
    )


def _check_mergeable(
    number: int, name: str, patch: Patch, earlier: Sequence[Patch], merged: Target, force: bool
) -> bool:
    """Whether a patch was made on what the ones before it left; raises PatchError where it cannot be merged."""
    target = patch.targets[name]
    if patch.updates[name].shape != earlier[0].updates[name].shape or target.transposed != merged.transposed:
        raise PatchError(f"patch {number} is for another shape of {name}")
    follows = merged.result != "" and target.original == merged.result
    same_original = target.original == merged.original
    if not (follows or same_original or force):
        raise PatchError(
            f"patch {number} is for another {name} than the ones before it: neither the same matrix nor what "
            "they leave. Forced, the merged edits may say something else, or harm"
        )
    if not force and not follows and any(_begins_alike(name, patch, other) for other in earlier):
        raise PatchError(
            f"patch {number} and one before it begin with the same updates of {name}: patches of one editor "
            "hold all it wrote, so the last one is enough"
        )
    return follows


def _begins_alike(name: str, patch: Patch, other: Patch) -> bool:
    """Whether one of two patches has the other one's updates of a module: its factors first, or its matrix.

    Of two matrices that were tuned from the same one, the one whose requests begin with those of the other has them in
    it, as later patches of one editor do.
    """
    mine, others = patch.updates[name], other.updates[name]
    if isinstance(mine, DenseUpdate) and isinstance(others, DenseUpdate):
        count = min(len(patch.requests), len(other.requests))
        same_requests = count > 0 and patch.requests[:count] == other.requests[:count]
        return same_requests or torch.equal(mine.delta.cpu(), others.delta.cpu())
    if isinstance(mine, DenseUpdate) or isinstance(others, DenseUpdate):
        return False
    if isinstance(mine, ExpertUpdate) or isinstance(others, ExpertUpdate):
        return isinstance(mine, ExpertUpdate) and isinstance(others, ExpertUpdate) and _begin_alike(mine, others)
    k = min(mine.rank, others.rank)
    factors = ((mine.left, others.left), (mine.right, others.right))
    return k > 0 and all(torch.equal(one[:, :k].cpu(), two[:, :k].cpu()) for one, two in factors)


def _begin_alike(mine: ExpertUpdate, others: ExpertUpdate) -> bool:
    """Whether two updates of experts have the same first columns."""
    k = min(mine.rank, others.rank)
    one, other = (
        (update.left[:, :k].cpu(), update.right[first].cpu(), update.columns[first].cpu(), update.experts[first].cpu())
        for update in (mine, others)
        for first in (update.columns < k,)
    )
    return k > 0 and all(map(torch.equal, one, other))


def _sum(parts: Sequence[Update]) -> Update:
    """The sum of updates on the host, in fp32 at least."""
    wide = [part.to(accumulation_dtype(next(iter(vars(part).values())))).cpu() for part in parts]
    return parts[0] if len(parts) == 1 else total_of(wide).compacted()
