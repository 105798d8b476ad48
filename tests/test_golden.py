"""The solver against the published dense formulas in float64 (tests/data/golden.safetensors)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file

from kedit_fast.errors import SolveError, StatisticsError
from kedit_fast.solver.least_squares import rank_one_equality, ridge_update
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.preconditioners import Covariance, Identity

LIMIT = 1e-6


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parent / "data" / "golden.safetensors")


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
def test_memit_meets_its_golden_rows(golden, form):
    covariance = Covariance.from_moment(golden["C"])
    for keys, residuals, expected in zip(golden["K"], golden["R"], golden["memit"], strict=True):
        update = ridge_update(covariance, keys, residuals, float(golden["memit_lambda"]), form=form)
        assert relative_error(update.dense(), expected) < LIMIT
        assert update.rank == keys.shape[1]


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
def test_memit_with_more_edits_than_dimensions(golden, form):
    covariance = Covariance.from_moment(golden["C"])
    keys, residuals = golden["memit_big_K"], golden["memit_big_R"]
    update = ridge_update(covariance, keys, residuals, float(golden["memit_lambda"]), form=form)
    assert relative_error(update.dense(), golden["memit_big"]) < LIMIT
    small = update.compacted()
    assert small.rank <= min(update.dense().shape) and relative_error(small.dense(), golden["memit_big"]) < LIMIT


def test_both_forms_agree_around_the_switch(golden):
    d = golden["C"].shape[0]
    covariance = Covariance.from_moment(golden["C"])
    for u in (d // 2, d, 2 * d):
        keys, residuals = torch.randn(d, u, dtype=torch.float64), torch.randn(20, u, dtype=torch.float64)
        dual = ridge_update(covariance, keys, residuals, 50.0, form="dual").dense()
        assert relative_error(ridge_update(covariance, keys, residuals, 50.0, form="primal").dense(), dual) < LIMIT


def test_rome_meets_its_golden_rows(golden):
    k_mean, k_star, v_star = golden["rome_k_mean"], golden["rome_k_star"], golden["rome_v_star"]
    residual = v_star - golden["W0"] @ k_star
    for preconditioner, key, row in (
        (Covariance.from_moment(golden["C"]), k_mean, "rome"),
        (Identity(len(k_mean)), k_mean, "rome_no_covariance"),
        (Covariance.from_moment(golden["C"]), k_star, "r_rome"),
    ):
        update, pivot = rank_one_equality(preconditioner, key, k_star, residual)
        assert update is not None and pivot > 0
        assert relative_error(update.dense(), golden[row]) < LIMIT
        assert relative_error((golden["W0"] + update.dense()) @ k_star, v_star) < 1e-9


def test_the_update_solves_its_normal_equations(golden):
    keys, residuals, rho = golden["K"][0], golden["R"][0], 50.0
    delta = ridge_update(Covariance.from_moment(golden["C"]), keys, residuals, rho).dense()
    assert relative_error(delta @ (rho * golden["C"] + keys @ keys.T), residuals @ keys.T) < 1e-9


def test_a_bad_pivot_raises_skips_or_is_allowed():
    identity, key = Identity(3), torch.tensor([1.0, 0.0, 0.0])
    away, residual = torch.tensor([-1.0, 0.1, 0.0]), torch.ones(4)
    with pytest.raises(SolveError, match="pivot"):
        rank_one_equality(identity, away, key, residual)
    assert rank_one_equality(identity, away, key, residual, on_bad_pivot="skip")[0] is None
    assert rank_one_equality(identity, away, key, residual, on_bad_pivot="allow")[0] is not None


def test_bad_systems_are_named():
    with pytest.raises(StatisticsError, match="not positive definite"):
        Covariance.from_moment(torch.zeros(4, 4))
    with pytest.raises(StatisticsError, match="not finite"):
        Covariance.from_moment(torch.full((4, 4), float("nan")))
    keys = torch.randn(4, 2)
    keys[0, 0] = float("inf")
    with pytest.raises(SolveError, match="keys"):
        ridge_update(Identity(4), keys, torch.randn(3, 2), 1.0)


def test_the_norm_of_factors_is_that_of_their_product():
    update = LowRankUpdate(torch.randn(30, 4), torch.randn(20, 4))
    assert abs(update.norm() - float(update.dense().norm())) < 1e-4
