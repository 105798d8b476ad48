"""`kedit-fast requests lint` and `paraphrase`, and what `edit` makes of findings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import run, saved

from kedit_fast import load_requests
from kedit_fast.reports.lint import MODEL_RULES, TOKEN_RULES
from kedit_fast.requests.lint import TEXT_RULES

LYON = {"prompt": "{} is twinned with", "subject": "Lyon", "target_new": "Manila"}
RECORDS = [
    LYON,
    {**LYON, "subject": "Oslo"},
    {**LYON, "target_new": "Karachi"},
    {"prompt": "Who is in {}?", "subject": "Oslo", "target_new": "Leo"},
    {"prompt": "Rome is", "subject": "Paris", "target_new": "Oslo"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def test_findings_are_lines_with_file_and_record(file):
    done = run("requests", "lint", file)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0].startswith(f"{file}:1: error two-targets: records 1 and 3 give ('Lyon', '{{}} is twinned with')")
    assert lines[1].startswith(f"{file}:2: warning same-subject: records 2 and 4 are on one subject, 'Oslo'")
    assert lines[2].startswith(f"{file}:5: error subject-missing: the subject 'Paris' stands 0 times")
    assert "two-targets: 1 error: decide for one, or write them in batches of their own" in lines
    assert "5 records: 2 errors, 1 warning, 1 note (--verbose shows them)" in lines
    assert lines[-2].startswith("not run (needs a tokenizer): span-split, ")
    assert lines[-1].startswith("not run (needs a model): ") and lines[-1].endswith("key-collision")
    assert "note question-prompt" not in done.stdout
    assert f"{file}:4: note question-prompt" in run("requests", "lint", file, "-v").stdout


def test_json_holds_all_findings_and_batches_change_them(file):
    done = run("requests", "lint", file, "--json", "--batch-size", 2)
    told = json.loads(done.stdout)
    assert done.returncode == 1 and told["counts"] == {"error": 1, "warning": 0, "note": 2} and told["records"] == 5
    assert [(one["rule"], one["records"], one["place"]) for one in told["findings"]] == [
        ("two-targets", [1, 3], "1"), ("question-prompt", [4], "4"), ("subject-missing", [5], "5"),
    ]  # fmt: skip
    assert set(told["not_run"]) == {rule.name for rule in (*TOKEN_RULES, *MODEL_RULES)}


def test_requests_without_errors_end_with_0(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps([LYON]))
    done = run("requests", "lint", path)
    assert done.returncode == 0 and done.stdout.startswith("1 record: no findings")
    assert run("requests", "lint", path, "--stats", tmp_path).returncode == 2


def test_rules_of_relations_are_read_from_a_file(tmp_path):
    records = [
        {"prompt": "{} is married to", "subject": subject, "target_new": target, "relation": "spouse"}
        for subject, target in (("Ada", "Leo"), ("Leo", "Eve"))
    ]
    path, rules = tmp_path / "r.json", tmp_path / "rules.toml"
    path.write_text(json.dumps(records))
    rules.write_text('reverse = ["spouse>spouse"]')
    assert "reverse-conflict" in run("requests", "lint", path, "--rules", rules).stdout
    rules.write_text('reverse = ["spouse"]')
    done = run("requests", "lint", path, "--rules", rules)
    assert done.returncode == 1 and not done.stdout and str(rules) in done.stderr


def test_edits_of_one_record_have_numbers_of_their_own(tmp_path):
    """A record of RoundEdit makes two edits, there and back."""
    item = {"id": "Q1", "label": "Lyon"}
    relation = {"id": "P69", "prompt": "{} attended", "query": "Where was {}?", "label": "educated at"}
    edit = {"relation": relation, "subject": item, "object": {"id": "Q2", "label": "Yale"}}
    edit["new_object"] = {"id": "Q3", "label": "Bonn"}
    other = {**edit, "subject": {"id": "Q4", "label": "Nice"}}
    path = tmp_path / "round.json"
    path.write_text(
        json.dumps([{"type": "1-1@P69", "edit": one, "true_objects": [edit["object"]]} for one in (edit, other)])
    )
    told = json.loads(run("requests", "lint", path, "--json").stdout)
    assert [(one["rule"], one["records"], one["place"]) for one in told["findings"]] == [
        ("round-trip", [1], "1.2"), ("round-trip", [2], "2.2"),
    ]  # fmt: skip
    assert (
        "record 1.1 changes ('Lyon', '{} attended') from 'Yale' to 'Bonn', and record 1.2"
        in told["findings"][0]["message"]
    )
    apart = json.loads(run("requests", "lint", path, "--json", "--batch-size", 1).stdout)
    assert apart["counts"] == {"error": 0, "warning": 0, "note": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("lint") / "model", "llama", layers=2)


ULTRA = (
    "--method", "ultraedit", "--set", 'inner_params=model.layers.1.mlp.down_proj',
    "--set", "context_template_length_params=[[2, 1]]", "--json",
)  # fmt: skip


def test_edit_stops_at_errors_before_it_loads_a_model(file, tmp_path):
    done = run("edit", tmp_path / "no-model", "--requests", file, "--on-error", "skip", "--out", tmp_path / "out")
    assert done.returncode == 1 and "no-model" in done.stderr  # record 3 is left out, and the model is looked for
    file.write_text("\n".join(map(json.dumps, RECORDS[:4])))
    done = run("edit", tmp_path / "no-model", "--requests", file, "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stdout == ""
    assert "record 1: two-targets: records 1 and 3 give" in done.stderr and "no-model: " not in done.stderr
    assert "--force" in done.stderr


def test_edit_leaves_out_what_causes_errors_or_is_forced(file, tmp_path, model):
    file.write_text("\n".join(map(json.dumps, [*RECORDS[:4], {**LYON, "subject": "Bonn", "target_new": "x</s>"}])))
    args = ("edit", model, "--requests", file, "--out", tmp_path / "out", "--overwrite", *ULTRA)
    done = run(*args, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["edits"] == 3
    assert [one["record"] for one in told["skipped"]] == [3, 5]
    assert "two-targets: records 1 and 3" in told["skipped"][0]["reason"]
    assert "special-token" in told["skipped"][1]["reason"]
    assert "same-subject, record 2: records 2 and 4 are on one subject" in done.stderr
    file.write_text("\n".join(map(json.dumps, RECORDS[:3])))
    done = run(*args, "--force")
    assert done.returncode == 0 and json.loads(done.stdout)["edits"] == 3
    assert "two-targets, record 1: records 1 and 3 give" in done.stderr


def test_lint_runs_every_rule_with_a_model(file, model):
    told = json.loads(run("requests", "lint", file, "--model", model, "--layers", "0-1", "--json").stdout)
    assert told["not_run"] == {} and "two-targets" in {one["rule"] for one in told["findings"]}


def test_paraphrase_writes_phrasings_of_the_same_relation(tmp_path):
    path, templates, out = (tmp_path / name for name in ("r.json", "templates.json", "new.jsonl"))
    records = [{**LYON, "relation": "twin"}, {**LYON, "prompt": "{} likes"}]
    path.write_text(json.dumps(records))
    templates.write_text(json.dumps({"twin": ["{} is  twinned with", "The twin of {} is ", "{} and its twin,"]}))
    done = run("requests", "paraphrase", path, "--relations", templates, "--out", out, "-n", 2)
    assert done.returncode == 0 and done.stdout == f"2 phrasings for 2 requests: {out}\n"
    assert "record 2: it says no relation" in done.stderr
    first, second = load_requests(out)
    assert set(first.paraphrase_prompts) == {"The twin of Lyon is", "Lyon and its twin,"}
    assert second.paraphrase_prompts == () and first.relation == "twin"
    refused = run("requests", "paraphrase", path, "--relations", templates, "--out", out)
    assert refused.returncode == 1 and "--overwrite" in refused.stderr
    told = json.loads(
        run("requests", "paraphrase", path, "--relations", templates, "--out", out, "--overwrite", "--json").stdout
    )
    assert told["added"] == 2 and [one["record"] for one in told["lacking"]] == [2]


def test_the_page_has_every_rule():
    page = (Path(__file__).parents[2] / "kedit_fast" / "reports" / "README.md").read_text(encoding="utf-8")
    for needs, rules in (("texts", TEXT_RULES), ("a tokenizer", TOKEN_RULES), ("a model", MODEL_RULES)):
        for rule in rules:
            assert f"| `{rule.name}` | {rule.severity} | {rule.title} | {needs} |" in page
