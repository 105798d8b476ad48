"""Values of long targets: one for each chunk of a target, in order, those of earlier chunks in place.

The value of a chunk stands at the token before it. It is found as that of a request whose prompt is the request's with
the target up to the chunk, and whose target is the chunk. The deltas of earlier chunks are added at their tokens and
stay as they are. So chunks of one request depend on each other, and requests do not: the first chunks of all requests
are optimized together, then the second ones, and so on.

Source: AnyEdit (arXiv 2502.05628).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kedit_fast.editing.values.objective import EarlierChunks
from kedit_fast.editing.values.result import Values
from kedit_fast.methods.hparams import Hparams
from kedit_fast.requests.prompts import PreparedRequest, chunk_spans
from kedit_fast.solver.value_descent import Status

Spans = Sequence[Sequence[tuple[int, int]]]
"""Of each request (begin, end) of the chunks of its target."""


def spans_of(prepared: Sequence[PreparedRequest], hparams: Hparams) -> Spans | None:
    """The chunks of each request's target; None where targets are not taken in chunks."""
    if not hparams.chunk_tokens:
        return None
    return [chunk_spans(len(one.target), hparams.chunk_tokens, hparams.chunk_overlap) for one in prepared]


@dataclass(frozen=True)
class Columns:
    """The n columns of the system of u requests: one of each, or one of each chunk of its target, in order."""

    owner: tuple[int, ...]
    """[n] the request of each."""
    tokens: tuple[int, ...]
    """[n] target tokens that its value is for."""

    @classmethod
    def of(cls, prepared: Sequence[PreparedRequest], spans: Spans | None) -> Columns:
        """The columns of requests with these chunks; None for whole targets."""
        chunks = [[(0, len(one.target))] for one in prepared] if spans is None else spans
        owner = tuple(i for i, one in enumerate(chunks) for _ in one)
        return cls(owner, tuple(end - begin for one in chunks for begin, end in one))

    def of_requests(self, requests: Sequence[int]) -> list[int]:
        """The columns of some requests, in their order."""
        chosen: dict[int, list[int]] = {request: [] for request in requests}
        for column, request in enumerate(self.owner):
            if request in chosen:
                chosen[request].append(column)
        return [column for columns in chosen.values() for column in columns]

    def statuses(self, values: Values) -> list[Status]:
        """[u] of each request: what went wrong with a chunk; PREDICTED if the model says all of them already."""
        of_request: dict[int, list[Status]] = {}
        for request, code in zip(self.owner, values.status.tolist(), strict=True):
            of_request.setdefault(request, []).append(Status(code))
        return [_worst(codes) for _, codes in sorted(of_request.items())]

    def losses(self, values: Values) -> list[float]:
        """[u] of each request, the mean of its chunks' last losses by their tokens."""
        totals, counts = [[0.0] * (1 + max(self.owner, default=-1)) for _ in range(2)]
        for request, tokens, loss in zip(self.owner, self.tokens, values.losses.tolist(), strict=True):
            totals[request] += tokens * loss
            counts[request] += tokens
        return [total / count for total, count in zip(totals, counts, strict=True)]

    def steps(self, values: Values) -> list[int]:
        """[u] optimizer steps of each request, over its chunks."""
        totals = [0] * (1 + max(self.owner, default=-1))
        for request, steps in zip(self.owner, values.steps.tolist(), strict=True):
            totals[request] += steps
        return totals


def _worst(codes: Sequence[Status]) -> Status:
    """The status of a request whose chunks have these."""
    for code in (Status.BAD_LOSS, Status.BAD_GRADIENT, Status.COMPLETED, Status.STOPPED):
        if code in codes:
            return code
    return Status.PREDICTED


def find_chunk_values(
    find: Callable[[Sequence[PreparedRequest], Sequence[EarlierChunks] | None], Values],
    prepared: Sequence[PreparedRequest],
    spans: Spans,
) -> Values:
    """The values of all chunks, in the order of `Columns`.

    Args:
        find: optimizes the values of requests, with the deltas of earlier chunks of each, if there are any.
        prepared: u requests.
        spans: their chunks.

    Cost: for each chunk one pass over its prompt and the target up to its end; then iterations over its own tokens.
    """
    first = [0]
    for one in spans:
        first.append(first[-1] + len(one))
    deltas: list[list[torch.Tensor]] = [[] for _ in prepared]  # of each request, [sites, h] of its chunks so far
    parts: list[tuple[Sequence[int], Values]] = []
    for number in range(max(map(len, spans))):
        chosen = [i for i, one in enumerate(spans) if len(one) > number]
        earlier = None
        if number:
            earlier = [EarlierChunks(_distances(spans[i][: number + 1]), torch.stack(deltas[i])) for i in chosen]
        values = find([prepared[i].chunk(*spans[i][number]) for i in chosen], earlier)
        for place, i in enumerate(chosen):
            deltas[i].append(values.all_deltas[:, :, place])
        parts.append(([first[i] + number for i in chosen], values))
    return Values.in_order(parts, parts[0][1].all_targets.device)


def _distances(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Tokens from the lookup token of each chunk but the last to that of the last."""
    return tuple(spans[-1][0] - begin for begin, _ in spans[:-1])
