"""StableEdit's normalizer against the published turns in float64 (tests/data/golden2.safetensors)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file

from kedit_fast.errors import SolveError, StatisticsError
from kedit_fast.solver.normalizer import Normalizer, Scatter, WhitenedNormalizer, gradient_update


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden2.safetensors")


def test_stableedit_meets_its_golden_turns(golden):
    normalizer = WhitenedNormalizer.empty(12 + 8, outputs=8)
    for turn in range(3):
        keys, gradients = golden[f"stableedit.H.{turn}"], golden[f"stableedit.grad.{turn}"]
        normalizer = normalizer.updated(torch.cat([keys, gradients], 1))
        whitening = normalizer.whitening()
        both = normalizer.normalized(torch.cat([keys, gradients], 1), whitening)
        values = -1e-2 * both[:, :12].square().sum(1, keepdim=True) * both[:, 12:]
        assert relative_error(values, golden[f"stableedit.V.{turn}"]) < 1e-12
        update = gradient_update(keys, gradients, normalizer, 1e-2, 10.0, whitening)
        assert relative_error(update.dense(), golden[f"stableedit.delta.{turn}"]) < 1e-12
        assert update.rank == len(keys)


def test_few_rows_are_divided_by_their_deviations_and_many_have_no_correlations():
    mixing = torch.randn(8, 8, dtype=torch.float64)
    rows = torch.cat([torch.randn(400, 5, dtype=torch.float64), torch.randn(400, 8, dtype=torch.float64) @ mixing], 1)
    few = WhitenedNormalizer.empty(13, outputs=8).updated(rows[:9])
    assert few.whitening() is None  # nine rows for eight outputs
    expected = (rows[:9] - rows[:9].mean(0)) / (rows[:9].var(0, correction=0) * 9 / 8).sqrt()
    assert relative_error(few.normalized(rows[:9]), expected) < 1e-12
    many = few.updated(rows[9:])
    assert relative_error(many.normalized(rows, many.whitening(1e-12))[:, 5:].T.cov(), torch.eye(8)) < 0.05
    raised = many.whitening(1e6)  # every eigenvalue is below the floor
    assert relative_error(raised, 1e-3 * torch.eye(8, dtype=torch.float64)) < 1e-9


def test_turns_do_not_change_what_the_normalizer_knows():
    rows = torch.randn(50, 13, dtype=torch.float64) * torch.logspace(0, -3, 13, dtype=torch.float64)
    once = WhitenedNormalizer.empty(13, outputs=8).updated(rows)
    parts = WhitenedNormalizer.empty(13, outputs=8)
    for part in rows.split([2, 1, 20, 27]):
        parts = parts.updated(part)
    assert parts.count == once.count == 50 == once.scatter.count
    for name in ("mean", "squares"):
        assert relative_error(getattr(parts, name), getattr(once, name)) < 1e-12
    assert relative_error(parts.scatter.products, once.scatter.products) < 1e-12
    assert relative_error(once.scatter.products / 49, rows[:, 5:].T.cov()) < 1e-12
    assert relative_error(once.squares, rows.var(0) * 49) < 1e-12
    assert not torch.allclose(Normalizer.empty(13).updated(rows).squares, once.squares)  # n times the variance of n - 1


def test_a_stored_normalizer_is_the_same_and_a_damaged_one_is_refused():
    rows = torch.randn(50, 13, dtype=torch.float64)
    known = WhitenedNormalizer.empty(13, outputs=8).updated(rows)
    tensors = known.tensors()
    back = WhitenedNormalizer.from_tensors(tensors, 13, "FILE", 8)
    assert torch.equal(back.updated(rows).scatter.products, known.updated(rows).scatter.products)
    assert known.nbytes == 8 * (2 * 13 + 8 * 8) and back.to(torch.device("cpu")).nbytes == known.nbytes
    for change, message in (
        ({"scatter": None}, "a part of the normalizer is missing"),
        ({"scatter": torch.eye(7, dtype=torch.float64)}, r"\[7, 7\], not \[8, 8\]"),
        ({"scatter": torch.full((8, 8), float("nan"), dtype=torch.float64)}, "not finite"),
        ({"mean": torch.zeros(12, dtype=torch.float64)}, r"\[12\], not \[13\]"),
    ):
        with pytest.raises(StatisticsError, match=f"FILE is damaged: .*{message}"):
            WhitenedNormalizer.from_tensors({**tensors, **change}, 13, "FILE", 8)
    with pytest.raises(SolveError, match="more than one token"):
        WhitenedNormalizer.empty(13, outputs=8).updated(rows[:1])
    assert known.updated(rows[:0]) is known and Scatter.empty(3).updated(torch.zeros(0, 3)).count == 0
