"""Predicted KL divergence of updates: its algebra, and what it means."""

from __future__ import annotations

import pytest
import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.solver.harm import Harm, predicted_kl
from kedit_fast.solver.low_rank import LowRankUpdate, MaskedUpdate


def moment(size):
    rows = torch.randn(size + 3, size, dtype=torch.float64)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("out, d, k", ((5, 7, 0), (5, 7, 2), (5, 7, 6), (3, 1100, 2), (1100, 3, 3)))
def test_factors_masks_and_matrices_give_half_the_trace(out, d, k):
    update = LowRankUpdate(torch.randn(out, k), torch.randn(d, k))
    masked = MaskedUpdate.from_mask(update, torch.rand(out, d) > 0.5)
    inputs, outputs = moment(d), moment(out)
    for given in (update, masked, update.dense().double()):
        dense = given if isinstance(given, torch.Tensor) else given.dense().double()
        expected = 0.5 * float(torch.trace(outputs @ dense @ inputs @ dense.T))
        assert predicted_kl(given, inputs, outputs) == pytest.approx(expected, rel=1e-6)
        assert predicted_kl(given, inputs.float(), outputs.float()) == pytest.approx(expected, rel=1e-4)


def test_a_small_change_of_a_softmax_layer_costs_what_is_predicted():
    """With equal probabilities the curvature is the same for every input: nothing of the divergence is left out."""
    head, keys = torch.randn(30, 6, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)
    p = torch.full((30,), 1 / 30, dtype=torch.float64)
    outputs = head.T @ (torch.diag(p) - torch.outer(p, p)) @ head  # E[g g^T] over labels drawn from p
    inputs = keys.T @ keys / len(keys)
    update = LowRankUpdate(torch.randn(6, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64))
    for size in (1e-3, 1e-2):
        small = LowRankUpdate(size * update.left, update.right)
        log_q = torch.log_softmax(keys @ small.dense().T @ head.T, -1)
        measured = float((p * (p.log() - log_q)).sum(1).mean())
        assert predicted_kl(small, inputs, outputs) == pytest.approx(measured, rel=20 * size)


def test_moments_of_another_size_are_refused():
    update = LowRankUpdate(torch.randn(4, 2), torch.randn(6, 2))
    with pytest.raises(InvalidArgumentError, match=r"update is \[4, 6\].*got \[6, 6\] and \[4, 4\]"):
        predicted_kl(update, moment(4), moment(6))
    with pytest.raises(InvalidArgumentError, match="update is"):
        predicted_kl(torch.randn(4), moment(4), moment(4))


def test_the_harm_of_several_matrices_adds_up_and_says_what_is_missing():
    updates = {name: LowRankUpdate(torch.randn(4, 2), torch.randn(6, 2)) for name in ("a", "b")}
    inputs, outputs = moment(6), moment(4)
    harm = Harm.of(updates.items(), lambda name: (inputs, outputs))
    parts = {name: predicted_kl(update, inputs, outputs) for name, update in updates.items()}
    assert harm.predicted_kl == pytest.approx(sum(parts.values())) and not harm.missing
    norms = torch.stack([update.dense().norm() for update in updates.values()])
    assert harm.norm == pytest.approx(float(norms.norm()))
    assert harm.as_dict()["modules"]["b"] == {"norm": updates["b"].norm(), "predicted_kl": parts["b"]}
    partial = Harm.of(updates.items(), lambda name: (inputs, outputs) if name == "a" else f"none for {name}")
    assert partial.predicted_kl is None and partial.missing == "none for b" == partial.as_dict()["missing"]
    assert partial.modules["a"].predicted_kl == pytest.approx(parts["a"])
    norms_alone = Harm.of(updates.items())
    assert norms_alone.predicted_kl is None and not norms_alone.missing and norms_alone.norm == harm.norm
