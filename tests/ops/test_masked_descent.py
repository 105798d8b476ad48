from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import RANK_K, relative_error
from golden_memories import golden
from masked_steps import STEP_SHAPES, layouts, problem

from kedit_fast import masked_descent_
from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import pack_bits, unpack_bits
from kedit_fast.reference.masked_descent import masked_descent_ as reference

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("decay_all", (True, False))
@pytest.mark.parametrize("given", ("grad", "factors"))
def test_four_steps_are_those_of_wise(backend, decay_all, given):
    lr, decay, bound = golden("wise.step").tolist()
    weight, origin, entries = golden("toy.W0"), golden("toy.W0"), golden("wise.keep_bits")
    path = golden(f"wise.steps.decay_{'all' if decay_all else 'masked'}")
    box = {"entries": entries, "decay": decay, "decay_all": decay_all, "origin": origin, "bound": bound}
    for grad, expected in zip(golden("wise.step_grads"), path, strict=True):
        eye = torch.eye(len(grad), dtype=grad.dtype)
        gradient = {"grad": grad} if given == "grad" else {"left": eye, "right": grad}
        assert masked_descent_(weight, lr, **gradient, **box, backend=backend)
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


def test_bits_are_those_of_the_mask():
    assert torch.equal(pack_bits(golden("wise.keep")), golden("wise.keep_bits"))
    for size in (0, 1, 7, 8, 9, 1001):
        mask = torch.rand(size) < 0.5
        assert torch.equal(unpack_bits(pack_bits(mask), size), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", (None, 0.2, 0.7), ids=str)
@pytest.mark.parametrize("rows", (0, 1, 77), ids=str)  # 0: from a gradient
def test_steps_on_every_isa_and_layout(isa, dtype, share, rows):
    for shape in STEP_SHAPES:
        for index, weight in enumerate(layouts(*shape, dtype)):
            check(weight, rows, share, index, "cpu")


def check(weight, rows, share, index, backend):
    """Against float64, with a box that holds some entries."""
    p = problem(weight, rows, share, index)
    expected = weight.double()
    wide = {name: t.double() if name != "entries" and t is not None else t for name, t in p.tensors.items()}
    flags = {"decay": 0.01, "decay_all": index % 2 == 0}
    reference(expected, 0.3, **wide, **flags, bound=p.bound)
    plain = weight.clone()
    plain_copy = None if p.copy is None else p.copy.clone()
    reference(plain, 0.3, **p.tensors, **flags, bound=p.bound, copy=plain_copy)
    assert masked_descent_(weight, 0.3, **p.tensors, **flags, bound=p.bound, copy=p.copy, backend=backend)
    limit = max(RANK_K[weight.dtype], 2 * relative_error(plain, expected))
    assert relative_error(weight, expected) <= limit
    if p.copy is not None:
        assert torch.equal(p.copy, weight.to(p.copy.dtype))


def test_entries_that_are_not_chosen_do_not_move_whatever_their_gradient(backend):
    for rows in (None, 40):
        mask = torch.rand(30, 50) < 0.25
        mask[3], mask[:, 7] = False, False
        weight = torch.randn(30, 50)
        before = weight.clone()
        grad = torch.randn(30, 50)
        gradient = {"grad": grad}
        if rows:
            gradient = {"left": torch.randn(rows, 30), "right": torch.randn(rows, 50)}
            gradient["left"][0, 3] = float("nan")
            gradient["right"][1, 7] = float("inf")
        else:
            grad[3], grad[:, 7] = float("nan"), float("inf")
        assert masked_descent_(weight, 0.1, **gradient, entries=pack_bits(mask), backend=backend)
        assert torch.equal(weight[~mask], before[~mask]) and bool((weight != before)[mask].all())


def test_what_is_not_finite_shows(backend):
    for bad, rest in ((float("nan"), None), (float("inf"), 1.0), (-float("inf"), -1.0)):
        weight, grad, origin = torch.zeros(5, 19), torch.zeros(5, 19), torch.zeros(5, 19)
        grad[2, 17] = -bad
        finite = masked_descent_(weight, 1.0, grad=grad, origin=origin, bound=1.0, backend=backend)
        assert not finite and finite.shape == () and finite.dtype == torch.bool
        assert torch.isnan(weight[2, 17]) if rest is None else weight[2, 17] == rest
        weight[2, 17] = 0
        assert bool((weight == 0).all())


def test_the_same_bits_for_any_number_of_threads(isa):
    weight, left, right = torch.randn(300, 700), torch.randn(90, 300), torch.randn(90, 700)
    before = torch.get_num_threads()
    for share in (0.2, 0.8):
        entries, results = pack_bits(torch.rand(300, 700) < share), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(weight.clone())
                masked_descent_(results[-1], 0.1, left=left, right=right, entries=entries, backend="cpu")
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_long_sums_are_taken_in_parts(isa):
    weight, left, right = torch.zeros(20, 40), torch.randn(1500, 20), torch.randn(1500, 40)
    expected = -left.double().T @ right.double()
    for share in (0.3, 1.0):
        mask = torch.rand(20, 40) < share
        weight.zero_()
        masked_descent_(weight, 1.0, left=left, right=right, entries=pack_bits(mask), backend="cpu")
        assert relative_error(weight, torch.where(mask, expected, 0.0)) < 1e-6


def test_the_native_module_takes_numpy_arrays(cpu_module):
    weight, grad = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    step = (grad, None, None, None, 0.0, False, None, -1.0, None, 1)
    assert cpu_module.masked_descent_(weight, 0.5, *step)
    assert (weight == 0.5).all()
    with pytest.raises(ValueError, match="grad must be"):
        cpu_module.masked_descent_(weight, 0.5, grad[:2], *step[1:])
    with pytest.raises(ValueError, match="entries must be bytes"):
        cpu_module.masked_descent_(weight, 0.5, grad, None, None, np.zeros(3, np.uint8), *step[4:])
    with pytest.raises(ValueError, match="needs its origin"):
        cpu_module.masked_descent_(weight, 0.5, *step[:7], 1.0, None, 1)


def test_writing_into_shared_memory_is_refused():
    block = torch.randn(8, 9)
    with pytest.raises(InvalidArgumentError, match="share memory"):
        masked_descent_(block, 0.1, grad=block)
    with pytest.raises(InvalidArgumentError, match="overlaps itself"):
        masked_descent_(torch.zeros(1).expand(8, 9), 0.1, grad=block)
