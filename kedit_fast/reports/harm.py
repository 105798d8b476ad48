"""Predicted harm in words, and of patches from a folder of statistics. No model is needed."""

from __future__ import annotations

import os
from pathlib import Path

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.patches.patch import Patch
from kedit_fast.solver.harm import Harm, Moments
from kedit_fast.statistics.store import read_layer, read_output_metric


def patch_harm(patch: Patch, folder: str | os.PathLike | None) -> Harm:
    """The harm that a patch is predicted to do to the model that it is for.

    Args:
        patch: the edits.
        folder: statistics of that model's layers, inputs and output metrics, which `kedit-fast stats --output-metric`
            wrote; whether they are of that model is not known to a patch, only their sizes are checked. None for norms
            alone.

    Raises:
        StatisticsError: there is no such folder, or a file in it is damaged or of another size.

    Cost: see `solver.harm.predicted_kl`; the moments of one layer are in memory at a time.
    """
    if folder is None:
        return Harm.of(patch.updates.items())
    if not Path(folder).is_dir():
        raise StatisticsError(f"no statistics folder {folder}: make one with `kedit-fast stats`")

    def moments(module: str) -> Moments | str:
        outputs = read_output_metric(Path(folder), module)
        if outputs is None:
            return (
                f"{folder} has no output metric of {module}: `kedit-fast stats MODEL --text FILE --layers N --out "
                f"{folder} --resume --output-metric` adds it"
            )
        return read_layer(Path(folder), module).second.moment, outputs.second.moment

    try:
        return Harm.of(patch.updates.items(), moments)
    except InvalidArgumentError as error:
        raise StatisticsError(f"the statistics in {folder} are not of this patch's model: {error}") from error


def in_words(harm: Harm) -> str:
    """One line: the norm of all updates together, and the predicted KL divergence, or that there is none."""
    if harm.predicted_kl is None:
        return f"|Delta| {harm.norm:.4g}"
    return f"|Delta| {harm.norm:.4g}, predicted KL {harm.predicted_kl:.3g} nats a token"
