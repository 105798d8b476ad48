"""Requests as a file of this package's own records."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from kedit_fast.errors import RequestError
from kedit_fast.requests.records import Options, read_flat
from kedit_fast.requests.request import EditRequest
from kedit_fast.support.files import write_text
from kedit_fast.support.textfiles import LINES, suffix_of

SUFFIXES = (".json", *LINES)


def check_suffix(path: str | os.PathLike) -> None:
    """Raise RequestError where the name of a file does not say that it holds JSON or JSON lines."""
    if suffix_of(path) not in SUFFIXES or Path(path).suffix.lower() == ".gz":
        raise RequestError(f"{path}: requests are written as {', '.join(SUFFIXES)}: choose a name that ends so")


def save_requests(requests: Sequence[EditRequest], path: str | os.PathLike) -> None:
    """Write requests as flat JSON records: a list in .json, one to a line in .jsonl or .ndjson.

    The records are read again before the file appears. An older file stays until then.

    Raises:
        RequestError: the name says another format, there are no requests, the file cannot be written, or a record is
            read back as another request.
    """
    check_suffix(path)
    if not requests:
        raise RequestError(f"{path} is not written: there are no requests")
    lines = [json.dumps(request.as_record(), ensure_ascii=False) for request in requests]
    for number, (line, request) in enumerate(zip(lines, requests, strict=True), 1):
        if read_flat([json.loads(line)], f"record {number}", Options()) != request:
            raise RequestError(f"cannot write {path}: record {number} is read back as another request")
    whole = "[\n" + ",\n".join(lines) + "\n]\n" if suffix_of(path) == ".json" else "\n".join(lines) + "\n"
    write_text(path, whole, RequestError)
