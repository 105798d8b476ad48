from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from floors import relative_error
from golden_memories import golden

from kedit_fast import routed_linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}


def test_outputs_are_those_of_wise(backend):
    x, starts, weight = golden("route.x"), golden("route.starts"), golden("toy.W0")
    memories = torch.cat([golden("route.new")[None], golden("route.memories")])
    route = golden("route.retrieve.choice.mended").repeat_interleave(starts.diff())
    expected = golden("route.retrieve.output.mended")
    for beside in ({"weight": weight}, {"weight": None, "output": x @ weight.T}):
        out = routed_linear(x, memories=memories, route=route, **beside, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def inputs(dtype, n=70, d=130, h=100, memories=3):
    """One side of each operand in another layout or dtype; memory 1 has no rows."""
    x = torch.randn(d, n).to(dtype).T if dtype == torch.float16 else torch.randn(n, d + 3).to(dtype)[:, :d]
    weight, stored = torch.randn(d, h).T / d**0.5, torch.randn(memories, h, d) / d**0.5
    stored = stored.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    if dtype == torch.float16:
        stored = stored.transpose(1, 2).contiguous().transpose(1, 2)
    route = torch.tensor([-1, 0, 2])[torch.randint(0, 3, (n,))]
    return x, weight.to(dtype), stored, route, torch.randn(h)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_go_where_they_are_routed_on_every_isa(isa, dtype):
    check(*inputs(dtype), "cpu")
    check(*inputs(dtype, n=1, d=5, h=1), "cpu")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_torch_backend_sends_rows_where_they_are_routed(dtype):
    check(*inputs(dtype), "torch")


def check(x, weight, memories, route, bias, backend, limits=LIMITS, device="cpu"):
    for shift in (None, bias):
        wide = None if shift is None else shift.double()
        products = [F.linear(x.double(), w.double(), wide) for w in (weight, *memories)]
        expected = torch.stack(products)[route + 1, torch.arange(len(x))]
        output = torch.randn(expected.shape[::-1]).to(x.dtype).T
        x_, weight_, memories_, route_, output_ = (t.to(device) for t in (x, weight, memories, route, output))
        shift = None if shift is None else shift.to(device)
        found = routed_linear(x_, weight_, memories_, route_, bias=shift, backend=backend)
        assert found.dtype == x.dtype and found.is_contiguous()
        assert relative_error(found.cpu(), expected) <= limits[x.dtype]
        found = routed_linear(x_, None, memories_, route_, output=output_, bias=shift, backend=backend).cpu()
        beside = route < 0
        assert torch.equal(found[beside], output[beside])
        if bool((~beside).any()):
            assert relative_error(found[~beside], expected[~beside]) <= limits[x.dtype]


def test_no_row_and_no_memory(backend):
    x, weight, memories, route, _ = inputs(torch.float32)
    assert routed_linear(x[:0], weight, memories, route[:0], backend=backend).shape == (0, 100)
    away = torch.full_like(route, -1)
    found = routed_linear(x, weight, memories[:0], away, backend=backend)
    assert relative_error(found, F.linear(x, weight)) < 1e-6
    output = torch.randn(70, 100)
    found = routed_linear(x, None, memories[:0], away, output=output, backend=backend)
    assert torch.equal(found, output) and found.data_ptr() != output.data_ptr()


def test_a_row_has_the_bits_that_it_has_alone_for_any_number_of_threads(isa):
    x, weight, memories, route, _ = inputs(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(routed_linear(x, weight, memories, route, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for row in (0, 33, 69):
        alone = routed_linear(x[row : row + 1], weight, memories, route[row : row + 1], backend="cpu")
        assert torch.equal(results[0][row : row + 1], alone)


def test_the_native_module_takes_numpy_arrays(cpu_module):
    out, x = np.zeros((2, 4), np.float32), np.ones((2, 3), np.float32)
    memories = np.ones((1, 4, 3), np.float32)
    cpu_module.routed_linear(out, x, None, memories, [-1, 0], None, 1)
    assert (out == [[0] * 4, [3] * 4]).all()
    with pytest.raises(ValueError, match="route must be -1 to"):
        cpu_module.routed_linear(out, x, None, memories, [-1, 1], None, 1)
    with pytest.raises(ValueError, match=r"route must be \[n\]"):
        cpu_module.routed_linear(out, x, None, memories, [-1], None, 1)
    with pytest.raises(ValueError, match="out must be"):
        cpu_module.routed_linear(out[:, :3], x, None, memories, [-1, 0], None, 1)
