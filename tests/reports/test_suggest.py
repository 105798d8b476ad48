"""Suggestions and choices, on the demo model: real trials, planted failures, what is stored and read again."""

from __future__ import annotations

import json

import pytest
import torch

from kedit_fast import demo
from kedit_fast.editing.editor import Editor
from kedit_fast.errors import MethodError, RequestError, SolveError
from kedit_fast.methods.hparams_files import read_hparams
from kedit_fast.reports import choice as choices
from kedit_fast.reports import suggest as suggestions
from kedit_fast.reports import trials
from kedit_fast.reports.choice import choose
from kedit_fast.reports.search import Numbers, Windows
from kedit_fast.reports.suggest import Suggestion, suggest
from kedit_fast.reports.trials import StoredStatistics, Trial, in_memory

FAST = {"v_num_grad_steps": 8, "context_template_length_params": ((3, 1),), "clamp_norm_factor": 2.0, "v_lr": 0.5}
WINDOWS = [(0,), (0, 1), (1,)]
"""What short trials with statistics of the layers 0 and 1 try, in order; (1,) for its size."""


@pytest.fixture
def place(demo_model, demo_statistics):
    """Model, tokenizer and statistics; the weights must be the same afterwards, bit for bit."""
    model, tokenizer = demo_model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield model, tokenizer, demo_statistics
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def short(place, count=3, method="memit", **options):
    model, tokenizer, statistics = place
    common = {"statistics": statistics, "hparams": FAST, "effort": "short"}
    return suggest(model, tokenizer, demo.requests(count), method, **{**common, **options})


def test_a_short_search_varies_the_layers_that_have_statistics(place, tmp_path):
    suggestion = short(place)
    assert [trial.layers for trial in suggestion.trials] == WINDOWS
    assert suggestion.best.rank == max(trial.rank for trial in suggestion.trials) and suggestion.best.efficacy > 0
    assert suggestion.swept == "layers" and not suggestion.held_out and suggestion.score == suggestion.best.score
    assert suggestion.notes == ("no text: drift is not in the score",)
    assert repr(suggestion.trials) == repr(short(place).trials)
    (tmp_path / "best.toml").write_text(suggestion.toml())
    assert read_hparams(tmp_path / "best.toml")["layers"] == suggestion.best.layers
    assert set(suggestion.as_dict()) == {
        "method", "edits", "swept", "trials", "best", "numbers", "skipped",
        "held_out", "held_out_edits", "score", "notes",
    }  # fmt: skip
    names = {"layers", "stage", "value", "hparams", "edits", "efficacy", "paraphrase", "neighborhood", "drift", "norm"}
    names |= {"score", "margin", "resolved", "failure", "no_null_space"}
    assert all(set(trial) == names for trial in json.loads(json.dumps(suggestion.as_dict()))["trials"])


@pytest.mark.parametrize(("least_gain", "chosen"), ((0.2, None), (0.05, 0.02)))
def test_a_short_search_suggests_where_it_ended(place, monkeypatch, least_gain, chosen):
    """Where a stage wants more than the higher score, the trial of the highest score is not the one suggested."""

    def measured(self, changes, requests, scored):
        return {"efficacy": 0.8, "score": 0.9 if "residual_share" in changes else 0.8}

    monkeypatch.setattr(trials.Trials, "_measured", measured)
    stages = (Windows("coarse"), Numbers("residual_share", (0.02,), least_gain=least_gain))
    monkeypatch.setitem(suggestions.SEARCHES, ("short", "values"), stages)
    suggestion = short(place, hparams={**FAST, "mom2_update_weight": "auto"})
    assert suggestion.best.hparams.get("residual_share") == suggestion.hparams.get("residual_share") == chosen
    assert max(trial.score for trial in suggestion.trials) == 0.9


def test_a_third_is_held_out_and_the_best_three_are_scored_on_it(place, monkeypatch):
    monkeypatch.setitem(suggestions.SEARCHES, ("full", "values"), suggestions.SEARCHES["short", "values"])
    written = []
    original = Editor.edit
    monkeypatch.setattr(Editor, "edit", lambda self, rows, *a: written.append(len(rows)) or original(self, rows, *a))
    full = short(place, 7, effort="full", texts=demo.corpus(20)[:4])
    assert full.edits == 5 and full.held_out_edits == 2
    assert len(full.held_out) == min(3, sum(trial.score > 0 for trial in full.trials)) > 0
    assert written == [5] * len(full.trials) + [7] * len(full.held_out) and full.trials[0].stage == "preset"
    assert full.score == max(trial.score for trial in full.held_out) and full.best in full.trials
    assert full.best.drift is not None and full.notes[-1] == "7 requests: 32 or more choose better"
    few = short(place, 5, effort="full")
    assert few.edits == 5 and not few.held_out and any("none is held out" in note for note in few.notes)


def test_one_failing_window_is_a_row_and_all_are_an_error_with_each_reason_once(place, monkeypatch):
    original = Editor.edit

    def singular(self, *arguments):
        if len(self.hparams.layers) == 1:
            raise SolveError("the system is singular\nand more")
        return original(self, *arguments)

    monkeypatch.setattr(Editor, "edit", singular)
    suggestion = short(place)
    assert [trial.failure for trial in suggestion.trials] == ["the system is singular", "", "the system is singular"]
    assert suggestion.best.layers == (0, 1)

    def always(self, *arguments):
        raise SolveError(f"{len(self.hparams.layers)} layers")

    monkeypatch.setattr(Editor, "edit", always)
    with pytest.raises(MethodError) as error:
        short(place)
    assert str(error.value).splitlines() == [
        "none of 2 configurations works on these requests:",
        "  layers 0: 1 layers",
        "  layers 0-1: 2 layers",
    ]


@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError))
def test_an_error_or_interrupt_after_a_write_leaves_the_model_as_it_was(place, monkeypatch, error):
    def stopped(*arguments, **options):
        raise error

    monkeypatch.setattr(trials, "evaluate_each", stopped)
    with pytest.raises(error):
        short(place)


def test_a_model_that_computes_no_numbers_afterwards_is_a_failure(place, monkeypatch):
    losses = iter((1.0, float("nan"), 1.5, 1.0))
    monkeypatch.setattr(trials, "mean_nll", lambda *arguments, **options: next(losses))
    suggestion = short(place, texts=("a text",))
    assert [bool(trial.failure) for trial in suggestion.trials] == [True, False, False]
    assert "not finite" in suggestion.trials[0].failure and suggestion.trials[1].drift == 0.5


def test_where_nothing_comes_through_a_short_search_names_the_likeliest(place):
    hparams = {**FAST, "v_num_grad_steps": 1}
    suggestion = short(place, 1, hparams=hparams)
    assert suggestion.score == 0 and suggestion.best.margin == max(trial.margin for trial in suggestion.trials)
    with pytest.raises(MethodError, match=r"none of .* configurations works.*\n.*no target or paraphrase"):
        short(place, 1, hparams=hparams, effort="full", last_layers=[1])


def test_ultraedit_looks_for_its_rate_and_token_too(place):
    suggestion = short(place, 2, "ultraedit", statistics=None, hparams=None, texts=demo.corpus(10)[:2])
    assert [trial.value for trial in suggestion.trials[:5]] == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    assert {trial.stage for trial in suggestion.trials} == {"lr", "layers", "token"}
    assert max(layer for trial in suggestion.trials for layer in trial.layers) == 5  # of six layers
    assert suggestion.best.efficacy == 1 and suggestion.hparams["lr"] >= 1e-3
    given = short(place, 2, "ultraedit", statistics=None, hparams={"lr": 0.01, "layers": (4, 5), "token": "ans"})
    assert [trial.layers for trial in given.trials] == [(4, 5)]


def test_statistics_without_a_window_name_the_command(place):
    stored = StoredStatistics([1], lambda layers: place[2])
    with pytest.raises(MethodError, match=r"statistics are of layers 1: memit .* --layers auto"):
        short(place, statistics=stored)
    with pytest.raises(MethodError, match="needs statistics"):
        short(place, statistics=None)


@pytest.fixture
def searches(monkeypatch):
    """The searches that choices run, each with the same outcome."""
    calls = []
    trial = Trial((0, 1), "layers", None, {"layers": (0, 1)}, 3, 1.0, 0.9, 0.9, score=0.9, margin=0.8)
    outcome = Suggestion("memit", 3, "layers", (trial,), trial, {"layers": (0, 1)}, score=0.9)
    monkeypatch.setattr(choices, "suggest", lambda *arguments, **options: calls.append(options) or outcome)
    return calls


def chosen(place, folder, count=3, **options):
    model, tokenizer, statistics = place
    common = {"statistics": in_memory(statistics), "hparams": FAST, "folder": folder}
    return choose(model, tokenizer, demo.requests(count), "memit", **{**common, **options})


def test_a_choice_is_stored_and_used_again_for_the_same_configuration(place, tmp_path, monkeypatch, searches):
    first, where = chosen(place, tmp_path)
    (path,) = tmp_path.iterdir()
    assert where == f"stored in {path}" and first.hparams == {"layers": (0, 1)}
    search = searches.pop()
    assert search["most"] == choices.REQUESTS == 48 and search["expected"] == first.expected == first.records > 0
    again, where = chosen(place, tmp_path)
    assert not searches and again.hparams == first.hparams and again.toml == first.toml and str(path) in where
    assert chosen(place, tmp_path, 2)[1] == where  # of fewer requests
    for number, options in enumerate(
        ({"count": 4}, {"target_separator": " "}, {"hparams": {**FAST, "kl_factor": 0.0}}, {"seed": 1},
         {"prompt_format": lambda text: f"Q: {text}"}), 1
    ):  # fmt: skip
        chosen(place, tmp_path, **options)
        assert len(searches) == number, options
    monkeypatch.setattr(choices, "__version__", "0.0.0")
    chosen(place, tmp_path)
    assert len(searches) == 6


@pytest.mark.parametrize("damage", ("", "{", "[]", '{"format_version": "1"}', "layers", "best"))
def test_a_damaged_choice_is_made_again(place, tmp_path, damage, searches):
    first, _ = chosen(place, tmp_path)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    if damage in content["hparams"]:
        content["hparams"]["layers"] = [17]
    if damage in content:
        content[damage] = 10**6
    path.write_text(json.dumps(content) if damage in ("layers", "best") else damage)
    again, where = chosen(place, tmp_path)
    assert "was damaged" in where and "stored in" in where and again == first
    assert len(searches) == 2 and chosen(place, tmp_path)[1].startswith("chosen earlier")


def test_a_folder_that_cannot_be_written_is_no_error(place, tmp_path, searches):
    choice, where = chosen(place, tmp_path / "nowhere")
    assert choice.hparams["layers"] and where.startswith("not stored: cannot write")
    assert "no folder" in chosen(place, None)[1]


def test_all_requests_are_checked_before_the_first_trial(place, monkeypatch):
    monkeypatch.setattr(Editor, "edit", lambda *arguments: pytest.fail("a trial ran"))
    model, tokenizer, statistics = place
    rows = [*demo.requests(13), {"prompt": "{} is", "target_new": "x"}]
    with pytest.raises(RequestError, match="'subject'"):
        choose(model, tokenizer, rows, "memit", statistics=in_memory(statistics), hparams=FAST)
