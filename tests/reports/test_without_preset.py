"""The demo model without its preset: what an edit without numbers chooses is nearly as good as what was tuned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_fast import Editor, collect_statistics, demo
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.evaluation.metrics import shares
from kedit_fast.methods import presets
from kedit_fast.methods.windows import tried_layers
from kedit_fast.reports.suggest import suggest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quality_demo.json"
POINTS = {"efficacy": 5, "paraphrase": 5, "neighborhood": 3}
FIRST, EDITS = 100, 100
"""The requests that `benchmarks.quality` measures the preset on: those after the ones the preset was chosen on."""
TRIED = 12
"""Requests that the trials write; an edit takes up to 48, for which this test has no time."""


@pytest.fixture(scope="module")
def unknown():
    """The demo model, of which no preset knows, with its statistics and a store of values."""
    read = presets.load_presets

    def without_demo(name):
        table = read(name)
        return {**table, "preset": [entry for entry in table["preset"] if entry["name"] != "demo"]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "load_presets", without_demo)
        model, tokenizer = demo.load()
        moments = collect_statistics(model, tokenizer, demo.corpus(600), tried_layers(6), progress=False)
        yield model, tokenizer, moments, ValueFile(None)


@pytest.mark.skipif(not RESULTS.exists(), reason="no source tree")
@pytest.mark.parametrize("method", ("memit", "alphaedit"))
def test_no_numbers_are_nearly_as_good_as_the_preset(unknown, method):
    model, tokenizer, moments, store = unknown
    tuned = next(
        row
        for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
        if (row["method"], row["scenario"]) == (method, "100")
    )
    requests = demo.requests(FIRST + EDITS)[FIRST:]
    choice = suggest(model, tokenizer, requests, method, statistics=moments, effort="short", most=TRIED, expected=EDITS)
    editor = Editor(model, tokenizer, method, statistics=moments, hparams=choice.best.hparams, values=store)
    assert editor.origin.startswith("guess")
    editor.edit(requests)
    reached = shares(model, tokenizer, requests).as_dict()
    editor.restore()
    below = {name: 100 * (tuned[name] - reached[name]) for name in POINTS}
    assert all(below[name] <= most for name, most in POINTS.items()), (below, choice.best.hparams, reached)
