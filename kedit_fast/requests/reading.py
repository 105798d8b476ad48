"""Requests from files, and from whatever collection of records a caller passes."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.dataset import DataSet, check_reading, recognize
from kedit_fast.requests.datasets.guides import read_labels, read_relation_prompts, read_snippets
from kedit_fast.requests.datasets.registry import DATA_SETS, FLAT
from kedit_fast.requests.problems import OnError, check_on_error, require_no_problems
from kedit_fast.requests.record_fields import MOST_LISTED, Notes
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import FIELDS, EditRequest, is_nan, shorten
from kedit_fast.support.messages import comma_list
from kedit_fast.support.textfiles import TABLES, Row, read_records, suffix_of

_log = logging.getLogger("kedit_fast")
_SINGLE_TEXTS = ("prompt", "subject", "target_new", "target_true", "id", "relation", "group", "target_separator")


class RequestList(list[EditRequest]):
    """The requests that can be used, in order, and what was left out.

    After the list itself was changed, `places` and `skipped` no longer describe it, and it is treated as a plain list.
    """

    places: tuple[int, ...]
    """The index of each request in its file or in what the caller passed, from 0. (Messages number records from 1.)
    Where records make several requests or none, the requests are counted, and a record that was left out as one."""
    skipped: dict[int, str]
    """Index -> why that record was left out."""
    records: tuple[int, ...]
    """The index of the record that each request was made of; the same as `places` where each makes one."""
    form: str
    """The name of the records' form, a key of `kedit_fast.requests.datasets.registry.DATA_SETS`; "" where not all were
    records."""

    def __init__(
        self,
        requests: Iterable[EditRequest],
        places: Iterable[int],
        skipped: Mapping[int, str],
        records: Iterable[int] | None = None,
        form: str = "",
    ):
        super().__init__(requests)
        self.places = tuple(places)
        self.skipped = dict(skipped)
        self.records = self.places if records is None else tuple(records)
        self.form = form
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
        return RequestList(self[:count], self.places[:count], skipped, self.records[:count], self.form)


def load_requests(
    path: str | Path,
    on_error: OnError = "raise",
    need_subject: bool | None = None,
    form: str | None = None,
    reading: str | None = None,
    seed: int = 0,
    labels: str | Path | Mapping[str, str] | None = None,
    relation_prompts: str | Path | Mapping[str, Sequence[str]] | None = None,
    snippets: str | Path | Sequence[Any] | None = None,
) -> RequestList:
    """Read requests from a file: .json (a list), .jsonl or .ndjson, .csv or .tsv with a header, each also with .gz.

    JSON lines in a .json file and a list in a .jsonl file are read, too; `-` is the standard input, JSON of either
    kind. The records have our own flat form or that of a data set (CounterFact, zsRE, KnowEdit and others), which is
    recognized from their fields. Known faults of real files are named in the log by record number. Fields that are not
    used are named once: at INFO where such records are known to have them, at WARNING where they may be a mistake.

    Args:
        path: the file.
        on_error: "raise" an error that names every record that cannot be used, or "skip" them; see
            `RequestList.skipped`.
        need_subject: True where the method needs subjects; False where it ignores them, so that a subject that does
            not occur exactly once in its prompt is no error; None where the method is not known yet, so that a subject
            may be missing.
        form: the records' form, where it is not to be recognized: a name in `kedit-fast requests show --help`.
        reading: which of several published readings of the form is meant, "answers" or "alt" of zsRE for example.
        seed: of what is drawn, the new answers of relations for example.
        labels: names of what records give by identifiers alone (RippleEdits), or a JSON file of them: {"Q30": "USA"}.
        relation_prompts: other phrasings of relations, which become paraphrases (ConflictEdit, RoundEdit), or a JSON
            file of them: {"P36": ["The capital of {} is"]}.
        snippets: texts about subjects with the same new answer (CounterFact's `attribute_snippets.json`, or what it
            holds), which generated texts are compared with.

    Returns:
        a list of `EditRequest` that also says which records were left out.

    Raises:
        RequestError: the file cannot be read; its records have two forms, one that is not read, or one whose reading is
            not given; it holds no record that can be used or, unless they are skipped, one that cannot. Messages number
            records from 1.

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
    rows = read_records(path, RequestError, _is_record)
    if not rows:
        raise RequestError(f"{path} holds no requests")
    if suffix_of(path) in TABLES:
        rows = [row if row.problem else Row(row.where, _from_cells(row.value)) for row in rows]
    options = Options(
        need_subject,
        reading,
        seed,
        read_labels(labels),
        read_relation_prompts(relation_prompts),
        read_snippets(snippets),
    )
    read = _read_rows(rows, str(path), form, options)
    options.notes.log(str(path))
    _warn_of_repetitions(read, str(path))
    if read.skipped and (on_error == "raise" or not read):
        if len(rows) == 1 and len(read.skipped) == 1:
            require_no_problems(read.skipped)
        require_no_problems(read.skipped, f"{path}: {len(read.skipped)} of {read.total} records cannot be used")
    return read


def as_requests(
    requests: Any, on_error: OnError = "raise", need_subject: bool | None = None, notes: Notes | None = None
) -> RequestList:
    """Requests from what a caller passes: requests and mappings in a list, a generator, a data set or a table.

    What `load_requests` returned is returned as it is. See there for the arguments; what `notes` has logged already is
    not logged again.

    Raises:
        RequestError: not a collection of records, or records of two forms or of one that is not read so; or, with
            "raise", naming every record that cannot be used.
    """
    check_on_error(on_error)
    rows = rows_of(requests)
    read = rows if isinstance(rows, RequestList) and rows.intact() else RequestList([], range(len(rows)), {})
    if read is rows and not need_subject:
        return read
    notes = Notes() if notes is None else notes
    given = []
    for place, row in zip(read.places, rows, strict=True):
        value = getattr(row, "request", row)  # what Editor.check returned
        where = f"request {place + 1}"
        problem = ""
        if isinstance(value, EditRequest) and need_subject and value.subject is None:
            problem = f"{where} ({value.label!r}) has no 'subject', which this method needs"
        given.append(Row(where, value, problem))
    made = _read_rows(given, "requests", None, Options(need_subject, notes=notes))
    notes.log("requests")
    if on_error == "raise":
        require_no_problems(made.skipped)
    if read is not rows:
        return made
    problems = {read.places[place]: reason for place, reason in made.skipped.items()}
    return RequestList(
        made,
        (read.places[place] for place in made.places),
        dict(sorted({**read.skipped, **problems}.items())),
        (read.records[place] for place in made.places),
        read.form,
    )


def parse_request(
    record: Any, where: str = "record", need_subject: bool | None = None, reading: str | None = None
) -> EditRequest:
    """An EditRequest from one record of any form; raises RequestError where it makes none or several."""
    options = Options(need_subject, reading)
    read = _read_rows([Row(where, record)], where, None, options)
    require_no_problems(read.skipped)
    options.notes.log(where)
    if len(read) != 1:
        raise RequestError(f"{where} makes {len(read)} requests: pass it in a list")
    return read[0]


def _read_rows(rows: list[Row], source: str, form: str | None, options: Options) -> RequestList:
    """The requests of records of one form, and which records cannot be used; requests among them stay as they are."""
    data_set = recognize(rows, DATA_SETS, form, FLAT.name)
    foreign = [row for row in rows if not row.problem and not isinstance(row.value, EditRequest)]
    if foreign:
        check_reading(data_set, options.reading, source)
    requests: list[EditRequest] = []
    places: list[int] = []
    records: list[int] = []
    problems: dict[int, str] = {}
    faulty: dict[str, list[int]] = {}
    by_record: list[list[EditRequest]] = []
    numbered: list[int] = []  # of each of them, the number of its record
    known = data_set.known
    index = place = 0
    for row in rows:
        for where, value, problem in _parts(row, data_set, known, options):
            index += 1
            try:
                if problem:
                    raise RequestError(problem)
                made = [value] if isinstance(value, EditRequest) else data_set.read(value, where, options)
            except RequestError as error:
                text = str(error)
                problems[place] = text if where in text else f"{where}: {text}"
                place += 1
                continue
            if data_set.cases and not isinstance(value, EditRequest):
                made = [_grouped(one, index, part) for part, one in enumerate(made, 1)]
            by_record.append(made)
            numbered.append(index)
            requests += made
            places += range(place, place + len(made))
            records += [index - 1] * len(made)
            place += len(made)
            if not isinstance(value, EditRequest):
                for fault in data_set.faults:
                    if fault.holds is not None and fault.holds(value, made):
                        faulty.setdefault(fault.message, []).append(index)
    for fault in data_set.faults:
        if fault.among is not None and (shared := fault.among(by_record)):
            faulty[fault.message] = [numbered[one] for one in sorted(shared)]
    for message, named in faulty.items():
        more = f" and {len(named) - MOST_LISTED} more" if len(named) > MOST_LISTED else ""
        _log.warning("%s: %s: %s%s", source, message, record_list(named[:MOST_LISTED]), more)
    return RequestList(requests, places, problems, records, data_set.name if foreign else "")


def _parts(row: Row, data_set: DataSet, known: AnySet[str], options: Options) -> list[tuple[str, Any, str]]:
    """What a row holds as records: how messages call each, the record, and why it cannot be read."""
    if row.problem or isinstance(row.value, EditRequest):
        return [(row.where, row.value, row.problem)]
    if not isinstance(row.value, Mapping):
        needed = "an object with prompt, subject and target_new"
        return [(row.where, row.value, f"{row.where} must be {needed}; got {shorten(row.value)}")]
    options.notes.take(row.value, known, data_set.unused)
    if data_set.split is None:
        return [(row.where, row.value, "")]
    try:
        return [(where, part, "") for where, part in data_set.split(row.value, row.where)]
    except RequestError as error:
        return [(row.where, row.value, str(error))]


def _grouped(request: EditRequest, number: int, part: int) -> EditRequest:
    """One of the requests of a case, with the record's number as group and in its id, unless it has its own."""
    group = number if request.group is None else request.group
    return replace(request, group=group, id=f"{number}-{part}" if request.id is None else request.id)


def record_list(records: Iterable[int]) -> str:
    """Numbers of records as messages list them: "record 3", "records 3, 5"."""
    listed = list(records)
    return f"record{'s' if len(listed) != 1 else ''} {comma_list(listed)}"


def _is_record(record: Mapping[str, Any]) -> bool:
    """Whether an object, or the header of a table, looks like one record rather than a container of records."""
    paths = (path for one in DATA_SETS.values() for path in one.marks | one.fields)
    names = {*FIELDS, *(path.partition(".")[0] for path in paths)}
    return any(name in record for name in names)


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
    for name, cell in record.items():
        text = cell.strip()
        if name not in _SINGLE_TEXTS and (text[:1], text[-1:]) in (("[", "]"), ("{", "}")):
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


def _warn_of_repetitions(read: RequestList, source: str) -> None:
    """Name ids that several records have, and facts that are given several new answers."""
    by_id: dict[Any, list[int]] = {}
    by_fact: dict[tuple[str, str | None], dict[str, list[int]]] = {}
    for request, record in zip(read, read.records, strict=True):
        records = by_id.setdefault(request.id, [])
        if record + 1 not in records:
            records.append(record + 1)
        if request.group is None:  # a case may write a fact twice, to see what is left of the first
            by_fact.setdefault((request.prompt, request.subject), {}).setdefault(request.target_new, []).append(
                record + 1
            )
    repeated = {name: records for name, records in by_id.items() if name is not None and len(records) > 1}
    if repeated:
        name, records = next(iter(repeated.items()))
        _log.warning(
            "%s: ids that stand in several records, which messages cannot tell apart: %d, as %r in records %s%s",
            source,
            len(repeated),
            name,
            comma_list(records[:5]),
            ", ..." if len(repeated) > 1 else "",
        )
    contradicted = [(fact, targets) for fact, targets in by_fact.items() if len(targets) > 1]
    if contradicted:
        fact, targets = contradicted[0]
        named = [f"{target!r} ({record_list(records[:5])})" for target, records in targets.items()]
        _log.warning(
            "%s: facts with several new answers, of which a batch can hold one: %d, as %r of %r is %s%s",
            source,
            len(contradicted),
            *fact,
            " and ".join(named[:3]),
            ", ..." if len(contradicted) > 1 or len(named) > 3 else "",
        )
