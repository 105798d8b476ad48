"""Numbers without a scale: the same function in other units gets the same edit.

A Llama has two freedoms of scale. Inputs of the edited matrix: up_proj times s and down_proj / s. The residual stream:
all that writes into it times s, and the norms' eps times s^2. Neither changes the function that the model computes.
"""

from __future__ import annotations

import functools

import pytest
import torch
from floors import relative_error
from support import PREFIXES, REQUESTS
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, collect_statistics
from kedit_fast.editing.values.loop import find_values
from kedit_fast.methods.declaration import AUTO
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare

LAYERS = (0, 1)
VALUES = {"v_num_grad_steps": 4, "v_lr": 0.1, "clamp_norm_factor": 0.5, "mom2_ridge": 1e-3}
SHARE = {"mom2_update_weight": AUTO}
UNITS = (2.0**-7, 2.0**3)
ADAM = 1e-3
"""Adam's 1e-8 stands beside gradients, whose unit is one over the stream's: measured 5e-5 per unit of it for MEMIT."""
ENERGY = {"nullspace_rule": "energy", "nullspace_threshold": 0.3}


@functools.cache
def scaled(what, s):
    """A model in units of `s`, its tokenizer, and its statistics."""
    model, tokenizer = make_model("llama", torch.float64), make_tokenizer()
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        for block in model.model.layers:
            if what == "keys":
                block.mlp.up_proj.weight.mul_(s)
                block.mlp.down_proj.weight.div_(s)
            else:
                block.mlp.down_proj.weight.mul_(s)
                block.self_attn.o_proj.weight.mul_(s)
        if what == "stream":
            model.model.embed_tokens.weight.mul_(s)
            for module in model.modules():
                if hasattr(module, "variance_epsilon"):
                    module.variance_epsilon *= s * s
    return model, tokenizer, collect_statistics(model, tokenizer, TEXT * 2, LAYERS)


@functools.cache
def changes(what, s, method, numbers, layers=LAYERS):
    """What an edit adds to the weights, in units of the model with s = 1, and the numbers that it resolved to."""
    model, tokenizer, statistics = scaled(what, s)
    hparams = {**VALUES, **dict(numbers)}
    editor = Editor(model, tokenizer, method, statistics=statistics, layers=layers, hparams=hparams, prefixes=PREFIXES)
    before = [editor.view.weight(layer).clone() for layer in layers]
    editor.edit(REQUESTS[:2])
    units = s if what == "keys" else 1 / s
    after = [(editor.view.weight(layer) - old) * units for layer, old in zip(layers, before, strict=True)]
    resolved = editor.resolved
    editor.restore()
    assert all(float(change.norm()) > 0 for change in after)
    return torch.stack(after), resolved


def difference(what, s, method, numbers, layers=LAYERS):
    numbers = tuple(numbers.items())
    return relative_error(changes(what, s, method, numbers, layers)[0], changes(what, 1.0, method, numbers, layers)[0])


@pytest.mark.parametrize("what, s", [("keys", 0.01), ("keys", 100.0), ("stream", 2.0**-7), ("stream", 2.0**7)])
def test_the_scaled_model_is_the_same_function(what, s):
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        (ours, theirs) = (scaled(what, scale)[0](ids).logits for scale in (s, 1.0))
    assert relative_error(ours, theirs) < 1e-12
    moments = [scaled(what, scale)[2].moment(1).moment for scale in (s, 1.0)]
    assert relative_error(moments[0], moments[1] * (s * s if what == "keys" else 1)) < 1e-9


SCALE_FREE = [
    ("memit", SHARE),
    ("memit", {"mom2_update_weight": 10.0}),  # C has the keys' unit
    ("memit", {**SHARE, "mom2_adjustment": False}),
    ("memit", {**SHARE, "frobenius_limit": 1e-2}),
    ("memit", {**SHARE, "spectral_limit": 1e-2}),
    ("emmet", SHARE),
    ("emmet", {"mom2_update_weight": 10.0, "emmet_lambda": 0.3}),
    ("encore", {**SHARE, "update_norm_lambda": AUTO}),
    ("encore", {"mom2_update_weight": 10.0, "update_norm_lambda": AUTO}),
    ("alphaedit", {**ENERGY, "L2": AUTO}),
    ("alphaedit", {"nullspace_rule": "relative", "nullspace_threshold": 0.02, "L2": AUTO}),
    ("rect", SHARE),
    ("rome", {}),
]


@pytest.mark.parametrize("s", [0.01, 100.0])
@pytest.mark.parametrize("method, numbers", SCALE_FREE)
def test_an_edit_does_not_depend_on_the_unit_of_keys(method, numbers, s):
    assert difference("keys", s, method, numbers, (1,) if method == "rome" else LAYERS) < 1e-6


@pytest.mark.parametrize(
    "method, numbers",
    [
        ("encore", {"mom2_update_weight": 10.0, "update_norm_lambda": 1.0}),
        ("alphaedit", {**ENERGY, "L2": 1.0}),
        ("alphaedit", {"nullspace_rule": "absolute", "nullspace_threshold": 1.0, "L2": AUTO}),
        ("memit", {"mom2_update_weight": 10.0, "mom2_adjustment": False}),
    ],
)
def test_an_absolute_number_is_one_in_the_unit_of_keys(method, numbers):
    assert difference("keys", 4.0, method, numbers) > 1e-2


def test_what_auto_resolves_to_has_the_unit_of_keys_where_the_published_number_has_it():
    for method, numbers, name, power in (
        ("memit", SHARE, "mom2_update_weight", 0),
        ("alphaedit", {**ENERGY, "L2": AUTO}, "L2", 2),
    ):
        ours, base = (changes("keys", s, method, tuple(numbers.items()))[1][name] for s in (100.0, 1.0))
        for layer in LAYERS:
            assert ours[layer] == pytest.approx(base[layer] * 100.0**power, rel=1e-6)


@pytest.mark.parametrize("s", UNITS)
@pytest.mark.parametrize("site", ["block", "mlp", "attention and mlp"])
def test_values_have_the_unit_of_the_residual_stream(site, s):
    from kedit_fast.methods.presets import make_hparams

    numbers = {**VALUES, "v_lr": AUTO, "v_weight_decay": 0.0, "clamp_norm_factor": 2.0, "layers": LAYERS}
    targets = []
    for scale in (s, 1.0):
        model, tokenizer, _ = scaled("stream", scale)
        hparams, _ = make_hparams("memit", model.config, numbers)
        prepared = prepare(tokenizer, REQUESTS, PREFIXES, 128)
        values = find_values(ModelView(model), prepared, 1, site, hparams)
        assert float(values.deltas.norm()) > 0
        targets.append((values.all_deltas.double() / scale, values.losses))
    assert relative_error(targets[0][0], targets[1][0]) < ADAM
    torch.testing.assert_close(targets[0][1], targets[1][1], rtol=ADAM, atol=1e-6)


@pytest.mark.parametrize("s", UNITS)
@pytest.mark.parametrize("method", ["memit", "alphaedit", "encore", "pmet"])
def test_an_edit_without_absolute_numbers_has_the_unit_of_the_residual_stream(method, s):
    scale = {**ENERGY, "L2": AUTO} if method == "alphaedit" else SHARE
    numbers = {**scale, "v_lr": AUTO, "v_weight_decay": 0.0, "clamp_norm_factor": 2.0}
    numbers |= {"update_norm_lambda": AUTO} if method == "encore" else {}
    assert difference("stream", s, method, numbers) < ADAM


@pytest.mark.parametrize("numbers", [{"v_lr": 0.1, "v_weight_decay": 0.0}, {"v_lr": AUTO, "v_weight_decay": 0.5}])
def test_a_rate_and_a_decay_are_numbers_in_the_unit_of_the_residual_stream(numbers):
    """The decay is |delta| / |h0|^2, as published."""
    assert difference("stream", 2.0**-7, "memit", {**SHARE, **numbers}) > 1e-3
