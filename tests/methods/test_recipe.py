"""Recipes: their fields are checked, and they say what a method can do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from kedit_fast.editing.preconditioners import PRECONDITIONERS
from kedit_fast.editing.schedules import SCHEDULES
from kedit_fast.editing.schedules.mass import SPREADS
from kedit_fast.editing.schedules.single import VALUE_KEYS
from kedit_fast.editing.shaping import SHAPINGS
from kedit_fast.editing.solver_state import NORMALIZERS, RHOS
from kedit_fast.errors import MethodError
from kedit_fast.methods import recipe as records
from kedit_fast.methods.hparams import DECLARATIONS, Hparams, describe, reads
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import RECIPES, find_recipe
from kedit_fast.methods.tables import hparams_table, methods_table, presets_table, tuning_table

PAGE = Path(__file__).parents[2] / "kedit_fast" / "methods" / "README.md"


@pytest.mark.parametrize(
    "field",
    [
        "values",
        "key_weights",
        "schedule",
        "preconditioner",
        "constraint",
        "value_key",
        "spread",
        "shaping",
        "stop_rule",
    ],
)
def test_a_misspelled_strategy_is_refused_with_the_accepted_ones(field):
    accepted = get_args(Recipe.__dataclass_fields__[field].type) or records._choices()[field]
    with pytest.raises(MethodError, match=f"recipe 'memit': {field} = 'linaer': choose from '{accepted[0]}'"):
        dataclasses.replace(RECIPES["memit"], **{field: "linaer"})


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("memit", {"schedule": "gradients"}, "schedule = 'gradients' does not go with values = 'block'"),
        ("memit", {"constraint": "equality"}, "schedule = 'mass' does not go with constraint = 'equality'"),
        ("rome", {"spread": "linear"}, "schedule = 'single' does not go with spread = 'linear'"),
        ("rome", {"memory": True}, "schedule = 'single' does not go with memory = True"),
        ("memit", {"normalizer": "whitened"}, "schedule = 'mass' does not go with normalizer = 'whitened'"),
    ],
)
def test_strategies_that_contradict_each_other_are_refused(name, changes, message):
    with pytest.raises(MethodError, match=message):
        dataclasses.replace(RECIPES[name], **changes)


@pytest.mark.parametrize(
    "registry, literal, without",
    [
        (SCHEDULES, records.Schedule, ()),
        (SPREADS, records.Spread, ()),
        (SHAPINGS, records.Shaping, ()),
        (VALUE_KEYS, records.ValueKey, ()),
        (PRECONDITIONERS, records.PreconditionerKind, ()),
        (NORMALIZERS, records.NormalizerKind, ()),
        (RHOS, records.Constraint, ("equality",)),  # rank-one: has no rho
    ],
)
def test_every_strategy_is_in_the_registry_of_the_room_that_runs_it(registry, literal, without):
    assert set(registry) == set(get_args(literal)) - set(without)


def test_capabilities():
    def methods(capability):
        return {name for name, recipe in RECIPES.items() if getattr(recipe, capability)}

    assert methods("keeps_state") == {
        "memit-sequential", "alphaedit", "sphere", "nas", "encore", "rlsedit", "ultraedit", "stableedit"
    }  # fmt: skip
    tuned = {name for name, recipe in RECIPES.items() if recipe.tuning is not None}
    assert tuned == {"locft-bf", "ft-l", "ft-m", "dinm", "wise", "memoir", "grace"}
    assert methods("makes_memory") == {"wise", "memoir", "grace"}
    assert set(RECIPES) - methods("is_batched") == methods("edits_one_layer") - tuned == {"rome", "r-rome"}
    assert tuned - methods("edits_one_layer") == {"dinm"}
    assert (
        set(RECIPES) - methods("optimizes_values") - tuned
        == {"ultraedit", "stableedit"}
        == set(RECIPES) - methods("uses_statistics") - tuned
    )
    assert set(RECIPES) - methods("weighs_requests") - tuned == {"rome", "r-rome", "ultraedit", "stableedit"}
    assert methods("softens_equality") == {"emmet"} and methods("uses_null_space") == {
        "alphaedit",
        "sphere",
        "nas",
        "anyedit-alphaedit",
    }
    assert methods("needs_chunks") == {"anyedit", "anyedit-alphaedit"}
    assert methods("optimizes_values") - methods("needs_subject") == methods("needs_chunks")
    assert methods("chunk_obstacle") - tuned == {"rome", "r-rome", "memit-merge", "ultraedit", "stableedit"}
    assert {name for name, recipe in RECIPES.items() if recipe.stop_rule == "pmet"} == {"pmet"}
    assert methods("whitens_gradients") == {"stableedit"}


def test_json_has_the_fields_and_words_of_before():
    names = {
        "name",
        "title",
        "source",
        "preset",
        "values",
        "key_weights",
        "schedule",
        "preconditioner",
        "rho",
        "memory",
        "value_key",
        "spread",
        "merge",
        "shaping",
        "contexts",
        "keeps",
    }
    for recipe in RECIPES.values():
        assert names <= json.loads(json.dumps(recipe.as_dict())).keys()
    assert {n: r.as_dict()["rho"] for n, r in RECIPES.items() if r.as_dict()["rho"] != "one"} == {
        "rome": "equality",
        "r-rome": "equality",
        "emmet": "emmet_lambda",
    }
    assert {r.as_dict()["schedule"] for r in RECIPES.values()} == {"mass", "single", "tuning"}


def test_every_field_of_hparams_is_declared_and_read_by_a_method():
    names = [field.name for field in dataclasses.fields(Hparams) if field.name != "method"]
    assert sorted(DECLARATIONS) == sorted(names) and next(iter(DECLARATIONS)) == "layers"
    for name, known in DECLARATIONS.items():
        assert known.meaning and known.accepted.description
        assert any(reads(recipe, name) for recipe in RECIPES.values())
        if known.is_required:
            assert all(describe(recipe)[name]["default"] is None for recipe in RECIPES.values() if reads(recipe, name))


def test_choices_are_those_of_the_solver():
    from kedit_fast.methods import hparams
    from kedit_fast.solver import least_squares, preconditioner

    assert get_args(hparams.NullSpaceRule) == get_args(preconditioner.NullSpaceRule)
    assert get_args(hparams.MemoryForm) == get_args(least_squares.SystemForm)
    assert get_args(hparams.OnBadPivot) == get_args(least_squares.OnBadPivot)


def test_what_identifies_stored_values_and_states_is_what_files_of_format_1_hold():
    hparams = Hparams("memit", (1,), v_num_grad_steps=2, v_lr=0.5, clamp_norm_factor=1.0, mom2_update_weight=10.0)
    assert sorted(hparams.identity("value")) == sorted(
        (
            "v_num_grad_steps",
            "v_lr",
            "v_weight_decay",
            "clamp_norm_factor",
            "kl_factor",
            "v_stop_loss",
            "most_probable_steps",
        )
    )
    assert sorted(hparams.identity("state")) == sorted(
        (
            "layers",
            "inner_params",
            "mom2_adjustment",
            "mom2_update_weight",
            "mom2_ridge",
            "update_norm_lambda",
            "L2",
            "nullspace_threshold",
            "nullspace_rule",
            "factor_dtype",
            "token",
            "context_template_length_params",
        )
    )


def test_what_is_off_identifies_nothing_and_what_is_on_does():
    """So that values and states from before a hyper-parameter existed are still those of runs that do not use it."""
    numbers = dict(v_num_grad_steps=2, v_lr=0.5, clamp_norm_factor=1.0, mom2_update_weight=10.0)
    on = Hparams("memit", (1,), kl_temperature=2.0, kl_direction="original", **numbers)
    assert on.identity("value").items() >= {"kl_temperature": 2.0, "kl_direction": "original"}.items()
    assert all(known.off in (None, known.default) for known in DECLARATIONS.values())


def test_a_value_out_of_range_is_refused_with_the_range():
    with pytest.raises(MethodError, match=r"v_lr = 0\.0 is out of range for memit: it must be above 0"):
        Hparams("memit", (1,), v_num_grad_steps=2)
    with pytest.raises(MethodError, match="rect_keep = 0 is out of range for ultraedit: it must be above 0 and at"):
        Hparams("ultraedit", (1,), lr=1e-6, rect_keep=0)
    assert not reads(find_recipe("ultraedit"), "v_lr")  # so its default, 0, is no error there
    assert Hparams("ultraedit", (1,), lr=1e-6).v_lr == 0


@pytest.mark.parametrize("table", [methods_table, tuning_table, hparams_table, presets_table])
def test_the_page_has_the_tables_that_the_declarations_give(table):
    """`python -m kedit_fast.methods` prints them."""
    assert table() in PAGE.read_text(encoding="utf-8")
