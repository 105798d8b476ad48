"""Passes over whole rows again and again while one matrix changes, with the matrix's outputs given.

What goes into a linear layer does not depend on its weight, and neither does anything else below its outputs. So one
pass records the layer's inputs x and what stands beside its outputs in the residual stream. After that a pass starts
from outputs that the caller computes, o = x W^T, and runs the blocks above. A norm that some models have between the
MLP and the residual sum runs in each pass, on the outputs. The function is the model's with the weight W.

How a model's blocks call their parts is not taken for granted. A few tokens run with a changed weight, in the model
itself and by each way (`RowPass`) in turn, and the first way that gives the same is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models import tail_attention
from kedit_fast.models.forward import (
    Site,
    TokenBatch,
    evaluating,
    fused_modules,
    hidden_of,
    last_states,
    pad,
    starts_midway,
    visit,
)
from kedit_fast.models.head import error_limit, refused_by_name, relative_error, sample_rows
from kedit_fast.models.patching import input_hooks, output_hooks
from kedit_fast.models.prompt_runner import obstacle_of_tails, sees_windows
from kedit_fast.models.tail_runner import TailRunner, whole_rows
from kedit_fast.models.view import ModelView
from kedit_fast.models.whole_runner import run_outputs
from kedit_fast.models.widened import computing_dtype
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
RowKind = Literal["packed rows", "padded rows", "whole rows"]
"""How passes run: the tokens of all rows as one row; padded rows; or the model from the edited block on, or from the
embeddings, with the layer's outputs replaced."""
BATCH_TOKENS = 2048
"""Tokens of one pass that records rows."""


class RowPass(NamedTuple):
    """How passes over rows run in a model."""

    kind: RowKind
    norm: str = ""
    """Path, in the block, of the norm between the MLP and the residual sum; "" for none, or where all of the block
    runs."""
    returns_tuple: bool = False
    """Whether blocks of this version of transformers return tuples."""
    midway: bool = True
    """Whether blocks can start from the states that enter them. Of "whole rows", passes start there."""


@dataclass(frozen=True)
class RecordedRows:
    """What one pass over R rows with N tokens gives, packed: one row after another, without padding."""

    inputs: torch.Tensor
    """[N, d] of the edited layer, in the dtype that passes compute in."""
    outputs: torch.Tensor
    """[N, out] fp32 (fp64 in fp64 models), the products of the inputs with the weight, without the layer's bias."""
    beside: torch.Tensor | None
    """[N, h] in the same dtype: what the layer's outputs are added to, with the bias in it; behind a norm, what the
    norm's output is added to. Of "whole rows", the states that enter the block; None for passes from the embeddings."""


class RowStore(Protocol):
    """Where passes are looked up before they run. Rounding depends on which rows run together, so what is stored is
    that of a whole pass."""

    def load(self, rows: Sequence[Sequence[int]]) -> RecordedRows | None:
        """What a pass over just these rows, in this order, has given, on the device of the layer; or None."""
        ...

    def store(self, rows: Sequence[Sequence[int]], recorded: RecordedRows) -> None:
        """Take what a pass has just given."""
        ...


@dataclass
class RowRunner:
    """R rows of N tokens, ready to run with the outputs of an edited layer as they are given."""

    view: ModelView
    layer: int
    """Whose edited module's outputs are given."""
    how: RowPass
    """How passes run; see `row_pass`."""
    batch: TokenBatch
    """The rows, padded on the right, on the device of the model."""
    beside: torch.Tensor | None
    """[N, h] what stands beside the outputs; see `RecordedRows.beside`."""

    def __post_init__(self):
        assert self.batch.attention_mask is not None
        self._places = torch.nonzero(self.batch.attention_mask.flatten())[:, 0]
        self._tails: TailRunner | None = None
        if self.how.kind != "whole rows":
            packs = self.how.kind == "packed rows"
            self._tails = whole_rows(self.view, self.batch, self.layer, packs, self.how.returns_tuple)
        self._module = self.view.edited_module(self.layer)
        self._norm = self.view.block(self.layer).get_submodule(self.how.norm) if self.how.norm else None

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that attention was called with; see `tail_attention.Layout.windows`."""
        return self._tails.layout.windows if self._tails is not None and self._tails.layout is not None else set()

    @plain_torch()
    def run(self, outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Last states of some tokens, differentiable in the layer's outputs.

        Args:
            outputs: [N, out] without the layer's bias, in the dtype of `beside` or the one that passes compute in.
            wanted: [n] int64, indices of packed tokens, none twice.

        Returns:
            [n, h], or logits [n, V] where passes give these (`Head.matrix` is None).

        Cost: the blocks above the layer.
        """
        dtype = self.view.once(_computing_dtype)
        if self._tails is None:
            bias = self._module.bias
            outputs = outputs if bias is None else outputs + bias.to(outputs)
            return run_outputs(self.view, self.layer, self.batch, self._places, self.beside, outputs.to(dtype), wanted)
        assert self.beside is not None
        if self._norm is not None:
            bias = self._module.bias
            outputs = (outputs if bias is None else outputs + bias.to(outputs)).to(dtype)
            with fused_modules(self.view):
                outputs = self._norm(outputs[None])[0]
        return self._tails.run_states((self.beside + outputs).to(dtype), wanted)


def _computing_dtype(view: ModelView) -> torch.dtype:
    return computing_dtype(view.entry)


@plain_torch()
@torch.no_grad()
def record_rows(
    view: ModelView,
    rows: Sequence[Sequence[int]],
    layer: int,
    weight: torch.Tensor,
    how: RowPass | None = None,
    device: torch.device | None = None,
    store: RowStore | None = None,
) -> RecordedRows:
    """Run rows up to a layer, and record what its weight does not change.

    Args:
        view: the model, in evaluation mode; nothing in it changes.
        rows: token ids of each.
        layer: whose edited matrix is going to change; it must be `weight` now.
        weight: [out, d] the layer's weight, in the dtype in which outputs are going to be computed.
        how: how passes run; None for `row_pass`.
        device: where the results go; None for where they are computed.
        store: has passes that need not run, and takes the others; the results are the same, bit for bit.

    Cost: one pass over the tokens, up to the layer. Memory: of 2,048 tokens, and (d + out + h) numbers a token.
    """
    how = row_pass(view, layer) if how is None else how
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    parts: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
    while order:
        count = max(1, BATCH_TOKENS // len(rows[order[0]]))
        chosen, order = order[:count], order[count:]
        together = [rows[i] for i in chosen]
        recorded = None if store is None else store.load(together)
        if recorded is None:
            recorded = _recorded(view, pad(together, view.device), layer, weight, how)
            if store is not None:
                store.store(together, recorded)
        lengths = [len(row) for row in together]
        split = [
            [None] * len(together) if part is None else (part if device is None else part.to(device)).split(lengths)
            for part in (recorded.inputs, recorded.outputs, recorded.beside)
        ]
        parts |= dict(zip(chosen, zip(*split, strict=True), strict=True))
    inputs, outputs, beside = zip(*(parts[i] for i in range(len(rows))), strict=True)
    return RecordedRows(torch.cat(inputs), torch.cat(outputs), None if beside[0] is None else torch.cat(beside))


def _recorded(view: ModelView, batch: TokenBatch, layer: int, weight: torch.Tensor, how: RowPass) -> RecordedRows:
    """What one pass over a batch gives."""
    assert batch.attention_mask is not None
    seen: dict[Site, torch.Tensor] = {}
    key, block = Site(layer, "key"), Site(layer, "block")
    sites = [key, block]
    if how.kind == "whole rows":
        sites = [key] if layer == 0 or not how.midway else [Site(layer - 1, "block"), key]
    visit(view, batch, sites, seen.__setitem__)
    inside = batch.attention_mask.bool()
    inputs = seen[key][inside.to(seen[key].device)]
    outputs = product(inputs, weight)
    if len(sites) == 1:
        beside = None
    elif how.kind == "whole rows":
        beside = seen[sites[0]][inside.to(seen[sites[0]].device)].to(outputs)
    else:
        module, dtype = view.edited_module(layer), seen[block].dtype
        added = outputs
        if how.norm:
            biased = outputs if module.bias is None else outputs + module.bias.to(outputs)
            added = view.block(layer).get_submodule(how.norm)(biased.to(dtype)[None])[0].to(outputs)
        beside = seen[block][inside.to(seen[block].device)].to(outputs) - added
    return RecordedRows(inputs, outputs, beside)


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Outputs [N, out] of inputs [N, d], in the weight's dtype, but fp32 at least."""
    outputs = inputs.to(weight.dtype) @ weight.to(inputs.device).T
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def row_pass(view: ModelView, layer: int) -> RowPass:
    """How passes over rows run in a model; tried once for a view and layer, with a few tokens.

    Raises:
        UnsupportedModelError: a module does not run, or no way gives what the model does with a changed weight; or the
            layer has experts, or a gate.
    """
    if view.experts(layer) is not None:
        raise UnsupportedModelError(
            f"{view.module_name(layer)} is the stacked matrix of experts: it is not tuned, only solved for. Use a "
            "closed-form editor, MEMIT or AlphaEdit"
        )
    if view.is_gated:
        raise UnsupportedModelError(
            f"{view.module_name(layer)} is of shared experts behind a gate: it is not tuned, only solved for. Use a "
            "closed-form editor, MEMIT or AlphaEdit"
        )
    tried = view.once(_tried)
    if layer not in tried:
        tried[layer] = _try(view, layer)
    return tried[layer]


def _tried(view: ModelView) -> dict[int, RowPass]:
    """What has been tried: nothing when a view is new."""
    return {}


@plain_torch()
@torch.no_grad()
def _try(view: ModelView, layer: int) -> RowPass:
    """How passes run; said at INFO where rows do not run from the block's output. Cost: some passes of a few tokens."""
    rows = sample_rows(view.model.config, view.vocabulary)
    module = view.edited_module(layer)
    with evaluating(view):
        batch = pad(rows, view.device)
        weight = wide(view.weight(layer))
        with refused_by_name(view.model, f"hooks on {view.module_name(layer)}"):
            norm, returns_tuple = _between(view, batch, layer)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
        changed = weight + 0.5 * weight.square().mean().sqrt() * noise
        assert batch.attention_mask is not None
        wanted = torch.nonzero(batch.attention_mask.flatten())[:, 0]
        change = changed - weight

        def add(_: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return output + (args[0].to(change.dtype) @ change.to(args[0].device).T).to(output)

        with output_hooks([(module, add)]):
            states = last_states(view, batch)
            expected = states.flatten(0, 1)[wanted.to(states.device)]
        limit = error_limit(expected.dtype, view.head.rounding)
        obstacle = obstacle_of_tails(view)
        midway = view.once(starts_midway)
        ways = [RowPass("whole rows", midway=midway)]
        if midway and not obstacle:
            ways.insert(0, RowPass("padded rows", norm, returns_tuple))
            if tail_attention.usable(view):
                ways.insert(0, RowPass("packed rows", norm, returns_tuple))
        for way in ways:
            try:
                recorded = record_rows(view, rows, layer, weight, way)
                runner = RowRunner(view, layer, way, batch, recorded.beside)
                every = torch.arange(len(wanted), device=view.device)
                error = relative_error(runner.run(product(recorded.inputs, changed), every), expected)
                if way.kind == "packed rows" and not sees_windows(view, runner.windows, layer + 1):
                    obstacle = "its attention does not say its sliding window"
                elif error <= limit:
                    if way.kind == "whole rows":
                        _log.info("rows of %s run from the edited block on: %s", view.spec.name, obstacle)
                    return way
                else:
                    obstacle = f"their states differ by {error:.1g}"
            except Exception as error:  # it may be any code
                obstacle = first_line(error) or type(error).__name__
    raise UnsupportedModelError(
        f"{type(view.model).__name__} does not run with other outputs of {view.module_name(layer)}: {obstacle}"
    )


def wide(weight: torch.Tensor) -> torch.Tensor:
    """A weight in the dtype in which it is tuned: fp64 if it is that, else fp32."""
    return weight if weight.dtype == torch.float64 else weight.float()


def _between(view: ModelView, batch: TokenBatch, layer: int) -> tuple[str, bool]:
    """Path, inside the block, of the norm that takes the edited layer's output, or ""; whether blocks return tuples."""
    block, module = view.block(layer), view.edited_module(layer)
    seen: list[torch.Tensor] = []
    takers: list[str] = []
    tuples: list[bool] = []

    def see_output(_: torch.nn.Module, args: tuple, output: Any) -> None:
        seen.append(hidden_of(output))

    def see_input(path: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            if seen and any(value is seen[-1] for value in (*args, *kwargs.values())):
                takers.append(path)

        return hook

    def see_block(_: torch.nn.Module, args: tuple, output: Any) -> None:
        tuples.append(isinstance(output, tuple | list))

    parts = [(part, see_input(path)) for path, part in block.named_modules() if path and part is not module]
    with input_hooks(parts), output_hooks([(module, see_output), (block, see_block)]):
        visit(view, batch, [Site(layer, "block")], lambda site, states: None)
    return takers[0] if takers and view.spec.post_norm else "", tuples[-1]
