"""AlphaEdit on a model without numbers: a layer without a null space leaves the guessed window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import PREFIXES, REQUESTS
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, Patch, collect_statistics
from kedit_fast.errors import NullSpaceError, StatisticsError
from kedit_fast.methods.presets import make_hparams
from kedit_fast.solver.preconditioner import NullSpace

RULE = {
    "nullspace_rule": "absolute",
    "nullspace_threshold": 1e-8,
    "L2": 1.0,
    "v_num_grad_steps": 3,
    "clamp_norm_factor": 0.75,
}
GUESS = (1, 2, 3)


@pytest.fixture(scope="module")
def place():
    """A model of twelve layers, and statistics whose layers all have a null space, having few tokens."""
    model, tokenizer = make_model("llama", torch.float64, layers=12), make_tokenizer()
    assert make_hparams("alphaedit", model.config)[0].layers == GUESS
    return model, tokenizer, collect_statistics(model, tokenizer, TEXT[:1], (*GUESS, 4), max_tokens=16)


def without(statistics, *layers):
    """Statistics in which these layers have no small eigenvalue."""
    moments = dict(statistics.layers)
    for layer in layers:
        moments[layer] = replace(moments[layer], moment=moments[layer].moment + torch.eye(64, dtype=torch.float64))
    return replace(statistics, layers=moments)


def editor_of(place, statistics, model=None, **options):
    return Editor(
        place[0] if model is None else model,
        place[1],
        "alphaedit",
        statistics=statistics,
        prefixes=PREFIXES,
        **{"hparams": RULE, **options},
    )


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def changed(model, before):
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("bad, left", [((2,), (1, 3)), ((3,), (1, 2)), ((1, 3), (2,))])
def test_a_layer_without_a_null_space_leaves_a_guessed_window(place, caplog, bad, left):
    model, before = place[0], weights(place[0])
    editor = editor_of(place, without(place[2], *bad))
    for layer in bad:
        assert f"a layer leaves the guessed window, 1, 2, 3: layer {layer}: no null space" in caplog.text
    assert "1e-08 (absolute" in caplog.text and len(caplog.records) == len(bad)
    assert editor.hparams.layers == left
    assert editor.origin.endswith(f"without {', '.join(map(str, bad))} for want of a null space")
    result = editor.edit(REQUESTS)
    names = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in left}
    assert set(result.updates) == set(result.relative_norms) == changed(model, before) == names
    assert set(editor.solver_state.null_spaces) == set(left)
    editor.rollback()
    assert not changed(model, before)


def test_the_window_that_is_left_is_edited_as_if_it_were_named(place):
    statistics = without(place[2], 3)
    model, before = place[0], weights(place[0])
    shrunk, named = editor_of(place, statistics), None
    shrunk.edit(REQUESTS)
    after = weights(model)
    shrunk.restore()
    named = editor_of(place, statistics, layers=(1, 2))
    named.edit(REQUESTS)
    assert not changed(model, after) and changed(model, before)
    named.restore()


def test_each_layer_is_factored_once(place, monkeypatch):
    calls = []
    original = NullSpace.from_covariance.__func__
    monkeypatch.setattr(
        NullSpace, "from_covariance", classmethod(lambda cls, *a, **k: calls.append(1) or original(cls, *a, **k))
    )
    editor = editor_of(place, without(place[2], 2))
    editor.edit(REQUESTS[:1])
    editor.edit(REQUESTS[1:])
    assert len(calls) == 3
    editor.restore()


@pytest.mark.parametrize("how", ["layers", "hparams"])
def test_a_layer_that_the_caller_names_is_an_error(place, how):
    named = {"layers": GUESS} if how == "layers" else {"hparams": {**RULE, "layers": GUESS}}
    editor, before = editor_of(place, without(place[2], 2), **named), weights(place[0])
    with pytest.raises(NullSpaceError, match=r"layer 2: no null space: none of 64 .* Raise nullspace_threshold, or"):
        editor.edit(REQUESTS)
    assert not changed(place[0], before)


def test_a_window_without_any_null_space_is_the_error_of_its_first_layer(place):
    with pytest.raises(NullSpaceError, match=r"layer 1: no null space: none of 64 .* Raise nullspace_threshold, or"):
        editor_of(place, without(place[2], *GUESS))


def test_other_bad_statistics_do_not_shrink_a_window(place):
    moments = dict(place[2].layers)
    moments[2] = replace(moments[2], moment=torch.full((64, 64), float("nan")))
    with pytest.raises(StatisticsError, match=r"layer 2: .* not finite"):
        editor_of(place, replace(place[2], layers=moments))


def test_other_methods_have_no_such_layers(place, caplog):
    editor = Editor(place[0], place[1], "memit", statistics=without(place[2], 2), prefixes=PREFIXES)
    assert editor.hparams.layers == GUESS and "guessed window" not in caplog.text
    assert not editor.solver_state.without_null_space(GUESS)


def test_a_shrunk_run_goes_on_from_its_state_and_its_patch_has_its_layers(place, tmp_path):
    statistics = without(place[2], 2)
    model, before = place[0], weights(place[0])
    first = editor_of(place, statistics)
    first.edit(REQUESTS[:2])
    first.save_state(tmp_path / "state")
    middle = weights(model)
    first.edit(REQUESTS[2:])
    after = weights(model)
    first.patch().save(tmp_path / "patch")

    model.load_state_dict(middle)
    again = editor_of(place, statistics)
    again.load_state(tmp_path / "state")
    again.edit(REQUESTS[2:])
    assert not changed(model, after)

    model.load_state_dict(middle)
    whole = editor_of(place, place[2])  # whose statistics leave the window as it is
    with pytest.raises(StatisticsError, match="another run: different layers"):
        whole.load_state(tmp_path / "state")

    model.load_state_dict(before)
    Patch.load(tmp_path / "patch").apply_(model)
    assert changed(model, before) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 3)}
    model.load_state_dict(before)
