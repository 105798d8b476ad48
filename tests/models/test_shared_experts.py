"""Shared experts as a block of the stack, and alone: keys, weights, specs and refusals, against plain hooks in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import SPECIAL, make_model, make_tokenizer, needs_experts
from transformers import AutoConfig, AutoModelForCausalLM

from kedit_fast import Editor
from kedit_fast.editing.values.store import edited_hash
from kedit_fast.errors import InvalidArgumentError, MethodError, UnsupportedModelError
from kedit_fast.models.architectures import spec_as_json, spec_from_json
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.forward import Site, capture, evaluating, pad, require_passes
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.loading import empty_model
from kedit_fast.models.row_runner import row_pass
from kedit_fast.models.view import ModelView

pytestmark = needs_experts
SHARED = {"deepseek_v3": "mlp.shared_experts.down_proj", "qwen2_moe": "mlp.shared_expert.down_proj"}
GATES = {"deepseek_v3": "", "qwen2_moe": "mlp.shared_expert_gate"}
ROWS = [[5, 17, 301, 44, 90, 12, 7], [9, 201, 33, 150, 60]]
LAYER = 2


@pytest.fixture(scope="module")
def models():
    return {kind: make_model(kind, torch.float64) for kind in SHARED}


def view_of(model, how):
    return ModelView(model, find_spec(model, how))


@torch.no_grad()
def seen(model, kind, layer, rows=ROWS):
    """Inputs of the shared experts' last layer, times their gates, [T, m_s]; and outputs [T, h] of the MLP around."""
    block, parts = model.model.layers[layer], {}
    last = block.get_submodule(SHARED[kind])
    handles = [
        last.register_forward_pre_hook(lambda module, args: parts.setdefault("inputs", args[0])),
        block.mlp.register_forward_hook(lambda module, args, output: parts.setdefault("mlp", output)),
    ]
    if GATES[kind]:
        gate = block.get_submodule(GATES[kind])
        handles.append(gate.register_forward_hook(lambda module, args, output: parts.setdefault("gate", output)))
    batch = pad(rows, torch.device("cpu"))
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    inputs = parts["inputs"].flatten(0, -2)
    if "gate" in parts:
        inputs = inputs / (1 + (-parts["gate"].flatten(0, -2)).exp())
    return inputs, parts["mlp"].flatten(0, -2)


def keys_of(view, layer=LAYER, positions=None, of=None):
    site = Site(layer, "key")
    with evaluating(view):
        return capture(view, pad(ROWS, view.device), [site], positions, rows=of)[0][site]


@pytest.mark.parametrize("kind", SHARED)
def test_stacked_keys_times_the_stacked_matrix_are_what_the_mlp_puts_out(models, kind):
    model = models[kind]
    view, left = view_of(model, "stack"), ModelView(model)
    keys, outputs = keys_of(view).flatten(0, 1), seen(model, kind, LAYER)
    size = left.edited_shape(LAYER)[1]
    assert torch.equal(keys[:, :size], keys_of(left).flatten(0, 1))
    assert torch.allclose(keys[:, size:], outputs[0], rtol=0, atol=1e-12)
    matrix = view.edited_matrix(LAYER)
    assert tuple(matrix.shape) == view.edited_shape(LAYER) == (32, size + outputs[0].shape[1])
    assert torch.allclose(keys @ matrix.T, outputs[1], rtol=0, atol=1e-11)
    some = keys_of(view, positions=torch.tensor([6, 2]), of=torch.tensor([0, 1]))
    assert torch.allclose(some, keys[[6, 7 + 2]], rtol=0, atol=1e-12)
    require_passes(view, [Site(LAYER, "key"), Site(LAYER, "mlp"), Site(LAYER, "block")])


@pytest.mark.parametrize("kind", SHARED)
def test_the_key_of_shared_experts_alone_is_their_gated_activation(models, kind):
    model = models[kind]
    view = view_of(model, "alone")
    assert view.module_name(LAYER) == f"model.layers.{LAYER}.{SHARED[kind]}" and view.experts(LAYER) is None
    keys, (expected, before) = keys_of(view).flatten(0, 1), seen(model, kind, LAYER)
    assert torch.allclose(keys, expected, rtol=0, atol=1e-12)
    require_passes(view, [Site(LAYER, "key"), Site(LAYER, "mlp"), Site(LAYER, "block")])
    delta = torch.randn(view.edited_shape(LAYER), dtype=torch.float64)
    weight = view.weight(LAYER)
    original = weight.clone()
    weight.add_(delta)
    after = seen(model, kind, LAYER)[1]
    weight.copy_(original)
    assert torch.allclose(after - before, keys @ delta.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", SHARED)
def test_specs_name_shared_experts_and_are_written_and_read(models, kind, tmp_path):
    stack, alone = (find_spec(models[kind], how) for how in ("stack", "alone"))
    assert (stack.edit, stack.shared, stack.shared_gate) == ("mlp.experts", SHARED[kind], GATES[kind])
    assert (alone.edit, alone.shared, alone.shared_gate) == (SHARED[kind], "", GATES[kind])
    assert find_spec(models[kind], "leave") == find_spec(models[kind]) == replace(stack, shared="", shared_gate="")
    (tmp_path / "spec.json").write_text(spec_as_json(stack))
    assert spec_from_json(tmp_path / "spec.json") == stack
    assert find_spec(empty_model(models[kind].config), "stack").shared == SHARED[kind]


def test_fingerprints_and_hashes_know_the_edited_matrices(models):
    model, tokenizer = models["qwen2_moe"], make_tokenizer()
    left, stack = ModelView(model), view_of(model, "stack")
    before, hashes = fingerprint(stack, tokenizer), [edited_hash(view) for view in (left, stack)]
    assert "names of the weights that are not edited" in difference(fingerprint(left, tokenizer), before)
    weight = stack.shared_experts(LAYER).weight
    original = weight.clone()
    weight.add_(1.0)
    assert difference(before, fingerprint(stack, tokenizer)) == ""
    assert edited_hash(left) == hashes[0] and edited_hash(stack) != hashes[1]
    weight.copy_(original)


FAMILIES = {
    "glm4_moe": dict(n_routed_experts=6, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1),
    "ernie4_5_moe": dict(moe_num_experts=6, moe_k=2, moe_num_shared_experts=2, moe_layer_start_index=1),
    "hunyuan_v1_moe": dict(num_experts=4, moe_topk=2),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_have_the_same_form(kind):
    sizes = dict(
        vocab_size=400, num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, moe_intermediate_size=24, num_experts_per_tok=2, **SPECIAL,
    )  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **FAMILIES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    model = model.float().eval()
    for how in ("stack", "alone"):
        view = view_of(model, how)
        require_passes(view, [Site(LAYER, "key"), Site(LAYER, "mlp"), Site(LAYER, "block")])
        with evaluating(view):
            key, mlp = Site(LAYER, "key"), Site(LAYER, "mlp")
            states, _ = capture(view, pad(ROWS, view.device), [key, mlp])
        if how == "stack":
            assert torch.allclose(states[key] @ view.edited_matrix(LAYER).T, states[mlp], rtol=1e-4, atol=1e-6)
            assert float(states[mlp].abs().max()) > 1e-4


@pytest.mark.parametrize("how", ("stack", "alone"))
def test_models_without_shared_experts_are_refused_by_name(how):
    for kind in ("qwen3_moe", "llama"):
        with pytest.raises(UnsupportedModelError, match=f"shared_experts = '{how}'.*'leave' edits mlp"):
            find_spec(make_model(kind, layers=2), how)


def test_wrong_names_and_modules_that_compute_something_else_are_refused(models):
    model = models["qwen2_moe"]
    spec = find_spec(model, "stack")
    with pytest.raises(InvalidArgumentError, match="leave, stack, alone"):
        find_spec(model, "both")
    for changes, says in (
        ({"shared": "mlp.common.down_proj"}, "does not have the shared experts"),
        ({"shared": "mlp.shared_expert"}, "not the last linear layer"),
        ({"shared_gate": "mlp.shared_expert.up_proj"}, "a gate of several numbers"),
        ({"mlp": "mlp.experts"}, "a block of the stack of experts in"),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            ModelView(model, replace(spec, **changes))
    for how, site in (("stack", "mlp"), ("alone", "mlp")):
        ungated = ModelView(model, replace(find_spec(model, how), shared_gate=""))
        with pytest.raises(UnsupportedModelError, match=r"is not the sum|does not reach"):
            require_passes(ungated, [Site(LAYER, "key"), Site(LAYER, site)])


def test_a_gated_layer_is_solved_for_and_not_tuned(models):
    model = models["qwen2_moe"]
    with pytest.raises(UnsupportedModelError, match="behind a gate"):
        row_pass(view_of(model, "alone"), LAYER)
    with pytest.raises((MethodError, UnsupportedModelError), match="behind a gate"):
        Editor(model, make_tokenizer(), "ft-l", layers=[LAYER], spec=find_spec(model, "alone"))
