"""Committed results are those of commits, and the writers keep it so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="no source tree")


def commits(found):
    """Every "commit" in a document, however deep."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from [value] if key == "commit" else commits(value)
    elif isinstance(found, list):
        for value in found:
            yield from commits(value)


def test_no_committed_result_is_of_a_changed_tree():
    files = sorted(RESULTS.rglob("*.json"))
    assert files
    for path in files:
        named = list(commits(json.loads(path.read_text(encoding="utf-8"))))
        assert named or path.name == "kernel_resources.json", path.name
        for commit in named:
            assert len(commit) >= 7 and not set(commit) - set("0123456789abcdef"), (path.name, commit)
    for path in RESULTS.rglob("*.svg"):
        assert "-dirty" not in path.read_text(encoding="utf-8"), path.name


def test_every_row_and_every_curve_says_its_commit():
    for path in RESULTS.glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        if path.name != "kernel_resources.json":
            assert all(row.get("commit") for row in document["rows"]), path.name
        if document.get("batches") or document.get("sequence"):
            assert document["about"]["commit"]


@pytest.mark.parametrize("commit", ("abc1234-dirty", ""))
@pytest.mark.parametrize(
    "name", ("run", "values", "solver", "second_moments", "quality", "harm", "gpu", "untuned", "architectures")
)
def test_a_result_of_a_changed_tree_is_refused_before_anything_is_measured(name, commit, monkeypatch, tmp_path):
    import importlib

    from benchmarks import harness

    module = importlib.import_module(f"benchmarks.{name}")
    about = {"machine": "m", "versions": {"torch": "2"}, "commit": commit}
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "provenance", lambda device: about)
    for measure in ("measured_peaks", "subject", "batch_rows", "memit_rows", "Bench", "demo", "in_child"):
        if hasattr(module, measure):
            monkeypatch.setattr(module, measure, lambda *a, **k: pytest.fail("it measured"))
    target = tmp_path / "results" / ("sub" if name == "gpu" else "new.json")
    arguments = ["--out", str(target), "--dry-run"] if name == "gpu" else ["--json", str(target)]
    if name == "untuned":
        arguments = ["compare", "--models", str(tmp_path), *arguments]
    done = CliRunner().invoke(module.app, arguments)
    assert done.exit_code != 0 and "commit first, or write elsewhere" in str(done.exception), done.output
    assert (commit or "none") in str(done.exception) and not target.exists()
    harness.require_clean(tmp_path / "elsewhere.json", about)  # where it is marked by its commit
    harness.require_clean(target, about | {"commit": "abc1234"})
    harness.require_clean(None, about)


def test_no_numbers_and_suggest_are_as_near_to_the_best_of_the_grid_as_the_page_says():
    from benchmarks import untuned

    rows = json.loads((RESULTS / "untuned.json").read_text(encoding="utf-8"))["rows"]
    places = {(row["model"], row["method"], row["source"]) for row in rows}
    assert places == {(n, m, s) for n in untuned.SEEDS for m in untuned.METHODS for s in untuned.SOURCES}
    missed = {(row["model"], row["method"], row["source"]): untuned.misses(row, rows) for row in rows}
    assert {place: metrics for place, metrics in missed.items() if metrics} == {
        ("gpt2", "alphaedit", "suggest"): ["paraphrase", "neighborhood"],
    }


def test_a_tree_is_changed_by_code_not_by_results_and_documents(tmp_path):
    from benchmarks.harness import commit_of

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True,
                       capture_output=True)  # fmt: skip

    files = {name: tmp_path / name for name in ("benchmarks/results/a.json", "README.md", "kedit_fast/op.py")}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    assert commit_of(tmp_path) == ""
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    clean = commit_of(tmp_path)
    assert len(clean) >= 7 and "dirty" not in clean
    files["benchmarks/results/a.json"].write_text("2")
    files["README.md"].write_text("2")
    assert commit_of(tmp_path) == clean
    files["kedit_fast/op.py"].write_text("2")
    assert commit_of(tmp_path) == f"{clean}-dirty"


def test_the_document_of_the_gpu_says_what_ran_and_what_did_not():
    """Stages without errors, right results alone, and every row with where it comes from."""
    document = json.loads((RESULTS / "h200.json").read_text(encoding="utf-8"))
    assert all(stage["error"] is None and stage["commit"] for stage in document["stages"].values())
    assert {"test", "peaks", "ops", "statistics", "values", "sequential"} <= set(document["stages"])
    for row in document["rows"]:
        assert row["machine"] == "NVIDIA H200" and row["versions"]["torch"] and row["recorded_commit"]
        assert 0 <= row["error"] <= row["error_limit"] and row["ratio"] > 0
    results = {figure["what"]: figure["result"] for figure in document["figures"] if figure["stage"] == "test"}
    assert not any("did not end" in result for result in results.values())
    assert "182 passed" in next(result for name, result in results.items() if "tests/editing/test_values.py" in name)
    for skipped in (figure["what"] for figure in document["figures"] if "skipped" in figure and "result" not in figure):
        assert not any(skipped == row["case"] for row in document["rows"])
    assert "stage tune" in document["about"]["not_measured"]


def test_the_routing_of_the_head_ops_rests_on_committed_rows():
    """The kernels, as first measured, took longer than torch's products take for each case."""
    before, after = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        for name in ("h200_head_kernels", "h200")
    )
    assert {row["backend"] for row in before} == {"triton"}
    products = {(row["op"], row["case"]): row for row in after if row["backend"] == "torch"}
    for row in before:
        assert row["median_s"] > products[row["op"], row["case"]]["median_s"]


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    from benchmarks import page

    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert page.replaced(text) == text, "run: python -m benchmarks.page benchmarks/README.md"
    assert all(f"<!-- table: {name} -->" in text for name in page.TABLES)
