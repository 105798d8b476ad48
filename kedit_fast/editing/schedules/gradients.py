"""All requests at once: the gradients at their tokens stand in for values, of all modules from one backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from kedit_fast.editing.batch_run import BatchRun, EditContext
from kedit_fast.editing.gradients import NOT_FINITE, AnswerGradients
from kedit_fast.requests.problems import OnError, require_no_problems
from kedit_fast.requests.prompts import PreparedRequest

_ROWS = {"ans": "answer", "mask": "all"}  # the published names of the hyper-parameter `token`
WARM_UP_BATCH = 100  # requests whose rows are gathered together, as in the published warm-up


def write_gradients(batch: BatchRun) -> None:
    """Gather keys and gradients of all modules, solve for all of them and write them."""
    context = batch.context
    with batch.timed("values"):
        gathered, bad = _gather(context, batch.prepared, batch.on_error)
    batch.skipped |= bad
    if len(bad) == len(batch.prepared):
        return
    batch.losses += [loss for i, loss in enumerate(gathered.losses.tolist()) if i not in bad]
    batch.steps += [0] * len(batch.losses)
    with batch.timed("solve"):
        updates = context.solver_state.solve_gradients(gathered.modules, gathered.turns)
    for module, update in updates.items():
        batch.write(module, update)


def warm_up(context: EditContext, prepared: Sequence[PreparedRequest], on_error: OnError) -> dict[int, str]:
    """Show requests to the normalizers and write nothing; index -> why a request was left out."""
    problems: dict[int, str] = {}
    for start in range(0, len(prepared), WARM_UP_BATCH):
        gathered, bad = _gather(context, prepared[start : start + WARM_UP_BATCH], on_error)
        context.solver_state.warm_up(gathered.modules, gathered.turns)
        problems |= {start + place: reason for place, reason in bad.items()}
    return problems


def _gather(
    context: EditContext, prepared: Sequence[PreparedRequest], on_error: OnError
) -> tuple[AnswerGradients, dict[int, str]]:
    """The rows of the requests that can be used, and index -> why one cannot."""
    rows = _ROWS[context.hparams.token]
    gathered = context.gather_gradients(context.view, prepared, list(context.modules), rows, on_problem="keep")
    bad = {place: f"{prepared[place].name}: {NOT_FINITE}" for place in gathered.not_finite()}
    if on_error == "raise":
        require_no_problems(bad)
    return gathered.without(list(bad)), bad
