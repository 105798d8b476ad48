from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from floors import SYMMETRIC, relative_error
from groups_of_rows import SIZES, offsets_of

from kedit_fast import grouped_symmetric_rank_k_update_, symmetric_rank_k_update_

DTYPES = tuple(SYMMETRIC)


@pytest.fixture
def backend(every_backend):
    """Each form of the op."""
    return every_backend


def oracle(acc, x, sizes, weights, alpha):
    """A plain product for every group, in float64."""
    rows, out, begin = x.double(), acc.double().clone(), 0
    for group, size in enumerate(sizes):
        part = rows[begin : begin + size]
        scaled = part if weights is None else part * weights[begin : begin + size, None].double()
        out[group] += alpha * torch.tril(scaled.T @ part)
        begin += size
    return out


def run_case(sizes, d, dtype, acc_dtype, mode, backend, device="cpu"):
    n = sum(sizes)
    x = torch.randn(d, n).to(dtype).T if mode == "transposed" else torch.randn(n, d + 5)[:, :d].to(dtype)
    weights = torch.rand(2 * n, dtype=torch.float64)[::2] + 0.1 if mode == "weighted" else None
    given = x
    if mode == "weighted":
        weights[::3] = 0
        x = torch.where(weights[:, None] == 0, torch.zeros((), dtype=dtype), x)
        given = torch.where(weights[:, None] == 0, torch.full((), math.nan, dtype=dtype), x)  # rows that do not count
    border = torch.full((2 * len(sizes) + 1, d + 2, d + 6), 7.0, dtype=acc_dtype, device=device)
    acc = border[1::2, 1 : 1 + d, 2 : 2 + d]
    start = torch.randn(len(sizes), d, d, dtype=acc_dtype).tril()
    acc.copy_(start + torch.triu(torch.full((d, d), math.nan, dtype=acc_dtype), 1))
    tensors = (x if mode == "transposed" else given, offsets_of(sizes), weights)
    result = grouped_symmetric_rank_k_update_(
        acc, *(None if t is None else t.to(device) for t in tensors), 0.5, backend=backend
    )
    assert result is acc
    upper = torch.triu(torch.ones(d, d, dtype=torch.bool, device=device), 1)
    assert bool(torch.isnan(acc[:, upper]).all()), "an upper triangle was written"
    outside = torch.ones_like(border, dtype=torch.bool)
    outside[1::2, 1 : 1 + d, 2 : 2 + d] = False
    assert bool((border[outside] == 7.0).all()), "memory beside acc was written"
    lower = torch.tril(acc.cpu().nan_to_num(nan=0.0))
    plain = start.clone()
    grouped_symmetric_rank_k_update_(plain, x, offsets_of(sizes), weights, 0.5, backend="torch")
    expected = oracle(start, x, sizes, weights, 0.5)
    assert relative_error(lower, expected) <= max(SYMMETRIC[dtype], 2 * relative_error(torch.tril(plain), expected))
    for group, size in enumerate(sizes):
        if not size:
            assert torch.equal(lower[group], start[group])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ("plain", "weighted", "transposed"))
def test_adds_each_groups_lower_triangle_on_every_isa(isa, dtype, mode):
    for sizes in SIZES.values():
        for d in (1, 7, 33) if len(sizes) > 100 else (1, 7, 64, 129, 300):
            run_case(sizes, d, dtype, torch.float64 if dtype == torch.float64 else torch.float32, mode, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ("plain", "weighted", "transposed"))
def test_the_torch_backend_adds_each_groups_lower_triangle(dtype, mode):
    for sizes in SIZES.values():
        run_case(sizes, 33, dtype, torch.float64, mode, "torch")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("weighted", (False, True))
def test_the_bits_are_those_of_a_loop_for_any_number_of_threads(isa, dtype, weighted):
    """Some groups go to a thread each, the large ones to all threads."""
    sizes = (100, 0, 700, 3, 90, 60, 1)
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, offsets = torch.randn(sum(sizes), 300).to(dtype), offsets_of(sizes)
    weights = torch.rand(sum(sizes)) if weighted else None
    loop = torch.zeros(len(sizes), 300, 300, dtype=acc_dtype)
    for group, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        part = None if weights is None else weights[begin:end]
        symmetric_rank_k_update_(loop[group], x[begin:end], part, backend="cpu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            acc = torch.zeros_like(loop)
            grouped_symmetric_rank_k_update_(acc, x, offsets, weights, backend="cpu")
            assert torch.equal(acc, loop), threads
    finally:
        torch.set_num_threads(before)


def test_a_group_of_more_rows_than_one_chunk_and_packed_operands_too_large_for_one_thread(isa):
    run_case((4700, 3, 20), 70, torch.float32, torch.float64, "weighted", "cpu")
    run_case((2, 1100), 520, torch.float32, torch.float32, "plain", "cpu")


def test_a_row_that_is_not_finite_shows_in_its_group_alone(backend):
    x, sizes = torch.randn(9, 5), (4, 0, 5)
    x[5, 2] = math.nan
    acc = grouped_symmetric_rank_k_update_(torch.zeros(3, 5, 5), x, offsets_of(sizes), backend=backend)
    assert (
        bool(acc[:2].isfinite().all()) and bool(acc[2, 2, :3].isnan().all()) and bool(acc[2, :2, :2].isfinite().all())
    )


def test_a_weight_that_is_not_finite_shows(backend):
    weights = torch.ones(6)
    weights[4] = math.nan
    offsets = torch.tensor([0, 3, 6])
    acc = grouped_symmetric_rank_k_update_(torch.zeros(2, 3, 3), torch.ones(6, 3), offsets, weights, backend=backend)
    assert bool((acc[0] == torch.full((3, 3), 3.0).tril()).all()) and bool(acc[1].diagonal().isnan().all())


def test_no_groups_and_no_columns_change_nothing(backend):
    empty = torch.empty(0, 4, 4)
    first = torch.zeros(1, dtype=torch.int64)
    assert grouped_symmetric_rank_k_update_(empty, torch.empty(0, 4), first, backend=backend) is empty
    grouped_symmetric_rank_k_update_(torch.empty(2, 0, 0), torch.empty(3, 0), torch.tensor([0, 1, 3]), backend=backend)


def test_strided_offsets_and_accumulators(backend):
    offsets = torch.tensor([0, 9, 2, 9, 2, 9, 6])[::2]
    acc = torch.zeros(4, 3, 4)[:, :, :4].transpose(0, 1)  # [3, 4, 4]: groups side by side, rows still contiguous
    x = torch.randn(6, 4)
    grouped_symmetric_rank_k_update_(acc, x, offsets, backend=backend)
    assert relative_error(acc, oracle(torch.zeros(3, 4, 4), x, (2, 0, 4), None, 1.0)) < SYMMETRIC[torch.float32]


def test_the_native_module_takes_numpy_arrays_and_checks_them(cpu_module):
    acc, x = np.zeros((2, 3, 3), np.float32), np.ones((4, 3), np.float32)
    offsets = np.array([0, 1, 4])
    cpu_module.grouped_symmetric_rank_k_update_(acc, x, offsets, None, 2.0, 1)
    assert (acc == np.tril(np.full((2, 3, 3), 2.0)) * np.array([1, 3])[:, None, None]).all()
    for wrong in ([0, 1, 5], [0, 5, 4], [1, 1, 4], [0, 4], [-1, 1, 4]):
        with pytest.raises(ValueError, match="offsets must"):
            cpu_module.grouped_symmetric_rank_k_update_(acc, x, np.array(wrong), None, 1.0, 1)
    with pytest.raises(ValueError, match="acc must"):
        cpu_module.grouped_symmetric_rank_k_update_(acc[0], x, offsets, None, 1.0, 1)
    with pytest.raises(ValueError, match="row_weights must be"):
        cpu_module.grouped_symmetric_rank_k_update_(acc, x, offsets, np.ones(3, np.float32), 1.0, 1)
