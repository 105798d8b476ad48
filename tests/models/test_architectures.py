from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import KINDS, make_model, make_tokenizer

from kedit_fast.errors import InvalidArgumentError, UnsupportedModelError
from kedit_fast.models.architectures import (
    ARCHITECTURES,
    ArchSpec,
    require_decoder,
    spec_as_json,
    spec_from_json,
)
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.forward import Site, capture, last_states, pad
from kedit_fast.models.view import ModelView


@pytest.mark.parametrize(
    "config, message",
    (
        (dict(model_type="t5", is_encoder_decoder=True), "'t5' is an encoder-decoder"),
        (dict(model_type="clip", hidden_size=8), "the configuration of 'clip' has no num_hidden_layers"),
    ),
)
def test_configurations_of_no_decoder_are_refused_by_name(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        require_decoder(SimpleNamespace(**config))


def test_a_passed_spec_wins_and_a_wrong_one_is_named():
    model = make_model("llama")
    names = ("self_attn", "mlp", "mlp.down_proj", False, "model.norm")
    spec = ArchSpec("Homemade", ("homemade",), "model.layers", *names)
    assert ModelView(model, spec).spec.name == "Homemade"
    wrong = ArchSpec("Homemade", ("homemade",), "model.stages", *names)
    with pytest.raises(UnsupportedModelError, match=r"does not have the modules of Homemade .*stages"):
        ModelView(model, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_out_by_in_views_on_the_model(kind):
    model = make_model(kind)
    view = ModelView(model)
    weight = view.weight(1)
    assert tuple(weight.shape) == (32, 64)
    weight[0, 5] = 123.0
    stored = model.state_dict()[view.weight_name(1)]
    assert float(stored[5, 0] if view.spec.transposed else stored[0, 5]) == 123.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_partial_pass_sees_what_a_full_pass_sees(kind):
    model = make_model(kind)
    view = ModelView(model)
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    batch, positions = pad(rows, view.device), torch.tensor([3, 0, 2])
    seen, _ = capture(view, batch, [Site(1, "key"), Site(2, "block"), Site(2, "mlp")], positions)
    for i, row in enumerate(rows):
        kept = {}
        hooks = [
            view.edited_module(1).register_forward_pre_hook(lambda m, a, kept=kept: kept.__setitem__("key", a[0])),
            view.block(2).register_forward_hook(
                lambda m, a, o, kept=kept: kept.__setitem__("block", o[0] if isinstance(o, tuple) else o)
            ),
            view.mlp(2).register_forward_hook(lambda m, a, o, kept=kept: kept.__setitem__("mlp", o)),
        ]
        with torch.no_grad():
            model(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        at = int(positions[i])
        for site, name in ((Site(1, "key"), "key"), (Site(2, "block"), "block"), (Site(2, "mlp"), "mlp")):
            torch.testing.assert_close(seen[site][i], kept[name][0, at], rtol=1e-4, atol=1e-5)


def test_a_partial_pass_stops_after_the_last_site():
    view = ModelView(make_model("llama"))
    ran, _ = [], view.head  # the head is checked, by passes of the whole model
    hook = view.block(3).register_forward_hook(lambda *_: ran.append(1))
    capture(view, pad([[1, 2]], view.device), [Site(2, "block")])
    assert not ran
    last_states(view, pad([[1, 2]], view.device))
    hook.remove()
    assert ran


def test_layers_out_of_range_are_named():
    view = ModelView(make_model("gpt2"))
    with pytest.raises(InvalidArgumentError, match=r"layer 4 is out of range: the model has layers 0-3"):
        view.check_layers((0, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_ignore_dtype_and_edits_and_see_other_models(kind):
    tokenizer, model = make_tokenizer(), make_model(kind)
    stored = fingerprint(ModelView(model), tokenizer)
    with torch.no_grad():
        ModelView(model).weight(1).add_(1.0)
    assert difference(stored, fingerprint(ModelView(model), tokenizer)) == ""
    assert difference(stored, fingerprint(ModelView(make_model(kind).bfloat16()), tokenizer)) == ""
    assert "weights" in difference(stored, fingerprint(ModelView(make_model(kind, seed=1)), tokenizer))
    assert difference(stored, fingerprint(ModelView(model), make_tokenizer(bos=True))) == "tokenizer"
    assert "model_config" in difference(stored, fingerprint(ModelView(make_model(kind, layers=3)), tokenizer))


def test_longrope_models_take_what_their_short_factors_are_for():
    model = make_model("phi3")
    assert ModelView(model).max_length == 128
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 24}
    model.config.original_max_position_embeddings = 24
    for name in ("rope_parameters", "rope_scaling"):
        if getattr(model.config, name, None) is not None or name == "rope_scaling":
            setattr(model.config, name, rope)
    assert ModelView(model).max_length == 24


def test_a_containers_limit_counts_without_pages_that_can_be_given_back(tmp_path, monkeypatch):
    from kedit_fast.support import free_memory

    monkeypatch.setattr(free_memory, "ROOT", tmp_path)
    everything = free_memory.free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 500000\n")
    assert free_memory.free_bytes(torch.device("cpu")) == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory.free_bytes(torch.device("cpu")) > everything / 2


def test_a_spec_survives_its_file(tmp_path):
    file = tmp_path / "spec.json"
    for spec in ARCHITECTURES:
        file.write_text(spec_as_json(spec), encoding="utf-8")
        assert spec_from_json(file) == spec


def test_fields_with_a_default_may_be_left_out_of_a_file(tmp_path):
    spec = ArchSpec("Homemade", ("homemade",), "model.layers", "self_attn", "mlp", "mlp.down_proj", False, "model.norm")
    values = json.loads(spec_as_json(spec))
    del values["post_norm"]
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    assert spec_from_json(file) == spec


@pytest.mark.parametrize(
    "change, message",
    (
        ({"block": "h"}, "unknown field 'block'; an ArchSpec has name, model_types, blocks"),
        ({"blocks": None}, "'blocks' must be a text; got null"),
        ({"blocks": ""}, "'blocks' is empty"),
        ({"edit": "mlp..down_proj"}, "'edit' is no path of a module, .*'mlp..down_proj'"),
        ({"mlp": "mlp "}, "'mlp' is no path of a module"),
        ({"transposed": 0}, "'transposed' must be true or false; got 0"),
        ({"model_types": "llama"}, "'model_types' must be a list of texts; got \"llama\""),
        ({"model_types": [1]}, "'model_types' must be a list of texts"),
        ({"name": ["Llama"]}, "'name' must be a text"),
    ),
)
def test_a_wrong_field_of_a_file_is_named(tmp_path, change, message):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(json.loads(spec_as_json(ARCHITECTURES[0])) | change), encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=f"spec.json: {message}"):
        spec_from_json(file)


@pytest.mark.parametrize(
    "text, message",
    (
        ("{", "malformed JSON"),
        ("[]", "must hold one JSON object .* got list"),
        ('{"name": "A", "name": "B"}', "gives 'name' twice"),
        ('{"name": "A"}', "lacks the field 'model_types'; an ArchSpec needs name, model_types, blocks"),
    ),
)
def test_a_file_that_holds_no_spec_is_named(tmp_path, text, message):
    file = tmp_path / "spec.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=f"spec.json.*{message}"):
        spec_from_json(file)


def test_a_spec_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*none\.json: No such file"):
        spec_from_json(tmp_path / "none.json")
