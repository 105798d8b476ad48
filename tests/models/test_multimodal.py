"""Multimodal checkpoints are loaded, edited and saved as what they are, and their images still run."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import prepared_and_hparams, run
from tiny_models import make_tokenizer

from benchmarks.published import serial_value
from kedit_fast import Editor, EditRequest
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import KeditError, PatchError, UnsupportedModelError
from kedit_fast.methods.presets import make_hparams, preset_hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.methods.windows import statistics_layers
from kedit_fast.models.loading import empty_model, load_config, load_model
from kedit_fast.models.multimodal import PROCESSOR_FILES, bare_name, is_multimodal
from kedit_fast.models.saving import save_model
from kedit_fast.models.view import ModelView
from kedit_fast.patches.checkpoint import Checkpoint

LAYERS = 3
IDS = torch.tensor([[7, 8, 3, 5, 5, 5, 5, 4, 9, 10]])  # 5 stands for a part of the image
REQUEST = EditRequest("{} plays the", "Miles Davis", "violin")
NUMBERS = dict(v_num_grad_steps=3, v_lr=0.1, clamp_norm_factor=0.5, mom2_adjustment=False, mom2_update_weight=1.0)
_TEXT = dict(
    vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
_VISION = dict(hidden_size=16, intermediate_size=32)
_TOWER = dict(_VISION, num_hidden_layers=2, num_attention_heads=2)
_PATCHES = dict(
    _VISION, depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32
)
_MARKS = dict(image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)


def rope(name="rope_type"):
    return {name: "mrope" if name == "type" else "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


CONFIGS = {
    "gemma3": dict(
        text_config=dict(_TEXT, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
        vision_config=dict(_TOWER, image_size=28, patch_size=7),
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=3, eoi_token_index=4,
    ),
    "qwen2_5_vl": dict(
        text_config=dict(_TEXT, rope_scaling=rope("type")),
        vision_config=dict(_PATCHES, window_size=16, fullatt_block_indexes=[1]),
        tie_word_embeddings=False, **_MARKS,
    ),
    "qwen3_vl": dict(
        text_config=dict(_TEXT, head_dim=8, rope_scaling=rope()),
        vision_config=dict(_PATCHES, deepstack_visual_indexes=[0], num_position_embeddings=16), **_MARKS,
    ),
    "llava": dict(
        text_config=dict(_TEXT, model_type="llama"),
        vision_config=dict(_TOWER, model_type="clip_vision_model", image_size=8, patch_size=4, projection_dim=16),
        image_token_index=5,
    ),
    "mistral3": dict(
        text_config=dict(_TEXT, model_type="mistral", head_dim=8),
        vision_config=dict(_TOWER, model_type="pixtral", image_size=16, patch_size=4, head_dim=8),
        image_token_index=5, spatial_merge_size=2,
    ),
}  # fmt: skip
KINDS = tuple(kind for kind in CONFIGS if kind in transformers.CONFIG_MAPPING)


def multimodal_model(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 if parameter.ndim > 1 else parameter + torch.randn_like(parameter) * 0.1)
            if not parameter.any():  # Gemma 3's projector
                parameter.normal_()
    return model.eval()


def image(kind):
    """What a processor would make of one image."""
    generator = torch.Generator().manual_seed(1)
    if kind.startswith("qwen"):
        pixels = torch.randn(16, 96, generator=generator)
        grid = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
        return {"pixel_values": pixels, "mm_token_type_ids": (IDS == 5).long(), **grid}
    size = {"gemma3": 28, "llava": 8, "mistral3": 16}[kind]
    sizes = {"image_sizes": torch.tensor([[size, size]])} if kind == "mistral3" else {}
    return {"pixel_values": torch.randn(1, 3, size, size, generator=generator), **sizes}


@torch.no_grad()
def logits_with_image(model, kind):
    inputs = image(kind)
    if "mm_token_type_ids" in inputs and int(transformers.__version__.split(".")[0]) < 5:
        del inputs["mm_token_type_ids"]
    return model(input_ids=IDS, **inputs).logits


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A checkpoint with a processor's files; what they hold is not read."""
    multimodal_model(kind).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("preprocessor_config.json", "chat_template.json"):
        (tmp_path / "model" / name).write_text(json.dumps({"file": name}))
    return tmp_path / "model"


def rename_in_file(folder, model):
    """Give the tensors of a checkpoint the names that they have in memory, as other versions of transformers do."""
    in_memory = {bare_name(name): name for name in model.state_dict()}
    tensors = load_file(folder / "model.safetensors")
    tensors = {in_memory[bare_name(name)]: tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def edit(model, layers=(1,)):
    editor = Editor(model, make_tokenizer(), "memit", layers=layers, hparams=NUMBERS, prefixes=("A tower. ",))
    editor.edit([REQUEST])
    return editor


@pytest.mark.parametrize("names", ("written", "in memory"))
def test_an_edited_model_is_saved_as_what_it_was(kind, names, folder, tmp_path, caplog):
    if names == "in memory":
        rename_in_file(folder, multimodal_model(kind))
    before = load_file(folder / "model.safetensors")
    model, tokenizer = load_model(folder)
    unedited = logits_with_image(model, kind)
    edit(model)
    save_model(model, tokenizer, tmp_path / "out")
    assert not [record for record in caplog.records if record.name == "kedit_fast"]
    after = load_file(tmp_path / "out" / "model.safetensors")
    if names == "in memory" and transformers.__version__ < "5":  # which writes the older names, whatever it read
        before, after = ({bare_name(n): tensor for n, tensor in state.items()} for state in (before, after))
    assert after.keys() == before.keys()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert [bare_name(name) for name in changed] == ["layers.1.mlp.down_proj.weight"]
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out")]
    classes = [config.get("architectures") for config in configs]
    assert classes[0] == classes[1] in ([type(model).__name__], None)  # transformers 4 forgets some
    assert configs[0]["model_type"] == configs[1]["model_type"] == kind
    for part in ("text_config", "vision_config"):  # to those of a loaded one, transformers adds two fields
        parts = [{**config[part], "dtype": "float32", "_name_or_path": ""} for config in configs]
        assert parts[0] == parts[1]
    again, _ = load_model(tmp_path / "out")
    assert type(again) is type(model)
    assert torch.equal(logits_with_image(again, kind), logits_with_image(model, kind))
    assert not torch.equal(logits_with_image(again, kind), unedited)
    for name in ("preprocessor_config.json", "chat_template.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_values_equal_the_serial_loop_through_the_whole_model(kind):
    model, tokenizer = multimodal_model(kind), make_tokenizer()
    view = ModelView(model)
    site = "mlp" if view.spec.post_norm else "block"
    prepared, hparams = prepared_and_hparams(model, tokenizer, site, 1)
    values = find_values(view, prepared, 1, site, hparams)
    module = view.mlp(1) if view.spec.post_norm else view.block(1)
    for i, request in enumerate(prepared):
        alone = serial_value(model, [module], request, hparams, side=None)
        assert int(values.steps[i]) == alone.steps
        assert abs(float(values.losses[i]) - alone.loss) < 1e-3 * max(1.0, alone.loss)
        assert float((values.targets[:, i] - alone.targets[0]).norm() / values.deltas[:, i].norm()) < 1e-4


def test_a_rollback_gives_back_the_bits(kind):
    model = multimodal_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = edit(model, (0, 1))
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, model.state_dict()[name])]
    assert len(changed) == 2
    editor.restore()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("names", ("written", "in memory"))
def test_a_patch_finds_its_matrices_in_the_files(kind, names, folder):
    model, _ = load_model(folder)
    patch = edit(model).patch()
    if names == "in memory":
        rename_in_file(folder, model)
    before = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.apply(patch, "a patch")
    after = load_file(folder / "model.safetensors")
    (changed,) = (name for name, tensor in before.items() if not torch.equal(tensor, after[name]))
    assert torch.equal(after[changed], model.get_submodule(next(iter(patch.updates))).weight)
    checkpoint.revert()
    assert all(torch.equal(tensor, before[n]) for n, tensor in load_file(folder / "model.safetensors").items())


def test_matrices_that_a_patch_cannot_tell_apart_are_refused_by_name(tmp_path):
    names = ("model.layers.0.mlp.down_proj.weight", "language_model.layers.0.mlp.down_proj.weight")
    save_file({name: torch.zeros(2, 3) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(PatchError, match=r"language_model\.layers\S+ and model\.layers\S+ may each be it"):
        Checkpoint(tmp_path).stored("model.language_model.layers.0.mlp.down_proj")
    with pytest.raises(PatchError, match=r"has no model\.language_model\.layers\.1\.mlp\.down_proj\.weight"):
        Checkpoint(tmp_path).stored("model.language_model.layers.1.mlp.down_proj")


def test_the_empty_model_is_of_the_same_class(kind, folder):
    config = load_config(folder)
    assert is_multimodal(config)
    empty, model = empty_model(config), multimodal_model(kind)
    assert type(empty) is type(model) and empty.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ("gemma3",))
def test_weights_that_the_class_has_no_place_for_are_refused_by_name(kind, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "audio_tower.layer.weight": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UnsupportedModelError, match=r"no place for: audio_tower\.layer\.weight"):
        load_model(folder)


def test_weights_that_transformers_passes_over_are_named_when_a_model_is_saved(tmp_path, caplog):
    from tiny_models import make_model

    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "mtp.layers.0.weight": torch.zeros(2, 2)}, path, {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path / "model")
    caplog.clear()
    save_model(loaded, make_tokenizer(), tmp_path / "out")
    assert "mtp.layers.0.weight is in" in caplog.text and "(1 such tensors)" in caplog.text


def test_weights_that_a_model_of_text_has_no_place_for_are_named(tmp_path, caplog):
    from tiny_models import make_model

    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "v_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(tmp_path)
    assert "no place for: v_head.weight (1 tensors)" in caplog.text


@pytest.mark.parametrize("kind", ("llava",))
def test_the_class_that_a_configuration_names_is_loaded_and_one_of_text_alone_is_not(kind, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for named in (["LlavaForConditionalGeneration"], ["LlamaForCausalLM"], ["NoSuchModel"], None):
        path.write_text(json.dumps({**config, "architectures": named}))
        assert type(load_model(folder)[0]).__name__ == "LlavaForConditionalGeneration"


@pytest.mark.parametrize("kind", ("gemma3",))
def test_a_missing_processor_is_told_and_a_failed_copy_leaves_no_folder(kind, folder, tmp_path, caplog, monkeypatch):
    model, tokenizer = load_model(folder)
    (folder / "preprocessor_config.json").unlink()
    save_model(model, tokenizer, tmp_path / "out")
    assert "has none of processor_config.json and preprocessor_config.json" in caplog.text
    model.config._name_or_path = model.name_or_path = ""
    caplog.clear()
    save_model(model, tokenizer, tmp_path / "other")
    assert "does not say where it was loaded from" in caplog.text

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    (folder / "preprocessor_config.json").write_text("{}")
    model.config._name_or_path = model.name_or_path = str(folder)
    with pytest.raises(KeditError, match="No space left on device"):
        save_model(model, tokenizer, tmp_path / "third")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["model", "other", "out"]


@pytest.mark.parametrize("kind", ("llava",))
def test_a_processor_of_a_model_on_the_hub_comes_from_its_cache(kind, folder, tmp_path, caplog, monkeypatch):
    def cached_file(source, name, **options):
        if source != "someone/model":
            raise OSError(f"{source} is not a local folder and is not a valid model identifier")
        return str(folder / name) if (folder / name).exists() else None

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    model, tokenizer = load_model(folder)
    for source in ("someone/model", "gone/away"):
        model.config._name_or_path = model.name_or_path = source
        save_model(model, tokenizer, tmp_path / source.replace("/", "-"))
    assert (tmp_path / "someone-model" / "preprocessor_config.json").exists()
    assert not (tmp_path / "gone-away" / "preprocessor_config.json").exists()
    assert "gone/away is no folder and no model on the hub" in caplog.text and "someone/model" not in caplog.text


def test_a_processor_finds_its_files_in_the_saved_folder(tmp_path):
    clip = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = transformers.LlavaProcessor(
        clip(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}), tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template="{{ messages }}",
    )  # fmt: skip
    model = multimodal_model("llava")
    model.resize_token_embeddings(len(tokenizer))
    model.config.image_token_index = model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded, tokenizer = load_model(tmp_path / "model")
    edit(loaded)
    save_model(loaded, tokenizer, tmp_path / "out")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(again) is transformers.LlavaProcessor and again.chat_template == "{{ messages }}"
    pixels = torch.randint(0, 255, (8, 8, 3), dtype=torch.uint8).numpy()
    inputs = again(images=[pixels], text=["A tower <image> is"], return_tensors="pt")
    with torch.no_grad():
        assert bool(torch.isfinite(load_model(tmp_path / "out")[0](**inputs).logits).all())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files & set(PROCESSOR_FILES) == {path.name for path in (tmp_path / "model").iterdir()} & set(PROCESSOR_FILES)


def test_hyper_parameters_are_those_of_the_text_part():
    recipe = find_recipe("memit")
    sizes = dict(num_hidden_layers=28, hidden_size=3584, intermediate_size=18944)
    qwen = transformers.Qwen2_5_VLConfig(text_config=sizes)
    assert preset_hparams(recipe, qwen) == preset_hparams(recipe, transformers.Qwen2Config(**sizes))
    sizes = dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    llava = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**sizes))
    assert "preset llama-2-7b" in make_hparams("memit", llava)[1]
    gemma = transformers.Gemma3Config(text_config=dict(num_hidden_layers=34, hidden_size=2560))
    guess, origin = make_hparams("memit", gemma)
    assert origin.startswith("guess") and guess.layers == make_hparams("memit", gemma.text_config)[0].layers
    assert statistics_layers(gemma) == statistics_layers(gemma.text_config)


@pytest.mark.parametrize("kind", ("gemma3", "qwen2_5_vl"))
def test_the_command_line_edits_the_whole_checkpoint(kind, folder, tmp_path):
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps([{"prompt": REQUEST.prompt, "subject": REQUEST.subject, "target_new": "violin"}]))
    numbers = [part for name, value in NUMBERS.items() for part in ("--set", f"{name}={str(value).lower()}")]
    done = run("edit", folder, "--requests", requests, "--out", tmp_path / "out", "--patch", tmp_path / "patch",
               "--layers", "1", *numbers, "--set", "context_template_length_params=[]")  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(tensor, after[name]) for name, tensor in before.items()) == 1
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    done = run("patch", "apply", tmp_path / "patch", folder)
    assert done.returncode == 0, done.stderr
    patched = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in patched.items())
