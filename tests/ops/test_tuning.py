"""KEDIT_FAST_AUTOTUNE: what is timed, on what terms, and what a captured graph gets. The device is made up."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

triton = pytest.importorskip("triton")
from kedit_fast.kernels.triton import launch  # noqa: E402
from kedit_fast.kernels.triton.configs import CANDIDATES, GRADIENT, LOGITS, RANK_K, SYMMETRIC, Config, lookup  # noqa: E402

DEVICE = torch.device("cuda", 0)
KINDS = ((SYMMETRIC, "native64"), (SYMMETRIC, "narrow"), (RANK_K, "dot"), (RANK_K, "fma"), (LOGITS, "native"),
         (GRADIENT, "split"))  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """A device whose clock says what a test wants: `milliseconds` of a configuration, and what ran inside the clock."""

    class Gpu:
        capturing = False
        planned: list[Config] = []  # noqa: RUF012
        timed: list[Config] = []  # noqa: RUF012

        def milliseconds(self, config):
            return 2.0 if config == self.best else 3.0

        def trial(self, config):
            assert not self.in_clock, "a plan and its scratch memory were made inside the clock"
            self.planned.append(config)
            return [config]

    found = Gpu()
    found.planned, found.timed, found.in_clock, found.best = [], [], False, None

    def do_bench(call, return_mode):
        found.in_clock = True
        call()
        found.in_clock = False
        return found.milliseconds(found.timed[-1])

    monkeypatch.setenv("KEDIT_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "run", lambda launches, device: found.timed.append(launches[0]))
    monkeypatch.setattr(launch, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    return found


@pytest.mark.parametrize(("op", "kind"), KINDS)
def test_a_captured_graph_runs_the_tile_that_its_warm_up_tuned(gpu, op, kind):
    row = lookup(op, kind, "sm_90")
    gpu.best = next(config for config in reversed(launch.candidates(op, kind)) if config != row)
    assert launch.choose(op, kind, DEVICE, gpu.trial, "size") == gpu.best
    gpu.capturing = True
    timed = len(gpu.timed)
    assert launch.choose(op, kind, DEVICE, gpu.trial, "size") == gpu.best and len(gpu.timed) == timed


def test_a_capture_of_what_was_never_tuned_gets_the_tables_tile_and_says_so(gpu, caplog):
    gpu.capturing = True
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        assert launch.choose(LOGITS, "native", DEVICE, gpu.trial, "s") == lookup(LOGITS, "native", "sm_90")
    assert "not tuned before this graph's capture" in caplog.text and not gpu.timed and not launch.tuned()


def test_without_the_switch_nothing_is_timed_and_nothing_tuned_is_used(gpu, monkeypatch):
    gpu.best = CANDIDATES[LOGITS][0]
    launch.choose(LOGITS, "native", DEVICE, gpu.trial, "s")
    monkeypatch.delenv("KEDIT_FAST_AUTOTUNE")
    assert launch.choose(LOGITS, "native", DEVICE, gpu.trial, "s") == lookup(LOGITS, "native", "sm_90")


@pytest.mark.parametrize(("op", "kind"), KINDS)
def test_the_tables_row_is_timed_once_and_on_the_terms_of_the_candidates(gpu, op, kind):
    """Plans and scratch memory are made outside the clock for it too (`Gpu.trial` asserts it)."""
    row = lookup(op, kind, "sm_90")
    assert launch.choose(op, kind, DEVICE, gpu.trial, "s") == row  # all alike: the table's stays
    assert gpu.planned[0] == row and sorted(map(repr, gpu.planned)) == sorted(
        map(repr, {row, *launch.candidates(op, kind)})
    )
    assert gpu.timed == gpu.planned
    (found,) = launch.tuned().values()
    assert found.milliseconds == found.table_milliseconds == 3.0


def test_a_candidate_that_does_not_fit_is_passed_over_and_a_row_that_does_not_is_an_error(gpu):
    row, bad = lookup(LOGITS, "native", "sm_90"), CANDIDATES[LOGITS][0]
    broken = bad

    def trial(config):
        if config == broken:
            raise torch.OutOfMemoryError("no room")
        return gpu.trial(config)

    assert launch.choose(LOGITS, "native", DEVICE, trial, "s") == row and bad not in gpu.timed
    broken = row
    with pytest.raises(torch.OutOfMemoryError):
        launch.choose(LOGITS, "native", DEVICE, trial, "another")
