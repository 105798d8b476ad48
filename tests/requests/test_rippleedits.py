"""RippleEdits: a sentence as the edit, six criteria as probes."""

from __future__ import annotations

import copy
import json

import pytest
from support import run

from kedit_fast import load_requests
from kedit_fast.errors import RequestError
from kedit_fast.requests.probes import Probe, Question


def query(prompt: str, *answers: str, relation="MOTHER", subject="Q38111", targets=("Q1",), **others) -> dict:
    names = [{"value": name, "aliases": list(aliases)} for name, *aliases in (answer.split("|") for answer in answers)]
    return {
        "prompt": prompt,
        "answers": names,
        "query_type": "regular",
        "subject_id": subject,
        "relation": relation,
        "target_ids": list(targets),
        "phrase": None,
        **others,
    }


def test_of(*queries: dict, condition="OR", before: tuple = ()) -> dict:
    return {"test_queries": list(queries), "test_condition": condition, "condition_queries": list(before)}


test_of.__test__ = False
MOTHER = query("The name of the mother of Leonardo DiCaprio is", "Irmelin DiCaprio|Irmelin Indenbirken")
GENDER = query("The gender of Leonardo DiCaprio is", "male", relation="SEX_OR_GENDER", targets=["Q6581097"])
EXAMPLE = {  # the edit and the first query are those of the data set's README (MIT)
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Leonardo DiCaprio is Syria.",
        "subject_id": "Q38111",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q858",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Leonardo DiCaprio is United States of America.",
            "subject_id": "Q38111",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q30",
        },
    },
    "Relation_Specificity": [test_of(MOTHER, before=(MOTHER,)), test_of(GENDER)],
    "Logical_Generalization": [],
    "Subject_Aliasing": [
        test_of(
            query(
                "The name of the country of citizenship of Leo DiCaprio is",
                "Syria|Syrian Arab Republic",
                relation="COUNTRY_OF_CITIZENSHIP",
                targets=["Q858"],
            )
        )
    ],
    "Compositionality_I": [
        test_of(
            query(
                "The names of the capitals of the country of citizenship of Leonardo DiCaprio are",
                "Damascus|Dimashq",
                "X",
                query_type="two_hop",
                second_relation="CAPITAL",
                second_hop_target_ids=["Q3766", "Q2"],
            )
        )
    ],
    "Compositionality_II": [
        test_of(
            query("The mother's country is", "Syria", subject="Q9"),
            query("The father's country is", "Syria", "7", subject="Q9"),
            condition="AND",
            before=(query("The name of the mother of Ann is", "Leonardo DiCaprio", subject="Q9", targets=["Q38111"]),),
        )
    ],
    "Forgetfulness": [
        test_of(
            query(
                "The name of the country of citizenship of Leonardo DiCaprio, which is not Syria, is",
                "United States of America",
                relation="COUNTRY_OF_CITIZENSHIP",
                targets=["Q30"],
            )
        )
    ],
}


def changed(edit: dict | None = None, **fields) -> dict:
    """The example with other criteria; without those that are not given."""
    return {"example_type": "popular", "edit": copy.deepcopy(EXAMPLE["edit"]) | (edit or {}), **fields}


@pytest.fixture
def written(tmp_path):
    def write(*records) -> str:
        path = tmp_path / "popular.json"
        path.write_text(json.dumps(records))
        return str(path)

    return write


def test_an_example_is_one_request_whose_prompt_is_the_sentence_without_its_target(written):
    requests = load_requests(written(EXAMPLE))
    (request,) = requests
    assert requests.form == "rippleedits"
    assert (request.prompt, request.subject) == ("The name of the country of citizenship of {} is", "Leonardo DiCaprio")
    assert (request.target_new, request.target_aliases) == ("Syria", ("Syrian Arab Republic",))
    assert (request.target_true, request.true_aliases) == ("United States of America", ())
    assert request.relation == "COUNTRY_OF_CITIZENSHIP"


def test_each_test_is_a_probe_with_its_condition_and_what_must_be_known_before(written):
    probes = load_requests(written(EXAMPLE))[0].probes
    mother = Question(MOTHER["prompt"], (("Irmelin DiCaprio", "Irmelin Indenbirken"),))
    assert probes[0] == Probe("locality", (mother,), "Relation_Specificity", "any", (mother,))
    assert [(probe.kind, probe.name, probe.condition) for probe in probes[1:]] == [
        ("locality", "Relation_Specificity", "any"),
        ("portability", "Subject_Aliasing", "any"),
        ("portability", "Compositionality_II", "all"),
        ("locality", "Forgetfulness", "any"),
    ]
    assert probes[3].questions[1].answers == (("Syria",), ("7",))  # a digit counts, a single letter does not
    assert probes[3].before == (Question("The name of the mother of Ann is", (("Leonardo DiCaprio",),)),)


def test_a_test_without_an_answer_that_counts_is_left_out_and_reported(written, caplog):
    load_requests(written(changed(Relation_Specificity=[test_of(MOTHER), test_of(GENDER)]), EXAMPLE))
    assert "tests without an answer that counts" in caplog.text and "left out: record 2" in caplog.text


def test_both_spellings_of_the_first_criterion_are_read(written):
    record = changed(Relation_Specifity=[test_of(MOTHER), test_of(GENDER)])
    assert [probe.name for probe in load_requests(written(record))[0].probes] == ["Relation_Specificity"] * 2


@pytest.mark.parametrize(
    ("prompt", "original", "prompts", "expected"),
    [
        (
            "The name of the author of The Lord of the Rings is Edith.",
            "The name of the author of The Lord of the Rings is Ed.",
            ["The name of the director of The Lord of the Rings is", "The gender of The Lord of the Rings is"],
            ("The name of the author of {} is", "The Lord of the Rings", "Edith", "Ed"),
        ),
        (  # the two targets begin with the same words
            "The name of the alma mater of Cher is University of Oxford.",
            "The name of the alma mater of Cher is University of Cambridge.",
            ["The place of birth of Cher is"],
            ("The name of the alma mater of {} is", "Cher", "University of Oxford", "University of Cambridge"),
        ),
        (  # "place of" is longer than the subject, and is in both
            "The place of death of Cher is Warner Bros..",
            "The place of death of Cher is Bonn.",
            ["The place of birth of Cher is"],
            ("The place of death of {} is", "Cher", "Warner Bros.", "Bonn"),
        ),
        (
            "Abbey Road is followed by Help!.",
            "Abbey Road is followed by Let It Be.",
            ["The name of the composer of Abbey Road is"],
            ("{} is followed by", "Abbey Road", "Help!", "Let It Be"),
        ),
        ("Is Cher still alive? no.", "Is Cher still alive? yes.", ["The gender of Cher is"],
         ("Is {} still alive?", "Cher", "no", "yes")),
        ("The gender of Cher is male.", None, ["The place of birth of Cher is"],
         ("The gender of {} is", "Cher", "male", None)),
    ],
)  # fmt: skip
def test_subject_and_target_are_read_off_the_sentences(written, prompt, original, prompts, expected):
    edit = {"prompt": prompt, "original_fact": EXAMPLE["edit"]["original_fact"] | {"prompt": original}}
    if original is None:
        edit.pop("original_fact")
    record = changed(edit, Relation_Specificity=[test_of(query(text, "anything")) for text in prompts])
    if original is None:
        del record["edit"]["original_fact"]
    (request,) = load_requests(written(record))
    assert (request.prompt, request.subject, request.target_new, request.target_true) == expected


def test_a_subject_that_no_query_shows_is_asked_for_by_record(written, tmp_path):
    path = written(EXAMPLE, changed())
    with pytest.raises(RequestError, match=r"record 2: edit\.prompt .* its subject Q38111.*: give labels"):
        load_requests(path)
    labels = tmp_path / "labels.json"
    labels.write_text('{"Q38111": "Leonardo DiCaprio"}')
    assert load_requests(path, labels=labels)[1].subject == "Leonardo DiCaprio"


def test_a_target_that_the_sentence_does_not_show_is_asked_for(written):
    record = changed({"prompt": "The name of the author of What Love is is Ann."}, Relation_Specificity=[])
    del record["edit"]["original_fact"]
    with pytest.raises(RequestError, match="where its target begins: give labels that map Q858 to its name"):
        load_requests(written(record))


@pytest.mark.parametrize(
    "prompt",
    [
        "Leonardo DiCaprio comes from Bonn.",
        "The name of the country of citizenship of Leonardo DiCaprio is .",
    ],
)
def test_an_original_fact_whose_answer_cannot_be_read_is_reported(written, caplog, prompt):
    original = EXAMPLE["edit"]["original_fact"] | {"prompt": prompt}
    (request,) = load_requests(written(EXAMPLE | {"edit": EXAMPLE["edit"] | {"original_fact": original}}))
    assert request.target_true is None and request.target_new == "Syria"
    assert "the old answer is not read: record 1" in caplog.text


def test_an_edit_that_changes_nothing_is_reported(written, caplog):
    edit = EXAMPLE["edit"] | {
        "original_fact": {**EXAMPLE["edit"]["original_fact"], "prompt": EXAMPLE["edit"]["prompt"]}
    }
    (request,) = load_requests(written(changed(edit, Relation_Specificity=[test_of(MOTHER)])))
    assert (request.target_new, request.target_true) == ("Syria", "Syria")
    assert "a true answer already: record 1" in caplog.text


def test_a_query_without_a_name_names_nothing(written):
    nameless = MOTHER | {"answers": [{"value": "", "aliases": ["Irmelin"]}]}
    (request,) = load_requests(written(changed(Relation_Specificity=[test_of(nameless)])))
    assert request.probes[0].questions[0].answers == (("Irmelin",),)


def test_malformed_tests_are_named(written):
    bad = test_of(MOTHER | {"answers": [{"value": 3}]}, condition="XOR")
    with pytest.raises(RequestError, match=r"record 1: Forgetfulness\[0\]"):
        load_requests(written(changed(Forgetfulness=[bad])))


def test_converted_records_keep_what_labels_said(written, tmp_path):
    path, labels, out = written(EXAMPLE, changed()), tmp_path / "labels.json", tmp_path / "flat.jsonl"
    labels.write_text('{"Q38111": "Leonardo DiCaprio", "Q858": "Syria"}')
    result = run("requests", "convert", path, "--labels", labels, "--out", out)
    assert result.returncode == 0, result.stderr
    assert list(load_requests(out)) == list(load_requests(path, labels=labels))
    labels.write_text('{"Q38111": 3}')
    result = run("requests", "convert", path, "--labels", labels, "--out", tmp_path / "none.jsonl")
    assert result.returncode == 1 and "labels: the name of 'Q38111' must be a non-empty text; got 3" in result.stderr
