"""One edit request, checked when it is made."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.probes import Probe, as_probe
from kedit_fast.requests.spacing import AUTO, check_separator

LISTS = ("paraphrase_prompts", "neighborhood_prompts", "target_aliases", "true_aliases", "generation_prompts")
"""Fields that are lists of texts."""


@dataclass(frozen=True)
class EditRequest:
    """One fact to write: after the edit, `prompt` with `subject` should be continued by `target_new`.

    A request without a subject is a prompt as it stands, without {}: for UltraEdit, which edits by whole prompts. A {}
    that is text belongs into a subject: prompt 'print("{}")' with subject "{}".

    Raises:
        RequestError: a field of a wrong type, an empty text, a prompt without the one {} where its subject stands, a
            character that is not valid Unicode, a weight that is not positive, or an unknown `target_separator`.

    Example:
        >>> request = EditRequest("The capital of {} is", "Australia", "Melbourne", target_true="Canberra")
        >>> request.text
        'The capital of Australia is'
        >>> EditRequest("The capital is", "Australia", "Melbourne")
        Traceback (most recent call last):
            ...
        kedit_fast.errors.RequestError: prompt must contain {} once, where the subject stands; got 'The capital is'
    """

    prompt: str
    """The text to continue, with one {} where the subject stands."""
    subject: str | None
    """What the fact is about; None for a prompt that is edited as a whole."""
    target_new: str
    """The continuation to write."""
    target_true: str | None = None
    """The continuation so far; measured, not needed for editing."""
    paraphrase_prompts: tuple[str, ...] = ()
    """Complete texts that `target_new` should continue, too; measured alone."""
    neighborhood_prompts: tuple[str, ...] = ()
    """Complete texts that `target_true` should still continue; measured alone."""
    id: str | int | None = None
    """How messages and reports call the request."""
    weight: float = 1.0
    """How much the request counts in its batch's least-squares solve: a factor of its squared error."""
    target_separator: str = AUTO
    """What stands between prompt and target: "auto" (see kedit_fast.requests.spacing), " " or ""."""
    target_aliases: tuple[str, ...] = ()
    """Other texts that count as `target_new` in an answer; measured alone."""
    true_aliases: tuple[str, ...] = ()
    """Other texts that count as `target_true` in an answer; measured alone."""
    relation: str | None = None
    """The relation of subject and target: an id such as "P17", or a name."""
    group: str | int | None = None
    """The case that several requests belong to, which are written in their order; None for a request by itself."""
    generation_prompts: tuple[str, ...] = ()
    """Complete texts to continue freely; measured alone."""
    probes: tuple[Probe, ...] = ()
    """What else is asked of the edited model; mappings with a probe's fields are taken, too."""

    def __post_init__(self):
        self._normalize()
        where = f"request {self.id!r}: " if self.id is not None else ""
        for name in ("prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{where}{name} must be a non-empty text; got {describe(value)}")
        for name in ("subject", "target_true", "relation"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{where}{name} must be a text or None; got {describe(value)}")
        for name, texts in self.texts_by_field():
            for text in texts:
                if not isinstance(text, str):
                    raise RequestError(f"{where}{name} must be a list of texts; it holds {describe(text)}")
                if not text.strip():
                    raise RequestError(f"{where}{name} holds an empty text")
                if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
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
                f"{where}has no 'subject' for the {{}} of its prompt {self.prompt!r}: {advice_on_braces(self.prompt)}"
            )
        if self.subject is not None and count != 1:
            raise RequestError(f"{where}prompt must contain {{}} once, where the subject stands; got {self.prompt!r}")

    def _normalize(self) -> None:
        """Turn values of other libraries' types into Python's own, and a blank subject into None."""
        for name in LISTS:
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) else value
            if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
                raise RequestError(f"{name} must be a list of texts; got {describe(value)}")
            object.__setattr__(self, name, tuple(str(text) if isinstance(text, str) else text for text in value))
        for name in ("prompt", "subject", "target_new", "target_true", "id", "relation", "group"):
            value = getattr(self, name)
            if type(value) is not str and isinstance(value, str):
                object.__setattr__(self, name, str(value))
        if isinstance(self.subject, str) and not self.subject.strip():
            object.__setattr__(self, "subject", None)
        for name in ("id", "group"):
            value = getattr(self, name)
            if isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1:
                object.__setattr__(self, name, int(getattr(self, name)))
            elif value is not None and not isinstance(value, str):
                raise RequestError(f"{name} must be a text or a whole number; got {describe(value)}")
        probes = () if self.probes is None else self.probes
        if not isinstance(probes, list | tuple):
            raise RequestError(f"probes must be a list of probes; got {describe(probes)}")
        try:
            object.__setattr__(self, "probes", tuple(map(as_probe, probes)))
        except RequestError as error:
            raise RequestError(f"probes: {error}") from None

    def texts_by_field(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every text of the request, with the name of its field."""
        return [
            ("prompt", (self.prompt,)),
            ("subject", () if self.subject is None else (self.subject,)),
            ("target_new", (self.target_new,)),
            ("target_true", () if self.target_true is None else (self.target_true,)),
            ("paraphrase_prompts", self.paraphrase_prompts),
            ("neighborhood_prompts", self.neighborhood_prompts),
            ("target_aliases", self.target_aliases),
            ("true_aliases", self.true_aliases),
            ("relation", () if self.relation is None else (self.relation,)),
            ("generation_prompts", self.generation_prompts),
            ("probes", tuple(text for probe in self.probes for text in probe.texts())),
        ]

    def as_record(self) -> dict[str, Any]:
        """The request as one flat JSON object, which `load_requests` reads; what has its default is left out."""
        record: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "probes":
                value = tuple(probe.as_record() for probe in value)
            if value != field.default:
                record[field.name] = list(value) if isinstance(value, tuple) else value
        return record

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt if self.subject is None else self.prompt.replace("{}", self.subject)

    @property
    def label(self) -> str:
        """How messages call a request without an id: its subject, or else its prompt."""
        return self.prompt if self.subject is None else self.subject


FIELDS = tuple(field.name for field in fields(EditRequest))


def advice_on_braces(prompt: str) -> str:
    """What to do about the {} of a prompt without a subject: as a record in which they are text."""
    begin, end = prompt.index("{}"), prompt.rindex("{}") + 2
    record = {"prompt": prompt[:begin] + "{}" + prompt[end:], "subject": prompt[begin:end]}
    return f"say what stands there, or, where {{}} is text, write {json.dumps(record, ensure_ascii=False)[1:-1]}"


def is_nan(value: Any) -> bool:
    """Whether a value is a number that is no number, as tables have it in empty cells."""
    return isinstance(value, numbers.Real) and value != value


def shorten(value: Any) -> str:
    """A value as messages show it, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe(value: Any) -> str:
    """A value that is not the text it should be, as messages show it, with what to write instead."""
    text = shorten(value)
    if is_nan(value):
        return f"{text} (no number and no text: leave the field out or write null)"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return f'{text} (write it as a text: "{text}")'
    return text
