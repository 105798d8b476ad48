"""ConflictEdit and RoundEdit: two edits in order, on records of the published files (MIT)."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from kedit_fast import load_requests
from kedit_fast.errors import RequestError
from kedit_fast.evaluation.catalog.pitfalls import round_of
from kedit_fast.requests.probes import Question

SAMPLE = json.loads((Path(__file__).parents[1] / "data" / "pitfalls_sample.json").read_text(encoding="utf-8"))


@pytest.fixture
def read(tmp_path):
    def load(records, prompts: str | None = None, **options):
        path = tmp_path / "edits.json"
        path.write_text(json.dumps(records))
        return load_requests(path, relation_prompts=None if prompts is None else SAMPLE[prompts], **options)

    return load


def test_the_two_edits_of_a_record_are_a_group_in_order(read):
    requests = read(SAMPLE["reverse"] + SAMPLE["coverage"])
    assert requests.form == "conflictedit"
    assert [(one.id, one.group, one.relation, one.text, one.target_true, one.target_new) for one in requests] == [
        ("1-1", 1, "P800", "The notable work of Francisco de Goya is", "The Second of May 1808",
         "landscape with fighting bulls"),
        ("1-2", 1, "P170", "The creater of landscape with fighting bulls is", "Francisco de Goya", "Richard Strauss"),
        ("2-1", 2, "P185", "The doctoral student of Jacqueline Arnaud is", "Mansour M'henni", "Ludwig Cromme"),
        ("2-2", 2, "P185", "The doctoral student of Jacqueline Arnaud is", "Ludwig Cromme", "Heinz Prüfer"),
    ]  # fmt: skip
    assert not requests[0].paraphrase_prompts


def test_a_reverse_edit_implies_the_first_target_for_the_second_ones_answer(read):
    (implicit,) = read(SAMPLE["reverse"])[0].probes
    assert (implicit.kind, implicit.name) == ("portability", "implicit")
    assert implicit.questions == (
        Question("The notable work of Richard Strauss is", (("landscape with fighting bulls",),)),
    )


def test_relation_prompts_are_paraphrases_and_the_prompts_of_probes(read):
    first, second = read(SAMPLE["composite"][:1], "conflict_prompts")
    assert first.paraphrase_prompts == (
        "The powers of member of the House of Commons of Canada extend over",
        "The rules of member of the House of Commons of Canada are valid in",
        "member of the House of Commons of Canada is responsible for governance in",
    )
    implicit, tied = first.probes
    assert implicit.prompts == ("The jurisdiction of member of the House of Commons of Canada is",
                                *first.paraphrase_prompts)  # fmt: skip
    assert {question.answers for question in implicit.questions} == {(("Republic of Ireland",),)}
    assert (tied.kind, tied.name, len(tied.prompts)) == ("tied", "prerequisite", 4)
    assert tied.questions[0] == Question(
        "Irwin Cotler held the position of", (("member of the House of Commons of Canada",),)
    )
    assert second.probes == ()


def test_a_prompt_that_ends_in_a_space_loses_it(read):
    prompts = read(SAMPLE["coverage"], "conflict_prompts")[0].paraphrase_prompts
    assert prompts[2] == "Jacqueline Arnaud has guided the academic journey of their doctoral student,"


def test_an_edit_that_changes_nothing_is_reported_by_number(read, caplog):
    read([*SAMPLE["composite"], SAMPLE["composite"][0]])
    assert "a true answer already: record 2" in caplog.text
    assert "an edit that an earlier record has, too: record 3" in caplog.text


def test_a_round_trip_writes_the_new_object_and_then_the_old_one_again(read):
    requests = read(SAMPLE["easy"] + SAMPLE["hard"], "round_prompts")
    assert requests.form == "roundedit"
    assert [(one.id, one.group, one.target_true, one.target_new) for one in requests] == [
        ("1-1", 1, "North America", "Château de Chantilly"),
        ("1-2", 1, "Château de Chantilly", "North America"),
        ("2-1", 2, "temple", "bobbin lace making"),
        ("2-2", 2, "bobbin lace making", "temple"),
    ]
    first, second = requests[:2]
    assert first.text == second.text == "Human World Tour is located in"
    assert first.paraphrase_prompts[0] == "Human World Tour can be found in"
    assert [(probe.name, probe.kind, probe.questions[0].answers) for probe in first.probes] == [
        ("true_objects", "locality", (("Asia",),)),
        ("true_objects", "locality", (("Europe",),)),
    ]
    assert first.probes[0].prompts == (first.text, *first.paraphrase_prompts) and not second.probes


def test_all_true_objects_are_brought_back_where_that_is_asked_for(tmp_path):
    path = tmp_path / "easy.json"
    path.write_text(json.dumps(SAMPLE["easy"][:1]))
    requests = load_requests(path, reading="all")
    assert [(one.group, one.target_true, one.target_new) for one in requests] == [
        (1, "North America", "Château de Chantilly"),
        (1, "Château de Chantilly", "North America"),
        (1, "Château de Chantilly", "Asia"),
        (1, "Château de Chantilly", "Europe"),
    ]
    assert len(requests[0].probes) == 2 and round_of(requests) == "all"
    assert [one.target_new for one in load_requests(path, reading="reverse")] == [
        "Château de Chantilly",
        "North America",
    ]
    with pytest.raises(RequestError, match="reading = 'some': choose one of 'reverse'"):
        load_requests(path, reading="some")


def test_true_objects_without_the_old_one_are_reported(read, caplog):
    record = SAMPLE["easy"][0] | {"true_objects": SAMPLE["easy"][0]["true_objects"][1:]}
    read([SAMPLE["hard"][0], record])
    assert "true objects without the old one, or with the new one: record 2" in caplog.text


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("edits", 1, "new_object", "label"), "", "record 2: edits[1].new_object.label must be a non-"),
        (("edits", 0, "relation", "prompt"), "The work", "record 2: "),
        (("edits", 0, "subject"), {"id": "Q1"}, "record 2 has no 'edits[0].subject.label'"),
        (("type",), "sideways", "record 2: type must be reverse, composite or coverage; got 'sideways'"),
        (("edits",), SAMPLE["reverse"][0]["edits"][:1], "record 2: edits must hold two edits; it holds 1"),
    ],
)  # fmt: skip
def test_malformed_fields_are_named_by_record(read, path, value, message):
    record = copy.deepcopy(SAMPLE["reverse"][0])
    part = record
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(RequestError) as raised:
        read([SAMPLE["reverse"][0], record])
    assert message in str(raised.value)


def test_a_file_of_both_sets_is_refused(read):
    with pytest.raises(RequestError, match=r"record 2 has the form 'roundedit'.*record 1 the form 'conflictedit'"):
        read([*SAMPLE["reverse"], *SAMPLE["easy"]])


def test_relation_prompts_are_checked(tmp_path, read):
    with pytest.raises(RequestError, match=r"relation prompts of 'P185' must contain {} once; got 'no"):
        path = tmp_path / "one.json"
        path.write_text(json.dumps(SAMPLE["coverage"]))
        load_requests(path, relation_prompts={"P185": ["no subject here"]})
    with pytest.raises(RequestError, match="relation prompts"):
        read(SAMPLE["coverage"], "easy")
    with pytest.raises(RequestError, match=r"record 1: .*relation\.id is 'P185', of which relation_prompts has none"):
        read(SAMPLE["coverage"], "round_prompts")
