"""benchmarks.gpu on the CPU over tiny shapes: every stage runs and writes rows of the suite's schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")


def gpu(*arguments):
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_the_dry_run_runs_every_stage(tmp_path):
    done = gpu("--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
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


def test_a_stage_that_fails_or_has_no_time_says_so(tmp_path):
    done = gpu("--dry-run", "--stage", "peaks", "--stage", "values", "--budget", 1, "--out", tmp_path)
    assert done.returncode == 1
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["stages"]["values"]["error"] == "it did not end"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = gpu("--out", tmp_path)
    assert done.returncode == 2 and "--dry-run" in done.stdout and not list(tmp_path.iterdir())
