"""Patches of experts: saved, applied, reverted, merged, thinned; in memory and in files of every layout."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import run
from tiny_models import make_model
from transformers import AutoModelForCausalLM

pytest.importorskip("transformers.core_model_loading", reason="transformers 5 has experts modules")

from tiny_models import MIXTURES

from kedit_fast.errors import PatchError
from kedit_fast.models.experts import expert_stack
from kedit_fast.models.view import ModelView
from kedit_fast.patches.checkpoint import Checkpoint
from kedit_fast.patches.dequantized import apply_dequantized
from kedit_fast.patches.lora import export_lora
from kedit_fast.patches.patch import Patch, Target, merge
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.solver.harm import Harm
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate
from kedit_fast.support.matrix_bits import sha256

LAYERS = (1, 2)


def stacks(model):
    """Path of each edited weight -> its stack, and whether it is stored transposed."""
    view = ModelView(model)
    for layer in LAYERS:
        path = view.module_name(layer)
        stack = expert_stack(model, path.rpartition(".")[0])
        yield path, stack.weight, stack.module.is_transposed


def make_update(shape, seed=0, u=3):
    """A random update of all experts but the last one, fp32."""
    experts, out, inner = shape
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(experts, 1, u, generator=generator) < 0.7
    chosen[:, :, 0], chosen[-1] = True, False
    right = torch.randn(experts, inner, u, generator=generator) * chosen
    left = torch.randn(out, u, generator=generator) * 0.1
    return ExpertUpdate.of_stacked(LowRankUpdate(left, right.flatten(0, 1)), experts)


def make_patch(model, requests=("a",), seed=0, dense=False):
    """A patch of two layers of a tiny mixture, and what the weights are to become."""
    updates, targets, results = {}, {}, {}
    for number, (path, weight, transposed) in enumerate(stacks(model)):
        update = make_update(weight.shape, seed + number)
        delta = torch.zeros(weight.shape)
        for expert, (first, last) in enumerate(itertools.pairwise(update.offsets.tolist())):
            for row in range(first, last):
                delta[expert] += torch.outer(update.left[:, int(update.columns[row])], update.right[row])
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        results[path] = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
        updates[path] = DenseUpdate(delta) if dense else update
        dtype = str(weight.dtype).removeprefix("torch.")
        targets[path] = Target(sha256(weight), "", dtype, transposed)
    texts = tuple({"prompt": one, "subject": "", "target_new": "b"} for one in requests)
    return Patch(updates, targets, "memit", {}, texts), results


def close(one, other):
    """Whether two weights are equal but for the order of sums: within one step of a 16-bit dtype."""
    step = 2 * float(torch.finfo(one.dtype).eps)
    return torch.allclose(one.double(), other.double(), rtol=max(1e-6, step), atol=1e-6)


def bits(folder):
    """Name -> tensor of all files of a checkpoint."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_patch_of_experts_is_saved_applied_and_reverted_bit_for_bit(kind, dtype, tmp_path):
    model = make_model(kind, dtype)
    patch, results = make_patch(model)
    patch.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        path = next(iter(results))
        assert file.metadata()["format_version"] == "3"
        assert {n for n in file.keys() if n.startswith(path)} == {  # noqa: SIM118  a file has no other way
            f"{path}.{end}" for end in ("left", "right", "columns", "offsets")
        }
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.digest == patch.digest and loaded.nbytes == patch.nbytes
    about = loaded.about()["modules"][path]
    assert about["shape"] == list(results[path].shape) and about["changed_experts"] == results[path].shape[0] - 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = loaded.apply_(model)
    for name, weight, _ in stacks(model):
        assert close(weight, results[name]) and not torch.equal(weight[0], before_of(before, name, weight)[0])
        assert torch.equal(weight[-1], before_of(before, name, weight)[-1])
    with pytest.raises(PatchError, match="is not the matrix"):
        loaded.apply_(model)
    applied.revert_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def before_of(state, name, like):
    stored = state[name]
    return stored.mT if like.shape != stored.shape or like.stride() != stored.stride() else stored


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("layout", ("as released", "as released, in shards", "as in memory"))
def test_a_patch_of_experts_changes_files_of_every_layout_and_is_reverted(kind, layout, tmp_path):
    folder = tmp_path / "model"
    options = {"max_shard_size": "20KB"} if "shards" in layout else {}
    make_model(kind, torch.bfloat16).save_pretrained(folder, save_original_format="released" in layout, **options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    patch, results = make_patch(model)
    before = bits(folder)
    checkpoint = Checkpoint(folder)
    if "shards" in layout:
        assert len({file.name for file in folder.glob("*.safetensors")}) > 3
    for path, weight, transposed in stacks(model):
        assert torch.equal(checkpoint.stored(path).read(transposed), weight)
    assert checkpoint.apply(patch, "facts") == 1
    edited = AutoModelForCausalLM.from_pretrained(folder)
    applied = patch.apply_(model)
    for (name, weight, _), (_, expected, _) in zip(stacks(edited), stacks(model), strict=True):
        assert torch.equal(weight, expected) and close(weight, results[name])
    others = {name for name, tensor in model.state_dict().items() if name not in results}
    assert all(torch.equal(edited.state_dict()[name], model.state_dict()[name]) for name in others)
    applied.revert_()
    with pytest.raises(PatchError, match="is not the matrix"):
        checkpoint.apply(patch, "again")
    assert checkpoint.revert() == "facts"
    assert bits(folder).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(folder).items())


def test_files_hold_experts_one_by_one_or_together_and_both_were_tested(tmp_path):
    for kind, names in (
        ("mixtral", "model.layers.1.block_sparse_moe.experts.{}.w2.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.{}.down_proj.weight"),
        ("granitemoe", "model.layers.1.block_sparse_moe.output_linear.weight"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj"),
    ):
        model = make_model(kind)
        model.save_pretrained(tmp_path / kind)
        stored = Checkpoint(tmp_path / kind).stored(ModelView(model).module_name(1))
        assert [piece.tensor for piece in stored.pieces] == [names.format(i) for i in range(len(stored.pieces))]
        assert len(stored.pieces) == (1 if "{}" not in names else stored.shape[0])


def test_what_was_not_kept_is_subtracted(tmp_path):
    folder = tmp_path / "model"
    make_model("qwen3_moe").save_pretrained(folder)
    patch, _ = make_patch(AutoModelForCausalLM.from_pretrained(folder))
    before, checkpoint = bits(folder), Checkpoint(folder)
    checkpoint.apply(patch, "facts", store_originals=False)
    with pytest.raises(PatchError, match="was not kept"):
        checkpoint.revert()
    checkpoint.subtract(patch)
    assert all(torch.allclose(tensor, before[name], rtol=0, atol=1e-5) for name, tensor in bits(folder).items())
    assert checkpoint.records() == []


def test_a_failure_while_shards_are_copied_leaves_the_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    make_model("qwen3_moe").save_pretrained(folder, max_shard_size="20KB")
    patch, _ = make_patch(AutoModelForCausalLM.from_pretrained(folder))
    before, names, checkpoint = bits(folder), {p.name for p in folder.iterdir()}, Checkpoint(folder)

    def fail(*_):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("kedit_fast.patches.checkpoint.os.fsync", fail)
    with pytest.raises(PatchError, match="No space left"):
        checkpoint.apply(patch, "facts")
    monkeypatch.undo()
    assert {p.name for p in folder.iterdir()} - {".kedit_fast_patch.lock"} == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(folder).items())
    checkpoint.apply(patch, "facts")


def test_files_that_do_not_have_the_experts_are_named(tmp_path):
    folder = tmp_path / "model"
    model = make_model("qwen3_moe")
    model.save_pretrained(folder)
    patch, _ = make_patch(model)
    (path, *_), file = patch.updates, folder / "model.safetensors"
    tensors = load_file(file)
    last = f"{path.removesuffix('.down_proj')}.5.down_proj.weight"
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != last}, "has 5 of the 6 experts"),
        ({n: t for n, t in tensors.items() if ".1.mlp.experts" not in n}, rf"has no {path}"),
        ({**tensors, last: tensors[last][:3].clone()}, "another shape or dtype"),
        ({**tensors, last: tensors[last].to(torch.float8_e4m3fn)}, "is quantized"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(PatchError, match=message):
            Checkpoint(folder).apply(patch, "facts")
    dense = make_model("llama")
    dense.save_pretrained(folder)
    with pytest.raises(PatchError, match=f"has no {path}"):
        Checkpoint(folder).apply(patch, "facts")
    with pytest.raises(PatchError, match="no module"):
        patch.apply_(dense)
    other = make_model("mixtral")
    with pytest.raises(PatchError, match="the patch is for"):
        patch.apply_(other)


def test_patches_of_experts_merge_and_those_of_one_editor_do_not():
    model = make_model("qwen3_moe")
    first, _ = make_patch(model)
    applied = first.apply_(model)
    targets = {path: sha256(weight) for path, weight, _ in stacks(model)}
    second, after = make_patch(model, ("c",), seed=7)
    applied.revert_()
    known = {n: Target(t.original, targets[n], t.dtype, t.transposed) for n, t in first.targets.items()}
    first = Patch(first.updates, known, "memit", {}, first.requests)
    merged = merge([first, second])
    assert all(isinstance(update, ExpertUpdate) and update.rank == 6 for update in merged.updates.values())
    merged.apply_(model)
    assert all(close(weight, after[name]) for name, weight, _ in stacks(model))
    both = {name: ExpertUpdate.joined([first.updates[name], second.updates[name]]) for name in first.updates}
    later = Patch(both, first.targets, "memit", {}, (*first.requests, *second.requests))
    with pytest.raises(PatchError, match="begin with the same updates"):
        merge([first, later])
    beside, _ = make_patch(make_model("qwen3_moe"), ("d",), seed=20)
    sums = merge([first, beside]).updates
    for name, update in sums.items():
        assert close(update.dense(), first.updates[name].dense() + beside.updates[name].dense())


def test_a_compacted_patch_of_experts_is_within_its_tolerance():
    model = make_model("qwen3_moe")
    patch, _ = make_patch(model)
    doubled = Patch({n: ExpertUpdate.joined([u, u]) for n, u in patch.updates.items()}, patch.targets, "memit")
    for tolerance in (0.0, 0.3):
        compacted = doubled.compacted(tolerance)
        for name, update in compacted.updates.items():
            whole = 2 * patch.updates[name].dense()
            assert isinstance(update, ExpertUpdate) and update.rank <= 3
            assert float((update.dense() - whole).norm() / whole.norm()) <= tolerance + 1e-6
    one = patch.compacted(rank=1).updates
    for name, update in patch.updates.items():
        stacked = update.dense().transpose(0, 1).flatten(1).double()  # [out, E m]
        sizes = torch.linalg.svdvals(stacked)
        gap = float((one[name].dense() - update.dense()).norm())
        assert one[name].rank == 1 and gap == pytest.approx(float(sizes[1:].norm()), rel=1e-4)


def test_a_patch_of_whole_matrices_of_experts(tmp_path):
    model = make_model("gpt_oss")
    patch, results = make_patch(model, dense=True)
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    loaded.apply_(model)
    assert all(torch.equal(weight, results[name]) for name, weight, _ in stacks(model))


def test_what_cannot_hold_experts_refuses_them(tmp_path):
    patch, _ = make_patch(make_model("qwen3_moe"))
    pytest.importorskip("peft")
    with pytest.raises(PatchError, match=r"experts\.down_proj is the stack of a layer's experts"):
        export_lora(patch, tmp_path / "adapter")
    with pytest.raises(PatchError, match="is of experts"):
        apply_dequantized(patch, tmp_path / "a", tmp_path / "b", "facts")
    harm = Harm.of(patch.updates.items())
    assert harm.norm == pytest.approx(float(sum(u.dense().square().sum() for u in patch.updates.values()) ** 0.5))


def test_damaged_files_of_experts_are_named(tmp_path):
    patch, _ = make_patch(make_model("qwen3_moe"))
    file = tmp_path / "p.safetensors"
    patch.save(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors, path = load_file(file), next(iter(patch.updates))
    for end, wrong in (("offsets", torch.tensor([0, 99])), ("columns", torch.full_like(tensors[f"{path}.columns"], 9))):
        save_file({**tensors, f"{path}.{end}": wrong}, file, metadata)
        with pytest.raises(PatchError, match="is damaged"):
            Patch.load(file)
    save_file({n: t for n, t in tensors.items() if n != f"{path}.offsets"}, file, metadata)
    with pytest.raises(PatchError, match="is damaged: no update has the parts"):
        Patch.load(file)


def test_the_command_shows_applies_and_reverts(tmp_path):
    folder, file = tmp_path / "model", tmp_path / "p.safetensors"
    model = make_model("mixtral")
    model.save_pretrained(folder)
    patch, _ = make_patch(model)
    patch.save(file)
    before = bits(folder)
    shown = run("patch", "show", file)
    assert shown.returncode == 0 and "4 experts" in shown.stdout and "5 x 32 x 24" in shown.stdout
    modules = json.loads(run("patch", "show", file, "--json").stdout)["modules"]
    assert all(module["changed_experts"] == 4 for module in modules.values())
    assert run("patch", "apply", file, folder).returncode == 0
    assert not all(torch.equal(tensor, before[name]) for name, tensor in bits(folder).items())
    assert run("patch", "revert", folder).returncode == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(folder).items())
