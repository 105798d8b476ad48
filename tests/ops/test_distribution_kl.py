"""distribution_kl against plain torch."""

from __future__ import annotations

import pytest
import torch
from head_logits import capped_logits

from kedit_fast import distribution_kl
from kedit_fast.errors import GradientError
from kedit_fast.reference import distribution_kl as reference


@pytest.mark.parametrize("cap", (0.0, 2.0))
@pytest.mark.parametrize("chunk", (7, 10_000))
def test_distribution_kl_is_the_kl_in_any_chunks(cap, chunk):
    hidden, other, head = (torch.randn(*s, dtype=torch.float64) for s in ((9, 12), (9, 12), (50, 12)))
    log_p = torch.log_softmax(capped_logits(hidden, head, None, cap), -1)
    log_q = torch.log_softmax(capped_logits(other, head, None, cap), -1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    value = reference.distribution_kl(hidden, other, head, None, cap, chunk=chunk)[0]
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    expected = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    value = reference.distribution_kl(hidden, other, head, None, cap, reverse=True, chunk=chunk)[0]
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("cap", (0.0, 2.0))
def test_gradients_are_right(cap, reverse):
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    other, head = torch.randn(4, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    bias = torch.randn(30, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: distribution_kl(h, other, head, bias, cap, reverse=reverse), (hidden,))


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("cap", (0.0, 2.0))
def test_gradients_do_not_depend_on_the_chunks(cap, reverse):
    hidden, other, head = (torch.randn(*s, dtype=torch.float64) for s in ((9, 12), (9, 12), (50, 12)))
    hidden *= torch.linspace(0.1, 30, 9, dtype=torch.float64)[:, None]  # flat and peaked distributions
    whole = reference.distribution_kl(hidden, other, head, None, cap, True, reverse, chunk=50)
    for chunk in (1, 7, 49):
        parts = reference.distribution_kl(hidden, other, head, None, cap, True, reverse, chunk=chunk)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", (False, True))
def test_logits_that_lie_far_apart_do_not_cost_the_kl_its_accuracy(reverse):
    """The two distributions differ little, their logits by a thousand."""
    hidden, head = torch.randn(6, 16), torch.randn(300, 16) / 4
    head[:, 0] = 1.0  # the same for every token: it moves all logits and no probability
    other = hidden + 1e-2 * torch.randn(6, 16)
    other[:, 0] += 1000
    expected = reference.distribution_kl(hidden.double(), other.double(), head.double(), None, 0.0, True, reverse)
    found = reference.distribution_kl(hidden, other, head, None, 0.0, True, reverse, chunk=64)
    # the logits themselves are rounded to 1000 * 2^-24
    assert float((found[0].double() - expected[0]).abs().max()) < 5e-5
    assert float((found[1].double() - expected[1]).abs().max()) < 2e-4


@pytest.mark.parametrize("reverse", (False, True))
def test_the_kl_of_equal_states_is_zero_with_a_zero_gradient(reverse):
    hidden = torch.randn(3, 8, requires_grad=True)
    kl = distribution_kl(hidden, hidden.detach().clone(), torch.randn(40, 8), reverse=reverse)
    kl.sum().backward()
    assert float(kl.detach().abs().max()) < 1e-6 and float(hidden.grad.abs().max()) < 1e-6


def test_a_temperature_divides_states_bias_and_cap():
    hidden, other, head = (torch.randn(*s, dtype=torch.float64) for s in ((5, 12), (5, 12), (50, 12)))
    bias, temperature, cap = torch.randn(50, dtype=torch.float64), 3.0, 2.0
    log_p = torch.log_softmax(capped_logits(hidden, head, bias, cap) / temperature, -1)
    log_q = torch.log_softmax(capped_logits(other, head, bias, cap) / temperature, -1)
    parts = (hidden / temperature, other / temperature, head, bias / temperature, cap / temperature)
    for reverse, (first, second) in ((False, (log_p, log_q)), (True, (log_q, log_p))):
        expected = (first.exp() * (first - second)).sum(-1)
        torch.testing.assert_close(distribution_kl(*parts, reverse=reverse), expected, rtol=1e-10, atol=1e-12)


def test_second_derivatives_are_refused():
    hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    value = distribution_kl(hidden, torch.randn(3, 8), head)
    with pytest.raises(GradientError, match="second derivative"):
        torch.autograd.grad(value.sum(), hidden, create_graph=True)
