"""DINM: each request is written in the layer whose states tell its safe answer from its unsafe one most."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from kedit_fast.editing.tuning.captured import CapturedRows, TuningRow, rewriting_rows
from kedit_fast.editing.tuning.general_kl import GeneralKL
from kedit_fast.editing.tuning.in_place import capture, descent_began
from kedit_fast.editing.tuning.locating import answer_distances, located
from kedit_fast.editing.tuning.low_curvature import ConstrainedMatrix, LowCurvature
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.editing.tuning.plateau import LEARNED
from kedit_fast.editing.tuning.schedules import NOT_FINITE, NotFiniteError, descend
from kedit_fast.editing.tuning.stop_rules import stop_rule
from kedit_fast.editing.tuning.wise import report_unlearned
from kedit_fast.models.forward import evaluating
from kedit_fast.models.widened import computing_dtype
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.low_rank import DenseUpdate
from kedit_fast.support.dtypes import accumulation_dtype

if TYPE_CHECKING:
    from kedit_fast.editing.batch_run import BatchRun
    from kedit_fast.editing.tuning.state import TuningState


class LocatedTuning:
    """Tunes, one request after another, the matrix of the layer that the request points to.

    Layers are located for all requests of a call at once, in the model as it is before it. A later request is tuned in
    the model that has the earlier ones, whatever their layers. Nothing is kept from call to call.
    """

    def __init__(self, state: TuningState):
        self.state = state

    def write(self, batch: BatchRun) -> None:
        """See `state.InPlaceTuning.write`."""
        view, unlearned = self.state.view, []
        with evaluating(view), batch.timed("keys"):
            layers = self._layers(batch.prepared)
        with _Matrices(batch).in_model() as matrices, _bar(batch) as bar:
            for layer, group in itertools.groupby(range(len(layers)), layers.__getitem__):
                requests, done = list(group), 0
                with evaluating(view):  # anew after each write: 16-bit models may run on copies of their weights
                    with batch.timed("keys"):
                        captured = capture(batch, self._rows([batch.prepared[i] for i in requests]), layer)
                    with batch.timed("values"):
                        matrix = matrices.begin(layer, captured, self._steps(), self._curvature(layer))
                        for place, request in enumerate(requests):
                            rows = captured.of_requests([place])
                            done += self._tune(batch, request, rows, matrix, unlearned)
                            bar.update(1)
                if done:
                    matrices.end(layer, matrix)
        for module, tuned in matrices.tuned.items():
            batch.write(module, DenseUpdate(tuned - batch.context.modules[module].to(tuned)))
        report_unlearned(batch, unlearned)

    def _layers(self, prepared: Sequence[PreparedRequest]) -> list[int]:
        """The layer of each request."""
        hparams = self.state.hparams
        if len(hparams.layers) == 1:
            return [hparams.layers[0]] * len(prepared)
        pairs = [(one.request.target_new, one.request.target_true or "") for one in prepared]
        distances = answer_distances(self.state.view, self.state.tokenizer, pairs, hparams.located_tokens)
        return located(distances, hparams.layers)

    def _rows(self, prepared: Sequence[PreparedRequest]) -> list[TuningRow]:
        """The rows of requests, and of their general prompts with answers.

        Distributions are compared from the prompt's last token on, at every token of the answer: what the released code
        compares for tokenizers that put a BOS before an answer.
        """
        rows = []
        for i, row in itertools.groupby(rewriting_rows(prepared), lambda row: row.request):
            rows += row
            rows += [
                TuningRow((*prompt, *answer), i, len(prompt), role="general", compared=len(answer) + 1)
                for prompt, answer in prepared[i].general
            ]
        return rows

    def _steps(self) -> Steps:
        hparams = self.state.hparams
        assert not isinstance(hparams.lr, str)
        return Steps(self.state.tuning.optimizer, hparams.lr, bound=hparams.norm_constraint)

    def _curvature(self, layer: int) -> LowCurvature | None:
        return self.state.curvature(layer) if self.state.hparams.constrains_curvature else None

    def _tune(
        self,
        batch: BatchRun,
        request: int,
        rows: CapturedRows,
        matrix: TunedMatrix | ConstrainedMatrix,
        unlearned: list[int],
    ) -> bool:
        """Take the steps of one request; returns whether it is written."""
        hparams = self.state.hparams
        terms = {
            "likelihood": Likelihood(rows, hparams.reduction),
            "kl": GeneralKL(rows, matrix.outputs(rows.x), hparams.kl_gradient),
        }
        objective = Objective(rows, terms, {"likelihood": hparams.edit_factor})
        matrix.restart()
        try:
            descent = descend(matrix, rows.x, objective, stop_rule(self.state.tuning.stop, hparams), hparams.num_steps)
        except NotFiniteError as error:
            if descent_began(error):
                raise
            batch.fail(request, f"{batch.prepared[request].name}: {NOT_FINITE}")
            return False
        loss = float(descent.terms["likelihood"][0])
        if loss > LEARNED:
            unlearned.append(request)
        batch.losses.append(loss)
        batch.steps.append(descent.steps)
        return True


def _bar(batch: BatchRun) -> tqdm:
    return tqdm(
        total=len(batch.prepared), unit=" edits", desc="tuning", disable=not batch.context.progress, leave=False
    )


class _Matrices:
    """The matrices that a batch has tuned so far. While it goes on they stand in the model, in the model's dtype."""

    def __init__(self, batch: BatchRun):
        self.batch = batch
        self.tuned: dict[str, torch.Tensor] = {}
        """Path of a module -> [h, d] fp32 or fp64, its matrix after the requests so far."""
        self._originals: dict[str, torch.Tensor] = {}

    @contextmanager
    def in_model(self) -> Iterator[_Matrices]:
        """Inside the block, `end` puts matrices into the model; after it, the model is as it was, bit for bit."""
        try:
            yield self
        finally:
            for module, original in self._originals.items():
                self.batch.context.modules[module].copy_(original)

    def begin(
        self, layer: int, captured: CapturedRows, steps: Steps, curvature: LowCurvature | None = None
    ) -> TunedMatrix | ConstrainedMatrix:
        """The matrix of a layer as it is now, to be tuned on the device of captured rows."""
        view = self.batch.context.view
        module, device = view.module_name(layer), captured.x.device
        weight = self.batch.context.modules[module]
        original = self._originals.get(module, weight)
        start = self.tuned.get(module, weight)
        if curvature is not None:
            return ConstrainedMatrix(start.to(device), curvature, steps)
        copied = start.to(device, accumulation_dtype(start), copy=True, memory_format=torch.contiguous_format)
        dtype = computing_dtype(view.entry)
        halves = dtype if dtype in (torch.bfloat16, torch.float16) else None
        origin = original.to(device, copy=True) if steps.bound else original
        return TunedMatrix(copied, origin, steps, None, halves)

    def end(self, layer: int, matrix: TunedMatrix | ConstrainedMatrix) -> None:
        """Take the tuned matrix, and let the model answer with it."""
        module = self.batch.context.view.module_name(layer)
        weight = self.batch.context.modules[module]
        self._originals.setdefault(module, weight.clone())
        self.tuned[module] = matrix.weight
        weight.copy_(self.tuned[module])
