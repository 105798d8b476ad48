"""UltraEdit's gradients: one backward pass for several modules and requests against one request at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, make_model, make_tokenizer

from benchmarks.published import serial_gradients
from kedit_fast.editing import gradients
from kedit_fast.editing.gradients import answer_gradients
from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare
from kedit_fast.requests.request import EditRequest

REQUESTS = [
    EditRequest("{} plays the", "Miles Davis", "violin and cello"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("Because you saw {}", "Ebro", "Spain, nobody"),
]


def prepared_for(kind):
    model = make_model(kind)
    view = ModelView(model)
    return model, view, prepare(make_tokenizer(), REQUESTS, (), 128)


@pytest.mark.parametrize("tokens", ("answer", "all"))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_one_request_at_a_time(kind, tokens, monkeypatch):
    monkeypatch.setattr(gradients, "BATCH_TOKENS", 24)  # more than one batch
    model, view, prepared = prepared_for(kind)
    names = [view.module_name(layer) for layer in (1, 2)]
    modules = [view.edited_module(layer) for layer in (1, 2)]
    required = [p.requires_grad for p in model.parameters()]
    found = answer_gradients(view, prepared, names, tokens)
    assert [p.requires_grad for p in model.parameters()] == required
    assert not any(m._forward_hooks for m in model.modules())
    for i, request in enumerate(prepared):
        keys, expected = serial_gradients(model, modules, request, every_token=tokens == "all")
        mine = found.request == i
        for name, key, gradient in zip(names, keys, expected, strict=True):
            rows = found.modules[name]
            assert rows.keys[mine].shape == key.shape
            torch.testing.assert_close(rows.keys[mine], key, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rows.gradients[mine], gradient, rtol=1e-3, atol=1e-6)
    counts = [len(r.target) if tokens == "answer" else len(r.rewriting[0].ids) + len(r.target) - 1 for r in prepared]
    assert found.request.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]


def test_what_is_not_finite_is_named():
    model, view, prepared = prepared_for("llama")
    only = set(prepared[1].rewriting[0].ids) - set(prepared[0].rewriting[0].ids) - set(prepared[2].rewriting[0].ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[only.pop()] = float("inf")
    with pytest.raises(EditError, match="Danielle Darrieux"):
        answer_gradients(view, prepared, [view.module_name(1)])


@pytest.mark.parametrize(
    "names, tokens, message",
    (
        (["model.layers.9.mlp.up_proj"], "answer", "no module"),
        (["model.norm"], "answer", "not a linear module"),
        ([], "answer", "no modules"),
        (["model.layers.1.mlp.up_proj"], "subject", "answer or all"),
    ),
)
def test_what_cannot_be_asked_for_is_refused(names, tokens, message):
    _, view, prepared = prepared_for("llama")
    with pytest.raises(InvalidArgumentError, match=message):
        answer_gradients(view, prepared, names, tokens)
