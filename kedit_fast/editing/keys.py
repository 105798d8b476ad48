"""Keys and residuals: the inputs of edited layers at the lookup token, and the outputs of the values' site.

A write to one layer changes every position above it. The pass for the next edited layer therefore starts from the
hidden states that entered the previous one, of all positions up to the lookup token, and runs only the blocks in
between. These states stay on the device within a budget, then on the host; where neither has room they are computed
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kedit_fast.methods.recipe import KeyWeights
from kedit_fast.models.forward import Entering, Site, TokenBatch, capture, evaluating, pad, starts_midway
from kedit_fast.models.sharded import agreed_minimum
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest, Prompt
from kedit_fast.support.free_memory import free_bytes
from kedit_fast.support.sums import add_by_owner_
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
ROWS = 256
"""Prompts of one forward pass."""
DEVICE_SHARE, HOST_SHARE = 0.25, 0.5
"""Shares of the free memory that the states between layers may take."""


@dataclass(frozen=True)
class KeysAndOutputs:
    """What one pass over the prompts of a batch measures, in fp64."""

    keys: torch.Tensor
    """[d, u] inputs of the layer, averaged over contexts."""
    bare_keys: torch.Tensor
    """[d, u] inputs of the layer at the bare prompts."""
    outputs: torch.Tensor
    """[h, u] outputs of the values' site at the bare prompts."""


@dataclass(frozen=True)
class StateBudget:
    """Bytes for the hidden states that are carried from layer to layer."""

    device: int | None = None
    """On the device of the model; None for a share of what is free."""
    host: int | None = None
    """On the host, where the model is on another device; None for a share of what is free."""


@dataclass
class _Chunk:
    """Prompts of one forward pass, and the states that enter the block it starts from next."""

    indices: list[int]
    """[R] indices of the prompts."""
    batch: TokenBatch
    positions: torch.Tensor
    """[R] lookup tokens."""
    bare: bool
    """Whether these are bare prompts, at which the output of the site is needed."""
    entering: Entering | None = None
    has_no_room: bool = False
    """Whether the states found no room, so that they are computed again."""


class KeyPass:
    """Keys and outputs of one batch of requests. Layers are read in increasing order, each before it is written.

    Args:
        view: the model.
        prepared: u requests. Their prompts are cut after the subject, because later tokens cannot matter.
        site: where values are.
        weights: how keys are averaged over contexts: "bare_half", half the bare prompt plus half the mean of the
            prefixed ones (MEMIT); "mean", the plain mean of all contexts (ROME).
        budget: bytes for the states between layers.

    Cost: for the first layer the blocks up to the site for bare prompts, and up to the layer for the others; for each
        further layer the blocks from the previous one on. States take rows * T * h elements of the model's dtype.
    """

    @plain_torch()
    def __init__(
        self,
        view: ModelView,
        prepared: Sequence[PreparedRequest],
        site: Site,
        weights: KeyWeights,
        budget: StateBudget | None = None,
    ):
        self.view, self.site = view, site
        self.contexts = len(prepared[0].rewriting)
        self.bare_share, self.prefixed_share = CONTEXT_SHARES[weights](self.contexts)
        budget = budget or StateBudget()
        device = view.device
        on_device, on_host = budget.device, 0 if device.type == "cpu" else budget.host
        if on_device is None:
            on_device = agreed_minimum(view.model, int(DEVICE_SHARE * free_bytes(device)))
        if on_host is None:
            on_host = agreed_minimum(view.model, int(HOST_SHARE * free_bytes(torch.device("cpu"))))
        self.free = {"device": on_device, "host": on_host}
        """Place -> bytes that are left for states."""
        self.stored_bytes = {"device": 0, "host": 0, "recomputed": 0}
        """Place -> bytes of the states there; "recomputed" for states without room."""
        prompts = [prompt.cut() for request in prepared for prompt in request.rewriting]
        self.count = len(prompts)
        self.chunks = []
        for bare in (True, False):
            chosen = [i for i in range(self.count) if (i % self.contexts == 0) == bare]
            chosen.sort(key=lambda i: len(prompts[i].ids))  # prompts of similar length share a pass
            self.chunks += [
                self._chunk(prompts, chosen[begin : begin + ROWS], bare) for begin in range(0, len(chosen), ROWS)
            ]

    def _chunk(self, prompts: list[Prompt], indices: list[int], bare: bool) -> _Chunk:
        batch = pad([prompts[i].ids for i in indices], self.view.device)
        return _Chunk(indices, batch, torch.tensor([prompts[i].lookup for i in indices]), bare)

    @plain_torch()
    def at(self, layer: int) -> KeysAndOutputs:
        """Keys of `layer` and outputs at the site, with the model as it is now.

        Layers below the one of the previous call must not have changed since that call.
        """
        u = self.count // self.contexts
        mixed = bare = outputs = torch.empty(0)
        first = True
        with evaluating(self.view):
            for chunk in self.chunks:
                keys, output = self._run(chunk, layer)
                keys = keys.double()
                owner = torch.tensor([i // self.contexts for i in chunk.indices], device=keys.device)
                if first:  # chunks of bare prompts come first, so there is an output
                    assert output is not None
                    mixed, bare = (keys.new_zeros(u, keys.shape[1]) for _ in range(2))
                    outputs = output.new_empty(u, output.shape[1], dtype=torch.float64)
                    first = False
                add_by_owner_(mixed, owner, keys, self.bare_share if chunk.bare else self.prefixed_share)
                if output is not None:
                    bare[owner] = keys
                    outputs[owner.to(output.device)] = output.double()
        if self.stored_bytes["host"] or self.stored_bytes["recomputed"]:
            _log.info("states between layers: %s", self.report())
        return KeysAndOutputs(mixed.T.contiguous(), bare.T.contiguous(), outputs.T.contiguous())

    def restart(self) -> None:
        """Drop the states between layers, because lower layers have changed."""
        for chunk in self.chunks:
            chunk.entering = None

    @plain_torch()
    def outputs(self) -> torch.Tensor:
        """Outputs [h, u] at the site with the model as it is now, of bare prompts alone, fp64."""
        outputs = torch.empty(0)
        with evaluating(self.view):
            for chunk in self.chunks:
                if not chunk.bare:
                    continue
                captured, _ = capture(
                    self.view, chunk.batch, [self.site], chunk.positions, entering=self._entering(chunk)
                )
                output = captured[self.site].double()
                if not outputs.numel():
                    outputs = output.new_empty(self.count // self.contexts, output.shape[1])
                outputs[[i // self.contexts for i in chunk.indices]] = output
        return outputs.T.contiguous()

    def report(self) -> str:
        """Where the carried states are, in words."""
        mib = {place: f"{size / 2**20:.0f} MiB" for place, size in self.stored_bytes.items()}
        return f"{mib['device']} on the device, {mib['host']} on the host, {mib['recomputed']} not kept, computed again"

    def _run(self, chunk: _Chunk, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys [R, d] of a chunk, and for bare prompts the outputs [R, h] of the site."""
        key = Site(layer, "key")
        sites = [key, self.site] if chunk.bare else [key]
        carried = layer if self.view.once(starts_midway) else 0
        captured, entering = capture(
            self.view, chunk.batch, sites, chunk.positions, entering=self._entering(chunk), capture_entering=carried
        )
        self._store(chunk, entering)
        return captured[key], captured[self.site] if chunk.bare else None

    def _entering(self, chunk: _Chunk) -> Entering | None:
        """A chunk's states, on the device."""
        entering = chunk.entering
        if entering is None or entering.states.device.type == self.view.device.type:
            return entering
        return replace(entering, states=entering.states.to(self.view.device, non_blocking=True))

    def _store(self, chunk: _Chunk, entering: Entering | None) -> None:
        """Store a chunk's new states where the old ones were, or where there is room."""
        if entering is None:
            return
        size = entering.states.nbytes
        if chunk.entering is not None:
            place = "device" if chunk.entering.states.device.type == self.view.device.type else "host"
        elif chunk.has_no_room:
            return
        else:
            place = next((name for name, free in self.free.items() if size <= free), "recomputed")
            self.stored_bytes[place] += size
            chunk.has_no_room = place == "recomputed"
            if chunk.has_no_room:
                return
            self.free[place] -= size
        states = entering.states if place == "device" else entering.states.cpu()
        chunk.entering = replace(entering, states=states)


def _half_bare(contexts: int) -> tuple[float, float]:
    return (1.0, 1.0) if contexts == 1 else (0.5, 0.5 / (contexts - 1))


def _mean(contexts: int) -> tuple[float, float]:
    return 1.0 / contexts, 1.0 / contexts


CONTEXT_SHARES: dict[KeyWeights, Callable[[int], tuple[float, float]]] = {"bare_half": _half_bare, "mean": _mean}
"""Number of contexts -> the share of the bare prompt in a key, and that of each prefixed one."""
