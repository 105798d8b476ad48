"""Which models can be edited: everything else is refused by name before anything is computed, or works."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy
import pytest
import torch
from tiny_models import KINDS, make_model, make_tokenizer
from torch.nn.utils import parametrize, prune
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from kedit_fast import Editor, EditRequest
from kedit_fast.editing.values.store import edited_hash
from kedit_fast.errors import EditError, PatchError, UnsupportedModelError
from kedit_fast.evaluation.metrics import shares
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.forward import Site, capture, pad, require_passes
from kedit_fast.models.loading import load_model
from kedit_fast.models.prompt_runner import record_prompts
from kedit_fast.models.saving import save_model
from kedit_fast.models.view import ModelView
from kedit_fast.patches.patch import Patch
from kedit_fast.workflow import run_edits

REQUEST = EditRequest("{} plays the", "Miles Davis", "violin")
NUMBERS = dict(v_num_grad_steps=3, v_lr=0.1, clamp_norm_factor=0.5, mom2_adjustment=False, mom2_update_weight=1.0,
               v_weight_decay=0.0, kl_factor=0.0)  # fmt: skip


def editor_of(model, method="memit", layers=(1, 2), **hparams):
    numbers = {"lr": 1e-3} if method == "ultraedit" else {**NUMBERS, **hparams}
    return Editor(model, make_tokenizer(), method, layers=layers, hparams=numbers, prefixes=("The old tower. ",))


def edited(model, **options):
    """What an edit makes of a model's matrices."""
    editor = editor_of(model, **options)
    editor.edit([REQUEST])
    return [weight.clone() for weight in editor.modules.values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Wrapped(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.module = block

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def a_pipeline(model):
    return pipeline("text-generation", model=model, tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda model: "some/model", "the path 'some/model': load it first"),
        (lambda model: None, "a NoneType is no causal language model"),
        (lambda model: (model, make_tokenizer()), "a tuple is .* pass its parts"),
        (lambda model: type(model), "a class LlamaForCausalLM is .* pass a model of it"),
        (a_pipeline, "a TextGenerationPipeline is .* pass its .model"),
        (lambda model: torch.nn.DataParallel(model), "wrapped in a DataParallel: pass the model inside, model.module"),
        (Wrapped, "wrapped in a Wrapped: pass the model inside"),
        (lambda model: torch.nn.Linear(4, 4), "a Linear has no config"),
        (
            lambda model: AutoModel.from_config(model.config),
            "LlamaModel has no head that gives logits of tokens: load it with AutoModelForCausalLM",
        ),
        (lambda model: AutoModelForSequenceClassification.from_config(model.config), "has no head that gives logits"),
    ),
)
def test_what_is_no_causal_language_model_is_refused_by_what_it_is(make, message):
    model = make(make_model("llama"))
    for call in (lambda: editor_of(model), lambda: shares(model, make_tokenizer(), [REQUEST])):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def test_a_model_in_a_process_group_is_refused_by_its_wrapper():
    class DistributedDataParallel(Wrapped):  # the real one wants a process group
        config = None  # as DeepSpeed's engine has one of its own

    with pytest.raises(UnsupportedModelError, match=r"wrapped in a DistributedDataParallel: pass .* model.module"):
        editor_of(DistributedDataParallel(make_model("llama")))
    sharded = torch.nn.Module()
    sharded._fsdp_wrapped_module = make_model("llama")
    with pytest.raises(UnsupportedModelError, match="sharded"):
        editor_of(sharded)
    model = make_model("llama")
    model.model.layers[3] = Wrapped(model.model.layers[3])
    with pytest.raises(UnsupportedModelError, match=r"block 3 is a Wrapped .* is it wrapped"):
        ModelView(model)


@pytest.mark.parametrize("targets", (["down_proj"], ["q_proj"], ["lm_head"]))
def test_adapters_inside_a_model_are_refused_by_name(targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    injected = make_model("llama")
    injected.add_adapter(config)
    with pytest.raises(UnsupportedModelError, match=r"adapter.*merge_and_unload"):
        editor_of(injected)
    base = make_model("llama")
    wrapped = peft.get_peft_model(base, config)
    with pytest.raises(UnsupportedModelError, match=r"wrapped in an adapter .PeftModelForCausalLM.*merge_and_unload"):
        editor_of(wrapped)
    with pytest.raises(UnsupportedModelError, match=f"{targets[0]} is an adapter's Linear"):
        editor_of(base)
    assert edited(wrapped.merge_and_unload())


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_a_compiled_model_is_edited_as_the_model_inside(kind):
    model, other = make_model(kind), make_model(kind)
    compiled = torch.compile(model, backend="eager")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = compiled(ids).logits
        assert same(edited(compiled), edited(other))
        assert not torch.equal(compiled(ids).logits, before) and torch.equal(compiled(ids).logits, other(ids).logits)


def compiled_block(model):
    model.model.layers[2] = torch.compile(model.model.layers[2], backend="eager")


def compiled_in_place(model):
    model.model.layers[2].mlp.compile(backend="eager")


def compiled_linear(model):
    model.model.layers[2].mlp.down_proj = torch.compile(model.model.layers[2].mlp.down_proj, backend="eager")


def compiled_forward(model):
    model.model.layers[2].forward = torch.compile(model.model.layers[2].forward, backend="eager")


@pytest.mark.parametrize("how", (compiled_block, compiled_in_place, compiled_linear, compiled_forward))
def test_compiled_modules_inside_a_model_are_refused_by_name(how):
    model = make_model("llama")
    how(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2\S* is compiled.*Edit the model before"):
        editor_of(model)


def halved(module):
    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(module, "weight", Half())


@pytest.mark.parametrize(
    "how, cure",
    (
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), r"prune\.remove"),
        (halved, "remove_parametrizations"),
        (torch.nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
        (torch.nn.utils.parametrizations.orthogonal, "remove_parametrizations"),
        (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
        (lambda module: torch.nn.utils.weight_norm(module), "remove_weight_norm"),
    ),
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_hook_computes_again_are_refused_with_what_makes_them_permanent(how, cure):
    model = make_model("llama")
    how(model.model.layers[1].mlp.down_proj)
    with pytest.raises(UnsupportedModelError, match=f"layers.1.mlp.down_proj.weight is computed again.*{cure}"):
        editor_of(model)
    path = "model.layers.1.mlp.down_proj"
    with pytest.raises(UnsupportedModelError, match="is computed again"):
        editor = dict(lr=1e-3, inner_params=(f"{path}.weight",))
        Editor(model, make_tokenizer(), "ultraedit", hparams=editor)


def test_pruning_that_was_made_permanent_is_edited():
    model = make_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    prune.l1_unstructured(linear, "weight", 0.5)
    prune.remove(linear, "weight")
    assert edited(model)


def test_a_hook_that_puts_a_weight_back_is_noticed_and_nothing_stays():
    model = make_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    kept = linear.weight.detach().clone()

    def put_back(module, args):
        module.weight.data.copy_(kept)

    linear.register_forward_pre_hook(put_back)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = editor_of(model)
    with pytest.raises(EditError, match=r"layers\.1\.mlp\.down_proj\.weight was changed by something else"):
        editor.edit([REQUEST])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not editor.ledger.batches


def test_a_run_of_edits_reports_no_success_when_a_hook_put_a_weight_back():
    model = make_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    kept = linear.weight.detach().clone()

    def put_back(module, args):
        module.weight.data.copy_(kept)

    linear.register_forward_pre_hook(put_back)
    numbers = {**NUMBERS, "layers": (1,), "context_template_length_params": ()}  # rank one: no pass after its write
    with pytest.raises(EditError, match=r"layers\.1\.mlp\.down_proj\.weight was changed by something else"):
        run_edits(model, make_tokenizer(), [REQUEST], "rome", statistics=None, hparams=numbers)
    assert torch.equal(linear.weight, kept)


def test_a_hook_that_puts_a_rank_one_write_back_is_noticed_in_the_edit_itself():
    model = make_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    kept = linear.weight.detach().clone()

    def put_back(module, args):
        module.weight.data.copy_(kept)

    linear.register_forward_pre_hook(put_back)
    numbers = {**NUMBERS, "context_template_length_params": ()}
    editor = Editor(model, make_tokenizer(), "rome", layers=[1], hparams=numbers)
    with pytest.raises(EditError, match=r"layers\.1\.mlp\.down_proj\.weight was changed by something else"):
        editor.edit([REQUEST])
    assert torch.equal(linear.weight, kept) and not editor.ledger.batches


def test_a_write_that_is_put_back_at_the_end_of_a_run_takes_the_whole_run_back(monkeypatch):
    from kedit_fast import workflow

    model, armed, real = make_model("llama"), [], workflow.Evaluator.measure
    linear = model.model.layers[1].mlp.down_proj
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = linear.weight.detach().clone()

    def put_back(module, args):
        if armed:
            module.weight.data.copy_(kept)

    linear.register_forward_pre_hook(put_back)

    def measure(self, state="final", *args, **kwargs):
        if state == "final":
            armed.append(True)
        return real(self, state, *args, **kwargs)

    monkeypatch.setattr(workflow.Evaluator, "measure", measure)
    numbers = {**NUMBERS, "layers": (0, 1), "context_template_length_params": ()}
    with pytest.raises(EditError, match="was changed by something else"):
        run_edits(model, make_tokenizer(), [REQUEST], "memit", statistics=None, hparams=numbers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def offloaded_to_host(model, part=""):
    """The model, whose part is on the host between passes, as a device_map with "cpu" beside a GPU leaves it."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model.get_submodule(part), execution_device=torch.device("cpu"))
    model.hf_device_map = {part: "cpu"}
    return model


@pytest.mark.parametrize("method", ("memit", "rome", "ultraedit"))
@pytest.mark.parametrize("part", ("lm_head", "model.layers.1.mlp.down_proj", "model.layers.2", ""))
def test_a_head_and_matrices_on_the_host_are_edited_as_on_a_device(part, method, tmp_path):
    layers = (1,) if method == "rome" else (1, 2)
    model, whole = offloaded_to_host(make_model("llama"), part), make_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    before = [weight.clone() for weight in editor_of(model, method, layers).modules.values()]
    unedited = model(ids).logits
    assert torch.equal(ModelView(model).head.matrix, whole.lm_head.weight)
    editor, expected = (editor_of(one, method, layers) for one in (model, whole))
    for one in (editor, expected):
        one.edit([REQUEST])
    for name, weight in editor.modules.items():
        torch.testing.assert_close(weight, expected.modules[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(ids).logits, unedited), "passes do not see the edit"
    save_model(model, make_tokenizer(), tmp_path / "saved")
    loaded, _ = load_model(tmp_path / "saved")
    for name, weight in editor.modules.items():
        assert torch.equal(loaded.get_submodule(name).weight, weight)
    editor.patch().save(tmp_path / "edits.safetensors")
    editor.rollback()
    assert same(editor.modules.values(), before) and torch.equal(model(ids).logits, unedited)
    patch = Patch.load(tmp_path / "edits.safetensors")
    applied = patch.apply_(model)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    applied.revert_()
    assert same(editor.modules.values(), before)


def test_matrices_on_disk_are_refused_by_name(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
    places |= {f"model.layers.{layer}": "disk" if layer == 3 else "cpu" for layer in range(4)}
    model, tokenizer = load_model(tmp_path / "model", device_map=places)
    with pytest.raises(UnsupportedModelError, match=r"layers\.3\S+ is offloaded to disk.*max_memory"):
        editor_of(model, layers=(2, 3))
    editor = editor_of(model)
    editor.edit([REQUEST])
    save_model(model, tokenizer, tmp_path / "edited")
    found, _ = load_model(tmp_path / "edited")
    assert all(torch.equal(found.get_submodule(name).weight, weight) for name, weight in editor.modules.items())
    whole = make_model("llama")
    for found_weight, expected in zip(editor.modules.values(), edited(whole), strict=True):
        torch.testing.assert_close(found_weight, expected, rtol=1e-5, atol=1e-6)
    patch = editor_of(whole, layers=(3,))
    patch.edit([REQUEST])
    with pytest.raises(PatchError, match=r"layers\.3\.mlp\.down_proj.*offloaded to disk"):
        patch.patch().apply_(model)
    whole = make_model("llama")
    accelerate.disk_offload(whole, tmp_path / "all", execution_device=torch.device("cpu"))
    assert torch.equal(ModelView(whole).head.matrix, make_model("llama").lm_head.weight)
    with pytest.raises(UnsupportedModelError, match="is offloaded to disk"):
        editor_of(whole)


def test_matrices_on_the_host_that_others_share_are_refused_by_both_names():
    model = make_model("llama")
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\S+ and \S+layers\.3\S+ share memory"):
        editor_of(offloaded_to_host(model))


def test_a_model_that_a_hook_moves_for_every_pass_is_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    model, other = make_model("llama"), make_model("llama")
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    assert same(edited(model), edited(other))  # it stays where it is
    hook.hook.execution_device = torch.device("cuda")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj\.weight is offloaded"):
        editor_of(model)


def test_a_model_without_values_is_refused_by_name():
    with torch.device("meta"):
        empty = make_model("llama")
    with pytest.raises(UnsupportedModelError, match="has no values: the model is not loaded"):
        editor_of(empty)


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_other_offloaded_blocks_are_fetched_and_the_edit_is_the_same(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, whole = make_model(kind), make_model(kind)
    view = ModelView(model)
    for layer in (0, 3):
        accelerate.cpu_offload(view.block(layer), execution_device=torch.device("cpu"))
    assert view.edited_module(3).weight.device.type == "meta" and view.weight(3).device.type == "cpu"
    assert edited_hash(view) == edited_hash(ModelView(whole))
    assert difference(fingerprint(view, make_tokenizer()), fingerprint(ModelView(whole), make_tokenizer())) == ""
    for found, expected in zip(edited(model), edited(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_weights_made_in_inference_mode_are_refused_by_name():
    with torch.inference_mode():
        model = make_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens.weight was made in torch.inference_mode"):
        editor_of(model)


@pytest.mark.parametrize("method", ("memit", "rome", "ultraedit"))
def test_edited_weights_that_something_else_shares_are_refused_by_both_names(method):
    layers = (1, 2) if method == "memit" else (1,)
    tied = make_model("llama")
    tied.model.layers[3].mlp.down_proj.weight = tied.model.layers[1].mlp.down_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\S+ and \S+layers\.3\S+ share memory"):
        editor_of(tied, method, layers)
    twice = make_model("llama")
    twice.model.layers[3] = twice.model.layers[1]
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\S+ and \S+layers\.3\S+ share memory"):
        editor_of(twice, method, layers)
    view = make_model("llama")
    view.register_buffer("part", view.model.layers[1].mlp.down_proj.weight.detach()[3:5, :7])
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\S+ and part share memory"):
        editor_of(view, method, layers)


def test_weights_side_by_side_in_one_buffer_are_no_sharing():
    model, other = make_model("llama"), make_model("llama")
    linears = [model.model.layers[layer].mlp.down_proj for layer in (1, 2)]
    flat = torch.cat([linear.weight.detach().flatten() for linear in linears])
    for linear, part in zip(linears, flat.chunk(2), strict=True):
        linear.weight = torch.nn.Parameter(part.view_as(linear.weight))
    assert same(edited(model), edited(other))


@pytest.mark.parametrize("make", (lambda w: w.T.contiguous().T, lambda w: torch.cat([w, w], 1)[:, : w.shape[1]]))
def test_weights_in_any_layout_are_edited_alike(make):
    model, other = make_model("llama"), make_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = torch.nn.Parameter(make(linear.weight.detach()))
    for found, expected in zip(edited(model), edited(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_weights_whose_entries_are_one_number_are_refused():
    for stride in ((0, 1), (1, 0), (1, 1)):
        model = make_model("llama")
        linear = model.model.layers[1].mlp.down_proj
        strided = torch.randn(200).as_strided(linear.weight.shape, stride)
        linear.weight = torch.nn.Parameter(strided, requires_grad=False)
        with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.down_proj.weight has strides .*expand"):
            editor_of(model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_weights_in_read_only_memory_are_refused_and_copies_on_write_are_edited(tmp_path):
    model, other = make_model("llama"), make_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    shape, path = tuple(linear.weight.shape), tmp_path / "weight"
    linear.weight.detach().numpy().tofile(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        weight = torch.from_numpy(numpy.frombuffer(mapped, numpy.float32).reshape(shape))
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.down_proj.weight lies in read-only memory"):
            editor_of(model)
        copied = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        weight = torch.from_numpy(numpy.frombuffer(copied, numpy.float32).reshape(shape))
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert same(edited(model), edited(other))
    assert path.read_bytes() == make_model("llama").model.layers[1].mlp.down_proj.weight.detach().numpy().tobytes()


@pytest.mark.parametrize("required", (lambda n: False, lambda n: True, lambda n: "down_proj" in n, lambda n: "q_" in n))
def test_what_requires_gradients_changes_nothing_and_stays_as_it_was(required):
    model, other = make_model("llama"), make_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required(name))
    assert same(edited(model), edited(other))
    assert all(parameter.requires_grad == required(name) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
@pytest.mark.parametrize(
    "extra", (torch.tensor(1.5), torch.empty(0), torch.empty(0, 3), torch.tensor(2), torch.tensor(True),
              torch.ones(2, dtype=torch.complex64))
)  # fmt: skip
def test_tensors_without_dimensions_or_entries_in_the_state_dict_are_carried_along(kind, extra):
    model, other = make_model(kind), make_model(kind)
    ModelView(model).block(0).register_buffer("scale", extra)
    view = ModelView(model)
    here = fingerprint(view, make_tokenizer())
    assert difference(here, fingerprint(ModelView(model), make_tokenizer())) == ""
    assert edited_hash(view) == edited_hash(ModelView(other))
    assert same(edited(model), edited(other))


def test_extra_state_that_is_no_tensor_is_let_be():
    model = make_model("llama")
    cls = type(model.model.layers[0].mlp)
    model.model.layers[0].mlp.__class__ = type("Extra", (cls,), {"get_extra_state": lambda self: {"anything": 1}})
    assert fingerprint(ModelView(model), make_tokenizer())


def test_what_became_of_a_model_after_its_editor_was_made_is_seen():
    model = make_model("llama")
    editor = editor_of(model)
    editor.edit([REQUEST])
    compiled_in_place(model)
    with pytest.raises(UnsupportedModelError, match="is compiled"):
        editor.edit([REQUEST])
    model = make_model("llama")
    editor = editor_of(model)
    prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.5)
    with pytest.raises(EditError, match="moved or cast"):
        editor.edit([REQUEST])


def test_an_editor_made_in_inference_mode_edits_outside_it():
    model, other = make_model("llama"), make_model("llama")
    with torch.inference_mode():
        editor = editor_of(model)
        with pytest.raises(EditError, match=r"outside torch.inference_mode"):
            editor.edit([REQUEST])
    editor.edit([REQUEST])
    assert same(editor.modules.values(), edited(other))


@pytest.mark.parametrize("force", (False, True))
def test_patches_go_into_no_weight_that_would_not_keep_them(force):
    editor = editor_of(make_model("llama"))
    editor.edit([REQUEST])
    patch = editor.patch()

    def pruned(model):
        prune.identity(model.model.layers[1].mlp.down_proj, "weight")

    def shared(model):
        model.register_buffer("part", model.model.layers[2].mlp.down_proj.weight.detach()[0])

    def adapted(model):
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))

    for how, message in ((pruned, r"prune\.remove"), (shared, "share memory"), (adapted, "is an adapter's Linear")):
        model = make_model("llama")
        how(model)
        with pytest.raises(PatchError, match=message):
            patch.apply_(model, force)
    with torch.inference_mode():
        model = make_model("llama")
    with pytest.raises(PatchError, match=r"was made in torch\.inference_mode"):
        patch.apply_(model, force)
    patch.apply_(torch.compile(make_model("llama"), backend="eager"), force)


# Hooks that see nothing


def goes_round_its_mlp(model):
    """A block that calls its MLP's forward, as fused code does, so that hooks on the module see nothing."""
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp.__class__ = type("Quiet", (type(mlp),), {"__call__": lambda self, x: self.forward(x)})


def goes_round_its_linear(model):
    linear = model.model.layers[1].mlp.down_proj
    linear.__class__ = type(
        "Linear", (torch.nn.Linear,), {"__call__": lambda self, x: torch.nn.functional.linear(x, self.weight)}
    )


def leaves_a_block_out(model):
    layer = model.model.layers[3]
    layer.__class__ = type("Skipped", (type(layer),), {"__call__": lambda self, hidden, *args, **kwargs: hidden})


@pytest.mark.parametrize(
    "how, method, name",
    (
        (goes_round_its_mlp, "rome", r"model\.layers\.1\.mlp"),
        (goes_round_its_linear, "memit", r"model\.layers\.1\.mlp\.down_proj"),
        (leaves_a_block_out, "memit", r"model\.layers\.3"),
    ),
)
def test_modules_that_do_not_run_are_named_before_anything_is_optimised(how, method, name):
    model = make_model("llama")
    how(model)
    with pytest.raises(UnsupportedModelError, match=f"{name} did not run in a forward pass of LlamaForCausalLM"):
        editor_of(model, method, (1, 2) if method == "memit" else (1,))


def test_every_pass_names_a_module_that_did_not_run():
    model = make_model("llama")
    view = ModelView(model)
    goes_round_its_mlp(model)
    batch = pad([[1, 2, 3]], view.device)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp did not run"):
        capture(view, batch, [Site(0, "key"), Site(1, "mlp")])
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp did not run"):
        record_prompts(view, [[1, 2, 3]], [1], [Site(1, "mlp")])
    leaves_a_block_out(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.3 did not run"):
        capture(view, batch, [Site(2, "block")], capture_entering=4)


def test_modules_that_see_parts_of_a_batch_are_named():
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    whole = type(mlp).__call__
    chunked = {"__call__": lambda self, x: torch.cat([whole(self, part) for part in x.chunk(2, 1)], 1)}
    mlp.__class__ = type("Chunked", (type(mlp),), chunked)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj was seen with \[1, 1, 64\]"):
        editor_of(model)


def test_a_linear_called_by_keyword_is_seen():
    model, other = make_model("llama"), make_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    call = {"__call__": lambda self, x: torch.nn.Linear.__call__(self, input=x)}
    linear.__class__ = type("Linear", (torch.nn.Linear,), call)
    assert same(edited(model), edited(other))


@pytest.mark.parametrize("kind", KINDS)
def test_the_pass_that_looks_leaves_a_model_and_the_generators_as_they_were(kind):
    model = make_model(kind).train()
    state, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    view = ModelView(model)
    require_passes(view, [Site(1, "key"), Site(2, "mlp"), Site(2, "attention"), Site(2, "block")])
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_spec_that_names_another_linear_is_refused():
    names = ("self_attn", "mlp", "mlp.down_proj", False, "model.norm")
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.randn(32, 40))
    model.model.layers[0].mlp.down_proj.forward = lambda x: x[..., :32]
    with pytest.raises(UnsupportedModelError, match="takes 64 inputs, its weight 40"):
        spec = ArchSpec("Odd", ("llama",), "model.layers", *names)
        require_passes(ModelView(model, spec), [Site(0, "key")])
