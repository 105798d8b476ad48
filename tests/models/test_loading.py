"""What is written is what is in memory, the same bytes each time, or nothing is written and nothing is claimed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny_models import KINDS, TEXT, make_model, make_tokenizer
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from kedit_fast import Editor, EditRequest, collect_statistics, load_statistics, save_statistics
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import EditError, KeditError, PatchError, StatisticsError, UnsupportedModelError
from kedit_fast.models.loading import load_config, load_model
from kedit_fast.models.saving import save_model
from kedit_fast.models.view import ModelView
from kedit_fast.patches.checkpoint import Checkpoint
from kedit_fast.solver.alphaedit_projector import load_projector, save_projector
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics import memit_npz
from kedit_fast.support import files
from kedit_fast.workflow import save_edited

REQUEST = EditRequest("{} plays the", "Miles Davis", "violin", id=7)
NUMBERS = dict(v_num_grad_steps=3, v_lr=0.1, clamp_norm_factor=0.5, mom2_adjustment=False, mom2_update_weight=1.0)


def edited(model, method="memit", **options):
    numbers = {"lr": 1e-3} if method == "ultraedit" else NUMBERS
    editor = Editor(model, make_tokenizer(), method, layers=(1, 2), hparams=numbers, prefixes=("A tower. ",), **options)
    editor.edit([REQUEST])
    return editor


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def all_of(folder):
    return {path.relative_to(folder).as_posix(): sha(path) for path in folder.rglob("*") if path.is_file()}


# A model's folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_edited_model_is_saved_and_loads_as_what_it_is(kind, dtype, tmp_path):
    model = make_model(kind, dtype)
    save_edited(model, make_tokenizer(), tmp_path / "out", editor=edited(model))
    found, _ = load_model(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert files.same_bits(found.state_dict()[name], tensor), name


def test_a_model_in_shards_and_one_with_a_tied_head_are_read_back_whole(tmp_path):
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    edited(model)
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="20KB")
    save_model(model, make_tokenizer(), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    found, _ = load_model(tmp_path / "out")
    assert all(torch.equal(found.state_dict()[n], t) for n, t in model.state_dict().items())


EDITED = "model.layers.1.mlp.down_proj.weight"


def drops(model):
    def drop(module, state, *_):
        del state[EDITED]

    model._register_state_dict_hook(drop)


def alters(model):
    model._register_state_dict_hook(lambda module, state, *_: state.update({EDITED: state[EDITED] * 2}))


def renames(model):
    model._register_state_dict_hook(lambda module, state, *_: state.update({"other.weight": state.pop(EDITED)}))


def ignores(model):
    model._keys_to_ignore_on_save = {EDITED}


def keeps_a_copy(model):
    """What a loader that gives the weights from before would do."""
    before, whole = make_model("llama").state_dict(), model.save_pretrained
    model.save_pretrained = lambda folder: whole(folder, state_dict=dict(before))


def casts(model):
    whole = model.save_pretrained
    model.save_pretrained = lambda folder: whole(
        folder, state_dict={n: t.half() for n, t in model.state_dict().items()}
    )


def writes_nothing(model):
    model.save_pretrained = model.config.save_pretrained


def truncates(model):
    whole = model.save_pretrained

    def save(folder):
        whole(folder)
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)

    model.save_pretrained = save


def flips_a_bit(model):
    whole = model.save_pretrained

    def save(folder):
        whole(folder)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    model.save_pretrained = save


def disk_is_full(model):
    def save(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model.save_pretrained = save


def test_experts_that_transformers_writes_one_by_one_are_compared_after_loading(tmp_path):
    """Transformers 5 has all experts of a layer in one tensor, and writes them under the names of the checkpoints."""
    small = dict(vocab_size=400, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64)  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**small, bos_token_id=0, eos_token_id=1, pad_token_id=2)).eval()
    save_model(model, make_tokenizer(), tmp_path / "right")
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "right")
    before = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    experts = [name for name in before if "experts" in name]
    whole = model.save_pretrained

    def alters_an_expert(folder, **options):
        with torch.no_grad():
            before[experts[-1]].mul_(2)
            whole(folder, **options)
            before[experts[-1]].div_(2)

    model.save_pretrained = alters_an_expert
    with pytest.raises(KeditError, match=r"experts.* is not what the model has"):
        save_model(model, make_tokenizer(), tmp_path / "wrong")
    assert os.listdir(tmp_path) == ["right"]


@pytest.mark.parametrize(
    "how, message",
    (
        (drops, f"{EDITED} is missing"), (alters, f"{EDITED} is not what the model has"),
        (renames, f"{EDITED} is missing"), (ignores, f"{EDITED} is missing"),
        (keeps_a_copy, "layers.[12].mlp.down_proj.weight is not what the model has"),
        (casts, "is not what the model has"), (writes_nothing, "the model was not written there"),
        (truncates, "cannot read the model in"), (flips_a_bit, "is not what the model has"),
        (disk_is_full, "No space left on device"),
    ),
)  # fmt: skip
def test_a_folder_that_would_load_as_another_model_is_not_kept(how, message, tmp_path):
    model = make_model("llama")
    edited(model)
    how(model)
    with pytest.raises(KeditError, match=message):
        save_model(model, make_tokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == []
    save_model(make_model("llama"), make_tokenizer(), tmp_path / "out")
    before = sha(tmp_path / "out" / "model.safetensors")
    with pytest.raises(KeditError, match=message):
        save_model(model, make_tokenizer(), tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and sha(tmp_path / "out" / "model.safetensors") == before


def with_adapter(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def with_compiled_block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def with_pruned_attention(model):
    prune.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", 0.5)


@pytest.mark.parametrize("how", (with_adapter, with_compiled_block, with_pruned_attention))
def test_a_model_that_its_class_would_not_make_is_not_saved(how, tmp_path):
    model = make_model("llama")
    how(model)
    with pytest.raises(
        KeditError, match=r"would be an adapter|would not load as \S+ \S+ it has no model\.layers\.[01]\."
    ):
        save_model(model, make_tokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_tensors_that_its_class_does_not_have_are_saved_and_named(tmp_path, caplog):
    model = make_model("llama")
    model.model.layers[0].register_buffer("scale", torch.tensor(1.5))
    model.model.layers[0].temperature = torch.nn.Parameter(torch.tensor(2.0))
    model.model.layers[0].register_buffer("nothing", torch.empty(0), persistent=False)
    save_edited(model, make_tokenizer(), tmp_path / "out", editor=edited(model))
    assert "model.layers.0.scale is saved, but from_pretrained will leave it out" in caplog.text
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    save_model(make_model("llama"), make_tokenizer(), tmp_path / "other")
    patch = edited(make_model("llama")).patch()
    tensors = {**safetensors.torch.load_file(tmp_path / "other" / "model.safetensors"), "a.scale": torch.tensor(1.0)}
    safetensors.torch.save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    Checkpoint(tmp_path / "other").apply(patch, "a patch")
    assert safetensors.torch.load_file(tmp_path / "other" / "model.safetensors")["a.scale"] == 1


# Adapters


def adapter(folder, targets=("q_proj", "lm_head"), base=None, whole=False):
    """A base model's folder, and an adapter's; with `whole` both are one."""
    peft = pytest.importorskip("peft")
    make_model("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(make_model("llama"), config)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base") if base is None else base
    place = folder / ("base" if whole else "adapter")
    wrapped.save_pretrained(place, save_embedding_layers=False)
    return place, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("whole", (False, True))
def test_an_adapters_folder_is_refused_or_merged_when_asked(whole, tmp_path):
    place, expected = adapter(tmp_path, whole=whole)
    for call in (lambda: load_model(place), lambda: load_config(place)):
        with pytest.raises(UnsupportedModelError, match=r"adapter_config.json.*--merge-adapter"):
            call()
    assert load_config(place, merge_adapter=True).model_type == "llama"
    model, _ = load_model(place, merge_adapter=True)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.allclose(model.state_dict()[n], t, atol=1e-6) for n, t in expected.items())
    assert not torch.equal(expected["lm_head.weight"], make_model("llama").lm_head.weight)
    edited(model)
    save_model(model, make_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    found, _ = load_model(tmp_path / "out")
    assert all(torch.equal(found.state_dict()[n], t) for n, t in model.state_dict().items())


def test_an_adapter_that_names_no_model_or_is_damaged_is_refused_with_what_to_do(tmp_path):
    place, _ = adapter(tmp_path)
    about = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UnsupportedModelError, match="cannot merge the adapter"):
        load_model(place, merge_adapter=True)
    (place / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": None}))
    with pytest.raises(UnsupportedModelError, match="set base_model_name_or_path in it"):
        load_model(place, merge_adapter=True)
    (place / "adapter_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"cannot read .*adapter_config\.json"):
        load_config(place, merge_adapter=True)


def test_the_command_line_refuses_an_adapter_before_anything_and_merges_it_when_asked(tmp_path):
    from support import run

    place, _ = adapter(tmp_path)
    (tmp_path / "requests.json").write_text(
        json.dumps([{"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"}])
    )
    numbers = [arg for name, value in NUMBERS.items() for arg in ("--set", f"{name}={value}")]
    command = ("edit", place, "--requests", tmp_path / "requests.json", "--out", tmp_path / "out", "--layers", "1-2",
               *numbers, "--set", "context_template_length_params=[]")  # fmt: skip
    refused = run(*command)
    assert refused.returncode == 1 and "--merge-adapter" in refused.stderr and not (tmp_path / "out").exists()
    done = run(*command, "--merge-adapter")
    assert done.returncode == 0, done.stderr
    merged, _ = load_model(place, merge_adapter=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = [n for n, t in merged.state_dict().items() if not torch.equal(found.state_dict()[n], t)]
    assert changed == [EDITED, EDITED.replace("1", "2")]


# Files


def broken(path):
    """A disk that loses a bit of whatever is written to it."""
    data = bytearray(Path(path).read_bytes())
    data[-3] ^= 4
    Path(path).write_bytes(data)


def with_a_bad_disk(monkeypatch):
    real = files.save_file

    def save(tensors, path, metadata):
        real(tensors, path, metadata)
        broken(path)

    monkeypatch.setattr(files, "save_file", save)


def writers(folder):
    model = make_model("llama")
    alpha = edited(model, "ultraedit")
    statistics = collect_statistics(make_model("llama"), make_tokenizer(), TEXT, (1,), progress=False)
    return {
        "patch": lambda: alpha.patch().save(folder / "patch"),
        "state": lambda: alpha.save_state(folder / "state"),
        "statistics": lambda: save_statistics(statistics, folder),
        "values": lambda: edited(make_model("llama"), values=folder / "values"),
    }


@pytest.mark.parametrize("what", ("patch", "state", "statistics", "values"))
def test_a_file_that_is_read_back_as_something_else_does_not_appear(what, tmp_path, monkeypatch):
    write = writers(tmp_path)[what]
    with_a_bad_disk(monkeypatch)
    with pytest.raises(KeditError, match=r"cannot write .*: \S+ is read back as something else"):
        write()
    assert os.listdir(tmp_path) == []


def test_an_npz_and_a_text_that_are_read_back_as_something_else_do_not_appear(tmp_path, monkeypatch):
    real = numpy.savez

    def lossy(file, **entries):
        real(file, **{name: value * 0 if value.dtype.kind == "f" else value for name, value in entries.items()})

    monkeypatch.setattr(numpy, "savez", lossy)
    found = collect_statistics(make_model("llama"), make_tokenizer(), TEXT, (1,), progress=False).moment(1)
    with pytest.raises(StatisticsError, match=r"mom2\.mom2 is read back as something else"):
        memit_npz.write(tmp_path / "a.npz", found, {}, None)
    with pytest.raises(EditError, match="v_star is read back as something else"):
        edited(make_model("llama"), values=str(tmp_path / "layer_{}_clamp_{}_case_{}.npz"))
    real_write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: real_write(self, data[:-1]))
    with pytest.raises(KeditError, match="read back as something else"):
        files.write_text(tmp_path / "out.toml", "a = 1\n", KeditError)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_is_read_back_as_something_else_stays_as_it_was(tmp_path):
    save_model(make_model("llama"), make_tokenizer(), tmp_path / "model")
    patch = edited(make_model("llama")).patch()
    before = sha(tmp_path / "model" / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "model")

    class Lossy(type(Path())):
        def open(self, mode="r", *args, **kwargs):
            opened = super().open(mode, *args, **kwargs)
            return Forgetful(opened) if mode == "r+b" else opened

    class Forgetful:
        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def write(self, data):
            return self.stream.write(bytes(len(data)))

    checkpoint.folder = Lossy(tmp_path / "model")
    with pytest.raises(PatchError, match=r"down_proj.weight is read back as something else"):
        checkpoint.apply(patch, "a patch")
    assert sha(tmp_path / "model" / "model.safetensors") == before
    assert not (tmp_path / "model" / "kedit_fast_patches").exists()
    assert Checkpoint(tmp_path / "model").apply(patch, "a patch") == 1


def test_metadata_is_in_the_order_of_its_names_and_says_what_it_said(tmp_path):
    names = [f"{letter}{i}" for i in range(9) for letter in "zaMé"]
    metadata = {name: f'{name} "quoted"\n\t\\ \x7f  語 /' for name in names}
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(3, dtype=torch.int8), "none": torch.empty(0, 4)}
    for name in ("one", "two"):
        files.write_file(tmp_path / name, tensors, metadata, KeditError)
    assert sha(tmp_path / "one") == sha(tmp_path / "two")
    data = (tmp_path / "one").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == sorted(names) and header["__metadata__"] == metadata
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == metadata
        assert all(files.same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    files.write_file(tmp_path / "bare", tensors, {}, KeditError)
    assert safetensors.torch.load_file(tmp_path / "bare").keys() == tensors.keys()


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
torch.manual_seed(0)
from test_loading import everything
everything(Path(sys.argv[1]))
"""


def everything(folder):
    """One of each file that the package writes."""
    model = make_model("gpt2")
    statistics = collect_statistics(model, make_tokenizer(), TEXT, (1, 2), progress=False)
    save_statistics(statistics, folder / "statistics")
    memit_npz.write(folder / "moment.npz", statistics.moment(1), {"a": "b", "c": "d"}, 10)
    spaces = {layer: NullSpace.from_covariance(statistics.moment(layer).moment, 0.5, "relative") for layer in (1, 2)}
    save_projector(folder / "null_space_project.pt", spaces)
    editor = Editor(model, make_tokenizer(), "memit-sequential", statistics=statistics, layers=(1, 2),
                    hparams={**NUMBERS, "mom2_adjustment": True, "mom2_ridge": 1e-2}, prefixes=("A tower. ",),
                    values=folder / "values.safetensors")  # fmt: skip
    editor.edit([REQUEST])
    editor.edit([EditRequest("{} lives in", "Marcel Maupoint", "Madrid")])
    patch = editor.patch()
    patch.save(folder / "patch.safetensors")
    save_edited(model, make_tokenizer(), folder / "model", editor=editor)
    save_model(make_model("gpt2"), make_tokenizer(), folder / "patched")
    Checkpoint(folder / "patched").apply(patch, "patch.safetensors")
    try:
        from kedit_fast.patches.lora import export_lora

        export_lora(patch, folder / "lora", base_model="base")
    except PatchError:  # without peft
        pass


def test_the_same_run_writes_the_same_bytes_whatever_the_hash_seed(tmp_path):
    file = Path(__file__)
    paths = [str(file.parent), str(file.parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    here, there = tmp_path / "here", tmp_path / "there"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # this process has another, a random one if unset
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = SCRIPT.format(paths=[path for path in paths if path])
    there.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, "."], cwd=there, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here.mkdir()
    everything(here)
    runs = [all_of(here), all_of(there)]
    assert len(runs[0]) > 15 and runs[0] == runs[1]
    assert not [name for name in runs[0] if re.search(r"\.part|\.tmp", name)]


def test_files_say_nothing_of_when_they_were_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    for name, moment in (("one", 1.6e9), ("two", 1.9e9)):
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)
        torch.manual_seed(0)
        (tmp_path / name).mkdir()
        everything(tmp_path / name)
        runs.append(
            {p.relative_to(tmp_path / name).as_posix(): sha(p) for p in (tmp_path / name).rglob("*.*") if p.is_file()}
        )
    assert runs[0] == runs[1]


def test_what_is_read_again_is_what_was_written(tmp_path):
    model = make_model("llama")
    statistics = collect_statistics(model, make_tokenizer(), TEXT, (1,), progress=False)
    save_statistics(statistics, tmp_path)
    found = load_statistics(tmp_path, model, make_tokenizer(), (1,))
    assert files.same_bits(found.moment(1).moment, statistics.moment(1).moment)
    space = NullSpace.from_covariance(statistics.moment(1).moment, 0.5, "relative")
    save_projector(tmp_path / "p.pt", {1: space})
    assert load_projector(tmp_path / "p.pt", (1,), trust=True)[1].dimension == space.dimension
    cache = MemitCache(str(tmp_path / "layer_{}_clamp_{}_case_{}.pkl"))  # no .npz at its end
    edited(make_model("llama"), values=cache)
    assert [p.name for p in tmp_path.glob("*case*")] == ["layer_2_clamp_0.5_case_7.pkl"]
    assert ValueFile(None).entries == {} and ModelView(model).num_layers == 4
