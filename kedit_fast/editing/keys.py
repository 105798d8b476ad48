"""Keys and residuals: the inputs of edited layers at the lookup tokens, and the outputs of the values' site.

A write to one layer changes every position above it. The pass for the next edited layer therefore starts from the
hidden states that entered the previous one, of all positions up to the last lookup token, and runs only the blocks in
between. These states stay on the device within a budget, then on the host; where neither has room they are computed
again. Texts that many prompts begin with, as contexts are, run and stay once (`models.shared_prefixes`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kedit_fast.methods.recipe import KeyWeights
from kedit_fast.models.forward import Entering, Site, TokenBatch, capture, evaluating, pad, starts_midway
from kedit_fast.models.prompt_runner import shared_rows
from kedit_fast.models.sharded import agreed_minimum
from kedit_fast.models.shared_prefixes import SharedRows
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.free_memory import free_bytes
from kedit_fast.support.page_locked import Copied, PageLocked, copy_out, crosses
from kedit_fast.support.sums import add_by_owner_
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
ROWS, TOKENS = 256, 16384
"""Prompts of one forward pass, and their tokens with padding, at most."""
DEVICE_SHARE, HOST_SHARE = 0.25, 0.5
"""Shares of the free memory that the states between layers may take."""
LOCKED_SHARE = 0.5
"""Of the bytes for states on the host, page-locked at most: copies of these run beside what the host does."""


@dataclass(frozen=True)
class KeysAndOutputs:
    """What one pass over the prompts of a batch measures, in fp64, in u columns: one a request, or one a chunk."""

    keys: torch.Tensor
    """[d, u] inputs of the layer, averaged over contexts."""
    bare_keys: torch.Tensor
    """[d, u] inputs of the layer at the bare prompts."""
    outputs: torch.Tensor
    """[h, u] outputs of the values' site at the bare prompts."""
    other_keys: torch.Tensor | None = None
    """[d, p] inputs of the layer at all other tokens of bare prompts and targets; None unless requested."""


@dataclass(frozen=True)
class StateBudget:
    """Bytes for the hidden states that are carried from layer to layer."""

    device: int | None = None
    """On the device of the model; None for a share of what is free."""
    host: int | None = None
    """On the host, where the model is on another device; None for a share of what is free."""


@dataclass(frozen=True)
class _Row:
    """The tokens of one context of a request, and where its columns are."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Lookup tokens, of the request's columns in order."""
    columns: tuple[int, ...]
    bare: bool
    """Whether this is the bare prompt, at which the output of the site is needed."""


@dataclass
class _Pass:
    """Rows of one forward pass, and the states that enter the block it starts from next."""

    batch: TokenBatch | SharedRows
    rows: torch.Tensor
    """[n] rows of the tokens whose keys are read; of shared rows all are in row 0."""
    positions: torch.Tensor
    """[n] their positions; of shared rows among all tokens of the pass."""
    columns: torch.Tensor
    """[n] their columns; -1 for other tokens."""
    bare: bool
    """Whether the rows are bare prompts."""
    entering: Entering | None = None
    has_no_room: bool = False
    """Whether the states found no room, so that they are computed again."""
    on_host: bool = False
    """Whether the states are on the host, beside a model that is not."""
    locked: torch.Tensor | None = None
    """Page-locked memory for them there; None for ordinary memory."""
    copied: Copied | None = None
    """The end of the last copy into `locked`."""


class KeyPass:
    """Keys and outputs of one batch of requests. Layers are read in increasing order, each before it is written.

    Args:
        view: the model.
        prepared: the requests. Their prompts are cut after the last lookup token, because later tokens cannot matter.
        site: where values are.
        weights: how keys are averaged over contexts: "bare_half", half the bare prompt plus half the mean of the
            prefixed ones (MEMIT); "mean", the plain mean of all contexts (ROME).
        budget: bytes for the states between layers.
        spans: of each request (begin, end) of the chunks of its target: a column for each chunk, whose lookup token is
            the one before it. None: a column for each request, at the subject's last token.
        other_tokens: whether to read the keys of all other tokens of the bare prompts with their targets as well: those
            at which no request has its lookup token after the same text.

    Cost: for the first layer the blocks up to the site for bare prompts, and up to the layer for the others; for each
        further layer the blocks from the previous one on. States take rows * T * h elements of the model's dtype, less
        where rows share their beginnings.
    """

    @plain_torch()
    def __init__(
        self,
        view: ModelView,
        prepared: Sequence[PreparedRequest],
        site: Site,
        weights: KeyWeights,
        budget: StateBudget | None = None,
        *,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        other_tokens: bool = False,
    ):
        self.view, self.site, self.other_tokens = view, site, other_tokens
        contexts = len(prepared[0].rewriting)
        self.bare_share, self.prefixed_share = CONTEXT_SHARES[weights](contexts)
        budget = budget or StateBudget()
        device = view.device
        on_device, on_host = budget.device, 0 if device.type == "cpu" else budget.host
        if on_device is None:
            on_device = agreed_minimum(view.model, int(DEVICE_SHARE * free_bytes(device)))
        if on_host is None:
            on_host = agreed_minimum(view.model, int(HOST_SHARE * free_bytes(torch.device("cpu"))))
        self.free = {"device": on_device, "host": on_host}
        """Place -> bytes that are left for states."""
        self.locked = PageLocked(int(LOCKED_SHARE * on_host))
        """Page-locked memory for states on the host."""
        self.stored_bytes = {"device": 0, "host": 0, "recomputed": 0}
        """Place -> bytes of the states there; "recomputed" for states without room."""
        rows = self._rows(prepared, spans)
        # Texts at whose last token an edit has its key, of whichever request: these tokens are to move.
        self._edited = {row.ids[: position + 1] for row in rows if row.bare for position in row.positions}
        self.count = 1 + max(column for row in rows for column in row.columns)
        """Columns."""
        self.passes = []
        for bare in (True, False):
            chosen = [row for row in rows if row.bare == bare]
            chosen.sort(key=lambda row: len(row.ids))  # prompts of similar length share a pass
            begin = 0
            for end in range(1, len(chosen) + 1):
                size = end + 1 - begin
                if end == len(chosen) or size > ROWS or size * len(chosen[end].ids) > TOKENS:
                    self.passes.append(self._pass(chosen[begin:end], bare))
                    begin = end

    def _rows(
        self, prepared: Sequence[PreparedRequest], spans: Sequence[Sequence[tuple[int, int]]] | None
    ) -> list[_Row]:
        """Every context of every request."""
        rows, first = [], 0
        for i, request in enumerate(prepared):
            count = 1 if spans is None else len(spans[i])
            columns = tuple(range(first, first + count))
            for context, prompt in enumerate(request.rewriting):
                positions = (prompt.lookup,)
                if spans is not None:
                    positions = tuple(len(prompt.ids) - 1 + begin for begin, _ in spans[i])
                has_others = self.other_tokens and context == 0
                length = self.view.max_length if has_others else positions[-1] + 1
                rows.append(_Row((*prompt.ids, *request.target)[:length], positions, columns, context == 0))
            first += count
        return rows

    def _pass(self, rows: list[_Row], bare: bool) -> _Pass:
        places = [
            (r, position, column)
            for r, row in enumerate(rows)
            for position, column in zip(row.positions, row.columns, strict=True)
        ]
        if bare and self.other_tokens:
            places += [
                (r, position, -1)
                for r, row in enumerate(rows)
                for position in range(len(row.ids))
                if row.ids[: position + 1] not in self._edited
            ]
        device = self.view.device
        at, positions, columns = (torch.tensor(part, device=device) for part in zip(*places, strict=True))
        ids = [row.ids for row in rows]
        first_read = [len(one) - 1 for one in ids]
        for r, position, _ in places:
            first_read[r] = min(first_read[r], position)
        if (shared := shared_rows(self.view, ids, first_read)) is not None:
            return _Pass(shared, torch.zeros_like(at), shared.index(at, positions), columns, bare)
        return _Pass(pad(ids, device), at, positions, columns, bare)

    @plain_torch()
    def at(self, layer: int) -> KeysAndOutputs:
        """Keys of `layer` and outputs at the site, with the model as it is now.

        Layers below the one of the previous call must not have changed since that call.
        """
        mixed = bare = outputs = torch.empty(0)
        others: list[torch.Tensor] = []
        first = True
        with evaluating(self.view):
            for part in self.passes:
                keys, output = self._run(part, layer)
                keys = keys.double()
                columns = part.columns.to(keys.device)
                if first:  # passes of bare prompts come first, so there is an output
                    assert output is not None
                    mixed, bare = (keys.new_zeros(self.count, keys.shape[1]) for _ in range(2))
                    outputs = output.new_empty(self.count, output.shape[1], dtype=torch.float64)
                    first = False
                if part.bare and self.other_tokens:
                    others.append(keys[columns < 0])
                    keys, columns = keys[columns >= 0], columns[columns >= 0]
                add_by_owner_(mixed, columns, keys, self.bare_share if part.bare else self.prefixed_share)
                if output is not None:
                    bare[columns] = keys
                    columns = part.columns.to(output.device)
                    outputs[columns[columns >= 0]] = output[columns >= 0].double()
        if self.stored_bytes["host"] or self.stored_bytes["recomputed"]:
            _log.info("states between layers: %s", self.report())
        other_keys = torch.cat(others).T.contiguous() if self.other_tokens else None
        return KeysAndOutputs(mixed.T.contiguous(), bare.T.contiguous(), outputs.T.contiguous(), other_keys)

    def restart(self) -> None:
        """Drop the states between layers, because lower layers have changed."""
        for part in self.passes:
            part.entering = None

    @plain_torch()
    def outputs(self) -> torch.Tensor:
        """Outputs [h, u] at the site with the model as it is now, of bare prompts alone, fp64."""
        outputs = torch.empty(0)
        with evaluating(self.view):
            for part in self.passes:
                if not part.bare:
                    continue
                is_column = part.columns >= 0
                captured, _ = capture(
                    self.view,
                    part.batch,
                    [self.site],
                    part.positions[is_column],
                    rows=part.rows[is_column],
                    entering=self._entering(part),
                )
                output = captured[self.site].double()
                if not outputs.numel():
                    outputs = output.new_empty(self.count, output.shape[1])
                outputs[part.columns[is_column].to(output.device)] = output
        return outputs.T.contiguous()

    def report(self) -> str:
        """Where the carried states are, in words."""
        mib = {place: f"{size / 2**20:.0f} MiB" for place, size in self.stored_bytes.items()}
        return f"{mib['device']} on the device, {mib['host']} on the host, {mib['recomputed']} not kept, computed again"

    def _run(self, part: _Pass, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys [n, d] of a pass, and for bare prompts the outputs [n, h] of the site."""
        key = Site(layer, "key")
        sites = [key, self.site] if part.bare else [key]
        carried = layer if self.view.once(starts_midway) else 0
        captured, entering = capture(
            self.view,
            part.batch,
            sites,
            part.positions,
            rows=part.rows,
            entering=self._entering(part),
            capture_entering=carried,
        )
        self._store(part, entering)
        return captured[key], captured[self.site] if part.bare else None

    def _entering(self, part: _Pass) -> Entering | None:
        """A pass's states, on the device."""
        entering = part.entering
        if part.copied is not None:
            part.copied.synchronize()
        if entering is None or entering.states.device.type == self.view.device.type:
            return entering
        return replace(entering, states=entering.states.to(self.view.device, non_blocking=True))

    def _store(self, part: _Pass, entering: Entering | None) -> None:
        """Store a pass's new states where the old ones were, or where there is room."""
        if entering is None:
            return
        size = entering.states.nbytes
        if part.entering is not None:
            place = "host" if part.on_host else "device"
        elif part.has_no_room:
            return
        else:
            place = next((name for name, free in self.free.items() if size <= free), "recomputed")
            self.stored_bytes[place] += size
            part.has_no_room = place == "recomputed"
            if part.has_no_room:
                return
            self.free[place] -= size
        part.on_host = place == "host"
        states = self._copied_to_host(part, entering.states) if part.on_host else entering.states
        part.entering = replace(entering, states=states)

    def _copied_to_host(self, part: _Pass, states: torch.Tensor) -> torch.Tensor:
        """The states of a pass on the host; in page-locked memory the copy may still run."""
        if not crosses(states.device, torch.device("cpu")):
            return states.cpu()
        if part.locked is None or (part.locked.shape, part.locked.dtype) != (states.shape, states.dtype):
            part.locked = self.locked.empty(tuple(states.shape), states.dtype)
        if part.locked is None:
            return states.cpu()
        # What the pass has read from this memory is read: these states were computed from it.
        part.copied = copy_out(part.locked, states)
        return part.locked


@plain_torch()
def bare_outputs(view: ModelView, prepared: Sequence[PreparedRequest], sites: Sequence[Site]) -> list[torch.Tensor]:
    """Outputs [h, u] of each site at the bare prompts' lookup tokens, with the model as it is now, fp64.

    Cost: one pass over the bare prompts, up to the last site.
    """
    prompts = [request.rewriting[0].cut() for request in prepared]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))  # prompts of similar length share a pass
    parts: list[list[torch.Tensor]] = [[] for _ in sites]
    with evaluating(view):
        for begin in range(0, len(order), ROWS):
            chosen = [prompts[i] for i in order[begin : begin + ROWS]]
            positions = torch.tensor([prompt.lookup for prompt in chosen])
            captured, _ = capture(view, pad([prompt.ids for prompt in chosen], view.device), sites, positions)
            for part, site in zip(parts, sites, strict=True):
                part.append(captured[site].double())
    places = torch.argsort(torch.tensor(order))
    return [torch.cat(part)[places.to(part[0].device)].T.contiguous() for part in parts]


def _half_bare(contexts: int) -> tuple[float, float]:
    return (1.0, 1.0) if contexts == 1 else (0.5, 0.5 / (contexts - 1))


def _mean(contexts: int) -> tuple[float, float]:
    return 1.0 / contexts, 1.0 / contexts


CONTEXT_SHARES: dict[KeyWeights, Callable[[int], tuple[float, float]]] = {"bare_half": _half_bare, "mean": _mean}
"""Number of contexts -> the share of the bare prompt in a key, and that of each prefixed one."""
