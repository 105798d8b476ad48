"""Stacked keys of experts: block-diagonal S^-1 and updates by expert against one dense stacked system in fp64."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error

from kedit_fast.errors import InvalidArgumentError, NullSpaceError, StatisticsError
from kedit_fast.solver.block_diagonal import BlockDiagonal, expert_covariances, expert_null_spaces
from kedit_fast.solver.expert_update import ExpertUpdate, by_expert, stacked_matrix
from kedit_fast.solver.harm import predicted_kl
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.least_squares import merge_columns, solve_update
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, total_of, update_of
from kedit_fast.solver.preconditioner import Identity, Scaled
from kedit_fast.solver.shaping import compact

E, M, OUT = 6, 5, 8
EYE = torch.eye(E * M, dtype=torch.float64)


def stacked_keys(u, chosen=2):
    keys = torch.zeros(E, M, u, dtype=torch.float64)
    for column in range(u):
        for expert in torch.randperm(E - 1)[:chosen]:  # the last one is never chosen
            keys[expert, :, column] = torch.randn(M, dtype=torch.float64)
    return keys.reshape(E * M, u)


def moments():
    rows = torch.randn(E, 40, M, dtype=torch.float64) * torch.logspace(0, -1.5, M, dtype=torch.float64)
    moment = rows.mT @ rows / 40
    moment[-1] = 0
    return moment


def dense_s(moment, weight, ridge=1e-4):
    mean = sum(float(block.trace()) for block in moment) / (E * M)
    return weight * (torch.block_diag(*moment) + ridge * mean * EYE)


def residuals(u):
    return torch.randn(OUT, u, dtype=torch.float64)


@pytest.mark.parametrize("sparse", (False, True))
@pytest.mark.parametrize("u", (3, 20, 45))
def test_the_update_is_that_of_one_dense_stacked_system(u, sparse):
    moment, keys, wanted = moments(), stacked_keys(u), residuals(u)
    space, s = expert_covariances(moment, weight=3.0), dense_s(moment, 3.0)
    assert relative_error(space.apply(keys), torch.linalg.solve(s, keys)) < 1e-9
    weights = torch.rand(u, dtype=torch.float64) + 0.5
    update = solve_update(keys, wanted, space, 0.7, weights=weights, form="dual", sparse=sparse)
    weighed = keys * weights
    expected = wanted @ torch.linalg.solve(0.7 * s + weighed @ keys.T, weighed).T
    assert relative_error(update.dense(), expected) < 1e-9
    stored = ExpertUpdate.of_stacked(update, E)
    assert relative_error(stacked_matrix(stored.dense()), expected) < 1e-9
    if sparse and u < E * M:  # beyond, the system is ill-conditioned
        assert len(stored.right) == 2 * u and stored.offsets[-2] == 2 * u


def test_groups_exact_edits_and_unmoved_columns_are_those_of_the_dense_system():
    moment, keys, wanted, still = moments(), stacked_keys(4), residuals(4), stacked_keys(3)
    space, s = expert_covariances(moment), dense_s(moment, 1.0)
    merged, means = merge_columns(keys, wanted, ["a", "b", "a", "c"])
    update = solve_update(merged, means, space, form="dual", sparse=True)
    assert relative_error(update.dense(), means @ torch.linalg.solve(s + merged @ merged.T, merged).T) < 1e-9
    update = solve_update(keys, wanted, space, unmoved=still, form="dual", sparse=True)
    expected = wanted @ torch.linalg.solve(s + still @ still.T + keys @ keys.T, keys).T
    assert relative_error(update.dense(), expected) < 1e-9
    exact = solve_update(keys, wanted, space, 0.0, form="dual", sparse=True)
    assert relative_error(exact.dense() @ keys, wanted) < 1e-9


def test_an_ill_conditioned_system_has_the_same_update_without_zeros():
    keys = stacked_keys(3)
    keys = torch.cat([keys, keys + 1e-4 * stacked_keys(3)], 1)
    wanted, space = residuals(6), Identity(E * M)
    update = solve_update(keys, wanted, space, 1e-8, form="dual", sparse=True)
    assert torch.equal(update.left, wanted)


def test_a_sequence_with_memory_is_the_dense_recursion_and_rollback_restores_it():
    moment = moments()
    space, total = expert_covariances(moment, weight=2.0), dense_s(moment, 2.0)
    memory, states = KeyMemory(space, "dual"), []
    for u in (3, 1, 12, 4):
        keys, wanted = stacked_keys(u), residuals(u)
        update, batch = memory.solve(keys, wanted)
        total = total + keys @ keys.T
        assert relative_error(update.dense(), wanted @ torch.linalg.solve(total, keys).T) < 1e-9
        states.append((keys, wanted, update))
        memory.commit(batch)
    before = memory.tensors()
    keys, wanted, update = states[-1]
    memory.rollback(1)
    again, batch = memory.solve(keys, wanted)
    assert torch.equal(again.right, update.right) and torch.equal(again.left, update.left)
    memory.commit(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())
    loaded = KeyMemory.from_tensors(space, memory.tensors(), memory.about(), "here", "dual")
    assert loaded.sizes == memory.sizes
    with pytest.raises(StatisticsError, match="was kept with"):
        other = expert_covariances(2 * moment)
        KeyMemory.from_tensors(other, memory.tensors(), memory.about(), "here", "dual")


@pytest.mark.parametrize(("rule", "threshold"), (("relative", 0.1), ("energy", 0.05)))
def test_null_spaces_are_those_of_each_expert(rule, threshold):
    moment, keys, wanted = moments(), stacked_keys(4), residuals(4)
    space = expert_null_spaces(moment, threshold, rule, 2.0)
    blocks = []
    for block in moment:
        values, vectors = torch.linalg.eigh(block)
        if rule == "relative":
            below = values < threshold * values[-1]
        else:
            below = values.cumsum(0) <= threshold * values.sum()
        if not block.any():
            below = torch.ones(M, dtype=torch.bool)
        blocks.append(vectors[:, below] @ vectors[:, below].T)
    projection = torch.block_diag(*blocks)
    assert relative_error(space.apply(keys), projection @ keys / 2) < 1e-9
    assert space.null_dimensions == tuple(round(float(block.trace())) for block in blocks)
    update = solve_update(keys, wanted, Scaled(space, 3.0), form="dual", sparse=True)
    part = projection @ keys
    expected = wanted @ torch.linalg.solve(6 * EYE + part @ part.T, part).T
    assert relative_error(update.dense(), expected) < 1e-9


def test_what_cannot_be_a_block_is_refused():
    moment = moments()
    with pytest.raises(InvalidArgumentError, match="relative or energy"):
        expert_null_spaces(moment, 0.1, "absolute")
    with pytest.raises(NullSpaceError, match="everything is null space"):
        expert_null_spaces(moment, 2.0)
    with pytest.raises(StatisticsError, match="no text was counted"):
        expert_null_spaces(torch.zeros_like(moment), 0.1)
    with pytest.raises(StatisticsError, match="expert 5: the second moment is not positive definite"):
        expert_covariances(moment, ridge=0.0)
    with pytest.raises(InvalidArgumentError, match=r"\[E, m, m\]"):
        expert_covariances(moment[0])
    with pytest.raises(InvalidArgumentError, match="at least one block"):
        BlockDiagonal(())
    with pytest.raises(InvalidArgumentError, match=r"keys must be \[30, u\]"):
        expert_covariances(moment).whiten(torch.randn(31, 2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_update_by_expert_is_the_stacked_one(dtype):
    stacked = solve_update(stacked_keys(4), residuals(4), Identity(E * M), form="dual", sparse=True)
    update = ExpertUpdate.of_stacked(stacked, E)
    assert update.shape == (E, OUT, M) and update.rank == 4 and update.is_finite()
    assert torch.equal(update.stacked_right(), stacked.right)
    assert torch.allclose(stacked_matrix(update.dense()), stacked.dense(), atol=1e-12)
    assert update.norm() == pytest.approx(stacked.norm(), rel=1e-9)
    assert torch.equal(by_expert(stacked_matrix(update.dense()), E), update.dense())
    assert torch.equal(update.columns_of(slice(1, 3)).dense(), update.dense()[:, :, 1:3])
    assert isinstance(update_of(vars(update)), ExpertUpdate)
    master = torch.randn(E, M, OUT).mT
    before, copy = master.clone(), torch.empty(E, OUT, M, dtype=torch.bfloat16)
    update.to(torch.float32).apply_(master, -0.5, copy=copy if dtype == torch.bfloat16 else None)
    assert torch.allclose(master.double(), before.double() - 0.5 * update.dense(), atol=1e-6)
    if dtype == torch.bfloat16:
        assert torch.equal(copy, master.bfloat16())


def test_updates_by_expert_add_up_and_are_compacted():
    parts = [
        ExpertUpdate.of_stacked(
            solve_update(stacked_keys(u), residuals(u), Identity(E * M), form="dual", sparse=True), E
        )
        for u in (2, 3)
    ]
    expected = parts[0].dense() + parts[1].dense()
    total = total_of(parts)
    assert isinstance(total, ExpertUpdate) and total.rank == 5
    assert torch.allclose(total.dense(), expected, atol=1e-12)
    mixed = total_of([parts[0], DenseUpdate(parts[1].dense())])
    assert isinstance(mixed, DenseUpdate) and torch.allclose(mixed.dense(), expected, atol=1e-12)
    doubled = total_of([parts[0], parts[0]])
    smaller = compact(doubled)
    assert smaller.rank == 2 and torch.allclose(smaller.dense(), doubled.dense(), atol=1e-9)
    dense = compact(DenseUpdate(doubled.dense()))
    assert dense.rank == 2 and torch.allclose(dense.dense(), doubled.dense(), atol=1e-9)


def test_the_predicted_harm_is_the_sum_over_experts():
    update = ExpertUpdate.of_stacked(LowRankUpdate(residuals(3), stacked_keys(3)), E)
    inputs, outputs = moments(), residuals(20) @ residuals(20).T
    outputs = outputs @ outputs.T
    expected = 0.5 * torch.trace(
        outputs @ stacked_matrix(update.dense()) @ torch.block_diag(*inputs) @ stacked_matrix(update.dense()).T
    )
    for one in (update, DenseUpdate(update.dense())):
        assert predicted_kl(one, inputs, outputs) == pytest.approx(float(expected), rel=1e-9)


def test_parts_that_do_not_fit_are_refused():
    left, right = torch.randn(OUT, 2), torch.randn(2, M)
    fine = ExpertUpdate(left, right, torch.tensor([0, 1]), torch.tensor([0, 2, 2]))
    assert fine.shape == (2, OUT, M)
    for columns, offsets in (([1, 0], [0, 2, 2]), ([0, 2], [0, 2, 2]), ([0, 1], [0, 2, 1]), ([0, 1], [1, 2, 2])):
        with pytest.raises(InvalidArgumentError):
            ExpertUpdate(left, right, torch.tensor(columns), torch.tensor(offsets))
    with pytest.raises(InvalidArgumentError, match="int64"):
        ExpertUpdate(left, right, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 2, 2]))
    with pytest.raises(InvalidArgumentError, match="divided"):
        ExpertUpdate.of_stacked(LowRankUpdate(left, torch.randn(7, 2)), 2)
