"""spd_solve, target_log_probs and distribution_kl against plain torch."""

from __future__ import annotations

import pytest
import torch

from kedit_fast import distribution_kl, spd_solve, target_log_probs
from kedit_fast.errors import GradientError, InvalidArgumentError, SolveError
from kedit_fast.reference import distribution_kl as kl_reference
from kedit_fast.reference import target_log_probs as log_prob_reference


def logits_of(hidden, head, bias, cap):
    logits = hidden @ head.T
    logits = logits if bias is None else logits + bias
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("cap", (0.0, 2.0))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("chunk", (7, 50, 10_000))
def test_target_log_probs_are_the_log_softmax_in_any_chunks(cap, with_bias, chunk):
    hidden, head = torch.randn(9, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    bias = torch.randn(50, dtype=torch.float64) if with_bias else None
    targets = torch.randint(0, 50, (9,))
    expected = torch.log_softmax(logits_of(hidden, head, bias, cap), -1)
    found = log_prob_reference.target_log_probs(hidden, head, targets, bias, cap, chunk=chunk)
    torch.testing.assert_close(found[0], expected.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], expected.argmax(-1))
    torch.testing.assert_close(found[2], expected.max(-1).values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", (0.0, 2.0))
@pytest.mark.parametrize("chunk", (7, 10_000))
def test_distribution_kl_is_the_kl_in_any_chunks(cap, chunk):
    hidden, other, head = (torch.randn(*s, dtype=torch.float64) for s in ((9, 12), (9, 12), (50, 12)))
    log_p = torch.log_softmax(logits_of(hidden, head, None, cap), -1)
    log_q = torch.log_softmax(logits_of(other, head, None, cap), -1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    found = kl_reference.distribution_kl(hidden, other, head, None, cap, chunk=chunk)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", (0.0, 2.0))
def test_gradients_are_right(cap, monkeypatch):
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    other, head = torch.randn(4, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    bias, targets = torch.randn(30, dtype=torch.float64), torch.randint(0, 30, (4,))
    assert torch.autograd.gradcheck(lambda h: target_log_probs(h, head, targets, bias, cap).log_prob, (hidden,))
    assert torch.autograd.gradcheck(lambda h: distribution_kl(h, other, head, bias, cap), (hidden,))


@pytest.mark.parametrize("cap", (0.0, 2.0))
def test_gradients_do_not_depend_on_the_chunks(cap):
    hidden, other, head = (torch.randn(*s, dtype=torch.float64) for s in ((9, 12), (9, 12), (50, 12)))
    hidden *= torch.linspace(0.1, 30, 9, dtype=torch.float64)[:, None]  # flat and peaked distributions
    targets = torch.randint(0, 50, (9,))
    whole = log_prob_reference.target_log_probs(hidden, head, targets, None, cap, True, chunk=50)
    whole_kl = kl_reference.distribution_kl(hidden, other, head, None, cap, True, chunk=50)
    for chunk in (1, 7, 49):
        parts = log_prob_reference.target_log_probs(hidden, head, targets, None, cap, True, chunk=chunk)
        parts_kl = kl_reference.distribution_kl(hidden, other, head, None, cap, True, chunk=chunk)
        for a, b in zip((*whole, *whole_kl), (*parts, *parts_kl), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_logits_that_lie_far_apart_do_not_cost_the_kl_its_accuracy():
    """The two distributions differ little, their logits by a thousand."""
    hidden, head = torch.randn(6, 16), torch.randn(300, 16) / 4
    head[:, 0] = 1.0  # the same for every token: it moves all logits and no probability
    other = hidden + 1e-2 * torch.randn(6, 16)
    other[:, 0] += 1000
    expected = kl_reference.distribution_kl(hidden.double(), other.double(), head.double(), None, 0.0, True)
    found = kl_reference.distribution_kl(hidden, other, head, None, 0.0, True, chunk=64)
    # the logits themselves are rounded to 1000 * 2^-24
    assert float((found[0].double() - expected[0]).abs().max()) < 5e-5
    assert float((found[1].double() - expected[1]).abs().max()) < 2e-4


def test_a_call_that_computed_no_gradient_refuses_to_invent_one():
    hidden, head = torch.randn(2, 8, requires_grad=True), torch.randn(20, 8)
    op = torch.ops.kedit_fast.target_log_probs
    log_prob = op(hidden, head, torch.zeros(2, dtype=torch.int64), None, 0.0, False, "")[0]
    with pytest.raises(GradientError, match="gradient=False"):
        log_prob.sum().backward()


def test_the_kl_of_equal_states_is_zero_with_a_zero_gradient():
    hidden = torch.randn(3, 8, requires_grad=True)
    kl = distribution_kl(hidden, hidden.detach().clone(), torch.randn(40, 8))
    kl.sum().backward()
    assert float(kl.detach().abs().max()) < 1e-6 and float(hidden.grad.abs().max()) < 1e-6


def test_bf16_states_use_fp32_arithmetic():
    hidden, head = torch.randn(5, 16).bfloat16(), torch.randn(60, 16).bfloat16()
    targets = torch.randint(0, 60, (5,))
    expected = torch.log_softmax(hidden.float() @ head.float().T, -1).gather(1, targets[:, None])[:, 0]
    found = target_log_probs(hidden, head, targets).log_prob
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_silently_wrong():
    hidden, head = torch.randn(3, 8), torch.randn(20, 8, requires_grad=True)
    with pytest.raises(GradientError, match="head"):
        target_log_probs(hidden, head, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(GradientError, match="gram"):
        spd_solve(torch.eye(3, requires_grad=True), torch.eye(3))
    with torch.no_grad():
        target_log_probs(hidden, head, torch.zeros(3, dtype=torch.int64))


def test_targets_outside_the_vocabulary_are_named():
    with pytest.raises(InvalidArgumentError, match=r"\[0, 20\)"):
        target_log_probs(torch.randn(2, 8), torch.randn(20, 8), torch.tensor([3, 20]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_spd_solve_solves_batches_with_a_ridge(dtype):
    factor = torch.randn(5, 7, 7, dtype=dtype)
    gram, rhs = factor @ factor.mT, torch.randn(5, 7, 3, dtype=dtype)
    expected = torch.linalg.solve(gram.double() + 0.5 * torch.eye(7, dtype=torch.float64), rhs.double())
    found = spd_solve(gram, rhs, 0.5)
    assert float((found.double() - expected).norm() / expected.norm()) < (1e-4 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(spd_solve(gram[0], rhs[0], 0.5), found[0])


def test_spd_solve_names_the_minor_that_failed():
    gram = torch.diag(torch.tensor([1.0, 2.0, -3.0, 4.0]))
    with pytest.raises(SolveError, match="order 3 of 4"):
        spd_solve(gram, torch.eye(4))
    with pytest.raises(SolveError, match="system 1"):
        spd_solve(torch.stack([torch.eye(4), gram]), torch.eye(4).expand(2, 4, 4))
    with pytest.raises(SolveError, match="rhs has values that are not finite"):
        spd_solve(torch.eye(2), torch.tensor([[float("nan")], [1.0]]))


@pytest.mark.parametrize("op", ("log_probs", "kl"))
def test_second_derivatives_are_refused(op):
    hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    if op == "kl":
        value = distribution_kl(hidden, torch.randn(3, 8), head)
    else:
        value = target_log_probs(hidden, head, torch.zeros(3, dtype=torch.int64)).log_prob
    with pytest.raises(GradientError, match="second derivative"):
        torch.autograd.grad(value.sum(), hidden, create_graph=True)
