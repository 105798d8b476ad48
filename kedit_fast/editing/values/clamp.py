"""`clamp_norm_factor = "auto"`: how large the deltas must be, tried on a few requests of the first batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kedit_fast.editing.values.result import Values
from kedit_fast.methods.hparams import Hparams

_log = logging.getLogger("kedit_fast")
CLAMPS = (0.75, 1.0, 2.0, 4.0)
"""In the order in which they are tried: a larger delta does more harm."""
LOSS_BOUND = 0.5
"""Nats; the median loss that is low enough: of most requests the target is then the probable continuation."""
TRIAL_REQUESTS = 16
"""Requests on which a clamp is tried, at most."""


def trial_places(count: int, most: int = TRIAL_REQUESTS) -> list[int]:
    """At most `most` of `count` places, evenly spread: files are often sorted."""
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)}) if count > most else [*range(count)]


def choose_clamp(hparams: Hparams, find: Callable[[Hparams], Values]) -> float:
    """The first clamp with which the median of the final losses is at most `LOSS_BOUND`.

    Where none reaches it, the clamp with the lowest median is chosen and a warning says so.

    Args:
        hparams: hyper-parameters of the loop, of which the clamp is replaced.
        find: optimizes the values of the trial requests.

    Cost: the values of the trial requests once per clamp that is tried.
    """
    medians: dict[float, float] = {}
    for clamp in CLAMPS:
        values = find(replace(hparams, clamp_norm_factor=clamp))
        medians[clamp] = _median_loss(values)
        if not medians[clamp] > LOSS_BOUND:
            break
    best = min(medians, key=medians.__getitem__)
    tried = ", ".join(f"{clamp:g}: {loss:.2f}" for clamp, loss in medians.items())
    _log.info("clamp_norm_factor %g, by the median loss of %d requests (%s)", best, len(values.losses), tried)
    if medians[best] > LOSS_BOUND:
        _log.warning(
            "no clamp_norm_factor up to %g brings the median loss of the values below %g (%s): most edits will not "
            "come through at layer %s",
            CLAMPS[-1],
            LOSS_BOUND,
            tried,
            hparams.layers[-1],
        )
    return best


def _median_loss(values: Values) -> float:
    """The median of the finite losses of values that took a step; of no such loss, 0: no clamp is at fault."""
    usable: Sequence[bool] = values.usable
    losses = values.losses[torch.tensor(usable, dtype=torch.bool)]
    losses = losses[losses.isfinite()]
    return float(losses.double().quantile(0.5)) if len(losses) else 0.0
