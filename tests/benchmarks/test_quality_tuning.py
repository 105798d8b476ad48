"""Quality rows of methods that tune a matrix or keep a memory: what is measured, what is left out, and the tables."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks import page, quality, quality_tuning
from benchmarks.harness import read
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.evaluation.metrics import mean_nll
from kedit_fast.methods.registry import RECIPES


@pytest.fixture
def small(monkeypatch, demo_model, demo_statistics):
    """A few requests, and little text."""
    for module in (quality, quality_tuning):
        monkeypatch.setattr(module, "SCENARIOS", {"1": (1, 1), "100": (4, None), "500": (4, None), "sequence": (4, 2)})
    monkeypatch.setattr(quality_tuning, "require_clean", lambda *_: None)
    model, tokenizer = demo_model
    requests = quality.demo.requests()[quality.VALIDATION :][:4]
    text = quality.demo.held_out([request.subject for request in requests], 5)
    on = quality.Subject(
        model, tokenizer, demo_statistics, requests, text, mean_nll(model, tokenizer, text), ValueFile(None), {}, {}
    )
    monkeypatch.setattr(quality_tuning, "subject", lambda validation: on)


def test_every_method_without_a_closed_form_has_a_row_and_stays_out_of_the_other_table():
    tuning = {name for name, recipe in RECIPES.items() if recipe.tuning is not None}
    assert tuning and tuning | set(quality_tuning.COMPARED) <= set(quality_tuning.ROWS)
    assert not tuning & set(quality.CLOSED_FORMS) and tuning | set(quality.CLOSED_FORMS) == set(RECIPES)


def test_rows_are_written_one_by_one_and_what_is_there_is_left_out(small, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"

    def run(methods, *more):
        arguments = ["--tuning", "--methods", methods, "--json", str(path), *more]
        done = CliRunner().invoke(quality.app, arguments)
        assert done.exit_code == 0, done.output
        return {(row["variant"], row["scenario"]): row for row in read(path)["rows"]}

    assert set(run("memit", "--scenarios", "sequence")) == {("memit", "sequence")}
    asked, measure = [], quality_tuning.measure
    monkeypatch.setattr(quality_tuning, "measure", lambda on, *row: asked.append(row) or measure(on, *row))
    rows = run("ultraedit;memit", "--scenarios", "1", "--missing")
    rows = run("memit", "--scenarios", "sequence,1", "--missing")
    assert asked == [("ultraedit", "1"), ("memit", "1")] and len(rows) == 3
    assert rows["ultraedit", "1"]["n/a"] and rows["memit", "1"]["said"] == 1.0
    sequence = rows["memit", "sequence"]
    assert all(0 <= sequence[column] <= 1 for column in quality_tuning.METRICS)
    assert all(sequence[column] is None for column in quality_tuning.ROUTES)
    assert 0.5 < sequence["retention"] <= 2 and sequence["bytes"] == 0 and sequence["unlearned"] == 0
    assert CliRunner().invoke(quality.app, ["--tuning", "--methods", "rome"]).exit_code == 2


def test_the_tables_have_a_cell_for_every_scenario_that_was_measured(monkeypatch):
    row = dict(efficacy=0.5, paraphrase=0.25, neighborhood=None, drift=0.01, retention=None, unlearned=3, seconds=61.4,
               bytes=3 << 20)  # fmt: skip
    rows = [
        {"variant": "memit", "scenario": "1", **row},
        {"variant": "ultraedit", "scenario": "1", "n/a": "its normalizer"},
        {"variant": "memit", "scenario": "sequence", **row},
    ]
    monkeypatch.setattr(page, "rows_in", lambda name: rows)
    monkeypatch.setattr(page, "TUNING_FILE", "quality_demo")  # a file that is there
    table = page.quality_tuning("forced").splitlines()
    assert table[0] == "| method | 1 | 500 by 50 |"
    assert table[2:] == ["| `memit` | 0.50 / 0.25 / - | 0.50 / 0.25 / - |", "| `ultraedit` | n/a |  |"]
    assert "+0.010 / - / 3 / 61 s / 3.0 MiB" in page.quality_tuning("cost")
