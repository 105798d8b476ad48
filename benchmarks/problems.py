"""A case made real: inputs, our call, the baselines, the check that gates the numbers, and the work counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

import kedit_fast
from benchmarks.cases import Case
from kedit_fast.reference.wide_product import has_wide_product

# Relative Frobenius errors against float64 that a result may have; the tests hold the ops to tighter ones.
LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4, "float64": 1e-11}


@dataclass(frozen=True)
class Problem:
    """What is timed. Every callable can be called again and again."""

    ours: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]]
    """The text of each expression -> its call."""
    error: Callable[[], float]
    """The relative error of our result against float64."""
    limit: float
    flops: int
    bytes: int
    """Bytes that must move through memory: inputs read once, outputs written (and read, where added to)."""
    rate: str
    """The measured peak that bounds the rate: "fp32", "bf16" or "fp64"."""
    backend: str
    beside: frozenset[str] = frozenset()
    """Baselines that floors and goals are not for: loops over other ops of this package."""


def build(case: Case, device: str = "cpu", backend: str | None = None, compiled: bool = True) -> Problem:
    """Make the tensors of a case on `device`; `compiled` adds the torch.compile baselines."""
    torch.manual_seed(0)
    problem = _BUILDERS[case.op](case, device, backend)
    if not compiled:
        baselines = {name: call for name, call in problem.baselines.items() if "compile" not in name}
        problem = Problem(**{**problem.__dict__, "baselines": baselines})
    return problem


def _symmetric(case: Case, device: str, backend: str | None) -> Problem:
    rows, d = case.sizes["rows"], case.sizes["d"]
    dtype = getattr(torch, case.dtype)
    x = torch.randn(rows, d, device=device).to(dtype)
    mask = torch.rand(rows, device=device) > 0.15 if case.sizes.get("masked") else None  # the rest is padding
    real = x if mask is None else x[mask]
    acc_dtype = torch.float64 if case.sizes.get("wide_acc") else torch.float32
    acc, plain = (torch.zeros(d, d, dtype=acc_dtype, device=device) for _ in range(2))

    def error() -> float:
        result = kedit_fast.symmetric_rank_k_update_(torch.zeros_like(acc), x, mask=mask, backend=backend)
        return _lower_error(result, real)

    def expression(total, x, mask):
        if mask is not None:
            x = x[mask]
        if x.is_cuda and x.dtype != torch.float32:  # the matrix unit's own product with fp32 sums
            return total.add_(torch.mm(x.T, x, out_dtype=torch.float32))
        wide = x.float()
        return total.addmm_(wide.T, wide) if total.dtype == torch.float32 else total.add_(wide.T @ wide)

    compiled = torch.compile(expression)
    y = "x" if mask is None else "y"
    text = f"{y}.T, {y}" if dtype == torch.float32 else f"{y}.float().T, {y}.float()"
    text = f"acc.addmm_({text})" if acc_dtype == torch.float32 else f"acc.add_(torch.mm({text}))"
    if x.is_cuda and dtype != torch.float32:
        text = f"acc.add_(torch.mm({y}.T, {y}, out_dtype=torch.float32))"
    text += "" if mask is None else ", y = x[mask]"
    baselines = {text: lambda: expression(plain, x, mask)}
    if dtype != torch.float32:  # nothing to fuse otherwise
        baselines[f"torch.compile({text})"] = lambda: compiled(plain, x, mask)
    return Problem(
        ours=lambda: kedit_fast.symmetric_rank_k_update_(acc, x, mask=mask, backend=backend),
        baselines=baselines, error=error, limit=LIMITS["float32"], flops=len(real) * d * (d + 1),
        bytes=real.nbytes + d * (d + 1) * acc.element_size(), rate="fp32" if dtype == torch.float32 else "bf16",
        backend=_runs("symmetric_rank_k_update_", acc, x, mask, backend=backend),
    )  # fmt: skip


def _lower_error(result: torch.Tensor, x: torch.Tensor, block: int = 1024) -> float:
    """Of the whole lower triangle, a band of rows at a time: a float64 matrix of these sizes does not fit."""
    wide, wrong, scale = x.double(), 0.0, 0.0
    for i in range(0, x.shape[1], block):
        end = min(i + block, x.shape[1])
        expected = torch.tril(wide[:, i:end].T @ wide[:, :end], diagonal=i)
        wrong += float((result[i:end, :end].double() - expected).square().sum())
        scale += float(expected.square().sum())
    return (wrong / scale) ** 0.5


def _rank_k(case: Case, device: str, backend: str | None) -> Problem:
    out, inner, k = case.sizes["out"], case.sizes["inner"], case.sizes["k"]
    dtype = getattr(torch, case.dtype)
    weight = torch.randn(out, inner, device=device).to(dtype)
    if case.sizes.get("transposed"):
        weight = weight.T.contiguous().T
    left, right = torch.randn(out, k, device=device) * 1e-3, torch.randn(inner, k, device=device)
    copy = weight.bfloat16() if case.sizes.get("copy") else None
    plain, plain_copy = weight.clone(), None if copy is None else copy.clone()

    def error() -> float:
        expected = torch.addmm(weight.double(), left.double(), right.double().T)
        result, result_copy = weight.clone(), None if copy is None else torch.zeros_like(copy)
        kedit_fast.rank_k_update_(result, left, right, copy=result_copy, backend=backend)
        if copy is not None and not torch.equal(result_copy, result.bfloat16()):
            return float("inf")
        return float((result.double() - expected).norm() / expected.norm())

    def expression(weight, copy, left, right):
        weight += (left @ right.T).to(weight.dtype)
        if copy is not None:
            copy.copy_(weight)

    compiled = torch.compile(expression)
    text = "W += (left @ right.T).to(W.dtype)" + ("" if copy is None else "; copy.copy_(W)")
    moved = weight.nbytes * 2 + left.nbytes + right.nbytes + (0 if copy is None else copy.nbytes)
    return Problem(
        ours=lambda: kedit_fast.rank_k_update_(weight, left, right, copy=copy, backend=backend),
        baselines={
            text: lambda: expression(plain, plain_copy, left, right),
            f"torch.compile({text})": lambda: compiled(plain, plain_copy, left, right),
        },
        error=error, limit=LIMITS[case.dtype], flops=2 * out * inner * k, bytes=moved, rate="fp32",
        backend=_runs("rank_k_update_", weight, left, right, copy, backend=backend),
    )  # fmt: skip


def _offsets(case: Case) -> torch.Tensor:
    """Where the rows of each group begin [E + 1]: as many in every group, or as uneven a random routing makes them."""
    groups, rows = case.sizes["groups"], case.sizes["rows"]
    counts = torch.full((groups,), rows)
    if case.sizes.get("uneven"):
        counts = torch.multinomial(torch.rand(groups), groups * rows, replacement=True).bincount(minlength=groups)
    return F.pad(counts.cumsum(0), (1, 0))


def _padding(offsets: torch.Tensor, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows [n, d] -> [E, most, d], zeros behind those of a group; a view where groups are even."""
    counts = offsets.diff()
    groups, most = len(counts), int(counts.max())
    if bool((counts == most).all()):
        return lambda rows: rows.view(groups, most, rows.shape[1])
    group = torch.arange(groups).repeat_interleave(counts)
    at = (group * most + torch.arange(len(group)) - offsets[group]).to(device)

    def pad(rows: torch.Tensor) -> torch.Tensor:
        return rows.new_zeros(groups * most, rows.shape[1]).index_copy_(0, at, rows).view(groups, most, -1)

    return pad


def _takes_grouped_mm(*matrices: torch.Tensor) -> bool:
    """Whether torch has products of groups for these: their rows must begin at multiples of 16 bytes."""
    wide = all(stride == 1 or stride * m.element_size() % 16 == 0 for m in matrices for stride in m.stride())
    return hasattr(F, "grouped_mm") and wide


def _grouped_symmetric(case: Case, device: str, backend: str | None) -> Problem:
    d, dtype = case.sizes["d"], getattr(torch, case.dtype)
    where = _offsets(case)
    begins, groups, rows = where.tolist(), len(where) - 1, int(where[-1])
    offsets, pad = where.to(device), _padding(where, device)
    ends = offsets[1:].int()
    x = torch.randn(rows, d, device=device).to(dtype)
    weights = torch.rand(rows, device=device) if case.sizes.get("weighted") else None
    acc, plain = (torch.zeros(groups, d, d, device=device) for _ in range(2))

    def error() -> float:
        result = kedit_fast.grouped_symmetric_rank_k_update_(
            torch.zeros_like(acc), x, offsets, weights, backend=backend
        )
        wrong, scale = 0.0, 0.0
        for group, (begin, end) in enumerate(pairwise(begins)):
            part = x[begin:end].double()
            scaled = part if weights is None else part * weights[begin:end, None].double()
            expected = torch.tril(scaled.T @ part)
            wrong += float((result[group].tril().double() - expected).square().sum())
            scale += float(expected.square().sum())
        return (wrong / scale) ** 0.5

    halves = dtype != torch.float32 and device != "cpu"  # the matrix unit's own product with fp32 sums

    def expression(total, x):
        if halves and weights is None:
            padded = pad(x)
            return total.add_(torch.bmm(padded.mT, padded, out_dtype=torch.float32))
        wide = x.float()
        padded = pad(wide)
        return total.baddbmm_((padded if weights is None else pad(wide * weights[:, None])).mT, padded)

    def by_grouped_mm(total, x):
        wide = x if halves else x.float()
        scaled = wide if weights is None else wide * weights[:, None].to(wide.dtype)
        return total.add_(F.grouped_mm(scaled.T, wide, offs=ends, out_dtype=torch.float32 if halves else None))

    def loop():
        for group, (begin, end) in enumerate(pairwise(begins)):
            part = None if weights is None else weights[begin:end]
            kedit_fast.symmetric_rank_k_update_(plain[group], x[begin:end], part, backend=backend)

    left = "X" if weights is None else "(w X)"
    text = f"acc.baddbmm_({left}.mT, X), X = {'x' if dtype == torch.float32 else 'x.float()'} by groups"
    if halves and weights is None:
        text = "acc.add_(torch.bmm(X.mT, X, out_dtype=torch.float32)), X = x by groups"
    looped = "a loop of symmetric_rank_k_update_"
    compiled = torch.compile(expression)
    baselines: dict[str, Callable[[], Any]] = {text: lambda: expression(plain, x)}
    if _takes_grouped_mm(x):
        baselines[f"acc.add_(F.grouped_mm({left.lower()}.T, x, offs))"] = lambda: by_grouped_mm(plain, x)
    baselines[looped] = loop
    if dtype != torch.float32:  # nothing to fuse otherwise
        baselines[f"torch.compile({text})"] = lambda: compiled(plain, x)
    written = sum(begin < end for begin, end in pairwise(begins)) * d * (d + 1) * acc.element_size()
    return Problem(
        ours=lambda: kedit_fast.grouped_symmetric_rank_k_update_(acc, x, offsets, weights, backend=backend),
        baselines=baselines, error=error, limit=LIMITS["float32"], flops=rows * d * (d + 1), bytes=x.nbytes + written,
        rate="fp32" if dtype == torch.float32 else "bf16",
        backend=_runs("grouped_symmetric_rank_k_update_", acc, x, offsets, weights, backend=backend),
        beside=frozenset({looped}),
    )  # fmt: skip


def _grouped_rank_k(case: Case, device: str, backend: str | None) -> Problem:
    out, inner, dtype = case.sizes["out"], case.sizes["inner"], getattr(torch, case.dtype)
    where = _offsets(case)
    begins, groups, rows = where.tolist(), len(where) - 1, int(where[-1])
    offsets, pad = where.to(device), _padding(where, device)
    ends = offsets[1:].int()
    u = max(1, rows // 8)  # eight experts a token
    weight = torch.randn(groups, out, inner, device=device).to(dtype)
    left, right = torch.randn(out, u, device=device) * 1e-3, torch.randn(rows, inner, device=device)
    columns = torch.randint(0, u, (rows,), device=device)
    copy = weight.bfloat16() if case.sizes.get("copy") else None
    plain, plain_copy = weight.clone(), None if copy is None else copy.clone()

    def error() -> float:
        result, narrow = weight.clone(), None if copy is None else torch.zeros_like(copy)
        kedit_fast.grouped_rank_k_update_(result, left, right, columns, offsets, copy=narrow, backend=backend)
        if narrow is not None and not torch.equal(narrow, result.bfloat16()):
            return float("inf")
        wrong, scale = 0.0, 0.0
        for group, (begin, end) in enumerate(pairwise(begins)):
            product = left[:, columns[begin:end]].double() @ right[begin:end].double()
            expected = weight[group].double() + product
            wrong += float((result[group].double() - expected).square().sum())
            scale += float(expected.square().sum())
        return (wrong / scale) ** 0.5

    def expression(weight, copy, left, right):
        by_row = left.T[columns]
        factors = pad(by_row).mT, pad(right)
        if weight.dtype == torch.float32:
            weight.baddbmm_(*factors)
        else:
            weight += torch.bmm(*factors).to(weight.dtype)
        if copy is not None:
            copy.copy_(weight)

    def by_grouped_mm(weight, copy, left, right):
        weight += F.grouped_mm(left[:, columns], right, offs=ends).to(weight.dtype)
        if copy is not None:
            copy.copy_(weight)

    def loop():
        for group, (begin, end) in enumerate(pairwise(begins)):
            narrow = None if plain_copy is None else plain_copy[group]
            factors = left[:, columns[begin:end]], right[begin:end].T
            kedit_fast.rank_k_update_(plain[group], *factors, copy=narrow, backend=backend)

    compiled = torch.compile(expression)
    text = "W.baddbmm_(L, R)" if dtype == torch.float32 else "W += torch.bmm(L, R).to(W.dtype)"
    text += ", L, R = left[:, columns], right by groups" + ("" if copy is None else "; copy.copy_(W)")
    looped = "a loop of rank_k_update_"
    baselines: dict[str, Callable[[], Any]] = {text: lambda: expression(plain, plain_copy, left, right)}
    if device == "cpu" and _takes_grouped_mm(left[:, columns], right):  # on CUDA it takes bfloat16 alone
        name = "W += F.grouped_mm(left[:, columns], right, offs).to(W.dtype)"
        baselines[name] = lambda: by_grouped_mm(plain, plain_copy, left, right)
    baselines[looped] = loop
    baselines[f"torch.compile({text})"] = lambda: compiled(plain, plain_copy, left, right)
    moved = weight.nbytes * 2 + left.nbytes + right.nbytes + (0 if copy is None else copy.nbytes)
    return Problem(
        ours=lambda: kedit_fast.grouped_rank_k_update_(
            weight, left, right, columns, offsets, copy=copy, backend=backend
        ),
        baselines=baselines, error=error, limit=LIMITS[case.dtype], flops=2 * out * inner * rows, bytes=moved,
        rate="fp32", backend=_runs("grouped_rank_k_update_", weight, left, right, copy, backend=backend),
        beside=frozenset({looped}),
    )  # fmt: skip


def _head(case: Case, device: str, backend: str | None) -> Problem:
    rows, width, vocabulary = (case.sizes[name] for name in ("rows", "width", "vocabulary"))
    dtype = getattr(torch, case.dtype)
    hidden, other = (torch.randn(rows, width, device=device).to(dtype).requires_grad_(i == 0) for i in range(2))
    head = torch.randn(vocabulary, width, device=device).to(dtype).mul_(width**-0.5)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    kl = case.op == "distribution_kl"
    states = (hidden, other) if kl else (hidden,)
    forward = "forward" in case.sizes  # values alone
    if forward:
        hidden.requires_grad_(False)

    def ours():
        if kl:
            value = kedit_fast.distribution_kl(hidden, other, head, backend=backend)
        else:
            value = kedit_fast.target_log_probs(hidden, head, targets, backend=backend).log_prob
        return value.detach(), None if forward else torch.autograd.grad(value.sum(), hidden)[0]

    def loss(hidden, other, head, targets):
        log_p = F.log_softmax(hidden.float() @ head.float().T, -1)
        if not kl:
            return log_p.gather(1, targets[:, None])[:, 0]
        log_q = F.log_softmax(other.float() @ head.float().T, -1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    def baseline(function):
        value = function(hidden, other, head, targets)
        return value if forward else torch.autograd.grad(value.sum(), hidden)[0]

    def error() -> float:
        """The larger of the value's and the gradient's; in float64 the states are taken a few rows at a time."""
        value, gradient = ours()
        worst = 0.0
        wide = head.double()
        for i in range(0, rows, 16):
            part = hidden[i : i + 16].detach().double().requires_grad_()
            log_p = F.log_softmax(part @ wide.T, -1)
            if kl:
                log_q = F.log_softmax(other[i : i + 16].double() @ wide.T, -1)
                expected = (log_p.exp() * (log_p - log_q)).sum(-1)
            else:
                expected = log_p.gather(1, targets[i : i + 16, None])[:, 0]
            (slope,) = torch.autograd.grad(expected.sum(), part)
            pairs = [(value[i : i + 16], expected.detach())]
            pairs += [] if gradient is None else [(gradient[i : i + 16], slope)]
            for result, right in pairs:
                worst = max(worst, float((result.double() - right).norm() / right.norm()))
        return worst

    compiled = torch.compile(loss)
    text = "kl_div(log_softmax(...), log_softmax(...))" if kl else "log_softmax(hidden.float() @ head.float().T)"
    baselines = {text: lambda: baseline(loss), f"torch.compile({text})": lambda: baseline(compiled)}
    if has_wide_product(hidden) and not forward:  # what a GPU does best comes first: it is the baseline
        half, fused = half_product_step, torch.compile(half_product_step)
        name = f"{'2 ' if kl else ''}mm(hidden, head.T, out_dtype=float32), softmax, {case.dtype} mm for the gradient"
        reference = other if kl else None
        operands = (hidden.detach(), reference, head, targets)
        baselines = {name: lambda: half(*operands), f"torch.compile({name})": lambda: fused(*operands), **baselines}
    products = 1 + kl + (not forward)  # what has to be done: logits (of both), and d logits times head
    return Problem(
        ours=ours, baselines=baselines, error=error, limit=max(LIMITS[case.dtype], 2e-6),
        flops=2 * products * rows * vocabulary * width, bytes=(1 if forward else 2) * head.nbytes,
        rate="bf16" if has_wide_product(hidden) else "fp32",
        backend=_runs(case.op, *states, head, backend=backend),
    )  # fmt: skip


def half_product_step(
    hidden: torch.Tensor, reference: torch.Tensor | None, head: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of the targets, or the divergence from the reference states, and the gradient of their sum.

    Products of 16-bit operands with fp32 logits and fp32 softmax; d logits is rounded to 16 bits for its product.
    """
    log_p = torch.log_softmax(torch.mm(hidden, head.T, out_dtype=torch.float32), -1)
    if reference is None:
        value = log_p.gather(1, targets[:, None])[:, 0]
        d_logits = log_p.exp().neg_().scatter_add_(1, targets[:, None], torch.ones_like(value)[:, None])
    else:
        log_q = torch.log_softmax(torch.mm(reference, head.T, out_dtype=torch.float32), -1)
        p, gap = log_p.exp(), log_p - log_q
        value = (p * gap).sum(-1)
        d_logits = p * (gap - value[:, None])
    return value, torch.mm(d_logits.to(head.dtype), head)


def _solve(case: Case, device: str, backend: str | None) -> Problem:
    u, columns = case.sizes["u"], case.sizes["columns"]
    dtype = getattr(torch, case.dtype)
    factor = torch.randn(u, 2 * u, dtype=dtype, device=device)
    gram, rhs = factor @ factor.T / (2 * u), torch.randn(u, columns, dtype=dtype, device=device)
    eye = torch.eye(u, dtype=dtype, device=device)

    def error() -> float:
        expected = torch.linalg.solve(gram.double() + 0.1 * eye.double(), rhs.double())
        result = kedit_fast.spd_solve(gram, rhs, 0.1, backend=backend)
        return float((result.double() - expected).norm() / expected.norm())

    def cholesky(gram, rhs):
        return torch.cholesky_solve(rhs, torch.linalg.cholesky(gram + 0.1 * eye))

    return Problem(
        ours=lambda: kedit_fast.spd_solve(gram, rhs, 0.1, backend=backend),
        baselines={
            "torch.linalg.solve(A + ridge * I, B)": lambda: torch.linalg.solve(gram + 0.1 * eye, rhs),
            "torch.cholesky_solve(B, torch.linalg.cholesky(A + ridge * I))": lambda: cholesky(gram, rhs),
        },
        error=error, limit=1e-5 if dtype == torch.float32 else LIMITS["float64"],
        flops=u**3 // 3 + 2 * u * u * columns, bytes=gram.nbytes + 2 * rhs.nbytes,
        rate="fp64" if dtype == torch.float64 else "fp32", backend=_runs("spd_solve", gram, rhs, backend=backend),
    )  # fmt: skip


def _by_rows(case: Case, device: str, backend: str | None) -> Problem:
    """The norm or a gated activation, alone or with the gradients of its inputs; a norm's weight has none."""
    rows, d = case.sizes["rows"], case.sizes["d"]
    dtype = getattr(torch, case.dtype)
    norm, backward = case.op == "rms_norm", bool(case.sizes.get("backward"))
    x, other, grad = (torch.randn(rows, d, device=device).to(dtype) for _ in range(3))
    if norm:
        other = torch.randn(d, device=device).to(dtype)
    inputs = ((x,) if norm else (x, other)) if backward else ()
    for part in inputs:
        part.requires_grad_()
    op = getattr(kedit_fast, case.op)

    def ours():
        return op(x, other, backend=backend)

    def expression(x, other):
        if case.op == "gated_silu":
            return F.silu(x) * other
        if case.op == "gated_gelu":
            return F.gelu(x, approximate="tanh") * other
        wide = x.float()
        return other * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def exact(x, other):
        if not norm:
            return expression(x, other)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * other

    def with_gradients(function: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        def call():
            value = function()
            return (value.detach(), *torch.autograd.grad(value, inputs, grad))

        return call if backward else lambda: (function(),)

    def error() -> float:
        """The largest of the value's and the gradients'."""
        wide = [part.detach().double().requires_grad_(part.requires_grad) for part in (x, other)]
        value = exact(*wide)
        slopes = torch.autograd.grad(value, wide[: len(inputs)], grad.double()) if backward else ()
        worst = 0.0
        for result, expected in zip(with_gradients(ours)(), (value.detach(), *slopes), strict=True):
            worst = max(worst, float((result.double() - expected).norm() / expected.norm()))
        return worst

    compiled = torch.compile(expression)
    text = {
        "rms_norm": "weight * (x32 * rsqrt(x32.pow(2).mean(-1) + eps)).to(x.dtype)",
        "gated_silu": "F.silu(gate) * up",
        "gated_gelu": "F.gelu(gate, approximate='tanh') * up",
    }[case.op]
    baselines = {text: with_gradients(lambda: expression(x, other))}
    if norm:
        baselines["F.rms_norm(x, (d,), weight, eps)"] = with_gradients(lambda: F.rms_norm(x, (d,), other, 1e-6))
    baselines[f"torch.compile({text})"] = with_gradients(lambda: compiled(x, other))
    flops, passes = (4, 2) if norm else (20, 3)
    if backward:
        flops, passes = (12, 5) if norm else (60, 8)
    return Problem(
        ours=with_gradients(ours), baselines=baselines, error=error, limit=LIMITS[case.dtype], flops=flops * rows * d,
        bytes=passes * x.nbytes, rate="fp32", backend=_runs(case.op, x, other, backend=backend),
    )  # fmt: skip


def _descent(case: Case, device: str, backend: str | None) -> Problem:
    """WISE's step against its published expression: an int64 mask, weight decay on everything, a clamp."""
    h, d, tokens = (case.sizes[name] for name in ("h", "d", "tokens"))
    origin, lr, decay, bound = torch.randn(h, d, device=device) * 0.02, 1.0, 1e-5, 1.0
    left, right = torch.randn(tokens, h, device=device) * 1e-3, torch.randn(tokens, d, device=device)
    share = case.sizes.get("share")
    mask = None if share is None else (torch.rand(h, d, device=device) < share / 100).long()
    entries = None if mask is None else kedit_fast.ops.pack_bits(mask)
    weight, plain = origin.clone(), origin.clone()
    options = {"left": left, "right": right, "entries": entries, "decay": decay, "decay_all": True, "origin": origin,
               "bound": bound, "backend": backend}  # fmt: skip

    def error() -> float:
        grad = left.double().T @ right.double() * (1 if mask is None else mask)
        expected = origin.double() - lr * (grad + decay * origin.double())
        expected = expected.clamp(origin.double() - bound, origin.double() + bound)
        result = origin.clone()
        if not kedit_fast.masked_descent_(result, lr, **options):
            return float("inf")
        return float((result.double() - expected).norm() / expected.norm())

    def expression(weight, left, right, mask, origin):
        grad = left.T @ right
        if mask is not None:
            grad = grad * mask
        weight.add_(grad.add(weight, alpha=decay), alpha=-lr)
        weight.copy_(torch.clamp(weight, min=origin - bound, max=origin + bound))

    compiled = torch.compile(expression)
    text = "g = left.T @ right" + (" * mask" if share else "") + "; W -= lr * (g + decay * W); clamp(W, W0 - c, W0 + c)"
    operands = (plain, left, right, mask, origin)
    return Problem(
        ours=lambda: kedit_fast.masked_descent_(weight, lr, **options),
        baselines={
            text: lambda: expression(*operands),
            f"torch.compile({text})": lambda: compiled(*operands),
        },
        error=error, limit=LIMITS["float32"], flops=2 * h * d * tokens,
        bytes=12 * h * d + left.nbytes + right.nbytes + (0 if entries is None else entries.nbytes), rate="fp32",
        backend=_runs(case.op, weight, None, left, right, origin, backend=backend),
    )  # fmt: skip


def _adam(case: Case, device: str, backend: str | None) -> Problem:
    """One step and a clamp, as FT takes them, against torch's fused optimizer and the compiled expression."""
    h, d = case.sizes["h"], case.sizes["d"]
    lr, bound = 5e-4, 5e-4
    origin, grad = torch.randn(h, d, device=device) * 0.02, torch.randn(h, d, device=device) * 1e-3
    state = [origin.clone(), *(torch.zeros(h, d, device=device) for _ in range(2)), torch.zeros((), device=device)]
    plain = [t.clone() for t in state]
    parameter = torch.nn.Parameter(origin.clone())
    parameter.grad = grad.clone()
    adam = torch.optim.Adam([parameter], lr=lr, fused=True)

    def ours():
        return kedit_fast.masked_adam_(*state, lr, grad=grad, origin=origin, bound=bound, backend=backend)

    def fused():
        adam.step()
        with torch.no_grad():
            parameter.copy_(torch.clamp(parameter, min=origin - bound, max=origin + bound))

    def expression(weight, mean, square, count, grad, origin):
        count += 1
        mean.lerp_(grad, 0.1)
        square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        root = (square.sqrt() / (1 - 0.999**count).sqrt()).add_(1e-8)
        weight.sub_(mean / root * (lr / (1 - 0.9**count)))
        weight.copy_(torch.clamp(weight, min=origin - bound, max=origin + bound))

    def error() -> float:
        """Of the first step from zeros: the sign of the gradient times lr, but for eps."""
        expected = origin.double() - lr * grad.double() / (grad.double().abs() + 1e-8)
        result = [origin.clone(), *(torch.zeros_like(origin) for _ in range(2)), torch.zeros((), device=device)]
        kedit_fast.masked_adam_(*result, lr, grad=grad, origin=origin, bound=2 * bound, backend=backend)
        return float((result[0].double() - expected).norm() / expected.norm())

    compiled = torch.compile(expression)
    text = "Adam(fused=True).step(); clamp(W, W0 - c, W0 + c)"
    return Problem(
        ours=ours,
        baselines={
            text: fused,
            "torch.compile(Adam's expression; clamp(W, W0 - c, W0 + c))": lambda: compiled(*plain, grad, origin),
        },
        error=error, limit=LIMITS["float32"], flops=15 * h * d, bytes=32 * h * d, rate="fp32",
        backend=_runs(case.op, *state[:1], grad, None, None, origin, backend=backend),
    )  # fmt: skip


def _memories(case: Case, device: str, backend: str | None) -> Problem:
    """Prompts against memories, and tokens through them, beside a product for every memory with all rows."""
    h, d, count, sequences, tokens = (case.sizes[name] for name in ("h", "d", "memories", "sequences", "tokens"))
    dtype = getattr(torch, case.dtype)
    x = torch.randn(sequences * tokens, d, device=device).to(dtype)
    weight = (torch.randn(h, d, device=device) / d**0.5).to(dtype)
    memories = (weight + torch.randn(count, h, d, device=device).to(dtype) / d**0.5).contiguous()
    reference = x @ weight.T
    starts = torch.arange(0, sequences * tokens + 1, tokens, device=device)
    route = (torch.arange(sequences, device=device) % (count + 1) - 1).repeat_interleave(tokens)
    routed = case.op == "routed_linear"

    def ours():
        if routed:
            return kedit_fast.routed_linear(x, weight, memories, route, backend=backend)
        return kedit_fast.activation_distance(x, reference, memories, starts, backend=backend)

    def distances(x, reference, memories):
        gaps = [(F.silu(x @ w.T) - F.silu(reference)).float().norm(dim=1) for w in memories]
        return torch.stack(gaps).view(len(memories), -1, tokens).mean(2)

    def everywhere(x, weight, memories, route):
        out = x @ weight.T
        for m, w in enumerate(memories):
            out = torch.where((route == m)[:, None], x @ w.T, out)
        return out

    def expression():
        return everywhere(x, weight, memories, route) if routed else distances(x, reference, memories)

    def error() -> float:
        wide = x.double(), reference.double(), memories.double()
        expected = everywhere(wide[0], weight.double(), wide[2], route) if routed else distances(*wide)
        return float((ours().double() - expected).norm() / expected.norm())

    compiled = torch.compile(everywhere if routed else distances)
    operands = (x, weight, memories, route) if routed else (x, reference, memories)
    text = ("where(route == m, x @ W_m.T, out) for every m" if routed
            else "norm(silu(x @ W_m.T) - silu(x @ W_0.T)).mean() for every m")  # fmt: skip
    used = route.unique() + 1 if routed else range(1, count + 1)
    first = (x, weight, memories, route) if routed else (x, reference, memories, starts)
    return Problem(
        ours=ours, baselines={text: expression, f"torch.compile({text})": lambda: compiled(*operands)},
        error=error, limit=LIMITS[case.dtype] if routed else max(LIMITS["float32"], 2e-6),
        flops=2 * len(x) * h * d * (1 if routed else count), bytes=len(used) * weight.nbytes + x.nbytes,
        rate="fp32" if dtype == torch.float32 else "bf16", backend=_runs(case.op, *first, backend=backend),
    )  # fmt: skip


def _nearest(case: Case, device: str, backend: str | None) -> Problem:
    """Error: the larger one of those of the distances and of the distances to the keys that are named."""
    n, k, d = (case.sizes[name] for name in ("queries", "keys", "d"))
    keys, radii = torch.randn(k, d, device=device), torch.ones(k, device=device)
    queries = torch.randn(n, d, device=device)
    if case.sizes.get("close"):
        queries = keys[torch.randint(0, k, (n,), device=device)] + 0.3 * queries

    def error() -> float:
        result = kedit_fast.nearest_key(queries, keys, radii, backend=backend)
        wide = keys.double()
        gaps = torch.stack([torch.linalg.vector_norm(wide - q.double(), dim=1) for q in queries])
        right = gaps.gather(1, result.index[:, None])[:, 0]
        least = gaps.amin(1)
        worst = max(
            float((right - least).norm() / least.norm()), float((result.distance - least).norm() / least.norm())
        )
        return worst

    return Problem(
        ours=lambda: kedit_fast.nearest_key(queries, keys, radii, backend=backend),
        baselines={
            "torch.cdist(queries, keys).min(1), not exact": lambda: torch.cdist(queries, keys).min(1),
            "torch.cdist(queries, keys, compute_mode='donot_use_mm_for_euclid_dist').min(1)": lambda: torch.cdist(
                queries, keys, compute_mode="donot_use_mm_for_euclid_dist"
            ).min(1),
        },
        error=error, limit=LIMITS["float32"], flops=2 * n * k * d, bytes=queries.nbytes + keys.nbytes, rate="fp32",
        backend=_runs("nearest_key", queries, keys, backend=backend),
    )  # fmt: skip


def _overlap(case: Case, device: str, backend: str | None) -> Problem:
    """Error: the share of answers that differ."""
    k, bits, rows = (case.sizes[name] for name in ("entries", "bits", "masks"))
    flags = torch.rand(rows + k, bits, device=device) < 0.29  # 4,096 of 14,336
    packed = torch.stack([kedit_fast.ops.pack_bits(row) for row in flags])
    masks, book = packed[:rows], packed[rows:].contiguous()
    of_masks, of_book = flags[:rows], flags[rows:]
    wide_book = of_book.float()

    def error() -> float:
        result = kedit_fast.best_overlap(masks, book, backend=backend)
        shared = of_masks.float() @ wide_book.T  # whole numbers below 2^24: exact
        wrong = (result.index != shared.argmax(1)) | (result.count != shared.amax(1))
        return float(wrong.float().mean())

    return Problem(
        ours=lambda: kedit_fast.best_overlap(masks, book, backend=backend),
        baselines={
            "(masks.float() @ book.T.float()).max(1), published, a byte a bit": lambda: (
                of_masks.float() @ of_book.T.float()
            ).max(1),
            "(masks.float() @ book.T).max(1), the book kept in fp32": lambda: (of_masks.float() @ wide_book.T).max(1),
        },
        error=error, limit=0.0, flops=0, bytes=packed.nbytes, rate="fp32",
        backend=_runs("best_overlap", masks, book, backend=backend),
    )  # fmt: skip


def _bound(case: Case, device: str, backend: str | None) -> Problem:
    """Error: the relative one, of a selection that must be exact."""
    shape = case.sizes["out"], case.sizes["inner"]
    x = torch.randn(shape, device=device).to(getattr(torch, case.dtype))
    divisor = torch.randn(shape, device=device) if case.sizes["divided"] else None
    count = max(1, int(0.4 * x.numel()))

    def sizes() -> torch.Tensor:
        return (x if divisor is None else x / (divisor + 1e-8)).abs().flatten()

    def error() -> float:
        right = sizes().float().sort(descending=True).values[count - 1]
        return float((kedit_fast.magnitude_bound(x, count, divisor, backend=backend) - right).abs() / right)

    text = "x.abs()" if divisor is None else "(x / (y + 1e-8)).abs()"
    return Problem(
        ours=lambda: kedit_fast.magnitude_bound(x, count, divisor, backend=backend),
        baselines={
            f"{text}.flatten().topk(count, sorted=False).values.min()": lambda: sizes()
            .topk(count, sorted=False)
            .values.min(),
            f"{text}.flatten().kthvalue(n - count + 1)": lambda: sizes().kthvalue(x.numel() - count + 1),
        },
        error=error, limit=0.0, flops=0, bytes=x.nbytes + (0 if divisor is None else divisor.nbytes), rate="fp32",
        backend=_runs("magnitude_bound", x, divisor, backend=backend),
    )  # fmt: skip


def gta_ties(base: torch.Tensor, memories: torch.Tensor, weights: torch.Tensor, density: float) -> torch.Tensor:
    """TIES as EasyEdit's WISE merges (`models/wise/merge/gta.py`): trim by topk, majority sign, disjoint mean."""
    trimmed = []
    for memory in memories:
        delta = memory - base
        mask = torch.zeros_like(delta.view(-1))
        mask[torch.topk(delta.abs().view(-1), k=int(density * delta.numel()), largest=True)[1]] = 1
        trimmed.append(delta * mask.view_as(delta))
    weighted = torch.stack(trimmed) * weights.view(-1, 1, 1)
    sign = (weighted.sum(0) >= 0) * 2 - 1
    agrees = weighted.sign() == sign
    share = (weights.view(-1, 1, 1) * agrees).sum(0)
    share[share.abs() < 1e-8] = 1
    return base + (weighted * agrees).sum(0) / share


def _ties(case: Case, device: str, backend: str | None) -> Problem:
    out, inner, m = (case.sizes[name] for name in ("out", "inner", "memories"))
    base = torch.randn(out, inner, device=device)
    memories = torch.stack([base + 1e-3 * torch.randn_like(base) for _ in range(m)])
    weights, result = torch.full((m,), 1 / m, device=device), torch.empty_like(base)

    def error() -> float:
        kedit_fast.ties_merge_(result, base, memories, [1 / m] * m, 0.53, backend=backend)
        expected = torch.empty_like(base, dtype=torch.float64)  # of equal sizes at the bound, topk takes any
        kedit_fast.ties_merge_(expected, base.double(), memories.double(), [1 / m] * m, 0.53, backend="torch")
        return float((result.double() - expected).norm() / expected.norm())

    return Problem(
        ours=lambda: kedit_fast.ties_merge_(result, base, memories, [1 / m] * m, 0.53, backend=backend),
        baselines={"TIES of EasyEdit's gta.py, re-implemented": lambda: gta_ties(base, memories, weights, 0.53)},
        error=error, limit=1e-6, flops=0, bytes=4 * (memories.nbytes + base.nbytes) + base.nbytes, rate="fp32",
        backend=_runs("ties_merge_", base, memories, backend=backend),
    )  # fmt: skip


class _LaidOut(torch.autograd.Function):
    """The composition: tails scattered behind their prefixes, bmm, softmax, bmm, gathered; weights are stored.

    Gradients are those by the tail alone; `bias` [R, 1, S, P + S] is made before, and `keys` and `values`
    [R, groups, P + S, size] have room for the tails, as memory that every pass overwrites.
    """

    @staticmethod
    def forward(ctx, query, key, value, row, place, keys, values, bias, scale):
        (rows, groups, width, size), tail, heads = keys.shape, bias.shape[2], query.shape[1]
        slot = place + width - tail
        keys[row, :, slot], values[row, :, slot] = key, value
        laid = query.new_zeros(rows, heads, tail, size)
        laid[row, :, place] = query
        laid = laid.view(rows * groups, -1, size)
        scores = torch.bmm(laid, keys.flatten(0, 1).mT).float().mul_(scale)
        scores.view(rows, heads, tail, -1).add_(bias)
        weights = torch.softmax(scores, -1).to(query.dtype)
        ctx.save_for_backward(laid, weights, row, place, keys, values)
        ctx.scale, ctx.shape = scale, (rows, heads, groups, tail)
        return torch.bmm(weights, values.flatten(0, 1)).view(rows, heads, tail, -1)[row, :, place]

    @staticmethod
    def backward(ctx, grad):
        laid, weights, row, place, keys, values = ctx.saved_tensors
        rows, heads, groups, tail = ctx.shape
        out = grad.new_zeros(rows, heads, tail, grad.shape[2])
        out[row, :, place] = grad
        out = out.view(laid.shape)
        slopes = torch.bmm(out, values.flatten(0, 1).mT)
        slopes = torch._softmax_backward_data(slopes.float(), weights.float(), -1, torch.float32)
        slopes = slopes.mul_(ctx.scale).to(grad.dtype)
        of_query = torch.bmm(slopes, keys.flatten(0, 1)).view(rows, heads, tail, -1)[row, :, place]
        of_key = torch.bmm(slopes[..., -tail:].mT, laid).view(rows, groups, tail, -1)[row, :, place]
        of_value = torch.bmm(weights[..., -tail:].mT, out).view(rows, groups, tail, -1)[row, :, place]
        return of_query, of_key, of_value, *(None,) * 6


def _tails(case: Case, device: str, backend: str | None) -> Problem:
    """Lengths of prefixes from a quarter of the longest, of tails from two tokens, as requests have them."""
    rows, prefix, tail, heads, groups, size = (
        case.sizes[name] for name in ("rows", "prefix", "tail", "heads", "groups", "size")
    )
    dtype, scale = getattr(torch, case.dtype), size**-0.5
    tails = torch.randint(2, tail + 1, (rows,))
    lengths = torch.randint(prefix // 4, prefix + 1, (rows,))
    tails[0], lengths[0] = tail, prefix
    starts = F.pad(tails.cumsum(0), (1, 0)).to(device)
    tokens, pairs = int(tails.sum()), int((tails * lengths + tails * (tails + 1) // 2).sum())
    query, grad = (torch.randn(tokens, heads, size, device=device).to(dtype) for _ in range(2))
    key, value = (torch.randn(tokens, groups, size, device=device).to(dtype) for _ in range(2))
    stored = [torch.randn(rows, groups, prefix, size, device=device).to(dtype) for _ in range(2)]
    spans = torch.stack([prefix - lengths, torch.full_like(lengths, prefix)], 1).to(device)
    options = {"prefix_keys": stored[0], "prefix_values": stored[1], "spans": spans} if prefix else {}
    leaves = [part.requires_grad_() for part in (query, key, value)]

    # Rows of one length, for the baselines: what they read is laid out before the clock starts.
    offsets, places = torch.arange(tail), torch.arange(prefix)
    inside = offsets < tails[:, None]
    at = torch.cat([(places - prefix).expand(rows, -1), offsets.expand(rows, -1)], 1)  # [R, P + S]
    is_key = torch.cat([places >= (prefix - lengths)[:, None], inside], 1)
    visible = (is_key[:, None] & (offsets[:, None] >= at[:, None]))[:, None].to(device)
    row, place = (index.to(device) for index in torch.nonzero(inside, as_tuple=True))
    bias = torch.zeros(visible.shape, device=device).masked_fill_(~visible, torch.finfo(torch.float32).min)
    room = [F.pad(part, (0, 0, 0, tail)) for part in stored]
    padded = []
    for part in (query, key, value, grad):
        laid = torch.zeros(rows, part.shape[1], tail, size, dtype=dtype, device=device)
        laid[row, :, place] = part.detach()
        padded.append(laid)
    *padded_leaves, padded_grad = (part.requires_grad_(i < 3) for i, part in enumerate(padded))

    def ours():
        out = kedit_fast.tail_attention(*leaves, starts, tail, scale=scale, **options, backend=backend)
        return out, *torch.autograd.grad(out, leaves, grad)

    def composition():
        out = _LaidOut.apply(*leaves, row, place, *room, bias, scale)
        return torch.autograd.grad(out, leaves, grad)

    def attend(q, k, v):
        k, v = torch.cat([stored[0], k], 2), torch.cat([stored[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)

    compiled = torch.compile(attend)

    def library(function):
        return torch.autograd.grad(function(*padded_leaves), padded_leaves, padded_grad)

    def error() -> float:
        wide = [part.detach().double().requires_grad_() for part in leaves]
        more = {name: part.double() if name != "spans" else part for name, part in options.items()}
        out = kedit_fast.tail_attention(*wide, starts, tail, scale=scale, **more, backend="torch")
        expected = (out, *torch.autograd.grad(out, wide, grad.double()))
        pairs = zip(ours(), expected, strict=True)
        return max(
            float((result.detach().double() - right.detach()).norm() / right.detach().norm()) for result, right in pairs
        )

    text = "F.scaled_dot_product_attention(padded rows, mask)"
    return Problem(
        ours=ours,
        baselines={
            "scatter; softmax(bmm(q, k) + bias); bmm(p, v); gather, gradients by hand": composition,
            text: lambda: library(attend),
            f"torch.compile({text})": lambda: library(compiled),
        },
        error=error, limit=2e-6 if dtype == torch.float32 else 1e-2, flops=14 * size * heads * pairs,
        bytes=4 * (query.nbytes + key.nbytes + value.nbytes) + 2 * sum(part.nbytes for part in stored),
        rate="fp32" if dtype == torch.float32 else "bf16", backend=_runs("tail_attention", query, backend=backend),
    )  # fmt: skip


def _runs(op: str, *args: Any, backend: str | None) -> str:
    return kedit_fast.explain(op, *args, backend=backend).runs.split()[0]


_BUILDERS = {
    "symmetric_rank_k_update_": _symmetric,
    "rank_k_update_": _rank_k,
    "grouped_symmetric_rank_k_update_": _grouped_symmetric,
    "grouped_rank_k_update_": _grouped_rank_k,
    "target_log_probs": _head,
    "distribution_kl": _head,
    "spd_solve": _solve,
    "rms_norm": _by_rows,
    "gated_silu": _by_rows,
    "gated_gelu": _by_rows,
    "masked_descent_": _descent,
    "masked_adam_": _adam,
    "activation_distance": _memories,
    "routed_linear": _memories,
    "nearest_key": _nearest,
    "best_overlap": _overlap,
    "magnitude_bound": _bound,
    "ties_merge_": _ties,
    "tail_attention": _tails,
}
