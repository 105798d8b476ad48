"""`plan` and `suggest` of methods that tune a matrix."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, run, saved
from tiny_models import make_model, make_tokenizer

from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.view import ModelView
from kedit_fast.reports.plan import plan
from kedit_fast.reports.search import SEARCHES, Search, kind_of
from kedit_fast.reports.suggest import suggest
from kedit_fast.reports.tuning_plan import memory_count, routing_cost

NUMBERS = {
    "grace": {"num_steps": 4, "lr": 0.1, "eps": 0.05, "val_init": "warm"},
    "ft-m": {"num_steps": 4, "lr": 1e-3},
}


@pytest.mark.parametrize("method", NUMBERS)
def test_a_plan_says_bytes_time_and_what_the_memory_costs_and_changes_nothing(method):
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = {"layers": (1,), **NUMBERS[method]}
    result = plan(model, make_tokenizer(), 100, method, requests=REQUESTS, hparams=numbers)
    assert result.seconds is not None and result.seconds["values"] > 0 and result.values_batch is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    out, d = ModelView(model).weight(1).shape
    if method == "grace":
        assert result.routing is not None and result.routing.bytes == result.bytes["memory"] == 400 * (out + d + 1)
        assert (result.routing.prompt_products, result.routing.token_products) == (0.0, 0.0)
        assert result.routing.sequence_bytes == 400 * (d + 1)
    else:
        assert result.routing is None and result.bytes["update"] == 4 * out * d
        assert result.bytes["optimizer"] == 2 * result.bytes["update"] == 2 * result.bytes["tuned matrix"]
        assert result.bytes["captured inputs and outputs"] % 100 == 0
    assert result.as_dict()["total_bytes"] == sum(result.bytes.values())


def test_the_memories_of_wise_are_those_that_its_router_compares():
    config = make_model("llama").config
    numbers = {"layers": (1,), "lr": 1.0, "num_steps": 2, "save_freq": 10, "merge_freq": 20}
    hparams, _ = make_hparams("wise", config, numbers)
    assert [memory_count(hparams, edits) for edits in (1, 10, 11, 20, 21, 40, 45)] == [1, 1, 2, 1, 2, 2, 3]
    cost = routing_cost(ModelView(make_model("llama")), find_recipe("wise"), hparams, 45)
    assert cost is not None and cost.prompt_products == 3 and cost.token_products == 1
    shares, _ = make_hparams(
        "memoir", config, {"layers": (1,), "lr": 1.0, "num_steps": 2, "top_k": 0, "top_share": 0.25}
    )
    cost = routing_cost(ModelView(make_model("llama")), find_recipe("memoir"), shares, 45)
    assert cost is not None and cost.prompt_products == 0 and cost.token_products == 0.25


def test_the_command_says_what_routing_costs(tmp_path):
    saved(tmp_path / "model", "llama")
    options = ("--no-trial", "--method", "grace", "--layers", "1", "--set", "lr=0.1", "--set", "num_steps=4")
    result = run("plan", tmp_path / "model", "--edits", "50", *options)
    assert result.returncode == 0, result.stderr
    assert "products of the matrix a prompt token" in result.stdout and "memory" in result.stdout


def test_a_search_of_a_tuned_method_varies_its_numbers_and_layers():
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = suggest(model, make_tokenizer(), REQUESTS, "grace", effort="short", hparams=NUMBERS["grace"] | {"lr": 0.1})
    stages = {trial.stage for trial in result.trials}
    assert "layers" in stages and not {"lr", "eps"} & stages  # what is given is not varied
    assert all(trial.norm == 0.0 for trial in result.trials if not trial.failure)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_whole_numbers_stay_whole_and_the_start_is_tried():
    class Recorded:
        def __init__(self):
            self.done = []

        def run(self, stage, value, changes, requests):
            from kedit_fast.reports.trials import Trial

            score = 1.0 / (1 + abs(changes.get("num_steps", 50) - 100)) + 0.1 * (changes.get("lr") == 0.5)
            self.done.append(Trial((1,), stage, value, dict(changes), 1, score=score, margin=score))
            return self.done[-1]

        @property
        def view(self):
            return ModelView(make_model("llama"))

    hparams, _ = make_hparams("grace", make_model("llama").config, {"layers": (1,), "lr": 0.5, "num_steps": 50})
    recipe = find_recipe("grace")
    assert kind_of(recipe) == "tuning" and kind_of(find_recipe("memit")) == "values"
    trials = Recorded()
    search = Search(trials, (), recipe, hparams, frozenset(), [(1,)], (1,), frozenset({1}))  # type: ignore[arg-type]
    search.run(SEARCHES["full", "tuning"])
    steps = [trial.value for trial in trials.done if trial.stage == "num_steps"]
    assert steps and all(isinstance(value, int) for value in steps) and search.value("num_steps") == 100
    assert trials.done[0].stage == "lr" and trials.done[0].value == 0.5
