"""tail_attention and its gradients against plain torch in float64, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from floors import TAILS, relative_error

import kedit_fast
from kedit_fast import tail_attention
from kedit_fast.backends import probe
from kedit_fast.errors import GradientError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton.*")


@dataclass(frozen=True)
class Rows:
    """Tails of some lengths, with prefixes of others (None: without prefixes)."""

    tails: tuple[int, ...]
    prefixes: tuple[int, ...] | None
    heads: int = 4
    groups: int = 2
    size: int = 8
    softcap: float = 0.0
    window: int | None = None
    shared: bool = False  # prefixes are named by prefix_rows, in any order


CASES = (
    Rows((3, 1, 0, 5), (4, 0, 2, 7)),
    Rows((1,), None, heads=1, groups=1, size=1),
    Rows((7, 2), None, size=7, softcap=2.0),
    Rows((2, 9, 4), (5, 3, 1), heads=6, groups=6, size=33),
    Rows((5, 4), (3, 6), heads=6, groups=1, size=16, softcap=5.0, window=4),
    Rows((19, 3), (2, 21), heads=3, groups=3, size=17, window=6, shared=True),
)
INTERPRETED = (  # few programs: the interpreter takes milliseconds for each operation
    Rows((3, 1), (2, 0), heads=2, groups=1, size=5, softcap=2.0),
    Rows((18,), (4,), heads=1, groups=1, size=17, window=6, shared=True),
    Rows((2, 0), None, heads=2, groups=2, size=3),
)
LARGER = (
    Rows((63, 64, 65), (1, 7, 64), heads=4, groups=4, size=64),
    Rows((65, 2, 33), None, heads=4, groups=1, size=96, window=20),
    Rows((20, 2, 11), (40, 5, 17), heads=8, groups=2, size=128, softcap=10.0),
    Rows((130, 5), (3, 0), heads=2, groups=2, size=32, window=50),
)


@dataclass(frozen=True)
class Problem:
    rows: Rows
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    starts: torch.Tensor
    prefixes: dict[str, Any]
    grad: torch.Tensor

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.rows.size**-0.5, "softcap": self.rows.softcap, "window": self.rows.window}

    def run(self, backend: str | None) -> list[torch.Tensor]:
        """Outputs, and gradients by query, key and value."""
        leaves = [part.detach().requires_grad_() for part in self.tensors]
        longest = max(self.rows.tails, default=0)
        out = tail_attention(*leaves, self.starts, longest, **self.prefixes, **self.options, backend=backend)
        assert out.is_contiguous() and out.dtype == self.grad.dtype and out.shape == self.tensors[0].shape
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad)]

    def expected(self) -> list[torch.Tensor]:
        leaves = [part.detach().double().requires_grad_() for part in self.tensors]
        parts = []
        for r in range(len(self.rows.tails)):
            begin, end = self.starts[r].item(), self.starts[r + 1].item()
            query, key, value = (part[begin:end].transpose(0, 1) for part in leaves)
            length = 0
            if self.prefixes:
                at = self.prefixes["prefix_rows"][r] if self.rows.shared else r
                first, last = self.prefixes["spans"][r].tolist()
                length = last - first
                before = (self.prefixes[name][at, :, first:last].double() for name in ("prefix_keys", "prefix_values"))
                key, value = (torch.cat(pair, 1) for pair in zip(before, (key, value), strict=True))
            key, value = (part.repeat_interleave(self.rows.heads // self.rows.groups, 0) for part in (key, value))
            scores = query @ key.mT * self.options["scale"]
            if self.rows.softcap:
                scores = self.rows.softcap * torch.tanh(scores / self.rows.softcap)
            distance = torch.arange(length, length + end - begin)[:, None] - torch.arange(key.shape[1])
            seen = (distance >= 0) & (distance < (self.rows.window or 10_000))
            parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1))
        out = torch.cat(parts)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.double())]


def problem(rows: Rows, dtype: torch.dtype = torch.float32, strided: bool = False) -> Problem:
    tokens = sum(rows.tails)

    def make(heads: int) -> torch.Tensor:
        if strided:  # cut from larger buffers, heads before tokens
            return torch.randn(heads + 1, tokens, rows.size + 3).to(dtype)[1:, :, 2:-1].transpose(0, 1)
        return torch.randn(tokens, heads, rows.size).to(dtype)

    starts = torch.tensor([0, *rows.tails]).cumsum(0)
    prefixes: dict[str, Any] = {}
    if rows.prefixes is not None:
        places, count = max(rows.prefixes) + 3, len(rows.tails) + rows.shared
        stored = torch.randn(2, count, rows.groups, places, rows.size).to(dtype)
        if strided:
            stored = torch.randn(2, count, places, rows.groups, rows.size + 1).to(dtype)[..., :-1].transpose(2, 3)
        begins = [(r * 2) % (places - length + 1) for r, length in enumerate(rows.prefixes)]
        spans = [[begin, begin + length] for begin, length in zip(begins, rows.prefixes, strict=True)]
        prefixes = {"prefix_keys": stored[0], "prefix_values": stored[1], "spans": torch.tensor(spans)}
        if rows.shared:
            prefixes["prefix_rows"] = torch.arange(len(rows.tails)).flip(0) % count
    tensors = make(rows.heads), make(rows.groups), make(rows.groups)
    return Problem(rows, tensors, starts, prefixes, make(rows.heads))


def check(one: Problem, backend: str | None, also: float = 0.0) -> None:
    limit = max(TAILS[one.grad.dtype], also)
    for name, ours, expected in zip(("out", "query", "key", "value"), one.run(backend), one.expected(), strict=True):
        assert relative_error(ours, expected) <= limit, name


@pytest.mark.parametrize("rows", CASES, ids=str)
def test_tails_attend_to_their_prefixes_and_to_themselves(backend, rows):
    check(problem(rows), backend)


@pytest.mark.skipif(not probe("triton").explicit_only, reason="Triton's interpreter is not in use")
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(INTERPRETED[0], dtype) for dtype in FLOATS] + [(rows, torch.float32) for rows in INTERPRETED[1:]],
)
def test_the_triton_kernels(rows, dtype):
    check(problem(rows, dtype, strided=dtype == torch.bfloat16), "triton")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", (*CASES[2:], *LARGER), ids=str)
def test_every_isa(isa, dtype, rows):
    check(problem(rows, dtype), "cpu")


@pytest.mark.parametrize("rows", LARGER, ids=str)
def test_the_reference(rows):
    check(problem(rows), "torch")
    check(problem(rows, torch.bfloat16), "torch")


@pytest.mark.parametrize("groups", (1, 2, 3, 6))
@pytest.mark.parametrize("size", (31, 32))
def test_groups_of_heads_and_strided_tensors(backend, groups, size):
    rows = Rows((6, 1, 8), (2, 9, 0), heads=6, groups=groups, size=size)
    check(problem(rows, strided=True), backend)
    check(problem(rows, torch.bfloat16, strided=True), backend)


def test_values_of_a_head_one_by_one(backend):
    one = problem(CASES[0])
    apart = tuple(part.transpose(0, 2).contiguous().transpose(0, 2) for part in one.tensors)
    check(replace(one, tensors=apart, grad=one.grad.transpose(0, 2).contiguous().transpose(0, 2)), backend)


def test_a_prefix_shared_by_all_rows(backend):
    one = problem(Rows((3, 2, 4), (5, 5, 5)))
    shared = {
        name: part[:1].expand_as(part) if name.startswith("prefix_") else part for name, part in one.prefixes.items()
    }
    check(replace(one, prefixes=shared), backend)


def test_float64_is_computed_by_torch_and_its_gradients_are_right():
    one = problem(Rows((2, 1), (1, 2), heads=2, groups=1, size=2, softcap=3.0, window=3), torch.float64)
    assert kedit_fast.explain("tail_attention", one.tensors[0]).runs.startswith("torch")
    check(one, None)
    leaves = [part.requires_grad_() for part in one.tensors]
    assert torch.autograd.gradcheck(
        lambda *parts: tail_attention(*parts, one.starts, 2, **one.prefixes, **one.options), leaves
    )


def test_large_heads_are_left_to_torch_where_a_kernel_has_no_registers_for_them():
    for dtype, size, declined in ((torch.float32, 65, True), (torch.bfloat16, 256, False), (torch.bfloat16, 257, True)):
        reasons = kedit_fast.explain("tail_attention", torch.empty(3, 2, size, dtype=dtype)).reasons
        assert ("heads of" in reasons["triton"]) == (declined and not probe("triton").reason)


def test_scores_far_from_zero_do_not_overflow(every_backend):
    one = problem(INTERPRETED[1])
    query, key, value = one.tensors
    check(replace(one, tensors=(query * 200, key, value)), every_backend, also=1e-3)  # scores of 1000, rounded to 6e-5


@pytest.mark.parametrize("which", range(3))
def test_nan_reaches_every_token_that_attends_to_it_and_no_other_row(every_backend, which):
    one = problem(Rows((2, 4, 1), (1, 2, 1), heads=2, groups=1, size=4))
    tensors = [part.clone() for part in one.tensors]
    tensors[which][2 + 1, 0] = torch.nan  # the second token of the second row
    bad = replace(one, tensors=tuple(tensors))
    results = bad.run(every_backend)
    for ours, expected in zip(results, one.run(every_backend), strict=True):
        assert torch.equal(ours[:2], expected[:2]) and torch.equal(ours[6:], expected[6:])
    attends = results[0][3, :1] if which == 0 else results[0][3:6]  # a key is that of both heads
    assert bool(attends.isnan().all())


def test_rows_have_the_bits_that_they_have_alone_for_any_number_of_threads(isa):
    one = problem(replace(LARGER[0], tails=(63, 64, 65, 9, 30), prefixes=(1, 7, 64, 9, 9)))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(one.run("cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    begin, end = 63, 127
    alone = Problem(
        replace(one.rows, tails=(64,)),
        tuple(part[begin:end] for part in one.tensors),
        torch.tensor([0, 64]),
        {name: part[1:2] for name, part in one.prefixes.items()},
        one.grad[begin:end],
    )
    assert all(torch.equal(ours, whole[begin:end]) for ours, whole in zip(alone.run("cpu"), results[0], strict=True))


def test_no_token_and_no_row(every_backend):
    for tails in ((), (0, 0)):
        rows = Rows(tails, None)
        one = Problem(rows, tuple(torch.randn(0, n, 8) for n in (4, 2, 2)), torch.tensor([0, *tails]), {},
                      torch.randn(0, 4, 8))  # fmt: skip
        assert [tuple(part.shape) for part in one.run(every_backend)] == [(0, 4, 8), (0, 4, 8), (0, 2, 8), (0, 2, 8)]


def test_backends_read_what_another_one_left_for_gradients(every_backend):
    """As where a block of `use_backend` ends before the backward pass."""
    one = problem(INTERPRETED[1])
    leaves = [part.requires_grad_() for part in one.tensors]
    with kedit_fast.use_backend(every_backend):
        out = tail_attention(*leaves, one.starts, 18, **one.prefixes, **one.options)
    for ours, expected in zip(torch.autograd.grad(out, leaves, one.grad), one.expected()[1:], strict=True):
        assert relative_error(ours, expected) <= TAILS[torch.float32]


def test_second_derivatives_are_refused():
    one = problem(CASES[0])
    leaves = [part.requires_grad_() for part in one.tensors]
    out = tail_attention(*leaves, one.starts, 5, **one.prefixes, **one.options)
    with pytest.raises(GradientError, match="second derivative"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)


def test_the_native_module_takes_numpy_arrays_and_refuses_what_does_not_fit(cpu_module):
    query, key = np.zeros((3, 2, 4), np.float32), np.zeros((3, 1, 4), np.float32)
    value, starts = np.arange(12, dtype=np.float32).reshape(3, 1, 4), np.array([0, 1, 3])
    out, normalizer = np.empty_like(query), np.empty((3, 2, 2), np.float32)
    prefixes = np.ones((1, 1, 2, 4), np.float32)
    spans = np.array([[0, 2], [1, 1]])

    def run(inputs, *rest, to=out, scratch=normalizer):
        cpu_module.tail_attention(to, scratch, inputs, *(rest or (1.0, 0.0, 0, 1)))

    run((query, key, value, starts, prefixes, prefixes, spans, np.array([0, 0])))
    assert np.allclose(out[0], (value[0] + 2) / 3) and np.allclose(out[2], value[1:].mean(0))
    assert (normalizer[..., 0] == 0).all() and np.allclose(normalizer[0, :, 1], 1 / 3)
    none = (None,) * 4
    for inputs, message in (
        ((query, key, value, np.array([0, 1, 2]), *none), "rise from 0 to N"),
        ((query, key, value, np.array([0, 4, 3]), *none), "rise from 0 to N"),
        ((query, key, value[:2], starts, *none), "value must be"),
        ((query.astype(np.float64), key, value, starts, *none), "query must be float32"),
        ((query, key, value, starts, prefixes, prefixes, None, None), "come together"),
        ((query, key, value, starts, prefixes, prefixes, np.array([[0, 3], [1, 1]]), np.array([0, 0])), "spans must"),
        ((query, key, value, starts, prefixes, prefixes, spans, np.array([0, 1])), "prefix_rows must be rows"),
        ((query, key, value, starts, prefixes, prefixes, spans, None), "a row for each row"),
        ((query, key, value, starts), "eight tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            run(inputs)
    with pytest.raises(ValueError, match="out must be"):
        run((query, key, value, starts, *none), to=out[:, :1])
    with pytest.raises(ValueError, match="overlap"):
        run((query, key, value, starts, *none), to=np.lib.stride_tricks.as_strided(out, out.shape, (0, 16, 4)))
    with pytest.raises(ValueError, match="normalizer must be"):
        run((query, key, value, starts, *none), scratch=normalizer[:2])
    with pytest.raises(ValueError, match="negative"):
        run((query, key, value, starts, *none), 1.0, 0.0, -1, 1)
