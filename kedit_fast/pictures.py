"""Pictures of results, by matplotlib where it is installed."""

from __future__ import annotations

import os
from typing import Any

from kedit_fast.errors import KeditError
from kedit_fast.files import replacing


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


def save(made: Any, path: str | os.PathLike) -> None:
    """Write a figure, in the format of the file's suffix; whole or not at all."""
    with replacing(path, KeditError) as part:
        made.savefig(part, dpi=130)
