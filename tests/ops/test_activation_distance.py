from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from floors import relative_error
from golden_memories import golden

from kedit_fast import activation_distance
from kedit_fast.reference.activation_distance import ACTIVATIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-14}


def test_distances_are_those_of_wise(backend):
    x, starts, weight = golden("route.x"), golden("route.starts"), golden("toy.W0")
    memories = torch.cat([golden("route.new")[None], golden("route.memories")])
    distances = activation_distance(x, x @ weight.T, memories, starts, "silu", 100, backend=backend)
    expected = torch.cat([golden("route.distance.new")[None], golden("route.distance.memories")])
    torch.testing.assert_close(distances, expected, rtol=1e-12, atol=1e-12)


def inputs(dtype, n=70, d=130, h=100, memories=3):
    """Sequences of 0, 1, 9, 30 and the other tokens; one side of each operand in another layout or dtype."""
    x = torch.randn(d, n).to(dtype).T if dtype == torch.float16 else torch.randn(n, d + 3).to(dtype)[:, :d]
    weights = torch.randn(memories, d, h).transpose(1, 2) if dtype == torch.float16 else torch.randn(memories, h, d)
    weights = (weights / d**0.5).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    reference, bias = torch.randn(n, h).to(dtype), torch.randn(h).to(dtype)
    return x, reference, weights, torch.tensor([0, 0, 1, 10, 40, n]), bias


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_distances_on_every_isa(isa, dtype, activation):
    check(*inputs(dtype), activation, "cpu")


def check(x, reference, weights, starts, bias, activation, backend, limits=LIMITS, device="cpu"):
    for long, shift in ((0, None), (25, bias)):
        wide = None if shift is None else shift.double()
        outputs = [F.linear(x.double(), w.double(), wide) for w in weights]
        act = ACTIVATIONS[activation]
        tokens = torch.stack([(act(o) - act(reference.double())).norm(dim=1) for o in outputs])
        parts = [tokens[:, a:b] for a, b in pairwise(starts.tolist())]
        expected = torch.stack([
            torch.zeros(len(weights)).double() if p.shape[1] == 0
            else p.amax(1) if long and p.shape[1] > long else p.mean(1)
            for p in parts
        ], 1)  # fmt: skip
        tensors = [t if t is None else t.to(device) for t in (x, reference, weights, starts)]
        shift = None if shift is None else shift.to(device)
        found = activation_distance(*tensors, activation, long, bias=shift, backend=backend)
        assert found.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert relative_error(found.cpu(), expected) <= limits[x.dtype]


def test_no_memory_no_sequence_and_no_token(backend):
    x, reference, weights, _, _ = inputs(torch.float32)
    whole = torch.tensor([0, 70])
    assert activation_distance(x, reference, weights[:0], whole, backend=backend).shape == (0, 1)
    assert activation_distance(x[:0], reference[:0], weights, torch.tensor([0]), backend=backend).shape == (3, 0)
    none = activation_distance(x[:0], reference[:0], weights, torch.tensor([0, 0]), backend=backend)
    assert torch.equal(none, torch.zeros(3, 1))


def test_a_sequence_has_the_bits_that_it_has_alone_for_any_number_of_threads(isa):
    x, reference, weights, starts, _ = inputs(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(activation_distance(x, reference, weights, starts, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = activation_distance(x[10:40], reference[10:40], weights, torch.tensor([0, 30]), backend="cpu")
    assert torch.equal(results[0][:, 3:4], alone)


def test_a_token_that_is_not_finite_shows(backend):
    x, reference, weights, starts, _ = inputs(torch.float32)
    x = x.clone()
    x[12, 5] = float("nan")
    for long in (0, 20):
        found = activation_distance(x, reference, weights, starts, "silu", long, backend=backend)
        assert torch.isnan(found[:, 3]).all() and torch.isfinite(found[:, [0, 1, 2, 4]]).all()


def test_the_native_module_takes_numpy_arrays(cpu_module):
    x, weights = np.ones((2, 3), np.float32), np.zeros((1, 4, 3), np.float32)
    distances, reference = np.zeros((1, 1), np.float32), np.ones((2, 4), np.float32)
    cpu_module.activation_distance(distances, x, reference, weights, [0, 2], "identity", 0, None, 1)
    assert distances[0, 0] == 2
    with pytest.raises(ValueError, match="starts must rise"):
        cpu_module.activation_distance(distances, x, reference, weights, [0, 3], "identity", 0, None, 1)
    with pytest.raises(ValueError, match="reference must be"):
        cpu_module.activation_distance(distances, x, reference[:1], weights, [0, 2], "identity", 0, None, 1)
