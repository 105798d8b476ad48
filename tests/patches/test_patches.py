"""Edits as files: written, read, applied, taken back, merged, exported; in memory and on disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file, save_file
from support import REQUESTS, make_editor, random_patch, run, saved
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from kedit_fast.errors import EditError, PatchError, UnsupportedModelError
from kedit_fast.models.view import ModelView
from kedit_fast.patches.checkpoint import RECORDS, TWIN, Checkpoint
from kedit_fast.patches.lora import export_lora
from kedit_fast.patches.patch import Patch, Target, merge
from kedit_fast.solver.low_rank import LowRankUpdate, MaskedUpdate
from kedit_fast.solver.shaping import compact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def step(patch, name, weight, terms):
    """1 ulp of a 16-bit weight; in fp32, where every patch added rounds once, half an ulp a sum of the largest term."""
    if weight.dtype != torch.float32:
        return ulp(weight)
    update = patch.updates[name]
    added = update.left.abs() @ update.right.abs().T
    return (1 + terms / 2) * ulp(weight.abs() + added)


def ulp(tensor):
    return (torch.nextafter(tensor.abs(), torch.tensor(torch.inf, dtype=tensor.dtype)) - tensor.abs()).float()


@pytest.fixture(scope="module")
def edited():
    """An editor with two batches written, and the file of its patch."""
    editor = make_editor("gpt2")
    editor.edit(REQUESTS[:2])
    editor.edit(REQUESTS[2:])
    return editor


@pytest.mark.parametrize("kind", ("gpt2", "llama"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_patch_gives_another_copy_the_edited_weights(kind, dtype, tmp_path):
    editor = make_editor(kind, dtype=dtype)
    editor.edit(REQUESTS[:2])
    editor.edit(REQUESTS[2:])
    editor.patch().save(tmp_path / "a.safetensors")
    patch = Patch.load(tmp_path / "a.safetensors")
    assert [r["subject"] for r in patch.requests] == [r.subject for r in REQUESTS] and patch.method == "memit"
    assert patch.configuration["mom2_update_weight"] == 10.0
    model = make_model(kind, dtype)
    before = state(model)
    applied = patch.apply_(model)
    for name, module in patch.updates.items():
        found, expected = (view.linear(name)[1] for view in (ModelView(model), editor.view))
        assert bool(((found.float() - expected.float()).abs() <= step(patch, name, expected, 2)).all()), name
        assert module.rank == 3
    applied.revert_()
    applied.revert_()
    assert same(model, before)


def test_rolled_back_batches_are_not_in_a_patch():
    editor = make_editor()
    with pytest.raises(EditError, match="nothing to make a patch of"):
        editor.patch()
    editor.edit(REQUESTS[:1])
    editor.edit(REQUESTS[1:])
    editor.rollback()
    patch = editor.patch()
    assert [r["subject"] for r in patch.requests] == [REQUESTS[0].subject]
    editor.edit(REQUESTS[2:])
    assert [r["subject"] for r in editor.patch().requests] == [REQUESTS[0].subject, REQUESTS[2].subject]


def test_methods_with_masks_final_steps_and_other_modules_make_patches(tmp_path):
    rect = make_editor(method="rect", layers=(0, 1), mom2_update_weight=10.0)
    rect.edit(REQUESTS)
    assert all(isinstance(update, MaskedUpdate) for update in rect.patch().updates.values())
    prune = make_editor(method="prune", layers=(0, 1), mom2_update_weight=10.0)
    prune.edit(REQUESTS)
    prune.finish()
    for number, editor in enumerate((rect, prune)):
        editor.patch().save(tmp_path / f"{number}.safetensors")
        patch, model = Patch.load(tmp_path / f"{number}.safetensors"), make_model("llama")
        patch.apply_(model)
        for name in patch.updates:
            found, expected = (m.get_submodule(name).weight for m in (model, editor.view.model))
            assert relative_error(found, expected) < 1e-6


def test_another_model_is_refused_and_nothing_written(edited):
    patch = edited.patch()
    other = make_model("gpt2", seed=1)
    before = state(other)
    with pytest.raises(PatchError, match=r"h\.0\.mlp\.c_proj is not the matrix.*may then say something else"):
        patch.apply_(other)
    with pytest.raises(PatchError, match="is bfloat16, the patch was made for float32"):
        patch.apply_(make_model("gpt2", torch.bfloat16))
    with pytest.raises(PatchError, match="has this patch's edits already"):
        patch.apply_(edited.view.model)
    with pytest.raises(PatchError, match="no module"):
        patch.apply_(make_model("llama"))
    assert same(other, before)
    patch.apply_(other, force=True)
    assert not same(other, before)


def test_a_result_that_is_not_finite_is_not_swapped_in():
    model = make_model("llama", torch.float16)
    patch, before = random_patch(model, scale=300.0), state(model)
    with pytest.raises(PatchError, match="not finite"):
        patch.apply_(model)
    assert same(model, before)


def test_an_interrupted_swap_is_taken_back(monkeypatch):
    model = make_model("llama")
    prepared, before = random_patch(model).prepare(model), state(model)
    real, calls = torch.Tensor.copy_, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared.swap_()
    monkeypatch.undo()
    assert same(model, before)
    prepared.swap_()
    assert not same(model, before)


def test_changes_between_are_noticed():
    model = make_model("llama")
    patch = random_patch(model)
    prepared = patch.prepare(model)
    weight = model.get_submodule(next(iter(patch.updates))).weight
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(PatchError, match="changed since the patch was prepared"):
        prepared.swap_()
    with torch.no_grad():
        weight[0, 0] -= 1
    applied = patch.apply_(model, force=True)
    with torch.no_grad():
        weight[1, 1] += 1
    with pytest.raises(PatchError, match="changed since the patch was applied"):
        applied.revert_()
    applied.revert_(force=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_patches_are_their_sequence_to_1_ulp(dtype):
    """The sequence as the editor writes it: into an fp32 master, rounded once."""
    model = make_model("llama", dtype)
    patches = [random_patch(model, seed=seed) for seed in range(3)]
    merged, masters = merge(patches), {}
    for name in merged.updates:
        masters[name] = model.get_submodule(name).weight.detach().float().clone()
        for patch in patches:
            patch.updates[name].apply_(masters[name])
    assert all(update.rank == 9 for update in merged.updates.values())
    merged.apply_(model)
    for name, master in masters.items():
        found, expected = model.get_submodule(name).weight.detach(), master.to(dtype)
        assert bool(((found.float() - expected.float()).abs() <= step(merged, name, expected, 3)).all())
        assert relative_error(found, expected) < torch.finfo(dtype).eps


def test_a_patch_that_holds_another_is_not_added_twice():
    editor = make_editor()
    editor.edit(REQUESTS[:1])
    first = editor.patch()
    editor.edit(REQUESTS[1:])
    for patches in ([first, editor.patch()], [first, first]):
        with pytest.raises(PatchError, match="the last one is enough"):
            merge(patches)
    assert merge([first, first], force=True)


def test_a_model_that_was_moved_or_trained_is_noticed():
    editor = make_editor()
    editor.edit(REQUESTS[:1])
    with torch.no_grad():
        editor.view.weight(0)[0, 0] += 1
    with pytest.raises(EditError, match="changed by something else"):
        editor.patch()
    editor = make_editor()
    editor.view.model.to(torch.bfloat16)
    with pytest.raises(EditError, match="moved or cast"):
        editor.edit(REQUESTS[:1])
    model = make_model("llama")
    prepared = random_patch(model).prepare(model)
    applied = random_patch(model).apply_(model)
    model.to(torch.bfloat16)
    for call in (prepared.swap_, applied.revert_):
        with pytest.raises(PatchError, match="has changed since"):
            call()


def test_a_chain_of_editors_merges_to_what_it_wrote(tmp_path):
    """In 16 bits the editor's own fp32 master makes the sequence exact, so merged and written agree to 1 ulp."""
    editor = make_editor(dtype=torch.bfloat16)
    editor.edit(REQUESTS[:1])
    first = editor.patch()
    editor.edit(REQUESTS[1:])
    whole = editor.patch()
    follower = {name: LowRankUpdate(update.left[:, 1:], update.right[:, 1:]) for name, update in whole.updates.items()}
    targets = {
        name: Target(first.targets[name].result, whole.targets[name].result, "bfloat16", False) for name in follower
    }
    merged = merge([first, Patch(follower, targets, "memit", requests=whole.requests[1:])])
    model = make_model("llama", torch.bfloat16)
    merged.apply_(model)
    for name in merged.updates:
        found, expected = (m.get_submodule(name).weight.detach() for m in (model, editor.view.model))
        assert bool(((found.float() - expected.float()).abs() <= ulp(expected)).all())
    assert merged.targets[name].result == whole.targets[name].result and len(merged.requests) == 3
    with pytest.raises(PatchError, match="patch 2 is for another"):
        merge([random_patch(make_model("llama")), random_patch(make_model("llama", seed=1))])
    assert merge([random_patch(make_model("llama")), random_patch(make_model("llama", seed=1))], force=True)


def test_compaction_keeps_its_tolerance_and_the_fewest_factors():
    generator = torch.Generator().manual_seed(0)
    base = LowRankUpdate(*(torch.randn(n, 6, generator=generator) for n in (40, 70)))
    thousands = LowRankUpdate(
        torch.cat([base.left @ torch.randn(6, 6, generator=generator) for _ in range(200)], 1),
        torch.cat([base.right @ torch.randn(6, 6, generator=generator) for _ in range(200)], 1),
    )  # rank 6 in 1,200 factors
    exact = compact(LowRankUpdate(thousands.left.double(), thousands.right.double()), 1e-6)
    assert exact.rank == 6 and relative_error(exact.dense(), thousands.dense().double()) < 1e-5
    wide = LowRankUpdate(*(torch.randn(n, 30, generator=generator) for n in (40, 70)))
    for tolerance in (0.01, 0.1, 0.5):
        small = compact(wide, tolerance)
        assert relative_error(small.dense(), wide.dense()) <= tolerance * (1 + 1e-5)
        fewer = compact(wide, rank=small.rank - 1)
        assert fewer.rank == small.rank - 1 and relative_error(fewer.dense(), wide.dense()) > tolerance
    assert compact(wide).rank == 30 and relative_error(compact(wide).dense(), wide.dense()) < 1e-6
    assert compact(LowRankUpdate(torch.zeros(4, 2), torch.zeros(5, 2))).rank == 0
    mask = torch.rand(40, 70, generator=generator) > 0.5
    masked = MaskedUpdate.from_mask(wide, mask)
    assert relative_error(compact(masked).dense(), masked.dense()) < 1e-6
    with pytest.raises(PatchError, match="tolerance"):
        random_patch(make_model("llama")).compacted(1.0)


def test_damaged_and_foreign_files_are_named(edited, tmp_path):
    path = tmp_path / "a.safetensors"
    edited.patch().save(path)
    with pytest.raises(PatchError, match=r"none\.safetensors"):
        Patch.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PatchError, match=r"cut\.safetensors"):
        Patch.load(tmp_path / "cut.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(PatchError, match="is not a patch"):
        Patch.load(tmp_path / "other.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, tmp_path / "later.safetensors", {**metadata, "format_version": "9"})
    with pytest.raises(PatchError, match="format 9"):
        Patch.load(tmp_path / "later.safetensors")
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "short.safetensors", metadata)
    with pytest.raises(PatchError, match="is damaged"):
        Patch.load(tmp_path / "short.safetensors")
    save_file({**tensors, name: tensors[name] * torch.nan}, tmp_path / "nan.safetensors", metadata)
    with pytest.raises(PatchError, match="not finite"):
        Patch.load(tmp_path / "nan.safetensors")


class Linear4bit(torch.nn.Linear):
    """What a layer of bitsandbytes looks like."""

    def __init__(self, shape):
        super().__init__(1, 1, bias=False)
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)


def test_quantized_layers_are_refused_by_name():
    model = make_model("llama")
    patch = random_patch(model)
    model.model.layers[1].mlp.down_proj = Linear4bit((1024, 1))
    for call in (lambda: patch.apply_(model), lambda: ModelView(model)):
        with pytest.raises(
            (PatchError, UnsupportedModelError), match=r"layers\.1\.mlp\.down_proj.*Linear4bit.*quantized"
        ):
            call()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(64, 32).to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModelError, match="float8"):
        ModelView(model)


# On disk


def sharded(folder, kind, dtype=torch.float32, size="40KB"):
    make_model(kind, dtype).save_pretrained(folder, max_shard_size=size)
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("kind", ("gpt2", "llama"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", ("40KB", "1GB"))
def test_a_checkpoint_on_disk_is_what_the_model_in_memory_is(kind, dtype, size, tmp_path):
    folder = sharded(tmp_path / "model", kind, dtype, size)
    before = files_of(folder)
    assert (len(before) > 2) == (size == "40KB")
    model = make_model(kind, dtype)
    patches = [random_patch(model, seed=1)]
    patches[0].apply_(model)
    patches.append(random_patch(model, seed=2))
    for number, patch in enumerate(patches, 1):
        assert Checkpoint(folder).apply(patch, f"{number}.safetensors") == number
    patches[1].apply_(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(dtype)
    assert same(loaded, state(model))
    assert Checkpoint(folder).revert() == "2.safetensors" and Checkpoint(folder).revert() == "1.safetensors"
    assert files_of(folder) == before and not (folder / RECORDS).exists()
    with pytest.raises(PatchError, match="no patch was applied here"):
        Checkpoint(folder).revert()


def test_what_was_not_kept_is_subtracted_to_rounding(tmp_path):
    folder = sharded(tmp_path / "model", "llama")
    before, model = files_of(folder), make_model("llama")
    patch, other = random_patch(model), random_patch(model, seed=9)
    with pytest.raises(PatchError, match="no patch was applied here, not this one"):
        Checkpoint(folder).subtract(patch)
    assert Checkpoint(folder).apply(patch, "a", store_originals=False) == 1
    assert files_of(folder) != before
    with pytest.raises(PatchError, match="was not kept: --subtract"):
        Checkpoint(folder).revert()
    with pytest.raises(PatchError, match="the newest patch is a, not this one"):
        Checkpoint(folder).subtract(other)
    Checkpoint(folder).subtract(patch)
    assert not (folder / RECORDS).exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name in patch.updates:
        assert relative_error(loaded.get_submodule(name).weight, model.get_submodule(name).weight) < 1e-6
    Checkpoint(folder).apply(other, "b", force=True)
    with pytest.raises(PatchError, match="revert without --subtract is exact"):
        Checkpoint(folder).subtract(other)
    assert Checkpoint(folder).revert() == "b"


def test_refusals_leave_a_checkpoint_as_it_was(tmp_path):
    folder = sharded(tmp_path / "model", "llama")
    before = files_of(folder)
    checkpoint = Checkpoint(folder)
    with pytest.raises(PatchError, match="not the matrix"):
        checkpoint.apply(random_patch(make_model("llama", seed=1)), "a")
    with pytest.raises(PatchError, match=r"has no transformer\.h\.0"):
        checkpoint.apply(random_patch(make_model("gpt2")), "a")
    with pytest.raises(PatchError, match="not finite"):
        checkpoint.apply(random_patch(make_model("llama"), scale=1e25), "a")
    with pytest.raises(PatchError, match="neither"):
        Checkpoint(tmp_path)
    assert files_of(folder) == before and not (folder / RECORDS).exists()
    checkpoint.apply(random_patch(make_model("llama")), "a")
    assert any(name.endswith(TWIN) for name in files_of(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(folder / index[name])
    tensors[name][0, 0] += 1
    save_file(tensors, folder / index[name], {"format": "pt"})
    with pytest.raises(PatchError, match="changed since a was applied"):
        checkpoint.revert()
    checkpoint = Checkpoint(folder)
    assert checkpoint.revert(force=True) == "a"


def test_shards_of_a_hub_cache_are_links_whose_blobs_stay(tmp_path):
    folder = sharded(tmp_path / "model", "llama", size="1GB")
    blob = tmp_path / "blob"
    shutil.move(folder / "model.safetensors", blob)
    (folder / "model.safetensors").symlink_to(blob)
    before = blob.read_bytes()
    Checkpoint(folder).apply(random_patch(make_model("llama")), "a")
    assert blob.read_bytes() == before and (folder / "model.safetensors").read_bytes() != before


KILLED = """
import os, shutil, signal, sys, traceback
from pathlib import Path
sys.path[:] = {path!r}
import torch
from kedit_fast.patches import checkpoint
from kedit_fast.patches.patch import Patch
torch.set_num_threads(1)  # a copy of a process has none of its threads
def run(at, folder):
    calls = 0
    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    place = checkpoint.Checkpoint(folder)
    Path.replace, Path.unlink, os.fsync = counted(Path.replace), counted(Path.unlink), counted(os.fsync)
    shutil.copyfile = counted(shutil.copyfile)
    if {how!r} == "revert":
        place.revert()
    elif {how!r} == "subtract":
        place.subtract(Patch.load({patch!r}))
    else:
        place.apply(Patch.load({patch!r}), "a")
for line in sys.stdin:
    at, folder = line.rstrip().split(" ", 1)
    child = os.fork()
    if not child:
        try:
            run(int(at), folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def killing(how, patch):
    """A function (at, folder) -> exit status of a process that is killed before its `at`-th change on disk."""
    script = KILLED.format(path=sys.path, how=how, patch=str(patch))
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", script], **pipe) as server:

        def status(at, folder):
            server.stdin.write(f"{at} {folder}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield status
        server.stdin.close()


def loaded(folder):
    """What transformers would load: of all matrices, by the index or the single file."""
    return {name: tensor.clone() for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


@pytest.mark.parametrize(
    ("size", "how"), (("40KB", "apply"), ("40KB", "revert"), ("1GB", "apply"), ("1GB", "subtract"))
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path, size, how):
    model = make_model("llama")
    patch = random_patch(model)
    patch.save(tmp_path / "a.safetensors")
    source = sharded(tmp_path / "source", "llama", size=size)
    plain = state(model)
    patch.apply_(model)
    patched = state(model)
    if how != "apply":
        Checkpoint(source).apply(patch, "a", store_originals=how == "revert")
    with killing(how, tmp_path / "a.safetensors") as status:
        kill_at_every_moment(tmp_path, source, how, patch, plain, patched, status)


def kill_at_every_moment(tmp_path, source, how, patch, plain, patched, status):
    outcomes, code, at = set(), None, 0
    while code != 0:
        at += 1
        folder = shutil.copytree(source, tmp_path / "killed")
        code = status(at, folder)
        assert code in (0, -signal.SIGKILL)
        found = loaded(folder)
        has = all(torch.equal(tensor, patched[name]) for name, tensor in found.items())
        assert has or all(
            torch.equal(t, plain[name]) if how != "subtract" else relative_error(t, plain[name]) < 1e-6
            for name, t in found.items()
        )
        outcomes.add(has)
        if has and how == "subtract":
            Checkpoint(folder).subtract(patch)
        elif has:  # the next command finds a record to go by, and nothing else
            assert Checkpoint(folder).revert() == "a"
        else:
            with pytest.raises(PatchError, match="no patch was applied here"):
                Checkpoint(folder).revert()
        assert same_files(folder, ".safetensors") and not (folder / RECORDS).exists()
        shutil.rmtree(folder)
    assert outcomes == {False, True} and at > 6


def same_files(folder, suffix):
    """Whether the index names all files of the folder, and no other."""
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return named == {path.name for path in folder.iterdir() if path.name.endswith(suffix)}


def test_two_processes_do_not_patch_one_checkpoint(tmp_path):
    import fcntl

    folder = sharded(tmp_path / "model", "llama")
    with (folder / ".kedit_fast_patch.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(PatchError, match="by another process"):
            Checkpoint(folder).apply(random_patch(make_model("llama")), "a")


def test_a_full_disk_names_the_file_and_changes_nothing(tmp_path):
    folder = sharded(tmp_path / "model", "llama")
    random_patch(make_model("llama")).save(tmp_path / "a.safetensors")
    before = files_of(folder)
    script = (
        "import resource, signal, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from kedit_fast.patches.checkpoint import Checkpoint\n"
        "from kedit_fast.patches.patch import Patch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"patch = Patch.load({str(tmp_path / 'a.safetensors')!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        f"Checkpoint({str(folder)!r}).apply(patch, 'a')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "PatchError: cannot write" in done.stderr and ".safetensors" in done.stderr
    assert files_of(folder) == before and not list(folder.glob(".*.part"))
    assert same_files(folder, ".safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    folder = sharded(tmp_path / "model", "llama")
    folder.chmod(0o555)
    try:
        with pytest.raises(PatchError, match="cannot write"):
            Checkpoint(folder).apply(random_patch(make_model("llama")), "a")
    finally:
        folder.chmod(0o755)


# LoRA


@pytest.mark.parametrize("kind", ("gpt2", "llama"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_peft_loads_the_adapter_with_the_edited_models_logits(kind, dtype, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(kind, dtype)
    patch = random_patch(model, rank=4, scale=0.15)
    names = list(patch.updates)
    updates = dict(patch.updates)
    updates[names[1]] = LowRankUpdate(*(t[:, :2] for t in (updates[names[1]].left, updates[names[1]].right)))
    patch = Patch(updates, patch.targets, "test")
    modules = export_lora(patch, tmp_path / "adapter")
    assert [module.rank for module in modules.values()] == [4, 2]
    assert all(module.error < 1e-6 for module in modules.values())
    adapted = peft.PeftModel.from_pretrained(make_model(kind, dtype), tmp_path / "adapter").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = model(ids).logits.float()
        patch.apply_(model)
        expected, found = model(ids).logits.float(), adapted(ids).logits.float()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(found, expected) < limit < 0.5 * relative_error(plain, expected)


def test_an_adapter_to_a_tolerance_and_its_refusals(edited, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    patch = edited.patch()
    cut = export_lora(patch, tmp_path / "one", rank=1, base_model="tiny")
    assert max(module.rank for module in cut.values()) == 1
    for name, module in cut.items():
        delta = patch.updates[name].dense().double()
        sizes = torch.linalg.svdvals(delta)
        assert module.error == pytest.approx(float(sizes[1:].norm() / sizes.norm()), rel=1e-3)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny" and config["fan_in_fan_out"] is True and config["r"] == 1
    with pytest.raises(PatchError, match="exists"):
        export_lora(patch, tmp_path / "one")
    zeros = {name: LowRankUpdate(u.left * 0, u.right) for name, u in patch.updates.items()}
    with pytest.raises(PatchError, match="changes nothing"):
        export_lora(Patch(zeros, patch.targets, "test"), tmp_path / "two")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PatchError, match="peft package"):
        export_lora(patch, tmp_path / "two")
    assert not (tmp_path / "two").exists()


# The command line


def test_the_commands(tmp_path):
    pytest.importorskip("peft")
    folder = saved(tmp_path / "model", "llama")
    before = files_of(folder)
    patches = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(patches):
        random_patch(make_model("llama"), seed=seed).save(path)
    shown = run("patch", "show", patches[0])
    assert shown.returncode == 0 and "model.layers.1.mlp.down_proj" in shown.stdout and "float32" in shown.stdout
    about = json.loads(run("patch", "show", patches[0], "--json").stdout)
    assert about["modules"]["model.layers.0.mlp.down_proj"]["rank"] == 3 and about["edits"] == 0
    applied = run("patch", "apply", patches[0], folder)
    assert applied.returncode == 0 and "kedit-fast patch revert" in applied.stdout and files_of(folder) != before
    refused = run("patch", "apply", patches[1], folder)
    assert refused.returncode == 1 and "--force" in refused.stderr and refused.stdout == ""
    assert json.loads(run("patch", "apply", patches[1], folder, "--force", "--json").stdout)["number"] == 2
    assert json.loads(run("patch", "revert", folder, "--json").stdout)["patch"] == "b.safetensors"
    assert "bit for bit" in run("patch", "revert", folder).stdout and files_of(folder) == before
    merged = run("patch", "merge", *patches, "--out", tmp_path / "ab.safetensors", "--tolerance", "0", "--json")
    assert json.loads(merged.stdout)["modules"]["model.layers.0.mlp.down_proj"]["rank"] == 6
    assert run("patch", "merge", *patches, "--out", tmp_path / "ab.safetensors").returncode == 1
    exported = run("patch", "export", tmp_path / "ab.safetensors", "--format", "lora", "--out", tmp_path / "lora")
    assert exported.returncode == 0 and "Ranks 6, 6" in exported.stdout
    assert run("patch", "apply", patches[0], folder, "--no-keep").returncode == 0
    assert "to rounding" in run("patch", "revert", folder, "--subtract", patches[0]).stdout
    missing = run("patch", "show", tmp_path / "none.safetensors")
    assert missing.returncode == 1 and "none.safetensors" in missing.stderr
