"""The gate of the benchmark of tracing: our traces are those of the published loop, and a wrong one is noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import make_model

from benchmarks import locating
from kedit_fast.locating.traced_prompts import TracedPrompt

PROMPTS = [TracedPrompt((5, 90, 17, 33, 250), (1, 3), None, "a"), TracedPrompt((44, 12, 300), (0, 1), None, "b")]


@pytest.fixture(scope="module")
def tiny():
    return locating.Subject("tiny", make_model("llama", layers=2), PROMPTS, 0.5, 1.0, 1.0)


def test_traces_are_those_of_the_published_loop(tiny):
    assert locating.error_of(tiny, 0) < locating.TRACING_LIMIT


def test_a_wrong_trace_has_no_ratio(tiny, monkeypatch):
    right = locating.ours
    monkeypatch.setattr(
        locating, "ours", lambda on: [replace(one, probabilities=one.probabilities.flip(1)) for one in right(on)]
    )
    assert locating.tracing_row(tiny, 0, 2)["ratio"] is None


def test_cells_are_spread_and_others_in_each_run(tiny):
    every = locating.cells_of(tiny, 0)
    assert sum(len(set(some)) for some in every.values()) == (5 + 3) * 2 * 3
    some, other = (locating.cells_of(tiny, 3, run) for run in (0, 1))
    assert all(len(set(cells)) == 3 and set(cells) <= set(every[key]) for key, cells in some.items())
    assert some != other
