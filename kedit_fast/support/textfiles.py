"""Text files as people save them: byte order marks, gzip, JSON, JSON lines, csv; whatever they contain."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
DELIMITERS = (*TABLES.values(), ";", "|")  # seen in tables
RECORDS = (".json", *LINES, *TABLES)
STDIN = "-"
GZIP = b"\x1f\x8b"  # the first bytes of such a file
_BINARY = {
    **dict.fromkeys((".parquet", ".feather", ".arrow"), "a table in binary form"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".npz", ".npy"), "a file that may run code or holds arrays"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".xz", ".bz2", ".zst", ".7z"), "an archive; of these only .gz is read"),
}
_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


@dataclass(frozen=True)
class Row:
    """One record of a file."""

    where: str
    """File and record, as messages name it; records count from 1."""
    value: Any = None
    """What the record holds; None where it cannot be read."""
    problem: str = ""
    """Why it cannot be read, with `where`; empty where it can."""


class Repeated(dict):
    """A JSON object that gives a name twice; the last value counts."""

    names: tuple[str, ...] = ()
    """The repeated names."""


def suffix_of(path: str | os.PathLike) -> str:
    """The last suffix in lower case, not counting `.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def refuse_binary(path: str | os.PathLike, error: type[Exception], remedy: str) -> None:
    """Raise `error` for a file whose name says that it is not text."""
    if kind := _BINARY.get(suffix_of(path)):
        raise error(f"{path} is {kind}, not a text: {remedy}")


def refuse_wide(data: bytes, path: str | os.PathLike, error: type[Exception]) -> None:
    """Raise `error` where the first bytes of a file show that it is not UTF-8."""
    coding = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if coding or data.count(0) > len(data) / 4:
        finding = f"is {coding} text" if coding else "is mostly NUL bytes, so it is UTF-16 or no text at all"
        raise error(f"{path} {finding}: save it as UTF-8, for example `iconv -f {coding or 'UTF-16LE'} -t UTF-8`")


def read_text(path: str | os.PathLike, error: type[Exception]) -> str:
    """The text of a UTF-8 file, compressed by gzip or not, without its byte order mark; `-` is the standard input.

    Raises:
        error: it cannot be read, is a folder, damaged, or not UTF-8; the message names it.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == STDIN else Path(path).read_bytes()
        if data.startswith(GZIP):
            data = gzip.decompress(data)
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror or cause}") from cause
    except (EOFError, zlib.error) as cause:
        raise error(f"cannot read {path}: its gzip data is damaged: {cause}") from cause
    refuse_wide(data[:4096], path, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text: {cause}") from cause


def parse_json(text: str, where: str, error: type[Exception]) -> Any:
    """A JSON value; objects that give a name twice are `Repeated`. Raises `error`, with `where`, for malformed JSON."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: malformed JSON: {cause}") from cause


def parse_toml(text: str, where: str, error: type[Exception]) -> dict[str, Any]:
    """The names and values of a TOML text. Raises `error`, with `where`, for malformed TOML."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is malformed: {' '.join(str(cause).split())[:200]}") from cause


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    names = [name for name, _ in pairs]
    doubled = Repeated(result)
    doubled.names = tuple(name for name in result if names.count(name) > 1)
    return doubled


def read_records(
    path: str | os.PathLike, error: type[Exception], is_record: Callable[[Mapping[str, Any]], bool]
) -> list[Row]:
    """The records of a file: a JSON list, JSON lines (each under either suffix), or csv or tsv with a header.

    The file may be compressed by gzip. A line with malformed JSON gives a row with a problem. A JSON file that is one
    object is one record if `is_record` accepts it. Standard input and pipes hold JSON of either kind.

    Raises:
        error: the file as a whole cannot be read; the message names it.
    """
    suffix = suffix_of(path)
    refuse_binary(path, error, f"save it as one of {', '.join(RECORDS)}")
    stream = str(path) == STDIN or str(path).startswith("/dev/") or Path(path).is_fifo()
    if suffix not in RECORDS and not stream:
        if not Path(path).exists():
            raise error(f"cannot read {path}: no such file")
        raise error(f"{path}: the name says no format; records come as {', '.join(RECORDS)}, each also with .gz")
    text = read_text(path, error)
    if not text.strip():
        raise error(f"{path} is empty: it holds no records")
    if suffix in TABLES:
        return list(_table(text, path, TABLES[suffix], error, is_record))
    if suffix in LINES and not text.lstrip().startswith("["):
        return list(_lines(text, path))
    try:
        value = parse_json(text, str(path), error)
    except error:
        if text.lstrip().startswith("{") and any(isinstance(row.value, dict) for row in _lines(text, path)):
            return list(_lines(text, path))
        raise
    if isinstance(value, dict):
        if not is_record(value):
            names = ", ".join(list(value)[:8]) or "nothing in it"
            raise error(f"{path} must hold a list of records; got one object with {names}")
        value = [value]
    if not isinstance(value, list):
        raise error(f"{path} must hold a list of records; got {type(value).__name__}")
    return [Row(f"{path}, record {number}", record) for number, record in enumerate(value, 1)]


def _lines(text: str, path: str | os.PathLike) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(text.split("\n"), 1):
        line = line.strip().lstrip("\ufeff")
        if not line:
            continue
        number += 1
        place = f"line {number}" if number == line_number else f"line {line_number} (record {number})"
        try:
            value = parse_json(line, f"{path}, {place}", ValueError)
        except ValueError as problem:
            yield Row(f"{path}, {place}", None, str(problem))
            continue
        yield Row(f"{path}, record {number}" + ("" if number == line_number else f" (line {line_number})"), value)


def _table(
    text: str,
    path: str | os.PathLike,
    delimiter: str,
    error: type[Exception],
    is_record: Callable[[Mapping[str, Any]], bool],
) -> Iterator[Row]:
    """Rows of cells under a header; empty cells have no value, and empty cells past the header are ignored."""
    if not is_record(_header(text, delimiter)):
        other = next((mark for mark in DELIMITERS if is_record(_header(text, mark))), None)
        if other is not None:
            raise error(
                f"{path}: the delimiter seems to be {other!r}; a {suffix_of(path)} is read with {delimiter!r}: save it "
                f"with that{' or call it .tsv' if other == TABLES['.tsv'] else ''}"
            )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        names = [name.strip() for name in next(reader)]
        if doubled := sorted({name for name in names if name and names.count(name) > 1}):
            raise error(f"{path}: the header gives {doubled[0]!r} twice")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            number += 1
            where = f"{path}, record {number} (line {reader.line_num})"
            while len(cells) > len(names) and not cells[-1].strip():  # behind a trailing delimiter
                cells.pop()
            if len(cells) > len(names):
                yield Row(where, None, f"{where} has {len(cells)} cells under a header of {len(names)}: {cells[-1]!r}")
                continue
            yield Row(where, {name: cell for name, cell in zip(names, cells, strict=False) if name and cell})
    except csv.Error as cause:
        raise error(f"{path}, line {reader.line_num}: malformed table: {cause}") from cause


def _header(text: str, delimiter: str) -> dict[str, None]:
    """The names in a table's header, split at a delimiter; empty where it cannot be read."""
    reader = csv.reader(io.StringIO(text[:65536], newline=""), delimiter=delimiter, strict=True)
    try:
        return {name.strip(): None for name in next(reader)}
    except csv.Error:
        return {}
