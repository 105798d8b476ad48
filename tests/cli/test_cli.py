"""The command line as a user sees it: exit status, stdout, stderr, files."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import run, saved
from tiny_models import TEXT, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import kedit_fast
from kedit_fast import demo, workflow
from kedit_fast.errors import KeditError, UnsupportedModelError
from kedit_fast.methods.hparams_files import read_hparams
from kedit_fast.methods.windows import statistics_layers
from kedit_fast.models import loading
from kedit_fast.models.loading import load_config
from kedit_fast.support.files import new_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text, requests, and the model's statistics."""
    root = tmp_path_factory.mktemp("cli")
    saved(root / "model", "gpt2")
    (root / "text.txt").write_text("\n".join(TEXT * 3))
    (root / "text.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXT))
    records = [
        {
            "prompt": "{} plays the",
            "subject": "Miles Davis",
            "target_new": "violin",
            "target_true": "trumpet",
            "paraphrase_prompts": ["Miles Davis is known for the"],
            "neighborhood_prompts": ["Thelonious Monk plays the"],
        },
        {"prompt": "{} is in", "subject": "Ebro", "target_new": "Sweden", "target_true": "Spain"},
    ]
    (root / "requests.json").write_text(json.dumps(records))
    done = run(
        "stats", root / "model", "--text", root / "text.txt", "--layers", "0-2", "--out", root / "stats", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == [0, 1, 2]
    return root


HERE = Path(__file__).parent  # not the source tree: what is installed is tested
FAST = ("--set", "v_num_grad_steps=3", "--set", "mom2_ridge=1e-3", "--layers", "0-1")


def edit_args(place, out, *more):
    return (
        "edit",
        place / "model",
        "--requests",
        place / "requests.json",
        "--stats",
        place / "stats",
        "--out",
        out,
        *FAST,
        *more,
    )


def test_demo_prints_exactly_one_json_object():
    """In a process of its own: nothing else may reach its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "kedit_fast.cli", "demo", "--edits", "3", "--json"],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    found = json.loads(line)
    names = ["efficacy", "efficacy_success", "paraphrase", "neighborhood"]
    assert [row["target_separator"] for row in found["requests"]] == [" "] * 3
    shares = {*names, *(f"{name}_before" for name in names)}
    assert set(found) == {"method", "edits", "seconds", "skipped", "requests", "metrics", "harm", *shares}
    assert found["metrics"]["cf.accuracy/rewrite"]["value"] == pytest.approx(100 * found["efficacy"])
    assert found["method"] == "memit" and found["edits"] == 3
    assert all(0 <= found[n] <= 1 for n in names)
    assert set(found["seconds"]) == {"statistics", "keys", "values", "solve", "write", "evaluate", "total"}
    assert all(isinstance(s, float) for s in found["seconds"].values())
    assert found["efficacy"] > found["efficacy_before"]


def test_demo_prints_tables_and_saves_only_when_asked(tmp_path):
    done = run("demo", "--method", "rome", "--edits", 1, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("efficacy", "paraphrase", "neighborhood", "before", "after", "Seconds: statistics", "asked for"):
        assert text in done.stdout
    assert os.listdir(tmp_path) == ["out"]
    original, edited = load_file(demo.DATA / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {n for n in original if not (original[n].float() == edited[n].float()).all()}
    assert changed == {"model.layers.0.mlp.down_proj.weight"}


@pytest.mark.parametrize("kind", ("gpt2", "gptj", "llama"))
def test_stats_and_edit_make_a_model_that_transformers_loads(tmp_path, kind):
    model = saved(tmp_path / "model", kind)
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 3))
    records = [{"prompt": "{} is in", "subject": "Ebro", "target_new": "Sweden"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    stats = run("stats", model, "--text", tmp_path / "text.txt", "--layers", "0,1", "--out", tmp_path / "stats")
    assert stats.returncode == 0, stats.stderr
    done = run(
        "edit",
        model,
        "--requests",
        tmp_path / "r.jsonl",
        "--stats",
        tmp_path / "stats",
        "--out",
        tmp_path / "edited",
        *FAST,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["edits"] == 1 and found["layers"] == [0, 1] and found["neighborhood"] is None
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").state_dict()
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert len(changed) == 2 and all(("mlp" in name) for name in changed)
    assert AutoTokenizer.from_pretrained(tmp_path / "edited")("Ebro")["input_ids"]


def test_alphaedit_reports_its_null_spaces(place, tmp_path):
    numbers = ("--method", "alphaedit", "--set", "nullspace_rule=energy", "--set", "nullspace_threshold=0.3")
    args = edit_args(place, tmp_path / "out", *numbers)
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert "Null space dimensions: layer 0 " in done.stdout
    done = run(*args, "--overwrite", "--json")
    assert all(0 < count < 64 for count in json.loads(done.stdout)["null_space_dimensions"].values())
    refused = run(*args, "--overwrite", "--set", "nullspace_threshold=1e-30")
    assert refused.returncode == 1 and "layer 0: no null space" in refused.stderr


def test_edit_in_batches_with_hparams_of_a_framework(place, tmp_path):
    (tmp_path / "h.yaml").write_text("layers: [1]\nv_lr: 1e-1\nmom2_update_weight: 5\nstats_dir: ./data\n")
    args = list(edit_args(place, tmp_path / "out", "--hparams", tmp_path / "h.yaml", "--batch-size", 1, "--seed", 3))
    del args[args.index("--layers") : args.index("--layers") + 2]
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert "efficacy" in done.stdout and "Saved to" in done.stdout


def test_what_a_frameworks_file_says_of_loading_and_batches_is_named_where_it_is_not_followed(place, tmp_path):
    """EasyEdit's editor loads in half, spreads, and writes batches; here those are options of the command line."""
    values = "layers: [1]\nv_lr: 1e-1\nmom2_update_weight: 5\nhalf: true\nmodel_parallel: true\nbatch_size: 2\n"
    (tmp_path / "h.yaml").write_text(values)
    records = [{"prompt": "{} is in", "subject": name, "target_new": "Sweden"} for name in ("Ebro", "Madrid", "Spain")]
    (tmp_path / "r.json").write_text(json.dumps(records))
    args = [*edit_args(place, tmp_path / "out"), "--hparams", tmp_path / "h.yaml", "--requests", tmp_path / "r.json"]
    done = run(*args)
    assert done.returncode == 0, done.stderr
    for said in (
        "half: true, and the model keeps the dtype of its files (--dtype float16 follows it)",
        "model_parallel: true, and the model is loaded on one device",
        "batch_size: 2, and all 3 requests are one batch (--batch-size 2 follows it)",
    ):
        assert said in " ".join(done.stderr.split())
    (tmp_path / "h.yaml").write_text(values.replace("half: true\nmodel_parallel: true", "fp16: false"))
    done = run(*args, "--overwrite", "--batch-size", 2)
    assert done.returncode == 0 and "says" not in done.stderr
    (tmp_path / "h.yaml").write_text("fp16: true\n")
    model = args[1]
    done = run("plan", model, "--edits", 2, "--no-trial", "--hparams", tmp_path / "h.yaml")
    assert done.returncode == 0 and "fp16: true" in done.stderr
    done = run("plan", model, "--edits", 2, "--no-trial", "--hparams", tmp_path / "h.yaml", "--dtype", "float32")
    assert done.returncode == 0 and "fp16" not in done.stderr


def failing_cases(place, tmp):
    bad = tmp / "bad.json"
    bad.write_text('[{"prompt": "{} is", "target_new": "x"}]')
    broken = tmp / "broken.json"
    broken.write_text("[{")
    absent_subject = tmp / "absent.json"
    absent_subject.write_text('[{"prompt": "Tagus is in", "subject": "Ebro", "target_new": "x"}]')
    (tmp / "exists").mkdir()
    other = saved(tmp / "other", "gpt2", seed=5)
    t5 = tmp / "t5"
    t5.mkdir()
    (t5 / "config.json").write_text('{"model_type": "t5"}')
    moe = tmp / "moe"
    moe.mkdir()
    (moe / "config.json").write_text('{"model_type": "jetmoe", "num_local_experts": 8}')
    base, out = edit_args(place, tmp / "out"), tmp / "out"

    def replaced(option, value):
        args = list(base)
        args[args.index(option) + 1] = value
        return args

    def other_model(path):
        return [base[0], path, *base[2:]]

    return [
        ("missing requests", replaced("--requests", tmp / "no.json"), "no.json"),
        ("record without subject", replaced("--requests", bad), "record 1 has no 'subject'"),
        ("malformed requests", replaced("--requests", broken), "malformed JSON"),
        ("subject not in prompt", replaced("--requests", absent_subject), "stands 0 times"),
        ("unknown method", [*base, "--method", "mend"], "unknown method 'mend'"),
        ("layers out of range", replaced("--layers", "3-9"), "layer 4 is out of range"),
        ("statistics of another model", other_model(other), "another model"),
        ("no statistics", [a for a in base if a not in ("--stats", place / "stats")], "kedit-fast stats"),
        ("missing model", other_model(tmp / "nowhere"), "nowhere"),
        ("encoder-decoder", other_model(t5), "encoder-decoder"),
        ("mixture of experts", other_model(moe), "mixture-of-experts"),
        ("existing out", replaced("--out", tmp / "exists"), "--overwrite"),
        ("unknown hyper-parameter", [*base, "--set", "v_lrr=1"], "v_lrr"),
        (
            "a window that never folds",
            [*base, "--method", "encore", "--set", "memory_window=2", "--set", "memory_form=dual"],
            "must be auto or primal with memory_window",
        ),
        ("missing hparams", [*base, "--hparams", tmp / "h.json"], "h.json"),
        ("no such folder to write", replaced("--out", place / "text.txt" / "out"), "text.txt"),
        ("device", [*base, "--device", "cuda:99"], "cuda:99"),
        ("missing text", ["stats", place / "model", "--text", tmp / "t.txt", "--layers", "0", "--out", out], "t.txt"),
        ("field", ["stats", place / "model", "--text", place / "text.jsonl", "--layers", "0", "--out", out], "--field"),
        (
            "stats layers",
            ["stats", place / "model", "--text", place / "text.txt", "--layers", "9", "--out", out],
            "0-3",
        ),
        ("too many edits", ["demo", "--edits", "601"], "600"),
        ("log level", ["backends", "KEDIT_FAST_LOG=LOUD"], "KEDIT_FAST_LOG"),
    ]


def test_bad_input_ends_in_status_1_with_a_named_remedy_and_nothing_written(place, tmp_path):
    wrong = []
    for name, args, message in failing_cases(place, tmp_path):
        environment = dict(a.split("=", 1) for a in map(str, args) if a.startswith("KEDIT_FAST_"))
        before = sorted(os.listdir(tmp_path))
        done = run(*(a for a in args if not str(a).startswith("KEDIT_FAST_")), **environment)
        lines = done.stderr.strip().splitlines()
        fine = (
            done.returncode == 1
            and done.stdout == ""
            and message in done.stderr
            and 1 <= len(lines) <= 3
            and "Traceback" not in done.stderr
            and sorted(os.listdir(tmp_path)) == before
        )
        if not fine:
            wrong.append((name, done.returncode, done.stdout[-200:], done.stderr[-600:]))
    assert not wrong, wrong


@pytest.mark.parametrize(
    "args", (("edit",), ("demo", "--edits", "0"), ("demo", "--frobnicate"), ("nothing",), ("demo", "--edits", "x"))
)
def test_wrong_options_end_in_status_2(args):
    done = run(*args)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_wrong_layer_and_set_syntax_end_in_status_2(place, tmp_path):
    for more in (("--layers", "8-4"), ("--set", "novalue")):
        done = run(*edit_args(place, tmp_path / "out", *more))
        assert done.returncode == 2 and done.stdout == "", (more, done)


def test_an_interrupt_ends_in_status_130_and_writes_nothing(place, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kedit_fast.cli.edit.run_edits", stop)
    done = run(*edit_args(place, tmp_path / "out"))
    assert done.returncode == 130 and done.stdout == "" and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_overwrite_replaces_the_folder_only_after_success(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("x")
    assert run(*edit_args(place, out, "--overwrite", "--method", "mend")).returncode == 1
    assert (out / "keep").exists()
    assert run(*edit_args(place, out, "--overwrite")).returncode == 0
    assert not (out / "keep").exists() and (out / "config.json").exists() and os.listdir(tmp_path) == ["out"]


def test_backends_and_the_bug_report():
    done = run("backends", "--json")
    assert set(json.loads(done.stdout)) == {"cuda", "triton", "cpu", "torch"}
    assert "torch" in run("backends").stdout
    report = subprocess.run([sys.executable, "-m", "kedit_fast"], capture_output=True, text=True, cwd=HERE).stdout
    for text in (kedit_fast.__version__, "Backends", "Native modules", "Versions", "transformers"):
        assert text in report


def test_python_m_takes_the_commands_too():
    arguments = [sys.executable, "-m", "kedit_fast", "nonsense"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 2 and "No such command 'nonsense'" in done.stderr


def test_methods_lists_every_recipe_with_its_source():
    from kedit_fast.methods.registry import RECIPES

    found = json.loads(run("methods", "--json").stdout)
    assert list(found) == list(RECIPES) and all("arXiv" in entry["source"] for entry in found.values())
    shown = run("methods").stdout
    assert all(name in shown for name in RECIPES) and "2410.02355" in shown


def test_continue_takes_up_the_state_beside_the_model(place, tmp_path):
    """Two runs by one request each, the second with --continue, write what one run of two batches writes."""
    records = [
        {"prompt": "{} is in", "subject": s, "target_new": t} for s, t in (("Ebro", "Sweden"), ("Tagus", "France"))
    ]
    for name, chosen in (("first", records[:1]), ("second", records[1:]), ("both", records)):
        (tmp_path / f"{name}.json").write_text(json.dumps(chosen))

    def edit(model, requests, out, *more):
        args = (
            "edit",
            model,
            "--requests",
            tmp_path / f"{requests}.json",
            "--stats",
            place / "stats",
            "--out",
            tmp_path / out,
            "--method",
            "memit-sequential",
            *FAST,
            *more,
        )
        return run(*args)

    assert edit(place / "model", "first", "one").returncode == 0
    assert (tmp_path / "one" / workflow.STATE_FILE).exists()
    for out, more in (("two", ("--continue",)), ("alone", ())):
        done = edit(tmp_path / "one", "second", out, *more)
        assert done.returncode == 0, done.stderr
        assert ("knows nothing of that" in done.stderr) == (out == "alone")
    assert edit(place / "model", "both", "whole", "--batch-size", 1).returncode == 0
    states = {
        out: AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict() for out in ("two", "alone", "whole")
    }
    assert all(torch.equal(states["two"][name], tensor) for name, tensor in states["whole"].items())
    assert any(not torch.equal(states["alone"][name], tensor) for name, tensor in states["whole"].items())
    for model, more, message in (
        (place / "model", (), "has no kedit_fast_state"),
        (tmp_path / "two", ("--method", "encore"), "memit-sequential there, encore here"),
        (tmp_path / "two", ("--set", "mom2_update_weight=11"), "different mom2_update_weight"),
        (tmp_path / "two", ("--set", "memory_window=5"), "different memory_window: 0 there, 5 here"),
    ):
        failed = edit(model, "second", "no", "--continue", *more)
        assert failed.returncode == 1 and message in failed.stderr and not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", ("memit", "rome", "ultraedit"))
def test_suggest_tries_layers_and_lambda_and_writes_a_configuration(tmp_path, method):
    """On the demo model: a random one cannot be taught, which is the failure it names."""
    (tmp_path / "text.txt").write_text("\n".join(demo.corpus(60)))
    before = {p.name: p.read_bytes() for p in demo.DATA.iterdir()}
    args = (
        "suggest",
        demo.DATA,
        "--requests",
        demo.DATA / "requests.jsonl",
        "--edits",
        2,
        "--method",
        method,
        "--layers",
        "1",
        "--text",
        tmp_path / "text.txt",
        "--out",
        tmp_path / "best.toml",
    )
    given = () if method == "ultraedit" else ("--set", "clamp_norm_factor=2", "--set", "v_lr=0.5")  # not varied
    if method == "memit":
        given = (*given, "--set", "v_num_grad_steps=10")
    args = (*args[:2], *given, *args[2:])
    if method == "memit":
        failed = run(*args, "--set", "v_num_grad_steps=1", "--json")
        assert failed.returncode == 1 and "none of" in failed.stderr and not (tmp_path / "best.toml").exists()
    done = run(*args, "--json")
    assert done.returncode == 0, done.stderr
    assert "does not use" not in done.stderr
    found = json.loads(done.stdout)
    stages = {"memit": {"layers", "preset", "residual_share"}, "rome": {"layers"}}
    stages["ultraedit"] = {"preset", "lr", "token"}  # it begins with its rate, at the one window there is
    assert {trial["stage"] for trial in found["trials"]} == stages[method]
    assert found["best"]["score"] == max(trial["score"] for trial in found["trials"]) > 0
    numbers = read_hparams(tmp_path / "best.toml")
    assert list(numbers["layers"]) == found["best"]["layers"]
    assert before == {p.name: p.read_bytes() for p in demo.DATA.iterdir()}
    again = run(*args)
    assert again.returncode == 1 and "exists" in again.stderr
    lost = run(*args[:-1], tmp_path / "nowhere" / "best.toml")
    assert lost.returncode == 1 and "cannot write" in lost.stderr
    if method == "ultraedit":
        shown = run(*args[:-4])  # needs no text
        assert "score" in shown.stdout and "layers = [" in shown.stdout
    else:
        no_text = run(*args[:-4])
        assert no_text.returncode == 1 and "--text" in no_text.stderr


def test_an_interrupted_replacement_keeps_one_of_the_folders(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("x")
    real, calls = os.rename, []

    def interrupted(source, destination):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(target, True, KeditError) as work:
        (work / "new").write_text("y")
    assert (target / "old").exists() and os.listdir(tmp_path) == ["model"]


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    from safetensors.torch import save_file

    model = saved(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"no weights for model.layers.1.mlp.up_proj.weight"):
        loading.load_model(model)


def test_values_are_kept_and_used_again(place, tmp_path):
    values = tmp_path / "values.safetensors"
    first = run(*edit_args(place, tmp_path / "one", "--values", values, "--json"))
    assert first.returncode == 0, first.stderr
    size = values.stat().st_mtime_ns
    again = run(*edit_args(place, tmp_path / "two", "--values", values, "--json"))
    assert again.returncode == 0, again.stderr
    assert values.stat().st_mtime_ns == size  # nothing was new
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((a[name] == b[name]).all() for name in a)
    values.write_text("junk")
    bad = run(*edit_args(place, tmp_path / "three", "--values", values))
    assert bad.returncode == 1 and "is damaged" in bad.stderr and not (tmp_path / "three").exists()


def test_bad_requests_stop_or_are_skipped_with_a_report(place, tmp_path):
    records = json.loads((place / "requests.json").read_text())
    records.append({"prompt": "{} " + "is " * 300, "subject": "Ebro", "target_new": "Spain", "id": "long"})
    (tmp_path / "requests.json").write_text(json.dumps(records))
    args = list(edit_args(place, tmp_path / "out"))
    args[args.index("--requests") + 1] = tmp_path / "requests.json"
    stopped = run(*args)
    assert stopped.returncode == 1 and "request 'long'" in stopped.stderr and not (tmp_path / "out").exists()
    skipped = run(*args, "--on-error", "skip", "--json")
    assert skipped.returncode == 0, skipped.stderr
    assert "skipped request 'long'" in skipped.stderr
    found = json.loads(skipped.stdout)
    assert found["edits"] == 2 and [s["index"] for s in found["skipped"]] == [2]


MIXED = [
    {"prompt": "{} is", "target_new": "x"},
    {
        "prompt": "{} plays the",
        "subject": "Miles Davis",
        "target_new": "violin",
        "target_true": "trumpet",
        "rephrase_prompt": "Miles Davis is known for the",
    },
    {"prompt": "{} is in", "subject": "Ebro", "target_new": 5},
    {"prompt": "{} is in", "subject": "Ebro", "target_new": "Sweden"},
    {"prompt": "{} " + "is " * 300, "subject": "Ebro", "target_new": "Spain", "id": "long"},
    {"prompt": "{} is in", "subject": "Tagus", "target_new": "France", "paraphrase_prompt": "Tagus lies in"},
]


@pytest.fixture
def mixed(tmp_path):
    """Six records, of which three cannot be used, as packed JSON lines with a broken line between."""
    lines = [json.dumps(record) for record in MIXED]
    path = tmp_path / "mixed.JSONL.gz"
    path.write_bytes(gzip.compress(("\ufeff" + "\n".join([*lines[:2], "{oops", *lines[2:]])).encode()))
    return path


def test_edit_skips_what_cannot_be_read_and_reports_it_by_its_number_in_the_file(place, tmp_path, mixed):
    args = list(edit_args(place, tmp_path / "out"))
    args[args.index("--requests") + 1] = mixed
    stopped = run(*args)
    assert stopped.returncode == 1 and not stopped.stdout and not (tmp_path / "out").exists()
    for said in (
        "3 of 7 records cannot be used",
        "record 1 has no 'subject'",
        "line 3: malformed",
        "record 4: target_new",
    ):
        assert said in stopped.stderr
    done = run(*args, "--on-error", "skip", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["edits"] == 3 and [s["index"] for s in found["skipped"]] == [0, 2, 3, 5]
    assert [s["record"] for s in found["skipped"]] == [1, 3, 4, 6]
    for record, reason in zip((1, 3, 4, 6), found["skipped"], strict=True):
        assert "'long'" in reason["reason"] if record == 6 else f" {record}" in reason["reason"]
    assert "4 of 7 records skipped" in done.stderr and "did you mean 'paraphrase_prompts'" in done.stderr
    assert found["paraphrase"] is not None  # of rephrase_prompt
    mixed.write_bytes(gzip.compress(b'{"prompt": "{} is"}\n[]\n'))
    nothing = run(*args, "--on-error", "skip", "--overwrite")
    assert nothing.returncode == 1 and "2 of 2 records cannot be used" in nothing.stderr


def test_plan_and_converge_skip_what_cannot_be_read(place, tmp_path, mixed):
    plan = (
        "plan",
        place / "model",
        "--edits",
        "3",
        "--requests",
        mixed,
        "--layers",
        "0",
        "--set",
        "v_num_grad_steps=2",
        "--json",
    )
    converge = (
        "stats",
        "converge",
        place / "model",
        "--text",
        place / "text.txt",
        "--requests",
        mixed,
        "--layers",
        "0-1",
        "--set",
        "v_num_grad_steps=2",
        "--set",
        "mom2_ridge=1e-3",
        "--tokens",
        "60,200",
        "--out",
        tmp_path / "report",
        "--json",
    )
    for args in (plan, converge):
        stopped = run(*args)
        assert stopped.returncode == 1 and "3 of 7 records cannot be used" in stopped.stderr and not stopped.stdout
        done = run(*args, "--on-error", "skip")
        assert done.returncode == 0, done.stderr
        assert [s["index"] for s in json.loads(done.stdout)["skipped"]] in ([0, 2, 3], [0, 2, 3, 5])
        assert "of 7 records skipped" in done.stderr


def test_suggest_skips_what_cannot_be_read_written_or_measured(tmp_path):
    known = [json.loads(line) for line in (demo.DATA / "requests.jsonl").read_text().splitlines()[:2]]
    long = {**known[0], "id": "long", "paraphrase_prompts": ["is " * 400]}
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([{"prompt": "a"}, known[0], long, known[1]]))
    args = ("suggest", demo.DATA, "--requests", path, "--method", "ultraedit", "--layers", "1")
    stopped = run(*args)
    assert stopped.returncode == 1 and "record 1 has no" in stopped.stderr
    done = run(*args, "--on-error", "skip", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["edits"] == 2 and [s["record"] for s in found["skipped"]] == [1, 3]


def test_ultraedit_takes_records_without_subjects_from_a_file(place, tmp_path):
    records = [
        {"prompt": "Miles Davis plays the", "target_new": "violin", "target_true": "trumpet"},
        {"prompt": "Ebro is in", "target_new": "Sweden", "rephrase_prompt": "Ebro lies in"},
    ]
    (tmp_path / "r.json").write_text(json.dumps(records))
    args = ["edit", place / "model", "--requests", tmp_path / "r.json", "--out", tmp_path / "out", "--layers", "0-1"]
    done = run(*args, "--method", "ultraedit", "--patch", tmp_path / "p.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["edits"] == 2 and not json.loads(done.stdout)["skipped"]
    shown = run("patch", "show", tmp_path / "p.safetensors")
    assert shown.returncode == 0 and "Miles Davis plays the -> violin" in shown.stdout
    refused = run(*args, "--overwrite", "--stats", place / "stats")
    assert refused.returncode == 1 and "2 of 2 records cannot be used" in refused.stderr
    assert "record 1 has no 'subject'" in refused.stderr and "record 2 has no 'subject'" in refused.stderr


def test_hyper_parameters_of_another_repository_go_through_edit(place, tmp_path):
    numbers = {
        "layers": [1],
        "v_lr": 0.1,
        "mom2_update_weight": 5,
        "bias_update": False,
        "name": "x",
        "calculate_objective_value": True,
        "add_prev_edits": False,
        "prob_cutoff": 0,
    }
    args = list(edit_args(place, tmp_path / "out", "--hparams", tmp_path / "h.JSON"))
    del args[args.index("--layers") : args.index("--layers") + 2]
    for change, message in (
        ({"bias_update": True}, "bias_update = True"),
        ({"add_prev_edits": True}, "add_prev_edits"),
    ):
        (tmp_path / "h.JSON").write_text(json.dumps({**numbers, **change}))
        refused = run(*args)
        assert refused.returncode == 1 and message in refused.stderr and not (tmp_path / "out").exists()
    (tmp_path / "h.JSON").write_text("\ufeff" + json.dumps(numbers))
    done = run(*args, KEDIT_FAST_LOG="INFO")
    assert done.returncode == 0, done.stderr
    assert "bias_update" in done.stderr and "Saved to" in done.stdout


def test_a_chat_needs_a_template(place, tmp_path):
    done = run(*edit_args(place, tmp_path / "out", "--chat"))
    assert done.returncode == 1 and "no chat template" in done.stderr and not (tmp_path / "out").exists()


def test_what_was_put_before_targets_is_reported(place, tmp_path):
    records = [
        {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin", "id": "a"},
        {"prompt": "{}的首都是", "subject": "中国", "target_new": "北京"},
        {"prompt": "{} is", "subject": "Ebro", "target_new": "in", "target_separator": ""},
    ]
    (tmp_path / "r.json").write_text(json.dumps(records))
    short = ("--set", "context_template_length_params=[[2, 1]]")
    args = ("edit", place / "model", "--requests", tmp_path / "r.json", "--stats", place / "stats", *FAST, *short)
    done = run(*args, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "Targets: 2 of 3 follow their prompts without a space" in done.stdout
    rows = json.loads(run(*args, "--out", tmp_path / "b", "--target-separator", " ", "--json").stdout)["requests"]
    assert [(row["index"], row["target_separator"], row["target_text"]) for row in rows] == [
        (0, " ", " violin"),
        (1, " ", " 北京"),
        (2, "", "in"),
    ]
    assert rows[0]["id"] == "a" and all(isinstance(token, int) for row in rows for token in row["target_tokens"])
    done = run(*args, "--out", tmp_path / "c", "--target-separator", "-")
    assert done.returncode == 2 and "target_separator must be" in done.stderr and not (tmp_path / "c").exists()


def test_chat_options_reach_the_template_and_its_message_the_user(place, tmp_path):
    picky = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('say who you are') }}{% endif %}"
        "{{ messages[0]['content'] }} {{ messages[1]['content'] }}{{ ' no' if not wise else '' }}{{ ' ' ~ depth }}:"
        "{{ depths | sum ~ marks.end ~ mood }}"
    )
    model = shutil.copytree(place / "model", tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "x", "picky": picky}
    tokenizer.save_pretrained(model)
    args = (
        "edit",
        model,
        "--requests",
        place / "requests.json",
        "--stats",
        place / "stats",
        "--out",
        tmp_path / "out",
        *FAST,
    )
    chat = ("--chat", "--template", "picky")
    for options, status, message in (
        (("--system", "x"), 2, "--chat"),
        ((*chat, "--template-arg", "wise"), 2, "key=value"),
        ((*chat, "--template-arg", "depths=[1"), 2, "lists and objects as JSON"),
        ((*chat, "--template-arg", "marks={'end': 1}"), 2, "lists and objects as JSON"),
        (chat, 1, "say who you are"),
        (("--chat", "--template", "other"), 1, "choose one of 'default', 'picky'"),
        ((*chat, "--system", "x", "--template-arg", "tall=1"), 1, "reads no 'tall'"),
    ):
        done = run(*args, *options)
        assert done.returncode == status and message in done.stderr.replace("\n", " "), (options, done.stderr)
        assert not done.stdout and not (tmp_path / "out").exists()
    seen = []

    def stopped(*_, prompt_format, target_separator, **__):
        seen.append((prompt_format("Hi"), target_separator))
        raise KeditError("enough")

    options = (
        *chat,
        "--system",
        "Be brief.",
        "--template-arg",
        "wise=true",
        "--template-arg",
        "depth=3",
        "--template-arg",
        "depths=[1, 2]",
        "--template-arg",
        'marks={"end": "."}',
        "--template-arg",
        'mood="[x]"',
        "--target-separator",
        "",
    )
    requests = ("--requests", place / "requests.json")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("edit.run_edits", "plan.estimate", "suggest.sweep", "stats.converge.convergence.convergence"):
            patched.setattr(f"kedit_fast.cli.{name}", stopped)
        run(*args, *options)
        run("plan", model, *requests, "--edits", 2, *options)
        run("suggest", model, *requests, "--stats", place / "stats", *options)
        run("stats", "converge", model, *requests, "--text", place / "text.txt", "--out", tmp_path / "conv", *options)
    assert seen == [("Be brief. Hi 3:3.[x]", "")] * 4


PLANNED = {
    "weights",
    "originals and masters",
    "statistics and factors",
    "factors of the updates",
    "key memory",
    "keys",
    "values",
    "states between layers",
}


def test_plan_counts_bytes_and_tries_the_model(place):
    done = run(
        "plan",
        place / "model",
        "--method",
        "memit",
        "--edits",
        "1000",
        "--requests",
        place / "requests.json",
        "--layers",
        "0-1",
        "--set",
        "v_num_grad_steps=5",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = make_model("gpt2")
    assert found["bytes"]["weights"] == sum(p.nbytes for p in model.parameters())
    assert set(found["bytes"]) == PLANNED | {"values, while optimised"}
    assert found["bytes"]["statistics and factors"] == 2 * 2 * 64 * 64 * 8
    assert found["bytes"]["values"] == 32 * 1000 * 12 and found["total_bytes"] == sum(found["bytes"].values())
    assert 1 <= found["values_batch"] <= 64 and found["request_bytes"] > 0
    assert set(found["seconds"]) == {"values", "keys", "solve", "write", "total"}
    assert found["seconds"]["values"] > 0 and found["free_bytes"] > 0
    shown = run("plan", place / "model", "--edits", "10", "--layers", "0-1")
    assert shown.returncode == 0 and "in all" in shown.stdout and "Seconds, at most" in shown.stdout


def test_plan_follows_the_numbers(place):
    def planned(*more):
        done = run("plan", place / "model", "--edits", "40", "--layers", "1", "--json", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert planned("--set", "values_batch=8")["values_batch"] == 8
    assert planned("--method", "rome")["values_batch"] == 1
    often, rarely = (
        planned("--set", f"check_every={every}", "--set", "v_num_grad_steps=25")["seconds"]["values"]
        for every in (1, 4)
    )
    assert rarely > 0.3 * often  # the trial looks at every iteration, whatever the run will do


def test_plan_needs_no_weights_for_bytes(place, tmp_path):
    tmp_path.joinpath("config.json").write_text((place / "model" / "config.json").read_text())
    done = run("plan", tmp_path, "--edits", "10000", "--method", "rome", "--no-trial", "--json", "--layers", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds"] is None and found["values_batch"] is None and set(found["bytes"]) == PLANNED
    assert found["bytes"]["keys"] == 4 * 64 * 8  # one request after another
    assert run("plan", tmp_path, "--edits", "0").returncode == 2
    assert "out of range" in run("plan", tmp_path, "--edits", "1", "--no-trial", "--layers", "9").stderr


def test_statistics_of_all_layers_that_are_tried_are_collected_in_one_pass(place, tmp_path):
    base = ("stats", place / "model", "--text", place / "text.txt", "--layers", "auto", "--samples", "9")
    done = run(*base, "--out", tmp_path / "s", "--json")
    layers = list(statistics_layers(load_config(place / "model")))
    assert json.loads(done.stdout)["layers"] == layers and json.loads(done.stdout)["passes"] == 1
    kib = 8 * 64 * 64 * len(layers) / 1024
    said = " ".join(done.stderr.split())
    assert f"layers {', '.join(map(str, layers))} ({len(layers)} in 1 pass over the text)" in said
    assert f"fp64 sums of {kib:.1f} KiB beside the model; files of {kib:.1f} KiB, up to {2 * kib:.1f} KiB" in said
    shown = json.loads(run("stats", "show", tmp_path / "s", "--no-draw", "--json").stdout)["layers"]
    assert [spectrum["layer"] for spectrum in shown] == layers
    again = run(*base, "--out", tmp_path / "s", "--resume", "--json")
    assert json.loads(again.stdout)["passes"] == 0 and json.loads(again.stdout)["layers"] == layers
    assert "in 1 pass" not in again.stderr
    assert run(*base[:4], "--layers", "all", "--out", tmp_path / "t").returncode == 2


def test_output_metrics_are_collected_and_shown_beside_statistics(place, tmp_path):
    base = ("stats", place / "model", "--text", place / "text.txt", "--layers", "0-1", "--out", tmp_path / "s")
    options = ("--samples", "9", "--token-weights", "teacher-confidence")
    done = run(*base, *options, "--output-metric", "--metric-tokens", "50")
    assert done.returncode == 0 and "output metric of 50 tokens, layers 0, 1" in " ".join(done.stdout.split())
    assert "output metrics of layers 0, 1 (2 in 1 pass over the text)" in " ".join(done.stderr.split())
    again = json.loads(run(*base, *options, "--output-metric", "--metric-tokens", "50", "--resume", "--json").stdout)
    assert again["passes"] == 0 and again["output_tokens"] == 50 and len(again["files"]) == 4
    alone = run(*base, "--metric-alone", "--metric-labels", "text", "--overwrite", "--json")
    assert json.loads(alone.stdout)["tokens"] == 0 and len(json.loads(alone.stdout)["files"]) == 2
    shown = json.loads(run("stats", "show", tmp_path / "s", "--no-draw", "--json").stdout)
    assert [metric["labels"] for metric in shown["output_metrics"]] == ["text", "text"]
    assert [metric["size"] for metric in shown["output_metrics"]] == [32, 32]
    table = " ".join(run("stats", "show", tmp_path / "s", "--no-draw").stdout.split())
    assert "Output metrics: gradients at the outputs, text labels" in table
    unused = run(*base[:-1], tmp_path / "t", "--metric-labels", "text")
    assert unused.returncode == 2 and "are for --output-metric" in " ".join(unused.stderr.split())


def test_statistics_are_resumed_exchanged_and_projected(place, tmp_path):
    base = ("stats", place / "model", "--text", place / "text.txt", "--layers", "0-1", "--out", tmp_path / "s")
    first = json.loads(run(*base, "--samples", "9", "--seed", "2", "--json").stdout)
    assert first["documents"] == 9 and first["passes"] == 1 and first["resumed_tokens"] == 0
    again = run(*base, "--samples", "9", "--seed", "2", "--resume", "--json")
    assert json.loads(again.stdout)["passes"] == 0 and json.loads(again.stdout)["tokens"] == first["tokens"]
    for extra, said in (
        ((), "--resume continues it"),
        (("--resume",), "different max_samples (9 there, not set here)"),
    ):
        refused = run(*base, *extra)
        assert refused.returncode == 1 and said in refused.stderr and not refused.stdout
    done = json.loads(run(*base, "--tokens", "77", "--overwrite", "--json").stdout)
    assert done["tokens"] == 77

    exported = run("stats", "export", tmp_path / "s", "--out", tmp_path / "theirs", "--model-name", "m", "--json")
    files = [Path(name) for name in json.loads(exported.stdout)["files"]]
    folder = tmp_path / "theirs" / "m" / "wikipedia_stats"
    assert [f.parent for f in files] == [folder] * 2 and files[0].name.endswith("c_proj_float32_mom2_100000.npz")
    done = run("stats", "import", place / "model", "--from", folder, "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    projector = tmp_path / "null_space_project.pt"
    project = ("stats", "project", tmp_path / "back", "--rule", "energy", "--threshold", "0.2", "--out", projector)
    dimensions = json.loads(run(*project, "--json").stdout)["null_space_dimensions"]
    assert set(dimensions) == {"0", "1"} and all(0 < n < 64 for n in dimensions.values())
    assert run(*project).returncode == 1  # it exists

    edit = (
        "edit",
        place / "model",
        "--requests",
        place / "requests.json",
        "--method",
        "alphaedit",
        "--layers",
        "0-1",
        "--set",
        "v_num_grad_steps=3",
        "--projector",
        projector,
        "--out",
    )
    refused = run(*edit, tmp_path / "edited")
    assert refused.returncode == 1 and "--trust" in refused.stderr and not (tmp_path / "edited").exists()
    done = run(*edit, tmp_path / "edited", "--trust", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["null_space_dimensions"] == dimensions


def test_a_report_of_convergence(place, tmp_path):
    arguments = (
        "stats",
        "converge",
        place / "model",
        "--text",
        place / "text.txt",
        "--requests",
        place / "requests.json",
        "--layers",
        "0-1",
        "--set",
        "v_num_grad_steps=3",
        "--set",
        "mom2_ridge=1e-3",
        "--tokens",
        "60,200",
        "--out",
        tmp_path / "report",
    )
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [row["tokens"] for row in shown["rows"]] == [60, 60, 200, 200] and shown["rows"][0]["change_to_last"] > 0
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"convergence.csv", "convergence.png"}
    again = run(*arguments)
    assert again.returncode == 1 and "has a report" in again.stderr
    assert run(*arguments, "--overwrite").returncode == 0
    assert run(*arguments[:-4], "--tokens", "a,b", "--out", tmp_path / "x").returncode == 2


def test_edits_are_written_as_a_patch(place, tmp_path):
    whole = run(*edit_args(place, tmp_path / "edited", "--patch", tmp_path / "edits.safetensors", "--json"))
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout)["patch"].endswith("edits.safetensors")
    folder = shutil.copytree(place / "model", tmp_path / "copy")
    assert run("patch", "apply", tmp_path / "edits.safetensors", folder).returncode == 0
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "edited"))
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-7) for name in other)


def test_of_several_sample_sizes_an_option_or_the_frameworks_file_chooses(place, tmp_path):
    for size in ("100", "1000"):
        done = run("stats", "export", place / "stats", "--out", tmp_path, "--model-name", "m", "--samples", size)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "m" / "wikipedia_stats"
    base = ("stats", "import", place / "model", "--from", folder, "--layers", "1", "--out", tmp_path / "taken")
    refused = run(*base)
    assert (
        refused.returncode == 1 and "several statistics files" in refused.stderr and not (tmp_path / "taken").exists()
    )
    assert run(*base, "--samples", "100", "--precision", "float32").returncode == 0
    (tmp_path / "h.json").write_text(json.dumps({"mom2_n_samples": 1000, "mom2_dtype": "float32"}))
    edit = list(edit_args(place, tmp_path / "out", "--hparams", tmp_path / "h.json"))
    edit[edit.index("--stats") + 1] = folder
    done = run(*edit)
    assert done.returncode == 0, done.stderr
    (tmp_path / "h.json").write_text(json.dumps({"mom2_n_samples": 7}))
    refused = run(*edit, "--overwrite")
    assert refused.returncode == 1 and "mom2_n_samples = 7 names 0 of them" in " ".join(refused.stderr.split())


def test_edit_without_numbers_chooses_layers_by_trials_and_uses_the_choice_again(place, tmp_path):
    stats = tmp_path / "stats"
    shutil.copytree(place / "stats", stats)
    args = ("edit", place / "model", "--requests", place / "requests.json", "--set", "v_num_grad_steps=3")
    args += ("--set", "mom2_ridge=1e-3", "--json")
    done = run(*args, "--stats", stats, "--out", tmp_path / "out", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    layers = printed["layers"]
    chosen = printed["chosen"]
    assert chosen["numbers"]["layers"] == layers and len(chosen["trials"]) > 2
    assert set(chosen["numbers"]) <= {"layers", "residual_share", "clamp_norm_factor"}
    assert "trials on 2 of 2 requests" in done.stderr and "chose layers" in done.stderr and " * " in done.stderr
    assert list(read_hparams(tmp_path / "out" / "kedit_fast_hparams.toml")["layers"]) == layers
    again = run(*args, "--stats", stats, "--patch", tmp_path / "p.safetensors")
    assert again.returncode == 0 and "chosen earlier" in again.stderr and json.loads(again.stdout)["layers"] == layers
    guess = run(*args, "--stats", stats, "--patch", tmp_path / "q.safetensors", "--no-trial")
    assert guess.returncode == 0 and "guess" in guess.stderr and "chosen" not in json.loads(guess.stdout)
    assert "efficacy is 0.00" in guess.stderr and "kedit-fast suggest" in guess.stderr
    named = run(*args, "--stats", stats, "--patch", tmp_path / "r.safetensors", "--layers", "0-1")
    assert named.returncode == 0 and "trials" not in named.stderr
    missing = run(*args, "--out", tmp_path / "no")
    assert missing.returncode == 1 and "--layers auto --out DIR" in missing.stderr


def test_edits_that_change_no_weight_are_an_error_and_save_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow.Report, "changed_weights", property(lambda report: []))
    args = ("edit", place / "model", "--requests", place / "requests.json", "--stats", place / "stats", *FAST)
    done = run(*args, "--out", tmp_path / "out")
    assert done.returncode == 1 and "changed no weight" in done.stderr and not (tmp_path / "out").exists()
