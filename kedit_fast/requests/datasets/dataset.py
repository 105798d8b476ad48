"""A form of records as data: how it is recognized, and how its records become requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass, field
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.records import SPACES, Options
from kedit_fast.requests.request import FIELDS, EditRequest, shorten
from kedit_fast.support.messages import comma_list
from kedit_fast.support.textfiles import Row


@dataclass(frozen=True)
class Fault:
    """A fault that real files of a data set have: such records are read, and named by number in the log."""

    message: str
    """What these records have, as a line that their numbers follow."""
    holds: Callable[[Mapping[str, Any], Sequence[EditRequest]], bool] | None = None
    """Whether a record, with the requests that were made of it, has the fault."""
    among: Callable[[Sequence[Sequence[EditRequest]]], Collection[int]] | None = None
    """Where one record does not show it: from the requests of every record, the indices of records that have it."""


@dataclass(frozen=True)
class DataSet:
    """A form of records.

    A record has the form if it has all `fields`, and one of the `marks` where there are any. A file has the form of its
    records; those in it that have no mark may lack one, but none may have what another form is recognized by.
    """

    name: str
    """What `--form` calls it."""
    title: str
    """One line: what it is, and from where."""
    fields: frozenset[str]
    """Names that every record has; "a.b" is b of the object a, or of the first object of the list a."""
    read: Callable[[Mapping[str, Any], str, Options], list[EditRequest]]
    """From a record, and how messages call it, to its requests. Raises RequestError, which names the field."""
    marks: frozenset[str] = frozenset()
    """Names of which a record has one at least, where `fields` do not tell the form from another one."""
    optional: frozenset[str] = frozenset()
    """Names that records may have, and that are read."""
    unused: frozenset[str] = frozenset()
    """Names that records are known to have, and that are not needed."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Readings of which one must be asked for, but where there is a `usual` one: name -> what it reads."""
    usual: str = ""
    """The reading that is meant where none is asked for."""
    refused: str = ""
    """Why records of this form are not read; empty where they are."""
    cases: bool = False
    """Whether the requests of a record are a case: the record's number is their group, unless they have one."""
    faults: tuple[Fault, ...] = ()
    """Known faults of the real files."""
    split: Callable[[Mapping[str, Any], str], list[tuple[str, Mapping[str, Any]]]] | None = None
    """From one object of a file, and how messages call it, to several records, which are numbered over the whole file,
    and how messages call each; None where an object is a record."""

    @property
    def known(self) -> frozenset[str]:
        """Names that are read, with those that every request may have."""
        return _top(self.fields | self.marks) | self.optional | {*FIELDS}

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has all `fields`."""
        return all(_has(record, name) for name in self.fields)

    def claims(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has all `fields`, and one of the `marks` where there are any."""
        return self.fits(record) and (not self.marks or any(_has(record, name) for name in self.marks))


def _top(paths: AnySet[str]) -> frozenset[str]:
    """The names that paths begin with."""
    return frozenset(path.partition(".")[0] for path in paths)


def _has(record: Any, path: str) -> bool:
    name, _, rest = path.partition(".")
    if isinstance(record, list | tuple):
        record = record[0] if record else None
    if not isinstance(record, Mapping) or name not in record:
        return False
    return not rest or _has(record[name], rest)


def recognize(rows: Sequence[Row], data_sets: Mapping[str, DataSet], form: str | None, default: str) -> DataSet:
    """The form of the records of a file.

    Args:
        rows: the records.
        data_sets: the forms, the most specific first.
        form: a form's name, where the caller knows it.
        default: the form's name if none is recognized, so that each record is told what it lacks.

    Raises:
        RequestError: `form` is unknown, or the records have two forms.
    """
    if form is not None:
        if form not in data_sets:
            raise RequestError(f"form = {form!r}: choose one of {', '.join(data_sets)}")
        return data_sets[form]
    claimed: list[tuple[Row, DataSet]] = []
    possible: dict[frozenset[Any], list[DataSet]] = {}  # the names of a record -> forms that may fit
    for row in rows:
        if isinstance(row.value, Mapping):
            names = frozenset(row.value)
            if names not in possible:
                possible[names] = [one for one in data_sets.values() if _top(one.fields) <= names]
            first = next((one for one in possible[names] if one.claims(row.value)), None)
            if first is not None:
                claimed.append((row, first))
    if not claimed:
        return data_sets[default]
    seen = {one.name for _, one in claimed}
    reach = {one.name: _first_other(claimed, one) for one in data_sets.values() if one.name in seen}
    name = max(reach, key=lambda name: reach[name])  # of several the most specific
    if reach[name] == len(claimed):
        return data_sets[name]
    row, other = claimed[reach[name]]
    raise RequestError(
        f"{row.where} has the form {other.name!r} ({other.title}), but {claimed[0][0].where} the form {name!r} "
        f"({data_sets[name].title}): make a file of each"
    )


def _first_other(claimed: Sequence[tuple[Row, DataSet]], form: DataSet) -> int:
    """The place of the first record that cannot be read as `form`, or the number of records."""
    known = form.known | form.fields | form.marks
    for place, (row, one) in enumerate(claimed):
        if one is form:
            continue
        telling = {path for path in one.marks or one.fields if _has(row.value, path)}
        if not form.fits(row.value) or not known.issuperset(telling):
            return place
    return len(claimed)


def check_reading(data_set: DataSet, reading: str | None, where: str) -> None:
    """Raise RequestError for a form that is not read, or whose reading is not given, or unknown."""
    if data_set.refused:
        raise RequestError(f"{where} has the form {data_set.name!r} ({data_set.title}), {data_set.refused}")
    readings = "; ".join(f"{name!r} ({meaning})" for name, meaning in data_set.choices.items())
    if data_set.choices and reading is None and not data_set.usual:
        raise RequestError(
            f"{where} has the form {data_set.name!r}, which is read in {len(data_set.choices)} ways: {readings}: say "
            "which with reading= of load_requests, or --reading"
        )
    if reading is not None and reading not in data_set.choices:
        choose = f"choose one of {readings}" if readings else f"the form {data_set.name!r} is read in one way"
        raise RequestError(f"{where}: reading = {reading!r}: {choose}")


def object_of(value: Any, name: str, where: str) -> Mapping[str, Any]:
    """A value that must be an object; raises RequestError, which names the field, for anything else."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: {name} must be an object; got {shorten(value)}")
    return value


def list_of(value: Any, name: str, where: str) -> list[Any]:
    """A value that must be a list, and nothing where it is None; raises RequestError for anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise RequestError(f"{where}: {name} must be a list; got {shorten(value)}")
    return list(value)


def require(record: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raise RequestError unless a record has all of these names."""
    if missing := [repr(name) for name in names if name not in record]:
        has = comma_list([str(name) for name in record][:12]) or "nothing in it"
        raise RequestError(f"{where} has no {comma_list(missing)}; it has {has}")


def text_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be a text, without spaces around it; raises RequestError if it is missing or empty."""
    require(record, (name,), where)
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{where}: {name} must be a non-empty text; got {shorten(value)}")
    return value.strip(SPACES)


def stray_spaces(record: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether one of these fields is a text with spaces around it, or a list that holds such a text."""
    for name in names:
        value = record.get(name)
        texts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(text, str) and text.strip() and text != text.strip(SPACES) for text in texts):
            return True
    return False


def _writes_the_truth(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    for request in requests:
        true = {text.strip().casefold() for text in (request.target_true, *request.true_aliases) if text is not None}
        if request.target_new.strip().casefold() in true:
            return True
    return False


NO_CHANGE = Fault("what is to be written is a true answer already", _writes_the_truth)
