"""Values from a store where it has them, the others optimised, by all processes of a torchrun together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kedit_fast.distributed import gather, require_same, world
from kedit_fast.editing.prompts import PreparedRequest
from kedit_fast.editing.value_store import ValueStore
from kedit_fast.editing.values import SITES, Values, by_length, optimise_values
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.architectures import ModelView


def optimise_shared(
    view: ModelView,
    tokenizer: Any,
    prepared: Sequence[PreparedRequest],
    layer: int,
    what: str,
    hparams: Hparams,
    *,
    store: ValueStore | None = None,
    progress: bool = False,
) -> Values:
    """`optimise_values` of what `store` does not have, each process of a process group taking its share.

    Values that are done are stored even when the run is interrupted. A request whose loss is not finite does not
    raise: `status` tells.

    Raises:
        EditError: the processes have different requests, or one of them failed.
    """
    device = view.head.device
    if store is not None:
        store.begin(view, tokenizer, layer, what, hparams)
    known = {} if store is None else {i: v for i, p in enumerate(prepared) if (v := store.load(p)) is not None}
    wanted = [i for i in range(len(prepared)) if i not in known]
    rank, size = world()
    if size > 1:
        text = repr([(p.rewriting, p.kl, p.target) for p in prepared]) + repr((layer, what, hparams, wanted))
        require_same("requests, hyper-parameters or stored values", hashlib.sha256(text.encode()).hexdigest())

    def optimised(which: Sequence[int], keep: bool) -> Values:
        chosen = [prepared[i] for i in which]

        def finished(numbers: Sequence[int], values: Values) -> None:
            if keep and store is not None:
                store.store([chosen[i] for i in numbers], values)

        return optimise_values(
            view, chosen, layer, what, hparams, on_problem="keep", progress=progress and rank == 0, finished=finished
        )

    parts: list[tuple[list[int], Values]] = [([i], v) for i, v in known.items()]
    try:
        if wanted and size == 1:
            parts.append((wanted, optimised(wanted, keep=True)))
        elif wanted:
            order = by_length([prepared[i] for i in wanted])
            mine = [wanted[i] for i in order[rank::size]]
            parts += _gathered(mine, lambda: optimised(mine, keep=False), rank)
            if store is not None and rank == 0:
                for which, values in parts[len(known) :]:
                    store.store([prepared[i] for i in which], values)
    except BaseException:
        with contextlib.suppress(EditError):  # what stopped the run comes first
            _flush(store, rank)
        raise
    _flush(store, rank)
    names = SITES[what]
    whole = Values.concatenated([replace(values, sites=names) for _, values in parts], device)
    back = torch.argsort(torch.tensor([i for which, _ in parts for i in which]))
    return whole.select(back.tolist())


def _flush(store: ValueStore | None, rank: int) -> None:
    if store is not None and rank == 0:
        store.flush()


def _gathered(mine: list[int], run: Any, rank: int) -> list[tuple[list[int], Values]]:
    """Every rank's share; when one fails, all raise."""
    failure, values, own = "", None, None
    try:
        values = _on_cpu(run()) if mine else None
    except Exception as error:
        failure, own = f"{type(error).__name__}: {error}", error
    found = gather((mine, values, failure))
    if own is not None:
        raise own
    for other, (_, _, what) in enumerate(found):
        if what:
            raise EditError(f"process {other} failed: {what}")
    return [(which, values) for which, values, _ in found if values is not None]


def _on_cpu(values: Values) -> Values:
    return replace(values, all_targets=values.all_targets.cpu(), all_deltas=values.all_deltas.cpu())
