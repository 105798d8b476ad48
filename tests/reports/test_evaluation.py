"""The files of an evaluation: complete, escaped, shown by a real browser without errors at any width; and `eval`."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html import unescape

import browser
import pytest
from support import run

from kedit_fast import Editor, EditRequest, demo, evaluate
from kedit_fast.errors import KeditError
from kedit_fast.evaluation.metric import Case, Derived, Measured, Metric
from kedit_fast.evaluation.results import CaseScore, Evaluation, RecordScore, Result
from kedit_fast.reports import evaluation as report
from kedit_fast.statistics.store import save_statistics
from kedit_fast.support import figures
from kedit_fast.workflow import run_edits

ABOUT = {"title": "Edits of <b>a model</b>", "model": "demo & co", "patches": ["one.safetensors: memit, 3 edits"]}
METRICS = "cf.success,cf.accuracy,cf.score,ee.locality"


@pytest.fixture(scope="module")
def edited(demo_model, demo_statistics, tmp_path_factory):
    """Three requests, one with a prompt that would be a script; a patch of them; what it did."""
    model, tokenizer = demo_model
    requests = demo.requests(3)
    near = ("<script>alert('no')</script> " + "very" * 60, *requests[2].neighborhood_prompts[:1])
    requests[2] = replace(requests[2], neighborhood_prompts=near)
    editor = Editor(model, tokenizer, "memit", statistics=demo_statistics, hparams={"v_num_grad_steps": 12})
    editor.edit(requests)
    patch = editor.patch()
    editor.restore()
    folder = tmp_path_factory.mktemp("evaluation")
    patch.save(folder / "edits.safetensors")
    measured = evaluate(model, tokenizer, requests, METRICS, patches=[patch])
    report.save(measured, tokenizer, folder / "out", ABOUT)
    return folder, measured, tokenizer


def test_the_files_have_every_score(edited):
    folder, measured, _ = edited
    document = json.loads((folder / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert document["about"] == ABOUT
    entry = document["metrics"]["cf.success/rewrite"]["states"]["final"]
    assert entry["value"] == measured.value("cf.success/rewrite") and entry["records"] == 3
    with (folder / "out" / "requests.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(document["records"]) == sum(len(r.cases) for rs in measured.scores.values() for r in rs)
    chosen = [float(row["final"]) for row in rows if row["metric"] == "cf.success/rewrite"]
    assert sum(chosen) / 3 == pytest.approx(measured.value("cf.success/rewrite"))
    if figures.available():
        assert (folder / "out" / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_escapes_what_it_shows_and_needs_nothing_else(edited):
    folder, measured, _ = edited
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>a model" not in page and "demo &amp; co" in page and "<script>alert" not in page
    assert not re.search(r"(src|href|url)\s*[=(]", page) and "default-src 'none'" in page
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    for id in measured.metrics:
        assert id in text and report.number(measured.value(id), report.scale_of(measured, id)) in text
    assert all(request.text in text for request in demo.requests(3))


@pytest.mark.skipif(browser.find() is None, reason="no Chromium: the page was not tried in a browser")
def test_the_page_in_a_browser(edited):
    folder, measured, _ = edited
    page = folder / "out" / "report.html"
    shown = "[...document.querySelectorAll('.requests tbody tr')].filter(row => !row.hidden).length"
    outside = """[...document.querySelectorAll('body *')].filter(
        each => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.scroll')).length"""
    with browser.Browser() as tab:
        for width in (400, 1200):
            for dark in (False, True):
                tab.open(page, width=width, dark=dark)
                assert tab.messages == []
                assert tab.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
                assert tab.value(outside) == 0
                background = tab.value("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
        row = (
            "[...document.querySelectorAll('#metrics tbody tr')].find(r => r.innerText.includes('cf.accuracy/rewrite'))"
        )
        values = [measured.value("cf.accuracy/rewrite", state) for state in ("pre", "final")]
        cells = tab.value(f"[...{row}.querySelectorAll('.number')].slice(0, 2).map(each => each.innerText)")
        assert cells == [report.number(value, 100) for value in values]
        assert tab.value(shown) == 3
        subject = demo.requests(1)[0].subject
        tab.value(f"words.value = {json.dumps(subject)}; words.dispatchEvent(new Event('input'))")
        assert tab.value(shown) == 1
        assert tab.value("document.getElementById('shown').textContent") == "1 of 3"
        tab.open(page, script=False)
        assert tab.messages == [] and "cf.accuracy" in (folder / "out" / "report.html").read_text(encoding="utf-8")


def by_hand(before, after, better="higher", prompt="Ebro is in", scale=1.0):
    """An evaluation of one request and one metric, with these scores."""
    request = EditRequest("{} is in", "Ebro", "Sweden", "Spain")
    metric = Metric("a.b/c", "rewrite", "x", "what it is", "here", scale=scale, better=better)
    scores = {"pre": before, "final": after}
    case = CaseScore(Case(prompt, "Sweden", "Spain", record=request), scores, {}, {"pre": 1.0, "final": 1.0})
    states = {name: Measured(score * scale, 1, 1, (0.0, 1.0)) for name, score in scores.items()}
    half = Derived("a.half", ("a.b/c",), lambda values: values[0] / 2, "half of it", "here")
    derived = Result(half, {name: Measured(score * scale / 2, 1, 1, None) for name, score in scores.items()}, None)
    one = Result(metric, states, "request")
    return Evaluation({"a.b/c": one, "a.half": derived}, {"a.b/c": (RecordScore(1, "Ebro", scores, (case,)),)})


def test_a_regression_is_a_loss_in_the_direction_that_is_better():
    assert [one.loss for one in report.regressions(by_hand(1.0, 0.25), None)] == [0.75]
    assert report.regressions(by_hand(0.25, 1.0), None) == []
    assert [one.loss for one in report.regressions(by_hand(2.0, 8.0, "lower"), None)] == [0.75]
    assert report.regressions(by_hand(1.0, 0.0, ""), None) == []
    assert report.scale_of(by_hand(1.0, 0.5, scale=100.0), "a.half") == 100


def test_a_folder_that_is_there_stays(edited):
    folder, measured, tokenizer = edited
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    with pytest.raises(KeditError, match="exists: choose another --out or pass --overwrite"):
        report.save(measured, tokenizer, folder / "out", ABOUT)
    assert {path: path.read_bytes() for path in (folder / "out").iterdir()} == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_eval_measures_a_patch_and_writes_its_folder(edited, tmp_path):
    folder, _, _ = edited
    lines = (demo.DATA / "requests.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    files = ("--requests", tmp_path / "requests.jsonl", "--patch", folder / "edits.safetensors")
    arguments = ("eval", demo.DATA, *files, "--metrics", "cf.accuracy", "--limit", "2",
                 "--dtype", "float32", "--out", tmp_path / "out")  # fmt: skip
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    states = answer["metrics"]["cf.accuracy/rewrite"]["states"]
    assert states["pre"]["value"] == 0 and states["final"]["value"] > 0 and states["final"]["records"] == 2
    assert answer["skipped"] == [] and set(answer["files"]) >= {"evaluation.json", "report.html", "requests.csv"}
    assert {path.name for path in tmp_path.iterdir()} == {"requests.jsonl", "out"}
    again = run(*arguments)
    assert again.returncode == 1 and "--overwrite" in again.stderr and not again.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--requests", "good.jsonl", "--metrics", "cf.sucess"), "did you mean cf.success"),
        (("--requests", "good.jsonl", "--patch", "other.safetensors"), "the patch was made for"),
        (("--requests", "broken.jsonl"), "broken.jsonl"),
        (("--requests", "mixed.jsonl"), "record 2"),
        (("--requests", "good.jsonl", "--base", demo.DATA, "--patch", "other.safetensors"), "give one of them"),
        ((), "--requests"),
    ],
)
def test_eval_refuses_before_anything_runs(edited, tmp_path, arguments, says):
    folder, _, _ = edited
    good = (demo.DATA / "requests.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "broken.jsonl").write_text(good + "\n{")
    zsre = {"subject": "Ebro", "src": "Where is Ebro?", "alt": "Rome", "answers": ["Spain"], "loc": "nq",
            "loc_ans": "x", "pred": "x", "rephrase": "Ebro is where?", "cond": "x"}  # fmt: skip
    (tmp_path / "mixed.jsonl").write_text(good + "\n" + json.dumps(zsre))
    (tmp_path / "other.safetensors").write_bytes((folder / "edits.safetensors").read_bytes())
    done = run("eval", demo.DATA, *arguments, "--out", "out", cwd=tmp_path)  # float16 here, the patch is for float32
    assert done.returncode in (1, 2) and says in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_retention_curve_is_of_the_final_model(demo_model, demo_statistics, tmp_path):
    """Two batches by hand from the JSON: what was right after a batch, and at the end."""
    model, tokenizer = demo_model
    done = run_edits(
        model, tokenizer, demo.requests(3), "memit", statistics=demo_statistics, batch_size=2, retention=1,
        hparams={"v_num_grad_steps": 12}, metrics="cf.accuracy",
    )  # fmt: skip
    final = {record.number: record.scores["final"] for record in done.evaluation.scores["cf.accuracy/rewrite"]}
    done.editor.rollback()
    first = evaluate(model, tokenizer, demo.requests(1), "cf.accuracy").value("cf.accuracy/rewrite") / 100
    done.editor.restore()
    retention = done.as_dict()["retention"]
    assert [one["requests"] for one in retention["curve"]] == [1, 1]
    assert [one["final"] for one in retention["curve"]] == [final[1], final[3]]
    assert retention["curve"][0]["after_batch"] == first
    assert retention["forgetting"] == first - final[1]
    page = report.page_of(done.evaluation, tokenizer, {}, done.retention)
    assert page.count("<polyline") == 2 and "cf.accuracy/rewrite of 2 batches" in page
    if figures.available():
        figures.save(report.retention_figure(done.retention), tmp_path / "curve.png")
    assert set(done.as_dict()["metrics"]["cf.accuracy/rewrite"]) == {"value", "n", "interval", "before"}


def test_edit_writes_what_its_edits_did(demo_model, demo_statistics, tmp_path):
    save_statistics(demo_statistics, tmp_path / "stats")
    lines = (demo.DATA / "requests.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    done = run("edit", demo.DATA, "--requests", "requests.jsonl", "--stats", "stats", "--patch", "p.safetensors",
               "--eval-out", "did", "--metrics", "cf.accuracy", "--batch-size", "1", "--retention", "1", "--json",
               "--set", "v_num_grad_steps=5", "--trust", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["eval_out"] == "did" and answer["metrics"]["cf.accuracy/rewrite"]["n"] == 2
    assert "retention" in json.loads((tmp_path / "did" / "evaluation.json").read_text(encoding="utf-8"))
