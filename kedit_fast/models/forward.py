"""Partial forward passes: what goes into and comes out of modules, starting and stopping where it is enough.

Batches are padded on the right by this module, whatever the tokenizer's own side, so positions count from the left.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models import fused
from kedit_fast.models.experts import ExpertInputs, expert_inputs
from kedit_fast.models.head import decoder_states, error_limit, model_logits, relative_error, sample_rows
from kedit_fast.models.patching import (
    Forward,
    evaluation_mode,
    has_replaced_forward,
    input_hooks,
    output_hooks,
    replaced_forwards,
)
from kedit_fast.models.sharded import is_split, whole_inputs
from kedit_fast.models.shared_experts import gate_values
from kedit_fast.models.shared_prefixes import SharedRows
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import Widening, computing
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
SiteKind = Literal["key", "attention", "mlp", "block"]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of several rows, padded on the right."""

    input_ids: torch.Tensor
    """[rows, T] int64."""
    attention_mask: torch.Tensor | None
    """[rows, T] int64, 1 at tokens and 0 at padding; or None.

    Without a mask the states of padding mean nothing. Those of tokens are the same, since attention is causal and
    padding comes after them, and scaled_dot_product_attention is faster.
    """

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions [rows, T], counted from 0 at each row's first token."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)


@dataclass(frozen=True)
class Site:
    """A place in the model where states are read or deltas are added."""

    layer: int
    kind: SiteKind
    """"key" is the input of the edited linear layer; "attention", "mlp" and "block" are the output of that module.

    Where the stacked matrix of experts is edited, the input is what enters their module (`models.experts`). Where a
    gate multiplies the edited layer's output, as that of shared experts, the input is multiplied by it.
    """


def pad(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> TokenBatch:
    """A TokenBatch of rows of token ids; `fill` stands in the padding, which is masked."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), fill, dtype=torch.int64, device="cpu")
    mask = torch.zeros((len(rows), length), dtype=torch.int64, device="cpu")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64, device="cpu")
        mask[i, : len(row)] = 1
    return TokenBatch(ids.to(device), mask.to(device))


def unknown_token(tokenizer: Any, ids: Sequence[int], vocabulary: int | None) -> str:
    """Why a model of `vocabulary` tokens does not take token ids; "" if it does, or if `vocabulary` is None."""
    if vocabulary is None or not ids or max(ids) < vocabulary:
        return ""
    token = next(i for i in ids if i >= vocabulary)
    return (
        f"token {token} ({tokenizer.decode([token])!r}) is past the model's {vocabulary:,} embeddings: tokens were "
        "added to the tokenizer and the model was not resized (model.resize_token_embeddings(len(tokenizer))), or it "
        "is another model's tokenizer"
    )


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple in older transformers."""
    return output[0] if isinstance(output, tuple | list) else output


def as_rows(states: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """States [R, T, size]; some modules take the tokens of all rows as [R * T, size]. Others stay as they are."""
    if states.ndim == 2 and states.shape[0] == shape[0] * shape[1]:
        return states.unflatten(0, tuple(shape))
    return states


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A block's output with other hidden states."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden


class _AllSeen(Exception):
    """Raised by a hook to end the forward pass when all sites have been seen."""


def module_at(view: ModelView, site: Site) -> torch.nn.Module:
    """The module whose hook sees `site`."""
    if site.kind == "key":
        return view.edited_module(site.layer)
    return {"attention": view.attention, "mlp": view.mlp, "block": view.block}[site.kind](site.layer)


@dataclass(frozen=True)
class Entering:
    """The hidden states that enter a block."""

    layer: int
    states: torch.Tensor
    """[R, T, h] of all positions."""
    as_tuple: bool
    """Whether blocks of this version of transformers return their states in a tuple."""


def stubs(view: ModelView, entering: Entering) -> dict[torch.nn.Module, Callable[..., Any]]:
    """Forward functions for the blocks below a layer that compute nothing; the last one returns the states."""

    def stub(result: torch.Tensor | None) -> Callable[..., Any]:
        def forward(hidden_states, *args, **kwargs):
            out = hidden_states if result is None else result
            return (out, None) if entering.as_tuple else out

        return forward

    last = entering.layer - 1
    return {view.block(layer): stub(entering.states if layer == last else None) for layer in range(entering.layer)}


@torch.no_grad()
@plain_torch()
def capture(
    view: ModelView,
    batch: TokenBatch | SharedRows,
    sites: Sequence[Site],
    positions: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    entering: Entering | None = None,
    capture_entering: int = 0,
) -> tuple[dict[Site, torch.Tensor], Entering | None]:
    """Run the model up to the last of some sites and return the states there.

    Args:
        view: the model.
        batch: R rows of tokens; shared rows are one packed row, of which `SharedRows.index` names the positions.
        sites: where to read states.
        positions: [R] one position per row, or [n] positions in the rows that `rows` names; None for all positions.
        rows: [n] int64, the row of each position; None for one per row.
        entering: states from an earlier pass over the same batch, to start from instead of the embeddings.
        capture_entering: a layer, not above the sites, whose entering states are returned as well; 0 for none.

    Returns:
        per site [R, size] or [n, size] at the positions, or [R, T, size]; and the entering states of
        `capture_entering`. The key of experts is the stacked one, of size E m, in float32 (float64 of float64).

    Cost: the blocks from the first one needed to the last site; the head never runs. Activations of experts are
        computed once more, for the positions alone.
    """
    _ = view.head  # checked before anything is put into the model
    captured: dict[Site, torch.Tensor] = {}
    entered: list[Entering] = []
    at = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device) if rows is None else rows

    def capture_states(module, args, output):
        entered.append(Entering(capture_entering, hidden_of(output), isinstance(output, tuple | list)))

    def capture_site(site: Site, states: Any) -> None:
        if isinstance(states, ExpertInputs):
            places = None if positions is None else at * batch.input_ids.shape[1] + positions.to(at.device)
            keys = states.stacked(places)
            captured[site] = keys.unflatten(0, batch.input_ids.shape) if places is None else keys
            return
        if positions is not None:
            states = states[at.to(states.device), positions.to(states.device)]
        captured[site] = states

    with contextlib.ExitStack() as stack:
        if capture_entering:
            stack.enter_context(output_hooks([(view.block(capture_entering - 1), capture_states)]))
        if entering is not None:
            stack.enter_context(replaced_forwards(stubs(view, entering)))
        visit(view, batch, sites, capture_site)
    if capture_entering and not entered:
        raise did_not_run(view, Site(capture_entering - 1, "block"))
    return captured, entered[0] if entered else None


@torch.no_grad()
@plain_torch()
def visit(
    view: ModelView,
    batch: TokenBatch | SharedRows,
    sites: Sequence[Site],
    see: Callable[[Site, Any], None],
    to_the_end: bool = False,
) -> torch.Tensor | None:
    """Run the model up to the last of some sites, and call `see` with each site and its states [R, T, size].

    For a "key" site whose layer has experts, `see` gets an `ExpertInputs` of all tokens, row after row.

    With `to_the_end` the pass goes on to the last states, which are returned (`last_states`).

    Inputs of a layer that processes hold together (`models.sharded`) are gathered.

    States are freed as the pass continues, unless `see` stores them. Cost: the blocks up to the last site, or all; the
    head never runs.

    Raises:
        UnsupportedModelError: a site's module did not run, or not on all tokens.
    """
    _ = view.head  # checked before anything is put into the model
    missing = set(sites)
    ungated = {site for site in missing if not view.is_gated or site.kind != "key"}

    def pass_on(site: Site, states: Any) -> None:
        if isinstance(states, torch.Tensor):
            states = as_rows(states, batch.input_ids.shape)
        if not isinstance(states, torch.Tensor) or states.shape[:2] != batch.input_ids.shape:
            shape = list(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
            raise UnsupportedModelError(
                f"{name_of(view, site)} was seen with {shape}, not with all {list(batch.input_ids.shape)} tokens of a "
                "batch: a model that cuts batches into parts or packs their tokens cannot be edited"
            )
        if site.kind == "key" and is_split(view.edited_module(site.layer).weight):
            states = whole_inputs(states, view.weight(site.layer))
        seen(site, states)

    def seen(site: Site, states: Any) -> None:
        see(site, states)
        missing.discard(site)
        if not missing and not to_the_end:
            raise _AllSeen

    def see_input(site: Site) -> Callable[..., None]:
        if (stack := view.experts(site.layer)) is not None:
            return lambda module, args, kwargs: seen(
                site, expert_inputs(stack, (*args, *kwargs.values()), batch.input_ids.numel())
            )
        return lambda module, args, kwargs: pass_on(site, next(iter((*args, *kwargs.values())), None))

    def see_output(site: Site) -> Callable[..., None]:
        return lambda module, args, output: pass_on(site, hidden_of(output))

    def see_gated(site: Site) -> tuple[Callable[..., None], Callable[..., None]]:
        parts: dict[str, torch.Tensor] = {}  # of one call; the gate may run before the layer or after it

        def see(name: str, states: Any) -> None:
            parts[name] = states
            if len(parts) == 2:
                gates = gate_values(parts.pop("gate"))
                pass_on(site, parts.pop("inputs").to(gates.dtype) * gates)

        return (
            lambda module, args, kwargs: see("inputs", next(iter((*args, *kwargs.values())))),
            lambda module, args, output: see("gate", output),
        )

    on_inputs = [(module_at(view, site), see_input(site)) for site in ungated if site.kind == "key"]
    on_outputs = [(module_at(view, site), see_output(site)) for site in ungated if site.kind != "key"]
    for site in missing - ungated:
        see_inputs, see_gate = see_gated(site)
        on_inputs.append((module_at(view, site), see_inputs))
        on_outputs.append((view.shared_gate(site.layer), see_gate))
    end = None
    with input_hooks(on_inputs), output_hooks(on_outputs), contextlib.suppress(_AllSeen):
        end = last_states(view, batch)
    if missing:
        raise did_not_run(view, min(missing, key=lambda site: (site.layer, site.kind)))
    return end if to_the_end else None


def require_passes(view: ModelView, sites: Sequence[Site]) -> None:
    """Run two tokens through all blocks, and check that hooks see every block and all `sites`.

    A change of what an edited layer puts out must come out of the site of values, in the same layer, as it is. Experts
    must put out their stacked keys times their stacked matrix.

    Raises:
        UnsupportedModelError: a module, named by its path, that does not run, not on all tokens, or on rows of another
            size than its weight; or a site where the edited layer's output is not one of the terms of a sum; or experts
            that compute something else.
    """
    expected: dict[int, torch.Tensor] = {}
    expected_sum: dict[int, torch.Tensor] = {}  # with shared experts

    def see(site: Site, states: Any) -> None:
        if isinstance(states, ExpertInputs):
            expected[site.layer] = states.outputs()
            if states.stack.shared is not None:
                expected_sum[site.layer] = expected[site.layer] + states.shared_outputs()
        elif site.kind == "key" and states.shape[-1] != (size := view.edited_shape(site.layer)[1]):
            raise UnsupportedModelError(f"{name_of(view, site)} takes {states.shape[-1]} inputs, its weight {size}")

    def check_output(layer: int) -> Callable[..., None]:
        return lambda module, args, output: _require_linear(view, layer, expected.pop(layer, None), output)

    def check_sum(layer: int) -> Callable[..., None]:
        return lambda module, args, output: _require_linear(view, layer, expected_sum.pop(layer, None), output, True)

    stacks = [site.layer for site in sites if site.kind == "key" and view.experts(site.layer) is not None]
    with evaluating(view):
        blocks = [Site(layer, "block") for layer in range(view.num_layers)]
        batch = pad([sample_rows(view.model.config, view.vocabulary)[0][:2]], view.device)
        checks = [(view.edited_module(layer), check_output(layer)) for layer in stacks]
        checks += [(view.mlp(layer), check_sum(layer)) for layer in stacks if view.spec.shared]
        with output_hooks(checks):
            visit(view, batch, [*blocks, *sites], see)
        for site in sites:
            summed = site.kind == "mlp" or (site.kind == "block" and not view.spec.post_norm)
            if summed and module_at(view, site) is not view.edited_module(site.layer):
                _require_sum(view, batch, site)


def _require_linear(
    view: ModelView, layer: int, expected: torch.Tensor | None, output: Any, with_shared: bool = False
) -> None:
    """Raise UnsupportedModelError unless experts put out what their stacked keys and matrix give.

    With `with_shared` the output is that of the MLP around them, to which shared experts add.
    """
    if expected is None:  # the call that put out this was not seen
        return
    states = hidden_of(output)
    problem = "it puts out no tensor"
    if isinstance(states, torch.Tensor):
        problem = f"it puts out {list(states.shape)}, and they {list(expected.shape)}"
        if states.numel() == expected.numel():
            error = relative_error(states.reshape(expected.shape).to(expected.dtype), expected)
            if error <= error_limit(states.dtype) or not bool(torch.isfinite(expected).all()):
                return
            problem = f"they differ by {error:.1g}"
    if with_shared:
        raise UnsupportedModelError(
            f"{name_of(view, Site(layer, 'mlp'))} is not the sum of its experts and of {view.spec.shared} times its "
            f"activations and gate: {problem}. Shared experts cannot be a block of the stack here"
        )
    raise UnsupportedModelError(
        f"{name_of(view, Site(layer, 'key'))} is not the sum of its chosen experts' matrices times their "
        f"activations and gates: {problem}. Its stacked matrix cannot be edited"
    )


def _require_sum(view: ModelView, batch: TokenBatch, site: Site) -> None:
    """Raise UnsupportedModelError unless the edited layer's output is a term of a site's output."""
    before = capture(view, batch, [site])[0][site]
    generator = torch.Generator().manual_seed(0)
    scale = float(before.float().square().mean().sqrt()) or 1.0
    change = scale * torch.randn(before.shape[-1], generator=generator).to(before.device)
    edited, size = view.module_name(site.layer), view.edited_shape(site.layer)[0]
    if size != len(change):
        raise UnsupportedModelError(
            f"{edited} puts out {size} numbers, and {name_of(view, site)} {len(change)}: it is not the last linear "
            "layer of the MLP. Pass an ArchSpec whose `edit` is"
        )

    gates: list[torch.Tensor] = []

    def add(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + change.to(output)

    def see_gate(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        gates.append(gate_values(output))

    hooks: list[Any] = [(view.edited_module(site.layer), add)]
    if view.is_gated:
        hooks.append((view.shared_gate(site.layer), see_gate))
    with output_hooks(hooks):
        after = capture(view, batch, [site])[0][site]
    seen = (after - before).float()
    change = change.float().expand_as(seen)
    if gates:
        change = change * as_rows(gates[-1], before.shape[:2]).to(change)
    if not float((seen - change).norm()) <= error_limit(before.dtype) * float(change.norm()):
        if not bool(torch.isfinite(seen).all()):
            return  # whoever needs the values says so, with the request's name
        raise UnsupportedModelError(
            f"what {edited} puts out does not reach the output of {name_of(view, site)} as it is: a norm or a "
            "multiplier stands between them, or it is no layer of the MLP. Pass an ArchSpec with post_norm = true"
            + ("" if site.kind == "block" else f", and {view.spec.edit} as its mlp")
        )


def name_of(view: ModelView, site: Site) -> str:
    """The path of the module whose hook sees `site`."""
    parts = {"key": view.spec.edit, "attention": view.spec.attention, "mlp": view.spec.mlp, "block": ""}
    return f"{view.spec.blocks}.{site.layer}.{parts[site.kind]}".rstrip(".")


def did_not_run(view: ModelView, site: Site) -> UnsupportedModelError:
    """The error for a module that a forward pass bypassed: its states cannot be read or changed."""
    return UnsupportedModelError(
        f"{name_of(view, site)} did not run in a forward pass of {type(view.model).__name__}: the model runs "
        "something else in its place (compiled code, a fused kernel) or leaves it out, so what an edit needs cannot be "
        "seen. Load the model without that, or pass an ArchSpec that names the modules that run"
    )


@plain_torch()
def last_states(view: ModelView, batch: TokenBatch | SharedRows) -> torch.Tensor:
    """What the head takes: the states [R, T, h] after all blocks and the final norm; [1, N, h] of shared rows.

    Where the model runs whole (`Head.matrix` is None), its logits [R, T, V]; `view.head` takes either.
    """
    runs_whole = view.head.matrix is None
    with fused_modules(view):
        if isinstance(batch, SharedRows):
            return batch.run(view)
        if runs_whole:
            return model_logits(view.model, batch.input_ids, batch.attention_mask)
        return decoder_states(view.base, view.base_takes, batch.input_ids, batch.attention_mask)


@contextlib.contextmanager
def fused_modules(view: ModelView) -> Iterator[None]:
    """Inside the block, norms and activations run in one pass over memory where that gives the same; see fused.py.

    Modules whose forward functions the caller has replaced stay as they are.
    """
    faster = view.once(fused_forwards) if fused.can_run() else {}
    with replaced_forwards({module: f for module, f in faster.items() if not has_replaced_forward(module)}):
        yield


@plain_torch()
def starts_midway(view: ModelView) -> bool:
    """Whether every block needs nothing from those below it but the hidden states, tried with a few tokens.

    Not so in models whose blocks share keys, states or the embeddings.

    Cost: two passes of a few tokens, the second one block by block.
    """
    batch = pad(sample_rows(view.model.config, view.vocabulary), view.device)
    assert batch.attention_mask is not None
    valid = batch.attention_mask.bool()
    sites = [Site(layer, "block") for layer in range(view.num_layers)]
    with evaluating(view):
        whole, entering = capture(view, batch, sites, capture_entering=1 if len(sites) > 1 else 0)
        for below, site in itertools.pairwise(sites):
            assert entering is not None
            start = Entering(site.layer, whole[below], entering.as_tuple)
            try:
                part, _ = capture(view, batch, [site], entering=start)
            except UnsupportedModelError:
                raise
            except Exception as error:  # it may be any code
                problem = first_line(error)
            else:
                states = whole[site][valid.to(whole[site].device)]
                error = relative_error(part[site][valid.to(part[site].device)], states)
                if error <= error_limit(states.dtype, view.head.rounding) or not bool(torch.isfinite(states).any()):
                    continue
                problem = f"its states differ by {error:.1g}"
            _log.info("the blocks of %s do not start midway: block %d: %s", view.spec.name, site.layer, problem)
            return False
    return True


def fused_forwards(view: ModelView) -> dict[torch.nn.Module, Forward]:
    """Forward functions in one pass over memory for modules of the decoder; see models/fused.py."""
    return fused.forwards(view.base)


@contextlib.contextmanager
def evaluating(view: ModelView) -> Iterator[Widening | None]:
    """Inside the block: evaluation mode, no gradients of parameters, and passes in their `computing_dtype`."""
    with evaluation_mode(view.model), computing(view.entry) as widening:
        yield widening
