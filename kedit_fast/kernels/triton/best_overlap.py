"""The row of a book of bits that shares most bits with each mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.configs import OVERLAP, Config
from kedit_fast.kernels.triton.launch import Launch, ceil_div, choose, processors, run, size_class

WAVES = 4  # programs per multiprocessor that splitting the book aims at
LAST = (1 << 31) - 1  # a key is count 2^32 + LAST - entry: the largest one is of the lowest entry with the most bits


@triton.jit
def _ones(word):
    """The number of ones of each 32-bit word."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (word & 0xFFFF) + (word >> 16)


@triton.jit
def _best_overlap_kernel(
    masks, book, best, entries, words, entries_per_split, splits, mask_row_stride, book_row_stride,
    ENTRIES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    begin = split * entries_per_split
    end = tl.minimum(begin + entries_per_split, entries)
    largest = tl.zeros((ENTRIES,), tl.int64) - 1
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        count = tl.zeros((ENTRIES,), tl.int32)
        for word in range(0, words, WORDS):
            column = word + tl.arange(0, WORDS)
            inside = column < words
            mask = tl.load(masks + row * mask_row_stride + column, mask=inside, other=0).to(tl.uint32)
            of_entry = book + entry.to(tl.int64)[:, None] * book_row_stride + column[None, :]
            other = tl.load(of_entry, mask=(entry < end)[:, None] & inside[None, :], other=0).to(tl.uint32)
            count += tl.sum(_ones(mask[None, :] & other).to(tl.int32), axis=1)
        key = count.to(tl.int64) * 4294967296 + (2147483647 - entry)
        largest = tl.maximum(largest, tl.where(entry < end, key, -1))
    tl.store(best + row * splits + split, tl.max(largest, axis=0))


def launches(masks: torch.Tensor, book: torch.Tensor, config: Config) -> tuple[list[Launch], torch.Tensor]:
    """The launch, and the keys [R, splits] that it fills."""
    by_rows = [m if m.stride(1) == 1 or m.shape[1] <= 1 else m.contiguous() for m in (masks, book)]
    whole = masks.shape[1] % 4 == 0 and all(m.stride(0) % 4 == 0 and m.data_ptr() % 4 == 0 for m in by_rows)
    masks, book = (m.view(torch.int32) if whole else m for m in by_rows)
    rows, words = masks.shape
    entries = len(book)
    wanted = max(1, WAVES * processors(masks.device) // max(1, rows))
    each = ceil_div(ceil_div(entries, min(wanted, ceil_div(entries, config.m))), config.m) * config.m
    splits = ceil_div(entries, each)
    best = torch.empty(rows, splits, dtype=torch.int64, device=masks.device)
    arguments = {
        "masks": masks, "book": book, "best": best, "entries": entries, "words": words, "entries_per_split": each,
        "splits": splits, "mask_row_stride": masks.stride(0), "book_row_stride": book.stride(0),
    }  # fmt: skip
    constants = {"ENTRIES": config.m, "WORDS": config.n}
    return [Launch(_best_overlap_kernel, (rows, splits), arguments, constants, config)], best


def best_overlap(masks: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op of the same name; see kedit_fast/ops/best_overlap.py."""
    if len(masks) == 0:
        return masks.new_empty(0, dtype=torch.int64), masks.new_empty(0, dtype=torch.int64)

    def trial(config: Config) -> list[Launch]:
        return launches(masks, book, config)[0]

    size = f"{size_class(len(masks))}, {size_class(len(book))}, {size_class(masks.shape[1])}"
    config = choose(OVERLAP, "words", masks.device, trial, size)
    calls, best = launches(masks, book, config)
    run(calls, masks.device)
    key = best.amax(1)
    return LAST - (key & 0xFFFFFFFF), key >> 32
