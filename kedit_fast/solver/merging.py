"""Merges of several memories of one matrix into one: TIES and the other rules that the WISE release names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kedit_fast.errors import MethodError
from kedit_fast.ops import ties_merge_
from kedit_fast.ops.ties_merge import MOST_MEMORIES
from kedit_fast.support.torch_state import plain_torch

Rule = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[float], float], torch.Tensor]


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The int(density n) entries of largest magnitude of the whole matrix, zero elsewhere; ties from the lowest index.

    Cost: a stable sort of the entries.
    """
    flat = delta.flatten()
    chosen = flat.abs().sort(descending=True, stable=True).indices[: int(density * flat.numel())]
    return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen]).view(delta.shape)


def _deltas(base: torch.Tensor, memories: Sequence[torch.Tensor], density: float) -> list[torch.Tensor]:
    """What each memory changes, fp32 or wider, trimmed where density is less than 1."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    origin = base.to(dtype)
    deltas = (memory.to(origin) - origin for memory in memories)
    return [trimmed(delta, density) if density < 1 else delta for delta in deltas]


def _elected(base: torch.Tensor, deltas: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """Of each entry, the weighted mean of the changes whose sign is that of the weighted sum (0 counts as positive)."""
    total = sum(c * delta for c, delta in zip(coefficients, deltas, strict=True))
    assert isinstance(total, torch.Tensor)
    sign = torch.where(total >= 0, 1.0, -1.0).to(total)
    mixed, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for c, delta in zip(coefficients, deltas, strict=True):
        agrees = ((c * delta).sign() == sign).to(total)  # a trimmed entry has sign 0 and never agrees
        mixed += c * delta * agrees
        divisor += c * agrees
    return base.to(total) + mixed / torch.where(divisor == 0, 1.0, divisor)


def _ties(
    base: torch.Tensor, memories: Sequence[torch.Tensor], coefficients: Sequence[float], density: float
) -> torch.Tensor:
    if len(memories) > MOST_MEMORIES:
        return _elected(base, _deltas(base, memories, density), coefficients)
    out = torch.empty(base.shape, dtype=torch.promote_types(base.dtype, torch.float32), device=base.device)
    return ties_merge_(out, base, torch.stack([memory.to(out) for memory in memories]), coefficients, density)


def _sign(
    base: torch.Tensor, memories: Sequence[torch.Tensor], coefficients: Sequence[float], density: float
) -> torch.Tensor:
    return _elected(base, _deltas(base, memories, 1.0), coefficients)


def _magnitude(
    base: torch.Tensor, memories: Sequence[torch.Tensor], coefficients: Sequence[float], density: float
) -> torch.Tensor:
    deltas = _deltas(base, memories, density)
    return base.to(deltas[0]) + sum(c * delta for c, delta in zip(coefficients, deltas, strict=True))


def _magnitude_norm(
    base: torch.Tensor, memories: Sequence[torch.Tensor], coefficients: Sequence[float], density: float
) -> torch.Tensor:
    return _magnitude(base, memories, [c / (sum(coefficients) or 1.0) for c in coefficients], density)


def _mean(
    base: torch.Tensor, memories: Sequence[torch.Tensor], coefficients: Sequence[float], density: float
) -> torch.Tensor:
    return _magnitude_norm(base, memories, coefficients, 1.0)


RULES: dict[str, Rule] = {
    "ties": _ties,
    "magnitude": _magnitude,
    "magnitude_norm": _magnitude_norm,
    "sign": _sign,
    "mean": _mean,
}
"""Name -> rule. The release's random drops (dare_ties, dare_linear) are unseeded, and its linear and slerp use the
first memory alone: none of them is here."""


@torch.no_grad()
@plain_torch()
def merged(
    base: torch.Tensor, memories: Sequence[torch.Tensor], coefficients: Sequence[float], density: float, rule: str
) -> torch.Tensor:
    """One matrix [h, d] in place of several memories of it, fp32 or wider.

    Args:
        base: W0 [h, d].
        memories: matrices [h, d].
        coefficients: a number of each memory.
        density: share of the entries of each memory that a trim keeps, by magnitude over the whole matrix.
        rule: "ties" (trim, elect signs, mean of those that agree), "sign" (the same without the trim), "magnitude"
            (trim, weighted sum), "magnitude_norm" (trim, weighted mean) or "mean".

    Raises:
        MethodError: an unknown rule, no memories, or another number of coefficients.

    Source: TIES (arXiv 2306.01708); the rules of WISE's released `merge`.
    """
    if rule not in RULES:
        raise MethodError(f"unknown merge rule {rule!r}: choose from {', '.join(RULES)}")
    if not memories or len(memories) != len(coefficients):
        raise MethodError(f"each memory has a coefficient: got {len(memories)} memories, {len(coefficients)} of these")
    return RULES[rule](base, memories, coefficients, density)
