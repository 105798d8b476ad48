"""An ArchSpec that is given reaches every view of the model: library, integrations, command line; and --device-map."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support import run, saved
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import collect_statistics
from kedit_fast.errors import InvalidArgumentError, MethodError
from kedit_fast.integrations.alphaedit import apply_AlphaEdit_to_model
from kedit_fast.integrations.easyedit import apply_memit_to_model as easyedit_memit
from kedit_fast.integrations.memit import apply_memit_to_model
from kedit_fast.models.architectures import ARCHITECTURES, spec_as_json, spec_from_json
from kedit_fast.models.view import ModelView
from kedit_fast.reports.choice import choose
from kedit_fast.reports.convergence import convergence
from kedit_fast.reports.plan import plan
from kedit_fast.reports.suggest import suggest
from kedit_fast.reports.trials import stored_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.store import load_statistics, save_statistics
from kedit_fast.workflow import complete, run_edits

LLAMA = next(spec for spec in ARCHITECTURES if "llama" in spec.model_types)
SPEC = replace(LLAMA, name="Homemade")
RECORDS = [
    {
        "prompt": "{} plays the",
        "subject": "Miles Davis",
        "target_new": "violin",
        "target_true": "trumpet",
        "neighborhood_prompts": ["Thelonious Monk plays the"],
    },
    {"prompt": "{} is in", "subject": "Ebro", "target_new": "Sweden"},
]
FAST = {"v_num_grad_steps": 2, "clamp_norm_factor": 0.75, "mom2_ridge": 1e-3, "layers": (0, 1),
        "context_template_length_params": ((3, 1),)}  # fmt: skip


@pytest.fixture
def names(monkeypatch):
    """The names of the architectures of all views that are made."""
    seen, make = [], ModelView.__init__

    def recorded(self, *args, **kwargs):
        make(self, *args, **kwargs)
        seen.append(self.spec.name)

    monkeypatch.setattr(ModelView, "__init__", recorded)
    return seen


def test_the_library_and_its_reports_see_the_given_spec_alone(names, tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer()
    given = {"spec": SPEC}
    statistics = collect_statistics(model, tokenizer, TEXT * 2, (0, 1), progress=False, **given)
    save_statistics(statistics, tmp_path / "stats")
    load_statistics(tmp_path / "stats", model, tokenizer, **given)
    stored = stored_statistics(tmp_path / "stats", model, tokenizer, **given)
    stored.of((0, 1))
    run_edits(model, tokenizer, RECORDS, "memit", statistics=statistics, hparams=FAST, **given).editor.restore()
    complete(model, tokenizer, "Miles Davis plays", 2, **given)
    plan(model, tokenizer, 10, requests=RECORDS, hparams=FAST, **given)
    suggest(model, tokenizer, RECORDS, statistics=statistics, texts=TEXT[:2], hparams=FAST, effort="short", **given)
    options = {"statistics": stored, "hparams": FAST, "folder": tmp_path / "stats"}
    _, where = choose(model, tokenizer, RECORDS, "memit", **options, **given)
    assert where.startswith("stored in")
    assert choose(model, tokenizer, RECORDS, "memit", **options, **given)[1].startswith("chosen earlier")
    convergence(model, tokenizer, Corpus(TEXT), RECORDS, counts=(20,), layers=(0, 1), hparams=FAST, **given)
    assert len(names) > 20 and set(names) == {"Homemade"}
    _, where = choose(model, tokenizer, RECORDS, "memit", **options)
    assert where.startswith("stored in"), "a choice for other modules was used"


@pytest.mark.parametrize("apply", (apply_memit_to_model, easyedit_memit, apply_AlphaEdit_to_model))
@pytest.mark.parametrize("way", ("object", "path", "hyper-parameter"))
def test_the_integrations_see_the_given_spec_alone(names, tmp_path, apply, way):
    model, tokenizer = make_model("llama"), make_tokenizer()
    statistics = collect_statistics(model, tokenizer, TEXT * 2, (0, 1), progress=False, spec=SPEC)
    file = tmp_path / "spec.json"
    file.write_text(spec_as_json(SPEC), encoding="utf-8")
    hparams = {
        "v_num_grad_steps": 2,
        "clamp_norm_factor": 0.75,
        "mom2_update_weight": 10.0,
        "layers": [0, 1],
        "L2": 1.0,
    }
    if apply is apply_AlphaEdit_to_model:
        hparams |= {"nullspace_rule": "energy", "nullspace_threshold": 0.1}
    if way == "hyper-parameter":
        hparams["spec"] = str(file)
    given = {} if way == "hyper-parameter" else {"spec": SPEC if way == "object" else str(file)}
    requests = [{"prompt": "{} plays the", "subject": "Miles Davis", "target_new": {"str": "violin"}, "case_id": 1}]
    apply(model, tokenizer, requests, hparams, statistics=statistics, **given)
    assert set(names) == {"Homemade"}
    with pytest.raises(InvalidArgumentError, match="cannot read"):
        apply(model, tokenizer, requests, hparams, statistics=statistics, spec=str(tmp_path / "none.json"))
    with pytest.raises(MethodError, match="spec must be an ArchSpec or the path of its file; got int"):
        apply(model, tokenizer, requests, hparams, statistics=statistics, spec=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text, requests and a spec."""
    root = tmp_path_factory.mktemp("spec")
    saved(root / "model", "llama")
    (root / "text.txt").write_text("\n".join(TEXT * 3))
    (root / "requests.json").write_text(json.dumps(RECORDS))
    (root / "spec.json").write_text(spec_as_json(SPEC), encoding="utf-8")
    return root


def test_every_command_that_loads_a_model_takes_a_spec_and_a_device_map(names, place, tmp_path):
    model, text, requests = place / "model", place / "text.txt", place / "requests.json"
    spec = ("--spec", place / "spec.json", "--device-map", "sequential")
    pytest.importorskip("accelerate")
    fast = ("--set", "v_num_grad_steps=2", "--set", "clamp_norm_factor=0.75", "--set", "mom2_ridge=1e-3")
    some = (*fast, "--layers", "0-1")
    stats = tmp_path / "stats"
    for command in (
        ("stats", model, "--text", text, "--layers", "0-2", "--out", stats, *spec),
        ("stats", "converge", model, "--text", text, "--requests", requests, "--out", tmp_path / "c", "--tokens", "20",
         *some, *spec),
        ("plan", model, "--edits", "5", "--requests", requests, *some, *spec),
        ("suggest", model, "--requests", requests, "--stats", stats, "--layers", "1", *fast, *spec),
        ("edit", model, "--requests", requests, "--stats", stats, "--out", tmp_path / "e", *some, *spec),
        ("edit", model, "--requests", requests, "--stats", stats, "--out", tmp_path / "t", *fast, *spec),
    ):  # fmt: skip
        done = run(*command)
        assert done.returncode == 0 or "target or paraphrase came through" in done.stderr, done.stderr
    assert len(names) > 20 and set(names) == {"Homemade"}
    assert json.loads((tmp_path / "e" / "config.json").read_text())["model_type"] == "llama"


def test_a_device_map_excludes_a_device_and_torchrun(place, tmp_path):
    edit = ("edit", place / "model", "--requests", place / "requests.json", "--out", tmp_path / "e")
    done = run(*edit, "--device-map", "auto", "--device", "cuda")
    assert done.returncode == 1 and "--device-map places the model: leave --device out" in done.stderr
    done = run(*edit, "--device-map", "auto", WORLD_SIZE="2")
    assert done.returncode == 1 and "use it without torchrun" in done.stderr


def test_a_spec_is_printed_checked_and_planned_with(names, place, tmp_path):
    done = run("spec", place / "model")
    assert "Llama (known); edits model.layers.*.mlp.down_proj [32 x 64]" in done.stderr
    file = tmp_path / "printed.json"
    file.write_text(done.stdout, encoding="utf-8")
    assert spec_from_json(file) == LLAMA
    done = run("spec", place / "model", "--spec", place / "spec.json")
    assert "Homemade" in done.stderr and json.loads(done.stdout)["name"] == "Homemade"
    file.write_text(spec_as_json(replace(SPEC, blocks="model.stages")), encoding="utf-8")
    done = run("spec", place / "model", "--spec", file)
    assert done.returncode == 1 and "stages" in done.stderr and not done.stdout
    file.write_text(spec_as_json(replace(SPEC, edit="mlp.up_proj")), encoding="utf-8")
    done = run("spec", place / "model", "--spec", file)
    assert done.returncode == 1 and "puts out 64 numbers, and the model's states have 32" in done.stderr
    file.write_text('{"name": "A"}', encoding="utf-8")
    done = run("edit", place / "model", "--requests", place / "requests.json", "--out", tmp_path / "e", "--spec", file)
    assert done.returncode == 1 and "printed.json lacks the field 'model_types'" in done.stderr
    planned = ("plan", place / "model", "--edits", "5", "--no-trial", "--layers", "1", "--spec", place / "spec.json")
    assert "Homemade, edits model.layers.1.mlp.down_proj" in run(*planned).stdout
    assert json.loads(run(*planned, "--json").stdout)["architecture"]["edit"] == "mlp.down_proj"
