"""Gradient steps on one matrix: the schedule of methods without a closed form."""

from __future__ import annotations

from kedit_fast.editing.batch_run import BatchRun


def write_tuned(batch: BatchRun) -> None:
    """Tune on all requests of a batch, in the order that the method has."""
    assert batch.context.tuning is not None
    batch.context.tuning.write(batch)
