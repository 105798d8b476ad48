"""Predicted harm in reports: against the divergence that is measured, and of patches from a folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from support import REQUESTS, make_editor, run
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, LowRankUpdate, collect_statistics, demo, evaluate, save_statistics
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import StatisticsError
from kedit_fast.reports.harm import in_words, patch_harm
from kedit_fast.statistics.labels import OutputGradients
from kedit_fast.workflow import predicted_harm, run_edits

FACTOR = 4  # between predicted and measured


@pytest.fixture(scope="module")
def statistics(demo_model, demo_statistics):
    """Of the demo model, with output metrics."""
    few = collect_statistics(*demo_model, demo.corpus(120), (0, 1), output_metric=OutputGradients(tokens=4_000))
    return replace(demo_statistics, outputs=few.outputs, outputs_from=few.outputs_from)


def test_what_is_predicted_is_near_what_is_measured(demo_model, statistics):
    model, tokenizer = demo_model
    requests = demo.requests(24)
    text = demo.held_out([request.subject for request in requests], 60)
    numbers = {"clamp_norm_factor": 0.75, "v_num_grad_steps": 8, "on_predicted": "allow"}
    store, predicted = ValueFile(None), []
    for count in (24, 1):
        editor = Editor(
            model, tokenizer, "memit", layers=(0, 1), statistics=statistics, hparams=numbers, prefixes=(), values=store
        )
        editor.edit(requests[:count])
        patch, harm = editor.patch(), predicted_harm(editor, statistics)
        editor.restore()
        after = evaluate(model, tokenizer, [], "loc.kl/text", texts=text, patches=[patch]).value("loc.kl/text")
        assert not harm.missing and len(harm.modules) == 2
        assert 1 / FACTOR < after / harm.predicted_kl < FACTOR, (count, after, harm.predicted_kl)
        predicted.append(harm.predicted_kl)
    assert predicted[0] > 5 * predicted[1]


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def edited(request, tmp_path_factory):
    """An editor of a tiny model that has written, its statistics, and their folder."""
    editor = make_editor(request.param)
    view = editor.view
    statistics = collect_statistics(
        view.model, editor.tokenizer, [r.text for r in REQUESTS] * 9, (0, 1), output_metric=True
    )
    folder = tmp_path_factory.mktemp("stats")
    save_statistics(statistics, folder)
    editor.edit(REQUESTS)
    return editor, statistics, folder


def test_a_patch_and_a_folder_predict_what_the_editor_does(edited):
    editor, moments_of, folder = edited
    harm = predicted_harm(editor, moments_of)
    expected = 0.0
    for layer in (0, 1):  # densely, from the matrices: a Conv1D's is stored the other way round
        before, after = editor.ledger.original(f"{editor.view.module_name(layer)}.weight")
        delta = (after - before).double()
        moments = moments_of.output_metric(layer), moments_of.moment(layer).moment
        expected += 0.5 * float(torch.trace(moments[0] @ delta @ moments[1] @ delta.T))
    assert harm.predicted_kl == pytest.approx(expected, rel=1e-3)
    patch = editor.patch()
    assert patch_harm(patch, folder).predicted_kl == pytest.approx(expected, rel=1e-3)
    assert f"predicted KL {harm.predicted_kl:.3g} nats a token" in in_words(harm)
    alone = patch_harm(patch, None)
    assert alone.predicted_kl is None and not alone.missing and alone.norm == pytest.approx(harm.norm)


def test_what_is_missing_is_said_with_the_command_that_collects_it(edited, tmp_path):
    editor, _, folder = edited
    patch = editor.patch()
    for path in folder.iterdir():
        if "output_metric" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    harm = patch_harm(patch, tmp_path)
    assert harm.predicted_kl is None and "--output-metric" in harm.missing
    assert "no statistics of" in predicted_harm(editor, None).missing
    without = collect_statistics(editor.view.model, editor.tokenizer, ["A text. "] * 30, (0, 1))
    assert "--output-metric" in predicted_harm(editor, without).missing
    with pytest.raises(StatisticsError, match="no statistics folder"):
        patch_harm(patch, tmp_path / "none")
    factors = {name: LowRankUpdate(torch.randn(4, 1), torch.randn(5, 1)) for name in patch.updates}
    with pytest.raises(StatisticsError, match=r"not of this patch's model: update is \[4, 5\]"):
        patch_harm(replace(patch, updates=factors), folder)


def test_the_commands_show_it_beside_the_norm(edited, tmp_path):
    editor, _, folder = edited
    patch = tmp_path / "patch.safetensors"
    editor.patch().save(patch)
    harm = patch_harm(editor.patch(), folder)
    shown = run("patch", "show", patch, "--stats", folder)
    assert shown.returncode == 0 and "predicted KL" in shown.stdout, shown.stderr
    assert f"All modules: {in_words(harm)}" in shown.stdout
    assert json.loads(run("patch", "show", patch, "--stats", folder, "--json").stdout)["harm"] == harm.as_dict()
    plain = run("patch", "show", patch)
    assert "predicted KL" not in plain.stdout and f"All modules: |Delta| {harm.norm:.4g}" in plain.stdout
    editor.restore()
    editor.view.model.save_pretrained(tmp_path / "model")
    editor.tokenizer.save_pretrained(tmp_path / "model")
    editor.edit(REQUESTS)  # as the fixture left it
    (tmp_path / "requests.jsonl").write_text("\n".join(json.dumps(asdict(r)) for r in REQUESTS))
    measure = ("eval", tmp_path / "model", "--requests", tmp_path / "requests.jsonl", "--patch", patch)
    done = run(*measure, "--stats", folder, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["harm"] == [harm.as_dict()] and in_words(harm) in result["about"]["patches"][0]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"predicted KL {harm.predicted_kl:.3g} nats a token" in page
    without = run("eval", tmp_path / "model", "--requests", tmp_path / "requests.jsonl", "--stats", folder)
    assert without.returncode == 2 and "--patch" in without.stderr


def test_statistics_of_another_model_predict_nothing():
    """Also where the method itself reads none."""
    other = collect_statistics(make_model("llama", seed=1), make_tokenizer(), TEXT, (1,), progress=False)
    numbers = {"inner_params": ["model.layers.1.mlp.down_proj.weight"]}
    with pytest.raises(StatisticsError, match="of another model"):
        run_edits(make_model("llama"), make_tokenizer(), REQUESTS, "ultraedit", statistics=other, hparams=numbers)


def test_a_report_has_the_harm_beside_its_metrics(demo_model, statistics):
    model, tokenizer = demo_model
    numbers = {"layers": (0, 1), "v_num_grad_steps": 2, "clamp_norm_factor": 0.75}
    report = run_edits(model, tokenizer, demo.requests(2), "memit", statistics=statistics, hparams=numbers)
    entry = json.loads(json.dumps(report.as_dict()))["harm"]
    report.editor.restore()
    assert entry["norm"] > 0 and entry["predicted_kl"] > 0 and "missing" not in entry
    assert set(entry["modules"]) == {report.editor.view.module_name(layer) for layer in (0, 1)}
    assert entry["predicted_kl"] == pytest.approx(sum(part["predicted_kl"] for part in entry["modules"].values()))
