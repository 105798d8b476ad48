"""MQuAKE: a case is a group of edits; its questions ask over all of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from kedit_fast import load_requests
from kedit_fast.errors import RequestError
from kedit_fast.requests.probes import Question

DATA = Path(__file__).parents[1] / "data"
CASE = json.loads((DATA / "mquake_case.json").read_text(encoding="utf-8"))  # invented, in the form of the data set


def changed(**fields) -> dict:
    return copy.deepcopy(CASE) | fields


@pytest.fixture
def written(tmp_path):
    def write(*cases) -> str:
        path = tmp_path / "MQuAKE.json"
        path.write_text(json.dumps(cases))
        return str(path)

    return write


def test_a_case_is_a_group_of_edits_in_its_order_and_no_joined_prompt(written):
    requests = load_requests(written(CASE))
    assert requests.form == "mquake"
    assert [(one.id, one.group, one.relation, one.text) for one in requests] == [
        ("7-1", 7, "P27", "Ada Brandt is a citizen of"),
        ("7-2", 7, "P36", "The capital of Croatia is"),
    ]
    first, second = requests
    assert (first.target_new, first.target_aliases) == ("Croatia", ("CRO",))
    assert (first.target_true, first.true_aliases) == ("Norway", ("NO", "Norge"))
    assert first.paraphrase_prompts == ("What is the country of citizenship of Ada Brandt?",)
    assert (second.target_aliases, second.true_aliases, second.probes) == (("Spalato",), (), ())


def test_questions_take_the_new_answer_or_an_alias_and_the_old_chain_comes_before(written):
    questions, hops = load_requests(written(CASE))[0].probes
    assert (questions.kind, questions.name, questions.condition) == ("multi_hop", "questions", "any")
    assert questions.prompts == tuple(CASE["questions"])
    assert {question.answers for question in questions.questions} == {(("Split", "Spalato"),)}
    assert questions.before == (
        Question("Ada Brandt is a citizen of", (("Norway", "NO", "Norge"),)),
        Question("The capital of Norway is", (("Oslo",),)),
    )
    assert (hops.kind, hops.name) == ("locality", "new_single_hops")
    assert hops.questions == (Question("Split is on the", (("Adriatic Sea", "Adriatic"),)),)


def test_edits_of_different_cases_that_contradict_each_other_are_reported(written, caplog):
    other = changed(case_id=9, new_answer_alias=[])
    other["requested_rewrite"] = other["requested_rewrite"][:1]
    other["requested_rewrite"][0]["target_new"]["str"] = "Peru"
    load_requests(written(CASE, changed(case_id=8), other))
    assert "edits that contradict another case's" in caplog.text and ": records 1, 3" in caplog.text
    assert "a new answer without aliases: record 3" in caplog.text


def test_a_case_without_hops_has_its_edits_and_questions_alone(written, caplog):
    fields = {name: value for name, value in CASE.items() if name not in ("single_hops", "new_single_hops")}
    first, second = load_requests(written(fields))
    assert (first.target_aliases, second.true_aliases) == ((), ())
    assert [(probe.name, probe.before) for probe in first.probes] == [("questions", ())]
    assert "no single hops, old or new: record 1" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requested_rewrite": []}, "requested_rewrite"),
        ({"new_answer": " "}, "record 2: new_answer must be a non-empty text; got ' '"),
        ({"questions": ["One?", 3]}, "record 2: questions[1] must be a non-empty text; got 3"),
        ({"single_hops": [{"question": "Q?", "cloze": "c"}]}, "record 2 has no 'single_hops[0].answer'"),
        (
            {"requested_rewrite": [CASE["requested_rewrite"][0] | {"prompt": "Ada is"}]},
            "record 2: requested_rewrite[0].prompt must contain {} once",
        ),
    ],
)
def test_malformed_fields_are_named_by_record(written, fields, message):
    with pytest.raises(RequestError) as raised:
        load_requests(written(CASE, changed(**fields)), form="mquake")
    assert message in str(raised.value)
    assert len(load_requests(written(CASE, changed(**fields)), form="mquake", on_error="skip")) == 2
