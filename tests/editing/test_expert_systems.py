"""The systems of layers with experts: what `SolverState` solves is one dense stacked system in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from floors import relative_error
from tiny_models import make_model, needs_experts

from kedit_fast.editing.shaping import SHAPINGS
from kedit_fast.editing.solver_state import SolverState
from kedit_fast.errors import MethodError, StatisticsError
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.view import ModelView
from kedit_fast.solver.expert_update import ExpertUpdate, stacked_matrix
from kedit_fast.solver.low_rank import DenseUpdate

pytestmark = needs_experts
LAYER = 1
RELATIVE = {"nullspace_rule": "relative", "nullspace_threshold": 0.3}


@pytest.fixture(scope="module")
def view():
    return ModelView(make_model("qwen3_moe", torch.float64))


def state_of(view, method, moment=None, **changes):
    recipe = find_recipe(method)
    hparams, _ = make_hparams(method, view.config, {"layers": (LAYER,), **changes})
    stack = view.experts(LAYER)
    if moment is None:
        rows = torch.randn(stack.count, 3 * stack.inputs, stack.inputs, dtype=torch.float64)
        moment = rows.mT @ rows / rows.shape[1]
    rows = torch.randn(50, stack.outputs, dtype=torch.float64) * torch.linspace(0.2, 3.0, stack.outputs)
    statistics: Any = SimpleNamespace(
        moment=lambda layer: SimpleNamespace(moment=moment), output_metric=lambda layer: rows.T @ rows / len(rows)
    )
    return SolverState(view, recipe, hparams, statistics), moment


def stacked_keys(view, u):
    stack = view.experts(LAYER)
    keys = torch.zeros(stack.count, stack.inputs, u, dtype=torch.float64)
    for column in range(u):
        for expert in torch.randperm(stack.count)[:2]:
            keys[expert, :, column] = torch.randn(stack.inputs, dtype=torch.float64)
    return keys.flatten(0, 1), torch.randn(stack.outputs, u, dtype=torch.float64)


def dense_s(moment, weight):
    ridge = 1e-4 * float(moment.diagonal(dim1=1, dim2=2).mean())
    s = torch.block_diag(*moment)
    return weight * (s + ridge * torch.eye(len(s), dtype=s.dtype))


def matrix(update):
    assert isinstance(update, ExpertUpdate)
    return stacked_matrix(update.dense())


@pytest.mark.parametrize(("method", "rho"), (("memit", 1.0), ("emmet", 0.1)))
def test_a_batch_is_the_dense_system_with_weights_and_groups(view, method, rho):
    state, moment = state_of(view, method, mom2_update_weight=20.0)
    (keys, residuals), s = stacked_keys(view, 5), rho * dense_s(moment, 20.0)
    weights = torch.rand(5, dtype=torch.float64) + 0.5
    update = state.solve_batch(LAYER, keys, residuals, weights)
    expected = residuals @ torch.linalg.solve(s + (keys * weights) @ keys.T, keys * weights).T
    assert relative_error(matrix(update), expected) < 1e-9
    assert len(update.right) == 10
    grouped = state.solve_batch(LAYER, keys, residuals, groups=list("aabcd"))
    share = torch.eye(5, dtype=torch.float64)[:, 1:]
    share[:2, 0] = 0.5
    merged, means = keys @ share, residuals @ share
    assert relative_error(matrix(grouped), means @ torch.linalg.solve(s + merged @ merged.T, merged).T) < 1e-9


def test_a_sequence_is_the_dense_recursion_and_settling_undoes_it(view):
    state, moment = state_of(view, "memit-sequential", mom2_update_weight=20.0)
    total, updates = dense_s(moment, 20.0), []
    batches = [stacked_keys(view, u) for u in (4, 2, 3)]
    for keys, residuals in batches:
        updates.append(state.solve_batch(LAYER, keys, residuals))
        total = total + keys @ keys.T
        assert relative_error(matrix(updates[-1]), residuals @ torch.linalg.solve(total, keys).T) < 1e-9
        state.commit()
    state.settle(2)
    again = state.solve_batch(LAYER, *batches[-1])
    assert all(torch.equal(getattr(again, name), part) for name, part in vars(updates[-1]).items())
    assert state.memories[LAYER].form == "dual"


def with_metric(state, keys, residuals, system, rho=1.0):
    """Delta of |Delta K - R|^2 + rho tr(B Delta S Delta^T): an equation for each eigenvector of B; `system` is S."""
    moment = state.statistics.output_metric(LAYER)
    values, basis = torch.linalg.eigh(moment / moment.diagonal().mean())
    values = (1 - state.hparams.metric_mix) * values + state.hparams.metric_mix
    targets = basis.T @ residuals @ keys.T
    rows = [torch.linalg.solve(keys @ keys.T + rho * b * system, row) for b, row in zip(values, targets, strict=True)]
    return basis @ torch.stack(rows)


@pytest.mark.parametrize(("method", "rho"), (("memit", 1.0), ("emmet", 0.1)))
def test_an_output_metric_is_of_the_dense_stacked_system(view, method, rho):
    state, moment = state_of(view, method, mom2_update_weight=2.0, output_metric=True)
    keys, residuals = stacked_keys(view, 5)
    update, s = state.solve_batch(LAYER, keys, residuals), dense_s(moment, 2.0)
    plain = state_of(view, method, moment, mom2_update_weight=2.0)[0].solve_batch(LAYER, keys, residuals)
    assert relative_error(matrix(update), matrix(plain)) > 1e-3
    assert relative_error(matrix(update), with_metric(state, keys, residuals, s, rho)) < 1e-9


def test_an_output_metric_with_earlier_keys_is_of_the_dense_stacked_system(view):
    state, moment = state_of(view, "memit-sequential", mom2_update_weight=2.0, output_metric=True)
    system = dense_s(moment, 2.0)
    for u in (4, 3):
        keys, residuals = stacked_keys(view, u)
        update = state.solve_batch(LAYER, keys, residuals)
        assert relative_error(matrix(update), with_metric(state, keys, residuals, system)) < 1e-9
        state.commit()
        system = system + keys @ keys.T


def test_null_spaces_and_automatic_scales_are_those_of_the_stack(view):
    state, moment = state_of(view, "alphaedit", L2="auto", **RELATIVE)
    keys, residuals = stacked_keys(view, 6)
    update = state.solve_batch(LAYER, keys, residuals)
    blocks = []
    for block in moment:
        values, vectors = torch.linalg.eigh(block)
        basis = vectors[:, values < 0.3 * values[-1]]
        blocks.append(basis @ basis.T)
    part = torch.block_diag(*blocks) @ keys
    share = state.hparams.residual_share
    scale = share / (1 - share) * float(part.square().sum(0).quantile(0.5))
    system = scale * torch.eye(len(part), dtype=part.dtype) + part @ part.T
    assert relative_error(matrix(update), residuals @ torch.linalg.solve(system, part).T) < 1e-9
    assert state.null_spaces == {LAYER: round(sum(float(block.trace()) for block in blocks))}


def test_the_rank_one_update_puts_out_the_value(view):
    state, _ = state_of(view, "rome")
    keys, residuals = stacked_keys(view, 1)
    update, pivot = state.solve_rank_one(LAYER, keys[:, 0], keys[:, 0], residuals[:, 0])
    assert pivot > 0
    assert relative_error(matrix(update) @ keys, residuals) < 1e-9


def test_shaping_and_limits_act_on_the_stacked_matrix(view):
    weight = view.weight(LAYER)
    state, _ = state_of(view, "rect", mom2_update_weight=20.0)
    update = state.solve_batch(LAYER, *stacked_keys(view, 3))
    shape = SHAPINGS["rect"].of_batch
    assert shape is not None
    shaped = shape(update, weight, state.hparams)
    assert isinstance(shaped, DenseUpdate)
    change = update.dense()
    relative = (change / (weight + 1e-8)).abs()
    written = shaped.delta != 0
    assert int(written.sum()) == pytest.approx(state.hparams.rect_keep * change.numel(), abs=2)
    assert float(relative[written].min()) >= float(relative[~written].max())
    assert torch.allclose(shaped.delta[written], change[written], atol=1e-14)
    limited_state, _ = state_of(view, "memit", mom2_update_weight=20.0, spectral_limit=1e-3)
    limited = limited_state.limited(update, weight)
    largest = float(torch.linalg.matrix_norm(stacked_matrix(weight), 2))
    assert float(torch.linalg.matrix_norm(matrix(limited), 2)) == pytest.approx(1e-3 * largest, rel=1e-6)
    bounded_state, _ = state_of(view, "memit", mom2_update_weight=20.0, frobenius_limit=1e-3)
    bounded = bounded_state.limited(update, weight)
    share = 1e-3 * float(weight.norm()) / float(change.norm())
    assert share < 1 and relative_error(matrix(bounded), share * stacked_matrix(change)) < 1e-9
    restrain = SHAPINGS["prune"].of_total
    assert restrain is not None
    large = ExpertUpdate(update.left * 1e4, update.right, update.columns, update.offsets)
    singular = torch.linalg.svdvals(matrix(large) + matrix(restrain(large, weight)))[0]
    before = float(torch.linalg.matrix_norm(matrix(large), 2))
    assert float(singular) == pytest.approx(torch.tensor(before / largest).log().item() + largest, rel=1e-4)


def test_sphere_attenuates_the_main_directions_of_the_stacked_matrix(view):
    state, _ = state_of(view, "memit", mom2_update_weight=20.0, sphere_strength=0.8, sphere_energy=0.4)
    update = state_of(view, "memit", mom2_update_weight=20.0)[0].solve_batch(LAYER, *stacked_keys(view, 4))
    rows = stacked_matrix(view.weight(LAYER))
    rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    main = vectors[:, : 1 + int((values.cumsum(0) <= 0.4 * values.sum()).sum())]
    attenuated = state.limited(update, view.weight(LAYER))
    change = matrix(update)
    assert 0 < main.shape[1] < len(rows) and float((change @ main).norm()) > 1e-2 * float(change.norm())
    assert relative_error(matrix(attenuated), change - 0.8 * change @ main @ main.T) < 1e-9


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    (
        ("memit-sequential", {"memory_window": 2}, "memory_window = 2"),
        ("memit-sequential", {"memory_form": "primal"}, "memory_form = primal"),
        ("alphaedit", {"nullspace_rule": "absolute"}, "nullspace_rule = absolute"),
        ("ft-l", {}, "tunes one matrix"),
    ),
)
def test_what_does_not_go_with_experts_is_refused_by_name(view, method, changes, says):
    with pytest.raises(MethodError, match=says):
        state_of(view, method, **changes)


def test_statistics_of_one_matrix_are_refused(view):
    state, _ = state_of(view, "memit", torch.eye(view.edited_shape(LAYER)[1]), mom2_update_weight=20.0)
    with pytest.raises(StatisticsError, match="in each of"):
        state.preconditioner(LAYER)
