"""The Triton kernels of tuning and of memories against float64, as in test_triton.py."""

from __future__ import annotations

import pytest
import test_activation_distance as distance
import test_masked_adam as adam
import test_routed_linear as routed
import torch
from floors import RANK_K, relative_error
from masked_steps import STEP_SHAPES, layouts, problem

from kedit_fast import masked_adam_, masked_descent_
from kedit_fast.backends import probe
from kedit_fast.ops import pack_bits
from kedit_fast.reference.masked_descent import masked_descent_ as reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.skipif(bool(probe("triton").reason), reason=f"triton: {probe('triton').reason}"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton.*"),
]


@pytest.mark.parametrize("rows", (0, 40))  # 0: from a gradient
@pytest.mark.parametrize("share", (None, 0.3), ids=str)
def test_a_step_of_descent(rows, share):
    for index, weight in enumerate(layouts(33, 66, torch.float32)):
        p = problem(weight, rows, share, index)
        if rows and index == 2:  # no kernel takes float64
            p.tensors["left"] = p.tensors["left"].float()
        expected = weight.double()
        wide = {name: t.double() if name != "entries" and t is not None else t for name, t in p.tensors.items()}
        flags = {"decay": 0.01 * (index % 3), "decay_all": index % 2 == 0, "bound": p.bound}
        reference(expected, 0.3, **wide, **flags)
        border = torch.full((35, 75), 7.0, device=DEVICE)
        ours = border[1:34, 2:68]
        if weight.stride(0) == 1:
            border = torch.full((75, 35), 7.0, device=DEVICE)
            ours = border.T[1:34, 2:68]
        ours.copy_(weight)
        tensors = {name: None if t is None else t.to(DEVICE) for name, t in p.tensors.items()}
        copy = None if p.copy is None else p.copy.to(DEVICE)
        assert masked_descent_(ours, 0.3, **tensors, **flags, copy=copy, backend="triton")
        assert relative_error(ours.cpu(), expected) <= RANK_K[torch.float32]
        assert int((border == 7.0).sum()) == border.numel() - ours.numel(), "memory beside the weight was written"
        if copy is not None:
            assert torch.equal(copy, ours.to(copy.dtype))


@pytest.mark.parametrize("rows", (0, 16))
@pytest.mark.parametrize("share", (None, 0.3), ids=str)
def test_steps_of_adam(rows, share):
    for index, weight in enumerate(layouts(*STEP_SHAPES[1], torch.float32)):
        if not rows or index != 2:  # its factors are of float64
            adam.check(weight, rows, share, index, "triton", device=DEVICE)


def test_an_inactive_step_moves_no_state_and_holds_the_box():
    weight, origin = torch.full((3, 20), 2.0, device=DEVICE), torch.zeros(3, 20, device=DEVICE)
    mean, square, grad = (torch.rand(3, 20, device=DEVICE) for _ in range(3))
    count, before = torch.tensor(4, device=DEVICE), (mean.clone(), square.clone())
    for active in (False, True):
        on = torch.tensor(active, device=DEVICE)
        step = {"grad": grad, "origin": origin, "bound": 0.5, "active": on, "backend": "triton"}
        assert masked_adam_(weight, mean, square, count, 0.1, **step)
        assert torch.equal(mean, before[0]) == torch.equal(square, before[1]) == (not active)
        assert count == 4 + active and bool(((weight < 0.5) if active else (weight == 0.5)).all())


def test_what_is_not_finite_shows():
    weight, grad = torch.zeros(5, 19, device=DEVICE), torch.zeros(5, 19, device=DEVICE)
    grad[2, 17] = float("inf")
    mask = torch.ones(5, 19, dtype=torch.bool)
    mask[2, 17] = False
    bits = pack_bits(mask).to(DEVICE)
    assert masked_descent_(weight, 1.0, grad=grad, entries=bits, backend="triton") and bool((weight == 0).all())
    origin = torch.zeros(5, 19, device=DEVICE)
    assert not masked_descent_(weight, 1.0, grad=grad, origin=origin, bound=1.0, backend="triton")
    assert weight[2, 17] == -1
    assert not masked_descent_(weight, 1.0, grad=-grad / 0 * 0, backend="triton")
    assert torch.isnan(weight[2, 17])


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("silu", torch.bfloat16), ("gelu_tanh", torch.float16)]
    + [(activation, torch.float32) for activation in ("identity", "relu", "silu", "gelu")],
    ids=str,
)
def test_distances(dtype, activation):
    tensors = distance.inputs(dtype, n=41, d=40, h=35, memories=2)
    distance.check(*tensors, activation, "triton", device=DEVICE)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_go_where_they_are_routed(dtype):
    routed.check(*routed.inputs(dtype, n=35, d=40, h=35), "triton", device=DEVICE)
    routed.check(*routed.inputs(dtype, n=1, d=5, h=1), "triton", device=DEVICE)
