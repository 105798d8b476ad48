"""The comparison of frontiers: interpolation at equal paraphrase, what is measured, and the picture."""

from __future__ import annotations

import pytest

from benchmarks.frontier import LAMBDAS, LEVELS, POWERS, QUALITIES, SOLVES, at, compared, frontier, other_facts
from benchmarks.plots import frontier_figure
from kedit_fast import demo


def rows_of(edits, solve, curve):
    return [
        {**dict.fromkeys(QUALITIES, 0.5), "edits": edits, "solve": solve, "lambda": weight, "paraphrase": p, "kl": kl}
        for weight, p, kl in curve
    ]


ABOUT = {"machine": "none", "versions": {"torch": "2"}, "commit": "0"}
ROWS = [
    {"edits": 100, "solve": "unedited", "lambda": None, **dict.fromkeys(QUALITIES, 0.0)},
    *rows_of(100, "output metric", [(100.0, 0.92, 0.4), (10.0, 0.96, 0.8), (1000.0, 0.72, 0.1)]),
    *rows_of(100, "MEMIT", [(10.0, 0.85, 2.0), (100.0, 0.95, 1.0), (1000.0, 0.75, 0.2)]),
]


def test_solves_are_compared_on_the_line_between_two_lambdas():
    plain = frontier(ROWS, "MEMIT", 100)
    assert [row["lambda"] for row in plain] == [10.0, 100.0, 1000.0]
    point = at(plain, 0.85)  # reached twice, at lambda 10 with a KL of 2
    assert point is not None and point["kl"] == pytest.approx(0.6) and point["lambda"] == pytest.approx(100 * 10**0.5)
    assert at(plain, 0.96) is None
    table = {level: (a["kl"], b["kl"]) for _, level, a, b in compared(ROWS)}
    assert list(table) == [0.9, 0.85, 0.8] and table[0.8] == pytest.approx((0.4, 0.22))


def test_the_coarse_lambdas_come_first_and_none_is_left_out():
    assert len(set(LAMBDAS)) == len(POWERS) and LAMBDAS[0] == min(LAMBDAS)
    assert list(LAMBDAS[:6]) == sorted(LAMBDAS[:6]) and len(SOLVES) == 2 and set(LEVELS) == {100, 500}


def test_other_facts_are_of_the_edited_subjects_and_true():
    requests = demo.requests()[:20]
    facts = other_facts(requests)
    assert {fact.subject for fact in facts} <= {request.subject for request in requests} and len(facts) >= 20
    assert not {(fact.subject, fact.prompt) for fact in facts} & {(r.subject, r.prompt) for r in requests}


def test_the_picture_has_both_curves_of_each_panel():
    figure = frontier_figure({"rows": ROWS, "about": ABOUT})
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["output metric", "MEMIT"]
        assert axes.get_title() == "100 edits" and len(axes.lines) == 2
