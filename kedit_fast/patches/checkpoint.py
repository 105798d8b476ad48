"""Patches on checkpoints on disk: safetensors files, sharded or not, without loading the model.

One matrix is in memory at a time. A shard that changes is copied under another name, its new matrices are written into
the copy, and one rename makes all of them count: that of the index, or of the single file. So a kill at any moment
leaves the old checkpoint or the new one; the next command clears away what it left beside.

What the matrices were is kept in `kedit_fast_patches/`, a record for each patch applied, the newest of which `revert`
puts back. A record counts only while the matrices are what it says they became.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kedit_fast.errors import PatchError
from kedit_fast.patches.patch import Patch, added
from kedit_fast.support.files import held, replacing
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.torch_state import plain_torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
KEPT, LOCK = "kedit_fast_patches", ".kedit_fast_patch.lock"
TWIN = ".kedit_fast.safetensors"  # ends the second name that a shard can have
FORMAT_VERSION = "1"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24  # bytes copied at once


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: its file, the tensor's name there, and its bytes."""

    file: Path
    tensor: str
    begin: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, transposed: bool) -> torch.Tensor:
        """The matrix as [out, in]."""
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.begin)
                data = bytearray(stream.read(self.length))
        except OSError as error:
            raise PatchError(f"cannot read {self.file}: {error.strerror or error}") from error
        matrix = torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(self.shape)
        return matrix.T if transposed else matrix

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a part at a time."""
        with self.file.open("rb") as source:
            source.seek(self.begin)
            for start in range(0, self.length, _CHUNK):
                yield source.read(min(_CHUNK, self.length - start))


@dataclass(frozen=True)
class Record:
    """A patch that was applied."""

    path: Path
    number: int
    name: str  # of the patch
    before: dict[str, str]  # module -> sha256 the matrix it had
    after: dict[str, str]  # and of the one it got
    transposed: dict[str, bool]
    kept: bool  # whether what the matrices were is in it
    patch: str  # Patch.digest
    subtracted: dict[str, str]  # sha256 each matrix once the patch is subtracted again; empty until then


class Checkpoint:
    """A model's folder.

    Args:
        folder: with model.safetensors, or its index and shards.

    Raises:
        PatchError: neither is there, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._look()

    def _look(self) -> None:
        self._headers: dict[Path, tuple[int, dict]] = {}
        single, index = self.folder / SINGLE, self.folder / INDEX
        self._index: dict | None = None
        if single.exists():  # what transformers loads where both are there
            self._files = dict.fromkeys((name for name in self._header(single)[1] if name != "__metadata__"), single)
        elif index.exists():
            try:
                self._index = json.loads(index.read_text(encoding="utf-8"))
                self._files = {name: self.folder / file for name, file in self._index["weight_map"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise PatchError(f"cannot read {index}: {error}") from error
        else:
            raise PatchError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}: patches go into safetensors checkpoints "
                "(save_pretrained writes one)"
            )

    def place(self, module: str) -> Place:
        """Where a module's weight lies; files of a bare decoder leave the first part of a path out.

        Raises:
            PatchError: there is no such matrix, or it is quantised.
        """
        name = f"{module}.weight"
        found = next((n for n in (name, name.partition(".")[2]) if n in self._files), None)
        if found is None:
            others = sorted(n for n in self._files if n.startswith(f"{module}."))
            hint = f" (it has {others[0]}: a quantised layer)" if others else ""
            raise PatchError(f"{self.folder} has no {name}{hint}")
        return self._place(self._files[found], found)

    def _place(self, file: Path, tensor: str) -> Place:
        begin, header = self._header(file)
        if tensor not in header:
            raise PatchError(f"{file} has no {tensor}, which the index says is in it")
        about = header[tensor]
        if about["dtype"] not in DTYPES:
            raise PatchError(f"{tensor} is quantised ({about['dtype']}): patches go into float checkpoints")
        if len(about["shape"]) != 2:
            raise PatchError(f"{tensor} is no matrix: {about['shape']}")
        first, last = about["data_offsets"]
        return Place(file, tensor, begin + first, last - first, about["dtype"], tuple(about["shape"]))

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
    def apply(self, patch: Patch, name: str, force: bool = False, keep: bool = True) -> int:
        """Add a patch's updates; returns its number among those applied.

        Args:
            patch: what to apply.
            name: what it is called in the record.
            force: apply to other matrices than those it was made for.
            keep: keep what the matrices were, so that `revert` gives back their bits.

        Raises:
            PatchError: a matrix that is not there, quantised, or another W_0; or a file that cannot be written. The
                folder is as it was.
        """
        with self._locked():
            places = {module: self.place(module) for module in patch.updates}
            before, after = {}, {}
            for module, place in places.items():  # all before anything is written
                target = patch.targets[module]
                matrix = place.read(target.transposed)
                patch.check(module, matrix, target.transposed, force)
                before[module] = sha256(matrix)
            records = self.records()
            number = records[-1].number + 1 if records else 1

            def patched(module: str) -> bytes:
                transposed = patch.targets[module].transposed
                result = added(patch.updates[module], places[module].read(transposed), module)
                after[module] = sha256(result)
                return _bytes(result.T if transposed else result)

            def record() -> None:
                transposed = {module: target.transposed for module, target in patch.targets.items()}
                about = Record(self.folder / KEPT / f"{number:04d}.safetensors", number, name, before, after,
                               transposed, keep, patch.digest, {})  # fmt: skip
                self._write(about, places if keep else {})

            self._rewrite(places, patched, record)
        return number

    @plain_torch()
    def revert(self, force: bool = False) -> str:
        """Put back what the matrices were before the newest patch, to the bit; returns the patch's name.

        Raises:
            PatchError: no patch was applied here, or its originals were not kept; something else has changed a matrix
                since; or a file cannot be written. The folder is as it was.
        """
        with self._locked():
            record = self._newest(force)
            if not record.kept:
                raise PatchError(
                    f"what {record.name} replaced was not kept: --subtract with that patch takes it out to rounding"
                )
            places = {module: self.place(module) for module in record.after}
            there = {module: self._place(record.path, module) for module in record.after}
            for module, place in places.items():
                if (there[module].dtype, there[module].shape) != (place.dtype, place.shape):
                    raise PatchError(f"{place.tensor} has another shape or dtype than when {record.name} was applied")
            self._rewrite(places, lambda module: _bytes(there[module].read(False)))
            record.path.unlink(missing_ok=True)  # where it says that nothing happened it is gone already
            self._tidy()
        return record.name

    @plain_torch()
    def subtract(self, patch: Patch, force: bool = False) -> None:
        """Take the newest patch out by subtraction: to rounding, not to the bit.

        Args:
            patch: the one that was applied, with nothing kept.
            force: also where the record is of another patch or of none, or where a matrix was changed since.

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
                if record.kept:
                    raise PatchError(f"what {record.name} replaced was kept: revert without --subtract is exact")
                self._newest(force)
            places = {module: self.place(module) for module in patch.updates}
            for module, place in places.items():
                target = patch.targets[module]
                matrix = place.read(target.transposed)
                patch.check(module, matrix, target.transposed, force=True)
                if not force and sha256(matrix) == target.original:
                    raise PatchError(f"{place.tensor} does not have this patch's edits")

            subtracted: dict[str, str] = {}

            def without(module: str) -> bytes:
                transposed = patch.targets[module].transposed
                result = added(patch.updates[module], places[module].read(transposed), module, -1.0)
                subtracted[module] = sha256(result)
                return _bytes(result.T if transposed else result)

            def note() -> None:  # by it the next command tells a kill before the change from one after it
                if record is not None:
                    self._write(replace(record, subtracted=subtracted), {})

            self._rewrite(places, without, note)
            if record is not None:
                record.path.unlink(missing_ok=True)
            self._tidy()

    def records(self) -> list[Record]:
        """Of every patch applied, oldest first."""
        found = []
        for path in (self.folder / KEPT).glob("*.safetensors"):
            if not path.stem.isdigit():
                continue
            _, header = self._header(path)
            about = header.get("__metadata__", {})
            if about.get("format_version") != FORMAT_VERSION:
                raise PatchError(f"{path} is not a record of a patch (format {FORMAT_VERSION})")
            names = ("before", "after", "transposed", "subtracted")
            try:
                before, after, transposed, subtracted = (json.loads(about[name]) for name in names)
                kept, _, _ = about["kept"] == "true", about["name"], about["patch"]
            except (KeyError, ValueError) as error:
                raise PatchError(f"{path} is damaged: {error}") from error
            found.append(Record(path, int(path.stem), about["name"], before, after, transposed, kept, about["patch"],
                                subtracted))  # fmt: skip
        return sorted(found, key=lambda record: record.number)

    def _newest(self, force: bool) -> Record:
        """The record of the newest patch; raises PatchError when there is none, or its matrices were changed."""
        records = self.records()
        if not records:
            raise PatchError(f"{self.folder}: no patch was applied here")
        record = records[-1]
        for module, expected in record.after.items():
            if not force and self._hash(module, record) != expected:
                raise PatchError(
                    f"{self.place(module).tensor} was changed since {record.name} was applied: take that back first. "
                    "Forced, that change is lost"
                )
        return record

    def _hash(self, module: str, record: Record) -> str:
        return sha256(self.place(module).read(record.transposed[module]))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with held(self.folder / LOCK, PatchError, f"{self.folder} is being patched by another process"):
            self._look()
            self._tidy()
            yield

    def _tidy(self) -> None:
        """Remove what a killed command left: copies that do not count, and a record of what did not happen."""
        used = set(self._files.values())
        for file in used:
            if (twin := _twin(file)) not in used:
                twin.unlink(missing_ok=True)
        for left in (
            self.folder / f".{SINGLE}.part",
            *self.folder.glob(f".{INDEX}.*"),
            *(self.folder / KEPT).glob(".*"),
        ):
            left.unlink(missing_ok=True)
        if records := self.records():
            record = records[-1]
            now = {module: self._hash(module, record) for module in record.after}
            if now != record.after and now in (record.before, record.subtracted):
                record.path.unlink()
        with contextlib.suppress(OSError):
            (self.folder / KEPT).rmdir()  # when it is empty

    def _write(self, record: Record, places: Mapping[str, Place]) -> None:
        """A record, its matrices copied from file to file."""
        try:
            record.path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise PatchError(f"cannot write {record.path.parent}: {error.strerror or error}") from error
        metadata = {
            "format_version": FORMAT_VERSION, "name": record.name, "before": json.dumps(record.before),
            "after": json.dumps(record.after), "transposed": json.dumps(record.transposed),
            "kept": str(record.kept).lower(), "patch": record.patch, "subtracted": json.dumps(record.subtracted),
        }  # fmt: skip
        header: dict = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for module, place in places.items():
            offsets = [end, end + place.length]
            header[module] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
            end += place.length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with replacing(record.path, PatchError) as part:
            with part.open("wb") as stream:
                stream.write(struct.pack("<Q", len(text)) + text)
                for place in places.values():
                    for chunk in place.chunks():
                        stream.write(chunk)
            for module, place in places.items():
                for chunk, there in zip(place.chunks(), self._place(part, module).chunks(), strict=True):
                    if chunk != there:
                        raise PatchError(f"cannot write {record.path}: {module} is read back as something else")

    def _rewrite(
        self, places: Mapping[str, Place], make: Callable[[str], bytes], record: Callable[[], None] | None = None
    ) -> None:
        """Copies of the shards with new matrices in them, the record, and then the one rename that makes them count."""
        single = self._index is None
        renamed: dict[Path, Path] = {}
        try:
            for file in sorted({place.file for place in places.values()}):
                copy = renamed[file] = self.folder / f".{SINGLE}.part" if single else _twin(file)
                shutil.copyfile(file, copy)
                with copy.open("r+b") as stream:
                    for module, place in places.items():
                        if place.file == file:
                            data = make(module)
                            if len(data) != place.length:
                                raise PatchError(f"{place.tensor} has {place.length} bytes, not {len(data)}")
                            stream.seek(place.begin)
                            stream.write(data)
                            stream.flush()
                            stream.seek(place.begin)
                            if stream.read(place.length) != data:
                                raise PatchError(f"cannot write {copy}: {place.tensor} is read back as something else")
                    os.fsync(stream.fileno())
                shutil.copymode(file, copy)
            if record is not None:
                record()
            if single:
                renamed[self.folder / SINGLE].replace(self.folder / SINGLE)
            else:
                assert self._index is not None
                files = {file.name: copy.name for file, copy in renamed.items()}
                moved = {name: files.get(file, file) for name, file in self._index["weight_map"].items()}
                with replacing(self.folder / INDEX, PatchError) as part:
                    part.write_text(json.dumps({**self._index, "weight_map": moved}, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise PatchError(f"cannot write {error.filename or self.folder}: {error.strerror or error}") from error
        finally:  # whichever of the two counts, what stands beside it goes, and so does a record of what did not happen
            self._look()
            self._tidy()


def _twin(file: Path) -> Path:
    """The other one of a shard's two names."""
    if file.name.endswith(TWIN):
        return file.with_name(file.name.removesuffix(TWIN) + ".safetensors")
    return file.with_name(file.name.removesuffix(".safetensors") + TWIN)


def _bytes(matrix: torch.Tensor) -> bytes:
    return matrix.contiguous().view(torch.uint8).numpy().tobytes()
