"""A flat record's values by the names of `EditRequest`'s fields, and what the log says about its other fields."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.request import FIELDS
from kedit_fast.support.textfiles import Repeated

_log = logging.getLogger("kedit_fast")
MOST_LISTED = 20  # names or problems in one message
_NEEDED = ("prompt", "subject", "target_new")  # messages show their empty values


class Notes:
    """What the log has to say about the fields of all records of a file, or of an editor's calls: each thing once."""

    def __init__(self):
        self.mapped: dict[str, str] = {}
        """A data set's name -> ours."""
        self.unused: set[str] = set()
        """Names that a data set is known to have and that are not needed here."""
        self.unknown: dict[str, int] = {}
        """Name -> number of records that have it."""
        self.mixed: list[str] = []
        """Records whose texts are in several Unicode normal forms, with these."""
        self._hints: dict[str, str] = {}
        self._logged: set[tuple[str, str]] = set()

    def take(self, record: Mapping[Any, Any], known: Collection[str], unused: AnySet[str]) -> None:
        """Gather the names of a record that are not among the `known` ones, or known to be `unused`, unless empty."""
        for name, value in record.items():
            if name in unused:
                self.unused.add(name)
            elif name not in known and not is_empty(value):
                name = str(name)
                self.unknown[name] = self.unknown.get(name, 0) + 1
                self._hints.setdefault(name, hint(name, known))

    def log(self, where: str) -> None:
        """Log what was gathered and not logged before; what may have an unexpected effect is a warning."""
        if mapped := self._new("mapped", self.mapped):
            _log.info("%s: read %s", where, ", ".join(f"{theirs} as {self.mapped[theirs]}" for theirs in mapped))
        if unused := self._new("unused", sorted(self.unused)):
            _log.info("%s: not used: %s", where, ", ".join(unused))
        if unknown := self._new("unknown", self.unknown):
            names = [f"{name!r} in {self.unknown[name]} records{self._hints[name]}" for name in unknown]
            more = f", and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
            _log.warning("%s: unknown fields are not used: %s%s", where, ", ".join(names[:MOST_LISTED]), more)
        if self.mixed and self._new("mixed", [""]):
            _log.warning(
                "%s: texts of one record are in different Unicode normal forms, so that the same word is different "
                "tokens: %d records, the first %s; they are taken as they are: write all in one form (NFC)",
                where,
                len(self.mixed),
                self.mixed[0],
            )
        for gathered in (self.mapped, self.unused, self.unknown, self.mixed):
            gathered.clear()

    def _new(self, kind: str, names: Iterable[str]) -> list[str]:
        """The names that were not logged before; from now on they count as logged."""
        new = [name for name in names if (kind, name) not in self._logged]
        self._logged.update((kind, name) for name in new)
        return new


def hint(name: Any, known: Iterable[str]) -> str:
    """` (did you mean ...?)` for a name that is similar to a known one, but none itself; else ""."""
    names = [*FIELDS, *known]
    near = [] if name in names else difflib.get_close_matches(str(name).lower().strip(), names, 1, 0.8)
    return f" (did you mean {near[0]!r}?)" if near else ""


def values_by_field(
    records: Sequence[Mapping[str, Any]],
    where: str,
    notes: Notes,
    names: Mapping[str, str],
    absent: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a record by the names of our fields, and the record's own name of each.

    None counts as no value, and so does another repository's field that is empty. Of alternatives of `target_true` the
    first counts, the others are `true_aliases`.

    Args:
        records: the record, or the parts that make it up.
        where: how messages call it.
        notes: gathers the names that are mapped.
        names: a data set's name -> ours, for names that are not ours already.
        absent: texts that a data set writes where `target_true` has no value.

    Raises:
        RequestError: a field that is given twice with different values.
    """
    for part in records:
        doubled = part.names if isinstance(part, Repeated) else ()
        if read := [name for name in doubled if name in FIELDS or name in names]:
            raise RequestError(f"{where} gives {read[0]!r} twice: keep one")
    choices: dict[str, tuple[str, list[Any]]] = {}  # our field -> the record's name, its value or alternatives
    empty: dict[str, tuple[str, Any]] = {}
    others: list[Any] = []  # alternatives of target_true
    for fields in records:
        for name, value in fields.items():
            field = name if name in FIELDS else names.get(name)
            if field is None:
                continue
            candidates = [value] if field == name else _foreign_values(value, field, absent)
            if not candidates or value is None:
                empty.setdefault(field, (name, value if field in _NEEDED else None))
                continue
            if field != name:
                notes.mapped[name] = field
                others += candidates if field == "target_true" else []
            if field not in choices:
                choices[field] = (name, candidates)
                continue
            earlier, before = choices[field]
            same = [one for one in before if any(_comparable(one) == _comparable(other) for other in candidates)]
            if not same:
                first = before[0] if len(before) == 1 else before
                raise RequestError(
                    f"{where}: {field} is given twice, {earlier} = {first!r} and {name} = {value!r}: keep one"
                )
            choices[field] = (earlier, same)
    values = {field: value for field, (_, value) in empty.items()}
    values |= {field: candidates[0] for field, (_, candidates) in choices.items()}
    true = _comparable(values.get("target_true"))
    aliases = [one for one in dict.fromkeys(map(_comparable, others)) if one != true]
    if aliases and values.get("true_aliases") is None:
        values["true_aliases"] = aliases
    return values, {field: name for field, (name, _) in (empty | choices).items()}


def _foreign_values(value: Any, field: str, absent: Collection[str]) -> list[Any]:
    """The value of another repository's field: none where it is empty, for `target_true` all alternatives."""
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy
    if field == "target_true":
        return alternatives(value, absent)
    if isinstance(value, list | tuple):
        value = [item for item in value if not is_empty(item)]
    return [] if is_empty(value) else [value]


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: None, a blank text, an empty object, or a list of such."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, dict) and not value)


def alternatives(value: Any, absent: Collection[str] = ()) -> list[Any]:
    """All alternatives, however deep they are nested, in order, without those that are empty or mean `absent`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [one for item in value for one in alternatives(item, absent)]
    text = value.get("str") if isinstance(value, Mapping) else value
    return [] if is_empty(text) or (isinstance(text, str) and text.strip() in absent) else [value]


def _comparable(value: Any) -> Any:
    """A form in which spellings of one value are equal: a text, CounterFact's object of it, a list with it alone."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        value = value.get("str", str(dict(value)))
    if isinstance(value, list | tuple):
        return _comparable(value[0]) if len(value) == 1 else str([_comparable(item) for item in value])
    return value.strip() if isinstance(value, str) else value
