"""Which entry of a memory a prompt is routed to, and products by route; nothing waits for a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import routed_linear
from kedit_fast.support.dtypes import accumulation_dtype

_ACTIVATIONS = {
    "none": "identity",
    "linear": "identity",
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    **{name: name for name in ("identity", "relu", "silu", "gelu", "gelu_tanh")},
}
_ROWS = 1024  # of a book that are unpacked at once


def activation_name(name: str) -> str:
    """What the op `activation_distance` calls an activation of transformers; raises InvalidArgumentError for others."""
    if name not in _ACTIVATIONS:
        raise InvalidArgumentError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name!r}")
    return _ACTIVATIONS[name]


def activation_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """s itself, by the same names."""
    return {
        "identity": lambda x: x,
        "relu": functional.relu,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[activation_name(name)]


def token_means(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[R, ...] means over the tokens of packed sequences, summed in fp32 (fp64 for fp64); 0 without a token.

    Args:
        x: [N, ...] the tokens of R sequences, one sequence after another.
        starts: [R + 1] int64, where each begins, and the end; tokens from there on belong to nobody.
    """
    rows, wide = len(starts) - 1, accumulation_dtype(x)
    owner = torch.searchsorted(starts[1:].contiguous(), torch.arange(len(x), device=starts.device), right=True)
    sums = torch.zeros(rows + 1, *x.shape[1:], dtype=wide, device=x.device).index_add_(0, owner, x.to(wide))
    counts = starts.diff().clamp(min=1).to(wide)
    return sums[:rows] / counts.view(-1, *[1] * (x.ndim - 1))


def farthest(distance: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """[R] the memory of the largest distance [M, R] among those with distance >= bound [M]; -1 for none."""
    over = distance >= bounds[:, None]
    return torch.where(over.any(0), torch.where(over, distance, -torch.inf).argmax(0), -1)


def published_order(distance: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """[R] the memory that the released code takes, -1 for none.

    A memory must be farther than memory 0, also where that one is not over its own bound, and than those chosen before.
    """
    best, choice = distance[0], torch.where(distance[0] >= bounds[0], 0, -1)
    for memory in range(1, len(distance)):
        taken = (distance[memory] > best) & (distance[memory] > bounds[memory])
        choice, best = torch.where(taken, memory, choice), torch.where(taken, distance[memory], best)
    return choice


def routed_product(
    x: torch.Tensor, output: torch.Tensor, weights: torch.Tensor, route: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[N, out] = x W_route^T + b, and `output` where route [N] is -1; with derivatives where gradients are needed."""
    x = x.to(output.dtype)
    if not torch.is_grad_enabled() or not (x.requires_grad or output.requires_grad):
        return routed_linear(x, None, weights, route, output=output, bias=bias)
    for entry, weight in enumerate(weights):
        other = functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        output = torch.where((route == entry)[:, None], other.to(output.dtype), output)
    return output


def masked_product(x: torch.Tensor, weight: torch.Tensor, bits: torch.Tensor, count: int) -> torch.Tensor:
    """[N, out] = (m * x) W for masks m as bits [N, ceil(in / 8)], of at most `count` features each.

    Args:
        x: [N, in].
        weight: [in, out]; of a few tokens, the rows of their features alone are read.
        bits: feature 8 j + i is bit i of byte j.
        count: the largest number of features in a mask.
    """
    size = weight.shape[0]
    mask, x = set_bits(bits, size), x.to(weight.dtype)
    if len(x) * count >= size or weight.dtype not in (torch.float32, torch.float64):
        return torch.where(mask, x, 0) @ weight
    place = torch.where(mask, mask.cumsum(1) - 1, count)  # of each feature among those of its mask
    features = torch.zeros(len(x), count + 1, dtype=torch.int64, device=x.device)
    features = features.scatter_(1, place, torch.arange(size, device=x.device).expand_as(place))[:, :count]
    scales = torch.where(torch.arange(count, device=x.device) < mask.sum(1, keepdim=True), x.gather(1, features), 0)
    return functional.embedding_bag(features, weight, per_sample_weights=scales, mode="sum")


def set_bits(bits: torch.Tensor, size: int) -> torch.Tensor:
    """[R, size] bool of bits [R, ceil(size / 8)]: feature 8 j + i is bit i of byte j."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).flatten(1)[:, :size].bool()


def largest_count(bits: torch.Tensor) -> int:
    """The largest number of features in a row of a book [K, b]; 0 for an empty one."""
    parts = [part for part in bits.split(_ROWS) if len(part)]
    return max((int(set_bits(part, 8 * part.shape[1]).sum(1).max()) for part in parts), default=0)
