"""Triton kernels against float64: on a GPU where there is one, else under the interpreter (see conftest.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from floors import HEAD, HEAD_GRADIENT, RANK_K, SYMMETRIC, relative_error

import kedit_fast
from kedit_fast import distribution_kl, rank_k_update_, symmetric_rank_k_update_, target_log_probs
from kedit_fast.backends import probe
from kedit_fast.errors import BackendUnavailableError

triton = pytest.importorskip("triton")
tl = triton.language
from kedit_fast.kernels.triton import configs  # noqa: E402
from kedit_fast.kernels.triton import lm_head as head_kernels  # noqa: E402
from kedit_fast.kernels.triton import symmetric_rank_k_update as symmetric_kernel  # noqa: E402

_lower_tile = symmetric_kernel._lower_tile
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.skipif(bool(probe("triton").reason), reason=f"triton: {probe('triton').reason}"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton.*"),  # the interpreter's -inf minus -inf
]


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ("plain", "masked", "weighted", "transposed"))
@pytest.mark.parametrize("acc_dtype", (torch.float32, torch.float64), ids=str)
def test_the_symmetric_update_adds_the_lower_triangle(dtype, mode, acc_dtype):
    for n, d in ((1, 1), (7, 63), (129, 100), (600, 33)):
        x = torch.randn(d, n).to(dtype).T if mode == "transposed" else torch.randn(n, d + 5)[:, :d].to(dtype)
        weights = torch.rand(n, dtype=torch.float64) + 0.1 if mode == "weighted" else None
        mask = torch.rand(n) > 0.4 if mode in ("masked", "weighted") else None
        rows = x.double().clone()
        if mask is not None:
            rows[~mask] = 0
            x = x.clone()
            x[~mask] = float("nan")  # rows left out may hold anything
        scale = torch.ones(n, dtype=torch.float64) if weights is None else weights
        start = torch.randn(d, d, dtype=acc_dtype).tril()
        expected = start.double() + 0.3 * torch.tril((rows * scale[:, None]).T @ rows)
        border = torch.full((d + 2, d + 6), 7.0, dtype=acc_dtype).to(DEVICE)
        acc = border[1 : 1 + d, 2 : 2 + d]
        acc.copy_(start + torch.triu(torch.full((d, d), float("nan"), dtype=acc_dtype), 1))
        symmetric_rank_k_update_(acc, *on_device(x, weights, mask), 0.3, backend="triton")
        upper = torch.triu(torch.ones(d, d, dtype=torch.bool, device=DEVICE), 1)
        assert bool(torch.isnan(acc[upper]).all()), "upper triangle was written"
        outside = torch.ones_like(border, dtype=torch.bool)
        outside[1 : 1 + d, 2 : 2 + d] = False
        assert bool((border[outside] == 7.0).all()), "memory beside acc was written"
        plain = start.clone()
        symmetric_rank_k_update_(plain, x, weights, mask, 0.3, backend="torch")
        limit = max(SYMMETRIC[dtype], 2 * relative_error(plain, expected))
        assert relative_error(torch.tril(acc.nan_to_num(0.0)).cpu(), expected) <= limit


def test_rows_beyond_one_fp32_sum_and_no_rows_at_all(monkeypatch):
    monkeypatch.setattr(symmetric_kernel, "SUMMED_ROWS", 320)  # deeper than one sum of the matrix unit
    x, weights, mask = torch.randn(700, 40), torch.rand(700), torch.rand(700) > 0.5
    acc = torch.zeros(40, 40, device=DEVICE)
    symmetric_rank_k_update_(acc, *on_device(x, weights, mask), backend="triton")
    rows = x.double() * mask[:, None]
    expected = torch.tril((rows * weights.double()[:, None]).T @ rows)
    assert relative_error(acc.cpu(), expected) < SYMMETRIC[torch.float32]
    before = acc.clone()
    symmetric_rank_k_update_(acc, x[:0].to(DEVICE), backend="triton")
    symmetric_rank_k_update_(acc, x.to(DEVICE), mask=torch.zeros(700, dtype=torch.bool, device=DEVICE),
                             backend="triton")  # fmt: skip
    assert torch.equal(acc, before)


@triton.jit
def _visit(counts, tiles, GROUP: tl.constexpr):
    row, column = _lower_tile(tl.program_id(0), tiles, GROUP)
    tl.atomic_add(counts + row * tiles + column, 1)


def test_lower_tiles_are_each_visited_once():
    for tiles in (1, 2, 9, 17):
        for group in (1, 2, 8):
            counts = torch.zeros(tiles, tiles, dtype=torch.int32, device=DEVICE)
            _visit[(tiles * (tiles + 1) // 2,)](counts, tiles, group)
            assert torch.equal(counts.cpu(), torch.ones(tiles, tiles, dtype=torch.int32).tril()), (tiles, group)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", (1, 7, 16, 17, 70))
def test_the_rank_k_update_adds_the_product(dtype, k):
    for out, inner in ((1, 1), (7, 63), (40, 129)):
        layouts = (
            torch.randn(out, inner).to(dtype), torch.randn(inner, out).to(dtype).T,
            torch.randn(out + 3, inner + 5).to(dtype)[1 : out + 1, 2 : inner + 2],
            torch.randn(2 * out, 3 * inner).to(dtype)[::2, ::3],
        )  # fmt: skip
        for weight in layouts:
            left, right = torch.randn(out, k) / 4, torch.randn(k, inner).T.bfloat16() / 4
            expected = weight.double() - 0.5 * left.double() @ right.double().T
            plain = rank_k_update_(weight.clone(), left, right, -0.5, backend="torch")
            copy = torch.full_like(weight, float("nan"), dtype=torch.bfloat16) if dtype == torch.float32 else None
            weight, left, right, copy = on_device(weight, left, right, copy)
            rank_k_update_(weight, left, right, -0.5, copy, backend="triton")
            limit = max(RANK_K[dtype], 2 * relative_error(plain, expected))
            assert relative_error(weight.cpu(), expected) <= limit
            if copy is not None:
                assert torch.equal(copy, weight.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cap", (0.0, 2.0))
@pytest.mark.parametrize("with_bias", (False, True))
def test_the_head_ops_and_their_gradients_are_right(dtype, cap, with_bias):
    for rows, width, vocabulary in ((1, 1, 1), (19, 40, 150)):
        hidden, other, head = (
            torch.randn(rows, width + 3).to(dtype)[:, :width], torch.randn(rows, width).to(dtype),
            (torch.randn(width, vocabulary).to(dtype) / 4).T,
        )  # fmt: skip
        bias = torch.randn(vocabulary) if with_bias else None
        targets = torch.randint(0, vocabulary, (rows,))

        def results(tensors, backend):
            hidden, other, head, bias, targets = tensors
            hidden = hidden.clone().requires_grad_()
            found = target_log_probs(hidden, head, targets, bias, cap, True, backend=backend)
            kl, reverse = (
                distribution_kl(hidden, other, head, bias, cap, reverse=flag, backend=backend) for flag in (False, True)
            )
            scale = torch.linspace(0.5, 2, len(hidden), device=hidden.device)
            gradients = [torch.autograd.grad((v * scale).sum(), hidden)[0] for v in (found.log_prob, kl, reverse)]
            values = (found.log_prob, found.top1_log_prob, kl, reverse)
            return [v.detach().cpu() for v in (*values, *gradients)], found.top1.cpu()

        given = (hidden, other, head, bias, targets)
        wide = [t if t is None or t.dtype == torch.int64 else t.double() for t in given]
        expected, expected_top1 = results(wide, "torch")
        plain, _ = results(given, "torch")
        found, top1 = results(on_device(*given), "triton")
        assert torch.equal(top1, expected_top1)
        for index, (mine, theirs, right) in enumerate(zip(found, plain, expected, strict=True)):
            floor = (HEAD_GRADIENT if index > 3 else HEAD)[dtype]
            scale = right.norm().clamp(min=1.0)  # an answer near zero is judged by its absolute error
            error, reference = (float((v.double() - right).norm() / scale) for v in (mine, theirs))
            assert error <= max(floor, 2 * reference), (index, error, reference)


def test_states_without_rows_and_tokens_that_cannot_be():
    hidden, head = torch.randn(4, 20, device=DEVICE), torch.randn(50, 20, device=DEVICE)
    none = target_log_probs(hidden[:0], head, torch.empty(0, dtype=torch.int64, device=DEVICE), backend="triton")
    assert none.log_prob.shape == (0,) and distribution_kl(hidden[:0], hidden[:0], head, backend="triton").shape == (0,)
    bias = torch.randn(50, device=DEVICE)
    bias[:40] = -torch.inf  # whole tiles of tokens that have no probability
    targets = torch.tensor([41, 42, 3, 49], device=DEVICE)
    found = target_log_probs(hidden, head, targets, bias, return_top1=True, backend="triton")
    expected = torch.log_softmax(hidden @ head.T + bias, -1)
    torch.testing.assert_close(found.log_prob, expected.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.top1, expected.argmax(-1))
    hidden[2, 5] = float("nan")
    for cap in (0.0, 30.0):
        for value in (
            target_log_probs(hidden, head, targets, softcap=cap, backend="triton").log_prob,
            distribution_kl(hidden, torch.zeros_like(hidden), head, softcap=cap, backend="triton"),
            distribution_kl(torch.zeros_like(hidden), hidden, head, softcap=cap, backend="triton"),
        ):
            assert torch.isnan(value[2]) and bool(torch.isfinite(value[[0, 1, 3]]).all())


def test_logits_that_lie_far_apart_do_not_cost_the_kl_its_accuracy():
    """The two distributions differ little, their logits by a thousand."""
    hidden, head = torch.randn(6, 16), torch.randn(300, 16) / 4
    head[:, 0] = 1.0  # the same for every token: it moves all logits and no probability
    other = hidden + 1e-2 * torch.randn(6, 16)
    other[:, 0] += 1000
    for reverse in (False, True):
        expected = distribution_kl(hidden.double(), other.double(), head.double(), reverse=reverse, backend="torch")
        value = distribution_kl(*on_device(hidden, other, head), reverse=reverse, backend="triton")
        # the sum of a logit is rounded to 1000 * 2^-24 six times
        assert float((value.cpu().double() - expected).abs().max()) < 1e-4


def test_large_vocabularies_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(head_kernels, "D_LOGITS_BYTES", 0)
    hidden = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    head, targets = torch.randn(2100, 16, device=DEVICE), torch.tensor([0, 1024, 2099], device=DEVICE)
    gradients = {}
    for backend in ("torch", "triton"):
        log_prob = target_log_probs(hidden, head, targets, backend=backend).log_prob.sum()
        (gradients[backend],) = torch.autograd.grad(log_prob, hidden)
    torch.testing.assert_close(gradients["triton"], gradients["torch"], rtol=1e-5, atol=1e-5)


def far_apart(rows, columns, dtype=torch.float32):
    """A matrix whose last row begins 2^31 elements after its first; on a CPU only the pages in use take memory."""
    stride = 2**31 // (rows - 1)
    if DEVICE == "cuda":  # where all of it takes memory
        needed, free = (2**31 + columns) * dtype.itemsize + (1 << 30), torch.cuda.mem_get_info()[0]
        if free < needed:
            pytest.skip(
                f"offsets past 32 bits take {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free"
            )
    storage = torch.empty(stride * (rows - 1) + columns, dtype=dtype, device=DEVICE)
    matrix = storage.as_strided((rows, columns), (stride, 1))
    return matrix.copy_(torch.randn(rows, columns))


def test_offsets_of_more_than_32_bits():
    x, acc = far_apart(3, 5, torch.bfloat16), far_apart(5, 5)
    expected = acc.double() + torch.tril(x.double().T @ x.double())
    symmetric_rank_k_update_(acc, x, backend="triton")
    assert relative_error(acc, expected) < 1e-6
    del acc
    weight, factor = far_apart(3, 5, torch.bfloat16), torch.randn(20, 3, device=DEVICE).T
    for left in (factor[:, :2], factor):
        right = torch.randn(5, left.shape[1], device=DEVICE)
        expected = weight.double() + left.double() @ right.double().T
        rank_k_update_(weight, left, right, backend="triton")
        assert relative_error(weight, expected) < RANK_K[torch.bfloat16]
    head, hidden = far_apart(5, 3, torch.bfloat16).T, torch.randn(2, 5, device=DEVICE).bfloat16()
    found = target_log_probs(hidden, head, torch.tensor([0, 2], device=DEVICE), backend="triton").log_prob
    expected = torch.log_softmax(hidden.double() @ head.double().T, -1)
    torch.testing.assert_close(found.double(), expected[[0, 1], [0, 2]], rtol=1e-5, atol=1e-5)


def test_what_triton_does_not_take_is_said():
    wide = torch.zeros(3, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(BackendUnavailableError, match="float64 rows"):
        symmetric_rank_k_update_(wide, wide.clone(), backend="triton")
    with pytest.raises(BackendUnavailableError, match="float64 tensors"):
        rank_k_update_(wide, wide[:, :1].clone(), wide[:, :1].clone(), backend="triton")
    with pytest.raises(BackendUnavailableError, match="float64 states"):
        distribution_kl(wide, wide, wide, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is not in use")
def test_the_interpreter_runs_only_when_asked_for():
    x = torch.zeros(2, 2)
    assert not kedit_fast.explain("symmetric_rank_k_update_", x, x).runs.startswith("triton")
    assert "only when asked" in kedit_fast.explain("symmetric_rank_k_update_", x, x).reasons["triton"]
    assert kedit_fast.explain("symmetric_rank_k_update_", x, x, backend="triton").runs.startswith("triton")


def layouts(dtype):
    """Matrices [32, 64] or near it, each with whether all of it is loaded 16 bytes at a time."""
    yield torch.zeros(32, 64, dtype=dtype), True
    yield torch.zeros(64, 80, dtype=dtype)[::2, :64], True
    yield torch.zeros(32, 63, dtype=dtype), False
    yield torch.zeros(32, 65, dtype=dtype)[:, :64], False
    yield torch.zeros(32, 64, dtype=dtype)[:, :63], False
    yield torch.zeros(64, 32, dtype=dtype).T, False
    yield torch.zeros(32, 65, dtype=dtype).reshape(-1)[1:2049].view(32, 64), False  # not at a 16-byte boundary


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_layout_has_a_tile_and_narrow_loads_have_their_own(dtype):
    half = dtype != torch.float32
    for x, wide in layouts(dtype):
        for acc_dtype in (torch.float32, torch.float64):
            acc = torch.zeros(x.shape[1], x.shape[1], dtype=acc_dtype)
            kind = symmetric_kernel.shape_class(acc, x, None)
            split = "split" if wide else "split_narrow"
            native = "native" if acc_dtype == torch.float32 else "native64"
            assert kind == (split if not half else native if wide else "narrow")
            assert symmetric_kernel.shape_class(acc, x, torch.ones(len(x))) == split
            for name in (kind, split):
                assert all(configs.lookup(configs.SYMMETRIC, name, arch) for arch in ("sm_80", "sm_90", "sm_121"))
        for kind in (head_kernels.shape_class(torch.zeros(2, 64, dtype=dtype), x),
                     head_kernels.shape_class(x, torch.zeros(2, 64, dtype=dtype))):  # fmt: skip
            assert kind == ("native" if half else "split") + ("" if wide else "_narrow")
            for name in (kind, f"pair_{kind}"):
                assert all(configs.lookup(configs.LOGITS, name, arch) for arch in ("sm_80", "sm_90", "sm_121"))
        kind = head_kernels.gradient_class(torch.zeros(2, 32), x)
        assert kind == ("native" if dtype == torch.bfloat16 else "split" if wide else "split_narrow")
        assert configs.lookup(configs.GRADIENT, kind, "sm_90")
    odd = head_kernels.gradient_class(torch.zeros(2, 33), torch.zeros(33, 64, dtype=dtype))
    assert odd == ("native" if dtype == torch.bfloat16 else "split_narrow")


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")
def test_the_committed_table_has_odd_sizes_and_strides_and_no_spill_where_that_is_said():
    """sm_80 and sm_90 never spill; the newer ones at most what the page of the kernels says."""
    from benchmarks import aot

    rows = json.loads((ROOT / "benchmarks" / "results" / "kernel_resources.json").read_text(encoding="utf-8"))["rows"]
    assert not aot.faults(rows)
    assert not [row for row in rows if row["spill_bytes"] and row["architecture"] in ("sm_80", "sm_90")]
    most = max(row["spill_bytes"] for row in rows)
    assert f"at most {most} bytes" in (ROOT / "kedit_fast" / "kernels" / "README.md").read_text(encoding="utf-8")
    cases = {(row["op"], row["case"], row["architecture"]) for row in rows}
    for architecture in ("sm_80", "sm_90", "sm_100", "sm_120"):
        for k in (1, 5, 16, 17, 64, 100):
            assert ("rank_k_update_", f"bfloat16 weight, k {k}", architecture) in cases
        for k in (1, 17, 100):
            assert ("rank_k_update_", f"bfloat16 weight, k {k}, odd strides", architecture) in cases
        for acc in ("float32 acc", "float64 acc"):
            for rest in ("", ", mask", ", odd strides", ", mask, odd strides", ", transposed"):
                assert ("symmetric_rank_k_update_", f"bfloat16 rows, {acc}{rest}", architecture) in cases
        for op in ("target_log_probs", "target_log_probs, gradient", "distribution_kl", "distribution_kl, gradient"):
            for rest in ("", ", odd strides", ", odd vocabulary", ", bias, soft-cap, odd strides"):
                assert (op, f"bfloat16{rest}", architecture) in cases
    # A table of another set of variants, or of other tiles, is not this one.
    expected = {(variant.op, variant.case) for variant in aot.variants()}
    assert expected == {(row["op"], row["case"]) for row in rows if row["tile"]}


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")
def test_a_spill_or_too_much_shared_memory_is_a_fault():
    from benchmarks import aot

    row = {"op": "o", "case": "c", "kernel": "k", "architecture": "sm_80", "spill_bytes": 0, "shared_bytes": 99 * 1024}
    assert not aot.faults([row, {**row, "architecture": "sm_120", "spill_bytes": 64}])
    for wrong in ({"spill_bytes": 8}, {"shared_bytes": 99 * 1024 + 1}, {"architecture": "sm_90", "spill_bytes": 8},
                  {"architecture": "sm_100", "spill_bytes": 72}):  # fmt: skip
        assert len(aot.faults([{**row, **wrong}])) == 1


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")
def test_kernels_compile_ahead_of_time_without_spills(tmp_path):
    """A few variants for sm_80 and sm_90; the committed table holds them all (python -m benchmarks.aot makes it)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "rows.json"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); sys.argv = ['aot', '--quick',"
               f" '--json', {str(out)!r}]; from benchmarks import aot; aot.typer.run(aot.main)"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    keys = ("op", "case", "kernel", "architecture", "tile", "warps", "stages")
    committed = json.loads((ROOT / "benchmarks" / "results" / "kernel_resources.json").read_text(encoding="utf-8"))
    found = json.loads(out.read_text(encoding="utf-8"))
    if found["triton"] == committed["triton"]:
        keys += ("registers", "shared_bytes")
    known = {json.dumps([row[key] for key in keys]) for row in committed["rows"]}
    for row in found["rows"]:
        assert json.dumps([row[key] for key in keys]) in known, "run python -m benchmarks.aot --json again"
    assert {row["architecture"] for row in found["rows"]} == {"sm_80", "sm_90"} and len(found["rows"]) >= 16
