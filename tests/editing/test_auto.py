"""Hyper-parameters that are "auto": found from the model and the first batch, frozen, forgotten, saved."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from support import PREFIXES, REQUESTS, make_editor, same, weights
from tiny_models import make_model

from kedit_fast import Editor
from kedit_fast.editing.values import clamp
from kedit_fast.editing.values.clamp import CLAMPS, choose_clamp, trial_places
from kedit_fast.editing.values.loop import find_values
from kedit_fast.editing.values.result import Values
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import EditError, KeditError, MethodError, StatisticsError
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.hparams_files import parse_values
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import RECIPES, find_recipe
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.solver.value_descent import Status

SCALED = ("memit", "memit-sequential", "emmet", "pmet", "rect", "encore", "alphaedit")
NULL_SPACE = {"nullspace_rule": "energy", "nullspace_threshold": 0.3}


def editor_of(method, dtype=torch.float64, **numbers):
    recipe = find_recipe(method)
    scale = "L2" if recipe.uses_null_space else "mom2_update_weight"
    defaults = {"layers": (0, 1), scale: AUTO, "clamp_norm_factor": 1.0, **(NULL_SPACE if scale == "L2" else {})}
    return make_editor("llama", method, dtype, **{**defaults, **numbers})


def first_keys(editor, requests):
    """Layer -> keys of the first batch of requests, as the editor saw them."""
    keys = {}
    editor.on_keys = lambda layer, k: keys.setdefault(layer, k.double())
    editor.edit(requests)
    return keys


@pytest.mark.parametrize("site", ("block", "mlp", "attention and mlp"))
def test_the_rate_of_a_request_is_half_the_rms_of_its_own_state(demo_model, site):
    from kedit_fast import demo

    model, tokenizer = demo_model
    view, requests = ModelView(model), demo.requests()[:5]
    prepared = prepare(tokenizer, requests, ("", "So. "), 128)
    numbers = {"v_num_grad_steps": 6, "clamp_norm_factor": 2.0, "layers": (1,)}
    method = "pmet" if site == "attention and mlp" else "rome" if site == "mlp" else "memit"
    hparams, _ = make_hparams(method, model.config, {**numbers, "v_lr": AUTO, "v_lr_scale": 0.3})
    together = find_values(view, prepared, 1, site, hparams)
    for i, one in enumerate(prepared):
        h0 = together.all_targets[:, :, i] - together.all_deltas[:, :, i].double()  # [sites, h]
        rates = 0.3 * h0.square().mean(1).sqrt()
        assert float(rates.max()) > 0
        if len(rates) > 1:
            continue  # two sites have two rates, which no number stands for
        alone = find_values(view, [one], 1, site, replace(hparams, v_lr=float(rates[0])))
        difference = (alone.deltas[:, 0] - together.deltas[:, i]).norm() / alone.deltas.norm()
        assert float(difference) < 1e-4 and alone.steps[0] == together.steps[i]
    first = find_values(view, prepared, 1, site, replace(hparams, v_num_grad_steps=2))
    for site_number, deltas in enumerate(first.all_deltas):  # a first step of Adam is the rate in every coordinate
        h0 = (first.all_targets[site_number] - deltas.double()).float()
        stepped = deltas.abs().quantile(0.5, dim=0)
        torch.testing.assert_close(stepped, 0.3 * h0.square().mean(0).sqrt(), rtol=2e-3, atol=0)


def test_the_decay_has_no_scale(demo_model):
    """One request at a time, it is the published term with the weight 0.005 |h0|."""
    from kedit_fast import demo

    model, tokenizer = demo_model
    prepared = prepare(tokenizer, demo.requests()[:3], ("", "So. "), 128)
    numbers = {"v_num_grad_steps": 5, "clamp_norm_factor": 2.0, "layers": (1,), "v_lr": 0.5}
    hparams, _ = make_hparams("memit", model.config, {**numbers, "v_weight_decay": AUTO})
    together = find_values(ModelView(model), prepared, 1, "block", hparams)
    norms = (together.targets - together.deltas).norm(dim=0)
    for i, one in enumerate(prepared):
        number = replace(hparams, v_weight_decay=0.005 * float(norms[i]))
        alone = find_values(ModelView(model), [one], 1, "block", number)
        assert float(alone.losses[0]) == pytest.approx(float(together.losses[i]), rel=1e-4)
        assert float((alone.deltas[:, 0] - together.deltas[:, i]).norm() / alone.deltas.norm()) < 1e-4
        without = find_values(ModelView(model), [one], 1, "block", replace(hparams, v_weight_decay=0.0))
        assert float(without.losses[0]) < float(alone.losses[0])


@pytest.mark.parametrize("method", SCALED)
def test_the_median_edit_alone_leaves_the_share_undone(method):
    """Dense, in float64: one key, one layer, the method's own S and rho."""
    share = 0.3
    editor = editor_of(method, residual_share=share, **({"update_norm_lambda": AUTO} if method == "encore" else {}))
    keys, hparams, recipe = first_keys(editor, REQUESTS), editor.hparams, editor.recipe
    name = "L2" if recipe.uses_null_space else "mom2_update_weight"
    resolved = editor.resolved[name]
    assert list(resolved) == [0, 1] and all(scale > 0 for scale in resolved.values())
    for layer, k in keys.items():
        moment = editor.statistics.moment(layer).moment.double()
        eye = torch.eye(len(moment), dtype=torch.float64)
        if recipe.uses_null_space:
            values, vectors = torch.linalg.eigh(moment)
            count = int((values.cumsum(0) <= 0.3 * values.sum()).sum())
            q = (vectors[:, :count].T @ k).square().sum(0) / resolved[layer]
        else:
            moment += hparams.mom2_ridge * moment.diagonal().mean() * eye
            if method == "encore":
                moment += 0.1 * torch.linalg.eigvalsh(moment).log().mean().exp() * eye
            q = (k * torch.linalg.solve(resolved[layer] * moment, k)).sum(0)
        rho = hparams.emmet_lambda if recipe.softens_equality else 1.0
        undone = rho / (rho + q.quantile(0.5))
        assert float(undone) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("method", SCALED)
def test_the_update_is_that_of_the_numbers_it_resolved_to(method):
    editor = editor_of(method)
    editor.edit(REQUESTS)
    name = "L2" if editor.recipe.uses_null_space else "mom2_update_weight"
    first = editor.view.weight_name(0)
    other = editor_of(method, **{name: editor.resolved[name][0]})  # of the first layer, which alone has that number
    other.edit(REQUESTS)
    ours, theirs = (one.modules[first.removesuffix(".weight")] for one in (editor, other))
    assert (
        float((ours - theirs).norm() / (theirs - ModelView(make_model("llama", torch.float64)).weight(0)).norm()) < 1e-7
    )


def test_what_the_first_batch_decided_holds_for_the_next_ones_and_goes_with_it():
    editor = editor_of("alphaedit", clamp_norm_factor=AUTO)
    assert editor.resolved == {}
    before = weights(editor)
    result = editor.edit(REQUESTS[:2])
    resolved = editor.resolved
    assert result.resolved == resolved and resolved["clamp_norm_factor"] in CLAMPS and set(resolved["L2"]) == {0, 1}
    after = weights(editor)
    editor.edit(REQUESTS[2:])
    assert editor.resolved == resolved
    editor.rollback()
    assert editor.resolved == resolved and same(editor, after)
    editor.rollback()
    assert editor.resolved == {} and same(editor, before)
    editor.edit(REQUESTS[2:])
    assert editor.resolved["L2"] != resolved["L2"]
    editor.restore()
    editor.edit(REQUESTS[:2])
    assert editor.resolved == resolved and same(editor, after)  # as if nothing had been before


@pytest.mark.parametrize("method", ("memit", "alphaedit", "encore"))
def test_a_batch_that_fails_decides_nothing(method, monkeypatch):
    editor = editor_of(method, clamp_norm_factor=AUTO)
    before, write = weights(editor), type(editor.ledger).write

    def failing(self, name, weight, update):
        if ".1." in name:
            raise KeyboardInterrupt
        return write(self, name, weight, update)

    monkeypatch.setattr(type(editor.ledger), "write", failing)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(REQUESTS[:1])
    assert editor.resolved == {} and same(editor, before) and not editor.solver_state.memories
    monkeypatch.undo()
    editor.edit(REQUESTS[1:])
    other = editor_of(method, clamp_norm_factor=AUTO)
    other.edit(REQUESTS[1:])
    assert editor.resolved == other.resolved and same(editor, weights(other))


@pytest.mark.parametrize("method", ("alphaedit", "encore", "memit-sequential"))
def test_a_saved_state_has_what_was_decided(tmp_path, method):
    path = tmp_path / "state.safetensors"
    editor = editor_of(method, clamp_norm_factor=AUTO)
    editor.edit(REQUESTS[:2])
    editor.save_state(path)
    other = editor_of(method, clamp_norm_factor=AUTO)
    other.view.model.load_state_dict(editor.view.model.state_dict())
    other.load_state(path)
    assert other.resolved == editor.resolved
    for one in (editor, other):
        one.edit(REQUESTS[2:])
    assert same(editor, weights(other)) and other.resolved == editor.resolved
    other.rollback()
    assert other.resolved == editor.resolved  # it is of the batches before, which cannot be undone here
    with pytest.raises(StatisticsError, match="residual_share"):
        editor_of(method, residual_share=0.4).load_state(path)
    with safe_open(path, "pt") as file:
        assert set(json.loads(file.metadata()["resolved"])) == {"scales", "clamp_norm_factor"}


def test_a_state_of_numbers_is_as_it_was_before_there_was_auto(tmp_path):
    editor = editor_of("alphaedit", L2=2.0)
    editor.edit(REQUESTS[:1])
    editor.save_state(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        metadata = file.metadata()
    assert "resolved" not in metadata and "residual_share" not in metadata["belongs"]
    assert "v_lr_scale" not in editor.hparams.identity("value")
    automatic = replace(editor.hparams, v_lr=AUTO)
    assert automatic.identity("value")["v_lr_scale"] == 0.5


def fake_values(losses, status=Status.COMPLETED):
    count = len(losses)
    deltas, steps = torch.zeros(1, 2, count), torch.ones(count, dtype=torch.int64)
    return Values(("block",), deltas.double(), deltas, torch.tensor(losses), steps, torch.full((count,), int(status)))


@pytest.mark.parametrize(
    ("losses", "chosen", "tried"),
    (
        ({0.75: [0.1, 0.5, 9.0]}, 0.75, 1),
        ({0.75: [0.6, 0.6, 0.1], 1.0: [0.4, 0.4, 9.0]}, 1.0, 2),
        ({0.75: [3.0], 1.0: [2.0], 2.0: [0.9], 4.0: [1.5]}, 2.0, 4),
        ({0.75: [3.0], 1.0: [2.0], 2.0: [0.9], 4.0: [0.49]}, 4.0, 4),
        ({0.75: [float("nan"), 0.2]}, 0.75, 1),
    ),
)
def test_the_clamp_is_the_first_that_suffices(losses, chosen, tried, caplog):
    seen = []

    def find(hparams):
        seen.append(hparams.clamp_norm_factor)
        return fake_values(losses[hparams.clamp_norm_factor])

    with caplog.at_level(logging.WARNING, "kedit_fast"):
        assert (
            choose_clamp(Hparams("memit", (1,), 2, 0.1, clamp_norm_factor=AUTO, mom2_update_weight=1.0), find) == chosen
        )
    assert seen == list(CLAMPS[:tried]) and bool(caplog.records) == (min(map(min, losses.values())) > 0.5)


def test_values_of_the_trial_are_used_again(monkeypatch):
    """Of two requests, on which the clamp is tried: the batch optimizes no value of them again."""
    optimized = []
    from kedit_fast.editing.values import shared

    def counting(view, prepared, *args, **kwargs):
        optimized.append(len(prepared))
        return find_values(view, prepared, *args, **kwargs)

    monkeypatch.setattr(shared, "find_values", counting)
    monkeypatch.setattr(clamp, "LOSS_BOUND", 1e9)
    editor = editor_of("memit", clamp_norm_factor=AUTO)
    editor.edit(REQUESTS)
    assert optimized == [len(REQUESTS)] and editor.resolved["clamp_norm_factor"] == 0.75
    store = ValueFile(None)
    stored = editor_of("memit", clamp_norm_factor=AUTO)
    stored.values = store
    stored.edit(REQUESTS)
    assert len(store.entries) == len(REQUESTS) and same(stored, weights(editor))
    plain = editor_of("memit", clamp_norm_factor=0.75)
    plain.edit(REQUESTS)
    assert same(plain, weights(editor))


def test_trial_requests_are_spread_over_the_batch():
    assert trial_places(3) == [0, 1, 2] and trial_places(16) == list(range(16))
    places = trial_places(1000)
    assert len(places) == 16 and places[0] == 0 and places[-1] == 999 and places == sorted(places)


@pytest.mark.parametrize("name", ("v_lr", "clamp_norm_factor", "mom2_update_weight"))
def test_auto_is_a_value_and_other_words_are_not(name):
    good = {"v_num_grad_steps": 2, "v_lr": 0.1, "clamp_norm_factor": 1.0, "mom2_update_weight": 1.0}
    assert getattr(Hparams("memit", (1,), **{**good, name: AUTO}), name) == AUTO
    for bad in ("fast", "", 0, -1.0, float("nan")):
        with pytest.raises(MethodError, match=f'{name}.*or "auto"'):
            Hparams("memit", (1,), **{**good, name: bad})
    assert parse_values({name: " Auto "}, "here")[name] == AUTO and parse_values({name: "5e-1"}, "here")[name] == 0.5
    with pytest.raises(MethodError, match=r'is not a float \| "auto"'):
        parse_values({name: "automatic"}, "here")


def test_what_contradicts_auto_is_refused_or_said(caplog):
    with pytest.raises(MethodError, match="update_norm_lambda"):
        editor_of("encore", update_norm_lambda=3.0)
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        editor_of("memit", mom2_update_weight=10.0, residual_share=0.1, v_lr_scale=0.2)
    assert "residual_share has no effect" in caplog.text and "v_lr_scale has no effect" in caplog.text
    editor = editor_of("alphaedit")
    with pytest.raises(MethodError, match='L2 = "auto"'):
        editor.set_key_memories({0: KeyMemory(editor.preconditioner(0))})
    editor.set_key_memories({})  # no earlier keys
    view = ModelView(make_model("llama"))
    hparams = editor_of("memit", clamp_norm_factor=AUTO).hparams
    prepared = prepare(editor.tokenizer, REQUESTS[:1], PREFIXES, 128)
    with pytest.raises(EditError, match="choose_clamp"):
        find_values(view, prepared, 1, "block", hparams)


def test_keys_outside_of_the_null_space_are_named():
    editor = editor_of("alphaedit")
    space = editor.preconditioner(0)
    editor.solver_state._preconditioners[0] = replace(space, basis=torch.zeros_like(space.basis), complement=False)
    with pytest.raises(KeditError, match=r"layer 0.*leaves free"):
        editor.edit(REQUESTS[:1])


@pytest.mark.parametrize("method", [name for name, recipe in RECIPES.items() if recipe.optimizes_values])
def test_a_model_without_a_preset_gets_no_absolute_scale(method):
    config = make_model("llama").config
    hparams, origin = make_hparams(method, config)
    assert origin.startswith("guess") and "scaled to the model" in origin
    assert hparams.v_lr == hparams.clamp_norm_factor == hparams.v_weight_decay == AUTO
    recipe = find_recipe(method)
    if recipe.is_batched:
        assert hparams.scale_name == ("L2" if recipe.uses_null_space else "mom2_update_weight")
    if recipe.uses_null_space:
        assert hparams.nullspace_rule == "energy"
    if recipe.name == "encore":
        assert hparams.update_norm_lambda == AUTO


def test_a_patch_records_what_was_decided(tmp_path):
    from kedit_fast.patches.patch import Patch

    editor = editor_of("memit", clamp_norm_factor=AUTO)
    editor.edit(REQUESTS)
    editor.patch().save(tmp_path / "p.safetensors")
    configuration = Patch.load(tmp_path / "p.safetensors").configuration
    assert configuration["clamp_norm_factor"] == editor.resolved["clamp_norm_factor"]
    assert configuration["mom2_update_weight"] == {
        str(layer): scale for layer, scale in editor.resolved["mom2_update_weight"].items()
    }


def test_another_state_on_the_same_model_can_be_used_again(monkeypatch):
    """As trials do: the factors of the same layers and numbers, whatever the residual share."""
    first = editor_of("alphaedit", residual_share=0.3)
    first.edit(REQUESTS)
    first.restore()

    def editor(**numbers):
        hparams = {**vars(first.hparams), **numbers}
        hparams.pop("method")
        other = Editor(first.view.model, first.tokenizer, "alphaedit", statistics=first.statistics, hparams=hparams,
                       prefixes=PREFIXES)  # fmt: skip
        other.solver_state.adopt(first.solver_state)
        return other

    monkeypatch.setattr(NullSpace, "from_covariance", lambda *args: pytest.fail("factored again"))
    editor(residual_share=0.1).edit(REQUESTS)
    first.view.model.load_state_dict(make_model("llama", torch.float64).state_dict())
    editor(layers=(1,)).edit(REQUESTS)
    first.view.model.load_state_dict(make_model("llama", torch.float64).state_dict())
    with pytest.raises(pytest.fail.Exception):
        editor(nullspace_threshold=0.2).edit(REQUESTS)
