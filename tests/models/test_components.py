"""Opened attention: what a visitor sees, what it changes, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, POST_NORM, make_model, needs_experts

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.components import HEAD_INPUTS, Visitor, open_components
from kedit_fast.models.forward import TokenBatch, evaluating, last_states
from kedit_fast.models.patching import patches_on
from kedit_fast.models.view import ModelView

BATCH = TokenBatch(torch.tensor([[7, 20, 33, 46], [9, 21, 35, 90]]), None)


@torch.no_grad()
def states(components, visitor):
    with evaluating(components.view), components.running(visitor):
        return last_states(components.view, BATCH)


@pytest.fixture(scope="module", params=KINDS)
def components(request):
    return open_components(ModelView(make_model(request.param, layers=2)))


class Everything(Visitor):
    """A copy of all it sees, put in its place."""

    def __init__(self):
        self.places = []

    def entering(self, states):
        self.places.append("entering")
        return states.clone()

    def last(self, states):
        self.places.append("last")
        return states.clone()

    def _at(place):
        def see(self, layer, *rest):
            self.places.append((place, layer, *rest[:-1]))
            return rest[-1].clone()

        return see

    attention_input, head_input, mixed = _at("attention in"), _at("y"), _at("z")
    attention_output, mlp_input, mlp_output = _at("attention out"), _at("mlp in"), _at("mlp out")


def test_copies_in_all_places_change_nothing(components):
    visitor = Everything()
    expected = states(components, Visitor())
    torch.testing.assert_close(states(components, visitor), expected, rtol=1e-5, atol=1e-5)
    heads = 0 if components.attention_whole else 4  # q, k, v and z
    assert len(visitor.places) == len(set(visitor.places)) == 2 + 2 * (4 + heads)
    assert visitor.places[0] == "entering" and visitor.places[-1] == "last"
    assert not patches_on(components.view.model)


@pytest.mark.parametrize("components", [kind for kind in KINDS if kind not in POST_NORM], indirect=True)
def test_one_head_reads_another_state(components):
    """A head whose keys are computed from a changed state gives what a changed weight of that head alone gives."""
    seen = {}

    class Change(Visitor):
        def attention_input(self, layer, states):
            if layer == 1:
                seen["x"] = states

        def head_input(self, layer, kind, y):
            if layer == 1 and kind == self.kind:
                assert y.shape == (2, 4, components.heads, components.head_size)
                torch.testing.assert_close(y, components.project(layer, kind, seen["x"]), rtol=1e-5, atol=1e-5)
                changed = y.clone()
                changed[:, :, 1] = components.project(layer, kind, seen["x"].flip(-1), head=1)
                return changed
            return None

        def mixed(self, layer, z):
            if layer == 1:
                seen["z"] = z

    plain = Change()
    plain.kind = ""
    states(components, plain)
    before = seen["z"]
    for kind in HEAD_INPUTS:
        visitor = Change()
        visitor.kind = kind
        states(components, visitor)
        changed = (seen["z"] - before).abs().amax((0, 1, 3))  # by head
        assert float(changed[1]) > 1e-3
        assert float(changed[[0, 2, 3]].max()) < 1e-5


def test_an_mlp_alone_reads_another_state(components):
    seen = {}

    class Change(Visitor):
        def mlp_input(self, layer, states):
            return states.flip(-1) if layer == 0 and self.active else None

        def mlp_output(self, layer, output):
            seen["mlp", layer] = output

        def attention_output(self, layer, output):
            seen["attention", layer] = output

    results = []
    for active in (False, True):
        visitor = Change()
        visitor.active = active
        states(components, visitor)
        results.append(dict(seen))
    torch.testing.assert_close(results[0]["attention", 0], results[1]["attention", 0])
    assert float((results[0]["mlp", 0] - results[1]["mlp", 0]).abs().max()) > 1e-3


def test_post_norm_blocks_have_attention_as_one_node(components):
    is_post_norm = components.view.spec.name in ("Gemma 2", "Gemma 3", "OLMo 2")
    assert components.attention_whole == is_post_norm and len(POST_NORM) == 3


@needs_experts
@pytest.mark.parametrize("kind", ("qwen3_moe", "mixtral", "gpt_oss"))
def test_attention_of_mixtures_is_opened(kind):
    components = open_components(ModelView(make_model(kind, layers=2)))
    assert (components.heads, components.groups) == (4, 2)


@needs_experts
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "deepseek_v3",
            r"model.layers.0.self_attn \(DeepseekV3Attention\) cannot be opened into heads: it has q_a_proj",
        ),
        ("olmoe", r"model.layers.0.self_attn \(OlmoeAttention\) does not run with keys and values for each"),
        ("granitemoe", "model.layers.0: that the MLP reads the sum of what is before it does not hold"),
    ],
)
def test_other_attention_is_refused_by_name(kind, message):
    with pytest.raises(UnsupportedModelError, match=message):
        open_components(ModelView(make_model(kind, layers=2)))


def test_an_adapter_is_refused_by_name():
    model = make_model("llama", layers=1)

    class Lora(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.weight = base.weight

        def forward(self, x):
            return self.base_layer(x) + 0.1

    model.model.layers[0].self_attn.q_proj = Lora(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.q_proj"):
        open_components(ModelView(model))
