"""The output metric against minimizers by Kronecker products in float64 (tests/data/golden2.safetensors)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file

from kedit_fast.errors import InvalidArgumentError, SolveError, StatisticsError
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.least_squares import solve_update
from kedit_fast.solver.output_metric import OutputMetric
from kedit_fast.solver.preconditioner import Covariance, Identity

LIMIT = 1e-10
GOLDEN = 1e-8  # the Kronecker systems of the golden rows are badly conditioned: they have 4e-10 of error themselves
WEIGHT = 0.9  # lambda of the golden rows


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden2.safetensors")


@pytest.fixture(scope="module")
def metric(golden):
    return OutputMetric.from_moment(golden["shared.G"], mix=0.0)


def minimizer(keys, residuals, system, moment, rho=1.0):
    """Delta with Delta K K^T + rho B Delta S = R K^T, by one Kronecker product."""
    out, d = len(residuals), len(keys)
    matrix = torch.kron(torch.eye(out, dtype=torch.float64), keys @ keys.T) + rho * torch.kron(moment, system)
    return torch.linalg.solve(matrix, (residuals @ keys.T).flatten()).view(out, d)


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
def test_the_update_meets_its_golden_row(golden, metric, form):
    covariance = Covariance.from_moment(golden["shared.C"])
    keys, residuals = golden["shared.K.1"], golden["shared.R.1"]
    update = solve_update(keys, residuals, covariance, WEIGHT, form=form, output_metric=metric)
    assert relative_error(update.dense(), golden["kfac.delta"]) < GOLDEN and update.rank == keys.shape[1]
    plain = solve_update(keys, residuals, covariance, WEIGHT, form=form)
    assert torch.equal(update.right, plain.right) and relative_error(plain.dense(), golden["kfac.delta"]) > 1e-3


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
def test_earlier_keys_stand_in_the_damage(golden, metric, form):
    memory = KeyMemory(Covariance.from_moment(golden["shared.C"], weight=WEIGHT), form)
    memory.commit(memory.solve(golden["shared.K.0"], golden["shared.R.0"])[1])
    update, appended = memory.solve(golden["shared.K.1"], golden["shared.R.1"], output_metric=metric)
    assert relative_error(update.dense(), golden["kfac.delta_memory_g"]) < GOLDEN and update.rank == 4
    memory.commit(appended)  # and what is remembered does not depend on the metric
    again = KeyMemory(Covariance.from_moment(golden["shared.C"], weight=WEIGHT), form)
    for i in range(2):
        again.commit(again.solve(golden[f"shared.K.{i}"], golden[f"shared.R.{i}"])[1])
    assert all(torch.equal(there, memory.tensors()[name]) for name, there in again.tensors().items())


def test_a_metric_of_the_edits_makes_it_relative(golden):
    """tr(E^T B_e E): with B_e = M M^T, B becomes M^-1 B M^-T, R becomes M^T R, and Delta is M^-T times the result."""
    root = torch.linalg.cholesky(golden["kfac.G_e"])
    inverse = torch.linalg.inv(root)
    moment = inverse @ golden["shared.G"] @ inverse.T
    scale = float(moment.trace()) / len(moment)  # a metric is normalized: its scale goes to rho
    covariance = Covariance.from_moment(golden["shared.C"])
    relative = OutputMetric.from_moment(moment, mix=0.0)
    update = solve_update(
        golden["shared.K.1"], root.T @ golden["shared.R.1"], covariance, WEIGHT * scale, output_metric=relative
    )
    assert relative_error(inverse.T @ update.dense(), golden["kfac.delta_two_metrics"]) < GOLDEN


@pytest.mark.parametrize("u", (1, 5, 40))
@pytest.mark.parametrize("form", ("dual", "primal"))
def test_any_number_of_keys_weights_and_a_singular_moment(u, form):
    generator = torch.Generator().manual_seed(u)
    keys, residuals = (torch.randn(n, u, generator=generator, dtype=torch.float64) for n in (16, 6))
    weights = torch.rand(u, generator=generator, dtype=torch.float64) + 0.5
    gradients = torch.randn(200, 6, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 4, 1, 1, 1, 0.1])
    gradients -= gradients.mean(1, keepdim=True)  # behind a LayerNorm
    moment = gradients.T @ gradients
    metric = OutputMetric.from_moment(moment, mix=0.1)
    mixed = 0.9 * moment * 6 / moment.trace() + 0.1 * torch.eye(6, dtype=torch.float64)
    update = solve_update(keys, residuals, Identity(16), 0.3, weights=weights, form=form, output_metric=metric)
    root = weights.sqrt()
    expected = minimizer(keys * root, residuals * root, torch.eye(16, dtype=torch.float64), mixed, 0.3)
    assert relative_error(update.dense(), expected) < LIMIT


def test_badly_conditioned_keys_lose_no_digits():
    """Keys whose s_i of S^-1/2 K = U s V^T go from 1e-5 to 1e5, against the formula with that SVD."""
    generator = torch.Generator().manual_seed(0)

    def orthogonal(n):
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q

    u, s = 8, torch.logspace(-5, 5, 8, dtype=torch.float64)
    along, across = orthogonal(16)[:, :u], orthogonal(u)
    residuals = torch.randn(6, u, generator=generator, dtype=torch.float64)
    metric = OutputMetric.from_moment(torch.diag(torch.logspace(-2, 2, 6, dtype=torch.float64)), mix=0.1)
    expected = (residuals @ across) * s / (s**2 + metric.values[:, None]) @ along.T  # Q = I
    keys = along * s @ across.T
    assert relative_error(solve_update(keys, residuals, Identity(16), output_metric=metric).dense(), expected) < 1e-6


def test_where_a_metric_has_no_effect(golden, metric):
    covariance, keys, residuals = (golden[f"shared.{name}"] for name in ("C", "K.1", "R.1"))
    covariance = Covariance.from_moment(covariance)
    for other, rho in ((OutputMetric.from_moment(golden["shared.G"], mix=1.0), WEIGHT), (metric, 0.0)):
        plain = solve_update(keys, residuals, covariance, rho)
        assert (
            relative_error(solve_update(keys, residuals, covariance, rho, output_metric=other).dense(), plain.dense())
            < LIMIT
        )
    scaled = OutputMetric.from_moment(1e-9 * golden["shared.G"], mix=0.0)  # nor has the scale of B
    assert relative_error(scaled.values, metric.values) < LIMIT


def test_bad_metrics_are_refused():
    eye = torch.eye(3)
    for moment, reason in (
        (eye * 0, "zero"),
        (eye * float("nan"), "not finite"),
        (torch.diag(torch.tensor([1.0, 1.0, -0.1])), "negative eigenvalue"),
    ):
        with pytest.raises(StatisticsError, match=reason):
            OutputMetric.from_moment(moment)
    singular = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(StatisticsError, match="metric_mix"):
        OutputMetric.from_moment(singular, mix=0.0)
    assert float(OutputMetric.from_moment(singular).values[0]) == pytest.approx(0.1)
    with pytest.raises(InvalidArgumentError, match=r"\[out, out\]"):
        OutputMetric.from_moment(torch.ones(2, 3))
    for mix in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidArgumentError, match="mix"):
            OutputMetric.from_moment(eye, mix)
    metric = OutputMetric.from_moment(eye)
    with pytest.raises(InvalidArgumentError, match="3 outputs"):
        solve_update(torch.ones(4, 1), torch.ones(2, 1), Identity(4), output_metric=metric)
    with pytest.raises(SolveError, match="residuals"):
        solve_update(torch.ones(4, 1), torch.full((3, 1), torch.inf), Identity(4), output_metric=metric)


@pytest.mark.parametrize("form", ("dual", "primal"))
def test_unmoved_columns_stand_in_the_damage(golden, metric, form):
    """They are what earlier keys are: tr(B Delta (lambda C + K_p K_p^T) Delta^T)."""
    keys, residuals, others = (golden[f"shared.{name}"] for name in ("K.1", "R.1", "K.0"))
    covariance = Covariance.from_moment(golden["shared.C"])
    update = solve_update(keys, residuals, covariance, WEIGHT, unmoved=others, form=form, output_metric=metric)
    assert relative_error(update.dense(), golden["kfac.delta_memory_g"]) < GOLDEN
    memory = KeyMemory(Covariance.from_moment(golden["shared.C"], weight=WEIGHT), form)
    update, _ = memory.solve(keys, residuals, unmoved=others, output_metric=metric)
    assert relative_error(update.dense(), golden["kfac.delta_memory_g"]) < GOLDEN
