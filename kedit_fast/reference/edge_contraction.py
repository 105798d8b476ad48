"""Reference of `edge_contraction`: scores of all edges of a circuit, from factors of head size.

What source u puts out differs by D_u [N, d]: D_u = dz_h W_O,h of a head. What target v reads has the slope G_v [N, d]:
G_v = gain * (a_h W_h) of a head, minus its mean for a LayerNorm. Score(u, v) = <D_u, G_v>, a product over tokens and d,
for u before v. D and G of a tile of tokens are made at a time, so nothing of size N H d is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_fast.support.dtypes import accumulation_dtype

TILE_BYTES = 32 * 2**20
"""Bytes of D and G of one tile of tokens."""


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
) -> torch.Tensor:
    """Return scores [F, V], zero where source u is not before target v; shapes as in `kedit_fast.ops`."""
    layers, tokens, heads, _ = mixed.shape
    width, dtype = entered.shape[-1], accumulation_dtype(entered)
    sources, per_source, per_target = 1 + layers * (heads + 1), heads + 1, 3 * heads + 1
    scores = torch.zeros(sources, layers * per_target + 1, dtype=dtype, device=entered.device)
    of_mlps = torch.zeros(sources, layers + 1, dtype=dtype, device=entered.device)
    rows = sources + 3 * heads + layers + 1  # of D and G, each [tile, d]
    step = max(1, tile_bytes // (rows * width * dtype.itemsize))
    step = -(-tokens // -(-tokens // step)) if tokens else 1  # tiles of one size
    for begin in range(0, tokens, step):
        at = slice(begin, min(begin + step, tokens))
        size = at.stop - begin
        changes = _changes(entered[at], mixed[:, at], out_weights, mlps[:, at], dtype)  # [F, tile, d]
        flat = changes.view(sources, size * width)
        for layer in range(layers):
            before = 1 + layer * per_source
            block = scores[:before, layer * per_target : layer * per_target + 3 * heads]
            if slopes is not None:
                weights = in_weights[3 * layer : 3 * layer + 3]
                grown = _grown(slopes[layer, :, at], weights, gains[layer], centered, dtype)  # [3H, tile, d]
                block.addmm_(flat[:before], grown.view(3 * heads, size * width).T)
            if shares is not None:
                states = standardized[layer][:, at].to(entered.device, dtype)  # [K, tile, d]
                along = torch.bmm(changes[:before].transpose(0, 1), states.permute(1, 2, 0))  # [tile, U, K]
                share = shares[layer, :, :, at].to(dtype).permute(2, 1, 0, 3)  # [tile, K, 3, H]
                block.sub_(torch.mm(along.transpose(0, 1).reshape(before, -1), share.reshape(-1, 3 * heads)))
        if mlp_slopes is not None and last_slopes is not None:
            of_nodes = torch.cat([mlp_slopes[:, at].to(dtype), last_slopes[None, at].to(dtype)])  # [L + 1, tile, d]
            of_mlps.addmm_(flat, of_nodes.view(layers + 1, size * width).T)
    for layer in range(layers):
        before = 1 + layer * per_source + (0 if parallel else heads)
        scores[:before, (layer + 1) * per_target - 1] = of_mlps[:before, layer]
    scores[:, -1] = of_mlps[:, -1]
    return scores


def _changes(
    entered: torch.Tensor,
    mixed: torch.Tensor,
    out_weights: Sequence[torch.Tensor],
    mlps: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """D of a tile [F, tile, d]."""
    layers, size, heads, _ = mixed.shape
    changes = entered.new_empty(1 + layers * (heads + 1), size, entered.shape[-1], dtype=dtype)
    changes[0] = entered
    for layer, weight in enumerate(out_weights):
        first = 1 + layer * (heads + 1)
        by_head = weight.to(entered.device, dtype).permute(1, 2, 0)  # [H, e, d]
        torch.bmm(mixed[layer].to(dtype).transpose(0, 1), by_head, out=changes[first : first + heads])
        changes[first + heads] = mlps[layer]
    return changes


def _grown(
    slopes: torch.Tensor, weights: Sequence[torch.Tensor], gain: torch.Tensor, centered: bool, dtype: torch.dtype
) -> torch.Tensor:
    """G of a tile and layer [3 H, tile, d], from slopes [3, tile, H, e]."""
    _, size, heads, e = slopes.shape
    grown = slopes.new_empty(3 * heads, size, gain.shape[0], dtype=dtype)
    for kind, weight in enumerate(weights):  # [groups, e, d]
        groups = weight.shape[0]
        by_group = slopes[kind].to(dtype).transpose(0, 1).reshape(groups, heads // groups * size, e)
        part = grown[kind * heads : (kind + 1) * heads].view(groups, -1, gain.shape[0])
        torch.bmm(by_group, weight.to(slopes.device, dtype), out=part)
    grown *= gain.to(slopes.device, dtype)
    if centered:
        grown -= grown.mean(-1, keepdim=True)
    return grown
