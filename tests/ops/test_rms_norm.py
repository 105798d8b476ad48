from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import NORM, relative_error

from kedit_fast import rms_norm

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 63), (9, 256), (2, 4097), (0, 8)]


def exact(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def llama(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_every_isa_norms_rows(isa, dtype):
    for rows, d in SHAPES:
        for x in (torch.randn(rows, d), torch.randn(rows, 2 * d)[:, d:], torch.randn(d, rows).T):
            x, weight = (10 * x).to(dtype), torch.randn(d).to(dtype)
            found = rms_norm(x, weight, 1e-5, round_first=False, backend="cpu")
            assert found.shape == x.shape and found.dtype == dtype and found.is_contiguous()
            assert relative_error(found, exact(x, weight, 1e-5)) <= NORM[dtype]


def test_the_torch_backend_norms_rows():
    for dtype, limit in NORM.items():
        x, weight = torch.randn(20, 300).to(dtype), torch.randn(300).to(dtype)
        found = rms_norm(x, weight, 1e-5, round_first=False, backend="torch")
        assert relative_error(found, exact(x, weight, 1e-5)) <= limit


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounding_first_is_llamas_norm(backend, dtype):
    """A sum that is rounded otherwise moves a quotient across a rounding boundary once in a great while."""
    x, weight = torch.randn(400, 256).to(dtype), torch.randn(256).to(dtype)
    found, expected = rms_norm(x, weight, backend=backend), llama(x, weight, 1e-6)
    assert float((found != expected).float().mean()) < 1e-3
    once = rms_norm(x, weight, round_first=False, backend=backend)
    assert float((once != expected).float().mean()) > 0.05  # the switch does something


def test_a_wide_weight_beside_narrow_rows(backend):
    x, weight = torch.randn(30, 64).bfloat16(), 1 + torch.randn(64)
    found = rms_norm(x, weight, round_first=False, backend=backend)
    assert found.dtype == torch.bfloat16 and relative_error(found, exact(x, weight, 1e-6)) <= NORM[torch.bfloat16]


def test_more_dimensions_and_zero_rows(backend):
    x = torch.randn(2, 3, 4, 32)
    x[1, 1] = 0
    found = rms_norm(x, torch.ones(32), backend=backend)
    assert found.shape == x.shape and bool((found[1, 1] == 0).all())
    assert relative_error(found, exact(x, torch.ones(32), 1e-6)) <= NORM[torch.float32]


def test_what_is_not_finite_stays_in_its_row(backend):
    x = torch.randn(4, 40)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    found = rms_norm(x, torch.ones(40), backend=backend)
    assert bool(found[1].isnan().all()) and bool(found[2, 0].isnan()) and bool(found[[0, 3]].isfinite().all())


def test_the_same_bits_for_any_number_of_threads(isa):
    x, weight = torch.randn(3000, 100), torch.randn(100)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(rms_norm(x, weight, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_native_module_checks_what_it_is_given(cpu_module):
    out, x, weight = np.empty((2, 3), np.float32), np.ones((2, 3), np.float32), np.ones(3, np.float32)
    cpu_module.rms_norm(out, x, weight, 0.0, True, 1)
    assert (out == 1).all()
    for bad in (
        (out[:, :2], x, weight),
        (out, x[:1], weight),
        (out, x, weight[:2]),
        (out, x.astype(np.float64), weight),
    ):
        with pytest.raises(ValueError):
            cpu_module.rms_norm(*bad, 0.0, True, 1)
