from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import RANK_K, relative_error

from kedit_fast import rank_k_update_, rank_one_update_
from kedit_fast.errors import InvalidArgumentError

SHAPES = [(o, i) for o in (1, 7, 64, 129) for i in (1, 63, 127, 1000)] + [(40, 4097)]


def layouts(out, inner, dtype):
    """A weight as rows, as a transposed Conv1D weight, as a slice of a larger matrix, and with steps."""
    yield torch.randn(out, inner).to(dtype)
    yield torch.randn(inner, out).to(dtype).T
    yield torch.randn(out + 3, inner + 5).to(dtype)[1 : out + 1, 2 : inner + 2]
    yield torch.randn(2 * out, 3 * inner).to(dtype)[::2, ::3]


def check(weight, k, backend, with_copy=False):
    out, inner = weight.shape
    left, right = torch.randn(out, k) / 4, torch.randn(k, inner).T / 4
    expected = weight.double() - 0.5 * left.double() @ right.double().T
    plain = (weight.double().float() - 0.5 * left @ right.T).to(weight.dtype)
    copy = torch.full_like(weight, float("nan"), dtype=torch.bfloat16) if with_copy else None
    rank_k_update_(weight, left, right, -0.5, copy, backend=backend)
    limit = max(RANK_K[weight.dtype], 2 * relative_error(plain, expected))
    assert relative_error(weight, expected) <= limit
    if copy is not None:
        assert torch.equal(copy, weight.bfloat16())


@pytest.mark.parametrize("dtype", tuple(RANK_K), ids=str)
@pytest.mark.parametrize("k", (1, 2, 16, 70))
def test_adds_the_product_on_every_isa_and_layout(isa, dtype, k):
    for out, inner in SHAPES:
        for weight in layouts(out, inner, dtype):
            check(weight, k, "cpu", with_copy=dtype == torch.float32)


@pytest.mark.parametrize("dtype", tuple(RANK_K), ids=str)
def test_the_torch_backend_adds_the_product(dtype):
    for weight in layouts(33, 70, dtype):
        check(weight, 5, "torch", with_copy=dtype == torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_backends_agree_to_one_ulp(isa, dtype):
    weight, left, right = torch.randn(129, 500).to(dtype), torch.randn(129, 20), torch.randn(500, 20)
    ours = rank_k_update_(weight.clone(), left, right, backend="cpu")
    plain = rank_k_update_(weight.clone(), left, right, backend="torch")
    step = (torch.nextafter(plain.float().abs().to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()
            - plain.double().abs())  # fmt: skip
    # fp32 sums of 20 products may differ by their own rounding, which is relative to the terms
    allowed = step + 20 * 2**-23 * (left.abs().double() @ right.abs().double().T + weight.double().abs())
    assert bool(((ours.double() - plain.double()).abs() <= allowed).all())


def test_rank_one_keeps_what_it_should(backend):
    """(W + u v^T) k = W k + u (v^T k)."""
    weight, u, v, key = (torch.randn(*s, dtype=torch.float64) for s in ((40, 30), (40,), (30,), (30,)))
    before = weight @ key
    rank_one_update_(weight, u, v, backend=backend)
    assert relative_error(weight @ key, before + u * (v @ key)) < 1e-14


def test_updates_below_bf16_spacing_survive_in_the_master(backend):
    master, copy = torch.ones(8, 8), torch.ones(8, 8, dtype=torch.bfloat16)
    left, right = torch.full((8, 1), 1e-3), torch.ones(8, 1)
    for _ in range(100):
        rank_k_update_(master, left, right, copy=copy, backend=backend)
    assert torch.allclose(copy.float(), torch.full((8, 8), 1.1), atol=4e-3)


def test_the_same_bits_for_any_number_of_threads(isa):
    weight, left, right = torch.randn(700, 900), torch.randn(700, 30), torch.randn(900, 30)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(rank_k_update_(weight.clone(), left, right, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rank_zero_and_empty_weights_change_nothing(backend):
    weight = torch.tensor([[-0.0, 1.0]])
    rank_k_update_(weight, torch.empty(1, 0), torch.empty(2, 0), backend=backend)
    assert torch.equal(weight, torch.tensor([[-0.0, 1.0]])) and torch.signbit(weight[0, 0])
    rank_k_update_(torch.empty(0, 4), torch.empty(0, 2), torch.empty(4, 2), backend=backend)


def test_factors_in_half_precision_and_of_other_strides(backend):
    weight = torch.randn(50, 60)
    left, right = torch.randn(3, 50).bfloat16().T, torch.randn(60, 6)[:, ::2].half()
    expected = weight.double() + left.double() @ right.double().T
    rank_k_update_(weight, left, right, backend=backend)
    assert relative_error(weight, expected) < 1e-6


def test_the_native_module_takes_numpy_arrays(cpu_module):
    weight, left, right = np.zeros((3, 4), np.float32), np.ones((3, 1), np.float32), np.ones((4, 1), np.float32)
    cpu_module.rank_k_update_(weight, left, right, 2.0, None, 1)
    assert (weight == 2.0).all()
    with pytest.raises(ValueError, match="left must be"):
        cpu_module.rank_k_update_(weight, right, left, 1.0, None, 1)


def test_writing_into_shared_memory_is_refused():
    block = torch.randn(8, 9)
    with pytest.raises(InvalidArgumentError, match="share memory"):
        rank_k_update_(block, block[:, :1], torch.randn(9, 1))
    with pytest.raises(InvalidArgumentError, match="overlaps itself"):
        rank_k_update_(torch.zeros(1).expand(8, 9), torch.randn(8, 1), torch.randn(9, 1))
