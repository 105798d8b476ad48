"""What stays the same while one matrix is tuned: its inputs, and what stands beside its outputs, at every token.

Both are captured once for all requests of a call, in passes that end at the layer, and packed: one row after another,
without padding. They hold for the whole sequence of edits, as long as nothing but this matrix changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from kedit_fast.models.forward import pad
from kedit_fast.models.row_runner import RowPass, RowRunner, RowStore, record_rows, row_pass
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.free_memory import free_bytes
from kedit_fast.support.torch_state import plain_torch

RowRole = Literal["rewriting", "irrelevant", "general"]
"""What a row is for: to say the target; to be told from the edits; or to be answered as before."""
DEVICE_SHARE = 0.3
"""Share of a device's free memory that captured rows may take; beyond it they are stored on the host."""


@dataclass(frozen=True)
class TuningRow:
    """One row of tokens that a request is tuned with."""

    ids: tuple[int, ...]
    """Token ids that run."""
    request: int
    """Index of the request that it belongs to."""
    prompt: int
    """How many of the tokens are the prompt; the target is predicted from the last of them on."""
    target: tuple[int, ...] = ()
    """Token ids of which likelihood is taken."""
    role: RowRole = "rewriting"
    at_last: bool = False
    """Whether all tokens of the target are predicted at the prompt's last token (FT-L), not one after another."""
    compared: int = 0
    """The last so many tokens are those at which distributions are compared (rows whose role is "general")."""

    @property
    def places(self) -> list[int]:
        """The places, in the row, that predict the target's tokens."""
        return [self.prompt - 1 + (0 if self.at_last else t) for t in range(len(self.target))]


def rewriting_rows(
    prepared: Sequence[PreparedRequest], *, end: int | None = None, at_last: bool = False, whole: bool = False
) -> list[TuningRow]:
    """The rows of requests: the bare prompt and those after prefixes, each with the target.

    Args:
        prepared: u requests.
        end: token id that is put after each target, so that it is learned where an answer ends; None for none.
        at_last: all tokens of a target are predicted at the prompt's last token; the rows are the prompts alone.
        whole: rows hold the last token of the target too, which predicts nothing (WISE measures distances there).
    """
    rows = []
    for i, request in enumerate(prepared):
        target = request.target if end is None else (*request.target, end)
        run = () if at_last else target if whole else target[:-1]
        rows += [
            TuningRow((*prompt.ids, *run), i, len(prompt.ids), target, at_last=at_last) for prompt in request.rewriting
        ]
    return rows


@dataclass(frozen=True)
class CapturedRows:
    """R rows of N tokens of u requests, with what does not depend on the tuned matrix.

    Everything that runs the model is called in evaluation mode (`models.forward.evaluating`).
    """

    view: ModelView
    """The model."""
    layer: int
    """Whose matrix is tuned."""
    how: RowPass
    """How passes over the rows run."""
    rows: tuple[TuningRow, ...]
    """Sorted by request, as they were given."""
    x: torch.Tensor
    """[N, d] inputs of the matrix, in the dtype that passes compute in."""
    original: torch.Tensor
    """[N, h] fp32 (fp64 of fp64 models), the outputs of the matrix as it was, without bias."""
    beside: torch.Tensor | None
    """[N, h] in that dtype, what stands beside the outputs; see `models.row_runner.RecordedRows`."""

    @classmethod
    @plain_torch()
    def capture(
        cls,
        view: ModelView,
        rows: Sequence[TuningRow],
        layer: int,
        weight: torch.Tensor | None = None,
        budget: int | None = None,
        store: RowStore | None = None,
    ) -> CapturedRows:
        """Run rows up to a layer.

        Args:
            view: the model; nothing in it changes.
            rows: sorted by request.
            layer: whose matrix is going to be tuned.
            weight: [h, d] fp32 or fp64, the matrix as it is now; None for the model's.
            budget: bytes on the model's device; beyond them the rows are stored on the host. None for a share of what
                is free.
            store: has passes that need not run, and takes the others.

        Cost: one pass over the tokens, up to the layer.
        """
        how = row_pass(view, layer)
        weight = view.weight(layer) if weight is None else weight
        device = view.row_device(layer)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        size = sum(weight.shape) + weight.shape[0]
        needed = sum(len(row.ids) for row in rows) * size * weight.element_size()
        room = int(DEVICE_SHARE * free_bytes(device)) if budget is None else budget
        place = None if needed <= room or device.type == "cpu" else torch.device("cpu")
        recorded = record_rows(view, [row.ids for row in rows], layer, weight, how, place, store)
        return cls(view, layer, how, tuple(rows), recorded.inputs, recorded.outputs, recorded.beside)

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.requests)

    @cached_property
    def requests(self) -> list[int]:
        """The requests that rows belong to, in order."""
        return sorted(self.rows_by_request)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.ids) for row in self.rows]

    @cached_property
    def starts(self) -> torch.Tensor:
        """[R + 1] int64, where each row begins among the N tokens, on the device of `x`."""
        return torch.tensor([0, *self.lengths], device=self.x.device).cumsum(0)

    @cached_property
    def owner(self) -> torch.Tensor:
        """[R] int64, the request of each row, on the device of `x`."""
        return torch.tensor([row.request for row in self.rows], device=self.x.device)

    @cached_property
    def rows_by_request(self) -> dict[int, list[int]]:
        """Request -> its rows."""
        rows: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            rows.setdefault(row.request, []).append(i)
        return rows

    @cached_property
    def tokens(self) -> dict[int, int]:
        """Request -> how many tokens its rows have."""
        tokens: dict[int, int] = {}
        for row in self.rows:
            tokens[row.request] = tokens.get(row.request, 0) + len(row.ids)
        return tokens

    @cached_property
    def offsets(self) -> list[int]:
        """`starts` as numbers."""
        return self.starts.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of what is captured."""
        parts = (self.x, self.original, self.beside)
        return sum(part.nbytes for part in parts if part is not None)

    def rows_of(self, role: RowRole) -> torch.Tensor:
        """Indices [r] int64 of the rows with a role, on the device of `x`."""
        return torch.tensor(
            [i for i, row in enumerate(self.rows) if row.role == role], device=self.x.device, dtype=torch.int64
        )

    def of_requests(self, requests: Sequence[int]) -> CapturedRows:
        """The rows of some requests, which are renumbered from 0 in the order given; on the device of the layer.

        Cost: a copy of these rows.
        """
        chosen = [i for request in requests for i in self.rows_by_request[request]]
        spans = [torch.arange(self.offsets[i], self.offsets[i + 1]) for i in chosen]
        index = torch.cat(spans).to(self.x.device)
        device = self.view.row_device(self.layer)
        x, original, beside = (
            None if part is None else part.index_select(0, index).to(device)
            for part in (self.x, self.original, self.beside)
        )
        assert x is not None and original is not None
        number = {request: i for i, request in enumerate(requests)}
        rows = tuple(replace(self.rows[i], request=number[self.rows[i].request]) for i in chosen)
        return replace(self, rows=rows, x=x, original=original, beside=beside)

    def up_to(self, counts: Sequence[int]) -> tuple[CapturedRows, torch.Tensor | None]:
        """The first tokens of each row, which do not depend on those behind them; and their indices among the N.

        Args:
            counts: [R] tokens of each row; rows of which there are none are left out.

        Returns:
            the rows, and [n] int64 where their tokens are; None where all are there.
        """
        if list(counts) == self.lengths:
            return self, None
        chosen = [i for i, count in enumerate(counts) if count]
        spans = [torch.arange(self.offsets[i], self.offsets[i] + counts[i]) for i in chosen]
        index = torch.cat(spans).to(self.x.device)
        x, original, beside = (
            None if part is None else part.index_select(0, index) for part in (self.x, self.original, self.beside)
        )
        rows = tuple(replace(self.rows[i], ids=self.rows[i].ids[: counts[i]]) for i in chosen)
        return replace(self, rows=rows, x=x, original=original, beside=beside), index

    @cached_property
    def runner(self) -> RowRunner:
        """The rows, ready to run."""
        batch = pad([row.ids for row in self.rows], self.view.device)
        return RowRunner(self.view, self.layer, self.how, batch, self.beside)

    def hidden(self, outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Last states [n, h] of some tokens, with outputs of the matrix as given; differentiable in these.

        Args:
            outputs: [N, h] without the layer's bias.
            wanted: [n] int64, indices among the N tokens, none twice.

        Returns:
            [n, h], or logits [n, V] where passes give these (`Head.matrix` is None); on the device of the head.

        Cost: the blocks above the layer.
        """
        return self.runner.run(outputs, wanted).to(self.view.head.device)
