"""Decoders that nobody listed, one for each mechanism. `python -m benchmarks.architectures` tries all others."""

from __future__ import annotations

import json
import logging
import statistics
from dataclasses import replace

import pytest
import torch
import transformers
from support import NUMBERS, PREFIXES, REQUESTS, prepared_and_hparams, serial_errors
from tiny_models import CONFIGS, TEXT, make_model, make_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.tiny_decoders import tiny_decoder
from kedit_fast import Editor, collect_statistics
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import InvalidArgumentError, MethodError, UnsupportedModelError
from kedit_fast.evaluation.metrics import mean_nll, shares
from kedit_fast.methods.windows import statistics_layers
from kedit_fast.models import tail_attention
from kedit_fast.models.architectures import ARCHITECTURES, ArchSpec
from kedit_fast.models.forward import Site, capture, pad, starts_midway
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.loading import load_config
from kedit_fast.models.prompt_runner import pass_kind
from kedit_fast.models.view import ModelView
from kedit_fast.reports.suggest import suggest

MECHANISMS = {
    # model type: how passes run, whether something follows the MLP, which layers can be edited
    "cohere": ("packed tails", False, (0, 1, 2, 3)),  # scaled logits, parallel blocks
    "granite": ("packed tails", True, (0, 1, 2, 3)),  # scaled logits, a multiplier behind the MLP
    "olmo3": ("packed tails", True, (0, 1, 2, 3)),  # norms behind the MLP, windows by layer
    "gemma4_text": ("packed tails", True, (0, 1, 2, 3)),  # a scalar behind the block, inputs by layer, a soft cap
    "phi": ("packed tails", False, (0, 1, 2, 3)),  # biases, also of the head; parallel blocks
    "falcon": ("padded tails", False, (0, 1, 2, 3)),  # shared queries, keys and values
    "opt": ("whole prompts", False, (0, 1, 2, 3)),  # learned positions, no module for the MLP
    "bloom": ("whole prompts", False, (0, 1, 2, 3)),  # ALiBi, the MLP adds the residual
    "qwen3_5_text": ("whole prompts", False, (0, 1, 2, 3)),  # linear attention
    "nemotron_h": ("whole prompts", False, None),  # Mamba, attention and MLP in blocks of their own
    "qwen2_vl": ("packed tails", False, (0, 1, 2, 3)),  # multimodal, positions of three axes
}


def available(kind):
    """A tiny model of a type; skipped where this version of transformers has none."""
    older = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 53)
    if older if kind == "qwen2_vl" else kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {kind} of this form")
    return tiny_decoder(kind)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_values_equal_the_serial_loop(kind):
    model, tokenizer = available(kind), make_tokenizer()
    view = ModelView(model)
    passes, post_norm, layers = MECHANISMS[kind]
    assert view.spec not in ARCHITECTURES
    if passes == "packed tails" and not tail_attention.usable(view):  # transformers before 4.53
        passes = "padded tails"
    assert (pass_kind(view, (Site(view.editable[0], "mlp"),)), view.spec.post_norm) == (passes, post_norm)
    assert view.editable == layers or (layers is None and 0 < len(view.editable) < view.num_layers)
    below_the_last = view.editable[1] if view.editable[1] < view.num_layers - 1 else view.editable[0]
    for site, layer in (("mlp", view.editable[0]), ("block", below_the_last)):
        if site == "block" and post_norm:
            continue
        prepared, hparams = prepared_and_hparams(model, tokenizer, site, layer, v_num_grad_steps=4)
        prepared = prepared[:3]
        values = find_values(view, prepared, layer, site, hparams)
        module = view.block(layer) if site == "block" else view.mlp(layer)
        errors = serial_errors(values, prepared, model, module, hparams)
        assert statistics.median(errors) < 3e-5 and max(errors) < 1e-4, (site, errors)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_edits_are_written_measured_and_undone(kind):
    model, tokenizer = available(kind), make_tokenizer()
    layers = ModelView(model).editable[:2]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collected = collect_statistics(model, tokenizer, TEXT * 2, layers, progress=False)
    numbers = {**NUMBERS, "mom2_update_weight": 10.0}
    editor = Editor(model, tokenizer, "memit", statistics=collected, layers=layers, hparams=numbers, prefixes=PREFIXES)
    result = editor.edit(REQUESTS)
    written = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert written == {editor.view.weight_name(layer) for layer in layers} == set(result.updates)
    assert result.residual < 0.9  # the last layer puts out what was wanted, or most of it
    rows = [tokenizer(text)["input_ids"] for text in TEXT[:2]]
    with torch.no_grad():  # what is measured is the edited model's own probability of each text
        logits = [model(torch.tensor([row])).logits[0, :-1] for row in rows]
    losses = [
        torch.nn.functional.cross_entropy(z, torch.tensor(row[1:]), reduction="sum")
        for z, row in zip(logits, rows, strict=True)
    ]
    expected = float(sum(losses)) / sum(len(row) - 1 for row in rows)
    assert mean_nll(model, tokenizer, TEXT[:2]) == pytest.approx(expected, rel=1e-4)
    editor.rollback()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ("opt", "qwen3_5_text", "granite"))
def test_keys_are_those_of_each_prompt_alone(kind):
    model, tokenizer = available(kind), make_tokenizer()
    view = ModelView(model)
    prepared, _ = prepared_and_hparams(model, tokenizer, "mlp", 2)
    site = Site(2, "mlp")
    keys = KeyPass(view, prepared, site, "mean")
    keys.at(1)
    carried = keys.at(2)  # starts from the states that entered block 1
    for i, request in enumerate(prepared):
        alone = []
        for prompt in request.rewriting:
            seen = []
            hook = view.edited_module(2).register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].detach()))
            with torch.no_grad():
                model(torch.tensor([prompt.ids]))
            hook.remove()
            alone.append(seen[0].reshape(len(prompt.ids), -1)[prompt.lookup])
        torch.testing.assert_close(carried.keys[:, i].float(), torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)


def test_scaled_logits_are_those_of_the_model():
    for kind in ("granite", "cohere"):
        model = available(kind)
        view, rows = ModelView(model), torch.tensor([[5, 9, 300, 41]])
        assert view.head.scale != 1
        with torch.no_grad():
            states = view.base(input_ids=rows).last_hidden_state[0]
            torch.testing.assert_close(view.head.logits(states), model(rows).logits[0], rtol=1e-4, atol=1e-4)


def test_scales_are_seen_beside_tokens_that_are_never_said():
    model = available("granite")
    expected = ModelView(model).head.scale
    model.lm_head.weight.data[5:9] = 0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(400).index_fill(0, torch.tensor([7]), -torch.inf))
    assert ModelView(model).head.scale == expected != 1
    model.get_input_embeddings().weight.data[11] = torch.nan  # a token of the rows that are tried
    assert ModelView(model).head.scale == expected


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_heads_and_tails_are_trusted_in_other_dtypes(dtype):
    for kind in ("llama", "gpt2"):
        view = ModelView(make_model(kind, dtype))
        assert view.head.matrix is not None
        assert pass_kind(view, (Site(1, "mlp"),)).endswith("tails") and view.once(starts_midway)


def test_blocks_that_take_keys_of_lower_blocks_run_from_the_embeddings():
    pytest.importorskip("transformers.models.gemma4")
    model = tiny_decoder("gemma4_text", num_kv_shared_layers=2)
    view, tokenizer = ModelView(model), make_tokenizer()
    assert not view.once(starts_midway)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 0, v_num_grad_steps=3)
    values = find_values(view, prepared[:2], 0, "mlp", hparams)
    assert max(serial_errors(values, prepared[:2], model, view.mlp(0), hparams)) < 1e-4
    keys = KeyPass(view, prepared, Site(3, "mlp"), "mean")
    _, second = keys.at(2), keys.at(3)
    torch.testing.assert_close(second.keys, KeyPass(view, prepared, Site(3, "mlp"), "mean").at(3).keys)


def test_models_of_one_layer_and_of_short_rows(monkeypatch):
    monkeypatch.setitem(CONFIGS, "gpt2", {**CONFIGS["gpt2"], "n_positions": 3})
    for model in (make_model("llama", layers=1), make_model("gpt2")):
        view = ModelView(model)
        assert view.once(starts_midway) and view.head.matrix is not None
        assert pass_kind(view, (Site(0, "mlp"),)).endswith("tails")


class Tempered(torch.nn.Linear):
    """A head that is no matrix product."""

    def forward(self, states):
        return super().forward(states).tanh() * 3 + 0.1 * states.sum(-1, keepdim=True)


def test_a_head_that_is_no_matrix_product_is_left_to_the_model(caplog):
    model, tokenizer = make_model("llama"), make_tokenizer()
    head = Tempered(32, 400, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    view = ModelView(model)
    with caplog.at_level(logging.INFO, logger="kedit_fast"):
        assert view.head.matrix is None and pass_kind(view, (Site(1, "mlp"),)) == "whole prompts"
    assert "runs whole, and its own logits are used: its head is a Tempered" in caplog.text
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1, v_num_grad_steps=4)
    values = find_values(view, prepared, 1, "mlp", hparams)
    assert max(serial_errors(values, prepared, model, view.mlp(1), hparams)) < 1e-4
    scores = shares(model, tokenizer, REQUESTS)
    assert scores.efficacy is not None


@pytest.mark.parametrize("kind", ("llama", "granite"))
def test_nothing_is_compiled_for_what_is_tried(kind):
    model, graphs = make_model("llama") if kind == "llama" else available(kind), []
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    view = ModelView(model)
    assert view.head.matrix is not None and pass_kind(view, (Site(1, "mlp"),)).endswith("tails") and not graphs


def test_attention_that_takes_more_tensors_is_the_models_own():
    model = make_model("llama")
    view = ModelView(model)
    for layer in range(4):
        model.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "s_aux": torch.zeros(4)}), with_kwargs=True
        )
    assert pass_kind(view, (Site(1, "mlp"),)) == "padded tails"


def test_a_hook_on_the_head_counts():
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    assert ModelView(model).head.matrix is None


def test_models_whose_blocks_hand_on_more_than_states_do_not_start_midway():
    model = make_model("llama")
    view = ModelView(model)
    assert view.once(starts_midway)
    stored, first = {}, model.model.layers[0].forward

    def storing(hidden, *args, **kwargs):
        stored["embeddings"] = hidden
        return first(hidden, *args, **kwargs)

    def adding(module, args, output):
        return output + stored.pop("embeddings")

    model.model.layers[0].forward = storing
    model.model.layers[3].mlp.register_forward_hook(adding)
    view, tokenizer = ModelView(model), make_tokenizer()
    assert not view.once(starts_midway) and pass_kind(view, (Site(1, "mlp"),)) == "whole prompts"
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1, v_num_grad_steps=3)
    values = find_values(view, prepared[:2], 1, "mlp", hparams)
    assert max(serial_errors(values, prepared[:2], model, view.mlp(1), hparams)) < 1e-4
    keys = KeyPass(view, prepared, Site(2, "mlp"), "mean")
    _, second = keys.at(1), keys.at(2)
    again = KeyPass(view, prepared, Site(2, "mlp"), "mean").at(2)
    torch.testing.assert_close(second.keys, again.keys)


def test_logits_that_depend_on_later_tokens_are_refused():
    model = make_model("llama")
    model.model.register_forward_hook(
        lambda module, args, output: output.__setitem__("last_hidden_state", output[0] + output[0].mean(1, True))
    )
    with pytest.raises(UnsupportedModelError, match="its logits at a token depend on later tokens"):
        _ = ModelView(model).head


def test_rows_that_padding_changes_are_refused():
    model = make_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * (1 + args[0].shape[0]))
    with pytest.raises(UnsupportedModelError, match="other logits to rows that are padded on the right than to each"):
        _ = ModelView(model).head


def test_a_listed_architecture_that_is_not_what_its_name_says_runs_whole():
    model = make_model("llama")
    attention = model.model.layers[2].self_attn
    attention.register_forward_hook(lambda m, a, o: (o[0] * (1 + o[0].shape[1]), *o[1:]))
    with pytest.raises(UnsupportedModelError):  # its rows depend on how long they are
        _ = ModelView(model).head
    model = make_model("gpt2")
    mlp = model.transformer.h[2].mlp
    mlp.register_forward_hook(lambda m, a, o: o + 0.5 * torch.cumsum(a[0], 1))  # no function of one position
    assert pass_kind(ModelView(model), (Site(1, "mlp"),)) == "whole prompts"


def test_experts_and_models_without_an_mlp_are_refused_by_what_is_missing():
    for kind, message in (
        (
            "jetmoe",
            r"'jetmoe' is a mixture-of-experts model .*: model\.layers\.0\..*experts .* has no experts interface",
        ),
        ("mamba", "unknown architecture 'mamba': no linear layer that ends an MLP was seen in backbone.layers.0"),
        ("bert", "unknown architecture 'bert': no list of 4 decoder blocks stands beside the input embedding"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            ModelView(available(kind))


def test_blocks_without_an_mlp_cannot_be_edited_and_are_named():
    view = ModelView(available("nemotron_h"))
    layer = next(layer for layer in range(view.num_layers) if layer not in view.editable)
    with pytest.raises(InvalidArgumentError, match=f"layer {layer} cannot be edited: it has no mixer.down_proj"):
        view.check_layers((layer,))


def test_guessed_layers_and_windows_are_of_layers_that_can_be_edited():
    model, tokenizer = available("nemotron_h"), make_tokenizer()
    view = ModelView(model)
    layers = statistics_layers(view.config, view.editable)
    assert layers and set(layers) <= set(view.editable)
    collected = collect_statistics(model, tokenizer, TEXT * 2, layers, progress=False)
    editor = Editor(
        model,
        tokenizer,
        "memit",
        statistics=collected,
        hparams={"v_num_grad_steps": 2, "clamp_norm_factor": 0.75},
        prefixes=PREFIXES,
    )
    assert set(editor.hparams.layers) <= set(view.editable)
    short = {"v_num_grad_steps": 2, "v_lr": 0.1, "clamp_norm_factor": 0.5, "v_weight_decay": 0.5}
    suggestion = suggest(
        model, tokenizer, REQUESTS, "memit", statistics=collected, hparams=short, effort="short", on_error="skip"
    )
    assert set(suggestion.best.hparams["layers"]) <= set(view.editable)


def test_pmet_needs_attention_in_every_block():
    model, tokenizer = available("qwen3_5_text"), make_tokenizer()
    with pytest.raises((UnsupportedModelError, MethodError), match="attention"):
        Editor(model, tokenizer, "pmet", layers=(1,), hparams={"mom2_adjustment": False})


def test_what_is_found_is_what_is_listed():
    """The listed architectures, found anew from their modules."""
    for spec in ARCHITECTURES:
        model = make_model(spec.model_types[0])
        model.config.model_type = "homemade"
        found = find_spec(model)
        assert replace(found, name=spec.name, model_types=spec.model_types) == spec


def test_a_spec_with_a_wrong_path_is_named_at_construction():
    model, tokenizer = make_model("llama"), make_tokenizer()
    right = find_spec(model)
    for field, path, message in (
        ("blocks", "model.stages", "does not have the modules of By hand .*stages"),
        ("mlp", "feed_forward", "block 0 is a LlamaDecoderLayer that does not have the modules .*feed_forward"),
        ("edit", "mlp.down", "does not have the modules .*down"),
        ("norm", "model.last_norm", "does not have the modules .*last_norm"),
        ("edit", "mlp.act_fn", "quantized or sharded weight|no weight"),
        ("edit", "mlp.up_proj", r"up_proj puts out 64 numbers, and model\.layers\.1\.mlp 32"),
        ("blocks", "model.layers.0", "is a LlamaDecoderLayer, not the list of blocks"),
        ("attention", "attn", "does not have the modules .*attn"),
    ):
        spec = replace(right, name="By hand", **{field: path})
        with pytest.raises(UnsupportedModelError, match=message):
            Editor(model, tokenizer, "rome", layers=(1,), hparams={"mom2_adjustment": False}, spec=spec)
    with pytest.raises(UnsupportedModelError, match="the spec of By hand says transposed = True"):
        ModelView(model, replace(right, name="By hand", transposed=True))
    assert isinstance(right, ArchSpec)


def test_the_specs_promise_about_norms_is_tried():
    """A spec made by hand that leaves out the norm behind the MLP is corrected by no one; it is refused."""
    model, tokenizer = make_model("olmo2"), make_tokenizer()
    spec = replace(find_spec(model), name="By hand", post_norm=False)
    numbers = {"mom2_adjustment": False, **NUMBERS}
    with pytest.raises(UnsupportedModelError, match=r"what model\.layers\.1\.mlp\.down_proj puts out .*post_norm"):
        Editor(model, tokenizer, "memit", layers=(1,), hparams={**numbers, "mom2_update_weight": 1.0}, spec=spec)


def test_code_that_a_folder_brings_is_not_run(tmp_path):
    names = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    with pytest.raises(
        UnsupportedModelError, match="brings code of its own, which is not run: load the model yourself"
    ):
        load_config(tmp_path)


def test_padded_batches_go_through_models_of_flat_tokens():
    view = ModelView(available("opt"))
    batch = pad([[5, 6, 7], [8, 9]], view.device)
    seen, _ = capture(view, batch, [Site(1, "key"), Site(1, "mlp")])
    assert seen[Site(1, "key")].shape == (2, 3, 64) and seen[Site(1, "mlp")].shape == (2, 3, 32)


def test_every_class_of_blocks_is_tried():
    """Olmo Hybrid has norms behind the MLP in its blocks with attention, and none in the others, which come first."""
    view = ModelView(available("olmo_hybrid"))
    assert len({type(block) for block in view.blocks}) == 2
    assert view.spec.post_norm and view.spec.mlp == "mlp"


def test_a_model_that_needs_more_than_tokens_is_refused():
    model = available("starcoder2")
    forward = model.forward
    model.forward = lambda input_ids, pixels, use_cache=False: forward(input_ids)
    with pytest.raises(UnsupportedModelError, match=r"does not run on token ids alone .*pixels"):
        ModelView(model)
