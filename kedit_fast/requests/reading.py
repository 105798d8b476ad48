"""Requests from files, and from whatever collection of records a caller passes."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.problems import OnError, check_on_error, require_no_problems
from kedit_fast.requests.record_fields import LISTS, NESTED, Notes, is_record
from kedit_fast.requests.records import parse_request
from kedit_fast.requests.request import FIELDS, EditRequest, is_nan
from kedit_fast.support.messages import comma_list
from kedit_fast.support.textfiles import TABLES, read_records, suffix_of

_log = logging.getLogger("kedit_fast")


class RequestList(list[EditRequest]):
    """The requests that can be used, in order, and what was left out.

    After the list itself was changed, `places` and `skipped` no longer describe it, and it is treated as a plain list.
    """

    places: tuple[int, ...]
    """The index of each request in its file or in what the caller passed, from 0. (Messages number records from 1.)"""
    skipped: dict[int, str]
    """Index -> why that record was left out."""

    def __init__(self, requests: Iterable[EditRequest], places: Iterable[int], skipped: Mapping[int, str]):
        super().__init__(requests)
        self.places = tuple(places)
        self.skipped = dict(skipped)
        self._at_first = tuple(self)

    def intact(self) -> bool:
        """Whether nothing was added, removed or reordered since the records were read."""
        unchanged = (request is first for request, first in zip(self, self._at_first, strict=False))
        return len(self) == len(self._at_first) and all(unchanged)

    @property
    def total(self) -> int:
        """Number of records, whether they can be used or not."""
        return len(self) + len(self.skipped)

    def first(self, count: int) -> RequestList:
        """The first `count` usable requests, with the records that were left out between them."""
        if not self.intact():
            return RequestList(self[:count], range(min(count, len(self))), {})
        end = math.inf if count >= len(self) else self.places[count]
        skipped = {place: reason for place, reason in self.skipped.items() if place < end}
        return RequestList(self[:count], self.places[:count], skipped)


def load_requests(path: str | Path, on_error: OnError = "raise", need_subject: bool | None = None) -> RequestList:
    """Read requests from a file: .json (a list), .jsonl or .ndjson, .csv or .tsv with a header, each also with .gz.

    JSON lines in a .json file and a list in a .jsonl file are read, too; `-` is the standard input, JSON of either
    kind. Fields of other repositories' records (CounterFact, zsRE, EasyEdit, KnowEdit, MQuAKE and others) are accepted
    where they mean the same as a field of `EditRequest`. Fields that are not used are named once in the log: at INFO
    where such records are known to have them, at WARNING where they may be a mistake.

    Args:
        path: the file.
        on_error: "raise" an error that names every record that cannot be used, or "skip" them; see
            `RequestList.skipped`.
        need_subject: True where the method needs subjects; False where it ignores them, so that a subject that does
            not occur exactly once in its prompt is no error; None where the method is not known yet, so that a subject
            may be missing.

    Returns:
        a list of `EditRequest` that also says which records were left out.

    Raises:
        RequestError: the file cannot be read; it holds no record that can be used or, unless they are skipped, one
            that cannot. Messages number records from 1.

    Example:
        >>> requests = load_requests("requests.jsonl")
        >>> len(requests) > 0, requests.skipped
        (True, {})
        >>> _ = open("two.csv", "w").write("prompt,subject,target_new\\nThe Ebro is in,Ebro,Spain\\n,Tagus,Spain\\n")
        >>> two = load_requests("two.csv", on_error="skip")
        >>> two[0].prompt, list(two.skipped)
        ('The {} is in', [1])
    """
    check_on_error(on_error)
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"load_requests takes the path of a file; got {type(path).__name__}")
    rows = read_records(path, RequestError, lambda record: is_record(record, FIELDS))
    if not rows:
        raise RequestError(f"{path} holds no requests")
    notes = Notes(FIELDS)
    cells = suffix_of(path) in TABLES
    usable: dict[int, EditRequest] = {}
    problems: dict[int, str] = {}
    for place, row in enumerate(rows):
        try:
            if row.problem:
                raise RequestError(row.problem)
            value = _from_cells(row.value) if cells else row.value
            usable[place] = parse_request(value, row.where, need_subject, notes)
        except RequestError as error:
            problems[place] = str(error)
    notes.log(str(path))
    _warn_of_repeated_ids(usable, str(path))
    if problems and (on_error == "raise" or not usable):
        if len(rows) == 1:
            require_no_problems(problems)
        require_no_problems(problems, f"{path}: {len(problems)} of {len(rows)} records cannot be used")
    return RequestList(usable.values(), usable, problems)


def as_requests(
    requests: Any, on_error: OnError = "raise", need_subject: bool | None = None, notes: Notes | None = None
) -> RequestList:
    """Requests from what a caller passes: requests and mappings in a list, a generator, a data set or a table.

    What `load_requests` returned is returned as it is. See there for the arguments; what `notes` has logged already is
    not logged again.

    Raises:
        RequestError: not a collection of records; or, with "raise", naming every record that cannot be used.
    """
    check_on_error(on_error)
    rows = rows_of(requests)
    read = rows if isinstance(rows, RequestList) and rows.intact() else RequestList([], range(len(rows)), {})
    if read is rows and not need_subject:
        return read
    notes = Notes(FIELDS) if notes is None else notes
    usable: dict[int, EditRequest] = {}
    problems: dict[int, str] = {}
    for place, row in zip(read.places, rows, strict=True):
        try:
            row = getattr(row, "request", row)  # what Editor.check returned
            if not isinstance(row, EditRequest):
                row = parse_request(row, f"request {place + 1}", need_subject, notes)
            elif need_subject and row.subject is None:
                raise RequestError(f"request {place + 1} ({row.label!r}) has no 'subject', which this method needs")
            usable[place] = row
        except RequestError as error:
            problems[place] = str(error)
    notes.log("requests")
    if on_error == "raise":
        require_no_problems(problems)
    return RequestList(usable.values(), usable, dict(sorted({**read.skipped, **problems}.items())))


def rows_of(requests: Any) -> list[Any]:
    """The records of a collection that a caller passes, iterated over once; tables and data sets by rows.

    Raises:
        RequestError: a single record, a path, or something that is no collection.
    """
    if isinstance(requests, list):
        return requests
    if isinstance(requests, str | bytes | os.PathLike):
        raise RequestError(f"requests must be records, not {requests!r}: load_requests(path) reads a file of them")
    if isinstance(requests, EditRequest) or isinstance(getattr(requests, "request", None), EditRequest):
        raise RequestError("requests must be a list of records; got one request: put it in a list")
    if isinstance(requests, Mapping):
        names = comma_list(list(requests)[:8])
        raise RequestError(
            f"requests must be a list of records; got one mapping with {names}: put one record in a list, of a data "
            "set with several splits choose one"
        )
    for name in ("to_pylist", "to_dicts"):  # pyarrow's and polars' tables
        if callable(getattr(requests, name, None)):
            return list(getattr(requests, name)())
    if hasattr(requests, "columns") and callable(getattr(requests, "to_dict", None)):  # a pandas table
        return [
            {name: value for name, value in row.items() if not is_nan(value)} for row in requests.to_dict("records")
        ]
    try:
        rows = iter(requests)
    except TypeError:
        raise RequestError(f"requests must be a list of records; got {type(requests).__name__}") from None
    return list(rows)


def _from_cells(record: Mapping[str, str]) -> dict[str, Any]:
    """A record from a row of a table, whose cells hold lists as JSON or Python literals, and a weight as a number."""
    values: dict[str, Any] = dict(record)
    for name in (*LISTS, NESTED):
        text = values.get(name, "").strip()
        if (text[:1], text[-1:]) in (("[", "]"), ("{", "}")):
            for read in (json.loads, ast.literal_eval):
                try:
                    values[name] = read(text)
                    break
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    continue
    if "weight" in values:
        with contextlib.suppress(ValueError):  # the check of weights names what else stands there
            values["weight"] = float(values["weight"])
    return values


def _warn_of_repeated_ids(usable: Mapping[int, EditRequest], where: str) -> None:
    first: dict[Any, int] = {}
    repeated: dict[Any, list[int]] = {}
    for place, request in usable.items():
        if request.id is not None and first.setdefault(request.id, place) != place:
            repeated.setdefault(request.id, [first[request.id] + 1]).append(place + 1)
    if repeated:
        name, records = next(iter(repeated.items()))
        _log.warning(
            "%s: %d ids stand in several records, so messages cannot tell these apart: %r in records %s%s",
            where,
            len(repeated),
            name,
            comma_list(records[:5]),
            ", ..." if len(repeated) > 1 else "",
        )
