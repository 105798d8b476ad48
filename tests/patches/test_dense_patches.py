"""Patches of tuned matrices: saved, applied, reverted, merged, on disk and as an adapter."""

from __future__ import annotations

import json

import pytest
import torch
from floors import relative_error
from support import run
from tiny_models import make_model

from kedit_fast.errors import PatchError
from kedit_fast.models.view import ModelView
from kedit_fast.patches.checkpoint import Checkpoint
from kedit_fast.patches.lora import export_lora
from kedit_fast.patches.patch import Patch, Target, merge
from kedit_fast.solver.harm import predicted_kl
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate
from kedit_fast.support.matrix_bits import sha256


def make_patch(model, requests=("a",), base=None, seed=0):
    """A dense update of one module of a tiny model, on the model's matrix or on another one."""
    view, generator = ModelView(model), torch.Generator().manual_seed(seed)
    weight = view.weight(0)
    base = weight if base is None else base
    delta = torch.randn(weight.shape, generator=generator) * 0.05
    result = (base.float() + delta).to(weight.dtype)
    target = Target(sha256(base), sha256(result), str(weight.dtype).removeprefix("torch."), view.spec.transposed)
    texts = tuple({"prompt": one, "subject": "", "target_new": "b"} for one in requests)
    return Patch({view.module_name(0): DenseUpdate(delta)}, {view.module_name(0): target}, "ft", {}, texts), result


@pytest.mark.parametrize("kind", ("gpt2", "llama"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_dense_patch_is_saved_applied_and_reverted_bit_for_bit(kind, dtype, tmp_path):
    model = make_model(kind, dtype)
    patch, result = make_patch(model)
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.digest == patch.digest and loaded.nbytes == patch.nbytes == 4 * result.numel()
    (about,) = loaded.about()["modules"].values()
    assert about["dense"] and not about["masked"] and about["rank"] == min(result.shape)
    weight = ModelView(model).weight(0)
    before = weight.clone()
    applied = loaded.apply_(model)
    assert torch.equal(weight, result)
    with pytest.raises(PatchError, match="has this patch's edits already"):
        loaded.apply_(model)
    applied.revert_()
    assert torch.equal(weight, before)


def test_it_is_applied_to_a_checkpoint_on_disk_and_reverted(tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    patch, result = make_patch(model)
    checkpoint, (module,) = Checkpoint(tmp_path / "model"), patch.updates
    before = checkpoint.stored(module).read(True).clone()
    checkpoint.apply(patch, "tuned")
    assert torch.equal(checkpoint.stored(module).read(True), result)
    checkpoint.revert()
    assert torch.equal(checkpoint.stored(module).read(True), before)


def test_patches_that_follow_each_other_merge_and_those_of_one_editor_do_not():
    model = make_model("llama")
    first, after = make_patch(model)
    second, result = make_patch(model, ("c",), after, seed=1)
    merged = merge([first, second])
    (update,) = merged.updates.values()
    assert isinstance(update, DenseUpdate) and [r["prompt"] for r in merged.requests] == ["a", "c"]
    merged.apply_(model)
    assert relative_error(ModelView(model).weight(0), result) < 1e-6
    model = make_model("llama")
    later, _ = make_patch(model, ("a", "c"), seed=2)
    for other in (first, later):
        with pytest.raises(PatchError, match="begin with the same updates"):
            merge([first, other])
    beside, _ = make_patch(model, ("d",), seed=3)
    factors = Patch({name: LowRankUpdate.of_matrix(u.delta) for name, u in beside.updates.items()}, beside.targets, "x")
    for other in (beside, factors):
        (update,) = merge([first, other]).updates.values()
        assert relative_error(update.dense(), first.updates[module_of(first)].dense() + beside_delta(beside)) < 1e-6


def module_of(patch):
    (module,) = patch.updates
    return module


def beside_delta(patch):
    return patch.updates[module_of(patch)].dense()


def test_an_adapter_says_what_it_leaves_out(tmp_path):
    pytest.importorskip("peft")
    patch, _ = make_patch(make_model("llama"))
    module, sizes = module_of(patch), torch.linalg.svdvals(beside_delta(patch).double())
    assert export_lora(patch, tmp_path / "whole")[module].error < 1e-6
    part = export_lora(patch, tmp_path / "part", rank=3)[module]
    assert part.rank == 3 and part.error == pytest.approx(float(sizes[3:].norm() / sizes.norm()), rel=1e-5)
    patch.save(tmp_path / "p.safetensors")
    arguments = ["patch", "export", str(tmp_path / "p.safetensors"), "--out", str(tmp_path / "cli"), "--rank", "3"]
    assert json.loads(run(*arguments, "--json").stdout)["errors"] == {module: pytest.approx(part.error)}
    assert ", dense" in run("patch", "show", tmp_path / "p.safetensors").stdout


def test_damaged_files_and_wrong_shapes_are_named(tmp_path):
    with pytest.raises(PatchError, match="is not finite"):
        Patch({"a": DenseUpdate(torch.full((2, 2), torch.nan))}, {"a": Target("", "", "float32", False)}, "ft")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    patch, _ = make_patch(make_model("llama"))
    patch.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "2"
    tensors = load_file(tmp_path / "p.safetensors")
    save_file({**tensors, f"{module_of(patch)}.left": torch.ones(2, 2)}, tmp_path / "two.safetensors", metadata)
    with pytest.raises(PatchError, match="is damaged: no update has the parts"):
        Patch.load(tmp_path / "two.safetensors")
    with pytest.raises(PatchError, match="the patch is for"):
        patch.check(module_of(patch), torch.zeros(3, 3), False)


def test_predicted_kl_and_compact_take_the_matrix(tmp_path):
    delta = torch.randn(5, 7)
    inputs, outputs = torch.eye(7) * 2, torch.eye(5) * 3
    assert predicted_kl(DenseUpdate(delta), inputs, outputs) == pytest.approx(3 * float(delta.square().sum()), rel=1e-5)
