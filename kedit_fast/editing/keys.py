"""Keys and residuals: what the edited linear layers receive at the subject's last token, and what the site puts out.

After a write to one layer every position above it changes, so the pass for the next edited layer starts from the
states that entered the last one, of all positions up to the lookup token, and runs only the blocks between. States are
kept on the device within a budget, then on the host, and where neither has room they are computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kedit_fast.models.forward import Entering, Site, TokenBatch, capture, evaluating, pad
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest, Prompt
from kedit_fast.support.free_memory import free_bytes
from kedit_fast.support.sums import add_by_owner_
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
ROWS = 256  # prompts of one forward pass
DEVICE_SHARE, HOST_SHARE = 0.25, 0.5  # of the memory that is free, for states between layers


@dataclass(frozen=True)
class KeysAndOutputs:
    """What one pass over the prompts of a batch shows."""

    keys: torch.Tensor  # [d, u] weighted over contexts, fp64
    bare_keys: torch.Tensor  # [d, u] of the bare prompts alone, fp64
    outputs: torch.Tensor  # [h, u] of the value's site at the bare prompts, fp64


@dataclass(frozen=True)
class StateBudget:
    """Bytes for the states that are carried from layer to layer, beside the model; None is a share of what is free."""

    device: int | None = None
    host: int | None = None


@dataclass
class _Chunk:
    """Prompts of one forward pass, and the states that enter the block it starts from next."""

    which: list[int]  # numbers of the prompts
    batch: TokenBatch
    positions: torch.Tensor  # [R] lookup tokens
    bare: bool  # whether the site's output is wanted
    entering: Entering | None = None
    homeless: bool = False  # there was no room for its states


class KeyPass:
    """Keys and outputs of one batch of requests, layer after layer in increasing order, while layers are written.

    Args:
        view: the model.
        prepared: u requests; their prompts are cut after the subject, what follows cannot matter.
        site: where the value lives.
        weights: "bare_half": half the bare prompt plus half the mean of the prefixed ones (MEMIT);
            "mean": the plain mean of all contexts (ROME).
        budget: bytes for states between layers.

    Cost: for the first layer the blocks up to the site for bare prompts, and up to the layer for the others; for each
        further layer the blocks from the last one on. States take rows * T * h elements of the model's dtype.
    """

    @plain_torch()
    def __init__(
        self,
        view: ModelView,
        prepared: Sequence[PreparedRequest],
        site: Site,
        weights: str,
        budget: StateBudget | None = None,
    ):
        self.view, self.site, self.weights = view, site, weights
        self.contexts = len(prepared[0].rewriting)
        budget = budget or StateBudget()
        device = view.device
        on_host = device.type == "cpu"
        self.left = {
            "device": budget.device if budget.device is not None else int(DEVICE_SHARE * free_bytes(device)),
            "host": 0 if on_host else budget.host if budget.host is not None
            else int(HOST_SHARE * free_bytes(torch.device("cpu"))),
        }  # fmt: skip
        self.kept = {"device": 0, "host": 0, "recomputed": 0}  # bytes of states by place, and those not kept
        prompts = [prompt.cut() for request in prepared for prompt in request.rewriting]
        self.count = len(prompts)
        self.chunks = []
        for bare in (True, False):
            chosen = [i for i in range(self.count) if (i % self.contexts == 0) == bare]
            chosen.sort(key=lambda i: len(prompts[i].ids))  # neighbours in length share a pass
            self.chunks += [
                self._chunk(prompts, chosen[begin : begin + ROWS], bare) for begin in range(0, len(chosen), ROWS)
            ]

    def _chunk(self, prompts: list[Prompt], which: list[int], bare: bool) -> _Chunk:
        batch = pad([prompts[i].ids for i in which], self.view.device)
        return _Chunk(which, batch, torch.tensor([prompts[i].lookup for i in which]), bare)

    @plain_torch()
    def at(self, layer: int) -> KeysAndOutputs:
        """Keys of `layer` and outputs at the site, with the model as it is now.

        Layers below the last one asked for must not have changed since.
        """
        mixed, bare, outputs = None, None, None
        others = 1.0 / self.contexts if self.weights == "mean" or self.contexts == 1 else 0.5 / (self.contexts - 1)
        own = others if self.weights == "mean" or self.contexts == 1 else 0.5
        with evaluating(self.view):
            for chunk in self.chunks:
                found, output = self._run(chunk, layer)
                found = found.double()
                owner = torch.tensor([i // self.contexts for i in chunk.which], device=found.device)
                if mixed is None:
                    u = self.count // self.contexts
                    mixed, bare = (found.new_zeros(u, found.shape[1]) for _ in range(2))
                    outputs = output.new_zeros(u, output.shape[1], dtype=torch.float64)
                add_by_owner_(mixed, owner, found, own if chunk.bare else others)
                if chunk.bare:
                    bare[owner] = found
                    outputs[owner.to(output.device)] = output.double()
        if self.kept["host"] or self.kept["recomputed"]:
            _log.info("states between layers: %s", self.report())
        return KeysAndOutputs(mixed.T.contiguous(), bare.T.contiguous(), outputs.T.contiguous())

    def restart(self) -> None:
        """Forget the states between layers: lower layers have changed."""
        for chunk in self.chunks:
            chunk.entering = None

    @plain_torch()
    def outputs(self) -> torch.Tensor:
        """Outputs [h, u] at the site with the model as it is now, bare prompts alone, fp64."""
        found = None
        with evaluating(self.view):
            for chunk in self.chunks:
                if not chunk.bare:
                    continue
                seen, _ = capture(self.view, chunk.batch, [self.site], chunk.positions, entering=self._moved(chunk))
                output = seen[self.site].double()
                if found is None:
                    found = output.new_empty(self.count // self.contexts, output.shape[1])
                found[[i // self.contexts for i in chunk.which]] = output
        return found.T.contiguous()

    def report(self) -> str:
        """Where the carried states are, in words."""
        mib = {place: f"{size / 2**20:.0f} MiB" for place, size in self.kept.items()}
        return f"{mib['device']} on the device, {mib['host']} on the host, {mib['recomputed']} not kept, computed again"

    def _run(self, chunk: _Chunk, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        key = Site(layer, "key")
        sites = [key, self.site] if chunk.bare else [key]
        entering = self._moved(chunk)
        seen, kept = capture(
            self.view, chunk.batch, sites, chunk.positions, entering=entering, capture_entering=layer
        )  # fmt: skip
        self._keep(chunk, kept)
        return seen[key], seen[self.site] if chunk.bare else None

    def _moved(self, chunk: _Chunk) -> Entering | None:
        entering = chunk.entering
        if entering is None or entering.states.device.type == self.view.device.type:
            return entering
        return replace(entering, states=entering.states.to(self.view.device, non_blocking=True))

    def _keep(self, chunk: _Chunk, entering: Entering | None) -> None:
        """Put a chunk's new states where the old ones were, or where there is room."""
        if entering is None:
            return
        size = entering.states.nbytes
        if chunk.entering is not None:
            place = "device" if chunk.entering.states.device.type == self.view.device.type else "host"
        elif chunk.homeless:
            return
        else:
            place = next((name for name in ("device", "host") if size <= self.left[name]), "recomputed")
            self.kept[place] += size
            chunk.homeless = place == "recomputed"
            if chunk.homeless:
                return
            self.left[place] -= size
        states = entering.states if place == "device" else entering.states.cpu()
        chunk.entering = replace(entering, states=states)
