"""Documents of files and of the datasets library, read as they are needed."""

from __future__ import annotations

import array
import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from kedit_fast.errors import StatisticsError

DATASETS = "datasets:"


def open_texts(source: str | os.PathLike, field: str = "text", local: bool = False) -> Sequence[str]:
    """The documents of a source, in its own order; a sequence, of which only what is asked for is in memory.

    Args:
        source: a `.jsonl` file; another text file, one document a line; or `datasets:NAME[:CONFIG[:SPLIT]]`, a data
            set of the datasets library (a hub name or a folder), by default its split "train".
        field: of a record that holds the text.
        local: a data set of the library must be on this machine already: nothing is downloaded.

    Raises:
        StatisticsError: a source that cannot be read or holds no text.
    """
    if str(source).startswith(DATASETS):
        return _Dataset(str(source).removeprefix(DATASETS), field, local)
    return TextFile(source, field)


class TextFile(Sequence[str]):
    """Lines of a text file, or the texts of a .jsonl file; blank lines are no documents.

    Keeps eight bytes a document. A line that cannot be read raises StatisticsError with its number when it is used.
    """

    def __init__(self, path: str | os.PathLike, field: str = "text"):
        self.path, self.field = Path(path), field
        self._offsets = array.array("q")
        try:
            self._file: BinaryIO = self.path.open("rb")
            if not self._file.seekable():  # a pipe
                self._file = io.BytesIO(self._file.read())
            offset = 0
            for line in self._file:
                if not _blank(line):
                    self._offsets.append(offset)
                offset += len(line)
        except OSError as error:
            raise StatisticsError(f"cannot read {path}: {error.strerror or error}") from error
        if not self._offsets:
            raise StatisticsError(f"{path} holds no text")
        self[0]  # a wrong field shows before anything is loaded

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        offset = self._offsets[index]
        try:
            self._file.seek(offset)
            return self._text(self._file.readline(), offset)
        except OSError as error:
            raise StatisticsError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _text(self, line: bytes, offset: int) -> str:
        try:
            text = line.decode("utf-8" if offset else "utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise StatisticsError(f"{self._place(offset)} is not UTF-8 text: {error}") from error
        if self.path.suffix != ".jsonl":
            return text
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise StatisticsError(f"{self._place(offset)}: malformed JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
            raise StatisticsError(f"{self._place(offset)}: no text in field {self.field!r} (choose one with --field)")
        return record[self.field]

    def _place(self, offset: int) -> str:
        self._file.seek(0)
        number = self._file.read(offset).count(b"\n") + 1
        return f"{self.path}, line {number}"


def _blank(line: bytes) -> bool:
    if line.isascii():
        return not line.strip()
    return not line.decode("utf-8-sig", "replace").strip()


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """The datasets library as HF_HUB_OFFLINE=1 sets it: what it has on this machine, and no network."""
    from huggingface_hub import constants

    switches = [(place, name) for place in (datasets.config, constants)
                for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE") if hasattr(place, name)]  # fmt: skip
    before = [getattr(place, name) for place, name in switches]
    try:
        for place, name in switches:
            setattr(place, name, True)
        yield
    finally:
        for (place, name), value in zip(switches, before, strict=True):
            setattr(place, name, value)


class _Dataset(Sequence[str]):
    """A text column of a data set of the datasets library; rows without a text are empty documents."""

    def __init__(self, name: str, field: str, local: bool = False):
        try:
            import datasets
        except ImportError:
            raise StatisticsError(
                "`datasets:` needs the datasets library: pip install 'kedit-fast[datasets]'"
            ) from None
        path, _, rest = name.partition(":")
        config, _, split = rest.partition(":")
        try:
            with _offline(datasets) if local else contextlib.nullcontext():
                self._rows = datasets.load_dataset(path, config or None, split=split or "train")
        except Exception as error:  # whatever a missing set, split or network makes the library raise
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StatisticsError(f"cannot load the data set {name}: {what}") from error
        if field not in self._rows.column_names:
            raise StatisticsError(
                f"the data set {name} has no field {field!r}, only {', '.join(self._rows.column_names)} (--field)"
            )
        if len(self._rows) == 0:
            raise StatisticsError(f"the data set {name} holds no text")
        self._field = field

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [text or "" for text in self._rows[index][self._field]]
        return self._rows[index][self._field] or ""

    def __iter__(self) -> Iterator[str]:
        for row in self._rows:
            yield row[self._field] or ""
