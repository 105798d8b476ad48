"""One record, of this package or of another repository, as an EditRequest."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal

from kedit_fast.errors import RequestError
from kedit_fast.requests.record_fields import Notes, values_by_field
from kedit_fast.requests.request import FIELDS, EditRequest, advice_on_braces, describe, shorten


def parse_request(
    record: Any, where: str = "record", need_subject: bool | None = None, notes: Notes | None = None
) -> EditRequest:
    """An EditRequest from a flat record, or from one of CounterFact with `requested_rewrite`.

    A record's prompt may contain the subject itself instead of {}; it must then occur exactly once.

    Args:
        record: the mapping.
        where: how messages call the record.
        need_subject: see `load_requests`.
        notes: gathers fields that are mapped or not used, for one message about all records; without it they are
            logged at once.

    Raises:
        RequestError: a field is missing, of the wrong type or given twice, or the subject does not occur in the prompt.
    """
    if not isinstance(record, Mapping):
        raise RequestError(f"{where} must be an object with prompt, subject and target_new; got {shorten(record)}")
    gathered = Notes(FIELDS) if notes is None else notes
    values, spelled = values_by_field(record, where, gathered)
    missing = [name for name in ("prompt", "target_new") if name not in values]
    subject, prompt = values.get("subject"), values.get("prompt")
    has_braces = isinstance(prompt, str) and "{}" in prompt
    no_subject = subject is None or (isinstance(subject, str) and not subject.strip())
    if no_subject and (need_subject or has_braces):
        missing.insert(len(missing) and missing[0] == "prompt", "subject")
    if missing:
        raise RequestError(_missing_fields(record, missing, where, gathered, values, spelled))
    if isinstance(prompt, str) and isinstance(subject, str) and not no_subject and not has_braces:
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
        gathered.mixed.append(f"{where} ({mixed})")
    if notes is None:
        gathered.log(where)
    return request


def _missing_fields(
    record: Mapping[str, Any],
    missing: list[str],
    where: str,
    notes: Notes,
    values: Mapping[str, Any],
    spelled: Mapping[str, str],
) -> str:
    """The error for a record that lacks fields: which, what it has instead, and what to do."""
    names = ", ".join(f"{name}{notes.hint(name)}" for name in list(record)[:12])
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
        text += ": of all methods ultraedit alone needs none"
    if any(name in record for name in ("edit", "edits")):
        text += ": make a record of prompt, subject and target_new of each edit"
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
