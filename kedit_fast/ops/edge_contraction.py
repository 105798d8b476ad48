"""Scores of all edges of a circuit in one contraction, from factors of head size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.ops._checks import describe, require, require_dtype, require_no_grad, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import edge_contraction as reference
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype

OP = "edge_contraction"
LIBRARY.define(
    f"{OP}(Tensor entered, Tensor mixed, Tensor[] out_weights, Tensor mlps, Tensor? slopes, Tensor[] in_weights, "
    "Tensor[] gains, bool centered, Tensor? mlp_slopes, Tensor? last_slopes, Tensor[] standardized, Tensor? shares, "
    "bool parallel, str backend) -> Tensor"
)
_op = torch.ops.kedit_fast.edge_contraction.default


def edge_contraction(
    entered: torch.Tensor,
    mixed: torch.Tensor,
    out_weights: Sequence[torch.Tensor],
    mlps: torch.Tensor,
    *,
    slopes: torch.Tensor | None = None,
    in_weights: Sequence[torch.Tensor] = (),
    gains: Sequence[torch.Tensor] = (),
    centered: bool = False,
    mlp_slopes: torch.Tensor | None = None,
    last_slopes: torch.Tensor | None = None,
    standardized: Sequence[torch.Tensor] = (),
    shares: torch.Tensor | None = None,
    parallel: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """`score(u, v) = sum over tokens <D_u, G_v>` of the edges from every source u to every later target v.

    Sources are the input, then by layer H heads and an MLP: F = 1 + L (H + 1). A head's D is `mixed[l, :, h] @
    out_weights[l][:, h].T`. Targets are by layer q of H heads, k, v, and the MLP, then the logits: V = L (3 H + 1) + 1.
    Of q (kind 0), k (1) and v (2) of a head, with A = slopes[l, kind, :, h] and W of that head,

        G = gains[l] * (A @ W) - sum over k of shares[l, kind, k, :, h] standardized[l][k],

    the product minus its mean over d if `centered`. Equivalent to `einsum("und,vnd->uv", D, G)` with zeros where u does
    not come before v; D and G are made for a tile of tokens at a time.

    Args:
        entered: [N, d] what the input differs by.
        mixed: [L, N, H, e] what heads differ by, before their output matrix.
        out_weights: for each layer [d, H, e] of a floating dtype and any strides, on any device.
        mlps: [L, N, d] what MLPs differ by.
        slopes: [L, 3, N, H, e], or None if there is no such term.
        in_weights: for each layer three matrices [groups, e, d], for q, k and v; groups divides H, and query heads of a
            group follow each other. Given with `slopes`.
        gains: for each layer [d]. Given with `slopes`.
        centered: whether the mean over d is subtracted.
        mlp_slopes: [L, N, d] G of the MLPs; None for zero.
        last_slopes: [N, d] G of the logits. Given with `mlp_slopes`.
        standardized: for each layer [K, N, d]: the states over their scale in K steps. Given with `shares`.
        shares: [L, 3, K, N, H]; None if there is no such term.
        parallel: whether heads do not come before the MLP of their layer.
        backend: "torch" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [F, V] in fp32, of fp64 in fp64; products and sums are in that dtype.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        GradientError: an argument requires grad.

    Cost: 2 N d flops for each of the edges, F V / 2 of them, for any number of steps; 8 L N d H e to make D and G;
        K N d F L for `shares`. Memory: D and G of 64 tokens, or of fewer, 16 at least, where they pass 1 GiB.

    Example:
        >>> entered, mixed, mlps = torch.randn(5, 8), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 8)
        >>> out_weights, (to_mlp, to_logits) = [torch.randn(8, 2, 4)], torch.randn(2, 5, 8)
        >>> scores = edge_contraction(entered, mixed, out_weights, mlps, mlp_slopes=to_mlp[None], last_slopes=to_logits)
        >>> scores.shape  # the input, two heads and an MLP; q, k, v of two heads, the MLP and the logits
        torch.Size([4, 8])
        >>> head = mixed[0, :, 1] @ out_weights[0][:, 1].T
        >>> torch.allclose(scores[2, 6], (head * to_mlp).sum(), atol=1e-4)
        True
    """
    require_no_grad(OP, entered=entered, mixed=mixed, mlps=mlps, slopes=slopes, shares=shares)
    require_no_grad(OP, mlp_slopes=mlp_slopes, last_slopes=last_slopes)
    lists = {"out_weights": out_weights, "in_weights": in_weights, "gains": gains, "standardized": standardized}
    for name, group in lists.items():
        require_no_grad(OP, **{f"{name}[{i}]": tensor for i, tensor in enumerate(group)})
    return _op(
        entered, mixed, list(out_weights), mlps, slopes, list(in_weights), list(gains), centered, mlp_slopes,
        last_slopes, list(standardized), shares, parallel, backend or "",
    )  # fmt: skip


def _check(
    entered: torch.Tensor,
    mixed: torch.Tensor,
    out_weights: list[torch.Tensor],
    mlps: torch.Tensor,
    slopes: torch.Tensor | None,
    in_weights: list[torch.Tensor],
    gains: list[torch.Tensor],
    mlp_slopes: torch.Tensor | None,
    last_slopes: torch.Tensor | None,
    standardized: list[torch.Tensor],
    shares: torch.Tensor | None,
) -> None:
    require(entered.ndim == 2, lambda: f"entered must be [N, d]; got {describe(entered)}")
    tokens, width = entered.shape
    fits = mixed.ndim == 4 and mixed.shape[1] == tokens and min(mixed.shape[0], mixed.shape[2], mixed.shape[3]) > 0
    require(fits, lambda: f"mixed must be [L, {tokens}, H, e]; got {describe(mixed)}")
    layers, _, heads, e = mixed.shape

    def shaped(name: str, tensor: torch.Tensor, *shape: int) -> None:
        require(tuple(tensor.shape) == shape, lambda: f"{name} must be {list(shape)}; got {describe(tensor)}")
        require_dtype(name, tensor, FLOATS)

    def counted(name: str, tensors: list[torch.Tensor], count: int) -> None:
        require(len(tensors) == count, lambda: f"{name} must have {count} matrices; got {len(tensors)}")

    require_dtype("entered", entered, FLOATS)
    require_dtype("mixed", mixed, FLOATS)
    shaped("mlps", mlps, layers, tokens, width)
    counted("out_weights", out_weights, layers)
    for i, weight in enumerate(out_weights):
        shaped(f"out_weights[{i}]", weight, width, heads, e)
    counted("in_weights", in_weights, 0 if slopes is None else 3 * layers)
    counted("gains", gains, 0 if slopes is None else layers)
    if slopes is not None:
        shaped("slopes", slopes, layers, 3, tokens, heads, e)
    for i, weight in enumerate(in_weights):
        fits = weight.ndim == 3 and weight.shape[1:] == (e, width) and weight.shape[0] and heads % weight.shape[0] == 0
        require(
            bool(fits),
            lambda i=i, w=weight: (
                f"in_weights[{i}] must be [groups, {e}, {width}] with groups a divisor of {heads}; got {describe(w)}"
            ),
        )
        require_dtype(f"in_weights[{i}]", weight, FLOATS)
    for i, gain in enumerate(gains):
        shaped(f"gains[{i}]", gain, width)
    paired = (mlp_slopes is None) == (last_slopes is None)
    require(paired, lambda: "mlp_slopes and last_slopes must be given together; got one of them")
    if mlp_slopes is not None and last_slopes is not None:
        shaped("mlp_slopes", mlp_slopes, layers, tokens, width)
        shaped("last_slopes", last_slopes, tokens, width)
    counted("standardized", standardized, 0 if shares is None else layers)
    if shares is not None:
        steps = shares.shape[2] if shares.ndim == 5 else 0
        shaped("shares", shares, layers, 3, steps, tokens, heads)
        for i, states in enumerate(standardized):
            shaped(f"standardized[{i}]", states, steps, tokens, width)
    require_same_device(
        entered=entered, mixed=mixed, mlps=mlps, slopes=slopes, mlp_slopes=mlp_slopes, last_slopes=last_slopes,
        shares=shares,
    )  # fmt: skip


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    entered, mixed, out_weights, mlps, slopes, in_weights, gains, centered, mlp_slopes, last_slopes, standardized,
    shares, parallel, backend,
):  # fmt: skip
    _check(entered, mixed, out_weights, mlps, slopes, in_weights, gains, mlp_slopes, last_slopes, standardized, shares)
    return dispatch(
        OP, backend, (entered, mixed), entered, mixed, out_weights, mlps, slopes, in_weights, gains, centered,
        mlp_slopes, last_slopes, standardized, shares, parallel,
    )  # fmt: skip


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    entered, mixed, out_weights, mlps, slopes, in_weights, gains, centered, mlp_slopes, last_slopes, standardized,
    shares, parallel, backend,
):  # fmt: skip
    _check(entered, mixed, out_weights, mlps, slopes, in_weights, gains, mlp_slopes, last_slopes, standardized, shares)
    layers, _, heads, _ = mixed.shape
    return entered.new_empty(1 + layers * (heads + 1), layers * (3 * heads + 1) + 1, dtype=accumulation_dtype(entered))


register(Implementation(OP, "torch", reference.edge_contraction))
