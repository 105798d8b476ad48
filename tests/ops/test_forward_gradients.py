"""Gradients of the norm and of the gated activations against float64, and what is refused of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from floors import GATED, GATED_GRADIENT, NORM_GRADIENT, relative_error
from torch.nn.functional import gelu, silu
from torch_states import STATES

from kedit_fast import gated_gelu, gated_silu, rms_norm
from kedit_fast.errors import GradientError, InvalidArgumentError

COLUMNS = (1, 7, 63, 64, 65, 129, 1027)
NARROW = (torch.float32, torch.bfloat16, torch.float16)
GATES = {"silu": (gated_silu, silu), "gelu": (gated_gelu, lambda x: gelu(x, approximate="tanh"))}

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton.*")  # the interpreter's inf times 0


def laid_out(rows, d, dtype):
    """Matrices of one shape: contiguous, halves of a wider one, transposed, and with a step between columns."""
    wide = torch.randn(rows, 2 * d)
    parts = torch.randn(rows, d), wide[:, d:], torch.randn(d, rows).T, torch.randn(rows, 2 * d)[:, ::2]
    return [part.to(dtype) for part in parts]


def wide_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def norm_error(x, weight, grad, slope, eps=1e-5):
    """Relative to the first of the gradient's two terms: in a row of one number they are the same but for eps."""
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(wide_norm(wide, weight.double(), eps), wide, grad.double())
    rstd = torch.rsqrt(wide.detach().square().mean(-1, keepdim=True) + eps)
    straight = grad.double() * weight.double() * rstd
    return float((slope.double() - expected).norm() / straight.norm())


def norm_slope(x, weight, grad, backend, **options):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(rms_norm(x, weight, 1e-5, backend=backend, **options), x, grad)
    return slope


def gate_slopes(op, gate, up, grad, backend=None):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    return torch.autograd.grad(op(gate, up, backend=backend), (gate, up), grad)


def wide_gate_slopes(activation, gate, up, grad):
    gate, up = (part.detach().double().requires_grad_() for part in (gate, up))
    return torch.autograd.grad(activation(gate) * up, (gate, up), grad.double())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_isa_has_the_norms_gradient(isa, dtype):
    for d in COLUMNS:
        weight = torch.randn(d)
        for x, grad in zip(laid_out(5, d, dtype), reversed(laid_out(5, d, dtype)), strict=True):
            for gain in (weight, weight.to(dtype)):
                slope = norm_slope(3 * x, gain, grad, "cpu")
                assert slope.shape == x.shape and slope.dtype == dtype and slope.is_contiguous()
                plain = norm_error(3 * x, gain, grad, norm_slope(3 * x, gain, grad, "torch"))
                assert norm_error(3 * x, gain, grad, slope) <= max(NORM_GRADIENT[dtype], 2 * plain)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_every_isa_has_the_gates_gradients(isa, name, dtype):
    op, activation = GATES[name]
    for d in COLUMNS:
        both = (3 * torch.randn(5, 2 * d)).to(dtype)
        for (gate, up), grad in zip(
            (both.chunk(2, -1), (both[:, ::2], both[:, 1::2]), (both[:, d:], both[:, :d])),
            laid_out(5, d, dtype),
            strict=False,
        ):
            slopes = gate_slopes(op, gate, up, grad, "cpu")
            plain = gate_slopes(op, gate, up, grad, "torch")
            for slope, other, expected in zip(slopes, plain, wide_gate_slopes(activation, gate, up, grad), strict=True):
                assert slope.shape == gate.shape and slope.dtype == dtype and slope.is_contiguous()
                limit = max(GATED_GRADIENT[dtype], GATED[dtype], 2 * relative_error(other, expected))
                assert relative_error(slope, expected) <= limit


@pytest.mark.parametrize("dtype", (*NARROW, torch.float64), ids=str)
def test_the_reference_has_the_gradients(dtype):
    x, grad, weight = (torch.randn(*shape).to(dtype) for shape in ((20, 300), (20, 300), (300,)))
    assert norm_error(x, weight, grad, norm_slope(x, weight, grad, "torch")) <= NORM_GRADIENT[dtype]
    for op, activation in GATES.values():
        slopes = gate_slopes(op, x, grad, grad, "torch")
        for slope, expected in zip(slopes, wide_gate_slopes(activation, x, grad, grad), strict=True):
            assert relative_error(slope, expected) <= max(GATED_GRADIENT[dtype], GATED[dtype])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_triton_has_the_values_and_the_gradients(dtype):
    """Under the interpreter on a CPU, whose blocks are of 64 columns."""
    triton = pytest.importorskip("kedit_fast.backends").probe("triton")
    if triton.reason:
        pytest.skip(f"triton: {triton.reason}")
    device = "cpu" if triton.explicit_only else "cuda"
    for d in (1, 129):
        x, half, columns, _ = (part.to(device) for part in laid_out(3, d, dtype))
        wide = torch.randn(d, device=device)
        for weight, flag in ((wide, False), (wide.to(dtype), True)):
            value = rms_norm(x, weight, 1e-5, round_first=flag, backend="triton")
            plain = rms_norm(x, weight, 1e-5, round_first=flag, backend="torch")
            assert relative_error(value, plain) <= 2 * NORM_GRADIENT[dtype]
            slope = norm_slope(half, weight, columns, "triton")
            limit = 2 * norm_error(half, weight, columns, norm_slope(half, weight, columns, "torch"))
            assert norm_error(half, weight, columns, slope) <= max(NORM_GRADIENT[dtype], limit)
        for op, activation in GATES.values():
            expected = activation(3 * half.double()) * columns.double()
            assert relative_error(op(3 * half, columns, backend="triton"), expected) <= 2 * GATED[dtype]
            slopes = gate_slopes(op, 3 * half, columns, x, "triton")
            for slope, right in zip(slopes, wide_gate_slopes(activation, 3 * half, columns, x), strict=True):
                assert relative_error(slope, right) <= max(GATED_GRADIENT[dtype], GATED[dtype])


def test_rows_of_nothing_have_gradients_of_nothing(every_backend):
    slope = norm_slope(torch.empty(0, 8), torch.ones(8), torch.empty(0, 8), every_backend)
    assert slope.shape == (0, 8)
    for op, _ in GATES.values():
        for shape in ((0, 8), (3, 0), (2, 0, 5)):
            slopes = gate_slopes(op, torch.empty(shape), torch.empty(shape), torch.empty(shape), every_backend)
            assert [slope.shape for slope in slopes] == [shape, shape]


def test_more_dimensions_and_one(every_backend):
    for shape in ((5,), (2, 3, 5)):
        x, grad, weight = torch.randn(shape), torch.randn(shape), torch.randn(5)
        assert norm_error(x, weight, grad, norm_slope(x, weight, grad, every_backend)) <= 4e-7
        slopes = gate_slopes(gated_silu, x, grad, grad, every_backend)
        for slope, expected in zip(slopes, wide_gate_slopes(silu, x, grad, grad), strict=True):
            assert slope.shape == shape and relative_error(slope, expected) <= 4e-7


def test_a_sums_gradient_is_one_number_everywhere(backend):
    """An expanded gradient, all of whose strides are 0."""
    x, weight = torch.randn(4, 9).requires_grad_(), torch.randn(9)
    rms_norm(x, weight, 1e-5, backend=backend).sum().backward()
    assert norm_error(x, weight, torch.ones(4, 9), x.grad) <= 4e-7
    gate, up = torch.randn(4, 9).requires_grad_(), torch.randn(4, 9)
    gated_silu(gate, up, backend=backend).sum().backward()
    assert relative_error(gate.grad, wide_gate_slopes(silu, gate, up, torch.ones(4, 9))[0]) <= 4e-7


def test_what_is_not_finite_stays_in_its_row(every_backend):
    x, grad = torch.randn(4, 40), torch.randn(4, 40)
    x[1, 3], grad[2, 0] = torch.nan, torch.nan
    slope = norm_slope(x, torch.ones(40), grad, every_backend)
    assert bool(slope[1:3].isnan().all()) and bool(slope[[0, 3]].isfinite().all())
    for op, _ in GATES.values():
        d_gate, d_up = gate_slopes(op, x, torch.ones(4, 40), grad, every_backend)
        for part in (d_gate, d_up):
            assert bool(part[1, 3].isnan()) and bool(part[2, 0].isnan()) and int(part.isnan().sum()) == 2


def test_far_gates_have_the_gradients_of_straight_lines(every_backend):
    gate = torch.tensor([[-1e30, -3e15, -200.0, -90.0, 90.0, 200.0, 3e15, 1e30]])
    for op, _ in GATES.values():
        d_gate, d_up = gate_slopes(op, gate, torch.ones_like(gate), torch.ones_like(gate), every_backend)
        if every_backend != "torch" or op is gated_silu:  # torch's gelu: infinity times 0
            torch.testing.assert_close(d_gate, torch.tensor([[0.0] * 4 + [1.0] * 4]), atol=1e-30, rtol=1e-6)
            torch.testing.assert_close(d_up, torch.where(gate < 0, 0.0, gate), atol=1e-30, rtol=1e-6)


def test_the_same_bits_for_any_number_of_threads(isa):
    x, grad, weight = torch.randn(3000, 100), torch.randn(3000, 100), torch.randn(100)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            slopes = gate_slopes(gated_silu, x, grad, grad, "cpu")
            results.append(torch.stack([norm_slope(x, weight, grad, "cpu"), *slopes]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_stays_in_memory_is_the_inputs_and_a_number_a_row(backend):
    x, weight = torch.randn(6, 32).bfloat16().requires_grad_(), torch.randn(32).bfloat16()
    gate, up = (torch.randn(6, 32).bfloat16().requires_grad_() for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: saved.append(part) or part, lambda part: part):
        rms_norm(x, weight, backend=backend)
        gated_silu(gate, up, backend=backend)
    assert sum(part.nbytes for part in saved) == 2 * (6 * 32 * 3 + 32) + 4 * 6


@pytest.mark.parametrize("name", [name for name in STATES if name not in ("inference mode", "no grad")])
def test_the_process_settings_change_no_bit(backend, name):
    x, grad, weight = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)

    def slopes():
        return [norm_slope(x, weight, grad, backend), *gate_slopes(gated_gelu, x, grad, grad, backend)]

    expected = slopes()
    with STATES[name]():
        results = slopes()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, expected, strict=True))


def test_a_second_derivative_is_refused(every_backend):
    x, weight = torch.randn(3, 8).requires_grad_(), torch.ones(8)
    for name, value in (
        ("rms_norm", rms_norm(x, weight, backend=every_backend)),
        ("gated_silu", gated_silu(x, x, backend=every_backend)),
        ("gated_gelu", gated_gelu(x, x, backend=every_backend)),
    ):
        with pytest.raises(GradientError, match=f"{name} has no second derivative"):
            torch.autograd.grad(value.sum(), x, create_graph=True)


def test_a_norm_whose_weight_is_trained_is_refused(every_backend):
    with pytest.raises(GradientError, match="no derivative with respect to weight"):
        rms_norm(torch.ones(3, 8), torch.ones(8).requires_grad_(), backend=every_backend)


def test_the_gradients_checks_are_by_name():
    x, rstd = torch.ones(3, 8), torch.ones(3)
    ops = torch.ops.kedit_fast
    with pytest.raises(InvalidArgumentError, match=r"grad must be \[3, 8\]"):
        ops.rms_norm_backward(x[:2], x, x[0], rstd, "")
    with pytest.raises(InvalidArgumentError, match=r"rstd must be \[3\]"):
        ops.rms_norm_backward(x, x, x[0], rstd[:2], "")
    with pytest.raises(InvalidArgumentError, match="grad must be float32"):
        ops.gated_silu_backward(x.half(), x, x, "")


def test_the_native_module_checks_what_it_is_given(cpu_module):
    out, x, row = np.empty((2, 3), np.float32), np.ones((2, 3), np.float32), np.ones(2, np.float32)
    weight = np.ones(3, np.float32)
    cpu_module.rms_norm_backward(out, x, x, weight, row, 1)
    assert (out == 0).all()  # a row of equal numbers: another length changes nothing
    for bad in (
        (out[:, :2], x, x, weight, row), (out, x[:1], x, weight, row), (out, x, x[:, ::2], weight, row),
        (out, x, x, weight[:2], row), (out, x, x, weight, row[:1]), (out, x.astype(np.float64), x, weight, row),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            cpu_module.rms_norm_backward(*bad, 1)
    with pytest.raises(ValueError):
        cpu_module.rms_norm(out, x, weight, 0.0, True, 1, rstd=row[:1])
    for backward in (cpu_module.gated_silu_backward, cpu_module.gated_gelu_backward):
        backward(out, np.empty_like(out), x, x, x, 1)
        for bad in (
            (out, out[:1], x, x, x), (out, np.empty_like(out), x[:1], x, x), (out, np.empty_like(out), x, x, x.T),
            (out, np.empty_like(out), x, x.astype(np.float64), x),
        ):  # fmt: skip
            with pytest.raises(ValueError):
                backward(*bad, 1)
