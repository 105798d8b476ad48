"""Pieces that messages and tables share."""

from __future__ import annotations

from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def comma_list(items: Iterable[object]) -> str:
    """Items with commas between them, as layers stand in messages: "4, 5, 6"."""
    return ", ".join(map(str, items))
