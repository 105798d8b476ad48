"""The routing shift of a mixture of experts, against hooks on its routers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support import NUMBERS, REQUESTS
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import collect_statistics
from kedit_fast.evaluation.routing import MOST_TOKENS, RoutingShift, routing_probe
from kedit_fast.models.patching import patches_on
from kedit_fast.models.view import ModelView
from kedit_fast.workflow import run_edits

TEXTS = ["A gray cat slept on the old tower.", "Nobody waited.", *TEXT]


@pytest.fixture(scope="module")
def mixture():
    return make_model("qwen3_moe")


@torch.no_grad()
def choices(model, tokenizer, texts, layers):
    """Layer -> the set of experts of every token, one text at a time, by hooks on the experts."""
    sets = {layer: [] for layer in layers}

    def hook(layer):
        def see(module, args, kwargs):
            index = [*args, *kwargs.values()][1]
            sets[layer] += [frozenset(row) for row in index.tolist()]

        return see

    handles = [
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer in layers
    ]
    for text in texts:
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return sets


def by_hand(before, after):
    return {layer: sum(a != b for a, b in zip(before[layer], after[layer], strict=True)) for layer in before}


def test_the_shift_is_that_of_each_token_alone(mixture):
    model, tokenizer = copy.deepcopy(mixture), make_tokenizer()
    probe = routing_probe(ModelView(model), tokenizer, TEXTS, above=0)
    assert probe is not None and probe.layers == (1, 2, 3)
    assert probe.shift() == RoutingShift({1: 0, 2: 0, 3: 0}, probe.tokens)
    before = choices(model, tokenizer, TEXTS, probe.layers)
    assert probe.tokens == len(before[1])
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(1.3)
    shift = probe.shift()
    assert shift.changed == by_hand(before, choices(model, tokenizer, TEXTS, probe.layers))
    assert 0 < shift.share < 1 and shift.share == sum(shift.changed.values()) / (3 * probe.tokens)
    assert RoutingShift.from_dict(json.loads(json.dumps(shift.as_dict()))) == shift
    assert not patches_on(model)


def test_an_edit_does_not_move_the_router_of_its_layer_or_of_those_below(mixture):
    model = copy.deepcopy(mixture)
    probe = routing_probe(ModelView(model), make_tokenizer(), TEXTS, above=None)
    assert probe is not None
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj.mul_(2.0)
    shift = probe.shift()
    assert {layer for layer, count in shift.changed.items() if count} == {3}
    assert routing_probe(ModelView(model), make_tokenizer(), TEXTS, above=3) is None  # no layer is above


def test_models_without_experts_have_no_probe():
    assert routing_probe(ModelView(make_model("llama")), make_tokenizer(), TEXTS, above=0) is None


def test_long_text_is_cut(mixture):
    probe = routing_probe(ModelView(mixture), make_tokenizer(), [f"{i} {TEXT[0]}" for i in range(500)], above=0)
    assert probe is not None
    assert probe.tokens == MOST_TOKENS


def test_every_batch_of_a_run_reports_its_shift(mixture, tmp_path):
    model, tokenizer = copy.deepcopy(mixture), make_tokenizer()
    statistics = collect_statistics(model, tokenizer, TEXT * 2, (1, 2), progress=False)
    texts = ["A gray cat slept on the old tower.", "Nobody waited beside Ebro.", "Miles Davis plays the trumpet."]
    before = choices(model, tokenizer, texts[:2], (2, 3))  # the third text names an edited subject
    numbers = {**NUMBERS, "mom2_update_weight": 10.0, "layers": (1, 2), "v_lr": 0.5}

    def ran(folder):
        return run_edits(
            model, tokenizer, REQUESTS, "memit", statistics=statistics, hparams=numbers, batch_size=1,
            irrelevant=texts, checkpoint=folder, on_error="skip",
        )  # fmt: skip

    report = ran(tmp_path / "run")
    assert len(report.routing) == len(report.results) == 3
    assert report.routing[-1].changed == by_hand(before, choices(model, tokenizer, texts[:2], (2, 3)))
    entry = json.loads(json.dumps(report.as_dict()))["routing"]
    assert entry["share"] == entry["share_after_each_batch"][-1] == report.routing[-1].share > 0
    report.editor.restore()
    again = ran(tmp_path / "run")  # from the checkpoint
    assert again.routing == report.routing
    again.editor.restore()
