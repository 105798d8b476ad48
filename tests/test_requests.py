from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_fast.editing.requests import load_requests, parse_request
from kedit_fast.errors import RequestError

GOOD = {"prompt": "{} is in", "subject": "Ebro", "target_new": "Sweden"}


def test_flat_records_and_spelled_out_subjects():
    request = parse_request({**GOOD, "target_true": "Spain", "paraphrase_prompts": ["Where is Ebro? In"], "id": 7})
    assert (request.text, request.target_true, request.id) == ("Ebro is in", "Spain", 7)
    assert parse_request({**GOOD, "prompt": "Ebro is in"}).prompt == "{} is in"


def test_counterfact_records_are_read_as_they_are():
    (request,) = load_requests(Path(__file__).parent / "data" / "counterfact_sample.json")
    assert request.subject == "Autonomous University of Madrid"
    assert (request.target_new, request.target_true, request.id) == ("Sweden", "Spain", 0)
    assert len(request.paraphrase_prompts) == 2 and len(request.neighborhood_prompts) == 10


@pytest.mark.parametrize(
    "content, message",
    (
        ("[", "malformed JSON"),
        ("{}", "must hold a list"),
        ("[]", "no requests"),
        ("[3]", "record 1 must be an object"),
        (json.dumps([GOOD, {"prompt": "{} is", "target_new": "x"}]), "record 2 has no 'subject'"),
        (json.dumps([{**GOOD, "prompt": "Tagus is in"}]), "stands 0 times"),
        (json.dumps([{**GOOD, "prompt": "Ebro, Ebro is in"}]), "stands 2 times"),
        (json.dumps([{**GOOD, "target_new": 5}]), "target_new must be a text"),
        (json.dumps([{**GOOD, "target_new": ""}]), "record 1.*non-empty"),
        (json.dumps([{**GOOD, "paraphrase_prompts": [1]}]), "list of texts"),
    ),
)
def test_bad_files_are_named_by_record(tmp_path, content, message):
    path = tmp_path / "requests.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=message) as caught:
        load_requests(path)
    assert "requests.json" in str(caught.value)


def test_jsonl_and_missing_files(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n")
    assert len(load_requests(path)) == 2
    path.write_text(json.dumps(GOOD) + "\n{oops\n")
    with pytest.raises(RequestError, match="line 2"):
        load_requests(path)
    with pytest.raises(RequestError, match="cannot read"):
        load_requests(tmp_path / "absent.json")
