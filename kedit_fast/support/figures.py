"""Pictures of results, by matplotlib where it is installed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from kedit_fast.errors import KeditError
from kedit_fast.support.files import replacing

NARROW = 300  # a log axis that spans less has ticks at 1, 2 and 5 of a decade, in plain numbers


def figure(columns: int = 1, width: float = 6.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure with axes side by side; raises KeditError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise KeditError("pictures need matplotlib: pip install 'kedit-fast[plot]'") from None
    made = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, squeeze=False)
    return made, list(axes[0])


def colours(count: int) -> list[Any]:
    """As many colours, each another one: matplotlib's ten, past them a scale from dark to light in the given order."""
    from matplotlib import colormaps

    if count <= 10:
        return list(colormaps["tab10"].colors[:count])
    return [colormaps["viridis"](0.95 * i / (count - 1)) for i in range(count)]


def legend_beside(made: Any, axes: Any) -> None:
    """The legend of `axes` right of everything, where it covers no curve; in columns when it is long."""
    handles, labels = axes.get_legend_handles_labels()
    columns = -(-len(labels) // 18)
    width, height = made.get_size_inches()
    made.set_size_inches(width + columns * (0.6 + 0.06 * max(map(len, labels))), height)  # 7 points a character
    made.legend(handles, labels, fontsize=7, loc="outside right upper", ncols=columns)


def log_ticks(axis: Any) -> None:
    """Ticks of a log axis whose limits are set: plain numbers where it spans few decades, else powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high / low < NARROW:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))


def ticks_at(axis: Any, numbers: Sequence[float]) -> None:
    """Ticks of a log axis at the largest of `numbers`, and at those whose labels have room beside it."""
    from matplotlib.ticker import NullLocator

    low, high = (math.log(limit) for limit in axis.get_view_interval())
    labels = {number: f"{number:,.9g}" for number in sorted(set(numbers), reverse=True)}
    apart = 0.032 * max(map(len, labels.values())) * (high - low)  # a character takes about 1/32 of a panel
    chosen: list[float] = []
    for number in labels:
        if not chosen or math.log(chosen[-1] / number) >= apart:
            chosen.append(number)
    axis.set_ticks(chosen, [labels[number] for number in chosen])
    axis.set_minor_locator(NullLocator())


def save(made: Any, path: str | os.PathLike) -> None:
    """Write a figure, in the format of the file's suffix; whole or not at all."""
    with replacing(path, KeditError) as part:
        made.savefig(part, dpi=130)
