"""Spectra of stored statistics: condition numbers, effective ranks and null-space dimensions per layer."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import StatisticsError
from kedit_fast.solver.block_diagonal import EXPERT_RIDGE
from kedit_fast.solver.preconditioner import NullSpaceRule, condition_number, extreme_eigenvalues, null_dimension
from kedit_fast.statistics.expert_moments import ExpertTokens
from kedit_fast.statistics.moments import SecondMoment
from kedit_fast.statistics.store import layer_of, modules_in, read_layer, read_output_metric
from kedit_fast.support import figures
from kedit_fast.support.torch_state import plain_torch

THRESHOLDS: tuple[tuple[NullSpaceRule, float], ...] = (
    ("absolute", 1e-3),
    ("absolute", 1e-2),
    ("absolute", 2e-2),
    ("absolute", 1e-1),
    ("relative", 1e-5),
    ("relative", 1e-4),
    ("relative", 1e-3),
    ("energy", 0.01),
    ("energy", 0.05),
    ("energy", 0.1),
)
"""Rules and thresholds of the null spaces in the report."""
PUBLISHED = 2e-2
"""AlphaEdit's published threshold, by the rule "absolute"."""


@dataclass(frozen=True)
class Spectrum:
    """Figures of one layer's second moment C [d, d]; of E experts, of the block diagonal matrix of theirs, d = E m."""

    module: str
    """The module's name in the model."""
    layer: int
    """Its layer, zero-based."""
    size: int
    """d, the length of a key."""
    count: int
    """Tokens that were counted."""
    trace: float
    """The mean of |k|^2."""
    condition: float | None
    """The largest eigenvalue over the smallest, the same for lambda C; None for a singular C. Of experts, of C with the
    ridge that a solve adds (`solver.block_diagonal.EXPERT_RIDGE`)."""
    effective_rank: float
    """exp of the entropy of the eigenvalues' shares of the trace."""
    null_dimensions: dict[str, int]
    """ "rule threshold" -> dimensions of that null space; of experts, of all theirs, by relative rules alone."""
    eigenvalues: torch.Tensor
    """[d] in ascending order, fp64."""
    labels: str = ""
    """Of an output metric, of gradients at the layer's d outputs: which labels the loss has."""
    experts: ExpertTokens | None = None
    """How many tokens chose the experts of the layer; None without experts."""
    is_shared: bool = False
    """Whether C is that of the layer's shared experts, a block of the stack beside those of the experts."""

    @property
    def name(self) -> str:
        """The layer's number, and whether it is that of shared experts."""
        return f"{self.layer}, shared" if self.is_shared else str(self.layer)

    def as_dict(self) -> dict[str, Any]:
        """The object that `stats show --json` prints for a layer."""
        values = self.eigenvalues
        shown = {"largest": float(values[-1]), "median": float(values[self.size // 2]), "smallest": float(values[0])}
        return {
            "module": self.module,
            "layer": self.layer,
            "size": self.size,
            "tokens": self.count,
            "trace": self.trace,
            "condition": self.condition,
            "effective_rank": self.effective_rank,
            "eigenvalues": shown,
            **({"labels": self.labels} if self.labels else {"null_dimensions": self.null_dimensions}),
            **({} if self.experts is None else {"experts": asdict(self.experts)}),
            **({"is_shared": True} if self.is_shared else {}),
        }


@plain_torch()
def spectra(folder: str | os.PathLike) -> list[Spectrum]:
    """The spectrum of every layer in a folder of statistics, kedit_fast's or memit's npz. No model is needed.

    Shared experts that are a block of a layer's stack have a spectrum of their own behind that of the experts.

    Raises:
        StatisticsError: the folder has no statistics, or a file is damaged; the message names it.

    Cost: a symmetric eigendecomposition per layer: about 4/3 d^3 flops in fp64 without vectors (4/3 E m^3 of experts).
    """
    result = []
    for module in modules_in(folder):
        second = read_layer(Path(folder), module).second
        result.append(_spectrum(second))
        if second.shared is not None:
            shared = _spectrum(SecondMoment(second.module, second.shared, second.count))
            relative = {name: n for name, n in shared.null_dimensions.items() if not name.startswith("absolute")}
            result.append(replace(shared, null_dimensions=relative, is_shared=True))
    return result


@plain_torch()
def output_spectra(folder: str | os.PathLike) -> list[Spectrum]:
    """The spectrum of every output metric in a folder of statistics; none where there is none.

    Raises:
        StatisticsError: the folder has no statistics, or a file is damaged; the message names it.
    """
    files = [read_output_metric(Path(folder), module) for module in modules_in(folder)]
    return [_spectrum(file.second, file.metadata["labels"]) for file in files if file is not None]


def _spectrum(second: SecondMoment, labels: str = "") -> Spectrum:
    if second.moment.ndim == 2:
        values = by_block = torch.linalg.eigvalsh(second.moment.double())
        dimensions = {f"{rule} {share:g}": null_dimension(values, share, rule) for rule, share in THRESHOLDS}
    else:
        by_block = torch.stack([torch.linalg.eigvalsh(block.double()) for block in second.moment])  # [E, m]
        values = by_block.flatten().sort().values
        dimensions = {
            f"{rule} {share:g}": sum(null_dimension_of_expert(block, share, rule) for block in by_block)
            for rule, share in THRESHOLDS
            if rule != "absolute"
        }
    positive = values.clamp(min=0)
    shares = positive / positive.sum().clamp(min=torch.finfo(torch.float64).tiny)  # rank 1 when there was no input
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Spectrum(
        second.module,
        layer_of(second.module),
        len(values),
        second.count,
        float(second.moment.double().diagonal(dim1=-2, dim2=-1).sum()),
        condition_of(by_block),
        float(entropy.exp()),
        dimensions,
        values,
        labels,
        None if second.tokens_by_expert is None else ExpertTokens.of(second.tokens_by_expert),
    )


def condition_of(values: torch.Tensor) -> float | None:
    """The condition number of a moment by its ascending eigenvalues [d]; of experts' [E, m], with the ridge of a solve.

    None where it is singular.
    """
    if values.ndim == 1:
        return condition_number(values)
    ridge = EXPERT_RIDGE * float(values.mean())
    return (float(values.max()) + ridge) / (max(float(values.min()), 0.0) + ridge) if ridge > 0 else None


def null_dimension_of_expert(values: torch.Tensor, threshold: float, rule: NullSpaceRule) -> int:
    """`null_dimension` of an expert's ascending eigenvalues [m]; everything for one that no token chose."""
    return null_dimension(values, threshold, rule) if float(values[-1]) > 0 else len(values)


def expert_condition(second: SecondMoment) -> float | None:
    """The condition number of experts' second moments [E, m, m] with the ridge of a solve; None where all are zero.

    Slightly underestimated. Cost: E m^3 / 3 flops in fp64, a factor of one expert at a time.
    """
    moment = second.moment
    ridge = EXPERT_RIDGE * float(moment.diagonal(dim1=1, dim2=2).double().mean())
    if not ridge > 0:
        return None
    largest, smallest = ridge, float("inf")
    for block in moment:
        system = block.double().clone()
        system.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise StatisticsError(f"{second.module}: the second moment of an expert is not positive semi-definite")
        high, low = extreme_eigenvalues(factor)
        largest, smallest = max(largest, high), min(smallest, low)
    return largest / smallest


def figure_of(layer_spectra: list[Spectrum]) -> Any:
    """Eigenvalues in descending order, one line per layer, and AlphaEdit's threshold. Needs matplotlib."""
    figure, (axes,) = figures.figure()
    for spectrum, color in zip(layer_spectra, figures.colors(len(layer_spectra)), strict=True):
        values = spectrum.eigenvalues.flip(0)
        floor = float(values[0]) * 1e-16
        lost = int((values < floor).sum())  # zero or negative: a log scale cannot show them
        note = f" ({lost} of {spectrum.size} are 0: at the bottom)" if lost else ""
        axes.plot(
            range(1, spectrum.size + 1),
            values.clamp(min=floor).tolist(),
            label=f"layer {spectrum.name}{note}",
            color=color,
            linewidth=1.2,
            marker="." if spectrum.size < 50 else None,
        )
    axes.axhline(PUBLISHED, color="grey", linewidth=0.8, linestyle="--", label="AlphaEdit's threshold, 0.02")
    axes.set_yscale("log")
    axes.set_xlabel("number of the eigenvalue, the largest first")
    axes.set_ylabel("eigenvalue of E[k k^T]")
    figures.legend_beside(figure, axes)
    return figure


def draw(layer_spectra: list[Spectrum], path: str | os.PathLike) -> None:
    """Save `figure_of`, in the format of the path's suffix."""
    figures.save(figure_of(layer_spectra), path)
