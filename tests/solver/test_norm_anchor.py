"""The norm anchor of NAS and RLSEdit's recursion against the published formulas (tests/data/golden2.safetensors)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.norm_anchor import anchored, norm_anchor
from kedit_fast.solver.preconditioner import Covariance


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden2.safetensors")


def test_nas_meets_its_golden_rows(golden):
    clean, states, delta = (golden[f"nas.{name}"] for name in ("m", "h", "delta"))
    anchor = norm_anchor(golden["nas.calibration_norms"])
    assert anchor == pytest.approx(float(golden["nas.anchor"]), rel=1e-14)
    scaled, dropped = anchored(clean + delta, anchor)
    assert dropped.tolist() == golden["nas.skipped"].bool().tolist()
    values = states - clean + torch.where(dropped, clean, scaled)
    assert relative_error(values, golden["nas.z"]) < 1e-14
    anchor = float((clean + delta).norm(dim=0).median())  # golden's own drops every edit
    scaled, dropped = anchored(clean + delta, anchor)
    assert 0 < int(dropped.sum()) < 4
    for column, value in zip((clean + delta).T, scaled.T, strict=True):
        assert relative_error(value, anchor * column / (float(column.square().sum()) ** 0.5 + 1e-10)) < 1e-14


def test_the_anchor_is_the_mean_without_the_largest_twentieth():
    for count, left_out in ((1, 0), (19, 0), (20, 1), (39, 1), (40, 2), (100, 5)):
        norms = torch.arange(1, count + 1)
        assert norm_anchor(norms.flip(0)) == float(norms[: count - left_out].double().mean())
    for bad in ([], [1.0, float("nan")], [1.0, 0.0], [float("inf")]):
        with pytest.raises(StatisticsError, match="norm anchor"):
            norm_anchor(torch.tensor(bad))
    for anchor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidArgumentError, match="anchor"):
            anchored(torch.ones(2, 2), anchor)
    scaled, dropped = anchored(torch.zeros(3, 1), 2.0)
    assert scaled.norm() == 0 and not dropped.any()


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
def test_rlsedit_is_a_memory_over_its_regularized_covariance(golden, form):
    """The paper's recursion on C_t. The released residual, V_t - W K_t with V_t = z - h, is another and not used."""
    weight = golden["shared.W"].clone()
    memory = KeyMemory(Covariance.from_moment(golden["shared.C"], weight=2.5, norm_lambda=0.6**2), form)
    for batch in range(3):
        keys, residuals = golden[f"shared.K.{batch}"], golden[f"shared.R.{batch}"]
        update, appended = memory.solve(keys, residuals)
        memory.commit(appended)
        assert relative_error(update.dense(), golden[f"rlsedit.delta.{batch}"]) < 1e-9
        released = (residuals - weight @ keys) @ update.right.T
        assert relative_error(released, golden[f"rlsedit.delta_released.{batch}"]) < 1e-9
        weight += update.dense()
