"""SPHERE's attenuation against the published dense formula in float64 (tests/data/golden2.safetensors)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.shaping import attenuate, main_directions


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden2.safetensors")


def factored(delta):
    """Delta [out, d] of rank four as factors."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return LowRankUpdate(u[:, :4] * s[:4], vh[:4].T)


def test_sphere_meets_its_golden_row(golden):
    update = factored(golden["sphere.delta"])
    assert relative_error(update.dense(), golden["sphere.delta"]) < 1e-12
    directions = main_directions(golden["shared.W"], 0.5)
    assert directions.shape[1] == int(golden["sphere.rank"])
    assert relative_error(directions @ directions.T, golden["sphere.projector"]) < 1e-12
    shaped = attenuate(update, directions, 0.5)
    assert relative_error(shaped.dense(), golden["sphere.shaped"]) < 1e-12
    assert shaped.rank == update.rank == 4


@pytest.mark.parametrize("shape", ((8, 40), (40, 8), (9, 9)))
@pytest.mark.parametrize("energy", (0.01, 0.5, 0.97))
def test_both_gram_matrices_give_the_same_directions(shape, energy):
    weight = torch.randn(*shape, dtype=torch.float64) * torch.logspace(0, -1, shape[1], dtype=torch.float64)
    rows = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    rank = int((values.flip(0).cumsum(0) / values.sum() <= energy).sum()) + 1
    directions = main_directions(weight, energy)
    assert directions.shape == (shape[1], rank)
    assert relative_error(directions.T @ directions, torch.eye(rank, dtype=torch.float64)) < 1e-12
    expected = vectors[:, -rank:] @ vectors[:, -rank:].T
    assert relative_error(directions @ directions.T, expected) < 1e-9


def test_strength_decides_how_much_of_the_part_is_left():
    weight = torch.randn(8, 12)
    update = LowRankUpdate(torch.randn(8, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64))
    directions = main_directions(weight)
    before = update.dense()
    for strength in (0.0, 0.3, 1.0):
        after = attenuate(update, directions, strength).dense()
        gap = after @ directions - (1 - strength) * (before @ directions)
        assert float(gap.norm()) < 1e-12 * float(before.norm())
        rest = torch.eye(12, dtype=torch.float64) - directions @ directions.T
        assert relative_error(after @ rest, before @ rest) < 1e-12


def test_bad_numbers_are_named():
    for energy in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="energy must be between 0 and 1"):
            main_directions(torch.eye(3), energy)
    update = LowRankUpdate(torch.zeros(3, 1), torch.zeros(3, 1))
    for strength in (-0.1, 1.1):
        with pytest.raises(InvalidArgumentError, match=r"strength must be in \[0, 1\]"):
            attenuate(update, torch.eye(3, dtype=torch.float64), strength)
