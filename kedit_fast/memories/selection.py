"""Which entry of a memory a prompt is routed to, and products by route: plain torch that waits for no device.

Tokens of R sequences are packed: x [N, in], starts [R + 1] int64; tokens from starts[R] on belong to nobody.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.support.dtypes import accumulation_dtype

_ACTIVATIONS = {
    "none": lambda x: x,
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def activation_function(name: str):
    """s by its name in configurations of transformers; raises InvalidArgumentError for another one."""
    if name not in _ACTIVATIONS:
        raise InvalidArgumentError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name!r}")
    return _ACTIVATIONS[name]


def owners(starts: torch.Tensor, count: int) -> torch.Tensor:
    """[count] int64, the sequence of each token; R for those that belong to nobody."""
    return torch.searchsorted(starts[1:].contiguous(), torch.arange(count, device=starts.device), right=True)


def token_means(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[R, ...] means over the tokens of each sequence, summed in fp32 (fp64 for fp64); 0 without a token."""
    rows, wide = len(starts) - 1, accumulation_dtype(x)
    sums = torch.zeros(rows + 1, *x.shape[1:], dtype=wide, device=x.device)
    sums.index_add_(0, owners(starts, len(x)), x.to(wide))
    counts = starts.diff().clamp(min=1).to(wide)
    return sums[:rows] / counts.view(-1, *[1] * (x.ndim - 1))


def activation_distance(
    x: torch.Tensor,
    reference: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str,
    long: int = 0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """D [M, R]: mean over a sequence's tokens of |s(x W_m^T + b) - s(reference)|_2; see `ActivationMemory`.

    The largest instead of the mean for sequences of more than `long` tokens, where that is not 0.
    """
    act, wide = activation_function(activation), accumulation_dtype(x)
    before = act(reference).to(wide)
    rows, owner = len(starts) - 1, owners(starts, len(x))
    distances = []
    for weight in weights:
        out = functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        distance = torch.linalg.vector_norm(act(out).to(wide) - before, dim=1)  # [N]
        result = token_means(distance, starts)
        if long:
            largest = torch.full((rows + 1,), -torch.inf, dtype=wide, device=x.device)
            largest.scatter_reduce_(0, owner, distance, "amax")
            result = torch.where(starts.diff() > long, largest[:rows], result)
        distances.append(result)
    return torch.stack(distances)


def farthest(distance: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """[R] the memory of the largest distance [M, R] among those with distance >= bound [M]; -1 for none."""
    over = distance >= bounds[:, None]
    return torch.where(over.any(0), torch.where(over, distance, -torch.inf).argmax(0), -1)


def published_order(distance: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The same as the released code has it: a memory must be farther than memory 0, also where that is not over its
    own bound, and than those chosen before it."""
    best, choice = distance[0], torch.where(distance[0] >= bounds[0], 0, -1)
    for memory in range(1, len(distance)):
        taken = (distance[memory] > best) & (distance[memory] > bounds[memory])
        choice, best = torch.where(taken, memory, choice), torch.where(taken, distance[memory], best)
    return choice


def routed_product(
    x: torch.Tensor, output: torch.Tensor, weights: torch.Tensor, route: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[N, out] = x W_route^T + b, and `output` where route [N] is -1."""
    for entry, weight in enumerate(weights):
        other = functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        output = torch.where((route == entry)[:, None], other.to(output.dtype), output)
    return output


def nearest_key(
    queries: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per query the nearest key (the first of equal ones), its distance, and whether that is within its radius."""
    wide = accumulation_dtype(keys)
    distances = torch.stack([torch.linalg.vector_norm(keys.to(wide) - q.to(wide), dim=1) for q in queries])
    index = distances.argmin(1)
    distance = distances.gather(1, index[:, None])[:, 0]
    return index, distance, distance <= radii[index].to(wide)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """[R, ceil(d / 8)] uint8 of mask [R, d]: bit i of byte j is entry 8 j + i."""
    padded = functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)


def set_bits(bits: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `pack_bits`: [R, size] bool."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).flatten(1)[:, :size].bool()


def top_features(
    x: torch.Tensor, starts: torch.Tensor, center: torch.Tensor, count: int, permutation: torch.Tensor
) -> torch.Tensor:
    """[R, ceil(d / 8)] uint8: permutation[i] for the `count` largest |mean over tokens - center|, ties by index."""
    means = token_means(x, starts)
    top = (means - center.to(means)).abs().sort(dim=1, descending=True, stable=True).indices[:, :count]
    mask = torch.zeros_like(means, dtype=torch.bool)
    return pack_bits(mask.scatter_(1, permutation[top], True))


def best_overlap(masks: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per mask [R, b] the row of the book [K, b] with which it shares the most bits (the first of equal ones), and how
    many."""
    counts = torch.zeros(len(masks), len(book), dtype=torch.int64, device=masks.device)
    for i in range(8):
        mine, theirs = (((bits >> i) & 1).float() for bits in (masks, book))
        counts += (mine @ theirs.T).long()
    index = counts.argmax(1)
    return index, counts.gather(1, index[:, None])[:, 0]
