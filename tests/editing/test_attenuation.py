"""SPHERE's attenuation as a hyper-parameter of every batched method, written through the editor."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error
from support import REQUESTS, make_editor, same, weights

from kedit_fast.methods.registry import RECIPES
from kedit_fast.solver.low_rank import MaskedUpdate
from kedit_fast.solver.shaping import attenuate, main_directions, rect

NAME = "model.layers.1.mlp.down_proj.weight"
BATCHED = tuple(
    name
    for name, recipe in RECIPES.items()
    if recipe.is_batched and not recipe.uses_null_space and recipe.values == "block"
)


def edited(method, **numbers):
    editor = make_editor("llama", method, torch.float64, layers=(1,), mom2_update_weight=10.0, **numbers)
    return editor, weights(editor)[NAME], editor.edit(REQUESTS)


@pytest.mark.parametrize("method", BATCHED)
def test_every_batched_method_takes_it_and_writes_what_it_says(method):
    editor, before, result = edited(method, sphere_strength=0.8, sphere_energy=0.4)
    (update,) = result.updates[NAME]
    (plain,) = edited(method)[2].updates[NAME]
    directions = main_directions(before, 0.4)
    expected = plain if not isinstance(plain, MaskedUpdate) else None
    if expected is None:  # RECT: the mask comes last
        whole = edited(method, rect_keep=1.0)[2].updates[NAME][0]
        expected = rect(attenuate(whole, directions, 0.8), before, editor.hparams.rect_keep)
    else:
        expected = attenuate(plain, directions, 0.8)
    assert relative_error(update.dense(), expected.dense()) < 1e-8
    assert update.rank == plain.rank == len(REQUESTS)
    assert relative_error(editor.view.weight(1), before + update.dense()) < 1e-12
    editor.finish()
    editor.restore()
    assert torch.equal(editor.view.weight(1), before)


def test_the_directions_follow_the_weight():
    editor, before, first = edited("memit", sphere_strength=1.0, sphere_energy=0.4, v_lr=1.0, clamp_norm_factor=4.0)
    middle = editor.view.weight(1).clone()
    (second,) = editor.edit([REQUESTS[0]]).updates[NAME]
    for weight, update, zero in (
        (before, first.updates[NAME][0], True),
        (middle, second, True),
        (before, second, False),
    ):
        part = float((update.dense() @ main_directions(weight, 0.4)).norm() / update.norm())
        assert (part < 1e-9) == zero


def test_gradient_methods_take_it_and_rank_one_methods_do_not(caplog):
    numbers = {"lr": 1e-2, "token": "ans", "layers": (1,)}
    editor = make_editor("llama", "ultraedit", torch.float64, **numbers, sphere_strength=1.0)
    before = editor.view.weight(1).clone()
    (update,) = editor.edit(REQUESTS).updates[NAME]
    assert float((update.dense() @ main_directions(before)).norm()) < 1e-9 * update.norm()
    plain = make_editor("llama", "rome", torch.float64)
    caplog.clear()
    other = make_editor("llama", "rome", torch.float64, sphere_strength=1.0)
    assert "rome does not use sphere_strength" in caplog.text
    plain.edit(REQUESTS[:1])
    other.edit(REQUESTS[:1])
    assert same(plain, weights(other))
