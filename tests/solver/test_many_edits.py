"""Batches of thousands of edits: what is computed in parts is what it is as a whole; flops are those of the docs."""

from __future__ import annotations

import pytest
import torch

from kedit_fast.solver import least_squares, low_rank
from kedit_fast.solver.least_squares import PRIMAL_ABOVE, collisions, system_flops
from kedit_fast.solver.low_rank import LowRankUpdate


@pytest.mark.parametrize("at_once", (1, 3, 7, 8, 100))
def test_keys_that_are_alike_are_found_in_whichever_parts_they_are(at_once, monkeypatch):
    torch.manual_seed(0)
    keys = torch.randn(16, 8, dtype=torch.float64)
    for copy, of in ((3, 0), (7, 0), (6, 5)):
        keys[:, copy] = 2 * keys[:, of]
    monkeypatch.setattr(least_squares, "COLUMNS_AT_ONCE", at_once)
    assert collisions(keys) == [(0, 3), (0, 7), (3, 7), (5, 6)]
    assert collisions(keys[:, :0]) == [] and collisions(keys[:, 1:3]) == []


@pytest.mark.parametrize("rank", (0, 1, 4, 5, 50))
@pytest.mark.parametrize("at_once", (1, 3, 1024))
def test_the_norm_of_an_update_is_that_of_its_matrix(rank, at_once, monkeypatch):
    torch.manual_seed(rank)
    monkeypatch.setattr(low_rank, "_ROWS", at_once)
    update = LowRankUpdate(torch.randn(7, rank), torch.randn(11, rank))
    dense = update.left.double() @ update.right.double().T
    assert update.norm() == pytest.approx(float(dense.norm()), rel=1e-12)


def test_a_long_update_takes_no_square_of_its_rank(monkeypatch):
    """Its matrix is small, and the products of its columns are not."""
    update = LowRankUpdate(torch.ones(2, 100_000), torch.ones(3, 100_000))  # their products would take 80 GB each
    assert update.norm() == pytest.approx(6**0.5 * 1e5)


def test_flops_of_a_system_change_form_where_the_solve_does():
    d = 100
    below = int(PRIMAL_ABOVE * d)
    assert system_flops(d, below) == system_flops(d, below, form="dual") == d * 67**2 + 67**3 / 3 + 2 * 67 * 67 * d
    above = system_flops(d, below, 1)
    assert above == system_flops(d, below, 1, "primal") == d * d * 68 + d**3 / 3 + 2 * d * d * 67
    # As many edits as inputs: both forms count the same; far above, the dual one would cost more.
    assert system_flops(d, d, form="dual") == pytest.approx(system_flops(d, d))
    assert system_flops(d, 10 * d, form="dual") > 10 * system_flops(d, 10 * d)
