"""Methods whose tuned matrix takes the place of the model's: FT-L, FT-M, LocFT-BF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from kedit_fast.editing.tuning.captured import CapturedRows, TuningRow, rewriting_rows
from kedit_fast.editing.tuning.low_curvature import ConstrainedMatrix
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.editing.tuning.schedules import NOT_FINITE, NotFiniteError, descend, epochs, gradient_of
from kedit_fast.editing.tuning.stop_rules import stop_rule
from kedit_fast.errors import MethodError
from kedit_fast.methods.tuning_recipe import Order
from kedit_fast.models.forward import evaluating
from kedit_fast.models.widened import computing_dtype
from kedit_fast.solver.low_rank import DenseUpdate

if TYPE_CHECKING:
    from kedit_fast.editing.batch_run import BatchRun
    from kedit_fast.editing.tuning.state import TuningState


class EditedTuning:
    """Tunes the edited matrix of one layer, and writes the result into the model.

    Nothing is kept from call to call: the next one starts from the weight as it is then, with a new optimizer.
    """

    def __init__(self, state: TuningState):
        self.state = state
        self._end = end_token(state) if state.tuning.eos and state.hparams.train_end else None

    def write(self, batch: BatchRun) -> None:
        """See `state.InPlaceTuning.write`."""
        state, context = self.state, batch.context
        (layer,) = context.hparams.layers
        module = state.view.module_name(layer)
        weight = context.modules[module]
        rows = rewriting_rows(batch.prepared, end=self._end, at_last=state.tuning.likelihood == "last")
        rows = rows_that_fit(batch, rows)
        if not rows:
            return
        with evaluating(state.view):
            with batch.timed("keys"):
                captured = capture(batch, rows, layer)
            with batch.timed("values"):
                matrix = self._matrix(weight.to(captured.x.device), layer)
                Run(batch, captured, matrix, self._objective).run()
        if len(batch.skipped) < len(batch.prepared):
            batch.write(module, DenseUpdate(matrix.weight - weight.to(matrix.weight)))

    def _matrix(self, weight: torch.Tensor, layer: int) -> TunedMatrix | ConstrainedMatrix:
        state, hparams = self.state, self.state.hparams
        steps = Steps(state.tuning.optimizer, hparams.lr, bound=hparams.norm_constraint)
        if not hparams.constrains_curvature:
            return TunedMatrix.of(weight, steps, dtype=computing_dtype(state.view.entry))
        return ConstrainedMatrix(weight, state.curvature(layer), steps)

    def _objective(self, rows: CapturedRows) -> Objective:
        return Objective(rows, {"likelihood": Likelihood(rows, self.state.hparams.reduction)})


def end_token(state: TuningState) -> int:
    """The token that ends an answer.

    Raises:
        MethodError: the tokenizer names none, or one that the model does not know.
    """
    end = getattr(state.tokenizer, "eos_token_id", None)
    if end is None or end >= state.view.vocabulary:
        raise MethodError(
            f"{state.recipe.name} trains the token that ends an answer, and the tokenizer "
            + ("names none (eos_token)" if end is None else f"names {end}, which the model does not know")
        )
    return end


def capture(batch: BatchRun, rows: Sequence[TuningRow], layer: int) -> CapturedRows:
    """Captured rows of a batch, as `TuningState.capture`."""
    context = batch.context
    weight = context.modules[context.view.module_name(layer)]
    assert context.tuning is not None
    return context.tuning.capture(rows, layer, weight)


def rows_that_fit(batch: BatchRun, rows: Sequence[TuningRow]) -> list[TuningRow]:
    """The rows of requests that the model can take; the others are left out of the batch.

    A request fits without the token that ends an answer, or it would not have been prepared.
    """
    most = batch.context.view.max_length
    too_long = {row.request: len(row.ids) for row in rows if most is not None and len(row.ids) > most}
    for request, tokens in too_long.items():
        name = batch.prepared[request].name
        batch.fail(request, f"{name}: {tokens} tokens with context and target, the model takes {most}")
    return [row for row in rows if row.request not in too_long]


class Run:
    """The steps of one batch on one matrix.

    Args:
        batch: takes losses and steps, and requests that are skipped.
        captured: the rows of all its requests.
        matrix: what is tuned.
        objective_of: the loss of some of the rows.
    """

    def __init__(
        self,
        batch: BatchRun,
        captured: CapturedRows,
        matrix: TunedMatrix | ConstrainedMatrix,
        objective_of: Callable[[CapturedRows], Objective],
    ):
        self.batch, self.captured, self.matrix, self.objective_of = batch, captured, matrix, objective_of
        self.hparams = batch.context.hparams

    def run(self) -> None:
        """Take the steps, in the order of the recipe.

        Raises:
            RequestError: with `on_error` "raise", requests whose loss is not finite.
            NotFiniteError: steps that leave numbers that are not finite.
        """
        tuning = self.batch.context.recipe.tuning
        assert tuning is not None
        ORDERS[tuning.order](self)

    def depth(self) -> None:
        """One request after another, each to its stop with a new optimizer."""
        tuning = self.batch.context.recipe.tuning
        assert tuning is not None
        rule = stop_rule(tuning.stop, self.hparams)
        requests = tqdm(
            self.captured.requests, unit=" edits", desc="tuning", disable=not self.batch.context.progress, leave=False
        )
        for request in requests:
            before = self.matrix.snapshot() if self.batch.on_error == "skip" else None
            rows = self.captured.of_requests([request])
            self.matrix.restart()
            try:
                descent = descend(self.matrix, rows.x, self.objective_of(rows), rule, self.hparams.num_steps)
            except NotFiniteError as error:
                if descent_began(error):
                    raise
                self._leave_out([request])
                if before is not None:
                    self.matrix.set(before)
                continue
            self.batch.losses.append(descent.losses[-1])
            self.batch.steps.append(descent.steps)

    def breadth(self) -> None:
        """Epochs of mini-batches of all requests."""
        start, requests = self.matrix.snapshot(), list(self.captured.requests)
        while requests:
            try:
                with tqdm(
                    total=self.hparams.num_steps,
                    unit=" epochs",
                    desc="tuning",
                    disable=not self.batch.context.progress,
                    leave=False,
                ) as bar:
                    result = epochs(
                        self.matrix,
                        self.captured,
                        self.objective_of,
                        most=self.hparams.num_steps,
                        minibatch=self.hparams.minibatch,
                        stop_loss=self.hparams.stop_loss,
                        seed=self.batch.context.seed,
                        requests=requests,
                        seen=lambda epoch: bar.update(1),
                    )
            except NotFiniteError:
                self.matrix.set(start)
                self.matrix.restart()
                bad = self._not_finite(requests)
                if not bad:
                    raise
                self._leave_out(bad)
                requests = [request for request in requests if request not in bad]
                continue
            self.batch.losses += [result.losses[request] for request in requests]
            self.batch.steps += [result.steps[request] for request in requests]
            return

    def _not_finite(self, requests: Sequence[int]) -> list[int]:
        """Requests whose loss is not finite before any step."""
        loss, _, _ = gradient_of(self.matrix, self.captured, requests, self.objective_of)
        return [
            request for request, value in zip(requests, loss.tolist(), strict=True) if not abs(value) < float("inf")
        ]

    def _leave_out(self, requests: Sequence[int]) -> None:
        for request in requests:
            self.batch.fail(request, f"{self.batch.prepared[request].name}: {NOT_FINITE}")


def descent_began(error: NotFiniteError) -> bool:
    """Whether steps were taken before the loss was not finite: then the steps are to blame, not the request."""
    return error.steps > 0


ORDERS: dict[Order, Callable[[Run], None]] = {"depth": Run.depth, "breadth": Run.breadth}
"""Order of a recipe -> what takes its steps. A codebook has its own."""
