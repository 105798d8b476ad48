"""Predicted harm in words, and of patches from a folder of statistics. No model is needed."""

from __future__ import annotations

import os
from pathlib import Path

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.shared_experts import is_shared_path
from kedit_fast.models.weight_names import is_experts_path
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

    def moments(path: str) -> Moments | str:
        module = _stack_of(path, patch)
        outputs = read_output_metric(Path(folder), module)
        if outputs is None:
            return (
                f"{folder} has no output metric of {module}: `kedit-fast stats MODEL --text FILE --layers N --out "
                f"{folder} --resume --output-metric` adds it"
            )
        second = read_layer(Path(folder), module).second
        if module == path:
            return second.moment, outputs.second.moment
        if second.shared is None:
            return f"{folder} has no second moment of {path}, which is a block of the stack of {module}"
        return second.shared, outputs.second.moment

    try:
        return Harm.of(patch.updates.items(), moments)
    except InvalidArgumentError as error:
        raise StatisticsError(f"the statistics in {folder} are not of this patch's model: {error}") from error


def _stack_of(path: str, patch: Patch) -> str:
    """The module whose file has the statistics of a patched one: of shared experts in a stack, that of the others."""
    around = path.rsplit(".", 2)[0]
    beside = [other for other in patch.updates if is_experts_path(other) and other.rsplit(".", 2)[0] == around]
    return beside[0] if beside and is_shared_path(path) else path


def in_words(harm: Harm) -> str:
    """One line: the norm of all updates together, and the predicted KL divergence, or that there is none."""
    if harm.predicted_kl is None:
        return f"|Delta| {harm.norm:.4g}"
    return f"|Delta| {harm.norm:.4g}, predicted KL {harm.predicted_kl:.3g} nats a token"
