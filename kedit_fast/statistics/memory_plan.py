"""Where the fp64 sums of the layers are kept, and how many of them at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype
from kedit_fast.support import process_group
from kedit_fast.support.free_memory import free_bytes

_log = logging.getLogger("kedit_fast")
MASTERS = ("auto", "device", "cpu")
SHARE = 0.9  # of the free memory that sums may take
STATES = 16  # hidden states, and inputs of the edited layer, that a batch is taken to hold at once


@dataclass(frozen=True)
class Group:
    """Layers that one pass over the corpus serves."""

    layers: tuple[int, ...]
    on_cpu: bool  # whether their sums are kept on the host rather than where the rows are


def check_masters(masters: str) -> None:
    """Raise InvalidArgumentError for an unknown place."""
    if masters not in MASTERS:
        raise InvalidArgumentError(f"masters must be {', '.join(MASTERS)}; got {masters!r}")


def plan_groups(
    view: ModelView, layers: tuple[int, ...], batch_tokens: int, masters: str = "auto", budget: int | None = None
) -> list[Group]:
    """Layers in as few passes as memory allows.

    Args:
        view: the model.
        layers: all that are wanted.
        batch_tokens: of a batch, for which memory is left.
        masters: "device" keeps sums where the rows are, "cpu" on the host, "auto" prefers one pass: on the device if
            all fit there, else on the host if all fit there, else several passes.
        budget: bytes that sums may take on each device; None for what is free.

    Raises:
        StatisticsError: there is no room for the sum of a single layer.
    """
    check_masters(masters)
    sizes = {layer: 8 * view.weight(layer).shape[1] ** 2 for layer in layers}
    places = {layer: view.row_device(layer) for layer in layers}
    host = dict.fromkeys(layers, torch.device("cpu"))
    ways = {"device": [(places, False)], "cpu": [(host, True)], "auto": [(places, False), (host, True)]}[masters]
    room = {d: _room(view, d, batch_tokens, layers[0], budget) for d in {p for way, _ in ways for p in way.values()}}
    found = [[Group(g, on_cpu) for g in _grouped(sizes, where, room)] for where, on_cpu in ways]
    possible = [groups for groups in found if groups]
    if not possible:
        largest = max(sizes.values())
        raise StatisticsError(
            f"the sum of one layer takes {largest:,} bytes, more than there is room for beside a batch of "
            f"{batch_tokens:,} tokens ({max(room.values()):,} bytes): use a smaller batch, or another device"
        )
    chosen = min(possible, key=len)  # the first of the shortest
    chosen = process_group.gather(chosen)[0]
    if len(chosen) > 1:
        parts = "; ".join(", ".join(map(str, group.layers)) for group in chosen)
        _log.warning(
            "the sums of all layers do not fit at once: %d passes over the text (layers %s)", len(chosen), parts
        )
    return chosen


def _room(view: ModelView, device: torch.device, batch_tokens: int, layer: int, budget: int | None) -> int:
    if budget is not None:
        return budget
    out, d = view.weight(layer).shape
    batch = batch_tokens * STATES * (d + out) * computing_dtype(view.base).itemsize
    share = SHARE
    if device.type == "cpu":
        share /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of a job on this host
    return max(0, int(share * free_bytes(device)) - batch)


def _grouped(
    sizes: Mapping[int, int], where: Mapping[int, torch.device], room: Mapping[torch.device, int]
) -> list[tuple[int, ...]]:
    """Layers in order, as many a group as fit on every device; [] when one does not fit alone."""
    groups: list[list[int]] = []
    left: dict[torch.device, int] = {}
    for layer, size in sizes.items():
        device = where[layer]
        if size > room[device]:
            return []
        if not groups or left[device] < size:
            groups.append([])
            left = dict(room)
        groups[-1].append(layer)
        left[device] -= size
    return [tuple(group) for group in groups]
