"""MEMOIR: one matrix beside the model's, of which each edit changes the columns of its prompt's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kedit_fast.editing.erasure import tokenized_texts
from kedit_fast.editing.tuning.captured import CapturedRows, TuningRow, rewriting_rows
from kedit_fast.editing.tuning.history import History
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.editing.tuning.plateau import Ending, until_plateau
from kedit_fast.editing.tuning.wise import TOGETHER, report_unlearned
from kedit_fast.errors import MethodError
from kedit_fast.memories.memory import FingerprintMemory
from kedit_fast.memories.selection import set_bits, token_means
from kedit_fast.models.forward import evaluating
from kedit_fast.ops import top_features
from kedit_fast.requests.irrelevant import irrelevant_texts
from kedit_fast.support.matrix_bits import integer_view

if TYPE_CHECKING:
    from kedit_fast.editing.batch_run import BatchRun
    from kedit_fast.editing.tuning.state import TuningState


@dataclass(frozen=True)
class Residual:
    """The matrix beside the model's and its book, after some batches. Neither is ever written to."""

    weight: torch.Tensor | None = None
    """[d, h] fp32 (fp64 of fp64 models), transposed: the columns of a request are rows. None for zeros."""
    book: torch.Tensor | None = None
    """[K, ceil(d / 8)] uint8, the features of each edited prompt; None for none."""


class FingerprintTuning:
    """The edits of one editor as a matrix beside the model's. Nothing of the model changes.

    Args:
        state: what the editor tunes.
    """

    def __init__(self, state: TuningState):
        self.state, self.layer = state, state.hparams.layers[0]
        self.texts = irrelevant_texts(state.irrelevant)
        size = state.view.weight(self.layer).shape[1]
        if state.hparams.top_k > size:
            raise MethodError(f"top_k = {state.hparams.top_k}: layer {self.layer} has {size} inputs")
        self.top_k = state.hparams.top_k or max(1, round(state.hparams.top_share * size))
        generator = torch.Generator().manual_seed(state.seed)
        self.permutation = torch.randperm(size, generator=generator)
        self.history: History[Residual] = History(Residual(), state.hparams.undo_window)
        self._center: torch.Tensor | None = None
        self._pending: Residual | None = None

    @property
    def base(self) -> torch.Tensor:
        """The model's matrix [h, d]."""
        return self.state.view.weight(self.layer)

    def center(self) -> torch.Tensor:
        """The mean features [d] of the unrelated texts, on the device of the layer; measured for the first edit.

        Later edits are told apart by the same one, which is part of the memory.
        """
        if self._center is None:
            state = self.state
            ids = tokenized_texts(state.view, state.tokenizer, self.texts, state.prompt_format)
            rows = [TuningRow(tuple(row), i, len(row), role="irrelevant") for i, row in enumerate(ids)]
            captured = state.capture(rows, self.layer)
            self._center = token_means(captured.x, captured.starts).mean(0).to(self.base.device)
        return self._center

    def write(self, batch: BatchRun) -> None:
        """Tune on the requests of a batch, one after another; `commit` makes the result the state."""
        state, before, base = self.state, self.history.current, self.base
        wide = torch.promote_types(base.dtype, torch.float32)
        size, out = base.shape[1], base.shape[0]
        if before.weight is None:
            self._center = None  # the model may have been edited since a memory that was undone
            weight = torch.zeros(size, out, dtype=wide, device=base.device)
        else:
            weight = before.weight.clone()
        book = [] if before.book is None else list(before.book)
        known = {bytes(row.cpu().numpy()) for row in book}
        unlearned: list[int] = []
        with evaluating(state.view):
            center = self.center()
            for begin in range(0, len(batch.prepared), TOGETHER):
                part = batch.prepared[begin : begin + TOGETHER]
                with batch.timed("keys"):
                    captured = state.capture(rewriting_rows(part), self.layer)
                for i, request in enumerate(part):
                    rows = captured.of_requests([i])
                    mask = self.fingerprint(rows, center)
                    with batch.timed("values"):
                        ending = self._tune(weight, rows, mask)
                    if not math.isfinite(ending.loss):
                        batch.fail(begin + i, f"{request.name}: the loss or its gradient is not finite")
                        continue
                    if (plain := bytes(mask.cpu().numpy())) not in known:
                        known.add(plain)
                        book.append(mask)
                    if not ending.learned:
                        unlearned.append(begin + i)
                    batch.losses.append(ending.likelihood)
                    batch.steps.append(ending.steps)
        report_unlearned(batch, unlearned)
        self._pending = Residual(weight, torch.stack(book) if book else None)

    def fingerprint(self, rows: CapturedRows, center: torch.Tensor) -> torch.Tensor:
        """Features [ceil(d / 8)] uint8 of a request's bare prompt, the first of its rows."""
        tokens = rows.rows[0].prompt
        starts = torch.tensor([0, tokens], device=rows.x.device)
        permutation = self.permutation.to(rows.x.device)
        return top_features(rows.x[:tokens], starts, center, self.top_k, permutation)[0]

    def _tune(self, weight: torch.Tensor, rows: CapturedRows, mask: torch.Tensor) -> Ending:
        """Tune the rows of `weight` that a mask names, in place; where the loss is not finite, none changes."""
        hparams = self.state.hparams
        columns = set_bits(mask[None], weight.shape[0])[0].nonzero()[:, 0]  # [k]
        assert not isinstance(hparams.lr, str)
        steps = Steps("sgd", hparams.lr, hparams.weight_decay, clip=hparams.grad_clip)
        part = weight.index_select(0, columns).T.contiguous()  # [h, k]
        halves = rows.x.dtype if rows.x.dtype in (torch.bfloat16, torch.float16) else None
        matrix = TunedMatrix(part, part, steps, None, halves)
        x = rows.x.index_select(1, columns)  # [N, k]
        objective = Objective(rows, {"likelihood": Likelihood(rows, hparams.reduction)})
        ending = until_plateau(
            objective,
            matrix,
            x,
            lambda: rows.original + matrix.outputs(x).to(rows.original),
            hparams.num_steps,
            hparams.stop_loss,
            hparams.stop_change,
        )
        if not (math.isfinite(ending.loss) and bool(matrix.finite)):
            return replace(ending, loss=math.nan)
        if hparams.decay_entries == "weight":
            weight.mul_((1 - hparams.lr * hparams.weight_decay) ** ending.steps)
        weight.index_copy_(0, columns, matrix.weight.T)
        return ending

    def commit(self) -> None:
        """Make the open batch the state."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        self.history.push(state, _restorer(self.history.current, state))

    def settle(self, batches: int) -> bool:
        """Drop an open batch and return to the state after so many batches; returns whether that is another one."""
        self._pending = None
        return self.history.settle(batches)

    def memory(self, about: Mapping[str, object]) -> FingerprintMemory | None:
        """What answers beside the weights, or None before the first edit; `about` are fields of every memory."""
        residual, base = self.history.current, self.base
        if residual.weight is None or residual.book is None:
            return None
        return FingerprintMemory(
            weight=residual.weight.to(base),
            book=residual.book,
            center=self.center(),
            permutation=self.permutation.to(base.device),
            top_k=self.top_k,
            threshold=self.state.hparams.irr_threshold,
            **about,  # pyright: ignore[reportArgumentType] - fields of SideMemory
        )


def _restorer(before: Residual, after: Residual) -> Callable[[Residual], Residual]:
    """From the residual after a batch to that before it: the rows that the batch has changed, on the host."""
    assert after.weight is not None
    if before.weight is None or before.book is None:
        return lambda _: before
    entries = len(before.book)
    changed = (integer_view(before.weight) != integer_view(after.weight)).any(1).nonzero()[:, 0]
    values = before.weight[changed].cpu()

    def restored(later: Residual) -> Residual:
        assert later.weight is not None and later.book is not None
        return Residual(later.weight.index_copy(0, changed, values.to(later.weight)), later.book[:entries])

    return restored
