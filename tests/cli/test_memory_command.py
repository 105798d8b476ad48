"""Methods that tune, on the command line: files of edits beside the weights, and what does not fit a method."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import run

from kedit_fast import Patch, SideMemory, attach, attached, demo
from kedit_fast.models.loading import load_model
from kedit_fast.workflow import MEMORY_FILE, complete

GRACE = ("--method", "grace", "--layers", "4", "--set", "num_steps=12", "--set", "eps=1", "--set", "lr=1",
         "--set", "val_init=cold")  # fmt: skip
WISE = ("--method", "wise", "--set", "num_steps=3")
FT = ("--method", "ft-m", "--set", "num_steps=4")
MODULE = "model.layers.4.mlp.down_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The demo model and two requests; the edits of grace beside it, and of ft-m in it."""
    root = tmp_path_factory.mktemp("memory")
    (root / "model").symlink_to(demo.DATA)
    lines = (demo.DATA / "requests.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (root / "requests.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for out, more in (("grace", (*GRACE, "--memory", root / "grace.safetensors")), ("tuned", FT)):
        done = edit(root, *more, "--out", root / out, "--json")
        assert done.returncode == 0, done.stderr
        (root / f"{out}.json").write_text(done.stdout)
    return root


def edit(root, *more):
    return run("edit", root / "model", "--requests", root / "requests.jsonl", *more)


def test_an_edit_beside_the_weights_leaves_them_and_is_written_beside_the_model(place):
    found = json.loads((place / "grace.json").read_text())
    assert found["memory"] == str(place / "grace.safetensors") and found["out"] == str(place / "grace")
    assert found["efficacy"] == 1.0 and found["efficacy_before"] == 0.0 and "harm" not in found
    about = found["tuning"]
    assert about["steps"] == 24 and about["unlearned"] == [] and about["loss"]["largest"] < 0.7
    assert about["memory"]["kind"] == "key value" and about["memory"]["entries"] == 2 and about["memory"]["bytes"] > 0
    assert len(about["memory"]["radii"]) == 2 and min(about["memory"]["radii"]) > 0
    one, other = (load_file(place / folder / "model.safetensors") for folder in ("model", "grace"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    beside = SideMemory.load(place / "grace" / MEMORY_FILE)
    assert beside.digest == SideMemory.load(place / "grace.safetensors").digest
    asked = [request.target_new for request in demo.requests()[:2]]
    assert [request["target_new"] for request in beside.requests] == asked


def test_a_copy_of_the_model_answers_with_the_file(place):
    model, tokenizer = load_model(str(place / "model"))
    request = demo.requests()[0]
    before = complete(model, tokenizer, request.text)
    with attach(model, place / "grace" / MEMORY_FILE, tokenizer):
        assert complete(model, tokenizer, request.text) == request.target_new.strip() != before
    assert attached(model) is None and complete(model, tokenizer, request.text) == before


def test_eval_measures_without_the_memory_and_with_it(place, tmp_path):
    command = ("eval", place / "model", "--requests", place / "requests.jsonl", "--metrics", "cf.accuracy")
    done = run(*command, "--memory", place / "grace.safetensors", "--out", tmp_path / "report", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    states = found["metrics"]["cf.accuracy/rewrite"]["states"]
    assert states["pre"]["value"] == 0 and states["final"]["value"] == 100
    assert "grace, 2 edits" in found["about"]["memory"] and (tmp_path / "report" / "report.html").exists()
    done = run(*command[:4], "--memory", place / "grace.safetensors", "--json")
    routes = json.loads(done.stdout)["metrics"]["memory.missed_route/rewrite"]["states"]  # measured by default
    assert routes["pre"]["value"] is None and routes["final"]["value"] == 0
    plain = run("eval", place / "grace", "--requests", place / "requests.jsonl", "--metrics", "cf.accuracy")
    assert plain.returncode == 0 and f"--memory {place / 'grace' / MEMORY_FILE} measures them" in plain.stderr
    for other in (("--patch", place / "none.safetensors"), ("--base", place / "grace")):
        assert run(*command, "--memory", place / "grace.safetensors", *other).returncode == 2


def test_show_says_what_a_memory_holds(place):
    done = run("memory", "show", place / "grace.safetensors", "--requests", 1)
    assert done.returncode == 0, done.stderr
    first = demo.requests()[0]
    assert MODULE in done.stdout and "grace: 2 edits" in done.stdout and "radii: " in done.stdout
    assert f"{first.text} -> {first.target_new.strip()}" in done.stdout
    assert "and 1 more" in done.stdout
    found = json.loads(run("memory", "show", place / "grace.safetensors", "--json").stdout)
    assert found["entries"] == 2 and found["shape"] == [256, 768] and found["requests"][0]["subject"] == first.subject
    assert run("memory", "show", place / "model" / "model.safetensors").returncode == 1


def test_a_memory_goes_beside_the_model_that_it_was_made_for_and_away_again(place, tmp_path):
    shutil.copytree(demo.DATA, tmp_path / "model")
    command = ("memory", "apply", place / "grace.safetensors", tmp_path / "model")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert SideMemory.load(tmp_path / "model" / MEMORY_FILE).entries == 2
    again = run(*command)
    assert again.returncode == 1 and "memory revert" in again.stderr and run(*command, "--overwrite").returncode == 0
    assert run("memory", "revert", tmp_path / "model").returncode == 0
    assert not (tmp_path / "model" / MEMORY_FILE).exists()
    gone = run("memory", "revert", tmp_path / "model")
    assert gone.returncode == 1 and f"has no {MEMORY_FILE}" in gone.stderr
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"{MODULE}.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    other = run(*command)
    assert other.returncode == 1 and "is not the matrix that" in other.stderr
    assert run(*command, "--force").returncode == 0


def test_a_memory_of_wise_becomes_a_patch_and_one_of_grace_does_not(place, tmp_path):
    done = edit(place, *WISE, "--memory", tmp_path / "wise.safetensors", "--irrelevant", place / "texts.txt")
    assert done.returncode == 1 and "texts.txt" in done.stderr
    (place / "texts.txt").write_text("The kettle began to whistle.\nNobody walked home in the rain.\n")
    done = edit(place, *WISE, "--memory", tmp_path / "wise.safetensors", "--irrelevant", place / "texts.txt")
    assert done.returncode == 0, done.stderr
    assert "Tuning: " in done.stdout and "Memory (activation): 1 entries" in done.stdout
    merged = run("memory", "merge", tmp_path / "wise.safetensors", place / "model", "--out", tmp_path / "wise.patch",
                 "--rule", "mean")  # fmt: skip
    assert merged.returncode == 0, merged.stderr
    patch = Patch.load(tmp_path / "wise.patch")
    assert patch.method == "wise" and len(patch.requests) == 2 and "without a route" in merged.stdout
    refused = run("memory", "merge", place / "grace.safetensors", place / "model", "--out", tmp_path / "no.patch")
    assert refused.returncode == 1 and "'key value'" in refused.stderr and not (tmp_path / "no.patch").exists()


@pytest.mark.parametrize(
    "options, message",
    (
        ((*GRACE, "--patch", "{}/p"), "--patch: grace changes no weight.*--memory FILE"),
        ((*FT, "--memory", "{}/m"), "--memory: ft-m writes into the weights: --patch FILE"),
        ((*GRACE, "--memory", "{}/m", "--checkpoint", "{}/c"), "--checkpoint records.*grace keeps its edits beside"),
        (GRACE, "give --out for the edited model, --memory for its edits"),
        (FT, "give --out for the edited model, --patch for its edits"),
        ((*FT, "--patch", "{}/p", "--warm-up", "{}/w"), "--warm-up: ft-m has no running normalizer"),
    ),
)
def test_what_does_not_fit_a_method_is_said_before_anything_runs(options, message, place, tmp_path):
    done = edit(place, *(str(option).replace("{}", str(tmp_path)) for option in options))
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr


def test_texts_without_a_reader_are_refused(place, tmp_path):
    done = edit(place, *GRACE, "--memory", tmp_path / "m", "--irrelevant", "texts.txt")
    assert done.returncode == 2 and "grace reads no unrelated texts" in done.stderr


def test_a_tuned_matrix_is_written_and_said(place):
    found = json.loads((place / "tuned.json").read_text())
    assert found["tuning"]["memory"] is None and found["tuning"]["steps"] > 0 and found["harm"]["norm"] > 0
    one, other = (load_file(place / folder / "model.safetensors") for folder in ("model", "tuned"))
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert changed == [f"{MODULE}.weight"] and not (place / "tuned" / MEMORY_FILE).exists()
