"""Columns whose output should stay as it is: residuals of 0 in one batch's system."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file

from kedit_fast.errors import InvalidArgumentError, SolveError
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.least_squares import solve_update
from kedit_fast.solver.preconditioner import Covariance, Identity, NullSpace

LIMIT = 1e-9
FORMS = ("dual", "primal", "auto")


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden2.safetensors")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def null_space(golden) -> NullSpace:
    values = torch.linalg.eigvalsh(golden["shared.C"])
    return NullSpace.from_covariance(golden["shared.C"], float(values[5:7].mean()), l2=0.8)


@pytest.mark.parametrize("form", FORMS)
def test_anyedit_meets_its_golden_rows(golden, form):
    keys, others, residuals = (golden[f"anyedit.{name}"] for name in ("K", "K_p", "R"))
    covariance, space = Covariance.from_moment(golden["shared.C"], weight=1.7), null_space(golden)
    assert relative_error(space.project(torch.eye(12)), golden["anyedit.P"]) < LIMIT
    for preconditioner, row in ((covariance, "delta"), (space, "delta_alpha")):
        expected = golden[f"anyedit.{row}"]
        update = solve_update(keys, residuals, preconditioner, unmoved=others, form=form)
        assert update.rank == 5 and relative_error(update.dense(), expected) < LIMIT
        update, appended = KeyMemory(preconditioner, form).solve(keys, residuals, unmoved=others)
        assert update.rank == 5 and relative_error(update.dense(), expected) < LIMIT
        assert appended.raw.shape == (5, 12)


@pytest.mark.parametrize("count", (3, 7, 30))
@pytest.mark.parametrize("form", FORMS)
def test_earlier_keys_stay_in_the_system_and_unmoved_columns_do_not(form, count):
    """Six batches, over a fold of the automatic form; those with unmoved columns are followed by some without."""
    d, u = 20, 6
    basis = draw(d, 3 * d)
    system = basis @ basis.T / d
    memory, plain = (KeyMemory(Covariance.from_moment(system), form) for _ in range(2))
    for number in range(6):
        keys, residuals, others = (
            draw(d, u, seed=number),
            draw(5, u, seed=10 + number),
            draw(d, count, seed=20 + number),
        )
        unmoved = others if number % 3 < 2 else None
        update, appended = memory.solve(keys, residuals, unmoved=unmoved)
        whole = system + keys @ keys.T + (others @ others.T if unmoved is not None else 0)
        assert relative_error(update.dense(), residuals @ torch.linalg.solve(whole, keys).T) < LIMIT
        memory.commit(appended)
        plain.commit(plain.solve(keys, residuals)[1])
        system = system + keys @ keys.T
    ours, theirs = memory.tensors(), plain.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    memory.rollback(2)
    assert memory.sizes == (u,) * 4


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_edits_alone(form):
    keys, residuals, others, weights = (
        draw(16, 3),
        draw(4, 3, seed=1),
        draw(16, 5, seed=2),
        torch.tensor([1.0, 4.0, 0.5]),
    )
    root = weights.double().sqrt()
    system = 0.7 * torch.eye(16, dtype=torch.float64) + others @ others.T + keys * weights @ keys.T
    expected = residuals * root @ torch.linalg.solve(system, keys * root).T
    update = solve_update(keys, residuals, Identity(16), 0.7, weights=weights, unmoved=others, form=form)
    assert relative_error(update.dense(), expected) < LIMIT
    memory = KeyMemory(Identity(16, weight=0.7), form)
    assert relative_error(memory.solve(keys, residuals, weights, others)[0].dense(), expected) < LIMIT


def test_exact_constraints_hold_for_both_and_repeated_columns_are_no_contradiction():
    keys, residuals, others = draw(16, 3), draw(4, 3, seed=1), draw(16, 5, seed=2)
    repeated = torch.cat([others, others[:, :2], others @ draw(5, 2, seed=3)], 1)  # rank 5
    basis = draw(16, 40, seed=4)
    covariance = Covariance.from_moment(basis @ basis.T / 40)
    update = solve_update(keys, residuals, covariance, 0.0, unmoved=repeated)
    assert relative_error(update.dense() @ keys, residuals) < LIMIT
    assert float((update.dense() @ others).norm()) < LIMIT
    soft = solve_update(keys, residuals, covariance, 1e-9, unmoved=others)
    assert relative_error(soft.dense(), update.dense()) < 1e-6
    with pytest.raises(SolveError, match="must not move"):
        solve_update(others[:, :1], residuals[:, :1], covariance, 0.0, unmoved=others)
    with pytest.raises(SolveError, match="must not move"):
        solve_update(keys, residuals, covariance, 0.0, unmoved=draw(16, 20, seed=5))


def test_unmoved_columns_are_checked_and_many_are_warned_of(caplog):
    keys, residuals = draw(16, 3), draw(4, 3, seed=1)
    for bad, error in (
        (draw(15, 2), InvalidArgumentError),
        (draw(16), InvalidArgumentError),
        (draw(16, 2) * torch.inf, SolveError),
    ):
        with pytest.raises(error, match="unmoved"):
            solve_update(keys, residuals, Identity(16), unmoved=bad)
        with pytest.raises(error, match="unmoved"):
            KeyMemory(Identity(16)).solve(keys, residuals, unmoved=bad)
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        same = solve_update(keys, residuals, Identity(16), unmoved=draw(16, 0))
        solve_update(keys, residuals, Identity(16), unmoved=draw(16, 5))
        assert not caplog.records
        solve_update(keys, residuals, Identity(16), unmoved=draw(16, 6))
    assert "3 edits and 6 columns that must not move share 16 dimensions" in caplog.text
    assert torch.equal(same.right, solve_update(keys, residuals, Identity(16)).right)
