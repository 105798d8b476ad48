from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import GATED, relative_error

from kedit_fast import gated_silu

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 63), (9, 256), (2, 4097), (0, 8), (3, 0)]


def exact(gate, up):
    return torch.nn.functional.silu(gate.double()) * up.double()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_every_isa_gates_rows(isa, dtype):
    for rows, d in SHAPES:
        both = (5 * torch.randn(rows, 2 * d)).to(dtype)
        for gate, up in (both.chunk(2, -1), (torch.randn(d, rows).to(dtype).T, both[:, :d])):
            found = gated_silu(gate, up, backend="cpu")
            assert found.shape == gate.shape and found.dtype == dtype and found.is_contiguous()
            assert relative_error(found, exact(gate, up)) <= GATED[dtype]


def test_the_torch_backend_gates_rows():
    for dtype, limit in GATED.items():
        gate, up = (torch.randn(20, 300).to(dtype) for _ in range(2))
        assert relative_error(gated_silu(gate, up, backend="torch"), exact(gate, up)) <= limit


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_every_gate_in_range_to_4_ulp(isa, dtype):
    gate = torch.linspace(-80, 80, 40_001).to(dtype)[None]
    found, expected = gated_silu(gate, torch.ones_like(gate), backend="cpu"), exact(gate, torch.ones_like(gate))
    info = torch.finfo(dtype)
    limit = 4 * info.eps * expected.abs() + info.eps * info.smallest_normal  # 4 ulp, or the last bit there is
    assert bool(((found.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_both_roundings_are_those_of_the_expression(cpu_module, dtype):
    gate, up = (3 * torch.randn(100, 400).to(dtype) for _ in range(2))
    expected = torch.nn.functional.silu(gate) * up
    assert float((gated_silu(gate, up, backend="cpu") != expected).float().mean()) < 1e-3


def test_far_gates_and_what_is_not_finite(backend):
    gate = torch.tensor([[-1e30, -200.0, -100.0, 100.0, 1e30, torch.nan, torch.inf, -torch.inf]])
    found = gated_silu(gate, torch.ones_like(gate), backend=backend)[0]
    assert bool((found[:3].abs() < 1e-36).all())
    assert found[3] == 100 and found[4] == 1e30
    assert not bool(found[5:].isfinite().any())


def test_the_same_bits_for_any_number_of_threads(isa):
    gate, up = torch.randn(3000, 100), torch.randn(3000, 100)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gated_silu(gate, up, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_native_module_checks_what_it_is_given(cpu_module):
    out, gate, up = np.empty((2, 3), np.float32), np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    cpu_module.gated_silu(out, gate, up, 1)
    assert (out == 0).all()
    for bad in (
        (out.T, gate.T, up.T),
        (out, gate[:1], up),
        (out, gate, up[:, ::2]),
        (out, gate, up.astype(np.float64)),
    ):
        with pytest.raises(ValueError):
            cpu_module.gated_silu(*bad, 1)
