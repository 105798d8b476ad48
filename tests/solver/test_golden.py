"""The solver against the published dense formulas in float64 (tests/data/golden.safetensors)."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors.torch import load_file

from kedit_fast.backends import explain, probe, use_backend
from kedit_fast.errors import InvalidArgumentError, NullSpaceError, SolveError, StatisticsError
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.least_squares import collisions, merge_columns, rank_one_equality, solve_update
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.normalizer import Normalizer, gradient_update
from kedit_fast.solver.preconditioner import Covariance, Identity, NullSpace, null_dimension, threshold_leaving
from kedit_fast.solver.shaping import prune, rect, spectral_norm

LIMIT = 1e-6


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden.safetensors")


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
def test_memit_meets_its_golden_rows(golden, form):
    covariance = Covariance.from_moment(golden["C"])
    for keys, residuals, expected in zip(golden["K"], golden["R"], golden["memit"], strict=True):
        update = solve_update(keys, residuals, covariance, float(golden["memit_lambda"]), form=form)
        assert relative_error(update.dense(), expected) < LIMIT
        assert update.rank == keys.shape[1]


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
def test_memit_with_more_edits_than_dimensions(golden, form):
    covariance = Covariance.from_moment(golden["C"])
    keys, residuals = golden["memit_big_K"], golden["memit_big_R"]
    update = solve_update(keys, residuals, covariance, float(golden["memit_lambda"]), form=form)
    assert relative_error(update.dense(), golden["memit_big"]) < LIMIT
    small = update.compacted()
    assert small.rank <= min(update.dense().shape) and relative_error(small.dense(), golden["memit_big"]) < LIMIT


def test_both_forms_agree_around_the_switch(golden):
    d = golden["C"].shape[0]
    covariance = Covariance.from_moment(golden["C"])
    for u in (d // 2, d, 2 * d):
        keys, residuals = torch.randn(d, u, dtype=torch.float64), torch.randn(20, u, dtype=torch.float64)
        dual = solve_update(keys, residuals, covariance, 50.0, form="dual").dense()
        assert relative_error(solve_update(keys, residuals, covariance, 50.0, form="primal").dense(), dual) < LIMIT


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


@pytest.mark.parametrize("form", ("dual", "primal", "auto"))
@pytest.mark.parametrize("row", ("memit_sequential", "encore", "alphaedit"))
def test_methods_with_a_memory_meet_their_golden_rows(golden, row, form):
    preconditioner = {
        "memit_sequential": lambda: Covariance.from_moment(golden["C"], weight=50.0),
        "encore": lambda: Covariance.from_moment(
            golden["C"], weight=50.0, norm_lambda=float(golden["encore_lambda_n"])
        ),
        "alphaedit": lambda: NullSpace.from_covariance(
            golden["C"], float(golden["alphaedit_threshold"]), l2=float(golden["alphaedit_L2"])
        ),
    }[row]()
    memory = KeyMemory(preconditioner, form)
    for keys, residuals, expected in zip(golden["K"], golden["R"], golden[row], strict=True):
        update, appended = memory.solve(keys, residuals)
        memory.commit(appended)
        assert relative_error(update.dense(), expected) < LIMIT
    assert memory.count == golden["K"].shape[0] * golden["K"].shape[2]


@pytest.mark.parametrize("threshold", (2e-2, 2e-3))
def test_alphaedit_writes_into_the_null_space_alone(golden, threshold):
    """Delta P = Delta, with the null space's own basis kept and with that of the rest."""
    space = NullSpace.from_covariance(golden["C"], threshold)
    values, vectors = torch.linalg.eigh(golden["C"])
    null = vectors[:, values < threshold]
    assert space.dimension == null.shape[1]
    assert space.complement == (null.shape[1] > len(values) / 2) and space.basis.shape[1] <= len(values) // 2
    for form in ("dual", "primal"):
        update = KeyMemory(space, form).solve(golden["K"][0], golden["R"][0])[0].dense()
        assert relative_error(update @ null @ null.T, update) < 1e-12
        assert float((update @ vectors[:, values >= threshold]).norm() / update.norm()) < 1e-12


def test_the_projector_is_the_published_one(golden):
    space = NullSpace.from_covariance(golden["C"], float(golden["alphaedit_threshold"]))
    assert relative_error(space.project(torch.eye(96)), golden["alphaedit_P"]) < 1e-9


def test_pmet_meets_its_golden_rows(golden):
    covariance = Covariance.from_moment(golden["C"], weight=50.0)
    for keys, residuals, expected in zip(golden["K"], golden["R"], golden["pmet"], strict=True):
        assert relative_error(solve_update(keys, residuals, covariance).dense(), expected) < LIMIT


@pytest.mark.parametrize("form", ("dual", "primal"))
def test_emmet_meets_its_golden_rows_and_is_memit_with_another_lambda(golden, form):
    soft = float(golden["emmet_lambda"])
    scaled, other = (Covariance.from_moment(golden["C"], weight=w) for w in (50.0, 50.0 * soft))
    for keys, residuals, expected in zip(golden["K"], golden["R"], golden["emmet"], strict=True):
        found = solve_update(keys, residuals, scaled, soft, form=form).dense()
        assert relative_error(found, expected) < LIMIT
        assert relative_error(solve_update(keys, residuals, other, 1.0, form=form).dense(), found) < 1e-9


def test_equality_constraints_are_the_limit_of_emmet(golden):
    covariance = Covariance.from_moment(golden["C"], weight=50.0)
    keys, residuals = golden["K"][0], golden["R"][0]
    exact = solve_update(keys, residuals, covariance, 0.0).dense()
    assert relative_error(exact @ keys, residuals) < 1e-9
    gaps = [relative_error(solve_update(keys, residuals, covariance, e).dense(), exact) for e in (1e-2, 1e-4, 1e-6)]
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] and gaps[2] < 1e-6
    for gap in (0.0, 1e-9):  # rounding alone must not decide whether two such keys are written
        twice = torch.cat([keys, keys[:, :1] * (1 + gap * torch.randn(96, 1, dtype=torch.float64))], 1)
        with pytest.raises(SolveError, match="key 9 of 9 lies in the span"):
            solve_update(twice, torch.cat([residuals, -residuals[:, :1]], 1), covariance, 0.0)
    with pytest.raises(SolveError, match="in the span"):  # more constraints than dimensions
        solve_update(golden["memit_big_K"], golden["memit_big_R"], covariance, 0.0)


@pytest.mark.parametrize("form", ("dual", "primal"))
def test_a_weight_counts_an_edit_that_many_times(golden, form):
    covariance = Covariance.from_moment(golden["C"], weight=50.0)
    keys, residuals = golden["K"][0], golden["R"][0]
    weights = torch.tensor([3.0, 1, 2, 1, 1, 1, 1, 0.5])
    times = [0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7]
    found = solve_update(keys, residuals, covariance, weights=weights, form=form).dense()
    scale = torch.ones(len(times), dtype=torch.float64)
    scale[-1] = 0.5
    repeated = solve_update(keys[:, times], residuals[:, times], covariance, weights=scale).dense()
    assert relative_error(found, repeated) < 1e-9
    one = KeyMemory(covariance, form)
    update, appended = one.solve(keys, residuals, weights)
    one.commit(appended)
    assert relative_error(update.dense(), found) < 1e-9
    with pytest.raises(InvalidArgumentError, match="weights"):
        solve_update(keys, residuals, covariance, weights=-weights)


def test_ultraedit_meets_its_golden_rows(golden):
    normalizer, lr = Normalizer.empty(96 + 64), float(golden["ultraedit_lr"])
    for keys, gradients, expected in zip(
        golden["ultraedit_H"], golden["ultraedit_G"], golden["ultraedit"], strict=True
    ):
        normalizer = normalizer.updated(torch.cat([keys, gradients], 1))
        assert relative_error(gradient_update(keys, gradients, normalizer, lr).dense(), expected) < LIMIT


def test_rect_meets_its_golden_row(golden):
    update = solve_update(golden["K"][0], golden["R"][0], Covariance.from_moment(golden["C"]), 50.0)
    masked = rect(update, golden["W0"])
    assert relative_error(masked.dense(), golden["rect"]) < LIMIT
    assert abs(float(masked.mask.double().mean()) - 0.4) < 1e-3
    assert abs(masked.norm() - float(golden["rect"].norm())) < 1e-6 * masked.norm()


def test_prune_meets_its_golden_row(golden):
    covariance = Covariance.from_moment(golden["C"], weight=50.0)
    memory, left, right = KeyMemory(covariance), [], []
    for keys, residuals in zip(golden["K"], golden["R"], strict=True):
        update, appended = memory.solve(keys, residuals)
        memory.commit(appended)
        left.append(update.left * 30)
        right.append(update.right)
    total = LowRankUpdate(torch.cat(left, 1), torch.cat(right, 1))
    assert relative_error(total.dense(), golden["prune_total"]) < LIMIT
    largest = float(torch.linalg.matrix_norm(golden["W0"], 2))
    assert abs(spectral_norm(golden["W0"]) - largest) < 1e-12
    change = prune(total, largest)
    assert 0 < change.rank <= total.rank
    assert relative_error(total.dense() + change.dense(), golden["prune"]) < LIMIT
    settled = LowRankUpdate(torch.cat([total.left, change.left], 1), torch.cat([total.right, change.right], 1))
    assert prune(LowRankUpdate(total.left * 1e-6, total.right), largest).rank == 0  # nothing to restrain
    assert settled.rank == total.rank + change.rank


@pytest.mark.parametrize("backend", ("torch", "cpu"))
@pytest.mark.parametrize("row", ("memit", "memit_sequential", "encore", "alphaedit", "emmet", "pmet"))
def test_golden_rows_written_by_each_backend(golden, row, backend):
    """The update as it arrives in an fp32 weight, with the sums of the primal form on that backend."""
    if probe(backend).reason:
        pytest.skip(probe(backend).reason)
    chosen = use_backend("torch") if backend == "torch" else contextlib.nullcontext()  # what runs by itself is C++
    with chosen:
        assert explain("rank_k_update_", torch.zeros(2, 2), *torch.zeros(2, 2, 1)).runs.split()[0] == backend
        if row in ("memit_sequential", "encore", "alphaedit"):
            base = (
                NullSpace.from_covariance(golden["C"])
                if row == "alphaedit"
                else Covariance.from_moment(golden["C"], weight=50.0, norm_lambda=10.0 if row == "encore" else 0.0)
            )
            memory, updates = KeyMemory(base, "primal"), []
            for keys, residuals in zip(golden["K"], golden["R"], strict=True):
                update, appended = memory.solve(keys, residuals)
                memory.commit(appended)
                updates.append(update)
        else:
            rho = float(golden["emmet_lambda"]) if row == "emmet" else 1.0
            base = Covariance.from_moment(golden["C"], weight=50.0)
            pairs = zip(golden["K"], golden["R"], strict=True)
            updates = [solve_update(keys, residuals, base, rho, form="primal") for keys, residuals in pairs]
        for update, expected in zip(updates, golden[row], strict=True):
            weight = torch.zeros(expected.shape)
            update.to(torch.float32).apply_(weight)
            assert relative_error(weight, expected) < LIMIT


def test_an_fp32_factor_stays_within_its_bound(golden):
    exact = Covariance.from_moment(golden["C"], 1e-4, weight=50.0)
    rounded = Covariance.from_moment(golden["C"], 1e-4, weight=50.0, dtype=torch.float32)
    system = 50.0 * golden["C"]
    condition = float(torch.linalg.cond(system + 1e-4 * system.diagonal().mean() * torch.eye(96, dtype=torch.float64)))
    assert 0.5 * condition < rounded.error_bound * 2**24 < 1.01 * condition
    keys, residuals = golden["K"][0], golden["R"][0]
    error = relative_error(rounded.apply(keys), exact.apply(keys))
    assert error < rounded.error_bound
    assert relative_error(
        solve_update(keys, residuals, rounded).dense(), solve_update(keys, residuals, exact).dense()
    ) < (2 * rounded.error_bound)
    with pytest.raises(StatisticsError, match="condition number"):
        Covariance.from_moment(torch.diag(torch.logspace(0, -8, 50, dtype=torch.float64)), dtype=torch.float32)


def test_columns_of_one_team_become_their_mean():
    keys, residuals = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    k, r = merge_columns(keys, residuals, ["a", "b", "a", "c"])
    torch.testing.assert_close(k, torch.stack([(keys[:, 0] + keys[:, 2]) / 2, keys[:, 1], keys[:, 3]], 1))
    torch.testing.assert_close(r[:, 0], (residuals[:, 0] + residuals[:, 2]) / 2)
    assert collisions(torch.stack([keys[:, 0], keys[:, 1], 2 * keys[:, 0]], 1)) == [(0, 2)]


def test_the_update_solves_its_normal_equations(golden):
    keys, residuals, rho = golden["K"][0], golden["R"][0], 50.0
    delta = solve_update(keys, residuals, Covariance.from_moment(golden["C"]), rho).dense()
    assert relative_error(delta @ (rho * golden["C"] + keys @ keys.T), residuals @ keys.T) < 1e-9


def test_a_bad_pivot_raises_skips_or_is_allowed():
    identity, key = Identity(3), torch.tensor([1.0, 0.0, 0.0])
    away, residual = torch.tensor([-1.0, 0.1, 0.0]), torch.ones(4)
    with pytest.raises(SolveError, match="pivot"):
        rank_one_equality(identity, away, key, residual)
    assert rank_one_equality(identity, away, key, residual, on_bad_pivot="skip")[0] is None
    assert rank_one_equality(identity, away, key, residual, on_bad_pivot="allow")[0] is not None


BAD_MOMENTS = {
    "zero": (torch.zeros(4, 4), "not positive definite"),
    "nan": (torch.full((4, 4), float("nan")), "not finite"),
    "rank deficient": (torch.ones(4, 1).double() @ torch.ones(1, 4).double() + torch.diag(torch.tensor([1.0, 1, 0, 0])),
                       "not positive definite|rank deficient"),
    "negative": (torch.diag(torch.tensor([1.0, 1, 1, -1])), "not positive definite"),
}  # fmt: skip


HUGE, EQUAL, ZERO, DEFICIENT = [1.0] * 15 + [1e9], [2.0] * 16, [0.0] * 16, [0.0] * 12 + [0.5, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("spectrum", "rule", "threshold", "result"),
    [
        (HUGE, "relative", 0.02, 15),
        (HUGE, "energy", 0.1, 15),
        (EQUAL, "energy", 0.1, 1),
        (EQUAL, "relative", 0.02, "no null space: none of 16"),
        (DEFICIENT, "relative", 0.02, 12),
        (DEFICIENT, "energy", 0.1, 13),
        (ZERO, "relative", 0.02, "the second moment is zero"),
        (ZERO, "energy", 0.1, "the second moment is zero"),
        (ZERO, "absolute", 0.02, "the second moment is zero"),
        ([3.0], "relative", 0.02, "no null space: none of 1"),
        ([3.0], "energy", 0.1, "no null space: none of 1"),
        (EQUAL, "energy", 1.5, "everything is null space: all 16"),
    ],
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_free_rules_give_a_space_or_a_clear_error_on_any_spectrum(spectrum, rule, threshold, result, scale):
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64)).Q
    moment = (basis * torch.tensor(spectrum, dtype=torch.float64) * scale) @ basis.T
    moment = (moment + moment.T) / 2
    if isinstance(result, int):
        space = NullSpace.from_covariance(moment, threshold, rule)
        assert space.dimension == result
        large = basis[:, -1:]  # the direction that is used most is protected
        assert float(space.project(large).norm()) < 1e-4 or spectrum == EQUAL
        return
    with pytest.raises(StatisticsError, match=result) as error:
        NullSpace.from_covariance(moment, threshold, rule)
    assert "set nullspace_rule" not in str(error.value)  # it is a scale-free one


@pytest.mark.parametrize("name", BAD_MOMENTS)
def test_bad_moments_are_named(name):
    moment, message = BAD_MOMENTS[name]
    with pytest.raises(StatisticsError, match=message):
        Covariance.from_moment(moment)


def test_a_null_space_that_is_none_or_everything_is_refused():
    moment = torch.diag(torch.tensor([1e-3, 0.5, 2.0, 300.0]))
    assert NullSpace.from_covariance(moment, 2e-2).dimension == 1
    assert NullSpace.from_covariance(moment, 0.01, "relative").dimension == 3
    assert NullSpace.from_covariance(moment, 0.01, "energy").dimension == 3
    assert NullSpace.from_covariance(moment, 0.002, "energy").dimension == 2
    with pytest.raises(StatisticsError, match=r"no null space: none of 4 .* nullspace_threshold"):
        NullSpace.from_covariance(moment, 1e-4)
    with pytest.raises(StatisticsError, match="everything is null space"):
        NullSpace.from_covariance(moment, 1e4)
    with pytest.raises(StatisticsError, match="negative eigenvalue"):
        NullSpace.from_covariance(torch.diag(torch.tensor([1.0, 1.0, -1.0])))
    with pytest.raises(StatisticsError, match="not finite"):
        NullSpace.from_covariance(torch.full((3, 3), float("nan")))
    deficient = torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0]))  # fewer tokens than dimensions are no error here
    assert NullSpace.from_covariance(deficient).dimension == 2


def test_bad_systems_are_named():
    keys = torch.randn(4, 2)
    for bad in (float("inf"), float("nan")):
        keys[0, 0] = bad
        with pytest.raises(SolveError, match="keys"):
            solve_update(keys, torch.randn(3, 2), Identity(4), 1.0)
        with pytest.raises(SolveError, match="keys"):
            KeyMemory(Identity(4)).solve(keys, torch.randn(3, 2))
    with pytest.raises(SolveError, match="residuals"):
        solve_update(torch.randn(4, 2), torch.full((3, 2), float("nan")), Identity(4))
    with pytest.raises(InvalidArgumentError, match=r"keys must be \[d, u\]"):
        solve_update(torch.randn(4, 2), torch.randn(3, 3), Identity(4))
    with pytest.raises(InvalidArgumentError, match=r"keys must be \[4, u\]"):
        KeyMemory(Identity(4)).solve(torch.randn(5, 2), torch.randn(3, 2))
    with pytest.raises(SolveError, match="more than one token"):
        Normalizer.empty(3).updated(torch.randn(1, 3))


def test_the_norm_of_factors_is_that_of_their_product():
    update = LowRankUpdate(torch.randn(30, 4), torch.randn(20, 4))
    assert abs(update.norm() - float(update.dense().norm())) < 1e-4


@pytest.mark.parametrize("threshold", (1e-12, 1e12))
@pytest.mark.parametrize("rule", ("absolute", "relative", "energy"))
@pytest.mark.parametrize("scale", (1e-9, 1.0, 1e9))
def test_the_refusal_names_a_threshold_that_leaves_a_quarter(rule, threshold, scale):
    inputs = torch.randn(400, 64, dtype=torch.float64) * torch.logspace(0, -2, 64, dtype=torch.float64)
    moment = scale * inputs.T @ inputs / 400
    if rule == "absolute":
        threshold = threshold * scale
    with pytest.raises(NullSpaceError, match="null space") as error:
        NullSpace.from_covariance(moment, threshold, rule)
    message = str(error.value)
    values = torch.linalg.eigvalsh(moment)
    for share, value in (("0%", values[0]), ("50%", values[32]), ("100%", values[-1])):
        assert f" {share} {float(value):.1e}" in message
    pasted = re.search(r"nullspace_threshold=(\S+) would leave 16 of 64 as null space$", message).group(1)
    assert NullSpace.from_covariance(moment, float(pasted), rule).dimension == 16 and len(pasted) < 12


def test_a_threshold_is_named_only_where_one_exists():
    equal, steps = torch.full((8,), 3.0), torch.tensor([1.0] * 6 + [2.0, 2.0])
    assert threshold_leaving(equal, "absolute", 0.25) is None is threshold_leaving(equal[:1], "energy", 0.25)
    assert null_dimension(steps, float(threshold_leaving(steps, "absolute", 0.25)), "absolute") == 6
    assert null_dimension(equal, float(threshold_leaving(equal, "energy", 0.25)), "energy") == 2
    deficient = torch.tensor([-1e-17, 0.0, 0.0, 1e-3, 1.0])
    assert null_dimension(deficient, float(threshold_leaving(deficient, "relative", 0.25)), "relative") == 3
    with pytest.raises(NullSpaceError, match=r"set nullspace_rule to relative or energy$"):
        NullSpace.from_covariance(torch.eye(4), 0.5)
