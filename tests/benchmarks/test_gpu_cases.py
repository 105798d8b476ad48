"""What the benchmarks ask of a GPU, looked at on a CPU: which tests run, on which shapes, against what."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")


@pytest.fixture
def place():
    from benchmarks import gpu

    made = gpu.Place("cuda", False, gpu.time.time() + 500)
    made.found = {}
    return made


def answering(monkeypatch, answer):
    """subprocess.run of the stage, answered by `answer(name of the test file)`: text or an exception."""
    from benchmarks import gpu

    calls = []

    def run(command, **given):
        calls.append((command, given))
        said = answer(next(part for part in command if part.startswith("tests/")))
        if isinstance(said, Exception):
            raise said
        return SimpleNamespace(returncode=0 if "failed" not in said else 1, stdout=said, stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda *args, **given: None)
    return calls


def test_the_test_stage_runs_every_file_that_uses_a_gpu_whole_and_the_kernels_first(place, monkeypatch):
    from benchmarks import gpu

    calls = answering(monkeypatch, lambda name: "SKIPPED [1] x: one GPU\n9 passed, 1 skipped in 1.0s")
    gpu.test(place)
    files = [next(part for part in command if part.startswith("tests/")) for command, _ in calls]
    assert gpu.gpu_tests()[:2] == ["tests/ops/test_gpu.py", "tests/ops/test_triton.py"]
    assert set(files) == set(gpu.gpu_tests()) >= {"tests/models/test_gpu_model.py", "tests/editing/test_values.py"}
    for path in (ROOT / "tests").rglob("test_*.py"):  # a file with tests that are skipped without a GPU
        if re.search(r"skipif\((not torch\.cuda|torch\.cuda\.device_count)", path.read_text(encoding="utf-8")):
            assert path.relative_to(ROOT).as_posix() in files
    assert len(set(files)) == len(files) and all((ROOT / name).exists() for name in files)
    for command, given in calls:
        assert not {"-k", "-m", "--deselect", "-x"} & set(command[3:]) and 0 < given["timeout"] <= 500
    shown = {figure["what"]: figure for figure in place.figures}
    assert shown["tests, tests/ops/test_triton.py"]["skipped"] == ["SKIPPED [1] x: one GPU"]


@pytest.mark.parametrize(
    ("said", "named"),
    (("1 failed, 8 passed in 1s", "1 failed"), ("SKIPPED [9] no compiler\n9 skipped in 1s", "no test could run here"),
     (subprocess.TimeoutExpired("pytest", 1), "did not end in time")),
)  # fmt: skip
def test_the_stage_fails_by_name_and_runs_the_other_files(place, monkeypatch, said, named):
    from benchmarks import gpu

    calls = answering(monkeypatch, lambda name: said if "test_triton" in name else "9 passed in 1.0s")
    with pytest.raises(RuntimeError, match=rf"(?s)tests/ops/test_triton.py.*{named}"):
        gpu.test(place)
    assert len(calls) == len(gpu.gpu_tests())


def test_files_that_have_no_time_are_a_failure_not_a_silence(place, monkeypatch):
    from benchmarks import gpu

    calls = answering(monkeypatch, lambda name: "9 passed in 1.0s")
    place.deadline = gpu.time.time() + 5
    with pytest.raises(RuntimeError, match=r"tests/ops/test_gpu.py: no time was left"):
        gpu.test(place)
    assert not calls


@pytest.mark.parametrize(("installed", "cores", "workers"), ((True, 16, "4"), (True, 2, "1"), (False, 16, None)))
def test_the_files_are_divided_among_the_cores_where_xdist_is_installed(place, monkeypatch, installed, cores, workers):
    from benchmarks import gpu

    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
    calls = answering(monkeypatch, lambda name: "9 passed in 1.0s")
    gpu.test(place)
    divided = {command[-3]: command[-1] for command, _ in calls if "-n" in command}
    assert divided == (dict.fromkeys(gpu.gpu_tests(), workers) if installed else {})
    assert len(calls) == len(gpu.gpu_tests())


def fake_mm(monkeypatch):
    """torch.mm with out_dtype, which a CPU does not have: 16-bit operands, fp32 sums."""
    real, seen = torch.mm, []

    def mm(left, right, out_dtype=None):
        seen.append((left.dtype, out_dtype))
        return real(left, right) if out_dtype is None else real(left.float(), right.float())

    monkeypatch.setattr(torch, "mm", mm)
    return seen


@pytest.mark.parametrize("op", ("target_log_probs", "distribution_kl"))
def test_the_head_ops_baseline_on_a_gpu_is_the_16_bit_product_and_computes_the_same(op, monkeypatch):
    import kedit_fast
    from benchmarks import problems
    from benchmarks.cases import Case

    monkeypatch.setattr(problems, "has_wide_product", lambda x: x.dtype == torch.bfloat16)
    seen = fake_mm(monkeypatch)
    case = Case(op, "tiny", "bfloat16", {"rows": 6, "width": 32, "vocabulary": 200})
    problem = problems.build(case, compiled=False)
    name, call = next(iter(problem.baselines.items()))
    assert "out_dtype=float32" in name and "bfloat16 mm for the gradient" in name and len(problem.baselines) == 2
    value, gradient = call()
    expected, slope = problem.ours()
    assert seen == [(torch.bfloat16, torch.float32)] * (2 if "kl" in op else 1) + [(torch.bfloat16, None)]
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert float((gradient.float() - slope.float()).norm() / slope.float().norm()) < 1e-2
    single = problems.build(Case(op, "tiny", "float32", case.sizes), compiled=False)
    assert not any("mm(" in name for name in single.baselines)  # fp32 states keep the fp32 expression
    assert kedit_fast.explain(op, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)).runs


def test_a_cpus_head_baseline_stays_the_expression():
    from benchmarks import problems
    from benchmarks.cases import Case

    case = Case("target_log_probs", "tiny", "bfloat16", {"rows": 3, "width": 8, "vocabulary": 20})
    assert not any("out_dtype" in name for name in problems.build(case).baselines)


def test_the_gpu_cases_hold_the_update_that_statistics_call_beside_the_others():
    from benchmarks.cases import GPU_OPS

    own = [case for case in GPU_OPS if case.op == "symmetric_rank_k_update_"]
    masked = {case.dtype: case for case in own if case.sizes.get("masked")}
    assert set(masked) == {"bfloat16", "float16", "float32"}
    for case in masked.values():
        assert case.sizes["rows"] == 4096 and case.sizes["wide_acc"] and "masked, float64 acc" in case.name
    assert masked["bfloat16"].sizes["d"] == 14336
    assert {(case.dtype, case.sizes["rows"]) for case in own if case not in masked.values()} >= {("bfloat16", 16384)}
    assert len({str(case) for case in GPU_OPS}) == len(GPU_OPS)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_masked_case_is_checked_on_its_real_rows_and_sees_a_kernel_that_counts_padding(dtype, monkeypatch):
    import kedit_fast
    from benchmarks import problems
    from benchmarks.cases import Case

    case = Case("symmetric_rank_k_update_", "t", dtype, {"rows": 200, "d": 33, "masked": 1, "wide_acc": 1})
    problem = problems.build(case, compiled=False)
    assert problem.error() <= problem.limit and all("y = x[mask]" in name for name in problem.baselines)
    assert problem.ours().dtype == torch.float64
    assert 0 < problem.flops < 200 * 33 * 34
    (baseline,) = problem.baselines.values()
    total = baseline()
    assert total.dtype == torch.float64
    torch.testing.assert_close(total.tril(), problem.ours().tril() / 2, rtol=1e-4, atol=1e-4)  # ours: called twice
    real = kedit_fast.symmetric_rank_k_update_
    monkeypatch.setattr(kedit_fast, "symmetric_rank_k_update_", lambda acc, x, mask=None, **k: real(acc, x, **k))
    assert problem.error() > problem.limit
