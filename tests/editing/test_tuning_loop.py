"""The loop that tunes one matrix, against the published formulas in float64 and against itself."""

from __future__ import annotations

import pytest
import torch
from toy_rows import GOLDEN, ToyRows, toy_rows

from kedit_fast.editing.tuning.captured import CapturedRows, TuningRow
from kedit_fast.editing.tuning.low_curvature import ConstrainedMatrix, LowCurvature
from kedit_fast.editing.tuning.margin import activation_change, margin_loss
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix, clip_factor
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.editing.tuning.schedules import NotFiniteError, descend, epochs, in_passes
from kedit_fast.editing.tuning.stop_rules import Below, Plateau, UsedUp

ORIGINAL = GOLDEN["toy.W0"]


def ids_of(name: str) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in GOLDEN[name].tolist()]


def ft_rows(at_last: bool = False) -> ToyRows:
    """The three requests of `ft.*`."""
    rows = []
    for i, (prompt, target) in enumerate(zip(ids_of("ft.prompts"), ids_of("ft.targets"), strict=True)):
        run = [] if at_last else target[:-1]
        rows.append(TuningRow((*prompt, *run), i, len(prompt), tuple(target), at_last=at_last))
    return toy_rows(rows)


def likelihood(rows: CapturedRows) -> Objective:
    return Objective(rows, {"likelihood": Likelihood(rows)})


def close(result: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(result, GOLDEN[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "at_last"), [("l_single", True), ("m_depth", False)])
def test_a_request_is_tuned_to_its_stop_as_published(name, at_last):
    most, lr, _ = GOLDEN[f"ft.{name}.args"].tolist()
    rows = ft_rows(at_last).of_requests([0])
    matrix = TunedMatrix.of(ORIGINAL, Steps("adam", lr))
    descent = descend(matrix, rows.x, likelihood(rows), Below(1e-2), int(most))
    close(matrix.weight, f"ft.{name}.W")
    close(torch.tensor(descent.losses, dtype=torch.float64), f"ft.{name}.losses")
    assert descent.steps == len(descent.losses) - int(descent.stopped)


def test_all_requests_in_one_batch_stay_in_the_box_as_published():
    most, lr, bound = GOLDEN["ft.l_clamped.args"].tolist()
    matrix = TunedMatrix.of(ORIGINAL, Steps("adam", lr, bound=bound))
    result = epochs(matrix, ft_rows(True), likelihood, most=int(most), minibatch=3, stop_loss=1e-2, seed=0)
    close(matrix.weight, "ft.l_clamped.W")
    close(torch.tensor(result.means, dtype=torch.float64), "ft.l_clamped.losses")


def test_mini_batches_below_the_bound_take_no_step_as_published(monkeypatch):
    most, lr, _ = GOLDEN["ft.bf.args"].tolist()
    monkeypatch.setattr("random.Random.shuffle", lambda self, items: None)  # the golden order is that of the requests
    matrix = TunedMatrix.of(ORIGINAL, Steps("adam", lr))
    result = epochs(matrix, ft_rows(), likelihood, most=int(most), minibatch=2, stop_loss=1e-2, seed=0)
    close(matrix.weight, "ft.bf.W")
    close(torch.tensor(result.means, dtype=torch.float64), "ft.bf.losses")
    assert result.steps[0] == result.steps[1] != result.steps[2]


class PaddedMargin:
    """WISE's margin with means over padded rows, as released. Padding has no input, so it changes nothing itself."""

    def __init__(self, rows: ToyRows):
        self.rows, self.places = rows, torch.zeros(0, dtype=torch.int64)

    def means(self, outputs: torch.Tensor) -> torch.Tensor:
        changes = activation_change(outputs, self.rows.original, torch.nn.functional.silu).split(self.rows.lengths)
        return torch.stack([part.sum() for part in changes]) / max(self.rows.lengths)

    def losses(self, outputs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        means = self.means(outputs)
        return margin_loss(means[:-1], means[-1:], GOLDEN["wise.margins"].tolist())[None]


@pytest.mark.parametrize("name", ("used_up", "stopped"))
def test_the_order_of_wise_is_the_published_one(name):
    most, lr, decay, bound, limit, change = GOLDEN[f"wise.loop.{name}.args"].tolist()
    rows = []
    for ids, mask, labels in zip(*(GOLDEN[f"wise.{part}"].tolist() for part in ("ids", "mask", "labels")), strict=True):
        valid = [token for token, inside in zip(ids, mask, strict=True) if inside]
        target = tuple(token for token in labels if token >= 0)
        role = "rewriting" if target else "irrelevant"
        rows.append(TuningRow(tuple(valid), 0, len(valid) - len(target), target, role))
    captured = toy_rows(rows)
    margin = PaddedMargin(captured)
    objective = Objective(captured, {"likelihood": Likelihood(captured, "published"), "margin": margin})
    steps = Steps("sgd", lr, decay=decay, decay_all=True, bound=bound)
    matrix = TunedMatrix.of(ORIGINAL, steps, GOLDEN["wise.keep_bits"])
    seen = []
    stop = Plateau(limit, change)
    descent = descend(
        matrix, captured.x, objective, stop, int(most), lambda outputs: seen.append(margin.means(outputs))
    )
    close(matrix.weight, f"wise.loop.{name}.W")
    close(torch.tensor(descent.losses, dtype=torch.float64), f"wise.loop.{name}.losses")
    assert descent.steps - int(not descent.stopped) == int(GOLDEN[f"wise.loop.{name}.iteration"])
    assert len(seen) == 1
    close(seen[0][:-1].mean(), f"wise.loop.{name}.activation")


def test_a_change_of_low_curvature_is_the_published_projection():
    curvature = LowCurvature.of(GOLDEN["anyedit.C"], GOLDEN["crisp.B"], 0.8)
    close(curvature.projected(GOLDEN["crisp.grad"]), "crisp.projected")
    assert int((~curvature.free).sum()) == int(GOLDEN["crisp.rank"])


def test_steps_of_low_curvature_never_leave_it():
    curvature = LowCurvature.of(GOLDEN["anyedit.C"], GOLDEN["crisp.B"], 0.8)
    rows = ft_rows()
    matrix = ConstrainedMatrix(ORIGINAL, curvature, Steps("adam", 0.05))
    first = likelihood(rows).losses(matrix.outputs(rows.x)).total.mean()
    result = epochs(matrix, rows, likelihood, most=30, minibatch=3, stop_loss=1e-2, seed=0)
    change = matrix.weight - ORIGINAL
    torch.testing.assert_close(curvature.projected(change), change, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.outputs(rows.x), rows.x @ matrix.weight.T, rtol=0, atol=1e-12)
    assert result.means[-1] < 0.5 * float(first) and float(change.norm()) > 0.1


def test_a_gradient_is_clipped_without_being_formed():
    left, right = torch.randn(7, 10), torch.randn(7, 16)
    norm = torch.linalg.vector_norm(left.T @ right)
    assert float(clip_factor(left, right, 1.0)) == pytest.approx(1 / float(norm), rel=1e-5)
    assert float(clip_factor(left, right, 2 * float(norm))) == 1


def test_the_result_does_not_depend_on_passes_and_follows_the_seed(monkeypatch):
    results = []
    for tokens, seed in ((2048, 0), (6, 0), (2048, 0), (2048, 7)):
        monkeypatch.setattr("kedit_fast.editing.tuning.schedules.PASS_TOKENS", {"cpu": tokens})
        rows, matrix = ft_rows(), TunedMatrix.of(ORIGINAL, Steps("adam", 0.05))
        assert len(in_passes(rows, [0, 1, 2])) == (1 if tokens > 6 else 3)
        epochs(matrix, rows, likelihood, most=4, minibatch=2, stop_loss=1e-2, seed=seed)
        results.append(matrix.weight)
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
    assert torch.equal(results[2], results[0])
    assert not torch.allclose(results[3], results[0], rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_is_said():
    rows = ft_rows().of_requests([1])
    rows.x[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="loss of its target") as error:
        descend(TunedMatrix.of(ORIGINAL, Steps("adam", 0.1)), rows.x, likelihood(rows), UsedUp(), 3)
    assert error.value.steps == 0
    with pytest.raises(NotFiniteError, match="lr too large"):
        rows = ft_rows().of_requests([1])
        descend(TunedMatrix.of(ORIGINAL, Steps("sgd", 1.7e308)), rows.x, likelihood(rows), UsedUp(), 5)
