from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kedit_fast
from kedit_fast.errors import BackendUnavailableError, KeditError
from kedit_fast.kernels import native


def test_backends_are_listed_with_a_detail_or_a_reason():
    rows = {row.name: row for row in kedit_fast.backends()}
    assert set(rows) == {"cuda", "triton", "cpu", "torch"}
    assert rows["torch"].available and all(row.detail for row in rows.values())


def test_an_explicit_backend_never_falls_back():
    weight, left, right = torch.zeros(2, 3), torch.ones(2, 1), torch.ones(3, 1)
    if native.probe_cuda().reason:
        with pytest.raises(BackendUnavailableError, match="cuda"):
            kedit_fast.rank_k_update_(weight, left, right, backend="cuda")
        with pytest.raises(BackendUnavailableError), kedit_fast.use_backend("cuda"):
            pass
    with pytest.raises(BackendUnavailableError, match=r"no triton implementation|cannot run"):
        kedit_fast.spd_solve(torch.eye(2), torch.eye(2), backend="triton")
    with pytest.raises(BackendUnavailableError, match="unknown backend 'gpu'"):
        kedit_fast.rank_k_update_(weight, left, right, backend="gpu")
    assert torch.equal(weight, torch.zeros(2, 3))


def test_argument_beats_context_beats_environment(monkeypatch):
    weight, left, right = torch.zeros(2, 3), torch.ones(2, 1), torch.ones(3, 1)
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "torch")
    assert kedit_fast.explain("rank_k_update_", weight, left, right).runs.startswith("torch")
    if not native.probe_cpu().reason:
        with kedit_fast.use_backend("cpu"):
            assert kedit_fast.explain("rank_k_update_", weight, left, right).runs.startswith("cpu")
            with kedit_fast.use_backend("torch"):
                assert kedit_fast.explain("rank_k_update_", weight, left, right).runs.startswith("torch")
        assert kedit_fast.explain("rank_k_update_", weight, left, right, backend="cpu").runs.startswith("cpu")
    monkeypatch.setenv("KEDIT_FAST_BACKEND", "nonsense")
    with pytest.raises(BackendUnavailableError, match="nonsense"):
        kedit_fast.rank_k_update_(weight, left, right)


def test_explain_gives_a_reason_for_every_other_backend():
    found = kedit_fast.explain("rank_k_update_", torch.zeros(2, 3), torch.ones(2, 1), torch.ones(3, 1))
    assert set(found.reasons) | {found.runs.split()[0]} == {"cuda", "triton", "cpu", "torch"}
    assert all(found.reasons.values())
    with pytest.raises(KeditError, match="unknown op"):
        kedit_fast.explain("rank_two_update_")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,  # not the source tree: what is installed is tested
        env={**os.environ, **environment},
    )


def test_importing_the_package_loads_neither_transformers_nor_triton():
    code = "import sys, kedit_fast; sys.exit(any(m in sys.modules for m in ('transformers', 'triton')))"
    assert run_python(code).returncode == 0


def test_an_isa_forced_by_the_environment_is_used_or_named(cpu_module):
    code = "import kedit_fast; print(*kedit_fast.backends(), sep='\\n')"
    assert "generic" in run_python(code, KEDIT_FAST_ISA="generic").stdout
    wrong = run_python(code, KEDIT_FAST_ISA="sse9").stdout
    assert "KEDIT_FAST_ISA=sse9" in wrong and "generic, avx2, avx512 or amx" in wrong
    failing = run_python(
        "import torch, kedit_fast; kedit_fast.symmetric_rank_k_update_(torch.zeros(2, 2), torch.ones(1, 2))",
        KEDIT_FAST_ISA="sse9",
    )
    assert failing.returncode != 0 and "KEDIT_FAST_ISA=sse9" in failing.stderr


def test_autocast_and_lower_matmul_precision_do_not_reach_the_ops(backend):
    weight, left, right = torch.randn(64, 80), torch.randn(64, 16), torch.randn(80, 16)
    hidden, head, targets = torch.randn(5, 64), torch.randn(90, 64), torch.zeros(5, dtype=torch.int64)
    plain = kedit_fast.rank_k_update_(weight.clone(), left, right, backend=backend)
    log_prob = kedit_fast.target_log_probs(hidden, head, targets).log_prob
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = kedit_fast.rank_k_update_(weight.clone(), left, right, backend=backend)
            found_log_prob = kedit_fast.target_log_probs(hidden, head, targets).log_prob
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, plain) and torch.equal(found_log_prob, log_prob)


def test_autograd_sees_that_a_weight_was_written(backend):
    weight, x = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    y = (x @ weight.T).pow(2).sum()
    with torch.no_grad():
        kedit_fast.rank_k_update_(weight, torch.ones(4, 1), torch.ones(6, 1), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)
