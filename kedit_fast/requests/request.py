"""Edit requests, and the one reader of them: from files, records of other repositories, and what callers pass."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import numbers
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.record_fields import LISTS, NESTED, SHOWN, Notes, is_record, ours
from kedit_fast.requests.spacing import AUTO, check_separator
from kedit_fast.support.textfiles import TABLES, read_records, suffix_of

_log = logging.getLogger("kedit_fast")


@dataclass(frozen=True)
class EditRequest:
    """One fact to write: after the edit, `prompt` with `subject` should be continued by `target_new`.

    A request without a subject is a prompt as it stands, without {}: for UltraEdit, which looks at whole prompts. A {}
    that is text stands in a subject: prompt 'print("{}")' with subject "{}".
    """

    prompt: str  # with one {} where the subject stands
    subject: str | None
    target_new: str
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()  # full texts
    neighborhood_prompts: tuple[str, ...] = ()  # full texts whose answer should stay target_true
    id: str | int | None = None
    weight: float = 1.0  # of its squared error in a batch's least squares
    target_separator: str = AUTO  # between prompt and target: "auto" (see kedit_fast.requests.spacing), " " or ""

    def __post_init__(self):
        self._plain()
        where = f"request {self.id!r}: " if self.id is not None else ""
        for name in ("prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{where}{name} must be a non-empty text; got {_shown(value)}")
        for name in ("subject", "target_true"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{where}{name} must be a text or None; got {_shown(value)}")
        for name, texts in self._texts():
            for text in texts:
                if not isinstance(text, str):
                    raise RequestError(f"{where}{name} must be a list of texts; it holds {_shown(text)}")
                if not text.strip():
                    raise RequestError(f"{where}{name} holds an empty text")
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise RequestError(f"{where}{name} holds a character that is not valid Unicode: {text!r}")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 < weight < math.inf:
            raise RequestError(f"{where}weight must be a positive number; got {weight!r}")
        try:
            check_separator(self.target_separator)
        except RequestError as error:
            raise RequestError(f"{where}{error}") from None
        count = self.prompt.count("{}")
        if self.subject is None and count:
            raise RequestError(
                f"{where}has no 'subject' for the {{}} of its prompt {self.prompt!r}: {_as_text(self.prompt)}"
            )
        if self.subject is not None and count != 1:
            raise RequestError(f"{where}prompt must contain {{}} once, where the subject stands; got {self.prompt!r}")

    def _plain(self) -> None:
        """Values of other libraries' types as Python's own; a blank subject is none."""
        for name in ("paraphrase_prompts", "neighborhood_prompts"):
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) else value
            if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
                raise RequestError(f"{name} must be a list of texts; got {_shown(value)}")
            object.__setattr__(self, name, tuple(str(text) if isinstance(text, str) else text for text in value))
        for name in ("prompt", "subject", "target_new", "target_true", "id"):
            value = getattr(self, name)
            if type(value) is not str and isinstance(value, str):
                object.__setattr__(self, name, str(value))
        if isinstance(self.subject, str) and not self.subject.strip():
            object.__setattr__(self, "subject", None)
        if isinstance(self.id, numbers.Real) and not isinstance(self.id, bool) and self.id == self.id // 1:
            object.__setattr__(self, "id", int(self.id))
        elif self.id is not None and not isinstance(self.id, str):
            raise RequestError(f"id must be a text or a whole number; got {_shown(self.id)}")

    def _texts(self) -> list[tuple[str, tuple[str, ...]]]:
        return [
            ("prompt", (self.prompt,)),
            ("subject", () if self.subject is None else (self.subject,)),
            ("target_new", (self.target_new,)),
            ("target_true", () if self.target_true is None else (self.target_true,)),
            ("paraphrase_prompts", self.paraphrase_prompts),
            ("neighborhood_prompts", self.neighborhood_prompts),
        ]

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt if self.subject is None else self.prompt.replace("{}", self.subject)

    @property
    def about(self) -> str:
        """What messages call a request without an id by: its subject, or its prompt."""
        return self.prompt if self.subject is None else self.subject


FIELDS = tuple(field.name for field in fields(EditRequest))


class RequestList(list[EditRequest]):
    """The requests that can be used, in order, and what was left out.

    Attributes:
        places: the index of each request in its file or in what the caller passed, from 0; records count from 1.
        skipped: index -> why that record was left out.

    A list that was changed since is taken as any other list: these two no longer describe it.
    """

    def __init__(self, requests: Iterable[EditRequest], places: Iterable[int], skipped: Mapping[int, str]):
        super().__init__(requests)
        self.places = tuple(places)
        self.skipped = dict(skipped)
        self._read = tuple(self)

    def intact(self) -> bool:
        """Whether nothing was added, removed or moved since the records were read."""
        return len(self) == len(self._read) and all(now is then for now, then in zip(self, self._read, strict=True))

    @property
    def total(self) -> int:
        """Records, whether they can be used or not."""
        return len(self) + len(self.skipped)

    def first(self, count: int) -> RequestList:
        """The first `count` usable requests, with what was left out among them."""
        if not self.intact():
            return RequestList(self[:count], range(min(count, len(self))), {})
        end = math.inf if count >= len(self) else self.places[count]
        among = {place: why for place, why in self.skipped.items() if place < end}
        return RequestList(self[:count], self.places[:count], among)


def load_requests(path: str | Path, on_error: str = "raise", need_subject: bool | None = None) -> RequestList:
    """Read requests from a file: .json (a list), .jsonl or .ndjson, .csv or .tsv with a header, each also with .gz.

    JSON lines in a .json file and a list in a .jsonl file are read too; `-` is the standard input, JSON of either kind.
    Names of other repositories' fields are taken for ours where they mean the same; fields that are not used are named
    once in the log (INFO for what such records are known to hold beside, WARNING for what may be a mistake).

    Args:
        path: the file.
        on_error: "raise" at records that cannot be used, naming all of them; or "skip" them, see `RequestList.skipped`.
        need_subject: True where the method needs one; False where it looks at none, so that a subject that does not
            stand once in its prompt is no error; None where that is not known yet: a subject may be missing.

    Raises:
        RequestError: the file cannot be read, holds no record that can be used or, without "skip", one that cannot;
            records count from 1.
    """
    _check_policy(on_error)
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"load_requests takes the path of a file; got {type(path).__name__}")
    rows = read_records(path, RequestError, lambda record: is_record(record, FIELDS))
    if not rows:
        raise RequestError(f"{path} holds no requests")
    notes = Notes(FIELDS)
    cells = suffix_of(path) in TABLES
    found: dict[int, EditRequest] = {}
    problems: dict[int, str] = {}
    for place, row in enumerate(rows):
        try:
            if row.problem:
                raise RequestError(row.problem)
            value = _from_cells(row.value) if cells else row.value
            found[place] = parse_request(value, row.where, need_subject, notes)
        except RequestError as error:
            problems[place] = str(error)
    notes.say(str(path))
    _name_repeated_ids(found, str(path))
    if problems and (on_error == "raise" or not found):
        if len(rows) == 1:
            require_none(problems)
        require_none(problems, f"{path}: {len(problems)} of {len(rows)} records cannot be used")
    return RequestList(found.values(), found, problems)


def as_requests(
    requests: Any, on_error: str = "raise", need_subject: bool | None = None, notes: Notes | None = None
) -> RequestList:
    """Requests of what a caller passes: records and mappings in a list, a generator, a data set or a table.

    What `load_requests` returned stays as it is. See there for the arguments; what `notes` has said already is not
    logged again.

    Raises:
        RequestError: not a collection of records; or, with "raise", naming every record that cannot be used.
    """
    _check_policy(on_error)
    rows = rows_of(requests)
    read = rows if isinstance(rows, RequestList) and rows.intact() else RequestList([], range(len(rows)), {})
    if read is rows and not need_subject:
        return read
    notes = Notes(FIELDS) if notes is None else notes
    found: dict[int, EditRequest] = {}
    problems: dict[int, str] = {}
    for place, row in zip(read.places, rows, strict=True):
        try:
            row = getattr(row, "request", row)  # what Editor.check returned
            if not isinstance(row, EditRequest):
                row = parse_request(row, f"request {place + 1}", need_subject, notes)
            elif need_subject and row.subject is None:
                raise RequestError(f"request {place + 1} ({row.about!r}) has no 'subject', which this method needs")
            found[place] = row
        except RequestError as error:
            problems[place] = str(error)
    notes.say("requests")
    if on_error == "raise":
        require_none(problems)
    return RequestList(found.values(), found, dict(sorted({**read.skipped, **problems}.items())))


def _check_policy(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise RequestError(f"on_error = {on_error!r}: choose raise or skip")


def rows_of(requests: Any) -> list[Any]:
    """The records of a collection that a caller passes, read once; tables and data sets by rows.

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
        names = ", ".join(map(str, list(requests)[:8]))
        raise RequestError(
            f"requests must be a list of records; got one mapping with {names}: put one record in a list, of a data "
            "set with several splits choose one"
        )
    for name in ("to_pylist", "to_dicts"):  # pyarrow's and polars' tables
        if callable(getattr(requests, name, None)):
            return list(getattr(requests, name)())
    if hasattr(requests, "columns") and callable(getattr(requests, "to_dict", None)):  # a pandas table
        return [
            {name: value for name, value in row.items() if not _is_nan(value)} for row in requests.to_dict("records")
        ]
    try:
        rows = iter(requests)
    except TypeError:
        raise RequestError(f"requests must be a list of records; got {type(requests).__name__}") from None
    return list(rows)


def require_none(problems: Mapping[int, str], headline: str = "") -> None:
    """Raise RequestError with the problems by request, at most 20 and how many more there are."""
    if problems:
        raise RequestError("\n".join([*([headline] if headline else ()), *shortened(problems)]))


def shortened(problems: Mapping[int, str]) -> list[str]:
    """The first 20 problems in order, and a line with the count of the others."""
    shown = [problems[place] for place in sorted(problems)[:SHOWN]]
    return shown if len(problems) <= SHOWN else [*shown, f"and {len(problems) - SHOWN} more"]


def skipped_records(skipped: Mapping[int, str]) -> list[dict[str, Any]]:
    """What was left out, as `--json` prints it: the index from 0, the record's number from 1, and the reason."""
    return [{"index": place, "record": place + 1, "reason": skipped[place]} for place in sorted(skipped)]


def parse_request(
    record: Any, where: str = "record", need_subject: bool | None = None, notes: Notes | None = None
) -> EditRequest:
    """An EditRequest from a flat record, or from one of CounterFact with `requested_rewrite`.

    A record's prompt may also spell the subject out instead of {}; it must then occur exactly once.

    Args:
        record: the mapping.
        where: how messages call it.
        need_subject: as of `load_requests`.
        notes: where fields that are mapped or not used are gathered; without, they are logged at once.

    Raises:
        RequestError: a field is missing, of the wrong type or given twice, or the subject does not stand in the prompt.
    """
    if not isinstance(record, Mapping):
        raise RequestError(f"{where} must be an object with prompt, subject and target_new; got {_cut(record)}")
    own = Notes(FIELDS) if notes is None else notes
    values, spelled = ours(record, where, own)
    missing = [name for name in ("prompt", "target_new") if name not in values]
    subject, prompt = values.get("subject"), values.get("prompt")
    placed = isinstance(prompt, str) and "{}" in prompt
    bare = subject is None or (isinstance(subject, str) and not subject.strip())
    if bare and (need_subject or placed):
        missing.insert(len(missing) and missing[0] == "prompt", "subject")
    if missing:
        raise RequestError(_missing(record, missing, where, own, values, spelled))
    if isinstance(prompt, str) and isinstance(subject, str) and not bare and not placed:
        count = prompt.count(subject)
        if count != 1 and need_subject is False:
            subject = None
        elif count != 1:
            raise RequestError(
                f"{where}: the {spelled['subject']} {subject!r} stands {count} times in the {spelled['prompt']} "
                f"{prompt!r}: put {{}} where it is meant{_other_spelling(prompt, subject)}"
            )
        else:
            prompt = prompt.replace(subject, "{}")
    others = {name: value for name, value in values.items() if value is not None}
    try:
        texts = {name: _target(values, name) for name in ("target_new", "target_true")}
        lists = {name: _list(values, name) for name in ("paraphrase_prompts", "neighborhood_prompts")}
        request = EditRequest(**{**others, "prompt": prompt, "subject": subject, **texts, **lists})
    except RequestError as error:
        text = _as_spelled(str(error), spelled)
        raise RequestError(text if where in text else f"{where}: {text}") from None
    if mixed := _mixed_forms(request):
        own.mixed.append(f"{where} ({mixed})")
    if notes is None:
        own.say(where)
    return request


def _as_text(prompt: str) -> str:
    """What to do about the {} of a prompt without a subject: the parts of a record in which they are text."""
    begin, end = prompt.index("{}"), prompt.rindex("{}") + 2
    record = {"prompt": prompt[:begin] + "{}" + prompt[end:], "subject": prompt[begin:end]}
    return f"say what stands there, or, where {{}} is text, write {json.dumps(record, ensure_ascii=False)[1:-1]}"


def _missing(
    record: Mapping[str, Any],
    missing: list[str],
    where: str,
    notes: Notes,
    values: Mapping[str, Any],
    spelled: Mapping[str, str],
) -> str:
    names = ", ".join(f"{name}{notes.hint(name)}" for name in list(record)[:12])
    lacking = [repr(name) for name in missing]
    if "subject" in missing and "subject" in spelled:
        empty = "null" if values["subject"] is None else "empty"
        lacking[missing.index("subject")] += f" ({spelled['subject']} is {empty})"
    prompt = values.get("prompt") if missing == ["subject"] else None
    placed = isinstance(prompt, str) and "{}" in prompt
    why = f" for the {{}} of its {spelled['prompt']} {prompt!r}" if placed else ""
    text = f"{where} has no {', '.join(lacking)}{why}; it has {names or 'nothing in it'}"
    if placed:
        text += f": {_as_text(prompt)}"
    elif missing == ["subject"]:
        text += ": of all methods ultraedit alone needs none"
    if any(name in record for name in ("edit", "edits")):
        text += ": make a record of prompt, subject and target_new of each edit"
    return text


def _other_spelling(prompt: str, subject: str) -> str:
    """How a prompt spells a subject that does not stand in it letter by letter; "" where it does, or not at all."""
    if subject in prompt:
        return ""
    for form in ("NFC", "NFKC"):
        if unicodedata.normalize(form, subject) in unicodedata.normalize(form, prompt):
            there, own = (_form(text, form) for text in (prompt, subject))
            return f" (it stands there once both are normalised to {form}: the prompt is {there}, the subject {own})"
    if subject.casefold() in prompt.casefold():
        return " (it stands there in other upper and lower case)"
    return ""


def _form(text: str, form: str) -> str:
    """Whether a text is in `form`, in its decomposed counterpart, or in neither."""
    forms = (form, form.replace("C", "D"))
    return next((name for name in forms if unicodedata.is_normalized(name, text)), f"not {form}")


def _mixed_forms(request: EditRequest) -> str:
    """Which texts of a request are composed and which decomposed, where there are both; else ""."""
    forms: dict[str, str] = {}
    for name, texts in request._texts():
        for text in texts:
            if text.isascii():
                continue
            if len(unicodedata.normalize("NFC", text)) < len(text):
                forms.setdefault("NFD", name)
            if any(c == unicodedata.normalize("NFC", c) != unicodedata.normalize("NFD", c) for c in text):
                forms.setdefault("NFC", name)
    return ", ".join(f"{name} in {form}" for form, name in forms.items()) if len(forms) > 1 else ""


def _as_spelled(message: str, spelled: Mapping[str, str]) -> str:
    """A message that begins with one of our fields, perhaps behind a request's name, with the record's own name."""
    for mine, name in spelled.items():
        if found := re.match(rf"((?:request .*?: )?){mine}((?: must | holds ).*)", message, re.DOTALL):
            return found[1] + name + found[2]
    return message


def _target(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is None and (name != "target_new"):
        return None
    if isinstance(value, Mapping):
        value = value.get("str")
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a text (or CounterFact's {{'str': text}}); got {_shown(value)}")
    return value


def _list(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = values.get(name)
    if value is None:
        return ()
    if hasattr(value, "tolist"):  # an array of texts
        value = value.tolist()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise RequestError(f"{name} must be a list of texts; got {_shown(value)}")
    return tuple(value)


def _from_cells(record: Mapping[str, str]) -> dict[str, Any]:
    """A row of a table: lists stand as JSON or as Python writes them, a weight as a number."""
    found: dict[str, Any] = dict(record)
    for name in (*LISTS, NESTED):
        text = found.get(name, "").strip()
        if (text[:1], text[-1:]) in (("[", "]"), ("{", "}")):
            for read in (json.loads, ast.literal_eval):
                try:
                    found[name] = read(text)
                    break
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    continue
    if "weight" in found:
        with contextlib.suppress(ValueError):  # named where weights are checked
            found["weight"] = float(found["weight"])
    return found


def _name_repeated_ids(found: Mapping[int, EditRequest], where: str) -> None:
    first: dict[Any, int] = {}
    repeated: dict[Any, list[int]] = {}
    for place, request in found.items():
        if request.id is not None and first.setdefault(request.id, place) != place:
            repeated.setdefault(request.id, [first[request.id] + 1]).append(place + 1)
    if repeated:
        name, records = next(iter(repeated.items()))
        _log.warning(
            "%s: %d ids stand in several records, so messages cannot tell these apart: %r in records %s%s", where,
            len(repeated), name, ", ".join(map(str, records[:5])), ", ..." if len(repeated) > 1 else "",
        )  # fmt: skip


def _is_nan(value: Any) -> bool:
    return isinstance(value, numbers.Real) and value != value


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown(value: Any) -> str:
    text = _cut(value)
    if _is_nan(value):
        return f"{text} (no number and no text: leave the field out or write null)"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return f'{text} (write it as a text: "{text}")'
    return text
