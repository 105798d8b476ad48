"""Reference of `edge_contraction`: scores of all edges of a circuit, from factors of head size.

What source u puts out differs by D_u [N, d]: D_u = dz_h W_O,h of a head. What target v reads has the slope G_v [N, d]:
G_v = gain * (a_h W_h) of a head, minus its mean for a LayerNorm. Score(u, v) = <D_u, G_v>, a product over tokens and d,
for u before v. D and G of a tile of tokens are made at a time, so nothing of size N H d is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_fast.support.dtypes import accumulation_dtype

TILE_TOKENS = 64
"""Tokens of a tile: weights are read once for each, and products of few tokens are slow."""
TILE_BYTES = 2**30
"""Bytes of D and G of one tile, for which it has fewer tokens, but `LEAST_TOKENS`."""
LEAST_TOKENS = 16
GROUP = 192
"""Columns of G that are made at a time, in whole layers: products with fewer columns are slow."""


def edge_contraction(
    entered: torch.Tensor,
    mixed: torch.Tensor,
    out_weights: Sequence[torch.Tensor],
    mlps: torch.Tensor,
    slopes: torch.Tensor | None,
    in_weights: Sequence[torch.Tensor],
    gains: Sequence[torch.Tensor],
    centered: bool,
    mlp_slopes: torch.Tensor | None,
    last_slopes: torch.Tensor | None,
    standardized: Sequence[torch.Tensor],
    shares: torch.Tensor | None,
    parallel: bool,
    tile_bytes: int = TILE_BYTES,
    tile_tokens: int = TILE_TOKENS,
    group: int = GROUP,
) -> torch.Tensor:
    """Return scores [F, V], zero where source u is not before target v; shapes as in `kedit_fast.ops`."""
    layers, tokens, heads, _ = mixed.shape
    width, dtype = entered.shape[-1], accumulation_dtype(entered)
    sources, per_source, per_target = 1 + layers * (heads + 1), heads + 1, 3 * heads + 1
    targets = layers * per_target + 1
    scores = torch.zeros(sources, targets, dtype=dtype, device=entered.device)
    has_slopes = slopes is not None or mlp_slopes is not None
    together = min(layers, -(-group // per_target))  # layers of a group
    rows = sources + (together * per_target + 1 if has_slopes else 0)  # of D and G, each [tile, d]
    step = min(tile_tokens, max(LEAST_TOKENS, tile_bytes // (rows * width * dtype.itemsize)))
    step = -(-tokens // -(-tokens // step)) if tokens else 1  # tiles of one size
    # Made once: fresh memory costs as much as the products that fill it.
    all_changes = entered.new_empty(sources * step * width, dtype=dtype)
    all_grown = entered.new_empty((rows - sources) * step * width, dtype=dtype)
    for begin in range(0, tokens, step):
        at = slice(begin, min(begin + step, tokens))
        size = at.stop - begin
        changes = all_changes[: sources * size * width].view(sources, size, width)  # D
        _change(changes, entered[at], mixed[:, at], out_weights, mlps[:, at])
        for layer in range(layers if shares is not None else 0):
            assert shares is not None
            before = 1 + layer * per_source
            states = standardized[layer][:, at].to(entered.device, dtype)  # [K, tile, d]
            along = torch.bmm(changes[:before].transpose(0, 1), states.permute(1, 2, 0))  # [tile, U, K]
            share = shares[layer, :, :, at].to(dtype).permute(2, 1, 0, 3)  # [tile, K, 3, H]
            block = scores[:before, layer * per_target : layer * per_target + 3 * heads]
            block.sub_(torch.mm(along.transpose(0, 1).reshape(before, -1), share.reshape(-1, 3 * heads)))
        for first in range(0, layers if has_slopes else 0, together):
            past = min(first + together, layers)
            is_last = past == layers
            count = (past - first) * per_target + is_last
            grown = all_grown[: count * size * width].view(count, size, width)  # G, in the order of the columns
            for layer in range(first, past):
                of_layer = grown[(layer - first) * per_target :][:per_target]
                if slopes is None:
                    of_layer.zero_()
                else:
                    weights = in_weights[3 * layer : 3 * layer + 3]
                    _grow(of_layer[:-1], slopes[layer, :, at], weights, gains[layer], centered)
                of_layer[-1] = 0 if mlp_slopes is None else mlp_slopes[layer, at]
            if is_last:
                grown[-1] = 0 if last_slopes is None else last_slopes[at]
            columns = scores[:, first * per_target :][:, :count]
            _add_products(columns, changes.view(sources, -1), grown.view(count, -1), first, past, heads, parallel)
    return scores


def _add_products(
    columns: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    first: int,
    past: int,
    heads: int,
    parallel: bool,
) -> None:
    """columns += left right^T at edges that exist, into layers [first, past).

    `left` is D [F, tile d], `right` G [columns, tile d]. Sources below these layers meet all of them in one product. Of
    the layers themselves, all sources of the lower half meet all targets of the upper half, and so on in each half: no
    product is of edges that do not exist. The logits stand behind the last layer, as one more.
    """
    per_source, per_target = heads + 1, 3 * heads + 1
    end = past + (right.shape[0] > (past - first) * per_target)  # one more with the logits

    def add(begin: int, stop: int, targets: slice) -> None:
        columns[begin:stop, targets].addmm_(left[begin:stop], right[targets].T)

    def below(lower: int, upper: int) -> None:
        if upper - lower == 1:
            return
        middle = (lower + upper) // 2
        targets = slice((middle - first) * per_target, (upper - first) * per_target)
        add(1 + lower * per_source, 1 + middle * per_source, targets)
        below(lower, middle)
        below(middle, upper)

    add(0, 1 + first * per_source, slice(None))
    below(first, end)
    for layer in range(first, first if parallel else past):
        begin, mlp = 1 + layer * per_source, (layer - first + 1) * per_target - 1
        add(begin, begin + heads, slice(mlp, mlp + 1))


def _change(
    changes: torch.Tensor,
    entered: torch.Tensor,
    mixed: torch.Tensor,
    out_weights: Sequence[torch.Tensor],
    mlps: torch.Tensor,
) -> None:
    """Write D of a tile [F, tile, d]."""
    heads = mixed.shape[2]
    changes[0] = entered
    for layer, weight in enumerate(out_weights):
        first = 1 + layer * (heads + 1)
        by_head = weight.to(changes.device, changes.dtype).permute(1, 2, 0)  # [H, e, d]
        torch.bmm(mixed[layer].to(changes.dtype).transpose(0, 1), by_head, out=changes[first : first + heads])
        changes[first + heads] = mlps[layer]


def _grow(
    grown: torch.Tensor,
    slopes: torch.Tensor,
    weights: Sequence[torch.Tensor],
    gain: torch.Tensor,
    centered: bool,
) -> None:
    """Write G of a tile and layer [3 H, tile, d], from slopes [3, tile, H, e]."""
    _, size, heads, e = slopes.shape
    for kind, weight in enumerate(weights):  # [groups, e, d]
        groups = weight.shape[0]
        by_group = slopes[kind].to(grown.dtype).transpose(0, 1).reshape(groups, heads // groups * size, e)
        part = grown[kind * heads : (kind + 1) * heads].view(groups, -1, grown.shape[-1])
        torch.bmm(by_group, weight.to(grown.device, grown.dtype), out=part)
    grown *= gain.to(grown.device, grown.dtype)
    if centered:
        grown -= grown.mean(-1, keepdim=True)
