"""Bad input to an op: an error that names the argument, and nothing written. New cases join the list."""

from __future__ import annotations

import math

import pytest
import torch

from kedit_fast import (
    distribution_kl,
    gated_silu,
    mirror_,
    rank_k_update_,
    rank_one_update_,
    rms_norm,
    spd_solve,
    symmetric_rank_k_update_,
    target_log_probs,
)
from kedit_fast.backends import probe
from kedit_fast.errors import BackendUnavailableError, GradientError, InvalidArgumentError, KeditError, SolveError

META = torch.device("meta")
Invalid = InvalidArgumentError


def of(*shape, dtype=torch.float32, device=None):
    if dtype in (torch.int64, torch.int32, torch.bool):
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.ones(*shape, dtype=dtype, device=device)


def symmetric(acc=None, x=None, weights=None, mask=None, **more):
    return symmetric_rank_k_update_(
        of(4, 4) if acc is None else acc, of(3, 4) if x is None else x, weights, mask, **more
    )


def rank_k(weight=None, left=None, right=None, **more):
    tensors = (of(3, 4) if weight is None else weight, of(3, 2) if left is None else left)
    return rank_k_update_(*tensors, of(4, 2) if right is None else right, **more)


def log_probs(hidden=None, head=None, targets=None, *rest, **more):
    tensors = (of(2, 4) if hidden is None else hidden, of(9, 4) if head is None else head)
    return target_log_probs(*tensors, of(2, dtype=torch.int64) if targets is None else targets, *rest, **more)


def kl(hidden=None, other=None, head=None, *rest, **more):
    tensors = (of(2, 4) if hidden is None else hidden, of(2, 4) if other is None else other)
    return distribution_kl(*tensors, of(9, 4) if head is None else head, *rest, **more)


BAD = [
    ("acc not square", lambda: symmetric(acc=of(4, 5)), Invalid, r"acc must be \[d, d\]; got \[4, 5\]"),
    ("acc of integers", lambda: symmetric(acc=of(4, 4, dtype=torch.int64)), Invalid, "acc must be float32"),
    ("acc in bf16", lambda: symmetric(acc=of(4, 4, dtype=torch.bfloat16)), Invalid, "acc must be float32"),
    ("acc by columns", lambda: symmetric(acc=of(8, 4)[::2].T), Invalid, "contiguous rows"),
    ("acc expanded", lambda: symmetric(acc=of(1, 4).expand(4, 4)), Invalid, "acc overlaps itself"),
    ("acc sparse", lambda: symmetric(acc=of(4, 4).to_sparse()), Invalid, "acc must be a dense tensor"),
    ("x of another width", lambda: symmetric(x=of(3, 5)), Invalid, r"x must be \[n, 4\]"),
    ("x with three dimensions", lambda: symmetric(x=of(2, 3, 4)), Invalid, r"x must be \[n, 4\]"),
    ("x complex", lambda: symmetric(x=of(3, 4, dtype=torch.complex64)), Invalid, "x must be float32"),
    ("fp64 rows, fp32 acc", lambda: symmetric(x=of(3, 4, dtype=torch.float64)), Invalid, "must be float64"),
    ("x on another device", lambda: symmetric(x=of(3, 4, device=META)), Invalid, "x on meta"),
    ("weights too short", lambda: symmetric(weights=of(2)), Invalid, r"row_weights must be \[3\]"),
    ("weights of integers", lambda: symmetric(weights=of(3, dtype=torch.int64)), Invalid, "row_weights must"),
    ("mask of numbers", lambda: symmetric(mask=of(3)), Invalid, "mask must be bool"),
    ("mask too long", lambda: symmetric(mask=of(4, dtype=torch.bool)), Invalid, r"mask must be \[3\]"),
    ("alpha NaN", lambda: symmetric(alpha=math.nan), Invalid, "alpha must be finite; got nan"),
    ("x wants a gradient", lambda: symmetric(x=of(3, 4).requires_grad_()), GradientError, "x, which requires grad"),
    ("no such backend", lambda: symmetric(backend="gpu"), BackendUnavailableError, "unknown backend 'gpu'"),
    ("mirror of a rectangle", lambda: mirror_(of(3, 4)), Invalid, "acc must be square"),
    ("weight a vector", lambda: rank_k(weight=of(4)), Invalid, r"weight must be \[out, in\]"),
    ("weight of bytes", lambda: rank_k(weight=of(3, 4).to(torch.uint8)), Invalid, "weight must be float32"),
    ("weight expanded", lambda: rank_k(weight=of(1, 4).expand(3, 4)), Invalid, "weight overlaps itself"),
    ("left too short", lambda: rank_k(left=of(2, 2)), Invalid, r"left must be \[3, k\]"),
    ("another k", lambda: rank_k(right=of(4, 3)), Invalid, r"right must be \[4, 2\]"),
    ("right of integers", lambda: rank_k(right=of(4, 2, dtype=torch.int32)), Invalid, "right must be float32"),
    ("left on another device", lambda: rank_k(left=of(3, 2, device=META)), Invalid, "left on meta"),
    ("copy of bf16", lambda: rank_k(weight=of(3, 4).half(), copy=of(3, 4).half()), Invalid, "copy needs a"),
    ("copy in fp32", lambda: rank_k(copy=of(3, 4)), Invalid, "copy must be bfloat16"),
    ("copy of another shape", lambda: rank_k(copy=of(4, 3).half()), Invalid, r"copy must be \[3, 4\]"),
    ("copy expanded", lambda: rank_k(copy=of(1, 4).half().expand(3, 4)), Invalid, "copy overlaps itself"),
    ("alpha infinite", lambda: rank_k(alpha=math.inf), Invalid, "alpha must be finite; got inf"),
    ("weight wants a gradient", lambda: rank_k(weight=of(3, 4).requires_grad_()), GradientError, "weight, which"),
    ("matrices for vectors", lambda: rank_one_update_(of(3, 4), of(3, 1), of(4, 1)), Invalid, "be vectors"),
    ("states with three dimensions", lambda: log_probs(of(1, 2, 4)), Invalid, r"hidden must be \[rows, h\]"),
    ("states of integers", lambda: log_probs(of(2, 4, dtype=torch.int64)), Invalid, "hidden must be"),
    ("head of another width", lambda: log_probs(head=of(9, 5)), Invalid, r"head must be \[V, 4\]"),
    ("head without tokens", lambda: log_probs(head=of(0, 4)), Invalid, "with V > 0"),
    ("head of another dtype", lambda: log_probs(head=of(9, 4).double()), Invalid, "head must be float32, bfloat16, "),
    ("head on another device", lambda: log_probs(head=of(9, 4, device=META)), Invalid, "head on meta"),
    ("targets as numbers", lambda: log_probs(targets=of(2)), Invalid, "targets must be int64"),
    ("too few targets", lambda: log_probs(targets=of(1, dtype=torch.int64)), Invalid, r"targets must be \[2\]"),
    ("target 9 of 9", lambda: log_probs(targets=torch.tensor([0, 9])), Invalid, r"\[0, 9\); got 0 to 9"),
    ("target -1", lambda: log_probs(targets=torch.tensor([-1, 0])), Invalid, r"\[0, 9\); got -1 to 0"),
    ("bias of another size", lambda: log_probs(None, None, None, of(8)), Invalid, r"bias must be \[9\]"),
    ("soft-cap negative", lambda: log_probs(softcap=-1.0), Invalid, "softcap must be 0"),
    ("soft-cap NaN", lambda: kl(softcap=math.nan), Invalid, "softcap must be 0"),
    ("head wants a gradient", lambda: kl(head=of(9, 4).requires_grad_()), GradientError, "head, which requires grad"),
    ("reference of another shape", lambda: kl(other=of(3, 4)), Invalid, r"hidden_ref must be \[2, 4\]"),
    ("reference of another dtype", lambda: kl(other=of(2, 4).half()), Invalid, "hidden_ref must be float32"),
    ("gram a rectangle", lambda: spd_solve(of(3, 4), of(3, 1)), Invalid, "gram must be"),
    ("right side of another size", lambda: spd_solve(torch.eye(3), of(4, 1)), Invalid, "rhs must be"),
    ("right side of another dtype", lambda: spd_solve(torch.eye(3), of(3, 1).double()), Invalid, "rhs must be"),
    ("gram in fp16", lambda: spd_solve(torch.eye(3).half(), of(3, 1).half()), Invalid, "gram must be"),
    ("ridge NaN", lambda: spd_solve(torch.eye(3), of(3, 1), math.nan), Invalid, "ridge must be finite"),
    ("norm of a number", lambda: rms_norm(torch.tensor(1.0), of(1)), Invalid, r"x must be \[.., d\]"),
    ("norm of nothing", lambda: rms_norm(of(3, 0), of(0)), Invalid, "d not 0"),
    ("norm of integers", lambda: rms_norm(of(3, 4, dtype=torch.int64), of(4)), Invalid, "x must be float32"),
    ("norm's weight of another size", lambda: rms_norm(of(3, 4), of(3)), Invalid, r"weight must be \[4\]"),
    ("norm's weight in fp64", lambda: rms_norm(of(3, 4), of(4).double()), Invalid, "weight must be float32"),
    ("norm's eps NaN", lambda: rms_norm(of(3, 4), of(4), math.nan), Invalid, "eps must be finite"),
    ("norm's eps negative", lambda: rms_norm(of(3, 4), of(4), -1.0), Invalid, "eps must not be negative"),
    ("norm wants a gradient", lambda: rms_norm(of(3, 4), of(4).requires_grad_()), GradientError, "weight, which"),
    ("norm on another device", lambda: rms_norm(of(3, 4), of(4, device=META)), Invalid, "weight on meta"),
    ("gate a number", lambda: gated_silu(torch.tensor(1.0), torch.tensor(1.0)), Invalid, r"gate must be \[.., d\]"),
    ("gate of another shape", lambda: gated_silu(of(3, 4), of(4)), Invalid, r"up must be \[3, 4\]"),
    ("gate of another dtype", lambda: gated_silu(of(3, 4), of(3, 4).half()), Invalid, "up must be float32"),
    ("gate wants a gradient", lambda: gated_silu(of(3, 4).requires_grad_(), of(3, 4)), GradientError, "gate, which"),
    ("gram not positive", lambda: spd_solve(-torch.eye(3), of(3, 1)), SolveError, "order 1 of 3"),
]  # fmt: skip


@pytest.fixture(params=("torch", "cpu", "triton"))
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("cpu_module")
    if request.param == "triton" and not probe("triton").explicit_only:
        pytest.skip("the interpreter is not in use: Triton takes no tensors of the CPU")
    return request.param


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_is_named(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, KeditError)


@pytest.mark.parametrize("broken", ("x", "row_weights"))
def test_a_not_finite_row_that_counts_shows(broken, backend):
    x, weights = torch.randn(5, 3), torch.ones(5)
    (x if broken == "x" else weights[:, None])[2, 0] = math.nan
    acc = symmetric_rank_k_update_(torch.zeros(3, 3), x, weights, backend=backend)
    touched = acc[torch.tril(torch.ones(3, 3, dtype=torch.bool))] if broken == "row_weights" else acc[:, 0]
    assert bool(torch.isnan(touched).all())


def test_nothing_is_written_when_an_argument_is_bad(backend):
    acc, weight, copy = torch.randn(4, 4), torch.randn(3, 4), torch.randn(3, 4).half()
    before = acc.clone(), weight.clone(), copy.clone()
    with pytest.raises(InvalidArgumentError):
        symmetric_rank_k_update_(acc, acc[:2], backend=backend)
    with pytest.raises(InvalidArgumentError):
        rank_k_update_(weight, weight[:, :2], of(4, 2), copy=copy, backend=backend)
    with pytest.raises(InvalidArgumentError):
        rank_k_update_(weight, of(3, 2), of(4, 2), copy=copy[:, :3], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (acc, weight, copy), strict=True))


def test_views_with_a_negative_bit_are_read_as_the_numbers_they_are(backend):
    pairs = torch.randn(5, 4, dtype=torch.complex64)
    x = pairs.conj().imag
    assert x.is_neg()
    found = symmetric_rank_k_update_(torch.zeros(4, 4), x, backend=backend)
    torch.testing.assert_close(found, symmetric_rank_k_update_(torch.zeros(4, 4), -pairs.imag, backend="torch"))
