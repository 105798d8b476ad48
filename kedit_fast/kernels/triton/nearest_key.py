"""The nearest key of every query, from differences."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.configs import NEAREST, Config
from kedit_fast.kernels.triton.launch import Launch, ceil_div, choose, processors, run, size_class

WAVES = 4  # programs per multiprocessor that splitting the keys aims at
NONE = (1 << 31) - 1  # the index where a program has no key


@triton.jit
def _nearest_key_kernel(
    queries, keys, compared, distances, indices, rows, entries, width, entries_per_split, splits,
    query_row_stride, query_column_stride, key_row_stride, key_column_stride,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Each split's smallest distance, NaN compared as infinity, and the lowest key that has it."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    split = tl.program_id(1)
    begin = split * entries_per_split
    end = tl.minimum(begin + entries_per_split, entries)
    of_row = queries + row.to(tl.int64)[:, None] * query_row_stride
    least = tl.full((QUERIES,), float("inf"), tl.float32)
    value = tl.full((QUERIES,), float("inf"), tl.float32)
    index = tl.full((QUERIES,), 2147483647, tl.int32)
    for first in range(begin, end, KEYS):
        entry = first + tl.arange(0, KEYS)
        of_entry = keys + entry.to(tl.int64)[:, None] * key_row_stride
        total = tl.zeros((QUERIES, KEYS), tl.float32)
        for column in range(0, width, DEPTH):
            p = (column + tl.arange(0, DEPTH)).to(tl.int64)
            inside = (p < width)[None, :]
            a = tl.load(of_row + p[None, :] * query_column_stride, mask=(row < rows)[:, None] & inside, other=0.0)
            b = tl.load(of_entry + p[None, :] * key_column_stride, mask=(entry < end)[:, None] & inside, other=0.0)
            gap = a.to(tl.float32)[:, None, :] - b.to(tl.float32)[None, :, :]
            total += tl.sum(gap * gap, axis=2)
        distance = tl.sqrt_rn(total)
        order = tl.where((distance == distance) & (entry < end)[None, :], distance, float("inf"))
        here = tl.min(order, axis=1)
        hit = (order == here[:, None]) & (entry < end)[None, :]
        at = tl.min(tl.where(hit, entry[None, :], 2147483647), axis=1)
        there = tl.sum(tl.where(entry[None, :] == at[:, None], distance, 0.0), axis=1)
        better = (here < least) | (index == 2147483647)
        least = tl.where(better, here, least)
        value = tl.where(better, there, value)
        index = tl.where(better, at, index)
    out = row.to(tl.int64) * splits + split
    tl.store(compared + out, least, mask=row < rows)
    tl.store(distances + out, value, mask=row < rows)
    tl.store(indices + out, index, mask=row < rows)


def launches(
    queries: torch.Tensor, keys: torch.Tensor, config: Config
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """The launch, and what it fills: distances as compared and as they are, and indices, each [N, splits]."""
    rows, width = queries.shape
    entries, blocks = len(keys), ceil_div(rows, config.m)
    wanted = max(1, WAVES * processors(queries.device) // blocks)
    each = ceil_div(ceil_div(entries, min(wanted, ceil_div(entries, config.n))), config.n) * config.n
    splits = ceil_div(entries, each)
    compared, distances = (torch.empty(rows, splits, device=queries.device) for _ in range(2))
    indices = torch.empty(rows, splits, dtype=torch.int32, device=queries.device)
    arguments = {
        "queries": queries, "keys": keys, "compared": compared, "distances": distances, "indices": indices,
        "rows": rows, "entries": entries, "width": width, "entries_per_split": each, "splits": splits,
        "query_row_stride": queries.stride(0), "query_column_stride": queries.stride(1),
        "key_row_stride": keys.stride(0), "key_column_stride": keys.stride(1),
    }  # fmt: skip
    constants = {"QUERIES": config.m, "KEYS": config.n, "DEPTH": config.k}
    launch = Launch(_nearest_key_kernel, (blocks, splits), arguments, constants, config)
    return [launch], (compared, distances, indices)


def nearest_key(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op of the same name; see kedit_fast/ops/nearest_key.py."""
    if len(queries) == 0:
        return queries.new_empty(0, dtype=torch.int64), queries.new_empty(0, dtype=torch.float32)

    def trial(config: Config) -> list[Launch]:
        return launches(queries, keys, config)[0]

    size = f"{size_class(len(queries))}, {size_class(len(keys))}, {size_class(queries.shape[1])}"
    config = choose(NEAREST, "rows", queries.device, trial, size)
    calls, (compared, distances, indices) = launches(queries, keys, config)
    run(calls, queries.device)
    best = torch.where(compared == compared.amin(1, keepdim=True), indices, NONE)
    split = best.argmin(1, keepdim=True)  # indices of splits differ
    return best.gather(1, split)[:, 0].long(), distances.gather(1, split)[:, 0]
