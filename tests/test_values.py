"""Values against the serial loop of the published method, request by request."""

from __future__ import annotations

import statistics

import pytest
import torch
from tiny_models import KINDS, POST_NORM, make_model, make_tokenizer

from benchmarks.published import serial_value
from kedit_fast.editing.prompts import prepare
from kedit_fast.editing.requests import EditRequest
from kedit_fast.editing.values import optimise_values
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import make_hparams
from kedit_fast.models.architectures import ModelView

PREFIXES = ("The old tower. ", "Because I saw. ")
REQUESTS = [
    EditRequest("{} plays the", "Miles Davis", "violin and cello"),  # first, several target tokens
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),  # in the middle
    EditRequest("Because you saw {}", "Ebro", "Spain"),  # last, one or two tokens
    EditRequest("Ebro, and {} is located in", "Ebro", "Sweden, nobody"),  # occurs twice
    EditRequest("{}", "Autonomous University of Madrid", "French"),  # nothing but the subject
]


def prepared_and_hparams(model, tokenizer, what, layer, **values):
    numbers = dict(layers=(layer,), v_num_grad_steps=10, v_lr=0.1, clamp_norm_factor=0.5, **values)
    hparams, _ = make_hparams("memit" if what == "block" else "rome", model.config, numbers)
    return prepare(tokenizer, REQUESTS, PREFIXES, 128), hparams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "what, layer, bos", (("block", 0, False), ("block", 2, True), ("mlp", 0, True), ("mlp", 1, False))
)
def test_values_equal_the_published_serial_loop(kind, what, layer, bos):
    tokenizer, model = make_tokenizer(bos), make_model(kind)
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, what, layer)
    if what == "block" and kind in POST_NORM:
        with pytest.raises(EditError, match='use the site "mlp"'):
            optimise_values(view, prepared, layer, what, hparams)
        return
    values = optimise_values(view, prepared, layer, what, hparams)
    module = view.block(layer) if what == "block" else view.mlp(layer)
    errors = []
    for i, request in enumerate(prepared):
        alone = serial_value(model, [module], request, hparams, side=None)
        assert int(values.steps[i]) == alone.steps
        assert abs(float(values.losses[i]) - alone.loss) < 1e-3 * max(1.0, alone.loss)
        errors.append(float((values.targets[:, i] - alone.targets[0]).norm() / values.deltas[:, i].norm()))
    assert statistics.median(errors) < 3e-5 and max(errors) < 1e-4


def test_requests_that_stop_early_stop_where_the_serial_loop_does(demo_model, demo_statistics):
    from kedit_fast import demo

    model, tokenizer = demo_model
    view = ModelView(model)
    hparams, _ = make_hparams("memit", model.config, {"v_num_grad_steps": 12, "v_stop_loss": 0.4})
    prepared = prepare(tokenizer, demo.requests(4), ("The old man. ",), 256)
    values = optimise_values(view, prepared, 1, "block", hparams)
    stops = []
    for i, request in enumerate(prepared):
        alone = serial_value(model, [view.block(1)], request, hparams)
        stops.append(alone.steps)
        assert int(values.steps[i]) == alone.steps
        assert float((values.targets[:, i] - alone.targets[0]).norm() / values.deltas[:, i].norm()) < 1e-4
    assert len(set(stops)) > 1, "the requests should not all stop at the same step"


def test_the_batch_a_request_is_in_does_not_matter():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1)
    together = optimise_values(ModelView(model), prepared, 1, "block", hparams)
    for i, request in enumerate(prepared):
        alone = optimise_values(ModelView(model), [request], 1, "block", hparams)
        assert torch.allclose(alone.targets[:, 0], together.targets[:, i], rtol=1e-4, atol=1e-5)


def test_the_norm_of_delta_is_clamped():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1, v_weight_decay=0.0)
    values = optimise_values(ModelView(model), prepared, 1, "block", hparams)
    start = values.targets - values.deltas
    assert bool((values.deltas.norm(dim=0) <= 0.5 * start.norm(dim=0) * (1 + 1e-5)).all())


def test_the_model_is_left_as_it_was():
    tokenizer, model = make_tokenizer(), make_model("gpt2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1)
    optimise_values(ModelView(model), prepared, 1, "block", hparams)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_says_nan_is_refused_by_request():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EditError, match="not finite"):
        optimise_values(ModelView(model), prepared, 1, "block", hparams)
