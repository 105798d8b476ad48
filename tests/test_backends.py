from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kedit_fast
from kedit_fast.errors import BackendUnavailableError, KeditError
from kedit_fast.kernels import native, triton
from kedit_fast.ops import _lm_head

backends = sys.modules["kedit_fast.backends"]  # the package's own `backends` is a function


def test_backends_are_listed_with_a_detail_or_a_reason():
    rows = {row.name: row for row in kedit_fast.backends()}
    assert set(rows) == {"cuda", "triton", "cpu", "torch"}
    assert rows["torch"].available and all(row.detail for row in rows.values())


def test_an_explicit_backend_never_falls_back():
    weight, left, right = torch.zeros(2, 3), torch.ones(2, 1), torch.ones(3, 1)
    if native.cuda.probe().reason:
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
    if not native.cpu.probe().reason:
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
    assert "KEDIT_FAST_ISA=sse9" in wrong and "generic, avx2, avx512, amx or neon" in wrong
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


GPU_OPS = ("rank_k_update_", "symmetric_rank_k_update_", "target_log_probs", "distribution_kl")


def on_gpu(dtype=torch.bfloat16):
    """What `select` looks at of a tensor on a GPU."""
    return SimpleNamespace(
        device=torch.device("cuda", 0), dtype=dtype, layout=torch.strided, is_cuda=True, shape=(2, 2)
    )


@pytest.fixture
def forgetful(monkeypatch):
    """Nothing has been said yet."""
    monkeypatch.setattr(backends, "_declined", set())
    backends._automatic.cache_clear()
    yield
    backends._automatic.cache_clear()


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("op", GPU_OPS)
def test_the_reference_on_a_gpu_is_said_once_with_the_reason(op, forgetful, monkeypatch, caplog):
    for name in ("triton", "cuda"):
        reason = f"no {name} compiler here"
        monkeypatch.setitem(backends._probes, name, (lambda reason=reason: backends.Probe(reason), lambda: ""))
    monkeypatch.setattr(_lm_head, "has_wide_product", lambda states: False)  # as with torch before 2.8
    with caplog.at_level(logging.DEBUG, "kedit_fast"):
        for _ in range(3):
            assert backends.select(op, "auto", on_gpu(), on_gpu(), on_gpu()).backend == "torch"
    (message,) = warned(caplog)
    assert op in message and "cuda:0" in message and "no triton compiler here" in message
    assert ("no cuda compiler here" in message) == (op == "rank_k_update_")


def test_the_reference_is_not_warned_about_where_it_is_what_there_is(forgetful, caplog):
    """On a CPU, by name, for ops without a kernel for GPUs, and for float64, which no kernel takes."""
    plain = torch.zeros(2, 2)
    with caplog.at_level(logging.DEBUG, "kedit_fast"):
        kedit_fast.symmetric_rank_k_update_(torch.zeros(2, 2), plain, backend="torch")
        kedit_fast.target_log_probs(plain, plain, torch.zeros(2, dtype=torch.int64))
        for op in ("spd_solve", "top_features"):
            assert backends.select(op, "auto", on_gpu(torch.float32), on_gpu(torch.float32)).backend == "torch"
        backends.select("rank_k_update_", "torch", on_gpu(), on_gpu(), on_gpu())
    assert not warned(caplog)


@pytest.mark.parametrize("op", ("target_log_probs", "distribution_kl"))
def test_a_slower_kernel_is_passed_over_without_a_warning(op, forgetful, monkeypatch, caplog):
    ready = backends.Probe(), lambda: ""
    monkeypatch.setitem(backends._probes, "triton", (lambda: ready[0], ready[1]))
    monkeypatch.setattr(triton, "declines_device", lambda tensor: "")
    monkeypatch.setattr(_lm_head, "has_wide_product", lambda states: states.dtype == torch.bfloat16)
    for dtype, runs in ((torch.bfloat16, "torch"), (torch.float32, "torch"), (torch.float16, "triton")):
        states = on_gpu(dtype)
        states.is_floating_point = lambda: True
        assert backends.select(op, "auto", states, states, states).backend == runs
        assert backends.select(op, "triton", states, states, states).backend == "triton"
    assert not warned(caplog)


def test_float64_on_a_gpu_is_noted_without_a_warning(forgetful, monkeypatch, caplog):
    real = backends._refusal
    monkeypatch.setattr(backends, "_refusal", lambda op, name, *args: "float64 rows" if name == "triton" else real(
        op, name, *args))  # fmt: skip
    with caplog.at_level(logging.INFO, "kedit_fast"):
        backends.select("symmetric_rank_k_update_", "auto", on_gpu(torch.float64), on_gpu(torch.float64))
    assert not warned(caplog) and "float64 rows" in caplog.text  # at INFO: nothing to mend


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    (("80;90", (8, 0), True), ("80;90", (8, 6), True), ("80;90", (9, 0), True), ("80;90", (12, 0), True),
     ("80;90", (7, 5), False), ("90", (8, 0), False), ("90a", (9, 0), True), ("90a", (10, 0), False),
     ("90a", (8, 0), False), ("80;90a", (8, 6), True), ("80;90a", (10, 0), False), ("90a;80", (10, 0), True),
     ("120f", (12, 0), True), ("120f", (12, 1), True), ("120f", (10, 0), False), ("100f", (10, 3), True),
     ("100f", (12, 0), False), ("103f", (10, 0), False), ("103a", (10, 3), True), ("100;120a", (10, 3), True),
     ("90;120f", (13, 0), False), ("121", (12, 0), False)),
)  # fmt: skip
def test_architectures_with_a_letter_run_where_such_code_runs(built, capability, runs, monkeypatch):
    monkeypatch.setattr(native.cuda, "module", lambda: SimpleNamespace(architectures=lambda: built))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    native.cuda.lacks_code_for.cache_clear()
    try:
        reason = native.cuda.lacks_code_for(torch.device("cuda", 0))
    finally:
        native.cuda.lacks_code_for.cache_clear()
    assert (reason == "") == runs
    assert runs or (f"sm_{capability[0]}{capability[1]}" in reason and built.split(";")[-1] in reason)
