"""Reference of `tail_attention`: attention of packed tails over fixed prefixes, laid out by rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kedit_fast.support.dtypes import accumulation_dtype


@dataclass(frozen=True)
class _Laid:
    """Where packed tokens stand among R rows of S places, behind P places of prefixes."""

    row: torch.Tensor
    """[N] the row of a token."""
    place: torch.Tensor
    """[N] its place in the row."""
    rows: int
    """R."""
    tail: int
    """S, the longest tail."""
    prefix_keys: torch.Tensor | None
    """[R groups, P, size]; None without prefixes."""
    prefix_values: torch.Tensor | None
    """[R groups, P, size]; None without prefixes."""
    masked: torch.Tensor
    """[R, 1, S, P + S] bool, where a query does not attend to a key."""

    def by_rows(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed tokens [N, heads, size] as [R, heads, S, size], zero elsewhere."""
        laid = packed.new_zeros(self.rows, packed.shape[1], self.tail, packed.shape[2])
        laid[self.row, :, self.place] = packed
        return laid

    def by_groups(self, packed: torch.Tensor, groups: int) -> torch.Tensor:
        """Packed tokens [N, heads, size] as [R groups, heads / groups * S, size]."""
        return self.by_rows(packed).view(self.rows * groups, -1, packed.shape[2])

    def packed(self, laid: torch.Tensor, heads: int) -> torch.Tensor:
        """The tokens of [R groups, heads / groups * S, size] as [N, heads, size]."""
        return laid.reshape(self.rows, heads, self.tail, -1)[self.row, :, self.place]

    def products(self, left: torch.Tensor, prefix: torch.Tensor | None, tail: torch.Tensor) -> torch.Tensor:
        """Rows of `left` times those of the prefix and of the tail: [R groups, .., P + S]."""
        of_tail = torch.bmm(left, tail.mT)
        return of_tail if prefix is None else torch.cat([torch.bmm(left, prefix.mT), of_tail], -1)

    def sums(self, weights: torch.Tensor, prefix: torch.Tensor | None, tail: torch.Tensor) -> torch.Tensor:
        """Weights [R groups, .., P + S] times rows of the prefix and of the tail."""
        of_tail = torch.bmm(weights[..., -self.tail :], tail)
        return of_tail if prefix is None else of_tail.baddbmm_(weights[..., : -self.tail], prefix)


def _laid_out(
    key: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    prefix_keys: torch.Tensor | None,
    prefix_values: torch.Tensor | None,
    spans: torch.Tensor | None,
    prefix_rows: torch.Tensor | None,
    window: int,
) -> _Laid:
    rows, tokens = len(starts) - 1, key.shape[0]
    lengths = starts.diff()
    row = torch.repeat_interleave(torch.arange(rows, device=key.device), lengths, output_size=tokens)
    place = torch.arange(tokens, device=key.device) - starts[row]
    tail = torch.arange(longest, device=key.device)
    at, is_key = tail.expand(rows, -1), tail < lengths[:, None]  # [R, S] places after the prefix
    parts = (None, None)
    if prefix_keys is not None and prefix_values is not None and spans is not None:
        if prefix_rows is not None:
            prefix_keys, prefix_values = prefix_keys[prefix_rows], prefix_values[prefix_rows]
        places = torch.arange(prefix_keys.shape[2], device=key.device)
        at = torch.cat([places - spans[:, 1:], at], 1)  # [R, P + S], negative before the tail
        is_key = torch.cat([(places >= spans[:, :1]) & (places < spans[:, 1:]), is_key], 1)
        parts = prefix_keys.flatten(0, 1), prefix_values.flatten(0, 1)
    distance = tail[:, None] - at[:, None]  # [R, S, P + S]
    visible = is_key[:, None] & (distance >= 0)
    if window:
        visible &= distance < window
    return _Laid(row, place, rows, longest, *parts, ~visible[:, None])


def _scores(
    products: torch.Tensor, laid: _Laid, heads: int, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Capped scores [R groups, .., P + S] in fp32 or fp64, the lowest number where masked; and tanh, with a cap."""
    scores = products.to(accumulation_dtype(products)).mul_(scale)
    bent = None
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores = bent * softcap
    scores.view(laid.rows, heads, laid.tail, -1).masked_fill_(laid.masked, torch.finfo(scores.dtype).min)
    return scores, bent


def tail_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    prefix_keys: torch.Tensor | None,
    prefix_values: torch.Tensor | None,
    spans: torch.Tensor | None,
    prefix_rows: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [N, heads, size], and [N, heads, 2]: the largest score and the reciprocal of the sum of exponentials."""
    heads, groups = query.shape[1], key.shape[1]
    if not query.shape[0]:
        return torch.empty_like(query), query.new_empty(0, heads, 2, dtype=accumulation_dtype(query))
    laid = _laid_out(key, starts, longest, prefix_keys, prefix_values, spans, prefix_rows, window)
    keys, values = (laid.by_groups(part, groups) for part in (key, value))
    products = laid.products(laid.by_groups(query, groups), laid.prefix_keys, keys)
    scores, _ = _scores(products, laid, heads, scale, softcap)
    weights = torch.softmax(scores, -1)
    normalizer = torch.stack([scores.amax(-1), weights.amax(-1)], -1)  # the largest weight is exp(0) / sum
    out = laid.sums(weights.to(query.dtype), laid.prefix_values, values)
    return laid.packed(out, heads), laid.packed(normalizer, heads)


def tail_attention_backward(
    grad: torch.Tensor,
    normalizer: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    prefix_keys: torch.Tensor | None,
    prefix_values: torch.Tensor | None,
    spans: torch.Tensor | None,
    prefix_rows: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by query, key and value, from that by the outputs."""
    heads, groups = query.shape[1], key.shape[1]
    if not query.shape[0]:
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    laid = _laid_out(key, starts, longest, prefix_keys, prefix_values, spans, prefix_rows, window)
    queries, keys, values, grads = (laid.by_groups(part, groups) for part in (query, key, value, grad))
    scores, bent = _scores(laid.products(queries, laid.prefix_keys, keys), laid, heads, scale, softcap)
    peak, inverse = laid.by_groups(normalizer, groups).split(1, -1)
    weights = scores.sub_(peak).exp_().mul_(inverse)  # 0 in places without a query, whose inverse is 0
    slopes = laid.products(grads, laid.prefix_values, values).to(weights.dtype)
    # torch makes no public function of this kernel.
    slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)  # pyright: ignore[reportPrivateImportUsage]
    if bent is not None:
        slopes = slopes * (1 - bent.square())
    slopes, weights = slopes.mul_(scale).to(query.dtype), weights.to(query.dtype)
    of_query = laid.packed(laid.sums(slopes, laid.prefix_keys, keys), heads)
    of_key = laid.packed(torch.bmm(slopes[..., -longest:].mT, queries), groups)
    of_value = laid.packed(torch.bmm(weights[..., -longest:].mT, grads), groups)
    return of_query, of_key, of_value
