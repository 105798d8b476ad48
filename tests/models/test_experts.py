"""Experts as one stacked matrix: keys, weights and refusals, against plain computations beside the model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import MIXTURES, make_model, make_tokenizer, needs_experts
from torch.nn.functional import silu

from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.store import edited_hash
from kedit_fast.errors import InvalidArgumentError, UnsupportedModelError
from kedit_fast.models.editable import require_editable, require_own
from kedit_fast.models.experts import ExpertInputs, expert_stack, is_expert_module
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.forward import Site, TokenBatch, capture, evaluating, pad, require_passes, visit
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.loading import empty_model
from kedit_fast.models.row_runner import row_pass
from kedit_fast.models.view import ModelView, linear_module, linear_weight
from kedit_fast.models.weight_names import module_path_of, weight_name_of
from kedit_fast.requests.prompts import prepare
from kedit_fast.requests.request import EditRequest

ROWS = [[5, 17, 301, 44, 90, 12, 7], [9, 201, 33, 150, 60]]
EXACT = dict(rtol=0.0, atol=1e-12)
EXPERTS = {"granitemoe": "block_sparse_moe.experts"}  # others: mlp.experts


def exact(kind, **kwargs):
    return make_model(kind, torch.float64, **kwargs)


def plain_calls(model, view, layer, rows):
    """Arguments and output of the experts of a layer, by hooks of torch in a pass of the whole model."""
    seen = []
    module = model.get_submodule(f"model.layers.{layer}.{view.spec.edit}")
    hook = module.register_forward_hook(lambda m, args, kwargs, out: seen.append((*args, *kwargs.values(), out)),
                                        with_kwargs=True)  # fmt: skip
    batch = pad(rows, torch.device("cpu"))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    hook.remove()
    ((states, index, weights, output),) = seen
    return module, states, index, weights, output


def plain_keys(kind, module, states, index, weights):
    """Stacked keys [tokens, E m], token by token, from the formulas of the papers."""
    count = module.down_proj.shape[0]
    transposed = kind == "gpt_oss"
    m = module.down_proj.shape[1 if transposed else 2]
    keys = torch.zeros(len(states), count, m, dtype=states.dtype)
    for token, (chosen, gates) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, gate in zip(chosen, gates, strict=True):
            weight = module.gate_up_proj[expert].detach()
            both = states[token] @ weight if transposed else weight @ states[token]
            if transposed:
                both = both + module.gate_up_proj_bias[expert].detach()
                a, b = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
                activation = (b + 1) * a * torch.sigmoid(module.alpha * a)
            else:
                activation = silu(both[:m]) * both[m:]
            keys[token, expert] = gate * activation
    return keys.flatten(1)


def captured_keys(view, layer, rows, positions=None, of=None):
    site = Site(layer, "key")
    with evaluating(view):
        return capture(view, pad(rows, view.device), [site], positions, rows=of)[0][site]


@needs_experts
@pytest.mark.parametrize("kind", MIXTURES)
def test_stacked_keys_times_the_stacked_weight_are_what_the_experts_put_out(kind):
    model = exact(kind)
    view = ModelView(model)
    for layer in view.editable:
        module, *_, output = plain_calls(model, view, layer, ROWS)
        keys = captured_keys(view, layer, ROWS)
        assert keys.dtype == torch.float64 and keys.shape == (2, 7, view.edited_shape(layer)[1])
        stack = view.experts(layer)
        assert stack is not None and stack.weight.shape == (stack.count, stack.outputs, stack.inputs)
        matrix = stack.weight.permute(1, 0, 2).flatten(1)  # [h, E m]
        assert matrix.shape == view.edited_shape(layer)
        put_out = keys.flatten(0, 1) @ matrix.T
        if kind == "gpt_oss":
            _, _, index, weights, _ = plain_calls(model, view, layer, ROWS)
            put_out = put_out + (weights[..., None] * module.down_proj_bias[index]).sum(1)
        assert float(output.abs().max()) > 0.01
        torch.testing.assert_close(put_out, output.detach(), **EXACT)


@needs_experts
@pytest.mark.parametrize("kind", MIXTURES)
def test_stacked_keys_equal_those_of_a_plain_hook_token_by_token(kind):
    model = exact(kind)
    view = ModelView(model)
    layer = view.editable[-1]
    module, states, index, weights, _ = plain_calls(model, view, layer, ROWS)
    expected = plain_keys(kind, module, states, index, weights).detach()
    every = captured_keys(view, layer, ROWS).flatten(0, 1)
    inside = torch.tensor([True] * 12 + [False] * 2)  # the last two places are padding
    torch.testing.assert_close(every[inside], expected[inside], **EXACT)
    positions, of = torch.tensor([3, 6, 0, 3]), torch.tensor([0, 0, 1, 0])
    some = captured_keys(view, layer, ROWS, positions, of)
    torch.testing.assert_close(some, expected[of * 7 + positions], **EXACT)
    assert bool((expected == 0).any()) and torch.equal(some == 0, expected[of * 7 + positions] == 0)


@needs_experts
@pytest.mark.parametrize("kind", MIXTURES)
def test_keys_of_a_batch_of_requests_are_means_of_plain_stacked_keys_over_contexts(kind):
    model = exact(kind)
    view = ModelView(model)
    requests = [
        EditRequest("{} plays the", "Miles Davis", "violin"),
        EditRequest("Because you saw {}", "Ebro", "Spain"),
    ]
    prepared = prepare(make_tokenizer(bos=True), requests, ("The old tower. ", "Because I saw. "), 128)
    layers = view.editable[:2]
    passes = KeyPass(view, prepared, Site(view.editable[-1], "block"), "bare_half")
    for layer in layers:
        seen = passes.at(layer)
        for column, request in enumerate(prepared):
            contexts = []
            for prompt in request.rewriting:
                module, states, index, weights, _ = plain_calls(model, view, layer, [prompt.ids])
                contexts.append(plain_keys(kind, module, states, index, weights).detach()[prompt.lookup])
            mean = (contexts[0] + (contexts[1] + contexts[2]) / 2) / 2
            torch.testing.assert_close(seen.keys[:, column], mean, rtol=0, atol=1e-10)
            torch.testing.assert_close(seen.bare_keys[:, column], contexts[0], rtol=0, atol=1e-10)
        view.weight(layer).mul_(1.1)  # the next layer sees what was written


@needs_experts
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_view_names_reads_and_writes_the_stacked_matrix(kind):
    model = exact(kind)
    view = ModelView(model)
    require_editable(view, [view.module_name(layer) for layer in view.editable])
    require_passes(view, [Site(layer, "key") for layer in view.editable] + [Site(view.editable[-1], "mlp")])
    state = model.state_dict()
    assert view.editable == ((1, 2, 3) if kind == "deepseek_v3" else (0, 1, 2, 3))
    assert find_spec(empty_model(model.config)).edit == view.spec.edit == EXPERTS.get(kind, "mlp.experts")
    assert view.spec.mlp == view.spec.edit.rpartition(".")[0] and view.spec.post_norm == (kind == "granitemoe")
    for layer in view.editable:
        name = view.weight_name(layer)
        assert view.module_name(layer) == name == f"model.layers.{layer}.{view.spec.edit}.down_proj"
        assert weight_name_of(name) == name == module_path_of(name)
        stored = state[name]
        weight = view.weight(layer)
        assert weight.shape == ((stored.mT if kind == "gpt_oss" else stored).shape)
        assert weight.data_ptr() == stored.data_ptr() and not weight.requires_grad
        weight[1, 2, 3] = 7.5
        assert float(stored[1, 3, 2] if kind == "gpt_oss" else stored[1, 2, 3]) == 7.5
        same, transposed = linear_weight(model, name)
        assert same.data_ptr() == weight.data_ptr() and same.shape == weight.shape and transposed == (kind == "gpt_oss")
        assert view.row_device(layer) == torch.device("cpu")
    with pytest.raises(InvalidArgumentError, match="stacked matrix of experts, not a linear module"):
        linear_module(model, view.module_name(view.editable[0]))
    with pytest.raises(InvalidArgumentError, match=r"no module 'model\.layers\.9\.mlp\.experts'"):
        linear_weight(model, "model.layers.9.mlp.experts.down_proj")


@needs_experts
def test_a_dense_block_among_experts_cannot_be_edited_and_is_named():
    view = ModelView(make_model("deepseek_v3"))
    with pytest.raises(InvalidArgumentError, match=r"layer 0 cannot be edited: it has no mlp\.experts.*: 1, 2, 3"):
        view.check_layers((0, 1))


@needs_experts
def test_the_stack_of_experts_is_not_tuned():
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.down_proj is the stacked .* not tuned"):
        row_pass(ModelView(make_model("mixtral")), 1)


@needs_experts
def test_a_change_of_the_stack_moves_the_output_by_the_change_times_the_key():
    model = exact("qwen3_moe")
    view = ModelView(model)
    layer = 2
    keys = captured_keys(view, layer, ROWS).flatten(0, 1)
    before = plain_calls(model, view, layer, ROWS)[-1]
    change = torch.randn(view.weight(layer).shape, dtype=torch.float64)
    view.weight(layer).add_(change)
    after = plain_calls(model, view, layer, ROWS)[-1]
    torch.testing.assert_close(after - before, keys @ change.permute(1, 0, 2).flatten(1).T, rtol=0, atol=1e-11)


@needs_experts
@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm"))
@pytest.mark.parametrize("kind", ("qwen3_moe", "gpt_oss"))
def test_keys_do_not_depend_on_how_the_model_multiplies(kind, implementation):
    model = make_model(kind)
    view = ModelView(model)
    eager = captured_keys(view, 2, ROWS)
    model.set_experts_implementation(implementation)
    require_passes(view, [Site(2, "key")])
    torch.testing.assert_close(captured_keys(view, 2, ROWS), eager, rtol=1e-4, atol=1e-5)


@needs_experts
def test_16_bit_models_give_the_keys_of_the_same_model_in_float32(monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", "float32")
    half = make_model("gpt_oss").to(torch.bfloat16)
    view, wide = ModelView(half), copy.deepcopy(half).float()
    require_passes(view, [Site(1, "key")])
    keys = captured_keys(view, 1, ROWS)
    assert keys.dtype == torch.float32 and view.weight(1).dtype == torch.bfloat16
    torch.testing.assert_close(keys, captured_keys(ModelView(wide), 1, ROWS), rtol=1e-5, atol=1e-6)


@needs_experts
def test_rows_of_chosen_pairs_are_sorted_by_expert_and_then_by_token():
    model = exact("olmoe")
    view = ModelView(model)
    seen: list[ExpertInputs] = []
    batch = TokenBatch(torch.tensor([ROWS[0]]), None)
    visit(view, batch, [Site(1, "key")], lambda site, inputs: seen.append(inputs))
    (inputs,) = seen
    assert inputs.stack.path == "model.layers.1.mlp.experts" and inputs.stack.count == 6
    pairs = inputs.rows()
    expected = sorted((e, t) for t, chosen in enumerate(inputs.index.tolist()) for e in chosen)
    assert [*zip(pairs.experts.tolist(), pairs.tokens.tolist(), strict=True)] == expected
    assert pairs.offsets.tolist() == [sum(e < k for e, _ in expected) for k in range(7)]
    assert pairs.rows.shape == (len(expected), 24) and pairs.gates.shape == (len(expected),)
    none = inputs.rows(torch.tensor([], dtype=torch.int64))
    assert none.rows.shape == (0, 24) and none.offsets.tolist() == [0] * 7 and none.stacked(0).shape == (0, 144)
    # A number past the last expert stands for none.
    masked = inputs.index.clone()
    masked[2] = 6
    keys = ExpertInputs(inputs.stack, inputs.states, masked, inputs.weights).stacked()
    torch.testing.assert_close(keys[:2], inputs.stacked()[:2], **EXACT)
    assert not bool(keys[2].any())


@needs_experts
@needs_experts
def test_an_expert_that_a_token_chose_twice_has_one_row_with_both_gates():
    model = exact("mixtral")
    stack = expert_stack(model, "model.layers.1.mlp.experts")
    index = torch.tensor([[2, 2], [1, 0], [0, 0]])
    gates = torch.tensor([[0.25, 0.5], [0.3, 0.7], [0.1, 0.2]], dtype=torch.float64)
    states = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    inputs = ExpertInputs(stack, states, index, gates)
    pairs = inputs.rows()
    assert pairs.experts.tolist() == [0, 0, 1, 2] and pairs.tokens.tolist() == [1, 2, 1, 0]
    torch.testing.assert_close(pairs.gates, torch.tensor([0.7, 0.3, 0.3, 0.75], dtype=torch.float64), **EXACT)
    with torch.no_grad():
        expected = stack.module(states, index, gates)
    torch.testing.assert_close(inputs.outputs(), expected, **EXACT)


def test_the_fingerprint_and_the_hash_see_what_they_should_of_experts():
    model, tokenizer = make_model("gpt_oss"), make_tokenizer()
    view = ModelView(model)
    before, edited = fingerprint(view, tokenizer), edited_hash(view, [1])
    assert edited_hash(view, [1]) == edited
    view.weight(1)[3].mul_(1.5)
    assert fingerprint(view, tokenizer) == before and edited_hash(view, [1]) != edited
    assert edited_hash(view, [2]) == edited_hash(ModelView(make_model("gpt_oss")), [2])
    model.model.layers[1].mlp.experts.gate_up_proj.data.mul_(1.5)
    assert "gate_up_proj" in difference(before, fingerprint(view, tokenizer))


@needs_experts
def test_stacks_that_cannot_be_written_are_refused_by_name():
    model = make_model("mixtral")
    view = ModelView(model)
    paths = [view.module_name(1)]
    module = model.model.layers[1].mlp.experts
    own = module.down_proj
    module.down_proj = model.model.layers[2].mlp.experts.down_proj
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.down_proj and .*layers\.2.* share memory"
    ):
        require_own(model, paths)
    module.down_proj = torch.nn.Parameter(own.detach()[:1].expand(own.shape), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="one number stands for several entries"):
        require_own(model, paths)
    module.down_proj = own
    require_own(model, paths)


class Packed(torch.nn.Parameter):
    """A tensor that is no plain one, as quantizers and sharding have them."""


@needs_experts
@pytest.mark.parametrize(
    "attributes, message",
    (
        (dict(has_post_expert_norm=True), "has a norm behind each expert"),
        (dict(_is_expert_parallel=True), "is expert-parallel"),
        (dict(down_proj=torch.zeros(5, 32, 24, dtype=torch.uint8)), r"is quantized \(torch.uint8\)"),
        (dict(down_proj=torch.zeros(5, 32, 24).to(torch.float8_e4m3fn)), r"is quantized \(torch.float8_e4m3fn\)"),
        (dict(down_proj=Packed(torch.zeros(5, 32, 24))), r"sharded or packed down_proj \(Packed\)"),
        (dict(has_bias=True), "lacks gate_up_proj_bias, down_proj_bias"),
        (dict(has_gate=None), "has no experts interface"),
        (dict(down_proj=torch.zeros(5, 16, 24)), "puts out 16 numbers, and the model's states have 32"),
    ),
    ids=("norm", "expert-parallel", "mxfp4", "fp8", "packed", "no bias", "no interface", "latent"),
)
def test_experts_that_are_no_plain_stack_are_refused_by_what_they_are(attributes, message):
    model = make_model("mixtral")
    for block in model.model.layers:
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                del block.mlp.experts._parameters[name]
                value = value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, False)
            setattr(block.mlp.experts, name, value)
    named = r"'mixtral' is a mixture-of-experts model that cannot be edited: model\.layers\.0\.mlp\.experts \(Mixtral"
    with pytest.raises(UnsupportedModelError, match=named + f".*{message}"):
        ModelView(model)
    assert is_expert_module(model.model.layers[0].mlp.experts) == ("has_gate" not in attributes)
    if "puts out" not in message:
        with pytest.raises(UnsupportedModelError, match=message):
            expert_stack(model, "model.layers.0.mlp.experts")


@needs_experts
@pytest.mark.parametrize("kind", ("llama4_text", "jetmoe", "muse_spark"))
def test_mixtures_without_a_linear_form_are_refused_by_the_name_of_their_experts(kind):
    numbers = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, vocab_size=64)
    try:
        config = transformers.AutoConfig.for_model(kind, **numbers)
        model = empty_model(config)
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises(
        UnsupportedModelError, match=r"is a mixture-of-experts model that cannot be edited: .*experts \("
    ):
        find_spec(model)


@needs_experts
def test_transformers_4_is_told_as_the_reason(monkeypatch):
    model = make_model("mixtral")
    for block in model.model.layers:
        block.mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    monkeypatch.setattr("kedit_fast.models.experts.TRANSFORMERS", "4.51.0")
    with pytest.raises(UnsupportedModelError, match=r"experts \(ModuleList\) .*from version 5 on, and 4\.51\.0"):
        ModelView(model)


@needs_experts
def test_experts_that_compute_something_else_are_seen_before_an_edit():
    model = make_model("qwen3_moe")
    view = ModelView(model)
    experts = model.model.layers[1].mlp.experts
    plain = experts.forward
    experts.forward = lambda states, index, weights: plain(states, index, weights) * 1.05
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts is not the sum of its chosen experts"):
        require_passes(view, [Site(1, "key")])
    experts.forward = lambda states, index, weights: plain(states, index, weights)[:-1]
    with pytest.raises((UnsupportedModelError, RuntimeError)):
        require_passes(view, [Site(1, "key")])
    del experts.forward
    require_passes(view, [Site(1, "key")])
    experts.register_forward_pre_hook(lambda module, args: (args[0], args[1].float(), args[2]))
    with pytest.raises(UnsupportedModelError, match="not with states, chosen experts and their weights of all"):
        require_passes(view, [Site(1, "key")])
