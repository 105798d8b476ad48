"""All requests at once: the gradients at their tokens stand in for values, of all modules from one backward pass."""

from __future__ import annotations

from kedit_fast.editing.batch_run import BatchRun
from kedit_fast.editing.gradients import NOT_FINITE
from kedit_fast.requests.problems import require_no_problems

_ROWS = {"ans": "answer", "mask": "all"}  # the published names of the hyper-parameter `token`


def write_gradients(batch: BatchRun) -> None:
    """Gather keys and gradients of all modules, solve for all of them and write them."""
    context = batch.context
    rows = _ROWS[context.hparams.token]
    with batch.timed("values"):
        gathered = context.gather_gradients(
            context.view, batch.prepared, list(context.modules), rows, on_problem="keep"
        )
    bad = {i: f"{batch.prepared[i].name}: {NOT_FINITE}" for i in gathered.not_finite()}
    if batch.on_error == "raise":
        require_no_problems(bad)
    batch.skipped |= bad
    if len(bad) == len(batch.prepared):
        return
    gathered = gathered.without(list(bad))
    batch.losses += [loss for i, loss in enumerate(gathered.losses.tolist()) if i not in bad]
    batch.steps += [0] * len(batch.losses)
    with batch.timed("solve"):
        updates = context.solver_state.solve_gradients(gathered.modules, gathered.turns)
    for module, update in updates.items():
        batch.write(module, update)
