"""One edit request, checked when it is made."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.spacing import AUTO, check_separator


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

    def __post_init__(self):
        self._normalize()
        where = f"request {self.id!r}: " if self.id is not None else ""
        for name in ("prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{where}{name} must be a non-empty text; got {describe(value)}")
        for name in ("subject", "target_true"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{where}{name} must be a text or None; got {describe(value)}")
        for name, texts in self.texts_by_field():
            for text in texts:
                if not isinstance(text, str):
                    raise RequestError(f"{where}{name} must be a list of texts; it holds {describe(text)}")
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
                f"{where}has no 'subject' for the {{}} of its prompt {self.prompt!r}: {advice_on_braces(self.prompt)}"
            )
        if self.subject is not None and count != 1:
            raise RequestError(f"{where}prompt must contain {{}} once, where the subject stands; got {self.prompt!r}")

    def _normalize(self) -> None:
        """Turn values of other libraries' types into Python's own, and a blank subject into None."""
        for name in ("paraphrase_prompts", "neighborhood_prompts"):
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) else value
            if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
                raise RequestError(f"{name} must be a list of texts; got {describe(value)}")
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
            raise RequestError(f"id must be a text or a whole number; got {describe(self.id)}")

    def texts_by_field(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every text of the request, with the name of its field."""
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
