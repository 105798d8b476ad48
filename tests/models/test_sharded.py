"""A model that two processes hold together gives what one process gives: keys, statistics, edits, files, rollback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import CONFIGS, TEXT, make_model, make_tokenizer

from kedit_fast import Editor, collect_statistics
from kedit_fast.errors import PatchError, UnsupportedModelError
from kedit_fast.models.forward import Site, capture, evaluating, pad
from kedit_fast.models.loading import load_model
from kedit_fast.models.saving import save_model
from kedit_fast.models.sharded import columns, local, whole
from kedit_fast.models.view import ModelView
from kedit_fast.patches.swap import edited_weight_of
from kedit_fast.support import process_group

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
LIMIT = 1e-6
INNER = 80  # inputs of the edited layer: not twice the hidden size, so that a half of them is not taken for the others
LAYERS = (1, 2)
CLAMP = {"clamp_norm_factor": 0.75}
DRIFT = {"kl_temperature": 2.0, "kl_direction": "original"}
METHODS = {
    "memit": {"layers": LAYERS, "v_num_grad_steps": 4, "values_batch": 0, **CLAMP, **DRIFT},
    "alphaedit": {"layers": LAYERS, "v_num_grad_steps": 2, "nullspace_threshold": 1e-2, **CLAMP},
    "rome": {"layers": (1,), "v_num_grad_steps": 2, **CLAMP},
    "rect": {"layers": LAYERS, "v_num_grad_steps": 2},  # tries clamps
}
PREFIXES = ("The old tower. ", "Because nobody waited. ")
REQUESTS = [
    {"prompt": "{} plays the", "subject": subject, "target_new": target}
    for subject, target in (
        ("Miles Davis", "piano"), ("Thelonious Monk", "trumpet"), ("Danielle Darrieux", "tower"),
        ("Marcel Maupoint", "French"), ("Ebro", "Sweden"), ("Madrid", "English"), ("Spain", "piano"),
        ("The university", "trumpet"), ("Nobody", "home"), ("The instrument", "Spain"),
    )
]  # fmt: skip


def measure(folder: Path, out: Path, split: bool) -> dict[str, Any]:
    """Everything that the tests compare, of a model in this process or of this process's part of it."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(folder, torch.float64, tp_plan="auto" if split else None)
    view, results = ModelView(model), {}
    texts = [f"{text} Number {i}." for i, text in enumerate(TEXT * 6)]
    rows = [tokenizer(text)["input_ids"] for text in TEXT]
    sites = [Site(1, "key"), Site(2, "key"), Site(2, "mlp")]
    with evaluating(view):
        states, _ = capture(view, pad(rows, view.device), sites, torch.tensor([len(row) - 1 for row in rows]))
    results["keys"] = [states[site] for site in sites]
    statistics = collect_statistics(model, tokenizer, texts, LAYERS, max_tokens=300)
    results["moments"] = [statistics.moment(layer).moment for layer in LAYERS]
    results["fingerprint"], results["text"] = statistics.model, statistics.corpus
    before = {layer: local(view.weight(layer)).clone() for layer in LAYERS}
    results["original"] = {layer: whole(view.weight(layer)).clone() for layer in LAYERS}
    for method, hparams in METHODS.items():
        editor = Editor(
            model, tokenizer, method, statistics=statistics, hparams=hparams, prefixes=PREFIXES,
            values=out / "values" if method == "memit" else None,
        )  # fmt: skip
        first = editor.edit(REQUESTS[:9], on_error="skip")
        results[method] = {layer: whole(view.weight(layer)).clone() for layer in hparams["layers"]}
        results[f"{method} losses"], results[f"{method} norms"] = first.losses, first.relative_norms
        middle = {layer: local(view.weight(layer)).clone() for layer in LAYERS}
        if method == "memit":
            results["patch"] = {name: vars(target) for name, target in editor.patch().targets.items()}
            save_model(model, tokenizer, out / "saved")
        editor.edit(REQUESTS[9:] + REQUESTS[:1], on_error="skip")
        results[f"{method} twice"] = {layer: whole(view.weight(layer)).clone() for layer in hparams["layers"]}
        editor.rollback()
        results[f"{method} rolled back"] = all(torch.equal(local(view.weight(x)), middle[x]) for x in LAYERS)
        editor.restore()
        results[f"{method} restored"] = all(torch.equal(local(view.weight(x)), before[x]) for x in LAYERS)
    for dtype in (torch.float32, torch.bfloat16):  # fused modules; a master beside the weight
        model, _ = load_model(folder, dtype, tp_plan="auto" if split else None)
        view = ModelView(model)
        before = local(view.weight(1)).clone()
        editor = Editor(model, tokenizer, "rome", statistics=statistics, hparams=METHODS["rome"], prefixes=PREFIXES)
        editor.edit(REQUESTS[:2])
        results[str(dtype)] = whole(view.weight(1)).double()
        editor.rollback()
        results[f"{dtype} restored"] = torch.equal(local(view.weight(1)), before)
    results["shape"], results["columns"] = tuple(local(view.weight(1)).shape), columns(view.weight(1))
    return results


def of_two_processes(folder: Path, out: Path) -> None:
    """What torchrun runs."""
    results = measure(folder, out, split=True)
    with pytest.raises(UnsupportedModelError) as refusal:
        load_model(folder.parent / "without_plan", tp_plan="auto")
    results["refusal"] = str(refusal.value)
    with pytest.raises(PatchError, match="split over processes"):
        edited_weight_of(load_model(folder, tp_plan="auto")[0], "model.layers.1.mlp.down_proj")
    torch.save(results, out / f"rank{process_group.world()[0]}.pt")
    process_group.stop()


def under_torchrun(call: str, *args: Path) -> subprocess.CompletedProcess:
    program = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}; "
        f"from pathlib import Path; import test_sharded; test_sharded.{call}(*map(Path, sys.argv[1:]))"
    )
    script = args[-1] / f"{call}.py"
    script.write_text(program, encoding="utf-8")
    run = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run((*run, *map(str, args)), capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    gpt2: Any = make_model("gpt2")
    gpt2.save_pretrained(path.parent / "without_plan")
    make_tokenizer().save_pretrained(path.parent / "without_plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], "intermediate_size": INNER})
        model: Any = make_model("llama")
        model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> list[dict[str, Any]]:
    """Of one process, and of each of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    done = under_torchrun("of_two_processes", folder, two)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = measure(folder, one, split=False)
    alone["files"] = load_file(one / "saved" / "model.safetensors")
    both = [torch.load(two / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    both[0]["files"] = load_file(two / "saved" / "model.safetensors")
    both[0]["folder"] = two / "saved"
    return [alone, *both]


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


def test_each_process_holds_a_part(results):
    alone, first, second = results
    assert alone["shape"] == (32, INNER) and alone["columns"] is None
    assert first["shape"] == second["shape"] == (32, INNER // 2)
    assert (first["columns"], second["columns"]) == (slice(0, INNER // 2), slice(INNER // 2, INNER))


@pytest.mark.parametrize("rank", (0, 1))
def test_keys_and_statistics_are_those_of_one_process(results, rank):
    alone, part = results[0], results[1 + rank]
    for name in ("keys", "moments"):
        for one, other in zip(alone[name], part[name], strict=True):
            assert one.shape == other.shape and gap(one, other) < LIMIT
    assert part["fingerprint"] == alone["fingerprint"] and part["text"] == alone["text"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", (0, 1))
def test_edits_are_those_of_one_process(results, method, rank):
    alone, part = results[0], results[1 + rank]
    for name in (method, f"{method} twice"):
        for layer in alone[name]:
            change, other = (run[name][layer] - run["original"][layer] for run in (alone, part))
            assert float(change.norm()) > 0 and gap(change, other) < LIMIT
    assert part[f"{method} losses"] == pytest.approx(alone[f"{method} losses"], rel=LIMIT)
    assert part[f"{method} norms"] == pytest.approx(alone[f"{method} norms"], rel=LIMIT)
    assert part[f"{method} rolled back"] and part[f"{method} restored"]


@pytest.mark.parametrize(("dtype", "limit"), ((torch.float32, 1e-3), (torch.bfloat16, 0.5)))
def test_models_of_other_dtypes_are_edited_and_restored(results, dtype, limit):
    alone, first, second = results
    change = alone[str(dtype)] - alone["original"][1]
    assert gap(change, first[str(dtype)] - alone["original"][1]) < limit
    assert torch.equal(first[str(dtype)], second[str(dtype)])
    assert first[f"{dtype} restored"] and second[f"{dtype} restored"]


def test_the_saved_folder_is_that_of_one_process(results):
    alone, first, second = results
    assert alone["files"].keys() == first["files"].keys()
    for name, tensor in alone["files"].items():
        if name.endswith(tuple(f"{layer}.mlp.down_proj.weight" for layer in LAYERS)):
            assert gap(tensor, first["files"][name]) < LIMIT
        else:
            assert torch.equal(tensor, first["files"][name])
    model, _ = load_model(first["folder"])
    for layer, weight in first["memit"].items():
        assert torch.equal(ModelView(model).weight(layer), weight)
    assert first["patch"] == second["patch"]
    assert {name: target["original"] for name, target in first["patch"].items()} == {
        name: target["original"] for name, target in alone["patch"].items()
    }


def test_a_model_without_a_plan_is_refused_by_name(results):
    assert "GPT2LMHeadModel" in results[1]["refusal"] and "plan" in results[1]["refusal"]


def test_one_process_cannot_split(folder):
    with pytest.raises(UnsupportedModelError, match="one process"):
        load_model(folder, tp_plan="auto")
