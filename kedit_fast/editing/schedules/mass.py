"""All requests at once: the residual at the last layer, spread over the edited layers from the lowest one up."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kedit_fast.editing.batch_run import BatchRun, request_weights
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.chunks import Columns, spans_of
from kedit_fast.methods.recipe import Spread
from kedit_fast.models.forward import Site
from kedit_fast.solver.least_squares import collisions

_log = logging.getLogger("kedit_fast")

SPREADS: dict[Spread, Callable[[int], float]] = {
    "linear": lambda layers_left: 1 / layers_left,
    "sqrt": lambda layers_left: layers_left**-0.5,
    "none": lambda layers_left: 1.0,
}
"""Number of layers still to be written, this one included -> the share of the residual that this layer takes."""


def write_mass(batch: BatchRun) -> None:
    """Find all values at the last layer, then solve and write layer after layer."""
    context, recipe = batch.context, batch.context.recipe
    layers = context.hparams.layers
    site = Site(layers[-1], context.site)
    with batch.timed("solve"):
        for layer in layers:  # unusable statistics stop the batch before its values are optimized
            context.solver_state.preconditioner(layer)
            context.solver_state.output_metric(layer)
    prepared, values = batch.find_values(range(len(batch.prepared)), layers[-1])
    if not prepared:
        return
    spans = spans_of(prepared, context.hparams)
    columns = Columns.of(prepared, spans)
    batch.record(values, columns)
    weights, groups = request_weights(prepared), batch.value_groups(prepared)
    if weights is not None:
        weights = weights[list(columns.owner)]
    with batch.timed("keys"):
        passes = KeyPass(
            context.view,
            prepared,
            site,
            recipe.key_weights,
            context.state_budget,
            spans=spans,
            other_tokens=context.hparams.keep_other_tokens,
        )
    for i, layer in enumerate(layers):
        with batch.timed("keys"):
            measured = passes.at(layer)
        if context.on_keys is not None:
            context.on_keys(layer, measured.keys)
        residual = values.targets.to(measured.outputs) - measured.outputs  # [h, u]
        if i == 0:
            batch.residual_before = float(residual.square().sum())
        share = SPREADS[recipe.spread](len(layers) - i)
        with batch.timed("solve"):
            update = context.solver_state.solve_batch(
                layer, measured.keys, residual * share, weights, groups, measured.other_keys
            )
        batch.write(context.view.module_name(layer), update)
        if layer == layers[-1]:
            pairs = ((columns.owner[i], columns.owner[j]) for i, j in collisions(measured.keys))
            batch.collisions = list(dict.fromkeys((i, j) for i, j in pairs if i != j))
            if batch.collisions and groups is None:
                _log.warning(
                    "%d pairs of requests have nearly the same key, as requests on one subject have: each gets a mean "
                    "of their values (the method memit-merge gives them one value)",
                    len(batch.collisions),
                )
    if batch.writes_again:
        batch.write_shaped()
        passes.restart()
    with batch.timed("keys"):
        outputs = passes.outputs()
    batch.residual_after = float((values.targets.to(outputs) - outputs).square().sum())
