"""Tuning recipes: their fields are checked, and hyper-parameters are read by the methods that have a use for them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from kedit_fast.errors import MethodError
from kedit_fast.methods import tuning_recipe as records
from kedit_fast.methods.hparams import DECLARATIONS, Hparams, reads
from kedit_fast.methods.hparams_files import read_hparams
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import RECIPES, find_recipe
from kedit_fast.methods.tuning_hparams import TUNING_NAMES
from kedit_fast.methods.tuning_recipe import TuningRecipe

TUNED = {name: recipe.tuning for name, recipe in RECIPES.items() if recipe.tuning is not None}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TuningRecipe) if field.name != "eos"])
def test_a_misspelled_strategy_is_refused_with_the_accepted_ones(field):
    accepted = records._choices()[field]
    with pytest.raises(MethodError, match=f"tuning recipe: {field} = 'depht': choose from '{accepted[0]}'"):
        dataclasses.replace(TuningRecipe(), **{field: "depht"})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"placement": "replaces"}, "placement = 'replaces' does not go with router = 'none'"),
        ({"router": "activation"}, "placement = 'in place' does not go with router = 'activation'"),
        ({"extra_term": "kl"}, "extra_rows = 'none' does not go with extra_term = 'kl'"),
        ({"extra_rows": "general"}, "extra_rows = 'general' does not go with extra_term = 'none'"),
        ({"order": "codebook"}, "order = 'codebook' does not go with trains = 'weight'"),
        ({"trains": "residual"}, "trains = 'residual' does not go with placement = 'in place'"),
        ({"mask": "features"}, "trains = 'weight' does not go with mask = 'features'"),
    ],
)
def test_strategies_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(MethodError, match=message):
        TuningRecipe(**changes)


def test_a_method_tunes_or_has_a_closed_form():
    with pytest.raises(MethodError, match="schedule = 'mass' does not go with tuning"):
        dataclasses.replace(RECIPES["memit"], tuning=TuningRecipe())
    with pytest.raises(MethodError, match="schedule = 'tuning' does not go with values = 'block'"):
        dataclasses.replace(RECIPES["wise"], values="block")


def test_closed_forms_read_no_hyper_parameter_of_tuning_and_every_one_is_read():
    for name in TUNING_NAMES:
        readers = {method for method, recipe in RECIPES.items() if DECLARATIONS[name].read_by(recipe)}
        assert readers and readers <= TUNED.keys(), name
    assert {name for name in TUNED if reads(find_recipe(name), "mask_ratio")} == {"wise"}
    assert {name for name in TUNED if reads(find_recipe(name), "curvature_energy")} == {
        "locft-bf", "ft-l", "ft-m", "dinm"
    }  # fmt: skip
    assert not reads(find_recipe("wise"), "frobenius_limit") and not reads(find_recipe("wise"), "v_lr")


def test_three_margins_are_read_and_fewer_refused(tmp_path):
    (tmp_path / "a.toml").write_text("act_margin = [2, 20.0, 10]\nnorm_constraint = 1\n")
    values = read_hparams(tmp_path / "a.toml")
    assert values == {"act_margin": (2.0, 20.0, 10.0), "norm_constraint": 1.0}
    config = SimpleNamespace(model_type="llama", num_hidden_layers=8)
    assert make_hparams("wise", config, values)[0].act_margin == (2.0, 20.0, 10.0)
    with pytest.raises(MethodError, match="three numbers of 0 or above"):
        make_hparams("wise", config, {"act_margin": [1, 2]})
    with pytest.raises(MethodError, match="act_margin = 'a' is not a"):
        make_hparams("wise", config, {"act_margin": "a"})


def test_only_a_curvature_constraint_needs_statistics():
    hparams = Hparams("locft-bf", (1,), lr=1e-3, num_steps=2)
    assert not hparams.uses_statistics
    assert dataclasses.replace(hparams, curvature_energy=0.8).uses_statistics
    with pytest.raises(MethodError, match="curvature_energy"):
        dataclasses.replace(hparams, curvature_energy=1.0)
