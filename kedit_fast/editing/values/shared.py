"""Values from a store as far as it has them; the others optimized by all processes of a process group together."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kedit_fast.editing.values.loop import SITES, find_values
from kedit_fast.editing.values.objective import EarlierChunks
from kedit_fast.editing.values.order import by_length, in_groups
from kedit_fast.editing.values.protocol import ValueRun, ValueStore
from kedit_fast.editing.values.result import Values
from kedit_fast.editing.values.slots import RecordedIteration
from kedit_fast.editing.values.store import edited_hash
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import StopRule, ValueSites
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.process_group import from_all, world
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


@plain_torch()
def find_shared_values(
    view: ModelView,
    tokenizer: Any,
    prepared: Sequence[PreparedRequest],
    layer: int,
    site_kind: ValueSites,
    hparams: Hparams,
    *,
    stop_rule: StopRule = "below_loss",
    groups: Sequence[Hashable] | None = None,
    earlier: Sequence[EarlierChunks] | None = None,
    starting: Sequence[torch.Tensor | None] | None = None,
    store: ValueStore | None = None,
    most: int | None = None,
    progress: bool = False,
    recorded: RecordedIteration | None = None,
) -> Values:
    """`find_values` of requests that `store` does not have; each process of a process group takes its share.

    The store takes values when they are done (in a process group when all are done); the caller flushes it. In a
    process group only the first process reads and writes it. Values that several requests share are not stored. A
    request whose loss is not finite does not raise: its `Values.status` says so.

    Processes that hold the model together (`models.sharded`) optimize all values together, and all take those of the
    first process.

    Args:
        tokenizer: the model's; it is part of what identifies a stored value.
        store: where values are looked up and written; None for no store.
        view, prepared, layer, site_kind, hparams, stop_rule, groups, earlier, starting, most, progress, recorded: as in
            `find_values`.

    Raises:
        EditError: the store refuses, the processes have different requests or models, or one of them failed.
    """
    rank, size = world()
    members = Counter(groups or ())
    is_alone = [groups is None or members[groups[i]] == 1 for i in range(len(prepared))]

    def look_up() -> dict[int, Values]:
        if store is None or (rank > 0 and not view.is_sharded):
            return {}
        store.begin(ValueRun(view, tokenizer, layer, SITES[site_kind], stop_rule, hparams, prepared))  # takes all parts
        if rank > 0:
            return {}
        values = {i: store.load(request) for i, request in enumerate(prepared) if is_alone[i]}
        return {i: value for i, value in values.items() if value is not None}

    def save(indices: Sequence[int], values: Values) -> None:
        if store is not None and rank == 0:
            places = [place for place, i in enumerate(indices) if is_alone[i]]
            store.store([prepared[indices[place]] for place in places], values.select(places))

    def optimize(indices: Sequence[int], finished: Callable[[Sequence[int], Values], None] | None) -> Values:
        return find_values(
            view,
            [prepared[i] for i in indices],
            layer,
            site_kind,
            hparams,
            stop_rule=stop_rule,
            groups=None if groups is None or all(is_alone) else [groups[i] for i in indices],
            earlier=None if earlier is None else [earlier[i] for i in indices],
            starting=None if starting is None else [starting[i] for i in indices],
            on_problem="keep",
            most=most,
            finished=finished,
            progress=progress and rank == 0,
            recorded=recorded,
        )

    if size == 1:
        stored = look_up()
        missing = [i for i in range(len(prepared)) if i not in stored]
        optimized: list[tuple[Sequence[int], Values]] = []
        if missing:
            values = optimize(missing, lambda some, done: save([missing[i] for i in some], done))
            optimized.append((missing, values))
    else:
        identity = repr([(p.rewriting, p.kl, p.target) for p in prepared])
        identity += repr((layer, site_kind, stop_rule, hparams, groups))
        if not view.is_sharded:
            identity += edited_hash(view, hparams.layers)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        answers = from_all(lambda: (digest, look_up()), EditError)
        if len({other for other, _ in answers}) > 1:
            raise EditError(
                "the processes have different requests, hyper-parameters or models: start them all with the same "
                "arguments"
            )
        stored = answers[0][1]
        missing = [i for i in range(len(prepared)) if i not in stored]
        order = by_length([prepared[i] for i in missing])
        units = in_groups([missing[i] for i in order], None if all(is_alone) else groups)
        first, parts = view.work_share
        share = [i for unit in units[first::parts] for i in unit]
        shares = from_all(lambda: (share, _on_cpu(optimize(share, None)) if share else None), EditError)
        optimized = [(indices, values) for indices, values in shares[:parts] if values is not None]
        from_all(lambda: [save(indices, values) for indices, values in optimized], EditError)
    if stored:
        _log.info("%d of %d values were there already", len(stored), len(prepared))
    return Values.in_order([*(([i], value) for i, value in stored.items()), *optimized], view.head.device)


def flush_store(store: ValueStore | None) -> None:
    """Write what the store has taken; in a process group all processes raise when that fails."""
    if store is None:
        return
    if world()[1] == 1:
        store.flush()
    else:
        from_all(lambda: store.flush() if world()[0] == 0 else None, EditError)


def _on_cpu(values: Values) -> Values:
    return replace(values, all_targets=values.all_targets.cpu(), all_deltas=values.all_deltas.cpu())
