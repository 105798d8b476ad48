"""Reference of `activation_distance`: how far memories move the activations of a layer, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kedit_fast.support.dtypes import accumulation_dtype

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""The activations, by the names that the op takes."""


def activation_distance(
    x: torch.Tensor,
    reference: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str = "silu",
    long: int = 0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Distances [M, R] in fp32 (fp64 for fp64 rows); see `kedit_fast.ops.activation_distance`."""
    dtype = accumulation_dtype(x)
    act, wide = ACTIVATIONS[activation], x.to(dtype)
    before, shift = act(reference.to(dtype)), None if bias is None else bias.to(dtype)
    distances = [torch.linalg.vector_norm(act(F.linear(wide, w.to(dtype), shift)) - before, dim=1) for w in weights]
    none = x.new_empty((0, x.shape[0]), dtype=dtype)
    return by_sequence(torch.stack(distances) if distances else none, starts, long)


def by_sequence(distances: torch.Tensor, starts: torch.Tensor, long: int) -> torch.Tensor:
    """Distances of tokens [M, N] as [M, R]: their mean, or their largest where a sequence has more than `long` tokens.

    Sums are taken in the order of the tokens. A sequence without tokens has 0.
    """
    if distances.numel() == 0:
        return distances.new_zeros(distances.shape[0], starts.numel() - 1)
    by_token, offsets = distances.T.contiguous(), starts.long()
    length = offsets.diff()[:, None]
    total = torch.segment_reduce(by_token, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    mean = total / length.clamp(min=1)
    if long:
        largest = torch.segment_reduce(by_token, "max", offsets=offsets, axis=0, unsafe=True, initial=0)
        mean = torch.where(length > long, largest, mean)
    return mean.T.contiguous()
