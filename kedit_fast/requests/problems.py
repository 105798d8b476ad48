"""Requests that cannot be used: what is wrong with each, by its index, and what callers do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from kedit_fast.errors import RequestError
from kedit_fast.requests.record_fields import MOST_LISTED

OnError = Literal["raise", "skip"]
"""At requests that cannot be used: raise an error that names all of them, or leave them out."""


def check_on_error(on_error: str) -> None:
    """Raise RequestError unless `on_error` is one of `OnError`."""
    if on_error not in get_args(OnError):
        raise RequestError(f"on_error = {on_error!r}: choose raise or skip")


def numbered(identifier: str | int | None, index: int) -> str:
    """How problems call a request: by its id, or else by its number from 1."""
    return f"request {identifier!r}" if identifier is not None else f"request {index + 1}"


def require_no_problems(problems: Mapping[int, str], headline: str = "") -> None:
    """Raise RequestError with the problems by request, at most 20 of them and the count of the others."""
    if problems:
        raise RequestError("\n".join([*([headline] if headline else ()), *first_problems(problems)]))


def first_problems(problems: Mapping[int, str]) -> list[str]:
    """The first 20 problems in order, and a line with the count of the others."""
    first = [problems[index] for index in sorted(problems)[:MOST_LISTED]]
    return first if len(problems) <= MOST_LISTED else [*first, f"and {len(problems) - MOST_LISTED} more"]


def skipped_records(skipped: Mapping[int, str]) -> list[dict[str, Any]]:
    """What was left out, as `--json` prints it: the index from 0, the number from 1, and the reason.

    Of a file whose records make several requests, requests are counted: the reason names the record itself.
    """
    return [{"index": index, "record": index + 1, "reason": skipped[index]} for index in sorted(skipped)]
