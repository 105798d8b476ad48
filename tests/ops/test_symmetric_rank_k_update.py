from __future__ import annotations

import pytest
import torch
from floors import SYMMETRIC, relative_error

from kedit_fast import mirror_, symmetric_rank_k_update_
from kedit_fast.kernels.native import cpu as native_cpu
from kedit_fast.reference import symmetric_rank_k_update as reference

DTYPES = tuple(SYMMETRIC)
SHAPES = [(n, d) for n in (1, 7, 64, 129, 1000) for d in (1, 7, 63, 64, 127, 129, 300)] + [(600, 1000), (33, 4097)]


def oracle(acc, x, weights, mask, alpha):
    rows = x.double().clone()
    if mask is not None:
        rows[~mask] = 0
    scale = torch.ones(x.shape[0], dtype=torch.float64) if weights is None else weights.double()
    return acc.double() + alpha * torch.tril((rows * scale[:, None]).T @ rows)


def run_case(n, d, dtype, acc_dtype, mode, backend=None):
    x = torch.randn(d, n).to(dtype).T if mode == "transposed" else torch.randn(n, d + 5)[:, :d].to(dtype)
    weights = torch.rand(n) + 0.1 if mode == "weighted" else None
    mask = torch.rand(n) > 0.4 if mode in ("masked", "weighted") else None
    expected_rows = x
    if mask is not None:
        x = x.clone()
        x[~mask] = float("nan")  # rows left out may hold anything
    border = torch.full((d + 2, d + 6), 7.0, dtype=acc_dtype)
    acc = border[1 : 1 + d, 2 : 2 + d]
    acc.copy_(torch.randn(d, d))
    upper = torch.triu(torch.full((d, d), float("nan"), dtype=acc_dtype), 1)
    start = torch.tril(acc).clone()
    acc.copy_(start + upper)
    symmetric_rank_k_update_(acc, x, weights, mask, 0.5, backend=backend)
    assert bool(torch.isnan(acc[torch.triu(torch.ones(d, d, dtype=torch.bool), 1)]).all()), "upper triangle was written"
    outside = torch.ones_like(border, dtype=torch.bool)
    outside[1 : 1 + d, 2 : 2 + d] = False
    assert bool((border[outside] == 7.0).all()), "memory beside acc was written"
    found = torch.tril(torch.nan_to_num(acc, nan=0.0))
    plain = start.clone()
    reference.symmetric_rank_k_update_(plain, expected_rows, weights, mask, 0.5)
    expected = oracle(start, expected_rows, weights, mask, 0.5)
    limit = max(SYMMETRIC[dtype], 2 * relative_error(torch.tril(plain), expected))
    assert relative_error(found, expected) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ("plain", "masked", "weighted", "transposed"))
def test_adds_the_lower_triangle_of_the_product_on_every_isa(isa, dtype, mode):
    for n, d in SHAPES:
        if d < 1000 or mode == "plain":
            run_case(n, d, dtype, torch.float64 if dtype == torch.float64 else torch.float32, mode, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulates_into_fp64(backend, dtype):
    run_case(700, 129, dtype, torch.float64, "weighted", backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gives_the_same_bits_for_any_number_of_threads(isa, dtype):
    x, results = torch.randn(900, 600).to(dtype), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(symmetric_rank_k_update_(torch.zeros(600, 600), x, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_splitting_the_rows_changes_nothing_but_rounding(backend):
    x = torch.randn(500, 64, dtype=torch.float64)
    whole, parts = torch.zeros(64, 64, dtype=torch.float64), torch.zeros(64, 64, dtype=torch.float64)
    symmetric_rank_k_update_(whole, x, backend=backend)
    for part in x.split(77):
        symmetric_rank_k_update_(parts, part, backend=backend)
    assert relative_error(parts, whole) < 1e-14


def test_bf16_weights_lose_nothing_on_amx(isa):
    x, weights = torch.randn(512, 96).bfloat16(), torch.rand(512) * 3
    found = symmetric_rank_k_update_(torch.zeros(96, 96), x, weights, backend="cpu")
    expected = oracle(torch.zeros(96, 96), x, weights, None, 1.0)
    assert relative_error(found, expected) < 6e-7


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_more_rows_than_one_chunk(isa, dtype):
    run_case(4700, 70, dtype, torch.float64, "weighted", "cpu")


def test_weights_of_rows_that_the_mask_leaves_out_may_be_anything(backend, isa):
    x, weights, mask = torch.randn(40, 33).bfloat16(), torch.rand(40) + 0.5, torch.rand(40) > 0.5
    expected = symmetric_rank_k_update_(torch.zeros(33, 33), x, weights, mask, backend=backend)
    weights[~mask] = torch.tensor([float("nan"), float("inf")]).repeat(40)[: int((~mask).sum())]
    found = symmetric_rank_k_update_(torch.zeros(33, 33), x, weights, mask, backend=backend)
    assert torch.equal(found, expected) and bool(found.isfinite().all())


def test_no_rows_change_nothing(backend):
    acc = torch.randn(5, 5)
    before = acc.clone()
    symmetric_rank_k_update_(acc, torch.empty(0, 5), backend=backend)
    symmetric_rank_k_update_(torch.empty(0, 0), torch.empty(3, 0), backend=backend)
    assert torch.equal(acc, before)


def test_mirror_fills_the_upper_triangle():
    acc = torch.randn(9, 9)
    full = mirror_(acc.clone())
    assert torch.equal(full, full.T) and torch.equal(torch.tril(full), torch.tril(acc))


def test_a_forced_isa_is_used(isa):
    assert native_cpu.module().isa() == isa


def test_scratch_memory_can_be_released(cpu_module):
    symmetric_rank_k_update_(torch.zeros(300, 300), torch.randn(400, 300), backend="cpu")
    cpu_module.release_scratch()
    run_case(100, 64, torch.float32, torch.float32, "plain", "cpu")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("acc_dtype", (torch.float32, torch.float64), ids=str)
def test_the_reference_gives_16_bit_rows_to_the_matrix_unit_where_it_has_an_fp32_product(dtype, acc_dtype, monkeypatch):
    """As on CUDA: torch.mm(..., out_dtype=torch.float32), here with a product that is made up."""
    seen = []

    def mm(left, right, *, out_dtype):
        seen.append((left.dtype, right.dtype, left.shape[1], out_dtype))
        return left.float() @ right.float()

    monkeypatch.setattr(reference, "has_wide_product", lambda x: x.dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(torch, "mm", mm)
    x, mask = torch.randn(1500, 70).to(dtype), torch.rand(1500) > 0.3
    acc = torch.full((70, 70), 7.0, dtype=acc_dtype)
    expected = acc.double() + torch.tril(0.5 * (x.double() * mask[:, None]).T @ (x.double() * mask[:, None]))
    reference.symmetric_rank_k_update_(acc, x, None, mask, 0.5)
    assert relative_error(acc, expected) < SYMMETRIC[dtype] and bool(
        (acc.triu(1) == torch.full_like(acc, 7).triu(1)).all()
    )
    assert seen and all(entry[:2] == (dtype, dtype) and entry[3] == torch.float32 for entry in seen)
    assert max(entry[2] for entry in seen) <= 256  # the matrix unit cuts longer sums
    seen.clear()
    reference.symmetric_rank_k_update_(acc, x, torch.rand(1500), None, 0.5)  # weighted rows are not 16-bit ones
    reference.symmetric_rank_k_update_(acc, x.float(), None, None, 0.5)
    assert not seen


def test_the_matrix_unit_is_asked_on_cuda_alone_and_where_torch_has_the_product():
    assert not any(reference.has_wide_product(torch.zeros(2, 2, dtype=dtype)) for dtype in SYMMETRIC)
    if torch.cuda.is_available():
        x = torch.zeros(2, 2, dtype=torch.bfloat16, device="cuda")
        assert reference.has_wide_product(x) == hasattr(torch.ops.aten.mm, "dtype")
        assert not reference.has_wide_product(x.float())
