"""Multiple choice: the two forms, their files, and the published prompts."""

from __future__ import annotations

import json

import pytest

from kedit_fast import load_requests
from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.choices import Choice, load_choices, present

TRAIT_ITEM = {
    "personality": "Openness",
    "situation": "A neighbor offers to teach you the accordion.",
    "query": "Should I try it?",
    "paraphrased_situation": "Someone next door would show you the accordion.",
    "paraphrased_query": "Is it for me?",
    "response_high1": "Try it today.",
    "response_high2": "Borrow one and play.",
    "response_low1": "Stay with the radio.",
    "response_low2": "Say no, thank you.",
}
MMLU_ITEM = {"question": "Which gas do plants take up?", "subject": "botany", "choices": ["neon", "argon"], "answer": 1}


def written(tmp_path, name: str, content) -> str:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_trait_item_has_its_options_in_the_published_order(tmp_path):
    (item,) = load_choices(written(tmp_path, "trait.json", [TRAIT_ITEM]))
    assert item.question == "A neighbor offers to teach you the accordion. Should I try it?"
    assert item.paraphrase == "Someone next door would show you the accordion. Is it for me?"
    assert item.options == (
        "Try it today.", "Stay with the radio.", "Borrow one and play.", "Say no, thank you."
    )  # fmt: skip
    assert (item.answer, item.name, item.high) == (None, "Openness", (True, False, True, False))


def test_the_form_of_the_hub_has_situation_and_query_in_one_field(tmp_path):
    record = {name: text for name, text in TRAIT_ITEM.items() if name.startswith("response")}
    record |= {"personality": "Openness", "question": "A neighbor offers lessons. Try?", "idx": 7}
    (item,) = load_choices(written(tmp_path, "trait.jsonl", json.dumps(record)))
    assert (item.question, item.paraphrase, item.id) == ("A neighbor offers lessons. Try?", None, 7)


def test_prompts_and_their_second_order(tmp_path):
    item = Choice("Q?", ("h1", "l1", "h2", "l2"), name="Openness", high=(True, False, True, False), paraphrase="P?")
    first, second = present(item), present(item, reverse=True)
    assert first.prompt.startswith('Situation: "Q?"\n')
    assert first.prompt.endswith("\nOptions:\nA. h1\nB. l1\nC. h2\nD. l2\n\nAnswer: \n")
    assert "A. l1\nB. h1\nC. l2\nD. h2\n" in second.prompt
    assert (first.order, second.order, second.labels) == ((0, 1, 2, 3), (1, 0, 3, 2), ("A", "B", "C", "D"))
    numbered = present(item, "2", paraphrase=True)
    assert numbered.prompt.endswith("Situation: P?\n\nResponse: ") and "\n1 = h1\n2 = l1\n" in numbered.prompt
    assert numbered.labels == ("1", "2", "3", "4")
    assert present(item, "3").prompt == "Question: Q?\nA: h1\nB: l1\nC: h2\nD: l2\nAnswer: "


def test_a_last_option_without_a_partner_stays_in_its_place():
    three = Choice("Q?", ("a", "b", "c"), answer=0)
    assert present(three, reverse=True).order == (1, 0, 2)


@pytest.mark.parametrize("answer", [1, "1", "B", "b", " B "])
def test_an_answer_is_an_index_or_a_letter(tmp_path, answer):
    (item,) = load_choices(written(tmp_path, "items.json", [MMLU_ITEM | {"answer": answer}]))
    assert (item.answer, item.name, item.options) == (1, "botany", ("neon", "argon"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("header.csv", 'question,A,B,C,answer\n"Which, of these, is a river?",Alps,Rhine,Paris,B\n'),
        ("bare.csv", '"Which, of these, is a river?",Alps,Rhine,Paris,B\n'),
        ("list.csv", "question,choices,answer\n\"Which, of these, is a river?\",\"['Alps', 'Rhine', 'Paris']\",1\n"),
        ("list.tsv", 'question\tchoices\tanswer\nWhich, of these, is a river?\t["Alps", "Rhine", "Paris"]\tB\n'),
    ],
)
def test_tables_come_with_and_without_a_header(tmp_path, name, text):
    (item,) = load_choices(written(tmp_path, name, text))
    assert (item.question, item.options) == ("Which, of these, is a river?", ("Alps", "Rhine", "Paris"))
    assert item.answer == 1


def test_records_that_cannot_be_used_are_named_by_number_and_field(tmp_path):
    records = [
        MMLU_ITEM,
        MMLU_ITEM | {"answer": "C"},
        MMLU_ITEM | {"choices": ["one"], "answer": 0},
        MMLU_ITEM | {"choices": ["one", ""], "answer": 0},
        {"question": "?", "choices": ["a", "b"]},
        MMLU_ITEM | {"answer": True},
    ]
    path = written(tmp_path, "items.json", records)
    with pytest.raises(RequestError, match="5 of 6 questions cannot be used") as raised:
        load_choices(path)
    for part in (
        "record 2: answer must be one of 2 choices, 0 to 1 or A to B; got 'C'",
        "record 3: options must be at least two",
        "record 4: choices[1] must be a non-empty text; got ''",
        "record 5 is no multiple-choice question",
        "record 6: answer must be an index from 0 or a letter; got True",
    ):
        assert part in str(raised.value)
    usable = load_choices(path, on_error="skip")
    assert len(usable) == 1 and list(usable.skipped) == [1, 2, 3, 4, 5]


def test_a_missing_response_is_named(tmp_path):
    record = {name: text for name, text in TRAIT_ITEM.items() if name != "response_low2"}
    with pytest.raises(RequestError, match="record 1 has no 'response_low2'"):
        load_choices(written(tmp_path, "trait.json", [record]))


def test_a_file_that_mixes_the_forms_is_refused_at_the_first_record_of_the_second(tmp_path):
    path = written(tmp_path, "both.json", [MMLU_ITEM, MMLU_ITEM, TRAIT_ITEM, MMLU_ITEM])
    with pytest.raises(RequestError, match=r"record 3 has TRAIT's form, .*record 1 has MMLU's"):
        load_choices(path, on_error="skip")


def test_they_are_refused_as_edits(tmp_path):
    for record in (MMLU_ITEM, TRAIT_ITEM):
        with pytest.raises(RequestError, match=r"which are no edits: .*load_choices"):
            load_requests(written(tmp_path, "items.json", [record]))


def test_an_answer_given_twice_is_reported_by_number(tmp_path, caplog):
    path = written(tmp_path, "items.json", [MMLU_ITEM, MMLU_ITEM | {"choices": ["argon", "argon"]}])
    assert len(load_choices(path)) == 2
    assert "1 questions give one answer twice (the first counts): records 2" in caplog.text
