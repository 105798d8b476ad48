"""The edges of the C++ tiles of the two writes: sizes around a tile and a block of rows, and what is beside."""

from __future__ import annotations

import pytest
import torch
from floors import RANK_K, relative_error
from groups_of_rows import offsets_of

from kedit_fast import grouped_rank_k_update_, rank_k_update_

SIDES = (1, 7, 8, 9, 13, 14, 15, 31, 32, 33, 63, 64, 65, 113)
RANKS = (1, 5, 23, 24, 64)
CANARY = 7.0


def inside_a_border(out, inner, dtype, stored):
    """A weight of random numbers in the middle of canaries, and what holds both."""
    shape = (out + 6, inner + 35) if stored == "rows" else (inner + 35, out + 6)
    border = torch.full(shape, CANARY, dtype=dtype)
    whole = border if stored == "rows" else border.T
    weight = whole[3 : out + 3, 2 : inner + 2]
    weight.copy_(torch.randn(out, inner))
    return whole, weight


def canaries_live(whole, out, inner):
    rest = torch.ones(whole.shape, dtype=torch.bool)
    rest[3 : out + 3, 2 : inner + 2] = False
    return bool((whole[rest] == CANARY).all())


@pytest.mark.parametrize("dtype", tuple(RANK_K), ids=str)
@pytest.mark.parametrize("stored", ("rows", "columns"))
def test_a_write_ends_where_its_matrix_ends(isa, dtype, stored):
    for at, out in enumerate(SIDES):
        for inner in SIDES[at % 2 :: 2]:
            k = RANKS[(out + inner) % len(RANKS)]
            whole, weight = inside_a_border(out, inner, dtype, stored)
            left, right = torch.randn(out, k) / 4, torch.randn(k, inner).T / 4
            expected = weight.double() + 0.5 * left.double() @ right.double().T
            plain = (weight.double().float() + 0.5 * left @ right.T).to(dtype)
            rank_k_update_(weight, left, right, 0.5, backend="cpu")
            limit = max(RANK_K[dtype], 2 * relative_error(plain, expected))
            assert relative_error(weight, expected) <= limit, (out, inner, k)
            assert canaries_live(whole, out, inner), (out, inner, k)


@pytest.mark.parametrize("copied", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("stored", ("rows", "columns"))
def test_a_copy_has_the_rounded_numbers_and_ends_where_its_matrix_ends(isa, copied, stored):
    for out, inner in ((1, 1), (7, 65), (14, 32), (15, 33), (28, 64), (63, 31), (65, 97)):
        for k in (3, 30):
            _, weight = inside_a_border(out, inner, torch.float32, stored)
            whole, copy = inside_a_border(out, inner, copied, stored)
            rank_k_update_(weight, torch.randn(out, k), torch.randn(inner, k), copy=copy, backend="cpu")
            assert torch.equal(copy, weight.to(copied)) and canaries_live(whole, out, inner)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_numbers_are_rounded_to_even_and_nan_and_infinity_stay(isa, dtype):
    """In the middle of a tile, where vectors are rounded, and at its end, where numbers are."""
    step = torch.finfo(dtype).eps
    special = torch.tensor([1.0, 1.0 + step, -1.0, torch.inf, -torch.inf, torch.nan, 0.0, 3.0])
    weight = special.repeat(40, 17)[:, :133].to(dtype)
    expected = weight.float()
    half = torch.zeros(133, 1)
    half[special.repeat(17)[:133].abs() < 2] = step / 2  # halfway to the next number, or to the one before
    expected = (expected + half.T).to(dtype)
    rank_k_update_(weight, torch.ones(40, 1), half, backend="cpu")
    assert torch.equal(weight.isnan(), expected.isnan())
    assert torch.equal(weight.nan_to_num(5.0), expected.nan_to_num(5.0))
    assert torch.equal(weight.signbit() | weight.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize("k", (255, 256, 257, 513))
def test_long_sums_go_by_blocks(isa, k):
    """Whole numbers below 2^24 in all sums: fp32 holds them exactly, however they are added."""
    left, right = torch.randint(-9, 9, (30, k)).float(), torch.randint(-9, 9, (70, k)).float()
    weight = torch.randint(-99, 99, (30, 70)).float()
    expected = weight.double() + left.double() @ right.double().T
    assert torch.equal(rank_k_update_(weight, left, right, backend="cpu").double(), expected)


def test_many_strips_of_right_panels(isa):
    """One strip stays in the second-level cache: 300 terms of 1100 columns take several, the last one shorter."""
    left, right = torch.randint(-4, 4, (20, 300)).float(), torch.randint(-4, 4, (1100, 300)).float()
    weight = torch.zeros(20, 1100)
    assert torch.equal(rank_k_update_(weight, left, right, backend="cpu").double(), left.double() @ right.double().T)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("stored", ("rows", "columns"))
@pytest.mark.parametrize("factor", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_a_stack_has_the_bits_of_a_loop_however_left_is_stored(isa, dtype, stored, factor):
    """A left factor whose columns are read often is first stored by blocks of rows; alpha is no power of two."""
    sizes = (0, 1, 7, 33, 0, 8, 2)
    for out, inner, u in ((1, 9, 3), (65, 31, 12), (113, 65, 40), (270, 33, 500)):
        n = sum(sizes)
        shape = (len(sizes), out, inner) if stored == "rows" else (len(sizes), inner, out)
        weight = torch.randn(shape).to(dtype)
        weight = weight if stored == "rows" else weight.mT
        right, columns = torch.randn(n, inner).to(factor), torch.randint(0, u, (n,))
        offsets = offsets_of(sizes)
        by_rows = torch.randn(out, u + 3)[:, 1 : u + 1].to(factor)
        by_columns = by_rows.T.contiguous().T
        with_steps = by_rows.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
        loop = weight.clone()
        for group, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            rank_k_update_(loop[group], by_rows[:, columns[begin:end]], right[begin:end].T, 0.3, backend="cpu")
        for left in (by_rows, by_columns, with_steps):
            ours = grouped_rank_k_update_(weight.clone(), left, right, columns, offsets, 0.3, backend="cpu")
            assert torch.equal(ours, loop), (out, inner, u, left.stride())
