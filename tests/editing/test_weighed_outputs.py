"""The output metric through the editor: who can use it, what it needs, and the updates against dense systems."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import pytest
import torch
from floors import relative_error
from support import NUMBERS, PREFIXES, REQUESTS, same, weights
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, EditRequest, collect_statistics
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import StatisticsError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.registry import RECIPES
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.reports.plan import plan
from kedit_fast.requests.prompts import prepare

PUBLISHED = ("memit", "memit-sequential", "memit-merge", "pmet", "emmet", "encore")
POST_NORM = ("gemma2",)
MIX = 0.2


@functools.cache
def statistics_of(kind):
    return collect_statistics(make_model(kind), make_tokenizer(), TEXT * 2, (0, 1), output_metric=True, progress=False)


@pytest.fixture(scope="module")
def statistics():
    return statistics_of("llama")


def editor_of(statistics, method="memit", kind="llama", dtype=torch.float32, **hparams):
    numbers = {**NUMBERS, "mom2_update_weight": 10.0, "output_metric": True, "metric_mix": MIX, **hparams}
    if method == "encore":
        numbers["update_norm_lambda"] = 3.0
    model = make_model(kind, dtype)
    if dtype == torch.float64:
        statistics = replace(statistics, dtype="float64", model=collect_statistics(
            model, make_tokenizer(), TEXT[:1], (0,), progress=False).model)  # fmt: skip
    return Editor(
        model, make_tokenizer(), method, statistics=statistics, layers=(0, 1), hparams=numbers, prefixes=PREFIXES
    )


def test_methods_that_can_weigh_outputs():
    able = {name for name, recipe in RECIPES.items() if recipe.weighs_outputs}
    assert able >= set(PUBLISHED) and not able & {"rome", "r-rome", "rect", "prune", "alphaedit", "ultraedit"}


def dense_update(keys, residual, system, moment, rho):
    """The rows of Q^T Delta, each from a d x d system of its eigenvalue."""
    mean = moment.trace() / len(moment)
    values, basis = torch.linalg.eigh(moment / mean)
    rows = [
        torch.linalg.solve(keys @ keys.T + rho * ((1 - MIX) * value + MIX) * system, keys @ (basis[:, j] @ residual))
        for j, value in enumerate(values.clamp(min=0))
    ]
    return basis @ torch.stack(rows)


@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "llama") for method in PUBLISHED), ("memit", "gpt2"), ("encore", "gemma2")]
)
def test_two_batches_are_those_of_dense_systems(method, kind):
    statistics = statistics_of(kind)
    editor = editor_of(statistics, method, kind, torch.float64)
    recipe, numbers, other = editor.recipe, editor.hparams, ModelView(make_model(kind, torch.float64))
    d = other.weight(0).shape[1]
    eye, caches = torch.eye(d, dtype=torch.float64), [torch.zeros(d, d, dtype=torch.float64) for _ in range(2)]
    sites = recipe.values_on(kind in POST_NORM)
    site = Site(1, "mlp" if sites != "block" else "block")
    for batch in (REQUESTS[:2], [REQUESTS[2], EditRequest("{} is in", "Ebro", "Sweden")]):
        prepared = prepare(editor.tokenizer, batch, PREFIXES, 128)
        targets = find_values(other, prepared, 1, sites, numbers).targets
        editor.edit(batch)
        for layer in (0, 1):
            seen = KeyPass(other, prepared, site, "bare_half").at(layer)
            residual = (targets - seen.outputs) / ((2 - layer) ** 0.5 if method == "pmet" else 2 - layer)
            moment = statistics.moment(layer).moment
            moment = moment + numbers.mom2_ridge * moment.diagonal().mean() * eye
            rho = numbers.emmet_lambda if method == "emmet" else 1.0
            system = 10.0 * moment + float(numbers.update_norm_lambda) * eye + caches[layer]
            delta = dense_update(seen.keys.double(), residual.double(), system, statistics.output_metric(layer), rho)
            if recipe.memory:
                caches[layer] += seen.keys @ seen.keys.T
            other.weight(layer).add_(delta)
        for layer in (0, 1):
            assert relative_error(editor.view.weight(layer), other.weight(layer)) < 1e-8


def test_without_a_second_moment_outputs_are_still_weighed(statistics):
    """S = I needs statistics of outputs alone."""
    outputs_alone = replace(statistics, layers={})
    weighed = editor_of(outputs_alone, mom2_adjustment=False)
    plain = editor_of(outputs_alone, mom2_adjustment=False, output_metric=False)
    for editor in (weighed, plain):
        editor.edit(REQUESTS)
    assert not same(weighed, weights(plain))


def test_missing_or_foreign_statistics_are_named_before_anything_runs(statistics):
    with pytest.raises(StatisticsError, match=r"output_metric=True"):
        editor_of(None, mom2_adjustment=False)
    for outputs, layer in (({}, 0), ({0: statistics.outputs[0]}, 1)):
        with pytest.raises(StatisticsError, match=f"layer {layer}.*--output-metric"):
            editor_of(replace(statistics, outputs=outputs))
    wrong = replace(statistics.outputs[1], moment=torch.eye(5, dtype=torch.float64))
    editor = editor_of(replace(statistics, outputs={**statistics.outputs, 1: wrong}))
    before = weights(editor)
    with pytest.raises(StatisticsError, match=r"\[5, 5\].*outputs"):
        editor.edit(REQUESTS)
    zero = replace(statistics.outputs[1], moment=0 * statistics.outputs[1].moment)
    with pytest.raises(StatisticsError, match=r"layer 1: .*zero"):
        editor_of(replace(statistics, outputs={**statistics.outputs, 1: zero})).edit(REQUESTS)
    assert same(editor, before)


def test_who_does_not_use_it_says_so(statistics, caplog):
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        editor_of(statistics, output_metric=False)
        assert "metric_mix has no effect: it needs output_metric" in caplog.text
        editor_of(statistics, "rect")
    assert "rect does not use metric_mix, output_metric" in caplog.text
    off = Hparams("memit", (0,), 1, 0.1, clamp_norm_factor=1.0, mom2_update_weight=1.0, metric_mix=0.3)
    assert not {"output_metric", "metric_mix"} & set(off.identity("state"))  # states of before stay valid
    assert replace(off, output_metric=True).identity("state")["metric_mix"] == 0.3


def test_a_state_belongs_to_its_statistics_of_outputs(statistics, tmp_path):
    first = editor_of(statistics, "memit-sequential")
    first.edit(REQUESTS[:2])
    path = tmp_path / "state.safetensors"
    first.save_state(path)

    def resumed(statistics=statistics, **hparams):
        editor = editor_of(statistics, "memit-sequential", **hparams)
        editor.view.model.load_state_dict(first.view.model.state_dict())
        editor.load_state(path)
        return editor

    second = resumed()
    for editor in (first, second):
        editor.edit(REQUESTS[2:])
    assert same(first, weights(second))
    first.rollback()
    other = replace(statistics.outputs[0], moment=torch.diag(torch.arange(1.0, 33.0, dtype=torch.float64)))
    for changes, reason in (
        ({"output_metric": False}, "different output_metric: True there, False here"),
        ({"metric_mix": 0.5}, "different metric_mix: 0.2 there, 0.5 here"),
        ({"statistics": replace(statistics, outputs={**statistics.outputs, 0: other})}, "other statistics of outputs"),
    ):
        with pytest.raises(StatisticsError, match=reason):
            resumed(**changes)


def test_a_plan_counts_it(statistics):
    model, tokenizer = make_model("llama"), make_tokenizer()
    numbers = {**NUMBERS, "mom2_update_weight": 10.0, "layers": (0, 1)}
    plain, weighed = (
        plan(model, tokenizer, 10, "memit", requests=REQUESTS, hparams={**numbers, "output_metric": on})
        for on in (False, True)
    )
    out = ModelView(model).weight(0).shape[0]
    assert sum(weighed.bytes.values()) - sum(plain.bytes.values()) == 2 * 2 * 8 * out * out
