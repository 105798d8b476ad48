from __future__ import annotations

import pytest
import torch

from kedit_fast import edge_contraction
from kedit_fast.reference.edge_contraction import edge_contraction as reference


def case(layers=3, heads=4, groups=2, e=4, d=20, tokens=7, steps=2, dtype=torch.float64):
    def of(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return dict(
        entered=of(tokens, d),
        mixed=of(layers, tokens, heads, e),
        out_weights=[of(d, heads * e).unflatten(1, (heads, e)) for _ in range(layers)],
        mlps=of(layers, tokens, d),
        slopes=of(layers, 3, tokens, heads, e),
        in_weights=[of(g, e, d) for _ in range(layers) for g in (heads, groups, groups)],
        gains=[of(d) for _ in range(layers)],
        mlp_slopes=of(layers, tokens, d),
        last_slopes=of(tokens, d),
        standardized=[of(steps, tokens, d) for _ in range(layers)],
        shares=of(layers, 3, steps, tokens, heads),
    )


def dense(entered, mixed, out_weights, mlps, slopes, in_weights, gains, mlp_slopes, last_slopes, standardized, shares,
          centered, parallel):  # fmt: skip
    """By the definition: every D [N, d], every G [N, d], and loops over edges."""
    layers, _, heads, _ = mixed.shape
    sources, targets = [(-1, "input", entered)], []
    for layer in range(layers):
        for h in range(heads):
            sources.append((layer, "head", mixed[layer, :, h] @ out_weights[layer][:, h].T))
        sources.append((layer, "mlp", mlps[layer]))
        for kind in range(3):
            for h in range(heads):
                weight = in_weights[3 * layer + kind]
                grown = gains[layer] * (slopes[layer, kind, :, h] @ weight[h * len(weight) // heads])
                grown = grown - grown.mean(-1, keepdim=True) if centered else grown
                for k in range(shares.shape[2]):
                    grown = grown - shares[layer, kind, k, :, h, None] * standardized[layer][k]
                targets.append((layer, "head", grown))
        targets.append((layer, "mlp", mlp_slopes[layer]))
    targets.append((layers, "logits", last_slopes))
    scores = torch.zeros(len(sources), len(targets), dtype=torch.float64)
    for i, (layer, kind, change) in enumerate(sources):
        for j, (other, reader, grown) in enumerate(targets):
            within = layer == other and (kind, reader) == ("head", "mlp") and not parallel
            if layer < other or within:
                scores[i, j] = (change * grown).sum()
    return scores


@pytest.mark.parametrize("parallel", (False, True))
@pytest.mark.parametrize("centered", (False, True))
@pytest.mark.parametrize(("layers", "tile_tokens", "group"), [(3, 1, 1), (3, 3, 30), (5, 64, 30), (1, 1, 1)])
def test_it_is_the_product_of_all_sources_and_later_targets(centered, parallel, layers, tile_tokens, group):
    args = case(layers)
    expected = dense(**args, centered=centered, parallel=parallel)
    result = reference(**args, centered=centered, parallel=parallel, tile_tokens=tile_tokens, group=group)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-11)


def test_terms_add_up():
    args = case()
    sources = {name: args[name] for name in ("entered", "mixed", "out_weights", "mlps")}
    first = {name: args[name] for name in ("slopes", "in_weights", "gains", "mlp_slopes", "last_slopes")}
    second = {name: args[name] for name in ("standardized", "shares")}
    whole = edge_contraction(**args, centered=True)
    parts = edge_contraction(**sources, **first, centered=True) + edge_contraction(**sources, **second)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-11)
    assert not bool(edge_contraction(**sources).any())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_sums_are_in_fp32(dtype, bound):
    args = case(dtype=dtype)
    wide = {
        name: [part.double() for part in value] if isinstance(value, list) else value.double()
        for name, value in args.items()
    }
    expected = dense(**wide, centered=True, parallel=False)
    result = edge_contraction(**args, centered=True)
    assert result.dtype == torch.float32
    assert float((result - expected).abs().max()) < bound * float(expected.abs().max())


def test_no_tokens_give_zeros():
    result = edge_contraction(**case(tokens=0))
    assert result.shape == (16, 40) and not bool(result.any())


def test_a_tile_has_fewer_tokens_where_memory_is_short():
    args = case(tokens=40)
    expected = reference(**args, centered=False, parallel=False)
    torch.testing.assert_close(
        reference(**args, centered=False, parallel=False, tile_bytes=1), expected, rtol=1e-12, atol=1e-10
    )
