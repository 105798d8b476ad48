"""The C++ kernels of the two ops on a language-model head, and calls that pass the dispatcher by."""

from __future__ import annotations

import itertools

import pytest
import torch
from floors import HEAD, HEAD_GRADIENT, relative_error
from head_logits import capped_logits
from torch.utils._python_dispatch import TorchDispatchMode

import kedit_fast
from kedit_fast import distribution_kl, target_log_probs
from kedit_fast.backends import probe
from kedit_fast.errors import GradientError, InvalidArgumentError
from kedit_fast.kernels.native import cpu
from kedit_fast.ops import _lm_head
from kedit_fast.reference import distribution_kl as kl_reference
from kedit_fast.reference import target_log_probs as reference

DTYPES = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float64),
]  # fmt: skip
SIZES = [(1, 1, 1), (7, 63, 5), (1, 64, 48), (7, 65, 130), (7, 129, 257), (3, 1000, 49), (66, 97, 40)]
OPTIONS = [(False, 0.0), (True, 0.0), (False, 3.0), (True, 3.0)]


def problem(rows, vocabulary, width, states, head):
    hidden, other = (torch.randn(rows, width, dtype=torch.float64).to(states) for _ in range(2))
    matrix = (2 * torch.randn(vocabulary, width, dtype=torch.float64) * max(width, 1) ** -0.5).to(head)
    return hidden, other, matrix, torch.randint(0, vocabulary, (rows,)), torch.randn(vocabulary)


def limits(dtype):
    """Of values, relative to the larger of 1 and their norm, and of gradients."""
    return (1e-14, 1e-13) if dtype == torch.float64 else (HEAD[dtype], 2e-6)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1))


def answers(hidden, other, head, targets, bias, cap):
    """In float64: log p, the most probable token and its log p, KL both ways, and the gradients of all that has one."""
    states = hidden.double().requires_grad_()
    wide = [part if part is None else part.double() for part in (head, bias)]
    log_p, log_q = (torch.log_softmax(capped_logits(x, *wide, cap), -1) for x in (states, other.double()))
    at_targets = log_p.gather(1, targets[:, None])[:, 0]
    forward, backward = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    slopes = [torch.autograd.grad(v.sum(), states, retain_graph=True)[0] for v in (at_targets, forward, backward)]
    return (at_targets.detach(), *log_p.detach().max(-1)), (forward.detach(), backward.detach()), slopes


@pytest.mark.parametrize("bias_and_cap", OPTIONS, ids=str)
@pytest.mark.parametrize("states, head_dtype", DTYPES, ids=str)
def test_every_isa_computes_values_and_gradients(isa, states, head_dtype, bias_and_cap):
    with_bias, cap = bias_and_cap
    value_limit, slope_limit = limits(states)
    for size in SIZES:
        hidden, other, head, targets, bias = problem(*size, states, head_dtype)
        bias = bias if with_bias else None
        (at_targets, best, top1), kls, slopes = answers(hidden, other, head, targets, bias, cap)
        found = cpu.target_log_probs(hidden, head, targets, bias, cap, True)
        assert torch.equal(found[1], top1)
        for part, expected in ((found[0], at_targets), (found[2], best)):
            assert part.dtype == (torch.float64 if states == torch.float64 else torch.float32)
            assert error(part, expected) < value_limit
        assert error(found[3], slopes[0]) < slope_limit
        plain = cpu.target_log_probs(hidden, head, targets, bias, cap, False)
        assert all(torch.equal(a, b) for a, b in zip(found[:3], plain[:3], strict=True)) and not plain[3].numel()
        for reverse in (False, True):
            kl, slope = cpu.distribution_kl(hidden, other, head, bias, cap, True, reverse)
            assert error(kl, kls[reverse]) < value_limit and error(slope, slopes[1 + reverse]) < slope_limit
            assert torch.equal(kl, cpu.distribution_kl(hidden, other, head, bias, cap, False, reverse)[0])


def test_rows_and_heads_in_any_layout_give_the_same_bits(isa):
    hidden, other, head, targets, bias = problem(7, 129, 96, torch.float32, torch.float32)
    expected = cpu.target_log_probs(hidden, head, targets, bias, 2.0, True)
    kl = cpu.distribution_kl(hidden, other, head, bias, 2.0, True)
    layouts = (
        lambda m: m.T.contiguous().T,
        lambda m: torch.cat([torch.full_like(m, torch.nan), m], 1)[:, m.shape[1] :],
        lambda m: m.repeat_interleave(3, 0)[::3],
        lambda m: m.repeat_interleave(2, 1)[:, ::2],
    )
    for first, second in itertools.product(layouts, repeat=2):
        found = cpu.target_log_probs(first(hidden), second(head), targets, bias.repeat(2, 1).T[:, 1], 2.0, True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        found = cpu.distribution_kl(first(hidden), second(other), second(head), bias, 2.0, True)
        assert all(torch.equal(a, b) for a, b in zip(found, kl, strict=True))


def test_the_bits_do_not_depend_on_threads(isa):
    hidden, other, head, _, bias = problem(140, 6500, 17, torch.float32, torch.float32)  # groups of rows, and parts
    targets = torch.randint(0, 6500, (140,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((*cpu.target_log_probs(hidden, head, targets, bias, 0.0, True),
                            *cpu.distribution_kl(hidden, other, head, bias, 0.0, True)))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    (at_targets, best, top1), kls, slopes = answers(hidden, other, head, targets, bias, 0.0)
    assert torch.equal(results[0][1], top1)
    for found, expected in zip(results[0][:1] + results[0][2:], (at_targets, best, slopes[0], kls[0], slopes[1]),
                               strict=True):  # fmt: skip
        assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("width", (0, 40))
def test_no_rows_and_no_columns(isa, width):
    for rows in (0, 3):
        hidden, other, head, targets, bias = problem(rows, 9, width, torch.float32, torch.float32)
        log_prob, top1, best, slope = cpu.target_log_probs(hidden, head, targets, bias, 0.0, True)
        log_p = torch.log_softmax(hidden @ head.T + bias, -1)
        torch.testing.assert_close(log_prob, log_p.gather(1, targets[:, None])[:, 0])
        assert torch.equal(top1, log_p.argmax(-1)) and best.shape == (rows,) and slope.shape == (rows, width)
        kl = cpu.distribution_kl(hidden, other, head, bias, 0.0, True)
        assert kl[0].shape == (rows,) and kl[1].shape == (rows, width)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("at", (0, 70, slice(None)), ids=str)
def test_logits_that_are_not_finite_give_what_the_reference_gives(isa, value, at):
    hidden, _, head, targets, _ = problem(5, 200, 20, torch.float32, torch.float32)
    targets[:] = 100
    hidden[:, 0], head[:, 0] = 1, 0
    head[at, 0] = value
    found = cpu.target_log_probs(hidden, head, targets, None, 0.0, True)
    expected = reference.target_log_probs(hidden, head, targets, None, 0.0, True)
    for index in (0, 1, 2) if value == value else (0, 2):  # no token is the most probable one of a row with NaN
        torch.testing.assert_close(found[index], expected[index], equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[3], expected[3], equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_not_a_number_spoils_no_other(isa):
    hidden, other, head, targets, _ = problem(5, 200, 20, torch.float32, torch.float32)
    spoiled, rest = hidden.clone(), [0, 1, 3, 4]
    spoiled[2, 1] = torch.nan
    for op, args in ((cpu.target_log_probs, (head, targets)), (cpu.distribution_kl, (other, head))):
        sound, found = (op(states, *args, None, 0.0, True) for states in (hidden, spoiled))
        assert all(torch.equal(a[rest], b[rest]) for a, b in zip(found, sound, strict=True))
        assert bool(found[0][2].isnan()) and bool(found[-1][2].isnan().all())


@pytest.mark.parametrize("reverse", (False, True))
def test_logits_far_apart_cost_the_kl_little(isa, reverse):
    hidden, head = torch.randn(6, 16), torch.randn(300, 16) / 4
    head[:, 0] = 1.0
    other = hidden + 1e-2 * torch.randn(6, 16)
    other[:, 0] += 1000
    expected = kl_reference.distribution_kl(hidden.double(), other.double(), head.double(), None, 0.0, True, reverse)
    found = cpu.distribution_kl(hidden, other, head, None, 0.0, True, reverse)
    assert float((found[0].double() - expected[0]).abs().max()) < 5e-5
    assert float((found[1].double() - expected[1]).abs().max()) < 2e-4


def test_equal_logits_give_the_lowest_token(isa):
    hidden = torch.randn(5, 12)
    head = torch.randn(40, 12).repeat(4, 1)
    found = cpu.target_log_probs(hidden, head, torch.zeros(5, dtype=torch.int64), None, 0.0, False)[1]
    assert torch.equal(found, (hidden @ head[:40].T).argmax(1))


def test_the_module_refuses_what_the_op_would(cpu_module):
    hidden, head = torch.randn(2, 4), torch.randn(9, 4)
    for targets in (torch.tensor([0, 9]), torch.tensor([-1, 0]), torch.tensor([0])):
        with pytest.raises(InvalidArgumentError, match="targets"):
            cpu.target_log_probs(hidden, head, targets, None, 0.0, True)
    with pytest.raises(InvalidArgumentError, match="head"):
        cpu.target_log_probs(hidden, head.double(), torch.zeros(2, dtype=torch.int64), None, 0.0, True)
    with pytest.raises(InvalidArgumentError, match="hidden_ref"):
        cpu.distribution_kl(hidden, hidden[:1], head, None, 0.0, True)
    with pytest.raises(InvalidArgumentError, match="bias"):
        cpu.distribution_kl(hidden, hidden, head, torch.zeros(8), 0.0, True)


class Seen(TorchDispatchMode):
    """The names of the ops that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_a_call_past_the_dispatcher_is_that_through_it(every_backend, dtype):
    if every_backend == "triton" and dtype == torch.float64:
        pytest.skip("no kernel takes float64")
    hidden, other, head, targets, bias = problem(5, 70, 16, dtype, dtype)
    for requires_grad in (False, True):
        results = []
        for listened in (False, True):
            states = hidden.clone().requires_grad_(requires_grad)
            seen = Seen()
            with seen if listened else torch.enable_grad():
                scores = target_log_probs(states, head, targets, bias, 2.0, True, backend=every_backend)
                kl = distribution_kl(states, other, head, bias, 2.0, backend=every_backend)
            assert any("kedit_fast.target_log_probs" in name for name in seen.names) == listened
            assert scores.log_prob.requires_grad == kl.requires_grad == requires_grad
            assert not scores.top1_log_prob.requires_grad
            if requires_grad:
                (scores.log_prob.sum() + kl.sum()).backward()
                assert states.grad.dtype == dtype
            results.append((*scores, kl, states.grad if requires_grad else kl))
        for direct, through in zip(*results, strict=True):
            assert torch.equal(direct, through)


def test_a_call_past_the_dispatcher_refuses_second_derivatives():
    hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    value = target_log_probs(hidden, head, torch.zeros(3, dtype=torch.int64)).log_prob
    with pytest.raises(GradientError, match="second derivative"):
        torch.autograd.grad(value.sum(), hidden, create_graph=True)


def float_product(left, right, depth):
    """In place of torch's product of 16-bit matrices with an fp32 result, which CPUs lack."""
    assert left.dtype == right.dtype and depth > 0
    return left.float() @ right.float()


@pytest.mark.parametrize(
    "dtype, bias_and_cap, chunk",
    [(torch.bfloat16, (False, 0.0), 50), (torch.bfloat16, (True, 3.0), None), (torch.float16, (True, 3.0), 50)],
    ids=str,
)  # fmt: skip
def test_chunks_of_products_with_one_kernel_for_the_rest(dtype, bias_and_cap, chunk):
    chunks = pytest.importorskip("kedit_fast.kernels.triton.head_chunks")
    if not probe("triton").explicit_only:
        pytest.skip("the interpreter is not in use: Triton takes no tensors of the CPU")
    with_bias, cap = bias_and_cap
    for size in ((3, 129, 33), (1, 1, 3)):
        hidden, other, head, targets, bias = problem(*size, dtype, dtype)
        bias = bias if with_bias else None
        (at_targets, best, top1), kls, slopes = answers(hidden, other, head, targets, bias, cap)
        found = chunks.target_log_probs(hidden, head, targets, bias, cap, True, float_product, chunk)
        assert torch.equal(found[1], top1)
        assert error(found[0], at_targets) < HEAD[dtype] and error(found[2], best) < HEAD[dtype]
        assert error(found[3].to(dtype), slopes[0]) < HEAD_GRADIENT[dtype]
        for reverse in (False, True):
            kl, slope = chunks.distribution_kl(hidden, other, head, bias, cap, True, reverse, float_product, chunk)
            assert error(kl, kls[reverse]) < HEAD[dtype]
            assert error(slope.to(dtype), slopes[1 + reverse]) < HEAD_GRADIENT[dtype]
            alone = chunks.distribution_kl(hidden, other, head, bias, cap, False, reverse, float_product, chunk)
            assert torch.equal(alone[0], kl) and not alone[1].numel()


def test_a_gradient_that_is_rounded_to_bf16_takes_one_plane_of_weights_and_others_two():
    chunks = pytest.importorskip("kedit_fast.kernels.triton.head_chunks")
    states = {dtype: torch.zeros(2, 3, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    assert [chunks.planes_of(states[dtype], True, False) for dtype in states] == [1, 2]
    assert chunks.planes_of(states[torch.bfloat16], True, True) == 2  # where sums cancel
    assert chunks.planes_of(states[torch.bfloat16], False, False) == 0
    assert chunks.tokens_of(1152, 1, 128256, torch.device("cpu")) * 1152 * 6 <= chunks.MOST_BYTES
    assert chunks.tokens_of(1 << 20, 2, 128256, torch.device("cpu")) == chunks.STEP  # one step is always made
    assert chunks.tokens_of(4, 1, 99, torch.device("cpu")) == 99


@pytest.mark.parametrize("op", ("target_log_probs", "distribution_kl"))
def test_the_triton_form_takes_chunks_of_products_where_torch_has_them(op, monkeypatch):
    pytest.importorskip("triton")
    if not probe("triton").explicit_only:
        pytest.skip("the interpreter is not in use: Triton takes no tensors of the CPU")
    hidden, other, head, targets, _ = problem(4, 70, 16, torch.bfloat16, torch.bfloat16)
    args = (head, targets) if op == "target_log_probs" else (other, head)
    run, called = getattr(kedit_fast, op), []

    def product(left, right, depth):
        called.append(right.shape)
        return float_product(left, right, depth)

    results = []
    for wide in (False, True):
        monkeypatch.setattr(_lm_head, "has_wide_product", lambda *matrices, wide=wide: wide)
        monkeypatch.setattr(_lm_head, "wide_product", product)
        states = hidden.clone().requires_grad_()
        value = run(states, *args, backend="triton")
        value = value.log_prob if op == "target_log_probs" else value
        value.sum().backward()
        results.append((value.detach(), states.grad))
        assert bool(called) == wide
    assert error(results[1][0], results[0][0].double()) < HEAD[torch.bfloat16]
    assert error(results[1][1], results[0][1].double()) < 2 * HEAD_GRADIENT[torch.bfloat16]
