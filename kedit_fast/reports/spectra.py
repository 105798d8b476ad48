"""What stored statistics are like: their size, condition, spectrum, and how large a null space they leave."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kedit_fast.solver.preconditioner import condition_number, null_dimension
from kedit_fast.statistics.store import layer_of, modules_in, read_layer
from kedit_fast.support import figures
from kedit_fast.support.torch_state import plain_torch

# Rule and threshold of the null spaces that are shown: 2e-2 absolute is the published one.
THRESHOLDS = (
    ("absolute", 1e-3), ("absolute", 1e-2), ("absolute", 2e-2), ("absolute", 1e-1),
    ("relative", 1e-5), ("relative", 1e-4), ("relative", 1e-3),
    ("energy", 0.01), ("energy", 0.05), ("energy", 0.1),
)  # fmt: skip
PUBLISHED = 2e-2


@dataclass(frozen=True)
class Spectrum:
    """A layer's second moment C [d, d] in numbers."""

    module: str
    layer: int
    size: int  # d
    count: int  # tokens
    trace: float  # mean |k|^2
    condition: float | None  # largest eigenvalue / smallest, the same for lambda C; None for a singular C
    effective_rank: float  # exp of the entropy of the eigenvalues' shares of the trace
    null_dimensions: dict[str, int]  # "rule threshold" -> dimensions
    eigenvalues: torch.Tensor  # [d] ascending, fp64

    def as_dict(self) -> dict[str, Any]:
        """The object that `stats show --json` prints for a layer."""
        values = self.eigenvalues
        shown = {"largest": float(values[-1]), "median": float(values[self.size // 2]), "smallest": float(values[0])}
        return {
            "module": self.module, "layer": self.layer, "size": self.size, "tokens": self.count, "trace": self.trace,
            "condition": self.condition, "effective_rank": self.effective_rank, "eigenvalues": shown,
            "null_dimensions": self.null_dimensions,
        }  # fmt: skip


@plain_torch()
def spectra(folder: str | os.PathLike) -> list[Spectrum]:
    """Of every layer in a folder of statistics, ours or npz; no model is needed.

    Raises:
        StatisticsError: no statistics there, or a damaged file, by its name.

    Cost: a symmetric eigendecomposition a layer: about 4/3 d^3 flops in fp64 without vectors.
    """
    return [_spectrum(Path(folder), module) for module in modules_in(folder)]


def _spectrum(folder: Path, module: str) -> Spectrum:
    second = read_layer(folder, module).second
    values = torch.linalg.eigvalsh(second.moment.double())
    positive = values.clamp(min=0)
    shares = positive / positive.sum().clamp(min=torch.finfo(torch.float64).tiny)  # of no input at all: rank 1
    entropy = -torch.special.xlogy(shares, shares).sum()
    dimensions = {f"{rule} {threshold:g}": null_dimension(values, threshold, rule) for rule, threshold in THRESHOLDS}
    trace = float(second.moment.double().diagonal().sum())
    return Spectrum(
        module, layer_of(module), len(values), second.count, trace, condition_number(values), float(entropy.exp()),
        dimensions, values,
    )  # fmt: skip


def figure_of(found: list[Spectrum]) -> Any:
    """Eigenvalues in descending order, a line a layer, with the published threshold; needs matplotlib."""
    made, (axes,) = figures.figure()
    for spectrum, colour in zip(found, figures.colors(len(found)), strict=True):
        values = spectrum.eigenvalues.flip(0)
        floor = float(values[0]) * 1e-16
        lost = int((values < floor).sum())  # 0 or below, which a log scale has no place for
        note = f" ({lost} of {spectrum.size} are 0: at the bottom)" if lost else ""
        axes.plot(
            range(1, spectrum.size + 1), values.clamp(min=floor).tolist(), label=f"layer {spectrum.layer}{note}",
            color=colour, linewidth=1.2, marker="." if spectrum.size < 50 else None,
        )  # fmt: skip
    axes.axhline(PUBLISHED, color="grey", linewidth=0.8, linestyle="--", label="AlphaEdit's threshold, 0.02")
    axes.set_yscale("log")
    axes.set_xlabel("number of the eigenvalue, the largest first")
    axes.set_ylabel("eigenvalue of E[k k^T]")
    figures.legend_beside(made, axes)
    return made


def draw(found: list[Spectrum], path: str | os.PathLike) -> None:
    """Save `figure_of`, in the format of the path's suffix."""
    figures.save(figure_of(found), path)
