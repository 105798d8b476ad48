from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_memories import golden

from kedit_fast import ties_merge_
from kedit_fast.errors import InvalidArgumentError


def published(base, memories, coefficients, density):
    """The merge of WISE's GTA, with ties at the bound to the lowest index."""
    deltas = []
    for memory in memories:
        delta = (memory.to(base) - base).flatten()
        chosen = delta.abs().sort(descending=True, stable=True).indices[: int(density * delta.numel())]
        deltas.append(torch.zeros_like(delta).index_copy(0, chosen, delta[chosen]).view_as(base))
    weighted = torch.stack([c * delta for c, delta in zip(coefficients, deltas, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0).to(base)
    agree = (weighted.sign() == sign).to(base)
    share = (torch.tensor(coefficients, dtype=base.dtype).view(-1, 1, 1) * agree).sum(0)
    return base + (weighted * agree).sum(0) / torch.where(share == 0, 1.0, share)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_memories_are_merged(every_backend, dtype):
    slow = every_backend == "triton"
    shapes = zip(((1, 1), (33, 70), (9, 230), (64, 129), (5, 7)), (1, 2, 3, 5, 16), strict=True)
    for (h, d), m in list(shapes)[:: 2 if slow else 1]:
        base = torch.randn(h, d).to(dtype)
        memories = base.float() + torch.randn(m, h, d) * (torch.rand(m, h, d) < 0.6)
        coefficients = (torch.rand(m) + 0.1).tolist()
        for density in (0.0, 0.2, 0.53, 1.0) if not slow else (0.53,):
            out = torch.full((h, d), torch.nan, dtype=dtype)
            assert ties_merge_(out, base, memories, coefficients, density, backend=every_backend) is out
            expected = published(base.double(), memories.double(), coefficients, density)
            plain = ties_merge_(torch.empty_like(out), base, memories, coefficients, density, backend="torch")
            assert torch.equal(out, plain)
            torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_every_isa_and_number_of_threads_merges_the_same(isa, dtype):
    base = torch.randn(300, 700).to(dtype)
    memories = base.to(torch.promote_types(dtype, torch.float32)) + torch.randn(3, 300, 700).to(dtype)
    expected = ties_merge_(torch.empty_like(base), base, memories, [0.2, 0.3, 0.5], 0.53, backend="torch")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = ties_merge_(torch.empty_like(base), base, memories, [0.2, 0.3, 0.5], 0.53, backend="cpu")
            assert torch.equal(out, expected)
    finally:
        torch.set_num_threads(before)


def test_the_native_module_checks_what_it_is_given(cpu_module):
    out, base, memories = np.empty(4, np.float32), np.zeros(4, np.float32), np.ones((2, 4), np.float32)
    assert cpu_module.ties_merge_(out, base, memories, [0.5, 0.5], 4, 1)
    assert (out == 1).all()
    for bad in (
        (out[:3], base, memories, [0.5, 0.5], 4),
        (out, base, memories[:, :3], [0.5, 0.5], 4),
        (out, base, memories, [0.5], 4),
        (out, base, memories, [0.5, 0.5], 5),
        (out, base.astype(np.float64), memories, [0.5, 0.5], 4),
    ):
        with pytest.raises(ValueError):
            cpu_module.ties_merge_(*bad, 1)


def test_ties_at_the_bound_go_to_the_lowest_index(every_backend):
    base = torch.randn(40, 50)
    memories = torch.stack([base + torch.randint(-2, 3, (40, 50)), base + 0.5])
    base, memories = base.double(), memories.double()
    memories = (memories - base).round(decimals=1) + base.round(decimals=2)  # differences that tie exactly
    base = base.round(decimals=2)
    quarter = (memories - base).mul(4).round().float()  # small integers
    for density in (0.1, 0.31, 0.77):
        out = torch.empty(40, 50)
        ties_merge_(out, torch.zeros(40, 50), quarter, [0.4, 0.6], density, backend=every_backend)
        expected = published(torch.zeros(40, 50), quarter, [0.4, 0.6], density)
        torch.testing.assert_close(out, expected)
        one = torch.empty(40, 50)
        ties_merge_(one, torch.zeros(40, 50), quarter[1:], [1.0], density, backend=every_backend)
        assert (one != 0).flatten().nonzero()[:, 0].tolist() == list(range(int(density * 2000)))


def test_opposite_changes_of_equal_size_count_as_positive(every_backend):
    """c a + c (-a) is exactly 0: a fused multiply-add would leave the rounding of c a, and its sign."""
    change = torch.randn(300, 7)
    memories = torch.stack([change, -change])
    out = ties_merge_(torch.empty(300, 7), torch.zeros(300, 7), memories, [1 / 3, 1 / 3], 1.0, backend=every_backend)
    assert bool((out > 0).all())
    torch.testing.assert_close(out, change.abs())


@pytest.mark.parametrize("name", ("dense", "sparse", "drifted", "uneven"))
def test_merges_of_wise(name):
    coefficients = [0.2, 0.2, 0.6] if name == "uneven" else [1 / 3] * 3
    base, memories = golden("toy.W0"), golden(f"merge.{'dense' if name == 'uneven' else name}")
    out = ties_merge_(torch.empty_like(base), base, memories, coefficients, 0.53)
    torch.testing.assert_close(out, golden(f"merge.ties.{name}"), rtol=1e-12, atol=1e-12)


def test_transposed_matrices(every_backend):
    base, memories = torch.randn(31, 20), torch.randn(2, 31, 20)
    expected = ties_merge_(torch.empty(31, 20), base, memories, [0.5, 0.5], 0.4, backend="torch")
    out = torch.zeros(20, 31).T
    by_columns = memories.mT.contiguous().mT
    ties_merge_(out, base.T.contiguous().T, by_columns, [0.5, 0.5], 0.4, backend=every_backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf))
def test_what_is_not_finite_is_refused_and_nothing_written(every_backend, broken):
    base, memories, out = torch.randn(9, 40), torch.randn(2, 9, 40), torch.full((9, 40), 7.0)
    for matrix in (base, memories[1]):
        matrix[8, 39] = broken
        with pytest.raises(InvalidArgumentError, match="not finite"):
            ties_merge_(out, base, memories, [0.5, 0.5], 0.5, backend=every_backend)
        matrix[8, 39] = 0.0
    assert bool((out == 7.0).all())
