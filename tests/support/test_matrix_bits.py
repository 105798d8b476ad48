"""Each hash of a matrix detects what its table says, and no stride, view or device order changes it."""

from __future__ import annotations

import pytest
import torch

from kedit_fast.support.matrix_bits import (
    ALIGNMENT,
    aligned,
    edit_fingerprint,
    integer_view,
    quick_sum,
    row_checksum,
    same_bits,
    sha256,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HASHES = {
    "sha256": sha256,
    "row_checksum": row_checksum,
    "edit_fingerprint": lambda matrix: edit_fingerprint([matrix]),
    "quick_sum": quick_sum,
}
DETECTS_AN_EXCHANGE = {"sha256", "edit_fingerprint"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HASHES)
def test_a_change_of_one_bit_is_detected(name, dtype):
    matrix = torch.randn(5, 7).to(dtype)
    before = HASHES[name](matrix)
    assert HASHES[name](matrix.clone()) == before
    integer_view(matrix)[3, 2] ^= 1
    assert HASHES[name](matrix) != before


@pytest.mark.parametrize("name", HASHES)
def test_numbers_that_change_places_in_a_row_are_detected_where_the_table_says_so(name):
    matrix = torch.arange(12.0).reshape(3, 4)
    exchanged = matrix[:, [1, 0, 2, 3]].contiguous()
    assert (HASHES[name](matrix) != HASHES[name](exchanged)) == (name in DETECTS_AN_EXCHANGE)


@pytest.mark.parametrize("name", HASHES)
def test_a_view_has_the_hash_of_its_copy(name):
    base = torch.randn(8, 10)
    for view in (base.T, base[1:5, 2:9], base[:, ::2]):
        assert HASHES[name](view) == HASHES[name](view.contiguous())


def test_empty_matrices_have_hashes():
    assert len({sha256(torch.empty(0, 3)), sha256(torch.empty(3, 0)), sha256(torch.empty(0, 3).half())}) == 3
    assert quick_sum(torch.empty(0, 3)) == 0


def test_same_bits_tells_zero_from_minus_zero_and_takes_nan_for_itself():
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same_bits(torch.zeros(2, 1), torch.zeros(1, 2))


def test_aligned_copies_only_what_begins_elsewhere():
    base = torch.zeros(64)
    begins = aligned(base)
    assert begins.data_ptr() % ALIGNMENT == 0
    inside = base[1:]
    assert aligned(inside).data_ptr() % ALIGNMENT == 0 and torch.equal(aligned(inside), inside)
