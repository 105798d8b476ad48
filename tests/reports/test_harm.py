"""Predicted harm in reports: against the divergence that is measured, and of patches from a folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support import REQUESTS, make_editor

from kedit_fast import Editor, LowRankUpdate, collect_statistics, demo, evaluate, save_statistics
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import StatisticsError
from kedit_fast.reports.harm import in_words, patch_harm
from kedit_fast.workflow import predicted_harm, run_edits

FACTOR = 4  # between predicted and measured


@pytest.fixture(scope="module")
def measured(demo_model):
    """(edits, predicted KL, measured KL) of MEMIT on the demo model."""
    model, tokenizer = demo_model
    statistics = collect_statistics(model, tokenizer, demo.corpus(500), (0, 1, 2), output_metric=True)
    requests = demo.requests(30)
    text = demo.held_out([request.subject for request in requests], 100)
    numbers = {"clamp_norm_factor": 0.75, "v_num_grad_steps": 12, "on_predicted": "allow"}
    store, results = ValueFile(None), []
    for count in (30, 1):
        editor = Editor(
            model,
            tokenizer,
            "memit",
            layers=(0, 1, 2),
            statistics=statistics,
            hparams=numbers,
            prefixes=(),
            values=store,
        )
        editor.edit(requests[:count])
        patch = editor.patch()
        harm = predicted_harm(editor, statistics)
        editor.restore()
        after = evaluate(model, tokenizer, [], "loc.kl/text", texts=text, patches=[patch])
        results.append((count, harm, after.value("loc.kl/text")))
    return results


def test_what_is_predicted_is_near_what_is_measured(measured):
    for count, harm, kl in measured:
        assert not harm.missing and len(harm.modules) == 3
        assert 1 / FACTOR < kl / harm.predicted_kl < FACTOR, (count, kl, harm.predicted_kl)
    many, one = (harm.predicted_kl for _, harm, _ in measured)
    assert many > 10 * one


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
    editor, statistics, folder = edited
    harm = predicted_harm(editor, statistics)
    expected = 0.0
    for layer in (0, 1):  # densely, from the matrices: a Conv1D's is stored the other way round
        before, after = editor.ledger.original(f"{editor.view.module_name(layer)}.weight")
        delta = (after - before).double()
        moments = statistics.output_metric(layer), statistics.moment(layer).moment
        expected += 0.5 * float(torch.trace(moments[0] @ delta @ moments[1] @ delta.T))
    assert harm.predicted_kl == pytest.approx(expected, rel=1e-3)
    patch = editor.patch()
    assert patch_harm(patch, folder).predicted_kl == pytest.approx(expected, rel=1e-3)
    assert f"predicted KL {harm.predicted_kl:.3g} nats a token" in in_words(harm)
    alone = patch_harm(patch, None)
    assert alone.predicted_kl is None and not alone.missing and alone.norm == pytest.approx(harm.norm)


def test_what_is_missing_is_said_with_the_command_that_collects_it(edited, tmp_path):
    editor, statistics, folder = edited
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


def test_a_report_has_the_harm_beside_its_metrics(demo_model, demo_statistics):
    model, tokenizer = demo_model
    numbers = {"layers": (0, 1), "v_num_grad_steps": 2, "clamp_norm_factor": 0.75}
    report = run_edits(model, tokenizer, demo.requests(2), "memit", statistics=demo_statistics, hparams=numbers)
    entry = json.loads(json.dumps(report.as_dict()))["harm"]
    assert entry["norm"] > 0 and entry["predicted_kl"] is None and "--output-metric" in entry["missing"]
    assert set(entry["modules"]) == {report.editor.view.module_name(layer) for layer in (0, 1)}
    report.editor.restore()
