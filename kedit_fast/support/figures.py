"""Figures, drawn by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from kedit_fast.errors import KeditError
from kedit_fast.support.files import replacing

NARROW = 300  # a log axis that spans less has ticks at 1, 2 and 5 of a decade, in plain numbers


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(columns: int = 1, width: float = 6.0, height: float = 4.0, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure with axes side by side, row by row; each is so wide and high. Raises KeditError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise KeditError("pictures need matplotlib: pip install 'kedit-fast[plot]'") from None
    result = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(result)
    axes = result.subplots(rows, columns, squeeze=False)
    return result, list(axes.flat)


def colors(count: int) -> list[Any]:
    """That many distinct colors: matplotlib's ten, or beyond ten a scale from dark to light."""
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["viridis"](0.95 * i / (count - 1)) for i in range(count)]


def legend_beside(whole_figure: Any, axes: Any) -> None:
    """Put the legend of `axes` right of all axes, where it covers no curve; in columns when it is long."""
    handles, labels = axes.get_legend_handles_labels()
    columns = -(-len(labels) // 18)
    width, height = whole_figure.get_size_inches()
    whole_figure.set_size_inches(width + columns * (0.6 + 0.06 * max(map(len, labels))), height)  # 7 points a character
    whole_figure.legend(handles, labels, fontsize=7, loc="outside right upper", ncols=columns)


def log_ticks(axis: Any) -> None:
    """Ticks of a log axis whose limits are set: plain numbers where it spans few decades, else powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high / low < NARROW:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))


def ticks_at(axis: Any, positions: Sequence[float]) -> None:
    """Ticks of a log axis at the largest of `positions`, and at those others whose labels have room."""
    from matplotlib.ticker import NullLocator

    low, high = (math.log(limit) for limit in axis.get_view_interval())
    labels = {number: f"{number:,.9g}" for number in sorted(set(positions), reverse=True)}
    apart = 0.032 * max(map(len, labels.values())) * (high - low)  # a character takes about 1/32 of a panel
    chosen: list[float] = []
    for number in labels:
        if not chosen or math.log(chosen[-1] / number) >= apart:
            chosen.append(number)
    axis.set_ticks(chosen, [labels[number] for number in chosen])
    axis.set_minor_locator(NullLocator())


def whole_ticks(axis: Any) -> None:
    """Ticks of an axis at whole numbers alone, as layers have them."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def plain(text: str, longest: int = 20) -> str:
    """A text of a user as a label that matplotlib draws as it stands.

    White space that shows nothing, control characters, and characters that the font lacks are written as Python writes
    them; dollars start no formula; what is too long is cut.
    """
    from matplotlib import font_manager

    drawable = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    shown = "".join(
        character if character.isprintable() and ord(character) in drawable else ascii(character)[1:-1]
        for character in text
    )
    shown = shown if shown.strip() else repr(shown)
    shown = shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
    return shown.replace("$", r"\$")


def save(whole_figure: Any, path: str | os.PathLike) -> None:
    """Write a figure in the format of the file's suffix; see `files.replacing`."""
    with replacing(path, KeditError) as part:
        whole_figure.savefig(part, dpi=130)
