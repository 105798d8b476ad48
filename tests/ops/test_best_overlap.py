from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_memories import golden

from kedit_fast import best_overlap
from kedit_fast.ops import top_features, unpack_bits

SHAPES = [(1, 1, 1), (3, 5, 2), (7, 40, 31), (2, 300, 64), (33, 17, 130), (1, 70, 1792), (0, 4, 8), (2, 3, 0)]


def unpacked(bits, d):
    """[R, b] uint8 as [R, d] bool."""
    return torch.stack([unpack_bits(row, d) for row in bits]) if len(bits) else bits.new_empty(0, d).bool()


def published(masks, book, d):
    shared = unpacked(masks, d).float() @ unpacked(book, d).float().T
    return shared.argmax(1), shared.amax(1)


def test_the_row_that_shares_most_bits(every_backend):
    for r, k, b in SHAPES:
        masks = torch.randint(0, 256, (r, b), dtype=torch.uint8)
        book = torch.randint(0, 256, (k, 2 * b), dtype=torch.uint8)[:, b:]
        result = best_overlap(masks, book, backend=every_backend)
        index, count = published(masks, book, 8 * b)
        assert torch.equal(result.index, index) and torch.equal(result.count, count.long()), (r, k, b)


def test_every_isa_and_number_of_threads_finds_the_same(isa):
    masks, book = (torch.randint(0, 256, (n, 1030), dtype=torch.uint8) for n in (5, 2000))
    index, count = published(masks, book, 8 * 1030)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = best_overlap(masks, book, backend="cpu")
            assert torch.equal(result.index, index) and torch.equal(result.count, count.long())
    finally:
        torch.set_num_threads(before)


def test_the_native_module_checks_what_it_is_given(cpu_module):
    index, count = np.empty(2, np.int64), np.empty(2, np.int64)
    masks, book = np.full((2, 3), 7, np.uint8), np.full((4, 3), 5, np.uint8)
    cpu_module.best_overlap(index, count, masks, book, 1)
    assert (index == 0).all() and (count == 6).all()
    for bad in (
        (index[:1], count, masks, book),
        (index, count.astype(np.float64), masks, book),
        (index, count, masks, book[:, :2]),
        (index, count, masks, book[:0]),
        (index, count, masks.astype(np.float32), book),
    ):
        with pytest.raises(ValueError):
            cpu_module.best_overlap(*bad, 1)


def test_all_bits_and_none(every_backend):
    full = torch.full((3, 2051), 255, dtype=torch.uint8)
    full[0] = 0
    result = best_overlap(full[[2, 0]], full, backend=every_backend)
    assert result.index.tolist() == [1, 0] and result.count.tolist() == [8 * 2051, 0]  # ties to the lowest


def test_an_empty_book(every_backend):
    result = best_overlap(torch.ones(2, 3, dtype=torch.uint8), torch.empty(0, 3, dtype=torch.uint8),
                          backend=every_backend)  # fmt: skip
    assert result.index.tolist() == [-1, -1] and result.count.tolist() == [0, 0]


def test_a_memory_of_memoir_matches_as_published(every_backend):
    k, threshold = golden("memoir.numbers").tolist()
    background, permutation = golden("memoir.background"), golden("memoir.permutation")
    book = top_features(golden("memoir.edited"), torch.tensor([0, 4, 9, 15, 22]), background, int(k), permutation)
    assert torch.equal(unpacked(book, 16), golden("memoir.masks").bool())
    asked = top_features(golden("memoir.asked"), torch.tensor([0, 5, 11, 16, 19, 26]), background, int(k), permutation)
    result = best_overlap(asked, book, backend=every_backend)
    assert torch.equal(torch.where(result.count / k >= threshold, result.index, -1), golden("memoir.match"))
    torch.testing.assert_close(result.count / k, golden("memoir.share").amax(1).float())
