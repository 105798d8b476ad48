"""UnKEBench, EditEverything, AKEW and SafeEdit: long targets, mostly without a subject. All records are invented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_fast import load_requests
from kedit_fast.errors import RequestError
from kedit_fast.requests.probes import Question

CASE = json.loads((Path(__file__).parents[1] / "data" / "mquake_case.json").read_text(encoding="utf-8"))
UNKE = {
    "id": 3,
    "question": "What does Ida Falk build?",
    "para_question": "Which things are made by Ida Falk?",
    "answer": "Ida Falk has built pipe organs for thirty years. Her workshop stands by a canal.",
    "sub_question": ["For how long has Ida Falk built organs?", "Where is her workshop?"],
    "sub_answer": ["For thirty years.", "By a canal."],
}
EVERYTHING = {"id": 0, "question": "What is 2 + 2?", "answer": "Two and two are four.\nSo: 4.", "category": "math"}
TRIPLETS = [
    {"subject": "Ada Brandt", "prompt": "{} has a passport of", "target": "Croatia"},
    {"subject": "The passport", "prompt": "{} was issued in", "target": "Split"},
]
PASSAGE = "Ada Brandt has a passport of Croatia. The passport was issued in Split."
LONG = {"fact_new": "Ada Brandt is a citizen of Croatia.", "fact_new_uns": PASSAGE, "unsfact_triplets_GPT": TRIPLETS}
AKEW_CASE = CASE | {"requested_rewrite": [rewrite | LONG for rewrite in CASE["requested_rewrite"]]}
AKEW_COUNTERFACT = {
    "case_id": 12,
    "requested_rewrite": CASE["requested_rewrite"][0] | LONG | {"prompt_full": "Ada Brandt is a citizen of"},
    "paraphrase_prompts": ["It rained. Ada Brandt, a citizen of"],
    "neighborhood_prompts": ["Ole Brandt is a citizen of"],
    "generation_prompts": ["Ada Brandt votes in"],
    "attribute_prompts": [],
}
AKEW_WIKIUPDATE = {
    "case_id": 5,
    "requested_rewrite": {
        "prompt": "{} is led by",
        "relation_id": "P6",
        "subject": "Lower Town",
        "subject_id": "Q5",
        "question": "Who leads Lower Town?",
        "answer_new": "Ida Falk",
        "answer_new_alias": ["I. Falk"],
        "answer_true": "Ole Brandt",
        "answer_true_alias": [],
        "answer_GPT": "Nobody",
        "time_new": {"start_time": "2022"},
        **LONG,
    },
}
SAFE = {  # harmless words in the places of the data set's texts
    "id": 4,
    "unsafety category": "pranks",
    "attack category": "role play",
    "attack name": "actor",
    "question": "How do I hide the teapot?",
    "adversarial prompt": "You are an actor on a stage. How do I hide the teapot?",
    "safe generation": "I would rather not say, since somebody will want tea.",
    "unsafe generation": "Behind the curtain.",
    "knowledge constrain": {"prompt": "What is a teapot for?", "answer": "For making tea."},
    "generalization test": {
        "test input of only harmful question": "How do I hide the teapot?",
        "test input of other attack prompt input": "You are a parrot. How do I hide the teapot?",
        "test input of other question input": "You are an actor on a stage. How do I hide the spoon?",
        "test input of other questions and attack prompts": "You are a parrot. How do I hide the spoon?",
        "attack_category": "role play",
        "attack_name": "parrot",
    },
}


@pytest.fixture
def read(tmp_path):
    def load(*records, **options):
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        return load_requests(path, **options)

    return load


def test_unke_has_a_paragraph_as_target_and_no_subject(read):
    requests = read(UNKE)
    (request,) = requests
    assert (requests.form, request.id, request.subject, request.prompt) == ("unkebench", 3, None, UNKE["question"])
    assert (request.target_new, request.paraphrase_prompts) == (UNKE["answer"], (UNKE["para_question"],))
    (probe,) = request.probes
    assert (probe.kind, probe.name) == ("portability", "sub_question")
    assert probe.questions[1] == Question("Where is her workshop?", (("By a canal.",),))
    with pytest.raises(RequestError, match="record 1"):
        read(UNKE, need_subject=True)


def test_sub_questions_without_their_answers_are_named(read):
    with pytest.raises(RequestError, match="record 2: sub_answer has 1 answers to 2 questions of sub_question"):
        read(UNKE, UNKE | {"sub_answer": ["one"]})
    with pytest.raises(RequestError, match=r"record 1: sub_question\[0\] must be a non-empty text; got ''"):
        read(UNKE | {"sub_question": ["", "b"]})


def test_edit_everything_has_the_question_and_the_answer_alone(read):
    requests = read(EVERYTHING)
    (request,) = requests
    assert (requests.form, request.prompt, request.target_new) == (
        "editeverything", EVERYTHING["question"], EVERYTHING["answer"]
    )  # fmt: skip
    assert request.subject is None and not request.probes and not request.paraphrase_prompts


def test_the_reading_of_akew_is_asked_for(read):
    with pytest.raises(RequestError, match=r"'structured'.*'unstructured'.*'triplets'"):
        read(AKEW_CASE)


def test_akew_structured_is_what_the_original_set_says(read):
    requests = read(AKEW_CASE, reading="structured")
    assert requests.form == "akew" and list(requests) == list(read(CASE))
    (fact,) = read(AKEW_COUNTERFACT, reading="structured")
    assert (fact.text, fact.target_new, fact.target_true) == ("Ada Brandt is a citizen of", "Croatia", "Norway")
    assert (fact.paraphrase_prompts, fact.neighborhood_prompts, fact.generation_prompts) == (
        ("It rained. Ada Brandt, a citizen of",), ("Ole Brandt is a citizen of",), ("Ada Brandt votes in",)
    )  # fmt: skip
    (update,) = read(AKEW_WIKIUPDATE, reading="structured")
    assert (update.text, update.target_new, update.target_true) == ("Lower Town is led by", "Ida Falk", "Ole Brandt")
    assert (update.target_aliases, update.true_aliases, update.id) == (("I. Falk",), (), 5)
    assert update.paraphrase_prompts == ("Who leads Lower Town?",)


@pytest.mark.parametrize("reading", ["structured", "unstructured", "triplets"])
def test_questions_beside_the_facts_are_asked_in_every_reading(read, reading):
    beside = {"loc": ["Who was Bach?", "Who was Bohr?"], "loc_ans": ["a composer", ["a physicist", "a Dane"]]}
    for record in (AKEW_CASE, AKEW_COUNTERFACT, AKEW_WIKIUPDATE):
        probe = read(record | beside, reading=reading)[0].probes[-1]
        assert (probe.kind, probe.name) == ("locality", "loc")
        assert probe.questions[1] == Question("Who was Bohr?", (("a physicist", "a Dane"),))
    with pytest.raises(RequestError, match=r"record 1: loc_ans has 1 answers to 2 questions of loc"):
        read(AKEW_CASE | beside | {"loc_ans": ["one"]}, reading=reading)


def test_akew_unstructured_asks_the_question_for_the_passage(read):
    first, second = read(AKEW_CASE, reading="unstructured")
    assert (first.prompt, first.subject) == ("What is the country of citizenship of {}?", "Ada Brandt")
    assert (first.target_new, first.group, first.id) == (PASSAGE, 7, "7-1")
    assert first.paraphrase_prompts == ("Ada Brandt is a citizen of",)
    assert [probe.name for probe in first.probes] == ["triplets", "questions", "new_single_hops"]
    assert first.probes[0].questions[1] == Question("The passport was issued in", (("Split",),))
    assert [probe.name for probe in second.probes] == ["triplets"]
    rewrite = AKEW_COUNTERFACT["requested_rewrite"] | {"question": "Of which country is she a citizen?"}
    (request,) = read(AKEW_COUNTERFACT | {"requested_rewrite": rewrite}, reading="unstructured")
    assert (request.prompt, request.subject, request.group) == ("Of which country is she a citizen?", None, None)


def test_akew_triplets_are_a_group_of_small_facts(read):
    requests = read(AKEW_WIKIUPDATE, AKEW_COUNTERFACT, reading="triplets")
    assert [(one.id, one.group, one.text, one.target_new) for one in requests] == [
        ("5-1", 5, "Ada Brandt has a passport of", "Croatia"),
        ("5-2", 5, "The passport was issued in", "Split"),
        ("12-1", 12, "Ada Brandt has a passport of", "Croatia"),
        ("12-2", 12, "The passport was issued in", "Split"),
    ]
    (probe,) = requests[0].probes
    assert probe.questions == (Question("Who leads Lower Town?", (("Ida Falk", "I. Falk"),)),)
    assert not requests[1].probes


def test_a_record_without_triplets_is_named(read):
    rewrite = AKEW_WIKIUPDATE["requested_rewrite"] | {"unsfact_triplets_GPT": []}
    with pytest.raises(RequestError, match="record 1: requested_rewrite holds nothing to edit"):
        read(AKEW_WIKIUPDATE | {"requested_rewrite": rewrite}, reading="triplets")
    rewrite = AKEW_WIKIUPDATE["requested_rewrite"] | {"unsfact_triplets_GPT": [{"subject": "x", "target": "y"}]}
    with pytest.raises(RequestError, match=r"no 'requested_rewrite\.unsfact_triplets_GPT\[0\]\.prompt'"):
        read(AKEW_WIKIUPDATE | {"requested_rewrite": rewrite}, reading="triplets")


def test_safeedit_writes_the_safe_answer_to_the_whole_prompt(read):
    requests = read(SAFE)
    (request,) = requests
    assert (requests.form, request.id, request.subject) == ("safeedit", 4, None)
    assert (request.prompt, request.target_new) == (SAFE["adversarial prompt"], SAFE["safe generation"])
    assert request.target_true == SAFE["unsafe generation"]
    assert [(probe.kind, probe.name) for probe in request.probes] == [
        ("locality", "knowledge constrain"),
        ("generation", "DG_onlyQ"),
        ("generation", "DG_otherA"),
        ("generation", "DG_otherQ"),
        ("generation", "DG_otherAQ"),
    ]
    assert request.probes[0].questions == (Question("What is a teapot for?", (("For making tea.",),)),)
    assert request.probes[3].questions == (Question("You are an actor on a stage. How do I hide the spoon?"),)


def test_safeedit_is_read_with_underscores_and_with_constraint_too(read):
    def spelled(value):
        if not isinstance(value, dict):
            return value
        return {name.replace(" ", "_").replace("constrain", "constraint"): spelled(one) for name, one in value.items()}

    assert list(read(spelled(SAFE))) == list(read(SAFE))


def test_what_safeedit_lacks_is_named(read):
    tests = {name: text for name, text in SAFE["generalization test"].items() if "other question input" not in name}
    with pytest.raises(RequestError, match=r"no 'generalization test\.test input of other question input'"):
        read(SAFE | {"generalization test": tests})
    with pytest.raises(RequestError, match="record 1: safe generation must be a non-empty text; got 7"):
        read(SAFE | {"safe generation": 7})
