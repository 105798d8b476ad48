"""Phrasings from templates of the same relation."""

from __future__ import annotations

import json

import pytest

from kedit_fast import EditRequest
from kedit_fast.errors import RequestError
from kedit_fast.requests.paraphrase import add_paraphrases
from kedit_fast.requests.relations import load_templates

FATHER = ["The father of {} is", "{} was fathered by", "{}'s dad is", "{}'s dad is", "The father of {}  is", "Who?"]
TEMPLATES = {"P22": FATHER, "P40": ["The child of {} is", "One child of {} is"]}


def phrasings(request, **options):
    return add_paraphrases([request], TEMPLATES, **options).requests[0].paraphrase_prompts


def test_phrasings_hold_the_subject_and_are_not_the_prompt():
    request = EditRequest("The Father of {} is", "Ada", "Leo", relation="P22")
    assert set(phrasings(request, number=9)) == {"Ada was fathered by", "Ada's dad is"}


def test_phrasings_that_are_there_are_not_repeated_and_stay_first():
    request = EditRequest("The father of {} is", "Ada", "Leo", paraphrase_prompts=["ada's  dad is"])
    assert phrasings(request, number=1) == ("ada's  dad is", "Ada was fathered by")


def test_a_relation_is_known_by_its_templates_too():
    request = EditRequest("one child of {} is", "Ada", "Leo")
    assert phrasings(request) == ("The child of Ada is",)
    result = add_paraphrases([request, EditRequest("{} likes", "Ada", "Leo")], TEMPLATES)
    assert result.added == 1 and "none of the templates" in result.lacking[1] and "'P40'" in result.lacking[0]
    assert result.requests[1].paraphrase_prompts == ()


def test_draws_depend_on_the_seed_and_the_request_alone():
    templates = {"P1": [f"{{}} is number {i} of" for i in range(40)]}
    requests = [EditRequest("{} is", f"Ada {i}", "x", relation="P1") for i in range(4)]
    result = add_paraphrases(requests, templates, number=3)
    assert add_paraphrases(requests, templates, number=3) == result
    alone = add_paraphrases(requests[2:3], templates, number=3)
    assert alone.requests[0] == result.requests[2]
    assert add_paraphrases(requests, templates, number=3, seed=1).requests != result.requests
    assert len({request.paraphrase_prompts[0][6:] for request in result.requests}) > 1
    assert result.added == 12 and not result.lacking


def test_no_phrasing_at_all_is_an_error():
    with pytest.raises(RequestError, match=r"no request got a phrasing; the first: its relation is 'P9'.*'P22', 'P40'"):
        add_paraphrases([EditRequest("{} is", "Ada", "x", relation="P9")], TEMPLATES)
    with pytest.raises(RequestError, match="number = 0"):
        add_paraphrases([], TEMPLATES, number=0)


def test_templates_come_from_both_kinds_of_files(tmp_path):
    lre, pitfalls = tmp_path / "lre.json", tmp_path / "pitfalls.json"
    lre.write_text(
        json.dumps(
            {"name": "capital", "prompt_templates": ["The capital of {} is"], "prompt_templates_zs": ["What? {} has"]}
        )
    )
    pitfalls.write_text(json.dumps({"P22": [*FATHER, "{} and {}", "{}"], "capital": ["{}'s capital is "]}))
    assert load_templates([lre, pitfalls]) == {
        "capital": ("The capital of {} is", "What? {} has", "{}'s capital is"),
        "P22": ("The father of {} is", "{} was fathered by", "{}'s dad is"),
    }


@pytest.mark.parametrize(
    "content", ("[]", "{}", '{"name": "x", "prompt_templates": 3}', '{"P1": "{} is"}', '{"P1": ["no slot"]}', "{")
)
def test_a_file_without_templates_is_refused_by_name(content, tmp_path):
    path = tmp_path / "relations.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"relations\.json"):
        load_templates([path])
