"""Rules of texts: each on requests that break it, and on their like that do not."""

# ruff: noqa: RUF001 - marks that look alike are part of what is tested

from __future__ import annotations

import json

import pytest

from kedit_fast import EditRequest, load_requests
from kedit_fast.errors import RequestError
from kedit_fast.requests.lint import TEXT_RULES, Checked, lint_texts
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.reading import RequestList, as_requests
from kedit_fast.requests.relations import PUBLISHED, RelationRules


def findings(*requests, **options):
    return lint_texts(Checked.of(as_requests(list(requests), "skip"), **options))


def rules(*requests, **options):
    return [(finding.rule, finding.severity, finding.records) for finding in findings(*requests, **options)]


def fact(subject="Lyon", target="Manila", prompt="{} is twinned with", **fields):
    return EditRequest(prompt, subject, target, **fields)


def test_clean_requests_have_no_findings():
    assert not rules(fact(), fact("Vienna", "Cairo"), fact("Oslo", "Lima", "The twin city of {} is"))


@pytest.mark.parametrize(
    "second",
    (fact(), fact("Lyon ", " Manila"), fact(prompt="{}  is Twinned with"), fact("Lyon", "Manila", weight=2.0)),
)
def test_a_repeated_request_weighs_twice(second):
    assert rules(fact(), fact("Oslo"), second) == [("duplicate-request", "warning", (3, 1))]


def test_composed_and_decomposed_spellings_are_one_request():
    assert (
        rules(fact("Orl\u00e9ans", "Bogot\u00e1"), fact("Orle\u0301ans", "Bogota\u0301"))[0][0] == "duplicate-request"
    )


def test_a_repeat_in_another_batch_is_a_note():
    assert rules(fact(), fact(), batch_size=1) == [("duplicate-request", "note", (2, 1))]


def test_two_targets_are_an_error_in_one_batch_and_a_note_in_two():
    pair = fact(), fact("Oslo"), fact("Lyon", "Karachi")
    (finding,) = findings(*pair)
    assert (finding.rule, finding.severity, finding.records, finding.unusable) == ("two-targets", "error", (1, 3), (2,))
    assert "records 1 and 3 give ('Lyon', '{} is twinned with') two answers, Manila and Karachi" in finding.message
    assert rules(*pair, batch_size=2) == [("two-targets", "note", (1, 3))]
    assert rules(*pair, batch_size=3) == [("two-targets", "error", (1, 3))]


def test_of_three_targets_those_that_differ_from_the_first_cannot_be_used():
    (repeat, finding) = findings(fact(), fact("Lyon", "Karachi"), fact(), fact("Lyon", "Lima"))[::-1]
    assert repeat.rule == "duplicate-request"
    assert finding.unusable == (1, 3) and "3 answers" in finding.message


def test_one_relation_in_two_phrasings_is_one_fact():
    first = fact("Ada", "Leo", "The father of {} is", relation="P22")
    second = fact("Ada", "Max", "{} was fathered by", relation="P22")
    assert rules(first, second) == [("two-targets", "error", (1, 2))]
    third = fact("Ada", "Tom", "{} was fathered by")  # no relation, but a prompt of the second's
    assert rules(first, second, third) == [("two-targets", "error", (1, 2, 3))]
    other = fact("Ada", "Max", "{} was fathered by", relation="P40")
    assert rules(first, other) == [("same-subject", "warning", (1, 2))]


def test_several_facts_of_one_subject_share_a_key():
    requests = fact(), fact("Lyon", "France", "{} is in"), fact("Oslo")
    (finding,) = findings(*requests)
    assert (finding.rule, finding.severity, finding.records) == ("same-subject", "warning", (1, 2))
    assert "memit-merge" in finding.advice
    assert not rules(*requests, shares_values=True)
    assert not rules(*requests, batch_size=1)


def test_ids_are_unique():
    assert rules(fact(id="a"), fact("Oslo", id="b"), fact("Bonn", id="a")) == [("duplicate-id", "warning", (1, 3))]


@pytest.mark.parametrize(
    "fields",
    (
        dict(target_true="manila"),
        dict(target_true="City of Manila", true_aliases=("Manila ",)),
        dict(target_true="City of Manila", target_aliases=("city of  manila",)),
    ),
)
def test_a_target_that_is_the_old_one_changes_nothing(fields):
    (finding,) = findings(fact(**fields))
    assert (finding.rule, finding.severity, finding.unusable) == ("no-change", "error", (0,))


def test_a_round_trip_is_an_error_in_one_batch_and_a_note_in_a_sequence():
    there, back = fact(target_true="Karachi"), fact("Lyon", "Karachi", target_true="Manila")
    assert rules(there, back) == [("round-trip", "error", (2, 1))]
    assert rules(there, back, batch_size=1) == [("round-trip", "note", (2, 1))]
    assert [name for name, *_ in rules(there, back, fact("Lyon", "Lima"))] == ["two-targets", "round-trip"]


def edit(subject, relation, new, true=None, **fields):
    return EditRequest(f"The {relation} of {{}} is", subject, new, true, relation=relation, **fields)


def test_an_edit_against_the_reverse_of_another_is_named():
    goya = edit("Francisco de Goya", "P800", "Landscape", "The Second of May")
    strauss, same = edit("Landscape", "P170", "Richard Strauss"), edit("Landscape", "P170", "francisco de goya")
    (finding,) = findings(goya, strauss)
    assert (finding.rule, finding.severity, finding.records) == ("reverse-conflict", "warning", (2, 1))
    assert "(Landscape, P170: Francisco de Goya)" in finding.message
    assert rules(strauss, goya) == [("reverse-conflict", "warning", (1, 2))]
    assert not rules(goya, same)
    assert not rules(goya, edit("Landscape", "P50", "Richard Strauss"))


def test_rules_of_relations_are_extended_by_a_file(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('reverse = ["spouse>spouse"]\ncomposite = ["a & b > c"]\n')
    extended = PUBLISHED.extended(RelationRules.load(path))
    assert ("spouse", "spouse") in extended.reverse and ("P22", "P40") in extended.reverse
    assert extended.composite[-1] == ("a", "b", "c")
    pair = edit("Ada", "spouse", "Leo"), edit("Leo", "spouse", "Eve")
    assert [name for name, *_ in rules(*pair, relations=extended)] == ["reverse-conflict"]
    assert not rules(*pair)


@pytest.mark.parametrize(
    "text, message",
    (
        ("reverse = 3", "reverse must be a list"),
        ('reverse = ["P22"]', "'P22'"),
        ('composite = ["P22>P40"]', "'P22>P40'"),
        ('reversed = ["P22>P40"]', "unknown name 'reversed'"),
        ("reverse = [", "malformed"),
    ),
)
def test_a_bad_file_of_rules_is_refused(text, message, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message) as error:
        RelationRules.load(path)
    assert str(path) in str(error.value)


JURISDICTION = edit("member of parliament", "P1001", "Hungary", "Canada", group=1)
CITIZENSHIP = edit("Irwin Cotler", "P27", "Ireland", "Canada", group=1)


@pytest.mark.parametrize(
    "link, source",
    (
        (edit("Irwin Cotler", "P39", "member of parliament"), "of record 3"),
        (edit("Irwin Cotler", "P39", "lawyer", "member of parliament"), "before record 3"),
    ),
)
def test_two_edits_that_disagree_given_a_third_fact_are_named(link, source):
    found_by_record = {finding.rule: finding for finding in findings(JURISDICTION, CITIZENSHIP, link)}
    finding = found_by_record["composite-conflict"]
    assert finding.severity == "warning" and finding.records == (2, 1)
    for part in ("P27: Ireland", "P1001: Hungary", f"(Irwin Cotler, P39: member of parliament) {source}"):
        assert part in finding.message


def test_the_third_fact_may_be_a_question_of_the_case():
    question = Question("Irwin Cotler held the position of", (("MP", "Member of Parliament"),))
    tied = EditRequest(**{**vars(CITIZENSHIP), "probes": (Probe("tied", (question,)),)})
    assert rules(JURISDICTION, tied) == [("composite-conflict", "warning", (2, 1))]
    assert not rules(JURISDICTION, CITIZENSHIP)
    elsewhere = EditRequest(**{**vars(tied), "group": 2})
    assert not rules(JURISDICTION, elsewhere)


def test_edits_that_agree_given_a_third_fact_are_no_conflict():
    agrees = edit("Irwin Cotler", "P27", "hungary")
    link = edit("Irwin Cotler", "P39", "member of parliament")
    assert "composite-conflict" not in [name for name, *_ in rules(JURISDICTION, agrees, link)]


@pytest.mark.parametrize(
    "subject, prompt, word",
    (
        ("Rom", "{}ania is in", "Romania"),
        ("land", "The flag of Fin{} is", "Finland"),
        ("Rom", "In {}_1 the", "Rom_1"),
        ("Straße", "Die {}n von Wien sind", "Straßen"),
    ),
)
def test_a_subject_inside_a_word_is_an_error(subject, prompt, word):
    (finding,) = findings(fact(subject, prompt=prompt))
    assert (finding.rule, finding.severity) == ("subject-in-word", "error") and repr(word) in finding.message


@pytest.mark.parametrize(
    "subject, prompt",
    (
        ("中国", "{}的首都是"),
        ("서울", "{}의 시장은"),
        ("Rome", "{}'s mayor is"),
        ("Rome", "“{}”, the city, is"),
        ("C++", "{}11 was"),  # the subject ends in no letter
        ("日本", "日の国{}は"),
        ("Tokyo", "首都{}は"),
    ),
)
def test_a_subject_beside_marks_particles_or_unspaced_letters_is_none(subject, prompt):
    assert not rules(fact(subject, prompt=prompt))


def test_paraphrases_say_the_subject_and_not_the_prompt():
    request = fact(paraphrase_prompts=["lyon is a twin of", "It is twinned with", "Lyon is  twinned with"])
    assert rules(request) == [
        ("paraphrase-equals-prompt", "warning", (1,)),
        ("paraphrase-without-subject", "note", (1,)),
    ]


def test_neighbors_about_what_is_edited_are_counted():
    other = fact("Oslo")
    request = fact(neighborhood_prompts=["Oslo is twinned with", "Greater Oslo is near", "Nice is", "In Lyon it is"])
    (finding,) = findings(request, other)
    assert (finding.rule, finding.severity, finding.records) == ("neighbor-equals-edited", "warning", (1, 2))
    assert "3 of 4" in finding.message and "record 2" in finding.message
    assert not rules(fact(neighborhood_prompts=["Oslos are", "Lyonnaise is"]), other)  # no words of theirs


def test_neighbors_are_searched_for_subjects_of_any_script():
    assert rules(fact("中国", neighborhood_prompts=["在中国北京是"]))[0][0] == "neighbor-equals-edited"
    assert (
        rules(fact("St. John's", neighborhood_prompts=["The port of St. John's is"]))[0][0] == "neighbor-equals-edited"
    )
    assert not rules(fact("中国", neighborhood_prompts=["在日本"]))


def test_questions_are_one_note():
    assert rules(fact(prompt="Who is the twin of {}?"), fact("Oslo"), fact("Bonn", prompt="{}とは何ですか？")) == [
        ("question-prompt", "note", (1, 3))
    ]


def test_records_that_cannot_be_read_are_errors_by_kind(tmp_path):
    base = {"subject": "Rome", "target_new": "Oslo"}
    records = [
        {**base, "prompt": "Paris is in"},
        {**base, "prompt": "Rome, Rome is in"},
        {**base, "prompt": "rome is in"},
        {**base, "prompt": "{} is in", "target_new": "\ud800"},
        {"subject": "Rome", "prompt": "{} is in"},
        {**base, "prompt": "{} is in"},
    ]
    path = tmp_path / "requests.json"
    path.write_text(json.dumps(records))
    seen = lint_texts(Checked.of(load_requests(path, "skip")))
    assert [(finding.rule, *finding.records) for finding in seen] == [
        ("subject-missing", 1), ("subject-twice", 2), ("subject-case", 3), ("surrogate", 4), ("unreadable", 5),
    ]  # fmt: skip
    assert all(finding.severity == "error" and str(path) not in finding.message for finding in seen)
    assert seen[-1].message.startswith("the record has no 'target_new'")


def test_findings_name_records_of_the_file_not_places_in_the_list():
    requests = as_requests([{"prompt": "no"}, fact(), fact()], "skip")
    assert [finding.records for finding in lint_texts(Checked.of(requests))] == [(1,), (3, 2)]


@pytest.mark.parametrize(
    "reason, record, text",
    (
        ("/a, b/x.jsonl, line 7 (record 5): malformed", 5, "malformed"),
        ("x.jsonl, line 3: malformed", 3, "malformed"),
        ("x.csv, record 2 (line 9) has no 'subject'", 2, "the record has no 'subject'"),
        ("request 4 ('Ebro') has no 'subject', record 9", 4, "the record has no 'subject', record 9"),
    ),
)
def test_a_reason_names_its_record_apart(reason, record, text):
    (finding,) = lint_texts(Checked.of(RequestList([], [], {11: reason})))
    assert finding.records == (record,) and finding.message == text


def test_every_rule_is_named_once_and_said_in_one_line():
    names = [rule.name for rule in TEXT_RULES]
    assert len(set(names)) == len(names)
    assert all(rule.title and "\n" not in rule.title for rule in TEXT_RULES)
