"""The benchmark of untuned numbers: it trains, tries its grid, and says which goals are missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")


@pytest.fixture(scope="module")
def untuned():
    from benchmarks import untuned

    return untuned


@pytest.fixture(scope="module")
def trained(untuned, tmp_path_factory):
    """Both models after one step each."""
    from kedit_fast.demo import train

    out = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.torch, "compile", lambda model: model)
        patch.setattr(train, "recall", lambda *arguments, **named: 0.0)
        patch.setattr(untuned.torch, "set_num_threads", lambda count: None)
        for name in untuned.SEEDS:
            done = CliRunner().invoke(
                untuned.app, ["train", "--out", str(out), "--name", name, "--steps", "1", "--rows", "2"]
            )
            assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def small(untuned, monkeypatch):
    """Four edits, a grid of one run of values, and suggestions that cost nothing."""
    for name, value in {"TUNING": 4, "EDITS": 3, "DOCUMENTS": 200, "DRIFT_TEXTS": 4}.items():
        monkeypatch.setattr(untuned, name, value)
    monkeypatch.setattr(untuned, "FIXED", {**untuned.FIXED, "v_num_grad_steps": 2})
    solves = {method: several[:1] for method, several in untuned.solves((1.0,)).items()}
    grids = {name: untuned.Grid((1,), (2.0,), (0.5,), (1, 2), solves) for name in untuned.SEEDS}
    monkeypatch.setattr(untuned, "GRIDS", grids)
    monkeypatch.setattr(untuned, "chosen", lambda on, method, source: {"layers": (1,), **untuned.FIXED})


def test_the_models_are_of_other_shapes_and_facts_than_the_demo(untuned, trained):
    from kedit_fast.demo import world

    known = {fact.subject for fact in world.world().facts}
    for name in untuned.SEEDS:
        config = json.loads((trained / name / "config.json").read_text())
        assert config["model_type"] == name and (config["hidden_size"] if name == "llama" else config["n_embd"]) != 256
        records = [json.loads(line) for line in (trained / name / "requests.jsonl").read_text().splitlines()]
        assert len(records) >= 250 and all(r["paraphrase_prompts"] and r["neighborhood_prompts"] for r in records)
        assert len({r["subject"] for r in records} & known) < 5
        assert (trained / name / "corpus.jsonl").stat().st_size > 100_000


def test_a_grid_has_at_most_24_runs_of_values_and_200_solves(untuned):
    for grid in untuned.GRIDS.values():
        runs = list(grid.values())
        assert len(runs) <= 24
        for method in untuned.METHODS:
            solved = [hparams for run in runs for hparams in grid.solved(method, run)]
            assert len(solved) <= 200
            assert all(h["layers"][-1] == r["layers"][-1] for r in runs for h in grid.solved(method, r))
            assert len({json.dumps(hparams, sort_keys=True) for hparams in solved}) == len(solved)


def test_a_comparison_has_a_row_of_each_source_and_the_whole_grid(untuned, trained, small, tmp_path):
    path = tmp_path / "untuned.json"
    arguments = ["compare", "--models", str(trained), "--names", "gpt2", "--json", str(path)]
    done = CliRunner().invoke(untuned.app, [*arguments, "--methods", "memit,alphaedit,memit"])  # replaces its rows
    assert isinstance(done.exception, SystemExit | None), done.exception
    document = json.loads(path.read_text())
    for method in untuned.METHODS:
        rows = [row for row in document["rows"] if row["method"] == method]
        assert [row["source"] for row in rows] == ["grid", "nothing given", "suggest", "published"]
        assert all(row["commit"] and row["model"] == "gpt2" for row in rows)
        grid = [row for row in document["grid"] if row["method"] == method]
        assert len(grid) == 2
        assert max(row["score"] or 0.0 for row in grid) == rows[0]["score"]


def test_a_solve_that_cannot_be_the_best_is_not_measured_to_its_end(untuned, trained, small):
    on = untuned.subject(trained / "gpt2", "gpt2")
    hparams = {"layers": (1,), "v_lr": 0.5, "clamp_norm_factor": 2.0, "mom2_update_weight": 100.0}
    whole, cut = untuned.measure(on, "memit", hparams), untuned.measure(on, "memit", hparams, at_least=2.0)
    assert cut["score"] is None and cut["efficacy"] == whole["efficacy"] and "paraphrase" not in cut
    failed = untuned.measure(on, "memit", {**hparams, "mom2_update_weight": -1.0})
    assert failed["score"] == 0.0 and "mom2_update_weight" in failed["failure"]
    assert untuned.mean_nll(on.model, on.tokenizer, on.texts) == on.before  # everything is undone


@pytest.mark.parametrize(("source", "lower", "missed"), (
    ("nothing given", 4.9, []), ("nothing given", 5.1, ["efficacy"]), ("suggest", 3.1, ["efficacy"]),
    ("published", 90.0, []),
))  # fmt: skip
def test_goals_are_points_below_the_best_of_the_grid(untuned, source, lower, missed):
    best = {
        "model": "gpt2",
        "method": "memit",
        "source": "grid",
        "efficacy": 0.9,
        "paraphrase": 0.8,
        "neighborhood": 0.9,
    }
    row = {**best, "source": source, "efficacy": 0.9 - lower / 100, "paraphrase": 0.9}
    assert untuned.misses(row, [best, row]) == missed
    assert untuned.misses({**row, "method": "alphaedit"}, [best, row]) == []  # nothing to compare with
    assert untuned.points(row, [best, row])["paraphrase"] == pytest.approx(10)
