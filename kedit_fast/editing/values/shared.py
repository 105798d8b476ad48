"""Values from a store where it has them, the others optimised, by all processes of a process group together."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kedit_fast.editing.values.loop import SITES, Values, by_length, find_values, in_teams
from kedit_fast.editing.values.store import ValueRun, ValueStore, edited_hash
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.process_group import gather, world
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


@plain_torch()
def find_shared_values(
    view: ModelView,
    tokenizer: Any,
    prepared: Sequence[PreparedRequest],
    layer: int,
    what: str,
    hparams: Hparams,
    *,
    teams: Sequence[Hashable] | None = None,
    store: ValueStore | None = None,
    progress: bool = False,
) -> Values:
    """`find_values` of what `store` does not have, each process of a process group taking its share.

    The store takes values as they are done (in a process group when all are); the caller flushes it. In a group the
    first process alone reads and writes it; values that several requests share are not stored. A request whose loss is
    not finite does not raise: `status` tells.

    Raises:
        EditError: the store refuses, the processes have different requests or models, or one of them failed.
    """
    rank, size = world()
    count = Counter(teams or ())
    alone = [teams is None or count[teams[i]] == 1 for i in range(len(prepared))]

    def looked_up() -> dict[int, Values]:
        if store is None or rank > 0:
            return {}
        store.begin(ValueRun(view, tokenizer, layer, SITES[what], hparams, prepared))
        return {i: value for i, request in enumerate(prepared)
                if alone[i] and (value := store.load(request)) is not None}  # fmt: skip

    def taken(which: Sequence[int], values: Values) -> None:
        if store is not None and rank == 0:
            own = [place for place, i in enumerate(which) if alone[i]]
            store.store([prepared[which[place]] for place in own], values.select(own))

    def optimised(which: Sequence[int], finished: Callable[[Sequence[int], Values], None] | None) -> Values:
        chosen = [prepared[i] for i in which]
        names = None if all(alone) else [teams[i] for i in which]
        return find_values(view, chosen, layer, what, hparams, teams=names, on_problem="keep", finished=finished,
                               progress=progress and rank == 0)  # fmt: skip

    if size == 1:
        known = looked_up()
        wanted = [i for i in range(len(prepared)) if i not in known]
        parts = [([i], value) for i, value in known.items()]
        if wanted:
            parts.append((wanted, optimised(wanted, lambda some, v: taken([wanted[i] for i in some], v))))
    else:
        about = repr([(p.rewriting, p.kl, p.target) for p in prepared]) + repr((layer, what, hparams, teams))
        about += edited_hash(view, hparams.layers)
        digest = hashlib.sha256(about.encode()).hexdigest()
        answers = _all_of(lambda: (digest, looked_up()))
        if len({other for other, _ in answers}) > 1:
            raise EditError(
                "the processes have different requests, hyper-parameters or models: start them all with the same "
                "arguments"
            )
        known = answers[0][1]
        wanted = [i for i in range(len(prepared)) if i not in known]
        order = by_length([prepared[i] for i in wanted])
        units = in_teams([wanted[i] for i in order], None if all(alone) else teams)
        mine = [i for unit in units[rank::size] for i in unit]
        shares = _all_of(lambda: (mine, _on_cpu(optimised(mine, None)) if mine else None))
        done = [(which, values) for which, values in shares if values is not None]
        _all_of(lambda: [taken(which, values) for which, values in done])
        parts = [([i], value) for i, value in known.items()] + done
    if known:
        _log.info("%d of %d values were there already", len(known), len(prepared))
    whole = Values.concatenated([values for _, values in parts], view.head.device)
    back = torch.argsort(torch.tensor([i for which, _ in parts for i in which]))
    return whole.select(back.tolist())


def flush_store(store: ValueStore | None) -> None:
    """Write what the store has taken; in a process group all raise when that fails."""
    if store is None:
        return
    if world()[1] == 1:
        store.flush()
    else:
        _all_of(lambda: store.flush() if world()[0] == 0 else None)


def _all_of(run: Callable[[], Any]) -> list[Any]:
    """What `run` returns in every process; when it raises in one, all raise."""
    result, failure, own = None, "", None
    try:
        result = run()
    except BaseException as error:
        failure, own = f"{type(error).__name__}: {error}", error
    found = gather((result, failure))
    if own is not None:
        raise own
    for rank, (_, what) in enumerate(found):
        if what:
            raise EditError(f"process {rank} failed: {what}")
    return [value for value, _ in found]


def _on_cpu(values: Values) -> Values:
    return replace(values, all_targets=values.all_targets.cpu(), all_deltas=values.all_deltas.cpu())
