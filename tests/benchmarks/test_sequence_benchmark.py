"""The benchmark of endless sequences, in small: its gate can fail, its rows say what was measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import sequence
from benchmarks.plots import endless_curves
from kedit_fast.solver.key_memory import KeyMemory


def test_the_gate_passes_and_sees_a_wrong_memory(monkeypatch):
    assert sequence.gate(d=72, edits=60, window=5) < 1e-12
    right = KeyMemory.commit

    def forgetful(self, appended):
        if self.batches != 17:
            right(self, appended)

    monkeypatch.setattr(KeyMemory, "commit", forgetful)
    assert sequence.gate(d=72, edits=60, window=5) > 1e-9


def test_rows_and_picture_of_a_short_sequence(tmp_path):
    row, periods, parts = sequence.sequence(d=72, edits=160, window=4, samples=2)
    assert row["error"] < 1e-12 and row["bytes"] < row["bound"] and row["baseline_samples"] == 2
    assert row["baseline_error"] < 1e-3 and row["folds"] == len(periods) > 3
    assert [period["first"] for period in periods[1:]] == [period["last"] + 1 for period in periods[:-1]]
    assert sum(parts.values()) == pytest.approx(row["median_s"])
    flat = sequence.flatness(periods, 40)
    assert flat["bytes"][0] == flat["bytes"][1] == row["bytes"] and flat["largest_deviation"] >= 0
    assert sequence.flatness(periods[:2], 0) == {}
    about = {"machine": "a machine", "versions": {"torch": torch.__version__}, "commit": "a commit"}
    paths = endless_curves({"rows": [row], "periods": periods, "about": about}, tmp_path / "sequence")
    assert paths[0].read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_last_update_shows_in_its_equation():
    space = sequence.null_space(64)
    memory = KeyMemory(space, window=3)
    for key in sequence.drawn(64, 0)[:50]:
        right = sequence.edit(memory, key, torch.ones(1, 1))
    assert sequence.equation_error(space, right, 50) < 1e-12
    assert sequence.equation_error(space, right, 49) > 1e-3
