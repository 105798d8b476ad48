"""A record's values with the path to each: an error says which field of which record is missing or malformed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.records import NEED_NONE, Options, note_mixed_forms
from kedit_fast.requests.request import EditRequest, describe


@dataclass(frozen=True)
class Part:
    """A record, or a value inside it."""

    value: Any
    where: str
    """How messages call the record."""
    path: str = ""
    """How the value is reached from the record, as `edits[0].relation.prompt`; empty for the record itself."""

    def __getitem__(self, name: str) -> Part:
        """The value of a name; raises RequestError where there is none."""
        part = self.get(name)
        if part is None:
            names = ", ".join(map(str, list(self.value)[:12])) or "nothing in it"
            raise RequestError(f"{self.where} has no '{self._inner(name)}'; {self.path or 'it'} has {names}")
        return part

    def get(self, name: str) -> Part | None:
        """The value of a name; None where there is none, or where it is null.

        Raises:
            RequestError: this part is no object.
        """
        if not isinstance(self.value, Mapping):
            raise self.error(f"must be an object with '{name}'; got {describe(self.value)}")
        value = self.value.get(name)
        return None if value is None else Part(value, self.where, self._inner(name))

    def items(self) -> list[Part]:
        """The values of a list; raises RequestError for anything else."""
        return list(self._items())

    def text(self) -> str:
        """A text that is not blank; raises RequestError for anything else."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error(f"must be a non-empty text; got {describe(self.value)}")
        return str(self.value)

    def texts(self) -> tuple[str, ...]:
        """The texts of a list, which may be empty; raises RequestError for anything else, and for a blank one."""
        return tuple(item.text() for item in self._items())

    def error(self, message: str) -> RequestError:
        """An error about this part."""
        return RequestError(f"{self.where}: {self.path or 'the record'} {message}")

    def _items(self) -> Iterator[Part]:
        value = self.value.tolist() if hasattr(self.value, "tolist") else self.value  # of numpy
        if not isinstance(value, list | tuple):
            raise self.error(f"must be a list; got {describe(value)}")
        return (Part(item, self.where, f"{self.path}[{index}]") for index, item in enumerate(value))

    def _inner(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def optional_texts(part: Part, name: str) -> tuple[str, ...]:
    """The texts of a list that may be absent or empty; blank ones are left out."""
    inner = part.get(name)
    if inner is None:
        return ()
    if isinstance(inner.value, str):
        return (inner.value,) if inner.value.strip() else ()
    return tuple(item.text() for item in inner.items() if not (isinstance(item.value, str) and not item.value.strip()))


def distinct(*texts: str) -> tuple[str, ...]:
    """The texts in order, each once."""
    return tuple(dict.fromkeys(texts))


def with_subject(template: Part, subject: str) -> str:
    """A prompt with its one {} replaced by the subject; raises RequestError where it has none, or several."""
    if template.text().count("{}") != 1:
        raise template.error(f"must contain {{}} once, where the subject stands; got {template.value!r}")
    return template.text().replace("{}", subject)


def make_request(where: str, options: Options, **fields: Any) -> EditRequest:
    """An EditRequest whose errors name the record; raises RequestError where it lacks a subject that is needed."""
    try:
        request = EditRequest(**fields)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    if options.need_subject and request.subject is None:
        raise RequestError(f"{where} has no subject: {NEED_NONE}")
    note_mixed_forms(request, where, options)
    return request
