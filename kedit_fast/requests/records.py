"""One flat record as an EditRequest."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kedit_fast.errors import RequestError
from kedit_fast.requests.record_fields import Notes, hint, values_by_field
from kedit_fast.requests.request import LISTS, EditRequest, advice_on_braces, describe

SPACES = " \u00a0"
"""What counts as a stray space around a text: line ends are meant."""
NEED_NONE = (
    "of closed forms ultraedit, stableedit, anyedit and anyedit-alphaedit alone need none; methods that tune a matrix, "
    "such as dinm and locft-bf, need none"
)
"""What messages say of methods when a request has no subject."""
_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Options:
    """What a reader of records is told beside them."""

    need_subject: bool | None = None
    """See `load_requests`."""
    reading: str | None = None
    """Which of a data set's `choices` is meant."""
    seed: int = 0
    """Of what is drawn: the new answers of facts that come without one."""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of what a data set knows by identifiers alone: of Wikidata for example, "Q38111" -> "Leonardo DiCaprio"."""
    relation_prompts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Other phrasings of relations: id -> prompts with {} where the subject stands."""
    snippets: Mapping[tuple[str, str], Sequence[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    """Texts about subjects that have a target: (relation, target), by identifier -> (subject, text) of each."""
    notes: Notes = dataclasses.field(default_factory=Notes)
    """Gathers what the log says about all records."""


def read_flat(
    records: Sequence[Mapping[str, Any]],
    where: str,
    options: Options,
    names: Mapping[str, str] = _NONE,
    *,
    absent: Collection[str] = (),
    strip: bool = False,
    **others: Any,
) -> EditRequest:
    """An EditRequest from a flat record: one with our names, or with others that mean the same.

    A record's prompt may contain the subject itself instead of {}; it must then occur exactly once.

    Args:
        records: the record; or the parts that make it up, the outermost last.
        where: how messages call the record.
        options: `need_subject` and `notes` are used.
        names: a data set's name -> ours.
        absent: texts that a data set writes where `target_true` has no value.
        strip: take spaces around texts away.
        **others: fields of the request that are not read from `names`; what a record has under our name goes first.

    Raises:
        RequestError: a field is missing, of the wrong type or given twice, or the subject does not occur in the prompt.
    """
    values, spelled = values_by_field(records, where, options.notes, names, absent)
    if strip:
        values = {name: _stripped(value) for name, value in values.items()}
    missing = [name for name in ("prompt", "target_new") if name not in values]
    subject, prompt = values.get("subject"), values.get("prompt")
    has_braces = isinstance(prompt, str) and "{}" in prompt
    no_subject = subject is None or (isinstance(subject, str) and not subject.strip())
    if no_subject and (options.need_subject or has_braces):
        missing.insert(len(missing) and missing[0] == "prompt", "subject")
    if missing:
        raise RequestError(_missing_fields(records[-1], missing, where, names, values, spelled))
    if isinstance(prompt, str) and isinstance(subject, str) and not no_subject and not has_braces:
        count = prompt.count(subject)
        if count != 1 and options.need_subject is False:
            subject = None
        elif count != 1:
            raise RequestError(
                f"{where}: the {spelled['subject']} {subject!r} stands {count} times in the {spelled['prompt']} "
                f"{prompt!r}: put {{}} where it is meant{_other_spelling(prompt, subject)}"
            )
        else:
            prompt = prompt.replace(subject, "{}")
    given = {**others, **{name: value for name, value in values.items() if value is not None}}
    try:
        texts = {name: _target(values, name) for name in ("target_new", "target_true")}
        lists = {name: _list(given, name) for name in LISTS}
        request = EditRequest(**{**given, "prompt": prompt, "subject": subject, **texts, **lists})
    except RequestError as error:
        text = _as_spelled(str(error), spelled)
        raise RequestError(text if where in text else f"{where}: {text}") from None
    note_mixed_forms(request, where, options)
    return request


def note_mixed_forms(request: EditRequest, where: str, options: Options) -> None:
    """Gather a request whose texts are in different Unicode normal forms."""
    if mixed := _mixed_forms(request):
        options.notes.mixed.append(f"{where} ({mixed})")


def _stripped(value: Any) -> Any:
    """A text, or texts in a list or in CounterFact's objects, without spaces around."""
    if isinstance(value, list | tuple):
        return [_stripped(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _stripped(item) for name, item in value.items()}
    return value.strip(SPACES) if isinstance(value, str) else value


def _missing_fields(
    record: Mapping[str, Any],
    missing: list[str],
    where: str,
    mapped: Mapping[str, str],
    values: Mapping[str, Any],
    spelled: Mapping[str, str],
) -> str:
    """The error for a record that lacks fields: which, what it has instead, and what to do."""
    names = ", ".join(f"{name}{hint(name, mapped)}" for name in list(record)[:12])
    lacking = [repr(name) for name in missing]
    if "subject" in missing and "subject" in spelled:
        empty = "null" if values["subject"] is None else "empty"
        lacking[missing.index("subject")] += f" ({spelled['subject']} is {empty})"
    prompt = values.get("prompt") if missing == ["subject"] else None
    with_braces = prompt if isinstance(prompt, str) and "{}" in prompt else None
    reason = f" for the {{}} of its {spelled['prompt']} {prompt!r}" if with_braces else ""
    text = f"{where} has no {', '.join(lacking)}{reason}; it has {names or 'nothing in it'}"
    if with_braces:
        text += f": {advice_on_braces(with_braces)}"
    elif missing == ["subject"]:
        text += f": {NEED_NONE}"
    return text


def _other_spelling(prompt: str, subject: str) -> str:
    """How a prompt spells a subject that it contains, but not letter by letter; "" for any other prompt."""
    if subject in prompt:
        return ""
    composed: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")
    for form in composed:
        if unicodedata.normalize(form, subject) in unicodedata.normalize(form, prompt):
            of_prompt, of_subject = (_form(text, form) for text in (prompt, subject))
            return (
                f" (it stands there once both are normalized to {form}: the prompt is {of_prompt}, the subject "
                f"{of_subject})"
            )
    if subject.casefold() in prompt.casefold():
        return " (it stands there in other upper and lower case)"
    return ""


def _form(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """Which Unicode form a text is in: the composed `form`, the decomposed one of the same kind, or neither."""
    decomposed: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"
    forms = (form, decomposed)
    return next((name for name in forms if unicodedata.is_normalized(name, text)), f"not {form}")


def _mixed_forms(request: EditRequest) -> str:
    """Which fields hold composed text and which decomposed text, if the request has both; else ""."""
    forms: dict[str, str] = {}
    for name, texts in request.texts_by_field():
        for text in texts:
            if text.isascii():
                continue
            if len(unicodedata.normalize("NFC", text)) < len(text):
                forms.setdefault("NFD", name)
            if any(c == unicodedata.normalize("NFC", c) != unicodedata.normalize("NFD", c) for c in text):
                forms.setdefault("NFC", name)
    return ", ".join(f"{name} in {form}" for form, name in forms.items()) if len(forms) > 1 else ""


def _as_spelled(message: str, spelled: Mapping[str, str]) -> str:
    """An error about one of our fields, with the name that the record itself has for it."""
    for field, name in spelled.items():
        if match := re.match(rf"((?:request .*?: )?){field}((?: must | holds ).*)", message, re.DOTALL):
            return match[1] + name + match[2]
    return message


def _target(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is None and (name != "target_new"):
        return None
    if isinstance(value, Mapping):
        value = value.get("str")
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a text (or CounterFact's {{'str': text}}); got {describe(value)}")
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
        raise RequestError(f"{name} must be a list of texts; got {describe(value)}")
    return tuple(value)
