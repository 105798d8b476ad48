"""Pieces of text that messages and tables share."""

from __future__ import annotations

from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def comma_list(items: Iterable[object]) -> str:
    """Items separated by commas, as messages list layers: "4, 5, 6"."""
    return ", ".join(map(str, items))


def size_text(count: float) -> str:
    """A number of bytes in the largest unit up to GiB that leaves at least one: "512 bytes", "1.5 MiB", "2.00 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
