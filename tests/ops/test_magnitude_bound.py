from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_memories import golden

from kedit_fast import magnitude_bound


def right(size, count):
    return size.flatten().sort(descending=True).values[count - 1]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_an_entry_of_that_rank(every_backend, dtype):
    slow = every_backend == "triton"
    for shape in ((1,), (7,), (64, 65), (5, 7, 11), (2, 4099))[:: 3 if slow else 1]:
        x, divisor = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
        n = x.numel()
        for count in {1, n, 1 + n // 2, 1 + n // 10} if not slow else {1 + n // 3}:
            bound = magnitude_bound(x, count, backend=every_backend)
            assert bound.shape == () and bound.dtype == torch.float32
            assert torch.equal(bound, right(x.float().abs(), count))
            quotient = (x.float() / (divisor.float() + 1e-8)).abs()
            assert torch.equal(magnitude_bound(x, count, divisor, backend=every_backend), right(quotient, count))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_every_isa_and_number_of_threads_finds_the_same(isa, dtype):
    x, divisor = torch.randn(600_001).to(dtype), torch.randn(600_001).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    quotient = (x.to(wide) / (divisor.to(wide) + 1e-8)).abs()
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for count in (1, 240_000, 600_001):
                assert torch.equal(magnitude_bound(x, count, backend="cpu"), right(x.to(wide).abs(), count))
                assert torch.equal(magnitude_bound(x, count, divisor, backend="cpu"), right(quotient, count))
    finally:
        torch.set_num_threads(before)


def test_the_native_module_checks_what_it_is_given(cpu_module):
    out, x = np.empty(1, np.float32), np.arange(5, dtype=np.float32)
    cpu_module.magnitude_bound(out, x, None, 2, 1)
    assert out[0] == 3
    for bad in ((out, x, None, 0), (out, x, None, 6), (out, x, x[:4], 1), (out[:0], x, None, 1),
                (out, x.astype(np.float64), None, 1), (out, x, x.astype(np.float64), 1)):  # fmt: skip
        with pytest.raises(ValueError):
            cpu_module.magnitude_bound(*bad, 1)


def test_sizes_of_every_kind(every_backend):
    """Zeros of both signs, numbers below the normal ones, infinities, and many that tie."""
    tiny = torch.tensor([0.0, -0.0, 1e-45, -3e-45, 1e-40, 3.4e38, -torch.inf, torch.inf])
    x = torch.cat([tiny, torch.full((50,), -2.5), torch.randn(41) * 10.0 ** torch.randint(-30, 30, (41,))])
    x = x[torch.randperm(len(x))]
    for count in range(1, len(x) + 1, 14 if every_backend == "triton" else 1):  # the interpreter is slow
        assert torch.equal(magnitude_bound(x, count, backend=every_backend), right(x.abs(), count)), count


def test_any_strides(every_backend):
    x, divisor = torch.randn(30, 41).T, torch.randn(41, 60)[:, ::2]
    for y in (None, divisor, divisor.T.contiguous().T):
        quotient = x.abs() if y is None else (x / (y + 1e-8)).abs()
        assert torch.equal(magnitude_bound(x, 300, y, backend=every_backend), right(quotient, 300))


def test_not_a_number_is_passed_on(every_backend):
    x = torch.randn(300)
    x[170] = torch.nan
    for count in (1, 2, 300):
        assert bool(magnitude_bound(x, count, backend=every_backend).isnan())
    zero = torch.zeros(3)
    assert bool(magnitude_bound(zero, 1, torch.tensor([1.0, -1e-8, 1.0]), backend=every_backend).isnan())


def test_the_bound_of_rect():
    delta, weight = golden("relative.delta"), golden("toy.W0")
    n = delta.numel()
    bound = magnitude_bound(delta, n - max(1, int(n * 0.6)) + 1, weight)
    torch.testing.assert_close(bound, golden("relative.bound").squeeze(), rtol=1e-12, atol=0)
