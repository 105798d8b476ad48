"""Documents from files and from the datasets library, read as they are needed."""

from __future__ import annotations

import array
import codecs
import contextlib
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from kedit_fast.errors import StatisticsError
from kedit_fast.support.messages import first_line
from kedit_fast.support.textfiles import GZIP, LINES, TABLES, read_records, refuse_binary, refuse_wide, suffix_of

DATASETS = "datasets:"
JSON = (".json", *LINES)


def open_texts(source: str | os.PathLike, field: str = "text", local: bool = False) -> Sequence[str]:
    """The documents of a source in their order, as a sequence that reads a document when it is accessed.

    Args:
        source: a file, compressed with gzip or not: `.jsonl` or `.ndjson`, or `.json` of either kind, of records or
            texts; `.csv` or `.tsv` with a header; or any other text file, with one document per line. Or
            `datasets:NAME[:CONFIG[:SPLIT]]`, a data set of the datasets library (a hub name or a folder), by default
            its split "train". A JSON list and a table are read into memory; a compressed file is unpacked to a
            temporary one.
        field: the field of a record, or the column, that has the text.
        local: use a data set of the library only if it is on this machine; nothing is downloaded.

    Raises:
        StatisticsError: a source that cannot be read or holds no text.
    """
    if str(source).startswith(DATASETS):
        return _Dataset(str(source).removeprefix(DATASETS), field, local)
    suffix = suffix_of(source)
    refuse_binary(source, StatisticsError, "give a text file, or a data set of the datasets library as datasets:NAME")
    if Path(source).is_file() and (suffix in TABLES or (suffix in JSON and _begins_with(source, b"["))):
        texts = []
        rows = read_records(source, StatisticsError, lambda record: field in record)
        column = suffix in TABLES and any(field in (row.value or ()) for row in rows)  # then an empty cell is ""
        for row in rows:
            value = {field: "", **(row.value or {})} if column else row.value
            if row.problem or (text := _text_of(value, field)) is None:
                raise StatisticsError(row.problem or f"{row.where}: {_no_text(field)}")
            texts.append(text)
        if not any(text.strip() for text in texts):
            raise StatisticsError(f"{source} holds no text")
        return texts
    return TextFile(source, field)


def _begins_with(path: str | os.PathLike, mark: bytes) -> bool:
    """Whether the first character of a file, packed or not, is `mark`."""
    try:
        with Path(path).open("rb") as file:
            packed = file.read(2) == GZIP
        with gzip.open(path) if packed else Path(path).open("rb") as file:
            head = file.read(3)
            head = b"" if head == codecs.BOM_UTF8 else head
            while head.isspace() or not head:
                if not (head := file.read(1)):
                    return False
            return head.lstrip().startswith(mark)
    except (OSError, EOFError, zlib.error) as error:
        raise StatisticsError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _text_of(record: Any, field: str) -> str | None:
    text = record.get(field) if isinstance(record, dict) else record
    return text if isinstance(text, str) else None


def _no_text(field: str) -> str:
    return f"no text in field {field!r} (choose one with --field)"


class TextFile(Sequence[str]):
    """Lines of a text file, or the texts of a file of JSON lines; blank lines are no documents.

    Takes eight bytes of memory per document. A line that cannot be read raises StatisticsError, with its number, when
    it is accessed.
    """

    def __init__(self, path: str | os.PathLike, field: str = "text"):
        self.path, self.field = Path(path), field
        self._offsets = array.array("q")
        try:
            self._file: BinaryIO = self.path.open("rb")
            if not self._file.seekable():  # a pipe
                self._file = io.BytesIO(self._file.read())
            if self._file.read(2) == GZIP:
                self._file.seek(0)
                self._file = _unpacked(self._file)
            self._file.seek(0)
            refuse_wide(self._file.read(4096), path, StatisticsError)
            self._file.seek(0)
            offset = 0
            for line in self._file:
                if not _blank(line):
                    self._offsets.append(offset)
                offset += len(line)
        except OSError as error:
            raise StatisticsError(f"cannot read {path}: {error.strerror or error}") from error
        except (EOFError, zlib.error) as error:
            raise StatisticsError(f"cannot read {path}: its gzip data is damaged: {error}") from error
        if not self._offsets:
            raise StatisticsError(f"{path} holds no text")
        self[0]  # raises for a wrong field, before a model is loaded

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        offset = self._offsets[index]
        try:
            self._file.seek(offset)
            return self._document(self._file.readline(), offset)
        except OSError as error:
            raise StatisticsError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _document(self, line: bytes, offset: int) -> str:
        try:
            text = line.decode("utf-8" if offset else "utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise StatisticsError(f"{self._line_at(offset)} is not UTF-8 text: {error}") from error
        if suffix_of(self.path) not in JSON:
            return text
        try:
            document = _text_of(json.loads(text), self.field)
        except (ValueError, RecursionError) as error:
            raise StatisticsError(f"{self._line_at(offset)}: malformed JSON: {error}") from error
        if document is None:
            raise StatisticsError(f"{self._line_at(offset)}: {_no_text(self.field)}")
        return document

    def _line_at(self, offset: int) -> str:
        self._file.seek(0)
        number = self._file.read(offset).count(b"\n") + 1
        return f"{self.path}, line {number}"


def _unpacked(file: BinaryIO) -> BinaryIO:
    """The content of a gzip file in a temporary file, which is deleted when it is closed."""
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - stays open while its documents are read
    with gzip.GzipFile(fileobj=file) as packed:
        shutil.copyfileobj(packed, unpacked)
    file.close()
    return unpacked


def _blank(line: bytes) -> bool:
    if line.isascii():
        return not line.strip()
    return not line.decode("utf-8-sig", "replace").strip()


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Make the datasets library use no network, as HF_HUB_OFFLINE=1 does, and show no bars."""
    from huggingface_hub import constants

    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
    switches = [(module, name) for module in (datasets.config, constants) for name in names if hasattr(module, name)]
    before = [getattr(module, name) for module, name in switches]
    bars = hasattr(datasets, "are_progress_bars_disabled") and not datasets.are_progress_bars_disabled()
    try:
        if bars:
            datasets.disable_progress_bars()
        for module, name in switches:
            setattr(module, name, True)
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


class _Dataset(Sequence[str]):
    """A text column of a data set of the datasets library; rows without a text are empty documents."""

    def __init__(self, name: str, field: str, local: bool = False):
        try:
            import datasets  # pyright: ignore[reportMissingImports] - an extra
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
            raise StatisticsError(f"cannot load the data set {name}: {first_line(error)}") from error
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
