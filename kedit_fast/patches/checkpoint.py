"""Patches on checkpoints on disk: safetensors files, sharded or not, without loading the model.

One matrix is in memory at a time, or the stack of one layer's experts, which the files have as one tensor or as one for
each expert (`stored_experts`). A shard that changes is copied under another name, and its new matrices are written
into the copy. A single rename then makes all of them visible: of the index, or of the only file. So a kill at any
moment leaves the old checkpoint or the new one; the next command removes what else it left.

`kedit_fast_patches/` holds a record for each applied patch, with the matrices from before it; `revert` restores those
of the newest. A record is valid only while the matrices are what it says they became.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kedit_fast.errors import PatchError
from kedit_fast.models.multimodal import bare_name
from kedit_fast.models.weight_names import is_experts_path, weight_name_of
from kedit_fast.patches.patch import Patch, patched
from kedit_fast.patches.stored_experts import ExpertNames
from kedit_fast.support.files import locked, replacing
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.torch_state import plain_torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
RECORDS, LOCK = "kedit_fast_patches", ".kedit_fast_patch.lock"
TWIN = ".kedit_fast.safetensors"
"""The end of the second name that a shard can have."""
FORMAT_VERSION = "1"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24  # bytes copied at once


@dataclass(frozen=True)
class StoredMatrix:
    """Where a matrix is stored."""

    file: Path
    tensor: str
    """Its name in the file."""
    begin: int
    """Offset in the file, in bytes."""
    length: int
    """In bytes."""
    dtype: str
    """As safetensors names it, a key of `DTYPES`."""
    shape: tuple[int, ...]
    """As stored: [out, in], or [in, out] where transposed; with the number of experts before it in a stack of them."""
    flipped: bool = False
    """Whether it is stored the other way round than the model has it in memory."""

    @property
    def pieces(self) -> tuple[StoredMatrix, ...]:
        """The tensors in files that it is made of: itself."""
        return (self,)

    def read(self, transposed: bool) -> torch.Tensor:
        """The matrix as [out, in], or the stack as [E, out, in].

        Args:
            transposed: whether the model has it as [in, out] in memory.
        """
        data = bytearray(self.length)
        _read_into(self, memoryview(data))
        return self._oriented(torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(self.shape), transposed)

    def bytes_of(self, matrix: torch.Tensor, transposed: bool) -> bytes:
        """What is stored of a matrix that `read` could have given."""
        return _bytes(self._oriented(matrix, transposed))

    def _oriented(self, matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
        return matrix.mT if transposed != self.flipped else matrix

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, at most 16 MiB at a time."""
        for piece in self.pieces:
            with piece.file.open("rb") as source:
                source.seek(piece.begin)
                for start in range(0, piece.length, _CHUNK):
                    yield source.read(min(_CHUNK, piece.length - start))


@dataclass(frozen=True)
class StoredStack(StoredMatrix):
    """Where the matrices of a layer's experts are stored, a tensor for each; file and place are the first's."""

    matrices: tuple[StoredMatrix, ...] = ()
    """In the order of the experts."""

    @classmethod
    def of(cls, matrices: Sequence[StoredMatrix], flipped: bool) -> StoredStack:
        """The stack of some matrices.

        Raises:
            PatchError: they differ in shape or dtype.
        """
        first = matrices[0]
        for other in matrices:
            if (other.dtype, other.shape) != (first.dtype, first.shape):
                raise PatchError(f"{other.tensor} has another shape or dtype than {first.tensor}")
        shape, length = (len(matrices), *first.shape), len(matrices) * first.length
        return cls(first.file, first.tensor, first.begin, length, first.dtype, shape, flipped, tuple(matrices))

    @property
    def pieces(self) -> tuple[StoredMatrix, ...]:
        """The matrices of the experts."""
        return self.matrices

    def read(self, transposed: bool) -> torch.Tensor:
        """The stack [E, out, in]."""
        data = bytearray(self.length)
        for start, piece in zip(range(0, self.length, self.matrices[0].length), self.matrices, strict=True):
            _read_into(piece, memoryview(data)[start : start + piece.length])
        return self._oriented(torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(self.shape), transposed)


def _read_into(stored: StoredMatrix, data: memoryview) -> None:
    """Read the bytes of a tensor."""
    try:
        with stored.file.open("rb") as stream:
            stream.seek(stored.begin)
            if stream.readinto(data) != stored.length:
                raise PatchError(f"{stored.file} ends before {stored.tensor} does")
    except OSError as error:
        raise PatchError(f"cannot read {stored.file}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Record:
    """A patch that was applied to a checkpoint."""

    path: Path
    number: int
    """1 for the first patch that was applied."""
    name: str
    """What the patch was called."""
    before: dict[str, str]
    """Module -> SHA-256 of the matrix it had."""
    after: dict[str, str]
    """Module -> SHA-256 of the matrix it got."""
    transposed: dict[str, bool]
    """Module -> whether its matrix is stored as [in, out]."""
    has_originals: bool
    """Whether the matrices from before are in the record."""
    patch: str
    """`Patch.digest`."""
    subtracted: dict[str, str]
    """Module -> SHA-256 of its matrix after the patch is subtracted again; empty until then."""


class Checkpoint:
    """A model's folder, to which patches are applied.

    Args:
        folder: has model.safetensors, or its index and shards.

    Raises:
        PatchError: neither is there, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._expert_names: ExpertNames | None = None
        self._read_index()

    def _read_index(self) -> None:
        """Find out which file has which tensor, as transformers does."""
        self._headers: dict[Path, tuple[int, dict]] = {}
        single, index = self.folder / SINGLE, self.folder / INDEX
        self._index: dict | None = None
        if single.exists():  # transformers prefers it where both exist
            self._files = dict.fromkeys((name for name in self._header(single)[1] if name != "__metadata__"), single)
        elif index.exists():
            try:
                content = json.loads(index.read_text(encoding="utf-8"))
                self._files = {name: self.folder / file for name, file in content["weight_map"].items()}
                self._index = content
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise PatchError(f"cannot read {index}: {error}") from error
        else:
            raise PatchError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}: patches go into safetensors checkpoints "
                "(save_pretrained writes one)"
            )

    def stored(self, module: str) -> StoredMatrix:
        """Where a module's weight is stored; of experts, their stack.

        Raises:
            PatchError: there is no such matrix, or several may be it, or it is quantized.
        """
        if is_experts_path(module):
            return self._stored_experts(module)
        tensor = self.tensor_of(module)
        return self._stored(self._files[tensor], tensor)

    def _stored_experts(self, module: str) -> StoredMatrix:
        if self._expert_names is None or self._expert_names.tensors != self._files.keys():
            self._expert_names = ExpertNames(self.folder, self._files)
        names = self._expert_names.of(module, lambda tensor: self._header(self._files[tensor])[1][tensor]["shape"])
        ndim = 3 if names.is_fused else 2
        stored = [self._stored(self._files[tensor], tensor, ndim) for tensor in names.tensors]
        if names.is_fused:
            return replace(stored[0], flipped=names.is_flipped)
        return StoredStack.of(stored, names.is_flipped)

    def tensor_of(self, module: str) -> str:
        """The name of a module's weight. Files of a bare decoder lack the first part of its path, and those of a
        multimodal model have its parts in other modules than it has in memory.

        Raises:
            PatchError: there is no such tensor, or several may be it.
        """
        name = weight_name_of(module)
        alike = (n for n in self._files if n == name.partition(".")[2] or bare_name(n) == bare_name(name))
        candidates = [name] if name in self._files else sorted(alike)
        if len(candidates) > 1:
            raise PatchError(f"{self.folder} has no {name}, and {' and '.join(candidates)} may each be it")
        if not candidates:
            others = sorted(n for n in self._files if n.startswith(f"{module}."))
            hint = f" (it has {others[0]}: a quantized layer)" if others else ""
            raise PatchError(f"{self.folder} has no {name}{hint}")
        (tensor,) = candidates
        return tensor

    def _stored(self, file: Path, tensor: str, ndim: int = 2) -> StoredMatrix:
        begin, header = self._header(file)
        if tensor not in header:
            raise PatchError(f"{file} has no {tensor}, which the index says is in it")
        dtype, shape, (first, last) = (header[tensor][field] for field in ("dtype", "shape", "data_offsets"))
        if dtype not in DTYPES:
            raise PatchError(
                f"{tensor} is quantized ({dtype}): patches go into float matrices. --dequantize-into FOLDER "
                "(`patches.dequantized.apply_dequantized`) copies an fp8 or bitsandbytes checkpoint with the patched "
                "matrices in 16 bits"
            )
        if len(shape) != ndim:
            raise PatchError(f"{tensor} is no {'matrix' if ndim == 2 else 'stack of matrices'}: {shape}")
        return StoredMatrix(file, tensor, begin + first, last - first, dtype, tuple(shape))

    def _header(self, file: Path) -> tuple[int, dict]:
        """Where the data of a safetensors file begins, and its header."""
        if file not in self._headers:
            try:
                with safe_open(file, framework="pt"):  # checks the header and the file's length
                    pass
                with file.open("rb") as stream:
                    (length,) = struct.unpack("<Q", stream.read(8))
                    self._headers[file] = 8 + length, json.loads(stream.read(length))
            except (OSError, SafetensorError, ValueError, struct.error) as error:
                raise PatchError(f"cannot read {file}: {error}") from error
        return self._headers[file]

    @plain_torch()
    def apply(self, patch: Patch, name: str, force: bool = False, store_originals: bool = True) -> int:
        """Add a patch's updates to the matrices on disk, all or none.

        Args:
            patch: what to apply.
            name: what the record calls it.
            force: accept other matrices than those the patch was made for.
            store_originals: store the matrices from before, so that `revert` restores them bit for bit.

        Returns:
            the patch's number: 1 for the first one applied here.

        Raises:
            PatchError: a matrix that is missing, quantized, or not the one the patch was made for; or a file that
                cannot be written. The folder is as it was.
        """
        with self._locked():
            matrices = {module: self.stored(module) for module in patch.updates}
            before, after = {}, {}
            for module, stored in matrices.items():  # all are checked before anything is written
                target = patch.targets[module]
                matrix = stored.read(target.transposed)
                patch.check(module, matrix, target.transposed, force)
                before[module] = sha256(matrix)
            records = self.records()
            number = records[-1].number + 1 if records else 1

            def edited(module: str) -> bytes:
                transposed = patch.targets[module].transposed
                result = patched(patch.updates[module], matrices[module].read(transposed), module)
                after[module] = sha256(result)
                return matrices[module].bytes_of(result, transposed)

            def write_record() -> None:
                path = self.folder / RECORDS / f"{number:04d}.safetensors"
                transposed = {module: target.transposed for module, target in patch.targets.items()}
                record = Record(path, number, name, before, after, transposed, store_originals, patch.digest, {})
                self._write(record, matrices if store_originals else {})

            self._rewrite(matrices, edited, write_record)
        return number

    @plain_torch()
    def revert(self, force: bool = False) -> str:
        """Restore the matrices from before the newest patch, bit for bit.

        Args:
            force: restore also a matrix that something else has changed since; that change is lost.

        Returns:
            the patch's name.

        Raises:
            PatchError: no patch was applied here, or without storing the originals; something else has changed a matrix
                since; or a file cannot be written. The folder is as it was.
        """
        with self._locked():
            record = self._newest(force)
            if not record.has_originals:
                raise PatchError(
                    f"what {record.name} replaced was not kept: --subtract with that patch takes it out to rounding"
                )
            matrices = {module: self.stored(module) for module in record.after}
            originals = {
                module: self._stored(record.path, module, len(stored.shape)) for module, stored in matrices.items()
            }
            for module, stored in matrices.items():
                if (originals[module].dtype, originals[module].shape) != (stored.dtype, stored.shape):
                    raise PatchError(f"{stored.tensor} has another shape or dtype than when {record.name} was applied")
            self._rewrite(matrices, lambda module: _bytes(originals[module].read(False)))
            record.path.unlink(missing_ok=True)  # `_tidy` has removed it already if the patch had changed nothing
            self._tidy()
        return record.name

    @plain_torch()
    def subtract(self, patch: Patch, force: bool = False) -> None:
        """Undo the newest patch by subtraction: exact up to rounding.

        Args:
            patch: the one that was applied, without storing the originals.
            force: subtract also where the record is of another patch or missing, or a matrix was changed since.

        Raises:
            PatchError: as `revert`.
        """
        with self._locked():
            records = self.records()
            record = records[-1] if records and records[-1].patch == patch.digest else None
            if record is None and not force:
                newest = f"the newest patch is {records[-1].name}" if records else "no patch was applied here"
                raise PatchError(f"{self.folder}: {newest}, not this one")
            if record is not None:
                if record.has_originals:
                    raise PatchError(f"what {record.name} replaced was kept: revert without --subtract is exact")
                self._newest(force)
            matrices = {module: self.stored(module) for module in patch.updates}
            for module, stored in matrices.items():
                target = patch.targets[module]
                matrix = stored.read(target.transposed)
                patch.check(module, matrix, target.transposed, force=True)
                if not force and sha256(matrix) == target.original:
                    raise PatchError(f"{stored.tensor} does not have this patch's edits")

            subtracted: dict[str, str] = {}

            def unedited(module: str) -> bytes:
                transposed = patch.targets[module].transposed
                result = patched(patch.updates[module], matrices[module].read(transposed), module, -1.0)
                subtracted[module] = sha256(result)
                return matrices[module].bytes_of(result, transposed)

            def write_hashes() -> None:  # so that the next command can tell a kill before the change from one after it
                if record is not None:
                    self._write(replace(record, subtracted=subtracted), {})

            self._rewrite(matrices, unedited, write_hashes)
            if record is not None:
                record.path.unlink(missing_ok=True)
            self._tidy()

    def records(self) -> list[Record]:
        """The records of all applied patches, oldest first; raises PatchError when one is damaged."""
        records = []
        for path in (self.folder / RECORDS).glob("*.safetensors"):
            if not path.stem.isdigit():
                continue
            _, header = self._header(path)
            metadata = header.get("__metadata__", {})
            if metadata.get("format_version") != FORMAT_VERSION:
                raise PatchError(f"{path} is not a record of a patch (format {FORMAT_VERSION})")
            names = ("before", "after", "transposed", "subtracted")
            try:
                before, after, transposed, subtracted = (json.loads(metadata[name]) for name in names)
                name, patch, has_originals = metadata["name"], metadata["patch"], metadata["kept"] == "true"
            except (KeyError, ValueError) as error:
                raise PatchError(f"{path} is damaged: {error}") from error
            number = int(path.stem)
            records.append(Record(path, number, name, before, after, transposed, has_originals, patch, subtracted))
        return sorted(records, key=lambda record: record.number)

    def _newest(self, force: bool) -> Record:
        """The record of the newest patch; raises PatchError when there is none, or its matrices were changed."""
        records = self.records()
        if not records:
            raise PatchError(f"{self.folder}: no patch was applied here")
        record = records[-1]
        for module, expected in record.after.items():
            if not force and self._hash(module, record) != expected:
                raise PatchError(
                    f"{self.stored(module).tensor} was changed since {record.name} was applied: take that back first. "
                    "Forced, that change is lost"
                )
        return record

    def _hash(self, module: str, record: Record) -> str:
        return sha256(self.stored(module).read(record.transposed[module]))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with locked(self.folder / LOCK, PatchError, f"{self.folder} is being patched by another process"):
            self._read_index()
            self._tidy()
            yield

    def _tidy(self) -> None:
        """Remove what a killed command left: unused copies of shards, and a record of a change that did not happen."""
        used = set(self._files.values())
        for file in used:
            if (twin := _twin(file)) not in used:
                twin.unlink(missing_ok=True)
        unfinished = self.folder / f".{SINGLE}.part"
        for path in (unfinished, *self.folder.glob(f".{INDEX}.*"), *(self.folder / RECORDS).glob(".*")):
            path.unlink(missing_ok=True)
        if records := self.records():
            record = records[-1]
            current = {module: self._hash(module, record) for module in record.after}
            if current != record.after and current in (record.before, record.subtracted):
                record.path.unlink()
        with contextlib.suppress(OSError):
            (self.folder / RECORDS).rmdir()  # if it is empty

    def _write(self, record: Record, matrices: Mapping[str, StoredMatrix]) -> None:
        """Write a record with matrices that are copied from file to file."""
        try:
            record.path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise PatchError(f"cannot write {record.path.parent}: {error.strerror or error}") from error
        metadata = {
            "format_version": FORMAT_VERSION,
            "name": record.name,
            "before": json.dumps(record.before),
            "after": json.dumps(record.after),
            "transposed": json.dumps(record.transposed),
            "kept": str(record.has_originals).lower(),
            "patch": record.patch,
            "subtracted": json.dumps(record.subtracted),
        }
        header: dict = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for module, stored in matrices.items():
            offsets = [end, end + stored.length]
            header[module] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
            end += stored.length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with replacing(record.path, PatchError) as part:
            with part.open("wb") as stream:
                stream.write(struct.pack("<Q", len(text)) + text)
                for stored in matrices.values():
                    for chunk in stored.chunks():
                        stream.write(chunk)
            for module, stored in matrices.items():
                again = self._stored(part, module, len(stored.shape))
                if not _same_bytes(stored.chunks(), again.chunks()):
                    raise PatchError(f"cannot write {record.path}: {module} is read back as something else")

    def _rewrite(
        self,
        matrices: Mapping[str, StoredMatrix],
        make_bytes: Callable[[str], bytes],
        before_rename: Callable[[], None] | None = None,
    ) -> None:
        """Write copies of the shards with new matrices in them, then make them visible with one rename.

        Args:
            matrices: by module, where those to be replaced are stored.
            make_bytes: a module's new matrix, as it is stored.
            before_rename: called between the two steps.
        """
        copies: dict[Path, Path] = {}
        try:
            for file in sorted({piece.file for stored in matrices.values() for piece in stored.pieces}):
                copies[file] = self.folder / f".{SINGLE}.part" if self._index is None else _twin(file)
            _copy_with(copies, matrices, make_bytes)
            if before_rename is not None:
                before_rename()
            if self._index is None:
                copies[self.folder / SINGLE].replace(self.folder / SINGLE)
            else:
                names = {file.name: copy.name for file, copy in copies.items()}
                weight_map = {tensor: names.get(file, file) for tensor, file in self._index["weight_map"].items()}
                text = json.dumps({**self._index, "weight_map": weight_map}, indent=2) + "\n"
                with replacing(self.folder / INDEX, PatchError) as part:
                    part.write_text(text, encoding="utf-8")
        except OSError as error:
            raise PatchError(f"cannot write {error.filename or self.folder}: {error.strerror or error}") from error
        finally:  # whether the rename happened or not: remove the files that are not in use, and a record that is void
            self._read_index()
            self._tidy()


def _copy_with(
    copies: Mapping[Path, Path], matrices: Mapping[str, StoredMatrix], make_bytes: Callable[[str], bytes]
) -> None:
    """Copy shards, write new matrices into the copies, and read them back.

    Args:
        copies: a shard -> its copy.
        matrices: by module, where those to be replaced are stored.
        make_bytes: a module's new matrix, as it is stored.
    """
    for file, copy in copies.items():
        shutil.copyfile(file, copy)
    with contextlib.ExitStack() as stack:
        streams = {file: stack.enter_context(copy.open("r+b")) for file, copy in copies.items()}
        for module, stored in matrices.items():
            data = memoryview(make_bytes(module))
            if len(data) != stored.length:
                raise PatchError(f"{stored.tensor} has {stored.length} bytes, not {len(data)}")
            end = 0
            for piece in stored.pieces:
                part, stream = data[end : end + piece.length], streams[piece.file]
                end += piece.length
                stream.seek(piece.begin)
                stream.write(part)
                stream.flush()
                stream.seek(piece.begin)
                if stream.read(piece.length) != part:
                    raise PatchError(
                        f"cannot write {copies[piece.file]}: {piece.tensor} is read back as something else"
                    )
        for stream in streams.values():
            os.fsync(stream.fileno())
    for file, copy in copies.items():
        shutil.copymode(file, copy)


def _same_bytes(one: Iterable[bytes], other: Iterable[bytes]) -> bool:
    """Whether two sequences of chunks, which may be cut in other places, are the same bytes."""
    digests = [hashlib.sha256(), hashlib.sha256()]
    for digest, chunks in zip(digests, (one, other), strict=True):
        for chunk in chunks:
            digest.update(chunk)
    return digests[0].digest() == digests[1].digest()


def _twin(file: Path) -> Path:
    """The other of the two names that a shard alternates between."""
    if file.name.endswith(TWIN):
        return file.with_name(file.name.removesuffix(TWIN) + ".safetensors")
    return file.with_name(file.name.removesuffix(".safetensors") + TWIN)


def _bytes(matrix: torch.Tensor) -> bytes:
    return matrix.contiguous().view(torch.uint8).numpy().tobytes()
