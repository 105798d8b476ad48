"""Records that are appended to a folder: JSON and tensors, several to a file, safe against a kill at any moment.

manifest.json             what the log belongs to, and how many files and records count; replaced last
records-N.safetensors     the records of one call of `write`, and the SHA-256 of the file before
.lock                     locked while a process writes

Writing takes what is new and a manifest of constant size, however much is there already. A file behind those that the
manifest counts is of a process that was killed; the next one replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import KeditError
from kedit_fast.support.files import locked, read_file, write_file, write_text

FORMAT_VERSION = 1
MANIFEST, LOCK = "manifest.json", ".lock"
_FACTS = "facts"


@dataclass(frozen=True)
class Record:
    """One record."""

    facts: Mapping[str, Any]
    """What JSON can hold; keys of mappings are texts."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """On any device; read back they are on the host."""


class RecordLog:
    """A folder of records. `opened` makes one.

    Args:
        folder: of the log, which exists.
        error: what is raised where something cannot be read or written.
    """

    def __init__(self, folder: Path, error: type[KeditError]):
        self.folder, self._error = folder, error
        self.facts: dict[str, Any] = {}
        """What the manifest says beside its counts; {} in a new log."""
        self.written = 0
        """Number of records that are safe."""
        self.pending: list[Record] = []
        """Records that the next call of `write` writes."""
        self._files, self._last = 0, ""
        self.is_new = not (folder / MANIFEST).exists()
        """Whether there was no manifest."""
        if not self.is_new:
            self._read_manifest()

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, folder: str | os.PathLike, error: type[KeditError], busy: str, beside: Iterable[str] = ()
    ) -> Iterator[RecordLog]:
        """The log in a folder, which is made with its parents, locked while the block runs.

        Args:
            folder: of the log.
            error: what is raised where something cannot be read or written.
            busy: the message where another process has it.
            beside: names of other files that may be in the folder of a new log.

        Raises:
            error: the folder cannot be made or written, is in use, or holds other files; or a damaged manifest.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise error(f"cannot write {path}: {cause.strerror or cause}") from cause
        with locked(path / LOCK, error, busy):
            if not (path / MANIFEST).exists():
                names = [p.name for p in path.iterdir() if not p.name.startswith(".") and p.name not in beside]
                if foreign := sorted(name for name in names if not name.startswith("records-")):
                    raise error(f"{path} holds {foreign[0]} and no {MANIFEST}: choose another folder, or an empty one")
            for unfinished in (*path.glob(".records-*"), *path.glob(f".{MANIFEST}.*")):  # of a killed process
                unfinished.unlink(missing_ok=True)
            yield cls(path, error)

    def append(self, record: Record) -> None:
        """Add a record to those that the next call of `write` writes."""
        self.pending.append(record)

    def write(self, facts: Mapping[str, Any]) -> None:
        """Make the pending records safe, and replace the facts of the manifest: both or neither.

        Raises:
            error: they cannot be written. The log is what it was before, and the records are still pending.
        """
        files, last = self._files, self._last
        if self.pending:
            path = self._path(files + 1)
            tensors: dict[str, torch.Tensor] = {}
            memory: set[int] = set()  # safetensors takes no two tensors of one storage
            for number, record in enumerate(self.pending):
                text = torch.frombuffer(bytearray(json.dumps(record.facts).encode()), dtype=torch.uint8)
                for name, tensor in {_FACTS: text, **record.tensors}.items():
                    plain = tensor.detach().cpu().contiguous()
                    place = plain.untyped_storage().data_ptr()
                    tensors[f"{number}/{name}"] = plain.clone() if place in memory else plain
                    memory.add(place)
            metadata = {"before": last, "records": str(len(self.pending))}
            write_file(path, tensors, metadata, self._error)
            files, last = files + 1, self._hash(path)
        written = self.written + len(self.pending)
        counts = {"format_version": FORMAT_VERSION, "files": files, "records": written, "last": last}
        text = json.dumps({**counts, "facts": dict(facts)}, indent=1)
        write_text(self.folder / MANIFEST, text, self._error)
        self._files, self._last, self.written = files, last, written
        self.pending, self.facts = [], dict(facts)

    def __iter__(self) -> Iterator[Record]:
        """The records that are safe, in order; one file in memory at a time.

        Raises:
            error: a file that is missing or damaged.
        """
        before = ""
        for number in range(1, self._files + 1):
            path = self._path(number)
            tensors, metadata = read_file(path, self._error)
            if metadata.get("before") != before:
                raise self._error(f"{path} is damaged: it does not follow the file before it")
            try:
                for place in range(int(metadata["records"])):
                    start = f"{place}/"
                    mine = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
                    facts = json.loads(bytes(mine.pop(_FACTS).numpy()))
                    yield Record(facts, mine)
            except (KeyError, ValueError) as cause:
                raise self._error(f"{path} is damaged: {cause}") from cause
            before = self._hash(path)
        if before != self._last:
            raise self._error(f"{self.folder / MANIFEST} is not of the files beside it")

    def reserve(self, count: int) -> None:
        """Raise `error` when a file of so many bytes cannot be written now; nothing is left of the attempt."""
        path = self.folder / ".records-space"
        try:
            with path.open("wb") as file:
                if count > 0 and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, count)
        except OSError as cause:
            raise self._error(f"cannot write {count:,} bytes in {self.folder}: {cause.strerror or cause}") from cause
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"records-{number:06d}.safetensors"

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while part := file.read(1 << 22):
                    digest.update(part)
        except OSError as cause:
            raise self._error(f"cannot read {path}: {cause.strerror or cause}") from cause
        return digest.hexdigest()

    def _read_manifest(self) -> None:
        path = self.folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise self._error(f"{path} has format {content['format_version']}, this version reads {FORMAT_VERSION}")
            self._files, self.written, self._last = int(content["files"]), int(content["records"]), content["last"]
            self.facts = dict(content["facts"])
        except OSError as cause:
            raise self._error(f"cannot read {path}: {cause.strerror or cause}") from cause
        except (ValueError, KeyError, TypeError) as cause:
            raise self._error(f"{path} is damaged: {cause}") from cause
