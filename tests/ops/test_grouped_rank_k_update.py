from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import RANK_K, relative_error
from groups_of_rows import SIZES, offsets_of

from kedit_fast import grouped_rank_k_update_, rank_k_update_


@pytest.fixture
def backend(every_backend):
    """Each form of the op."""
    return every_backend


def layouts(count, out, inner, dtype):
    """A stack of rows, one stored as [E, in, out], a slice of a larger stack, and one with steps."""
    yield torch.randn(count, out, inner).to(dtype)
    yield torch.randn(count, inner, out).to(dtype).mT
    yield torch.randn(2 * count, out + 3, inner + 5).to(dtype)[::2, 1 : out + 1, 2 : inner + 2]
    yield torch.randn(count, 2 * out, 3 * inner).to(dtype)[:, ::2, ::3]


def oracle(weight, left, right, columns, sizes, alpha):
    """A plain sum of outer products, in float64."""
    out, row = weight.double().clone(), 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            out[group] += alpha * torch.outer(left[:, columns[row]].double(), right[row].double())
            row += 1
    return out


def check(weight, sizes, u, backend, with_copy=False, device="cpu"):
    _, out, inner = weight.shape
    n = sum(sizes)
    left, right = torch.randn(out, u) / 4, torch.randn(n, inner + 3)[:, :inner] / 4
    columns = torch.randint(0, u, (n,))
    expected = oracle(weight, left, right, columns, sizes, -0.5)
    plain = grouped_rank_k_update_(weight.clone(), left, right, columns, offsets_of(sizes), -0.5, backend="torch")
    copy = torch.full_like(weight, float("nan"), dtype=torch.bfloat16) if with_copy else None
    ours = weight if device == "cpu" else torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype,
                                                              device=device).copy_(weight)  # fmt: skip
    copy = None if copy is None else copy.to(device)
    before = weight.clone()
    operands = (t.to(device) for t in (left, right, columns, offsets_of(sizes)))
    assert grouped_rank_k_update_(ours, *operands, -0.5, copy, backend=backend) is ours
    limit = max(RANK_K[weight.dtype], 2 * relative_error(plain, expected))
    assert relative_error(ours.cpu(), expected) <= limit
    if copy is not None:
        assert torch.equal(copy, ours.bfloat16())
    for group, size in enumerate(sizes):
        if not size:
            assert torch.equal(ours[group].cpu(), before[group])


@pytest.mark.parametrize("dtype", tuple(RANK_K), ids=str)
@pytest.mark.parametrize("copied", (False, True))
def test_adds_each_groups_product_on_every_isa_and_layout(isa, dtype, copied):
    for sizes in SIZES.values():
        for out, inner in ((1, 7), (9, 33)) if len(sizes) > 100 else ((1, 63), (64, 127), (129, 70)):
            for weight in layouts(len(sizes), out, inner, dtype):
                check(weight, sizes, 5, "cpu", with_copy=copied and dtype == torch.float32)


@pytest.mark.parametrize("dtype", tuple(RANK_K), ids=str)
def test_the_torch_backend_adds_each_groups_product(dtype):
    for sizes in SIZES.values():
        for weight in layouts(len(sizes), 9, 33, dtype):
            check(weight, sizes, 5, "torch", with_copy=dtype == torch.float32)


def test_memory_beside_a_stack_is_not_written(backend):
    border = torch.full((7, 12, 20), 7.0)
    weight = border[1:6:2, 2:9, 3:16]
    rest = torch.ones_like(border, dtype=torch.bool)
    rest[1:6:2, 2:9, 3:16] = False
    check(weight, (2, 0, 3), 4, backend)
    assert bool((border[rest] == 7.0).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("stored", ("rows", "columns"))
def test_the_bits_are_those_of_a_loop_for_any_number_of_threads(isa, dtype, stored):
    """Some groups go to a thread each, the large ones to all threads."""
    sizes, u, inner, out = (3, 0, 400, 7, 20, 1, 30), 50, 300, 200
    shape = (len(sizes), out, inner) if stored == "rows" else (len(sizes), inner, out)
    weight = torch.randn(shape).to(dtype)
    weight = weight if stored == "rows" else weight.mT
    left, right, columns = torch.randn(out, u), torch.randn(sum(sizes), inner), torch.randint(0, u, (sum(sizes),))
    offsets = offsets_of(sizes)
    loop = weight.clone()
    for group, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        rank_k_update_(loop[group], left[:, columns[begin:end]], right[begin:end].T, 0.3, backend="cpu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            ours = grouped_rank_k_update_(weight.clone(), left, right, columns, offsets, 0.3, backend="cpu")
            assert torch.equal(ours, loop), threads
    finally:
        torch.set_num_threads(before)


def test_a_group_whose_packed_factors_are_too_large_for_one_thread(isa):
    check(torch.randn(2, 600, 40), (1, 1900), 30, "cpu")


def test_a_matrix_without_rows_keeps_its_bits_and_fills_its_copy(backend):
    weight = torch.tensor([-0.0, 1.0, -0.0, 2.0]).view(2, 1, 2)
    copy = torch.full((2, 1, 2), float("nan"), dtype=torch.bfloat16)
    right, columns = torch.ones(1, 2), torch.tensor([0])
    grouped_rank_k_update_(
        weight, torch.ones(1, 1), right, columns, torch.tensor([0, 0, 1]), copy=copy, backend=backend
    )
    assert weight.flatten().tolist() == [0.0, 1.0, 1.0, 3.0] and bool(weight[0, 0, 0].signbit())
    assert torch.equal(copy, weight.bfloat16())
    none = torch.zeros(3, dtype=torch.int64)
    copy.fill_(float("nan"))
    grouped_rank_k_update_(weight, torch.ones(1, 1), right[:0], columns[:0], none, copy=copy, backend=backend)
    assert torch.equal(copy, weight.bfloat16()) and bool(weight[0, 0, 0].signbit())


def test_adding_and_taking_away_the_same_update_of_exact_numbers_gives_the_weight_back(backend):
    weight = torch.randint(-8, 8, (3, 6, 10)).float()
    left, right = torch.randint(-4, 4, (6, 5)).float(), torch.randint(-4, 4, (7, 10)).float()
    columns, offsets = torch.randint(0, 5, (7,)), torch.tensor([0, 4, 4, 7])
    before = weight.clone()
    grouped_rank_k_update_(weight, left, right, columns, offsets, backend=backend)
    assert not torch.equal(weight, before)
    grouped_rank_k_update_(weight, left, right, columns, offsets, -1.0, backend=backend)
    assert torch.equal(weight, before)


def test_factors_in_half_precision_and_of_other_strides(backend):
    weight, sizes = torch.randn(2, 50, 60), (20, 4)
    left, right = torch.randn(3, 50).bfloat16().T, torch.randn(60, 48).half().T[::2]
    columns = torch.randint(0, 3, (48,))[::2]
    expected = oracle(weight, left, right, columns, sizes, 1.0)
    grouped_rank_k_update_(weight, left, right, columns, offsets_of(sizes), backend=backend)
    assert relative_error(weight, expected) < 1e-6


def test_a_factor_that_is_not_finite_shows_in_its_matrix_alone(backend):
    weight, right = torch.zeros(2, 3, 4), torch.ones(3, 4)
    right[2, 1] = float("nan")
    columns, offsets = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2, 3])
    grouped_rank_k_update_(weight, torch.ones(3, 1), right, columns, offsets, backend=backend)
    assert bool((weight[0] == 2.0).all()) and bool(weight[1, :, 1].isnan().all())
    assert bool((weight[1, :, [0, 2, 3]] == 1.0).all())


def test_no_matrices_and_no_outputs_change_nothing(backend):
    none, first = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    grouped_rank_k_update_(torch.empty(0, 3, 4), torch.ones(3, 2), torch.empty(0, 4), none, first, backend=backend)
    one, two = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1])
    grouped_rank_k_update_(torch.empty(1, 0, 4), torch.empty(0, 2), torch.empty(1, 4), one, two, backend=backend)


def test_the_native_module_takes_numpy_arrays_and_checks_them(cpu_module):
    weight, left = np.zeros((2, 3, 4), np.float32), np.ones((3, 2), np.float32)
    right, columns, offsets = np.ones((3, 4), np.float32), np.array([0, 1, 1]), np.array([0, 1, 3])
    cpu_module.grouped_rank_k_update_(weight, left, right, columns, offsets, 2.0, None, 1)
    assert (weight[0] == 2.0).all() and (weight[1] == 4.0).all()
    for wrong in ([0, 1, 2], [0, 1, -1]):
        with pytest.raises(ValueError, match="columns must be those of left"):
            cpu_module.grouped_rank_k_update_(weight, left, right, np.array(wrong), offsets, 1.0, None, 1)
    for wrong in ([0, 1, 4], [0, 4, 3], [0, 3]):
        with pytest.raises(ValueError, match="offsets must"):
            cpu_module.grouped_rank_k_update_(weight, left, right, columns, np.array(wrong), 1.0, None, 1)
    with pytest.raises(ValueError, match="weight must"):
        cpu_module.grouped_rank_k_update_(weight[0], left, right, columns, offsets, 1.0, None, 1)
    with pytest.raises(ValueError, match="right must"):
        cpu_module.grouped_rank_k_update_(weight, left, right[:, :3], columns, offsets, 1.0, None, 1)
    assert (weight[0] == 2.0).all() and (weight[1] == 4.0).all()
