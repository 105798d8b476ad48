from __future__ import annotations

import pytest
import torch
from floors import RANK_K, relative_error
from golden_memories import golden
from masked_steps import STEP_SHAPES, layouts, problem

from kedit_fast import masked_adam_
from kedit_fast.ops import pack_bits
from kedit_fast.reference.masked_adam import masked_adam_ as reference

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("counted", (torch.float32, torch.int64), ids=str)
def test_steps_are_those_of_torch(backend, counted):
    weight, count = golden("toy.W0"), torch.zeros((), dtype=counted)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    parameter = torch.nn.Parameter(golden("toy.W0"))
    adam = torch.optim.Adam([parameter], lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    for grad in golden("wise.step_grads"):
        step = {"betas": (0.8, 0.95), "eps": 1e-6, "grad": grad}
        assert masked_adam_(weight, mean, square, count, 0.05, **step, backend=backend)
        parameter.grad = grad
        adam.step()
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-12, atol=1e-12)
    assert count == 4


def check(weight, rows, share, index, backend, limits=RANK_K, device="cpu"):
    """Three steps against float64, with a box that holds some entries; the state is laid out in another way."""
    p = problem(weight, rows, share, index)
    wide = {name: t.double() if name != "entries" and t is not None else t for name, t in p.tensors.items()}
    expected = weight.double(), torch.zeros(weight.shape).double(), torch.zeros(weight.shape).double()
    plain = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    mean, square = torch.zeros(weight.shape, dtype=weight.dtype), torch.zeros(weight.shape[::-1], dtype=weight.dtype).T
    tensors = {name: None if t is None else t.to(device) for name, t in p.tensors.items()}
    ours = [t.to(device) for t in (weight, mean, square)]
    count, copy = torch.zeros((), dtype=torch.int64, device=device), None if p.copy is None else p.copy.to(device)
    for _ in range(3):
        assert masked_adam_(*ours, count, 0.05, bound=p.bound, copy=copy, **tensors, backend=backend)
    steps = torch.zeros(()), torch.zeros(())
    for _ in range(3):
        reference(*expected, steps[0], 0.05, bound=p.bound, **wide)
        reference(*plain, steps[1], 0.05, bound=p.bound, **p.tensors)
    assert count == 3
    for found, right, other in zip(ours, expected, plain, strict=True):
        assert relative_error(found.cpu(), right) <= max(limits[weight.dtype], 2 * relative_error(other, right))
    if copy is not None:
        assert torch.equal(copy, ours[0].to(copy.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", (None, 0.2), ids=str)
@pytest.mark.parametrize("rows", (0, 16), ids=str)  # 0: from a gradient
def test_steps_on_every_isa_and_layout(isa, dtype, share, rows):
    for shape in STEP_SHAPES:
        for index, weight in enumerate(layouts(*shape, dtype)):
            check(weight, rows, share, index, "cpu")


@pytest.mark.parametrize("rows", (0, 5))
def test_an_inactive_step_moves_no_state_and_holds_the_box(backend, rows):
    weight, origin = torch.full((3, 20), 2.0), torch.zeros(3, 20)
    mean, square, count = torch.rand(3, 20), torch.rand(3, 20), torch.tensor(4)
    before, copy = (mean.clone(), square.clone()), torch.zeros(3, 20, dtype=torch.bfloat16)
    gradient = {"left": torch.rand(rows, 3), "right": torch.rand(rows, 20)} if rows else {"grad": torch.rand(3, 20)}
    box = {"origin": origin, "bound": 0.5, "copy": copy}
    off, on = torch.tensor(False), torch.tensor(True)
    assert masked_adam_(weight, mean, square, count, 0.1, **gradient, **box, active=off, backend=backend)
    assert torch.equal(mean, before[0]) and torch.equal(square, before[1]) and count == 4
    assert bool((weight == 0.5).all()) and bool((copy == 0.5).all())
    masked_adam_(weight, mean, square, count, 0.1, **gradient, **box, active=on, backend=backend)
    assert count == 5 and not torch.equal(mean, before[0]) and bool((weight < 0.5).all())


def test_a_gradient_that_is_not_chosen_counts_as_zero_and_not_finite_shows(backend):
    weight, mean, square, count = torch.zeros(2, 9), torch.zeros(2, 9), torch.zeros(2, 9), torch.zeros(())
    grad, mask = torch.ones(2, 9), torch.ones(2, 9, dtype=torch.bool)
    grad[1, 8], mask[1, 8] = float("nan"), False
    assert masked_adam_(weight, mean, square, count, 0.1, grad=grad, entries=pack_bits(mask), backend=backend)
    assert weight[1, 8] == 0 and mean[1, 8] == 0 and bool((weight[mask] != 0).all())
    assert not masked_adam_(weight, mean, square, count, 0.1, grad=grad, backend=backend)
    assert torch.isnan(weight[1, 8]) and int(torch.isnan(weight).sum()) == 1
