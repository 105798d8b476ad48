"""The pass that goes on from layer to layer against whole passes, with writes between."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, make_model, make_tokenizer

from benchmarks.published import keys_at
from kedit_fast.editing.keys import KeyPass, StateBudget
from kedit_fast.models.forward import Site, starts_midway
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare
from kedit_fast.requests.request import EditRequest

PREFIXES = ("The old tower. ", "Because I saw. ")
REQUESTS = [
    EditRequest("{} plays the", "Miles Davis", "violin"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("Because you saw {}", "Ebro", "Spain"),
]
LAYERS = (0, 1, 3)


def whole(model, view, prepared, layer, site):
    """Keys [u, contexts, d] and bare outputs [u, h] by full passes of the model as it is now."""
    every = [p.cut() for r in prepared for p in r.rewriting]
    keys = keys_at(model, view.edited_module(layer), every, output=False).double().unflatten(0, (len(prepared), -1))
    module = view.block(site.layer) if site.kind == "block" else view.mlp(site.layer)
    return keys, keys_at(model, module, [r.rewriting[0].cut() for r in prepared], output=True).double()


@pytest.mark.parametrize("budget", (None, StateBudget(device=0), StateBudget(device=6000)), ids=("all", "none", "some"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_incremental_pass_equals_whole_passes(kind, budget, monkeypatch):
    monkeypatch.setattr("kedit_fast.editing.keys.ROWS", 4)
    model = make_model(kind)
    view, site = ModelView(model), Site(3, "block")
    prepared = prepare(make_tokenizer(bos=True), REQUESTS, PREFIXES, 128)
    passes = KeyPass(view, prepared, site, "bare_half", budget)
    for layer in LAYERS:
        keys, outputs = whole(model, view, prepared, layer, site)
        seen = passes.at(layer)
        expected = (keys[:, 0] + keys[:, 1:].mean(1)) / 2
        torch.testing.assert_close(seen.keys.T, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.bare_keys.T, keys[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.outputs.T, outputs, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            view.weight(layer).add_(torch.randn_like(view.weight(layer)) * 0.05)
    torch.testing.assert_close(passes.outputs().T, whole(model, view, prepared, 3, site)[1], rtol=1e-4, atol=1e-4)
    kept = passes.stored_bytes
    assert bool(kept["recomputed"]) == (budget is not None) and bool(kept["device"]) == (
        budget != StateBudget(device=0)
    )
    assert "MiB on the device" in passes.report()


def test_blocks_below_the_last_layer_do_not_run_again():
    view = ModelView(make_model("llama"))
    prepared = prepare(make_tokenizer(), REQUESTS, PREFIXES, 128)
    runs, _ = [0] * view.num_layers, (view.head, view.once(starts_midway))  # what is tried once runs too
    for layer in range(view.num_layers):

        def count(*_, layer=layer):
            runs[layer] += 1

        view.mlp(layer).register_forward_hook(count)
    passes = KeyPass(view, prepared, Site(2, "block"), "bare_half")
    passes.at(1)
    assert runs == [2, 1, 1, 0]  # bare and prefixed prompts; the prefixed stop at the key
    passes.at(2)
    assert runs == [2, 3, 2, 0]  # block 0 is not run again


def test_the_mean_weighs_all_contexts_alike():
    view = ModelView(make_model("gpt2"))
    prepared = prepare(make_tokenizer(), REQUESTS, PREFIXES, 128)
    seen = KeyPass(view, prepared, Site(1, "mlp"), "mean").at(1)
    keys, _ = whole(view.model, view, prepared, 1, Site(1, "mlp"))
    torch.testing.assert_close(seen.keys.T, keys.mean(1), rtol=1e-4, atol=1e-6)
