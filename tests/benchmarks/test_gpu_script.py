"""benchmarks.gpu on the CPU over tiny shapes: every stage runs and writes rows of the suite's schema."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")


def gpu(*arguments):
    """The script in this process; it starts its stages."""
    from benchmarks.gpu import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class StageHere:
    """A stage run in this process, which has torch already, instead of in one of its own."""

    def __init__(self, command):
        self.status = gpu(*command[3:]).exit_code

    def wait(self, left):
        return self.status


def test_the_dry_run_runs_every_stage(tmp_path, monkeypatch):
    from benchmarks import gpu as script

    real, kernels = subprocess.Popen, script.FIRST_TESTS[:1]
    monkeypatch.setattr(script.subprocess, "Popen", lambda command, **how: (
        StageHere(command) if "benchmarks.gpu" in command else real(command, **how)))  # fmt: skip
    monkeypatch.setattr(script, "gpu_tests", lambda: kernels)  # the others are collected by whoever runs them
    done = gpu("--dry-run", "--out", tmp_path)
    assert done.exit_code == 0, done.output[-4000:]
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert list(document["stages"]) == ["build", "test", "peaks", "ops", "tune", "sequential", "statistics", "values"]
    assert all(stage["error"] is None for stage in document["stages"].values())
    fields = {"op", "case", "dtype", "backend", "isa", "baseline", "median_s", "baseline_median_s", "ratio", "error",
              "error_limit", "machine", "versions", "commit"}  # fmt: skip
    assert all(fields <= set(row) and 0 <= row["error"] <= row["error_limit"] for row in document["rows"])
    ops = {row["op"] for row in document["rows"]}
    assert {"rank_k_update_", "find_values", "collect_statistics", "KeyMemory"} <= ops
    shown = {figure["what"] for figure in document["figures"]}
    assert any("44" in str(figure) for figure in document["figures"]) and any("MEMIT edits" in what for what in shown)
    assert (tmp_path / "gpu_ratios.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stage_is_a_process_of_its_own(tmp_path):
    done = gpu("--dry-run", "--stage", "peaks", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["stages"]["peaks"]["error"] is None and document["peaks"]["fp32_flops_per_s"] > 0


def test_a_stage_that_fails_or_has_no_time_says_so(tmp_path):
    done = gpu("--dry-run", "--stage", "peaks", "--stage", "values", "--budget", 1, "--out", tmp_path)
    assert done.exit_code == 1
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["stages"]["values"]["error"] == "it did not end"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = gpu("--out", tmp_path)
    assert done.exit_code == 2 and "--dry-run" in done.output and not list(tmp_path.iterdir())
