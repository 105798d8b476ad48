"""The order in which a batch is computed and written: one module per schedule of `kedit_fast.methods.recipe`."""

from __future__ import annotations

from collections.abc import Callable

from kedit_fast.editing.batch_run import BatchRun
from kedit_fast.editing.schedules.gradients import write_gradients
from kedit_fast.editing.schedules.mass import write_mass
from kedit_fast.editing.schedules.single import write_one_by_one
from kedit_fast.editing.schedules.tuning import write_tuned
from kedit_fast.methods.recipe import Schedule

SCHEDULES: dict[Schedule, Callable[[BatchRun], None]] = {
    "mass": write_mass,
    "single": write_one_by_one,
    "gradients": write_gradients,
    "tuning": write_tuned,
}
