"""All requests at once: the residual at the last layer, spread over the edited layers from the lowest one up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from kedit_fast.editing.batch_run import BatchRun, request_weights
from kedit_fast.editing.keys import KeyPass, KeysAndOutputs
from kedit_fast.editing.values.chunks import Columns, Spans, spans_of
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Spread
from kedit_fast.models.forward import Site
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.least_squares import collisions

_log = logging.getLogger("kedit_fast")

SPREADS: dict[Spread, Callable[[int], float]] = {
    "linear": lambda layers_left: 1 / layers_left,
    "sqrt": lambda layers_left: layers_left**-0.5,
    "none": lambda layers_left: 1.0,
}
"""Number of layers still to be written, this one included -> the share of the residual that this layer takes."""


@dataclass(frozen=True)
class _System:
    """The n columns of u requests: one of each, or one of each chunk of its target."""

    prepared: Sequence[PreparedRequest]
    """[u] requests."""
    spans: Spans | None
    """[u] chunks of their targets; None for whole targets."""
    targets: torch.Tensor
    """[h, n] values."""
    weights: torch.Tensor | None
    """[n] in the least squares; None for 1 each."""
    groups: Sequence[str] | None
    """n names of requests that share a column; None where each has its own."""

    @property
    def columns(self) -> Columns:
        """Which request each column belongs to."""
        return Columns.of(self.prepared, self.spans)

    def select(self, requests: Sequence[int]) -> _System:
        """The columns of some of the requests."""
        chosen = self.columns.of_requests(requests)
        return _System(
            [self.prepared[i] for i in requests],
            None if self.spans is None else [self.spans[i] for i in requests],
            self.targets[:, chosen],
            None if self.weights is None else self.weights[chosen],
            None if self.groups is None else [self.groups[i] for i in chosen],
        )


def write_mass(batch: BatchRun) -> None:
    """Find all values at the last layer, then solve and write layer after layer; again for requests not reached."""
    context, hparams = batch.context, batch.context.hparams
    with batch.timed("solve"):
        for layer in hparams.layers:  # unusable statistics stop the batch before its values are optimized
            context.solver_state.preconditioner(layer)
            context.solver_state.output_metric(layer)
    prepared, values = batch.find_values(range(len(batch.prepared)), hparams.layers[-1])
    if not prepared:
        return
    places = [i for i in range(len(batch.prepared)) if i not in batch.skipped]  # of `prepared` in the batch
    spans, weights = spans_of(prepared, hparams), request_weights(prepared)
    columns = Columns.of(prepared, spans)
    if weights is not None:
        weights = weights[list(columns.owner)]
    system = _System(prepared, spans, values.targets, weights, batch.value_groups(prepared))
    passes = _key_pass(batch, system)
    first, requests, pairs = _write_round(batch, system, passes, is_first=True)
    rounds = [requests]
    if batch.writes_again:
        batch.write_shaped()
        passes.restart()
    while True:
        with batch.timed("keys"):
            outputs = passes.outputs()
        residual = values.targets.to(outputs) - outputs  # [h, n]
        if batch.writes_again or not requests or len(rounds) >= hparams.rounds:
            break
        norms = residual.norm(dim=0)
        requests = _chosen(norms > hparams.round_share * first, norms, system, hparams)
        if not requests:
            break
        some = system.select(requests)
        _write_round(batch, some, _key_pass(batch, some), is_first=False)
        rounds.append(requests)
        passes.restart()
    written = sorted({request for requests in rounds for request in requests})
    for i in sorted(set(range(len(prepared))) - set(written)):
        norms = first[columns.of_requests([i])]
        batch.skipped[places[i]] = f"{prepared[i].name}: {_why_not(float(norms.max()), hparams)}"
    chosen = columns.of_requests(written)
    batch.record(values.select(chosen), system.select(written).columns, tuple(map(len, rounds)))
    batch.residual_before = float(first[chosen].square().sum())
    batch.residual_after = float(residual[:, chosen].square().sum())
    number = {request: i for i, request in enumerate(written)}
    batch.collisions = [(number[i], number[j]) for i, j in pairs if i in number and j in number]
    if batch.collisions and system.groups is None:
        _log.warning(
            "%d pairs of requests have nearly the same key%s: each gets a mean of their values%s",
            len(batch.collisions),
            ", as requests on one subject have" if spans is None else ", before a chunk",
            " (the method memit-merge gives them one value)" if spans is None else "",
        )


def _write_round(
    batch: BatchRun, system: _System, passes: KeyPass, *, is_first: bool
) -> tuple[torch.Tensor, list[int], list[tuple[int, int]]]:
    """Solve and write layer after layer, once.

    In the first round the bounds of the residual choose which requests take part; in later ones, all do.

    Returns:
        the norms [n] of the residuals before the round, the requests that took part, and pairs of requests with nearly
        the same key at the last layer.
    """
    context, layers = batch.context, batch.context.hparams.layers
    columns = system.columns
    norms, requests, pairs = torch.empty(0), list(range(len(system.prepared))), []
    neighbors = _neighbor_pass(batch, system.prepared)
    for i, layer in enumerate(layers):
        with batch.timed("keys"):
            measured = passes.at(layer)
        if is_first and context.on_keys is not None:
            context.on_keys(layer, measured.keys)
        residual = system.targets.to(measured.outputs) - measured.outputs  # [h, n]
        if i == 0:
            norms = residual.norm(dim=0)
            if is_first:
                requests = _chosen(torch.ones_like(norms, dtype=torch.bool), norms, system, context.hparams)
            if not requests:
                break
        with batch.timed("keys"):
            unmoved = _unmoved(measured, neighbors, layer)
        share = SPREADS[context.recipe.spread](len(layers) - i)
        with batch.timed("solve"):
            update = context.solver_state.solve_batch(
                layer,
                measured.keys,
                residual * share,
                system.weights,
                system.groups,
                unmoved,
                chosen=None if len(requests) == len(system.prepared) else columns.of_requests(requests),
            )
        batch.write(context.view.module_name(layer), update)
        if layer == layers[-1]:
            owners = ((columns.owner[i], columns.owner[j]) for i, j in collisions(measured.keys))
            pairs = list(dict.fromkeys((i, j) for i, j in owners if i != j))
    return norms, requests, pairs


def _key_pass(batch: BatchRun, system: _System) -> KeyPass:
    context = batch.context
    with batch.timed("keys"):
        return KeyPass(
            context.view,
            system.prepared,
            Site(context.hparams.layers[-1], context.site),
            context.recipe.key_weights,
            context.state_budget,
            spans=system.spans,
            other_tokens=context.hparams.keep_other_tokens,
        )


def _neighbor_pass(batch: BatchRun, prepared: Sequence[PreparedRequest]) -> KeyPass | None:
    """The keys of neighborhood prompts, each once, except those at which an edit has its key; None without any."""
    context = batch.context
    edited = {request.rewriting[0].cut() for request in prepared}
    prompts = {prompt.cut(): request for request in prepared for prompt in request.neighbors}
    alone = [replace(request, rewriting=(prompt,)) for prompt, request in prompts.items() if prompt not in edited]
    if context.hparams.neighbor_columns and not alone:
        _log.warning("neighbor_columns has no effect on this batch: its requests have no neighborhood prompts")
    if not alone:
        return None
    site = Site(context.hparams.layers[-1], context.site)
    with batch.timed("keys"):
        return KeyPass(context.view, alone, site, "mean", context.state_budget)


def _unmoved(measured: KeysAndOutputs, neighbors: KeyPass | None, layer: int) -> torch.Tensor | None:
    """Keys [d, p] at which the layer's output should stay: of other tokens, and of neighborhood prompts."""
    parts = [] if measured.other_keys is None else [measured.other_keys]
    if neighbors is not None:
        parts.append(neighbors.at(layer).keys)
    return torch.cat(parts, 1) if parts else None


def _chosen(eligible: torch.Tensor, norms: torch.Tensor, system: _System, hparams: Hparams) -> list[int]:
    """The requests to write in a round: those with a column that is within the bounds.

    Requests that share a column are written together.

    Args:
        eligible: [n] bool.
        norms: [n] of the residuals |z - h|.
        system: the columns.
        hparams: the bounds.
    """
    if hparams.round_least:
        eligible = eligible & (norms > hparams.round_least)
    if hparams.round_most:
        eligible = eligible & (norms < hparams.round_most)
    owner = system.columns.owner
    group_of: Sequence[Hashable] = owner if system.groups is None else system.groups
    groups = {group for group, is_eligible in zip(group_of, eligible.tolist(), strict=True) if is_eligible}
    return sorted({request for request, group in zip(owner, group_of, strict=True) if group in groups})


def _why_not(norm: float, hparams: Hparams) -> str:
    """Why a request with this residual |z - h| is not written."""
    if hparams.round_least and norm <= hparams.round_least:
        return f"reached before the write: |z - h| = {norm:.3g} is not above round_least = {hparams.round_least:g}"
    return f"|z - h| = {norm:.3g} is not below round_most = {hparams.round_most:g}"
