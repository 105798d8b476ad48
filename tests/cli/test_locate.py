"""`kedit-fast locate` on the demo model: what it prints, its files, and what it refuses."""

from __future__ import annotations

import json

import pytest
from support import run, saved

from kedit_fast import Editor, collect_statistics, demo
from kedit_fast.locating.circuit import Circuit
from kedit_fast.locating.tracing import trace

REQUESTS = demo.DATA / "requests.jsonl"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Everything but probes of three requests, printed as JSON and written to a folder."""
    root = tmp_path_factory.mktemp("locate")
    done = locate("--parts", "trace,lens,circuit", "--edges", 60, "--out", root / "out", "--json")
    assert done.returncode == 0, done.stderr
    (root / "printed.json").write_text(done.stdout)
    return root


def locate(*more, model=demo.DATA, requests=REQUESTS):
    few = ("--limit", 3, "--samples", 3, "--on-error", "skip", "--dtype", "float32")
    return run("locate", model, "--requests", requests, *few, *more)


def test_files_are_there_and_say_what_was_printed(place):
    printed = json.loads((place / "printed.json").read_text())
    files = sorted(path.name for path in (place / "out").iterdir())
    assert printed["files"] == files
    assert {"locating.json", "circuit.json", "circuit.dot", "trace_averages.png", "trace_by_layer.png", "trace_003.png",
            "lens_last.png", "lens_subject.png", "circuit_shares.png"} <= set(files)  # fmt: skip
    written = json.loads((place / "out" / "locating.json").read_text())
    for name in ("about", "trace", "lens", "circuit", "skipped"):
        assert printed[name] == written[name]


def test_numbers_are_those_of_the_parts(place):
    printed = json.loads((place / "printed.json").read_text())
    expected = trace(*demo.load(), demo.requests(3), kinds=("mlp",), window=1, samples=3)
    prompts = [one for one in printed["trace"]["prompts"] if one["kind"] == "mlp"]
    assert [one["answer"] for one in prompts] == [one.answer for one in expected]
    for one, other in zip(prompts, expected, strict=True):
        assert one["low"] == pytest.approx(other.low, abs=1e-6) and one["window"] == 1
        assert one["probabilities"][-1] == pytest.approx(other.probabilities[-1].tolist(), abs=1e-6)
    assert printed["trace"]["likely"]["peak"] == 0 and printed["trace"]["likely"]["kind"] == "mlp"
    circuit = Circuit.load(place / "out" / "circuit.json")
    assert [list(edge) for edge in circuit.listed()] == printed["circuit"]["listed"]
    assert printed["circuit"]["edges"] == circuit.edge_count <= 60 == printed["circuit"]["asked"]
    assert printed["circuit"]["clean"] > 0 > printed["circuit"]["corrupted"]
    assert all(row[-1] == 1 for row in printed["lens"][1]["rank"]), "the model's answer is its most probable token"


def test_the_layers_come_first_then_the_effects_then_the_table():
    done = locate("--seed", 2)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[0].startswith("The trace speaks for layer 0: restoring the MLP at the last subject token brings back")
    assert lines[1].startswith("Total effect 0.") and "95 % intervals" in lines[1]
    assert lines[2].startswith("Mean indirect effect")
    assert any(line.strip().startswith("0*") for line in lines)


def test_probes_take_all_requests():
    done = locate("--parts", "probes", "--json")
    assert done.returncode == 0, done.stderr
    probes = json.loads(done.stdout)["probes"]
    assert probes["count"] > 400 and len(probes["accuracy"]) == 6 and probes["from_layer"] == 0


def test_a_request_whose_subject_is_not_in_its_prompt_is_named(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"prompt": "Cork is famous", "subject": "Fogodor", "target_new": "granite"}))
    done = run("locate", demo.DATA, "--requests", path)
    assert done.returncode == 1 and "Fogodor" in done.stderr and "record 1" in done.stderr and not done.stdout


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_file_without_requests_is_refused(tmp_path, content):
    path = tmp_path / "requests.json"
    path.write_text(content)
    done = run("locate", demo.DATA, "--requests", path)
    assert done.returncode == 1 and str(path) in done.stderr and not done.stdout


def test_a_folder_with_files_stays_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = locate("--out", tmp_path)
    assert done.returncode == 1 and "pass --overwrite" in done.stderr and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_models_that_cannot_be_opened_are_refused(tmp_path):
    done = locate(model=tmp_path / "none")
    assert done.returncode == 1 and "none" in done.stderr and not done.stdout
    folder = saved(tmp_path / "model", "deepseek_v3")
    path = tmp_path / "requests.jsonl"
    prompts = [
        {"prompt": "{} plays the", "subject": name, "target_new": "violin"} for name in ("Miles Davis", "Miles Monk")
    ]
    path.write_text("\n".join(map(json.dumps, prompts)))
    done = run("locate", folder, "--requests", path, "--parts", "circuit", "--on-error", "skip")
    assert done.returncode == 1 and "heads" in done.stderr and not done.stdout


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A folder of the demo model with ten edits, and files of these requests and of others."""
    root = tmp_path_factory.mktemp("edited")
    model, tokenizer = demo.load()
    statistics = collect_statistics(model, tokenizer, demo.corpus(60), (0, 1))
    Editor(model, tokenizer, "memit", statistics=statistics).edit(demo.requests(10), on_error="skip")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    lines = REQUESTS.read_text(encoding="utf-8").splitlines()
    (root / "requests.jsonl").write_text("\n".join(lines[:10]))
    (root / "control.jsonl").write_text("\n".join(lines[300:]))
    return root


def test_circuits_before_and_after_an_edit(edited):
    more = ("--base", demo.DATA, "--control", edited / "control.jsonl", "--limit", 6, "--edges", 60, "--steps", 1)
    requests = ("--requests", edited / "requests.jsonl", "--dtype", "float32")
    done = run("locate", edited / "model", *requests, *more, "--out", edited / "out")
    assert done.returncode == 0, done.stderr
    written = json.loads((edited / "out" / "locating.json").read_text())
    comparison = written["comparison"]
    assert "trace" not in written and comparison["edited"] == ["mlp0", "mlp1"] and comparison["control_pairs"] > 3
    assert 4 <= comparison["pairs"] <= 6 and comparison["pairs"] == comparison["before"]["right"]
    assert [share["name"] for share in comparison["shares"] if share["is_edited"]] == ["mlp0", "mlp1"]
    files = {path.name for path in (edited / "out").iterdir()}
    assert {"circuit_before.json", "circuit_after.dot", "shares_before_after.png"} <= files
    lines = done.stdout.splitlines()
    assert lines[0].startswith("- ") and comparison["claims"][0][:30] in lines[0]
    assert any("halves, before" in line for line in lines) and any("mlp1*" in line for line in lines)


def test_a_model_without_edits_has_nothing_to_compare(edited):
    done = run("locate", demo.DATA, "--requests", edited / "requests.jsonl", "--base", demo.DATA)
    assert done.returncode == 1 and "no prompt whose answer was edited is left" in done.stderr and not done.stdout
    done = run("locate", demo.DATA, "--requests", edited / "requests.jsonl", "--control", edited / "control.jsonl")
    assert done.returncode == 2 and "--base" in done.stderr


def test_a_traced_suggestion_is_not_of_given_layers():
    done = run("suggest", demo.DATA, "--requests", REQUESTS, "--edits", 2, "--trace", "--layers", 1)
    assert done.returncode == 1 and "layers are given" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "option", [("--parts", "map"), ("--parts", ""), ("--scoring", "best"), ("--samples", 0), ("--window", 0)]
)
def test_wrong_options_are_named(option):
    done = locate(*option)
    assert done.returncode == 2 and not done.stdout
