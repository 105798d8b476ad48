from __future__ import annotations

import pytest
import torch
from floors import GATED, relative_error
from torch.nn.functional import gelu

from kedit_fast import gated_gelu

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 63), (9, 256), (2, 4097), (0, 8), (3, 0)]


def exact(gate, up):
    return gelu(gate.double(), approximate="tanh") * up.double()


def without_cancellation(gate):
    """gelu in float64: 1 + tanh(z / 2) = 2 sigmoid(z)."""
    wide = gate.double()
    return wide * (2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)).sigmoid()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_every_isa_gates_rows(isa, dtype):
    for rows, d in SHAPES:
        both = (3 * torch.randn(rows, 2 * d)).to(dtype)
        for gate, up in (both.chunk(2, -1), (torch.randn(d, rows).to(dtype).T, both[:, :d])):
            result = gated_gelu(gate, up, backend="cpu")
            assert result.shape == gate.shape and result.dtype == dtype and result.is_contiguous()
            plain = relative_error(gated_gelu(gate, up, backend="torch"), exact(gate, up))
            assert relative_error(result, exact(gate, up)) <= max(GATED[dtype], 2 * plain)


def test_negative_gates_do_not_cancel(isa):
    """1 + tanh loses its digits there; an error of z is multiplied by exp, so it grows with z."""
    gate = torch.linspace(-4, 0, 4001)[None]
    result = gated_gelu(gate, torch.ones_like(gate), backend="cpu")
    expected = without_cancellation(gate)
    assert bool(((result.double() - expected).abs() <= 3e-6 * expected.abs()).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_both_roundings_are_those_of_the_expression(cpu_module, dtype):
    gate, up = (3 * torch.randn(100, 400).to(dtype) for _ in range(2))
    expected = without_cancellation(gate).to(dtype) * up
    assert float((gated_gelu(gate, up, backend="cpu") != expected).float().mean()) < 1e-3


def test_far_gates_and_what_is_not_finite(backend):
    gate = torch.tensor([[-1e30, -200.0, -100.0, 100.0, 1e30, torch.nan, torch.inf, -torch.inf]])
    result = gated_gelu(gate, torch.ones_like(gate), backend=backend)[0]
    assert bool((result[:3].abs() < 1e-36).all())
    assert result[3] == 100 and result[4] == 1e30
    assert not bool(result[5:].isfinite().any())
