"""Quantized models: the edited matrices alone become 16-bit; what is saved loads as what was in memory.

bitsandbytes is real where it is installed. transformers computes fp8 on GPUs alone: here its modules hold the weights,
and where a test runs them, a plain product stands in for the kernel.
"""

from __future__ import annotations

import contextlib
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import NUMBERS, PREFIXES, REQUESTS, random_patch, run
from tiny_models import TEXT, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from kedit_fast import Editor, collect_statistics
from kedit_fast.errors import InvalidArgumentError, KeditError, UnsupportedModelError
from kedit_fast.evaluation.metrics import shares
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.loading import load_model
from kedit_fast.models.quantized import dequantize_edited
from kedit_fast.models.saving import save_model
from kedit_fast.models.schemes import block_scaled
from kedit_fast.models.view import ModelView
from kedit_fast.support.matrix_bits import same_bits, sha256

LAYERS = (1, 2)
IDS = torch.tensor([[7, 9, 250, 33, 12, 5]])
BLOCK = (16, 24)  # does not divide the 64 inputs of the edited matrices
MODES = ("nf4", "fp4", "int8")
DOWN = "model.layers.{}.mlp.down_proj"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def editor_of(model, statistics):
    return Editor(
        model,
        make_tokenizer(),
        "memit",
        statistics=statistics,
        layers=LAYERS,
        hparams=NUMBERS,
        prefixes=PREFIXES,
    )


def edit_and_compare(model, load, tmp_path):
    """Statistics, edit, patch, folder and rollback of a quantized model; `load` loads a folder as this model was."""
    tokenizer = make_tokenizer()
    before, current = logits(model), fingerprint(ModelView(model), tokenizer)
    statistics = collect_statistics(model, tokenizer, TEXT, layers=LAYERS)
    assert 0 <= shares(model, tokenizer, REQUESTS).efficacy <= 1
    with pytest.raises(UnsupportedModelError, match=r"\.1\.mlp.* is quantized .*--dequantize-edited"):
        editor_of(model, statistics)
    done = dequantize_edited(model, LAYERS)
    view = ModelView(model)
    plain = {layer: view.weight(layer).clone() for layer in LAYERS}
    assert not difference(current, fingerprint(view, tokenizer))
    kinds = [type(view.edited_module(layer)).__name__ for layer in range(view.num_layers)]
    assert kinds[1] == kinds[2] in ("Linear", "Conv1D") and kinds[0] == kinds[3] not in ("Linear", "Conv1D")

    editor = editor_of(model, statistics)
    editor.edit(REQUESTS)
    after, patch = logits(model), editor.patch()
    assert not torch.equal(after, before)
    save_model(model, tokenizer, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), after)
    assert not dequantize_edited(again, LAYERS).modules  # nothing is left to do there
    assert sha256(ModelView(again).weight(1)) == sha256(view.weight(1)) != sha256(plain[1])

    editor.restore()
    assert all(torch.equal(view.weight(layer), plain[layer]) for layer in LAYERS)
    applied = patch.apply_(model)
    assert torch.equal(logits(model), after)
    applied.revert_()
    done.put_back()
    assert torch.equal(logits(model), before)
    assert not done.modules and [type(view.edited_module(layer)).__name__ for layer in LAYERS] == [kinds[0]] * 2
    dequantize_edited(model, LAYERS)
    patch.apply_(model)
    assert torch.equal(logits(model), after)


def patch_and_compare(model, folder, load, tmp_path):
    """An edit of a quantized model, as a patch that is applied to a copy of its folder on disk."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    statistics = collect_statistics(model, make_tokenizer(), TEXT, layers=LAYERS)
    dequantize_edited(model, LAYERS)
    before = logits(model)
    editor = editor_of(model, statistics)
    editor.edit(REQUESTS)
    editor.patch().save(tmp_path / "edit.safetensors")
    command = ("patch", "apply", tmp_path / "edit.safetensors", folder)
    refused = run(*command)
    assert refused.returncode == 1 and "--dequantize-into" in refused.stderr
    done = run(*command, "--dequantize-into", tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert torch.equal(logits(load(tmp_path / "copy")), logits(model))
    assert run("patch", "revert", tmp_path / "copy").returncode == 0
    assert torch.equal(logits(load(tmp_path / "copy")), before)
    left = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == files
    twice = run(*command, "--dequantize-into", tmp_path / "copy")
    assert twice.returncode == 1 and "exists" in twice.stderr


# bitsandbytes


def bitsandbytes_folder(folder, kind, mode, **options):
    """A tiny model that bitsandbytes has quantized, on disk with its tokenizer."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import BitsAndBytesConfig

    whole = folder.parent / f"{folder.name}_whole"
    make_model(kind, torch.bfloat16).save_pretrained(whole)
    config = BitsAndBytesConfig(load_in_8bit=True, **options)
    if mode != "int8":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=mode, bnb_4bit_compute_dtype=torch.bfloat16, **options
        )
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ("llama", "gpt2"))  # gpt2 stores [in, out]
@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_bitsandbytes_is_edited_saved_and_loaded(kind, mode, tmp_path):
    folder = bitsandbytes_folder(tmp_path / "model", kind, mode)
    model, _ = load_model(folder)
    edit_and_compare(model, lambda place: load_model(place)[0], tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_plain_matrices_are_those_that_bitsandbytes_computes_with(mode, tmp_path):
    model, _ = load_model(bitsandbytes_folder(tmp_path / "model", "llama", mode))
    quantized = model.get_submodule(DOWN.format(1))
    identity = torch.eye(64, dtype=torch.bfloat16)
    with torch.no_grad():
        computed = quantized(identity)  # [in, out]
        dequantize_edited(model, (1,))
        plain = model.get_submodule(DOWN.format(1)).weight
    if mode == "int8":  # which also rounds its inputs and products
        assert (computed.T - plain).abs().max() <= 2**-7 * plain.abs().max()
    else:
        assert torch.equal(computed.T, plain)


def test_what_was_excepted_stays_excepted(tmp_path):
    skipped = ["lm_head", "model.layers.0.self_attn"]
    model, _ = load_model(bitsandbytes_folder(tmp_path / "model", "llama", "nf4", llm_int8_skip_modules=skipped))
    done = dequantize_edited(model, (2,))
    assert model.config.quantization_config.llm_int8_skip_modules == [*skipped, DOWN.format(2)]
    done.put_back()
    assert model.config.quantization_config.llm_int8_skip_modules == skipped


def test_the_command_edits_a_quantized_folder_on_request(tmp_path):
    folder = bitsandbytes_folder(tmp_path / "model", "llama", "nf4")
    (tmp_path / "texts.txt").write_text("\n".join(TEXT))
    rows = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in REQUESTS]
    (tmp_path / "requests.json").write_text(json.dumps(rows))
    (tmp_path / "hparams.toml").write_text("".join(f"{name} = {value}\n" for name, value in NUMBERS.items()))
    measured = run("stats", folder, "--text", tmp_path / "texts.txt", "--layers", "0-3", "--out", tmp_path / "stats")
    assert measured.returncode == 0, measured.stderr
    command = ("edit", folder, "--requests", tmp_path / "requests.json", "--stats", tmp_path / "stats", "--layers",
               "1-2", "--set", "mom2_ridge=1e-3", "--set", "v_num_grad_steps=3", "--set", "clamp_norm_factor=0.75",
               "--out", tmp_path / "out",
               "--patch", tmp_path / "patch.safetensors")  # fmt: skip
    refused = run(*command)
    assert refused.returncode == 1 and "--dequantize-edited" in refused.stderr and not (tmp_path / "out").exists()
    done = run(*command, "--dequantize-edited")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(saved["llm_int8_skip_modules"]) == {"lm_head", DOWN.format(1), DOWN.format(2)}
    model, _ = load_model(tmp_path / "out")
    kinds = [type(model.get_submodule(DOWN.format(layer))).__name__ for layer in range(4)]
    assert kinds == ["Linear4bit", "Linear", "Linear", "Linear4bit"]
    shown = run("plan", folder, "--edits", "3", "--layers", "1-2", "--set", "mom2_ridge=1e-3", "--dequantize-edited",
                "--requests", tmp_path / "requests.json", "--json")  # fmt: skip
    assert shown.returncode == 0 and json.loads(shown.stdout)["dtype"] == "bfloat16", shown.stderr


def test_trials_choose_the_layers_of_a_quantized_model_and_the_others_go_back(tmp_path):
    folder = bitsandbytes_folder(tmp_path / "model", "llama", "nf4")
    model, _ = load_model(folder)
    before = logits(model)
    done = dequantize_edited(model)
    assert len(done.modules) == 4
    done.put_back(except_layers=(3,))
    assert list(done.modules) == [DOWN.format(3)] and torch.equal(logits(model), before)
    listed = model.config.quantization_config.llm_int8_skip_modules
    assert DOWN.format(3) in listed and "lm_head" in listed and DOWN.format(0) not in listed
    save_model(model, make_tokenizer(), tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), before)


def test_a_folder_that_would_quantize_an_edited_matrix_again_is_not_written(tmp_path):
    model, _ = load_model(bitsandbytes_folder(tmp_path / "model", "llama", "nf4"))
    dequantize_edited(model, LAYERS)
    model.config.quantization_config.llm_int8_skip_modules.remove(DOWN.format(2))
    with pytest.raises(KeditError, match=r"layers\.2\.mlp\.down_proj is a Linear, .* makes a Linear4bit of it"):
        save_model(model, make_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_quantizer_stores_beside_the_weights_is_read_back(tmp_path):
    model, _ = load_model(bitsandbytes_folder(tmp_path / "model", "llama", "nf4"))
    whole = model.save_pretrained

    def save(folder):
        whole(folder)
        tensors = load_file(folder / "model.safetensors")
        name = f"{DOWN.format(0)}.weight.absmax"
        save_file({**tensors, name: tensors[name] + 1}, folder / "model.safetensors", {"format": "pt"})

    model.save_pretrained = save
    with pytest.raises(KeditError, match=r"layers\.0\.mlp\.down_proj\.weight\.absmax is not what the model has"):
        save_model(model, make_tokenizer(), tmp_path / "out")


def test_a_head_that_is_quantized_gives_the_models_own_logits(tmp_path):
    folder = bitsandbytes_folder(tmp_path / "model", "llama", "nf4", llm_int8_skip_modules=["nothing"])
    model, _ = load_model(folder)
    assert type(model.lm_head).__name__ == "Linear4bit" and ModelView(model).head.matrix is None
    edit_and_compare(model, lambda place: load_model(place)[0], tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_a_patch_goes_into_a_copy_of_a_folder_of_bitsandbytes(mode, tmp_path):
    folder = bitsandbytes_folder(tmp_path / "model", "llama", mode)
    model, _ = load_model(folder)
    patch_and_compare(model, folder, lambda place: load_model(place)[0], tmp_path)


# fp8, by hand


def fp8_folder(folder, block=BLOCK):
    """A tiny model with linear layers in float8 and a scale for each block, as published fp8 checkpoints have them."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    make_model("llama", torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            ends = [min(end, size) for end, size in zip(block, tensor.shape, strict=True)]
            scales = torch.stack(
                [
                    torch.stack([part.float().abs().max() / 448 for part in rows.split(ends[1], 1)])
                    for rows in tensor.split(ends[0])
                ]
            )
            wide = tensor.float() / block_scaled(torch.ones(tensor.shape), scales, block)
            tensors[name], tensors[f"{name}_scale_inv"] = wide.to(torch.float8_e4m3fn), scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch):
    """transformers loads fp8 modules, and computes with them by a plain product."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8").FineGrainedFP8HfQuantizer
    if not hasattr(fp8, "fp8_linear"):
        pytest.skip("this transformers computes fp8 by other functions")

    def product(inputs, weight, scales, block_size=None, bias=None, *_, **__):
        return torch.nn.functional.linear(inputs, block_scaled(weight, scales, block_size).to(inputs.dtype), bias)

    with monkeypatch.context() as patched:
        patched.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        patched.setattr(fp8, "fp8_linear", product)
        yield


def test_blocks_have_their_own_scales_also_at_the_edges():
    matrix = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3) + 0.5
    result = block_scaled(matrix, scales, (2, 3))
    for i in range(5):
        for j in range(7):
            assert result[i, j] == matrix[i, j].float() * scales[i // 2, j // 3]
    assert torch.equal(block_scaled(matrix, torch.tensor(2.0), None), matrix.float() * 2)


def test_a_model_in_fp8_is_edited_saved_and_loaded(tmp_path, monkeypatch):
    folder = fp8_folder(tmp_path / "model")
    with as_on_a_gpu(monkeypatch):
        model, _ = load_model(folder)
        assert type(model.get_submodule(DOWN.format(1))).__name__ == "FP8Linear"
        edit_and_compare(model, lambda place: load_model(place)[0], tmp_path)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    edited = {f"{DOWN.format(layer)}.weight" for layer in LAYERS}
    assert before.keys() - after.keys() == {f"{name}_scale_inv" for name in edited}
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16 if name in edited else same_bits(tensor, before[name]), name
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(saved["modules_to_not_convert"]) == {"lm_head", DOWN.format(1), DOWN.format(2)}


def test_without_a_gpu_transformers_makes_all_of_an_fp8_model_plain_and_that_is_said(tmp_path, caplog, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder = fp8_folder(tmp_path / "model", (16, 32))  # blocks that divide the matrices, as transformers wants there
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        model, _ = load_model(folder)
    assert "has made all matrices bfloat16" in caplog.text and "--dequantize-into" in caplog.text
    assert not dequantize_edited(model).modules
    with as_on_a_gpu(monkeypatch):
        other, _ = load_model(folder)
    dequantize_edited(other)
    for layer in range(4):  # the same bits
        assert sha256(ModelView(model).weight(layer)) == sha256(ModelView(other).weight(layer))


@pytest.mark.parametrize("shards", (False, True))
def test_a_patch_goes_into_a_copy_of_an_fp8_folder_without_a_gpu(shards, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.importorskip("kernels", reason="transformers computes fp8 on a GPU by the package kernels")
    folder = fp8_folder(tmp_path / "model", (16, 32))
    if shards:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(places.values()):
            part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model, _ = load_model(folder)
    patch_and_compare(model, folder, lambda place: load_model(place)[0], tmp_path)
    saved = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert set(saved["modules_to_not_convert"]) == {"lm_head", DOWN.format(1), DOWN.format(2)}
    with as_on_a_gpu(monkeypatch):
        there, _ = load_model(tmp_path / "copy")
        kinds = [type(there.get_submodule(DOWN.format(layer))).__name__ for layer in range(4)]
        assert kinds == ["FP8Linear", "Linear", "Linear", "FP8Linear"] and type(there.lm_head) is torch.nn.Linear


def test_a_plain_folder_needs_no_copy(tmp_path):
    model = make_model("llama", torch.bfloat16)
    save_model(model, make_tokenizer(), tmp_path / "model")
    random_patch(model).save(tmp_path / "patch.safetensors")
    refused = run("patch", "apply", tmp_path / "patch.safetensors", tmp_path / "model", "--dequantize-into",
                  tmp_path / "copy")  # fmt: skip
    assert refused.returncode == 1 and "is not quantized" in refused.stderr and not (tmp_path / "copy").exists()


# Refusals


class QuantLinear(torch.nn.Module):
    """What a layer of GPTQ looks like."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))


def test_other_quantizers_are_refused_by_name():
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj = QuantLinear()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj.*QuantLinear.*quantized"):
        dequantize_edited(model, LAYERS)


def test_a_plain_model_stays_as_it_is():
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not dequantize_edited(model).modules
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(InvalidArgumentError, match="layer 9"):
        dequantize_edited(model, (9,))
    with pytest.raises(InvalidArgumentError, match=r"no module 'model\.other'"):
        dequantize_edited(model, (), ["model.other"])


def test_a_config_without_a_list_of_exceptions_is_refused(tmp_path, monkeypatch):
    with as_on_a_gpu(monkeypatch):
        model, _ = load_model(fp8_folder(tmp_path / "model"))
        del model.config.quantization_config.modules_to_not_convert
        kind = type(model.get_submodule(DOWN.format(1)))
        with pytest.raises(UnsupportedModelError, match="FineGrainedFP8Config without modules_to_not_convert"):
            dequantize_edited(model, LAYERS)
        assert type(model.get_submodule(DOWN.format(1))) is kind
