"""Unrelated texts beside edits: the bundled sentences, and what is refused."""

from __future__ import annotations

import pytest

from kedit_fast import demo
from kedit_fast.errors import RequestError
from kedit_fast.requests.irrelevant import SENTENCES, irrelevant_texts, require_unrelated
from kedit_fast.requests.request import EditRequest


def test_the_bundled_sentences_are_many_and_name_nobody_of_the_demo_world():
    assert len(SENTENCES) == len(set(SENTENCES)) == 32
    require_unrelated(irrelevant_texts(None), demo.requests())


def test_a_text_about_an_edited_subject_is_refused():
    request = EditRequest("{} plays the", "Miles Davis", "violin")
    with pytest.raises(RequestError, match=r"'A song of MILES  davis\.' names 'Miles Davis'"):
        require_unrelated(["Rain fell.", "A song of MILES  davis."], [request])
    require_unrelated(["A song of Miles Davison."], [request])
    with pytest.raises(RequestError, match="names 'the tower is'"):
        require_unrelated(["We know the tower is old."], [EditRequest("the tower is", None, "new")])


@pytest.mark.parametrize(
    ("texts", "said"), [("one text", "not one text"), ([], "no irrelevant"), (["a", " "], "texts 1")]
)
def test_texts_that_cannot_be_used_are_refused(texts, said):
    with pytest.raises(RequestError, match=said):
        irrelevant_texts(texts)
