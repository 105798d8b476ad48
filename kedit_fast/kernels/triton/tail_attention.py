"""Attention of packed tails over fixed prefixes: a program takes queries of one row and one group of heads.

Weights are never stored: the forward pass sums exponentials online, and the backward passes compute weights again from
each query's largest score and the reciprocal of its sum. Gradients by queries and those by keys and values are two
kernels, each of which writes what is its own: no atomic additions, so bits do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import dot, narrow, tanh
from kedit_fast.kernels.triton.configs import TAIL, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, run, size_class


@triton.jit
def _rows(base, index, stride, inside, size, SIZE: tl.constexpr):
    """Rows [index, SIZE] of contiguous numbers, zeros outside."""
    column = tl.arange(0, SIZE)
    return tl.load(
        base + index.to(tl.int64)[:, None] * stride + column[None, :],
        mask=inside[:, None] & (column < size)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _scores(
    q, k, position, key_position, inside, scale, softcap, window,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRODUCTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Capped scores [M, N], -inf where a query does not attend to a key; and their slopes by products."""
    scores = dot(q, tl.trans(k), tl.zeros((M, N), tl.float32), PRODUCTS, INTERPRET) * scale
    bend = tl.full((M, N), 1.0, tl.float32)
    if CAPPED:
        bent = tanh(scores / softcap)
        scores = bent * softcap
        bend = 1 - bent * bent
    distance = position[:, None] - key_position[None, :]
    visible = inside[None, :] & (distance >= 0)
    if WINDOWED:
        visible = visible & (distance < window)
    return tl.where(visible, scores, float("-inf")), bend * scale


@triton.jit
def _attend(
    q, peak, total, sums, position, keys, values, key_stride, value_stride, begin, end, origin, size,
    scale, softcap, window, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRODUCTS: tl.constexpr,
    SUM_PRODUCTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add places [begin, end) to an online softmax; `origin` is the place of position 0."""
    for first in range(begin, end, N):
        place = first + tl.arange(0, N)
        inside = place < end
        k = _rows(keys, place, key_stride, inside, size, SIZE)
        scores, _ = _scores(
            q, k, position, place - origin, inside, scale, softcap, window, CAPPED, WINDOWED, PRODUCTS, M, N, INTERPRET
        )
        top = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp(peak - base)
        weights = tl.exp(scores - base[:, None])
        total = total * fade + tl.sum(weights, 1)
        v = _rows(values, place, value_stride, inside, size, SIZE)
        sums = dot(weights, v, sums * fade[:, None], SUM_PRODUCTS, INTERPRET)
        peak = top
    return peak, total, sums


@triton.jit
def _task(program, starts, tokens, groups, tiles, LENGTH: tl.constexpr):
    """Row, group, first token, tail and tile of a program; the tile is of LENGTH queries or keys."""
    row = (program // (groups * tiles)).to(tl.int64)
    group = (program // tiles % groups).to(tl.int64)
    first = tl.maximum(tl.load(starts + row), 0)
    tail = tl.maximum(tl.minimum(tl.load(starts + row + 1), tokens) - first, 0).to(tl.int32)
    return row, group, first, tail, program % tiles * LENGTH


@triton.jit
def _prefix(row, spans, prefix_rows, stored, places, PREFIX: tl.constexpr, INDEXED: tl.constexpr):
    """Which prefix a row has, and its places; none are read outside the prefixes, whatever is given."""
    at = row
    begin = 0
    end = 0
    if PREFIX:
        if INDEXED:
            at = tl.load(prefix_rows + row)
        at = tl.minimum(tl.maximum(at, 0), stored - 1)
        begin = tl.maximum(tl.load(spans + 2 * row), 0).to(tl.int32)
        end = tl.minimum(tl.load(spans + 2 * row + 1), places).to(tl.int32)
    return at, begin, end


@triton.jit
def _forward_kernel(
    query, key, value, starts, prefix_keys, prefix_values, spans, prefix_rows, out, normalizer,
    tokens, groups, size, tiles, stored, places, scale, softcap, window,
    query_token, query_head, key_token, key_group, value_token, value_group,
    prefix_key_row, prefix_key_group, prefix_key_place, prefix_value_row, prefix_value_group, prefix_value_place,
    SHARE: tl.constexpr, PREFIX: tl.constexpr, INDEXED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    PRODUCTS: tl.constexpr, SUM_PRODUCTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, group, first, tail, m0 = _task(program, starts, tokens, groups, tiles, M)  # pyright: ignore[reportGeneralTypeIssues] - triton compiles it
    at, begin, end = _prefix(row, spans, prefix_rows, stored, places, PREFIX, INDEXED)
    m = m0 + tl.arange(0, M)
    position = m // SHARE
    inside = position < tail
    token = first + position
    head = group * SHARE + m % SHARE
    q = _rows(query, token * query_token + head * query_head, 1, inside, size, SIZE)
    peak = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, SIZE), tl.float32)
    if PREFIX:
        used = tl.where(m0 < tail * SHARE, end, begin)
        peak, total, sums = _attend(
            q, peak, total, sums, position,
            prefix_keys + at * prefix_key_row + group * prefix_key_group,
            prefix_values + at * prefix_value_row + group * prefix_value_group,
            prefix_key_place, prefix_value_place, begin, used, end, size, scale, softcap, window,
            CAPPED, WINDOWED, PRODUCTS, SUM_PRODUCTS, M, N, SIZE, INTERPRET,
        )  # fmt: skip
    last = tl.where(m0 < tail * SHARE, tl.minimum((m0 + M - 1) // SHARE + 1, tail), 0)
    peak, total, sums = _attend(
        q, peak, total, sums, position, key + first * key_token + group * key_group,
        value + first * value_token + group * value_group, key_token, value_token, 0, last, 0, size,
        scale, softcap, window, CAPPED, WINDOWED, PRODUCTS, SUM_PRODUCTS, M, N, SIZE, INTERPRET,
    )  # fmt: skip
    inverse = 1 / tl.where(inside, total, 1.0)
    at_head = token * groups * SHARE + head
    column = tl.arange(0, SIZE)
    tl.store(
        out + (at_head * size)[:, None] + column[None, :],
        narrow(sums * inverse[:, None], out.dtype.element_ty, INTERPRET),
        mask=inside[:, None] & (column < size)[None, :],
    )  # fmt: skip
    tl.store(normalizer + 2 * at_head, peak, mask=inside)
    tl.store(normalizer + 2 * at_head + 1, inverse, mask=inside)


@triton.jit
def _slopes(
    q, g, k, v, peak, inverse, position, key_position, inside, scale, softcap, window,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRODUCTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Weights [M, N], slopes by them, and slopes of scores by products."""
    scores, bend = _scores(  # pyright: ignore[reportGeneralTypeIssues] - triton compiles it
        q, k, position, key_position, inside, scale, softcap, window, CAPPED, WINDOWED, PRODUCTS, M, N, INTERPRET
    )
    weights = tl.exp(scores - peak[:, None]) * inverse[:, None]
    return weights, dot(g, tl.trans(v), tl.zeros((M, N), tl.float32), PRODUCTS, INTERPRET), bend


@triton.jit
def _add_mean(
    q, g, mean, peak, inverse, position, keys, values, key_stride, value_stride, begin, end, origin, size,
    scale, softcap, window, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRODUCTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the mean of slopes over the weights of places [begin, end)."""
    for first in range(begin, end, N):
        place = first + tl.arange(0, N)
        inside = place < end
        k = _rows(keys, place, key_stride, inside, size, SIZE)
        v = _rows(values, place, value_stride, inside, size, SIZE)
        weights, slopes, _ = _slopes(
            q, g, k, v, peak, inverse, position, place - origin, inside, scale, softcap, window,
            CAPPED, WINDOWED, PRODUCTS, M, N, INTERPRET,
        )  # fmt: skip
        mean += tl.sum(weights * slopes, 1)
    return mean


@triton.jit
def _add_query(
    q, g, total, mean, peak, inverse, position, keys, values, key_stride, value_stride, begin, end, origin, size,
    scale, softcap, window, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRODUCTS: tl.constexpr,
    SUM_PRODUCTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add what places [begin, end) give to the gradient by queries."""
    for first in range(begin, end, N):
        place = first + tl.arange(0, N)
        inside = place < end
        k = _rows(keys, place, key_stride, inside, size, SIZE)
        v = _rows(values, place, value_stride, inside, size, SIZE)
        weights, slopes, bend = _slopes(
            q, g, k, v, peak, inverse, position, place - origin, inside, scale, softcap, window,
            CAPPED, WINDOWED, PRODUCTS, M, N, INTERPRET,
        )  # fmt: skip
        total = dot(weights * (slopes - mean[:, None]) * bend, k, total, SUM_PRODUCTS, INTERPRET)
    return total


@triton.jit
def _query_kernel(
    grad, normalizer, query, key, value, starts, prefix_keys, prefix_values, spans, prefix_rows, of_query, means,
    tokens, groups, size, tiles, stored, places, scale, softcap, window,
    grad_token, grad_head, query_token, query_head, key_token, key_group, value_token, value_group,
    prefix_key_row, prefix_key_group, prefix_key_place, prefix_value_row, prefix_value_group, prefix_value_place,
    SHARE: tl.constexpr, PREFIX: tl.constexpr, INDEXED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    PRODUCTS: tl.constexpr, SUM_PRODUCTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, group, first, tail, m0 = _task(program, starts, tokens, groups, tiles, M)  # pyright: ignore[reportGeneralTypeIssues] - triton compiles it
    at, begin, end = _prefix(row, spans, prefix_rows, stored, places, PREFIX, INDEXED)
    m = m0 + tl.arange(0, M)
    position = m // SHARE
    inside = position < tail
    token = first + position
    head = group * SHARE + m % SHARE
    at_head = token * groups * SHARE + head
    q = _rows(query, token * query_token + head * query_head, 1, inside, size, SIZE)
    g = _rows(grad, token * grad_token + head * grad_head, 1, inside, size, SIZE)
    peak = tl.load(normalizer + 2 * at_head, mask=inside, other=0.0)
    inverse = tl.load(normalizer + 2 * at_head + 1, mask=inside, other=0.0)
    of_keys = key + first * key_token + group * key_group
    of_values = value + first * value_token + group * value_group
    last = tl.where(m0 < tail * SHARE, tl.minimum((m0 + M - 1) // SHARE + 1, tail), 0)
    used = tl.where(m0 < tail * SHARE, end, begin)
    in_keys = prefix_keys + at * prefix_key_row + group * prefix_key_group
    in_values = prefix_values + at * prefix_value_row + group * prefix_value_group
    mean = tl.zeros((M,), tl.float32)
    if PREFIX:
        mean = _add_mean(
            q, g, mean, peak, inverse, position, in_keys, in_values, prefix_key_place, prefix_value_place,
            begin, used, end, size, scale, softcap, window, CAPPED, WINDOWED, PRODUCTS, M, N, SIZE, INTERPRET,
        )  # fmt: skip
    mean = _add_mean(
        q, g, mean, peak, inverse, position, of_keys, of_values, key_token, value_token,
        0, last, 0, size, scale, softcap, window, CAPPED, WINDOWED, PRODUCTS, M, N, SIZE, INTERPRET,
    )  # fmt: skip
    total = tl.zeros((M, SIZE), tl.float32)
    if PREFIX:
        total = _add_query(
            q, g, total, mean, peak, inverse, position, in_keys, in_values, prefix_key_place, prefix_value_place,
            begin, used, end, size, scale, softcap, window, CAPPED, WINDOWED, PRODUCTS, SUM_PRODUCTS, M, N, SIZE,
            INTERPRET,
        )  # fmt: skip
    total = _add_query(
        q, g, total, mean, peak, inverse, position, of_keys, of_values, key_token, value_token,
        0, last, 0, size, scale, softcap, window, CAPPED, WINDOWED, PRODUCTS, SUM_PRODUCTS, M, N, SIZE, INTERPRET,
    )  # fmt: skip
    column = tl.arange(0, SIZE)
    tl.store(
        of_query + (at_head * size)[:, None] + column[None, :], narrow(total, of_query.dtype.element_ty, INTERPRET),
        mask=inside[:, None] & (column < size)[None, :],
    )  # fmt: skip
    tl.store(means + at_head, mean, mask=inside)


@triton.jit
def _key_kernel(
    grad, normalizer, means, query, key, value, starts, of_key, of_value,
    tokens, groups, size, tiles, scale, softcap, window,
    grad_token, grad_head, query_token, query_head, key_token, key_group, value_token, value_group,
    SHARE: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRODUCTS: tl.constexpr,
    SUM_PRODUCTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    _row, group, first, tail, n0 = _task(program, starts, tokens, groups, tiles, N)  # pyright: ignore[reportGeneralTypeIssues] - triton compiles it
    place = n0 + tl.arange(0, N)
    is_key = place < tail
    k = _rows(key, (first + place) * key_token + group * key_group, 1, is_key, size, SIZE)
    v = _rows(value, (first + place) * value_token + group * value_group, 1, is_key, size, SIZE)
    of_keys = tl.zeros((N, SIZE), tl.float32)
    of_values = tl.zeros((N, SIZE), tl.float32)
    last = tail
    if WINDOWED:
        last = tl.minimum(tail, n0 + N - 1 + window)
    for m0 in range(n0 * SHARE, last * SHARE, M):
        m = m0 + tl.arange(0, M)
        position = m // SHARE
        inside = position < tail
        token = first + position
        head = group * SHARE + m % SHARE
        at_head = token * groups * SHARE + head
        q = _rows(query, token * query_token + head * query_head, 1, inside, size, SIZE)
        g = _rows(grad, token * grad_token + head * grad_head, 1, inside, size, SIZE)
        peak = tl.load(normalizer + 2 * at_head, mask=inside, other=0.0)
        inverse = tl.load(normalizer + 2 * at_head + 1, mask=inside, other=0.0)
        mean = tl.load(means + at_head, mask=inside, other=0.0)
        weights, slopes, bend = _slopes(
            q, g, k, v, peak, inverse, position, place, is_key, scale, softcap, window,
            CAPPED, WINDOWED, PRODUCTS, M, N, INTERPRET,
        )  # fmt: skip
        weights = tl.where(inside[:, None], weights, 0.0)
        slopes = weights * (slopes - mean[:, None]) * bend
        of_keys = dot(tl.trans(slopes), q, of_keys, SUM_PRODUCTS, INTERPRET)
        of_values = dot(tl.trans(weights), g, of_values, SUM_PRODUCTS, INTERPRET)
    column = tl.arange(0, SIZE)
    to = (((first + place) * groups + group) * size)[:, None] + column[None, :]
    mask = is_key[:, None] & (column < size)[None, :]
    tl.store(of_key + to, narrow(of_keys, of_key.dtype.element_ty, INTERPRET), mask=mask)
    tl.store(of_value + to, narrow(of_values, of_value.dtype.element_ty, INTERPRET), mask=mask)


Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor | None, torch.Tensor | None,
    torch.Tensor | None, torch.Tensor | None, float, float, int,
]  # fmt: skip
"""Query, key, value, starts, longest, prefix_keys, prefix_values, spans, prefix_rows, scale, softcap, window."""


def shape_class(query: torch.Tensor) -> str:
    """The rows of the configurations' table: "native" for 16-bit numbers, else "split"; wider with larger heads."""
    size = query.shape[2]
    kind = "split" if query.dtype == torch.float32 else "native"
    return kind + ("_widest" if size > 128 else "_wide" if size > 64 else "")


def _shared(inputs: Inputs, config: Config) -> tuple[dict, dict, dict, dict]:
    """Arguments of all kernels, those of prefixes, constants of all, and those of prefixes."""
    query, key, value, starts, _, prefix_keys, prefix_values, spans, prefix_rows, scale, softcap, window = inputs
    tokens, heads, size = query.shape
    groups = key.shape[1]
    common = {
        "query": query, "key": key, "value": value, "starts": starts, "tokens": tokens, "groups": groups, "size": size,
        "scale": scale, "softcap": softcap, "window": window, "query_token": query.stride(0),
        "query_head": query.stride(1), "key_token": key.stride(0), "key_group": key.stride(1),
        "value_token": value.stride(0), "value_group": value.stride(1),
    }  # fmt: skip
    names = [f"prefix_{part}_{side}" for part in ("key", "value") for side in ("row", "group", "place")]
    if prefix_keys is None or prefix_values is None or spans is None:
        prefixes = {"prefix_keys": key, "prefix_values": value, "spans": starts, "prefix_rows": starts}
        prefixes |= {"stored": 1, "places": 0, **dict.fromkeys(names, 0)}
    else:
        strides = (*prefix_keys.stride()[:3], *prefix_values.stride()[:3])
        prefixes = {
            "prefix_keys": prefix_keys, "prefix_values": prefix_values, "spans": spans,
            "prefix_rows": starts if prefix_rows is None else prefix_rows, "stored": prefix_keys.shape[0],
            "places": prefix_keys.shape[2], **dict(zip(names, strides, strict=True)),
        }  # fmt: skip
    native = query.dtype != torch.float32
    constants = {
        "SHARE": heads // groups, "CAPPED": softcap > 0, "WINDOWED": window > 0, "PRODUCTS": 1 if native else 6,
        "SUM_PRODUCTS": 3 if query.dtype == torch.bfloat16 else 6, "M": config.m, "N": config.n,
        "SIZE": max(16, triton.next_power_of_2(size)), "INTERPRET": INTERPRET,
    }  # fmt: skip
    return common, prefixes, constants, {"PREFIX": prefix_keys is not None, "INDEXED": prefix_rows is not None}


def _tiles(inputs: Inputs, length: int, share: int) -> tuple[int, tuple[int]]:
    """Tiles of a row and a group, and the grid."""
    tiles = ceil_div(inputs[4] * share, length)
    return tiles, ((len(inputs[3]) - 1) * inputs[1].shape[1] * tiles,)


def launches(inputs: Inputs, out: torch.Tensor, normalizer: torch.Tensor, config: Config) -> list[Launch]:
    """The launch that fills `out` and `normalizer`."""
    common, prefixes, constants, flags = _shared(inputs, config)
    tiles, grid = _tiles(inputs, config.m, constants["SHARE"])
    arguments = {**common, **prefixes, "out": out, "normalizer": normalizer, "tiles": tiles}
    return [Launch(_forward_kernel, grid, arguments, {**constants, **flags}, config)]


def backward_launches(
    inputs: Inputs, grad: torch.Tensor, normalizer: torch.Tensor, results: tuple[torch.Tensor, ...], config: Config
) -> list[Launch]:
    """The launches that fill `results`: means of slopes [N, heads], then gradients by query, key and value."""
    means, of_query, of_key, of_value = results
    common, prefixes, constants, flags = _shared(inputs, config)
    common |= {
        "grad": grad, "normalizer": normalizer, "means": means, "grad_token": grad.stride(0),
        "grad_head": grad.stride(1),
    }  # fmt: skip
    tiles, grid = _tiles(inputs, config.m, constants["SHARE"])
    key_tiles, key_grid = _tiles(inputs, config.n, 1)
    of_queries = {**common, **prefixes, "of_query": of_query, "tiles": tiles}
    of_keys = {**common, "of_key": of_key, "of_value": of_value, "tiles": key_tiles}
    return [
        Launch(_query_kernel, grid, of_queries, {**constants, **flags}, config),
        Launch(_key_kernel, key_grid, of_keys, constants, config),
    ]


def _by_numbers(inputs: tuple) -> Inputs:
    """The same with numbers of a head contiguous, and indices too."""
    query, key, value, starts, longest, prefix_keys, prefix_values, spans, prefix_rows, *rest = inputs
    rows = [
        part if part is None or part.stride(-1) == 1 else part.contiguous()
        for part in (query, key, value, prefix_keys, prefix_values)
    ]
    indices = [part if part is None else part.contiguous() for part in (starts, spans, prefix_rows)]
    return (*rows[:3], indices[0], longest, *rows[3:], *indices[1:], *rest)  # pyright: ignore[reportReturnType] - unpacked


def tail_attention(*given) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op of the same name; see kedit_fast/ops/tail_attention.py."""
    inputs = _by_numbers(given)
    query = inputs[0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    normalizer = torch.empty(*query.shape[:2], 2, dtype=torch.float32, device=query.device)
    if not query.shape[0] or not inputs[4]:
        return out, normalizer

    def plan(config: Config) -> list[Launch]:
        return launches(inputs, out, normalizer, config)

    run(plan(choose(TAIL, shape_class(query), query.device, plan, _size("forward", inputs))), query.device)
    return out, normalizer


def tail_attention_backward(
    grad: torch.Tensor, normalizer: torch.Tensor, *given
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward pass of the op; see kedit_fast/ops/tail_attention.py."""
    inputs = _by_numbers(given)
    query, key = inputs[:2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    of_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    of_key, of_value = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
    means = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if not query.shape[0] or not inputs[4]:
        return of_query, of_key, of_value

    def plan(config: Config) -> list[Launch]:
        return backward_launches(inputs, grad, normalizer, (means, of_query, of_key, of_value), config)

    run(
        plan(choose(TAIL, f"backward_{shape_class(query)}", query.device, plan, _size("backward", inputs))),
        query.device,
    )
    return of_query, of_key, of_value


def _size(way: str, inputs: Inputs) -> str:
    query, key, tail = inputs[0], inputs[1], inputs[4]
    places = 0 if inputs[5] is None else inputs[5].shape[2]
    shape = f"N {size_class(query.shape[0])}, heads {query.shape[1]}, groups {key.shape[1]}, size {query.shape[2]}"
    return f"{way}, {query.dtype}, {shape}, tails {size_class(tail)}, prefixes {size_class(places)}"
