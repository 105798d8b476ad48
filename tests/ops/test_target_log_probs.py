"""target_log_probs against plain torch."""

from __future__ import annotations

import pytest
import torch
from floors import HEAD, relative_error
from head_logits import capped_logits

from kedit_fast import target_log_probs
from kedit_fast.errors import GradientError, InvalidArgumentError
from kedit_fast.reference import _lm_head
from kedit_fast.reference import distribution_kl as kl_reference
from kedit_fast.reference import target_log_probs as reference


@pytest.mark.parametrize("cap", (0.0, 2.0))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("chunk", (7, 50, 10_000))
def test_target_log_probs_are_the_log_softmax_in_any_chunks(cap, with_bias, chunk):
    hidden, head = torch.randn(9, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    bias = torch.randn(50, dtype=torch.float64) if with_bias else None
    targets = torch.randint(0, 50, (9,))
    expected = torch.log_softmax(capped_logits(hidden, head, bias, cap), -1)
    found = reference.target_log_probs(hidden, head, targets, bias, cap, chunk=chunk)
    torch.testing.assert_close(found[0], expected.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], expected.argmax(-1))
    torch.testing.assert_close(found[2], expected.max(-1).values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", (0.0, 2.0))
def test_gradients_are_right(cap):
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    head, bias = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    targets = torch.randint(0, 30, (4,))
    assert torch.autograd.gradcheck(lambda h: target_log_probs(h, head, targets, bias, cap).log_prob, (hidden,))


@pytest.mark.parametrize("cap", (0.0, 2.0))
def test_gradients_do_not_depend_on_the_chunks(cap):
    hidden, head = (torch.randn(*s, dtype=torch.float64) for s in ((9, 12), (50, 12)))
    hidden *= torch.linspace(0.1, 30, 9, dtype=torch.float64)[:, None]  # flat and peaked distributions
    targets = torch.randint(0, 50, (9,))
    whole = reference.target_log_probs(hidden, head, targets, None, cap, True, chunk=50)
    for chunk in (1, 7, 49):
        parts = reference.target_log_probs(hidden, head, targets, None, cap, True, chunk=chunk)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_call_that_computed_no_gradient_refuses_to_invent_one():
    hidden, head = torch.randn(2, 8, requires_grad=True), torch.randn(20, 8)
    op = torch.ops.kedit_fast.target_log_probs
    log_prob = op(hidden, head, torch.zeros(2, dtype=torch.int64), None, 0.0, False, "")[0]
    with pytest.raises(GradientError, match="gradient=False"):
        log_prob.sum().backward()


def test_bf16_states_use_fp32_arithmetic():
    hidden, head = torch.randn(5, 16).bfloat16(), torch.randn(60, 16).bfloat16()
    targets = torch.randint(0, 60, (5,))
    expected = torch.log_softmax(hidden.float() @ head.float().T, -1).gather(1, targets[:, None])[:, 0]
    found = target_log_probs(hidden, head, targets).log_prob
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_requires_grad_is_refused():
    hidden, head = torch.randn(3, 8), torch.randn(20, 8, requires_grad=True)
    with pytest.raises(GradientError, match="head"):
        target_log_probs(hidden, head, torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        target_log_probs(hidden, head, torch.zeros(3, dtype=torch.int64))


def test_targets_outside_the_vocabulary_are_named():
    with pytest.raises(InvalidArgumentError, match=r"\[0, 20\)"):
        target_log_probs(torch.randn(2, 8), torch.randn(20, 8), torch.tensor([3, 20]))


def test_second_derivatives_are_refused():
    hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    value = target_log_probs(hidden, head, torch.zeros(3, dtype=torch.int64)).log_prob
    with pytest.raises(GradientError, match="second derivative"):
        torch.autograd.grad(value.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("op", ("target_log_probs", "distribution_kl"))
@pytest.mark.parametrize("cap", (0.0, 5.0))
def test_16_bit_states_go_to_the_matrix_unit_where_it_has_an_fp32_product(op, dtype, cap, monkeypatch):
    """As on CUDA: torch.mm(..., out_dtype=torch.float32), here with a product that is made up."""
    seen = []

    def mm(left, right, *, out_dtype):
        seen.append((left.dtype, right.dtype, out_dtype))
        return left.float() @ right.float()

    monkeypatch.setattr(_lm_head, "has_wide_product", lambda *matrices: all(m.dtype == dtype for m in matrices))
    monkeypatch.setattr(torch, "mm", mm)
    hidden, other = (torch.randn(7, 2100).to(dtype).requires_grad_(i == 0) for i in range(2))
    head, targets = (torch.randn(90, 2100) / 20).to(dtype), torch.randint(0, 90, (7,))
    wide = hidden.detach().double().requires_grad_()
    if op == "target_log_probs":
        found = reference.target_log_probs(hidden, head, targets, None, cap, gradient=True, chunk=50)
        expected = torch.log_softmax(capped_logits(wide, head.double(), None, cap), -1).gather(1, targets[:, None])[
            :, 0
        ]
    else:
        found = kl_reference.distribution_kl(hidden, other, head, None, cap, gradient=True, chunk=50)
        log_p, log_q = (
            torch.log_softmax(capped_logits(h.double(), head.double(), None, cap), -1) for h in (wide, other)
        )
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    assert relative_error(found[0], expected) < HEAD[dtype]
    assert relative_error(found[-1], slope) < 2e-5  # two terms of 8 bits or more
    assert seen and all(entry == (dtype, dtype, torch.float32) for entry in seen)
