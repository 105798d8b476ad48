"""The features of an input that stand out most, one set a sequence, as bits."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.ops._checks import describe, require, require_dtype, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import top_features as reference
from kedit_fast.support.dtypes import FLOATS

OP = "top_features"
LIBRARY.define(f"{OP}(Tensor x, Tensor starts, Tensor center, int k, Tensor permutation, str backend) -> Tensor")
_op = torch.ops.kedit_fast.top_features.default


def top_features(
    x: torch.Tensor,
    starts: torch.Tensor,
    center: torch.Tensor,
    k: int,
    permutation: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The k features of largest |mean(x) - center| of every sequence, permuted, as packed bits.

    Equivalent, for each sequence, to `permutation[(x[begin:end].mean(0) - center).abs().topk(k).indices]`.

    Args:
        x: [N, d] of a floating dtype, the tokens of R sequences one after another. No gradient flows to it.
        starts: [R + 1] int64 or int32: sequence r has the tokens starts[r] to starts[r + 1] - 1. Not decreasing.
        center: [d] of a floating dtype, the mean that is subtracted.
        k: number of features, from 1 to d.
        permutation: [d] int64: feature i is bit permutation[i].
        backend: "torch" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [R, ceil(d / 8)] uint8; feature 8 j + i is bit i of byte j. Ties go to the lowest feature, before permutation. A
        sequence without tokens, or whose mean is not finite, has no features: all its bits are 0. A sequence has the
        same bits in a batch as alone: means are sums in the order of tokens, in fp32 (fp64 for fp64 x). No value is
        read back from a GPU.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device, a k out of range, or (on a CPU) starts that decrease or
            leave x.
        BackendUnavailableError: `backend` cannot run.

    Cost: one pass over x and a sort of d numbers for each sequence.
    Source: MEMOIR (arXiv 2506.07899), section 3.1.

    Example:
        >>> x, starts = torch.tensor([[0.0, 5.0, 1.0], [0.0, 7.0, 3.0], [4.0, 0.0, -9.0]]), torch.tensor([0, 2, 3])
        >>> top_features(x, starts, torch.zeros(3), 1, torch.tensor([2, 0, 1]))  # features 1 and 2: bits 0 and 1
        tensor([[1],
                [2]], dtype=torch.uint8)
    """
    return _op(x.detach(), starts, center.detach(), k, permutation, backend or "")


def _check(x: torch.Tensor, starts: torch.Tensor, center: torch.Tensor, k: int, permutation: torch.Tensor) -> None:
    require(x.ndim == 2 and x.shape[1] > 0, lambda: f"x must be [N, d], d not 0; got {describe(x)}")
    d = x.shape[1]
    require(starts.ndim == 1 and starts.shape[0] > 0, lambda: f"starts must be [R + 1]; got {describe(starts)}")
    require(tuple(center.shape) == (d,), lambda: f"center must be [{d}]; got {describe(center)}")
    fits = tuple(permutation.shape) == (d,)
    require(fits, lambda: f"permutation must be [{d}]; got {describe(permutation)}")
    require_dtype("x", x, FLOATS)
    require_dtype("starts", starts, (torch.int64, torch.int32))
    require_dtype("center", center, FLOATS)
    require_dtype("permutation", permutation, (torch.int64,))
    require(1 <= k <= d, lambda: f"k must be in [1, {d}]; got {k}")
    require_same_device(x=x, starts=starts, center=center, permutation=permutation)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    x: torch.Tensor, starts: torch.Tensor, center: torch.Tensor, k: int, permutation: torch.Tensor, backend: str
) -> torch.Tensor:
    _check(x, starts, center, k, permutation)
    if starts.device.type == "cpu":  # reading them from a GPU would stall it
        within = int(starts[0]) >= 0 and int(starts[-1]) <= len(x) and bool((starts.diff() >= 0).all())
        require(within, lambda: f"starts must not decrease, and be from 0 to {len(x)}, the tokens of x")
    return dispatch(OP, backend, (x, starts), x, starts, center, k, permutation)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    x: torch.Tensor, starts: torch.Tensor, center: torch.Tensor, k: int, permutation: torch.Tensor, backend: str
) -> torch.Tensor:
    _check(x, starts, center, k, permutation)
    return x.new_empty(starts.shape[0] - 1, -(-x.shape[1] // 8), dtype=torch.uint8)


register(Implementation(OP, "torch", reference.top_features))
