"""Scores of texts, against published code's numbers and against definitions worked out by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from kedit_fast import demo
from kedit_fast.evaluation import words

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_texts.json").read_text(encoding="utf-8"))["requests"]
WRITTEN = [(request, request[state]) for request in GOLDEN for state in ("pre", "post")]
needs_nltk = pytest.mark.skipif(not words.HAS_NLTK, reason="nltk is not installed")
needs_sklearn = pytest.mark.skipif(not words.HAS_SKLEARN, reason="scikit-learn is not installed")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Don't stop, O'Neill!", ["Don't", "stop", ",", "O'Neill", "!"]),
        ("a vice-president's 3.5 -- 'quoted'", ["a", "vice-president's", "3", ".", "5", "-", "-", "'", "quoted", "'"]),
        ("snake_case $5", ["snake_case", "$", "5"]),
        ("l\u2019e\u0301te\u0301 fini", ["l\u2019\u00e9t\u00e9", "fini"]),
        ("\u5317\u4eac in Beijing", ["\u5317", "\u4eac", "in", "Beijing"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940.", ["\u0939\u093f\u0928\u094d\u0926\u0940", "."]),
        ("\u0e17\u0e35\u0e48", ["\u0e17\u0e35\u0e48"]),
        ("\U0001f600 ok\u00a0now", ["\U0001f600", "ok", "now"]),
        ("", []),
    ],
)
def test_words_are_the_documented_ones(text, expected):
    assert words.words(text) == expected


def test_plain_texts_have_the_same_words_by_either_way():
    """Texts of ASCII are split by one expression, others character by character."""
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("ab1_ '-.,\n") for _ in range(30))
        assert words.words(f"{text} \u00e9") == [*words.words(text), "\u00e9"]


def test_entropy_of_ngrams_by_hand():
    assert words.ngram_entropy(list("ababa")) == pytest.approx((2 / 3 * 1 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2)
    assert words.ngram_entropy(["a", "b", "c", "d"]) == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * 1) / 2)
    assert words.ngram_entropy(["a"]) == words.ngram_entropy([]) == 0.0
    assert math.copysign(1, words.ngram_entropy([])) == 1


@needs_nltk
def test_entropy_of_nltk_words_is_the_published_one():
    for _, written in WRITTEN:
        entropies = [words.ngram_entropy(words.nltk_words(text)) for text in written["texts"]]
        assert sum(entropies) / len(entropies) == pytest.approx(written["ngram_entropy"], abs=1e-9)


def test_tf_idf_is_the_published_one():
    weights = words.TfIdf.fit(demo.corpus(200))
    assert len(weights.idf) == 978 and math.fsum(weights.idf.values()) == pytest.approx(4913.477555527044)
    for request, written in WRITTEN:
        found = weights.similarity(" ".join(written["texts"]), " ".join(request["consistency_texts"]))
        assert found == pytest.approx(written["reference_score"], abs=1e-9)
    assert weights.similarity("zzz", "the river") is None


@needs_sklearn
def test_tf_idf_is_that_of_scikit_learn():
    corpus = ["Caf\u00e9 a caf\u00e9 x", "The CAFE_1 and the river", "l'\u00e9t\u00e9 12 1"]
    ours, theirs = words.TfIdf.fit(corpus), words.PublishedTfIdf(corpus)
    pairs = [(a, b) for a in corpus for b in ("the caf\u00e9", "\u00e9t\u00e9 12 and and", "nothing")]
    for a, b in pairs:
        assert ours.similarity(a, b) == pytest.approx(theirs.similarity(a, b), abs=1e-12)


def test_exact_match_is_the_published_one():
    for request, written in WRITTEN:
        matches = words.normalized(written["answer"]) == words.normalized(request["target_new"])
        assert float(matches) == written["exact_match"]
    assert words.normalized(" The U.S.,  an apple a day\n") == "us apple day"


@pytest.mark.parametrize(
    "text, answers, others, expected",
    [
        ("It is made of granite.", ["granite"], ["cork"], True),
        ("granite, and cork", ["granite"], ["cork"], False),
        ("granites", ["granite"], [], False),
        ("in the New York area", ["New York"], ["York"], True),
        ("in New York", ["York"], ["New York"], False),
        ("in York", ["York"], ["New York"], True),
        ("York, once called New York", ["York"], ["New York"], False),
        ("by Big Apple", ["New York", "the Big Apple"], [], True),
        ("the a", ["the"], [], False),
    ],
)
def test_contains(text, answers, others, expected):
    assert words.contains(text, answers, others) is expected


def test_occurrences_do_not_overlap():
    assert words.occurrences("ha ha ha ha", ["ha ha"]) == 2
    assert words.occurrences("Rome, the city of Rome; Roma.", ["Rome", "Roma"]) == 3
    assert words.occurrences("New York, York", ["York", "New York"]) == 2


def test_f1_counts_words_as_often_as_both_have_them():
    assert words.f1("the big red apple", "a red apple tree") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert words.f1("apple apple", "apple") == pytest.approx(2 / 3)
    assert words.f1("pear", "apple") == 0.0 and words.f1("", "apple") == 0.0 and words.f1("a", "the") == 1.0


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        (" granite. For dinner", "granite", True),
        (" granite", "granite", True),
        (" granite\nQ: next", "granite", True),
        (" Granite.", "granite", False),
        (" made of granite.", "granite", False),
        (" Paris Saint-Germain.", "Paris", False),
        (" Washington, D.C. It", "Washington, D.C.", True),
        (" U.S.A. and", "U.S.", False),
        (" the U.S.", "the U.S.", True),
        (' Rome." he said', "Rome", True),
    ],
)
def test_an_answer_is_said_first_and_ends(text, answer, expected):
    assert words.begins_with(text, answer) is expected


def test_rouge_l_is_the_longest_common_subsequence():
    overlap = words.rouge_l("The cat sat on a mat.", "the cat was on the mat")
    assert overlap is not None
    assert (overlap.precision, overlap.recall) == pytest.approx((4 / 6, 4 / 6)) and overlap.f1 == pytest.approx(4 / 6)
    assert words.rouge_l("x", "...") is None
    nothing = words.rouge_l("", "a b")
    assert nothing is not None and nothing.f1 == nothing.precision == nothing.recall == 0.0
    draw = random.Random(1)
    for _ in range(50):
        a, b = ([draw.choice("pqrs") for _ in range(draw.randrange(1, 12))] for _ in range(2))
        found = words.rouge_l(" ".join(a), " ".join(b))
        assert found is not None and found.recall == pytest.approx(_longest(a, b) / len(b))


def _longest(a, b):
    """By the usual table."""
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]
