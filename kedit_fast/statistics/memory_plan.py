"""On which device the fp64 sums of the layers are, and how many of them at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.experts import ExpertStack
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype
from kedit_fast.statistics.moments import Side
from kedit_fast.support import process_group
from kedit_fast.support.free_memory import free_bytes
from kedit_fast.support.messages import comma_list

_log = logging.getLogger("kedit_fast")
Masters = Literal["auto", "device", "cpu"]
"""Where sums are: beside the layers' inputs, on the host, or wherever they fit in the fewest passes."""
MASTERS: tuple[Masters, ...] = get_args(Masters)
SHARE = 0.9
"""Of the free memory, for sums."""
STATES = 16
"""Hidden states, and inputs of the edited layer, that a batch is assumed to hold at once."""
STATES_A_BLOCK = 6
"""As many more that a block is assumed to hold in a pass with gradients."""

UPDATE_ROWS = 16384
"""Rows that are collected on a GPU before one update of a sum, at most. The fp64 sum of d inputs is read and written at
each update: 1.6 GB for d = 14336, beside products of 2 d^2 operations a row."""
BUFFER_SHARE = 0.5
"""Of what the sums leave free, for rows that wait for an update."""


@dataclass(frozen=True)
class Group:
    """Layers whose moments are collected in the same pass over the corpus."""

    layers: tuple[int, ...]
    on_cpu: bool
    """Whether their sums are on the host instead of beside the layers' inputs."""
    update_rows: int = 0
    """Rows of each layer that are collected, beside the model, before one update of its sum; 0 for those of a batch."""


@dataclass(frozen=True)
class Needs:
    """What the passes of a collection take, known before they start."""

    layers: tuple[int, ...]
    """The layers that are collected."""
    passes: int
    """Passes over the text."""
    sum_bytes: int
    """The largest total of fp64 sums that one pass holds in memory, in each process."""
    on_cpu: bool
    """Whether these sums are on the host; otherwise they are beside the layers' inputs."""
    file_bytes: int
    """Of the files of these layers."""
    disk_bytes: int
    """The most that files and checkpoints take at once."""
    side: Side = "input"
    """Of which rows the moments are."""
    buffer_bytes: int = 0
    """The largest total of rows that wait for an update of the sums, beside the model; 0 where none wait."""


def needs(view: ModelView, groups: Sequence[Group], side: Side = "input") -> Needs:
    """What the passes of these groups (at least one) take."""
    sizes = [sum(sum_bytes(view, layer, side) for layer in group.layers) for group in groups]
    most = files = 0
    for size in sizes:
        most = max(most, files + 2 * size * process_group.world()[1])  # while a checkpoint replaces the one before
        files += size
    largest = groups[sizes.index(max(sizes))]
    layers = tuple(sorted(layer for group in groups for layer in group.layers))
    waiting = max(sum(group.update_rows * row_bytes(view, layer, side) for layer in group.layers) for group in groups)
    return Needs(layers, len(groups), max(sizes), largest.on_cpu, files, most, side, waiting)


def side_size(view: ModelView, layer: int, side: Side) -> int:
    """How many numbers an edited layer takes in or puts out; it takes in those of all its experts."""
    out, size = view.edited_shape(layer)
    return size if side == "input" else out


def stack_of(view: ModelView, layer: int, side: Side) -> ExpertStack | None:
    """The experts of a layer, where moments are summed for each of them: on the side of the inputs."""
    return view.experts(layer) if side == "input" else None


def sum_shape(view: ModelView, layer: int, side: Side = "input") -> tuple[int, ...]:
    """The shape of a layer's moment: [d, d], of a layer with experts [E, m, m], of gradients at outputs [out, out]."""
    if stack := stack_of(view, layer, side):
        return stack.count, stack.inputs, stack.inputs
    return (side_size(view, layer, side),) * 2


def sum_bytes(view: ModelView, layer: int, side: Side = "input") -> int:
    """Bytes of the fp64 sum of a layer, and of its file."""
    stack = stack_of(view, layer, side)
    shared = 0 if stack is None else stack.shared_inputs
    return 8 * (math.prod(sum_shape(view, layer, side)) + shared * shared)


def row_bytes(view: ModelView, layer: int, side: Side = "input") -> int:
    """Bytes of a token's row that waits for an update; of experts also of the copy that is sorted by expert."""
    itemsize = computing_dtype(view.base).itemsize
    if stack_of(view, layer, side) is None:
        return itemsize * side_size(view, layer, side)
    return 2 * itemsize * row_widths(view, layer)[1]


def check_masters(masters: str) -> None:
    """Raise InvalidArgumentError for an unknown place."""
    if masters not in MASTERS:
        raise InvalidArgumentError(f"masters must be {comma_list(MASTERS)}; got {masters!r}")


def plan_groups(
    view: ModelView,
    layers: tuple[int, ...],
    batch_tokens: int,
    masters: Masters = "auto",
    budget: int | None = None,
    side: Side = "input",
    held: int = 0,
) -> list[Group]:
    """Divide layers into as few passes as memory allows.

    Args:
        view: the model.
        layers: all that are wanted.
        batch_tokens: tokens of a batch, for which memory is left free.
        masters: "device" places sums beside the layers' inputs, "cpu" on the host. "auto" prefers a single pass: on the
            device if all sums fit there, else on the host if they fit there, else several passes.
        budget: bytes for sums on each device; None for what is free.
        side: of which rows the moments are.
        held: states, as in STATES, that a batch holds beside those.

    Raises:
        StatisticsError: there is no room for the sum of a single layer.
    """
    check_masters(masters)
    sizes = {layer: sum_bytes(view, layer, side) for layer in layers}
    beside_inputs = {layer: view.row_device(layer) for layer in layers}
    on_host = dict.fromkeys(layers, torch.device("cpu"))
    placements = {
        "device": [(beside_inputs, False)],
        "cpu": [(on_host, True)],
        "auto": [(beside_inputs, False), (on_host, True)],
    }[masters]
    devices = {device for placement, _ in placements for device in placement.values()}
    room = {device: _room(view, device, batch_tokens, layers[0], budget, held) for device in devices}
    plans = [[Group(g, on_cpu) for g in _grouped(sizes, placement, room)] for placement, on_cpu in placements]
    possible = [groups for groups in plans if groups]
    if not possible:
        largest = max(sizes.values())
        raise StatisticsError(
            f"the sum of one layer takes {largest:,} bytes, more than there is room for beside a batch of "
            f"{batch_tokens:,} tokens ({max(room.values()):,} bytes): use a smaller batch, or another device"
        )
    chosen = min(possible, key=len)  # the first of those with the fewest passes
    chosen = process_group.gather(chosen)[0]  # the same for all processes
    rows = [_update_rows(view, group, batch_tokens, budget, side, held) for group in chosen]
    rows = [min(of_group) for of_group in zip(*process_group.gather(rows), strict=True)]
    chosen = [replace(group, update_rows=count) for group, count in zip(chosen, rows, strict=True)]
    if len(chosen) > 1:
        parts = "; ".join(comma_list(group.layers) for group in chosen)
        _log.warning(
            "the sums of all layers do not fit at once: %d passes over the text (layers %s)", len(chosen), parts
        )
    return chosen


def row_widths(view: ModelView, layer: int) -> tuple[int, int]:
    """Numbers that a token has at the output and at the input of an edited layer; of experts, those it chooses."""
    out, size = view.edited_shape(layer)
    if stack := view.experts(layer):
        size = stack.inputs * min(stack.count, chosen_experts(view, stack))
        size += stack.shared_inputs
    return out, size


def chosen_experts(view: ModelView, stack: ExpertStack) -> int:
    """How many experts a token chooses, by the model's configuration; all of them where it does not say."""
    count = getattr(view.config, "num_experts_per_tok", None)
    return count if isinstance(count, int) and 0 < count < stack.count else stack.count


def _room(view: ModelView, device: torch.device, batch_tokens: int, layer: int, budget: int | None, held: int) -> int:
    if budget is not None:
        return budget
    width = sum(row_widths(view, layer))
    batch = batch_tokens * (STATES + held) * width * computing_dtype(view.base).itemsize  # bytes
    share = SHARE
    if device.type == "cpu":
        share /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of a job on this host
    return max(0, int(share * free_bytes(device)) - batch)


def _waits(device: torch.device) -> bool:
    """Whether rows wait for an update: on a CPU the sum is in the way of the products less, and memory is dearer."""
    return device.type == "cuda"


def _update_rows(view: ModelView, group: Group, batch_tokens: int, budget: int | None, side: Side, held: int) -> int:
    """Rows of each layer that are collected before an update; 0 where there is no room for those of two batches."""
    rows: dict[torch.device, int] = {}  # bytes of a row of all layers
    sums: dict[torch.device, int] = {}  # bytes that sums take, or the products of one layer on their way to the host
    for layer in group.layers:
        device = view.row_device(layer)
        if not _waits(device):
            return 0
        rows[device] = rows.get(device, 0) + row_bytes(view, layer, side)
        size = sum_bytes(view, layer, side)
        sums[device] = max(sums.get(device, 0), size) if group.on_cpu else sums.get(device, 0) + size
    room = {device: _room(view, device, batch_tokens, group.layers[0], budget, held) for device in rows}
    most = min(int(BUFFER_SHARE * max(0, room[device] - sums[device])) // rows[device] for device in rows)
    most = min(most, UPDATE_ROWS)
    return most if most >= 2 * batch_tokens else 0


def _grouped(
    sizes: Mapping[int, int], placement: Mapping[int, torch.device], room: Mapping[torch.device, int]
) -> list[tuple[int, ...]]:
    """Layers in order, as many per group as fit on every device; [] when one layer alone does not fit."""
    groups: list[list[int]] = []
    left: dict[torch.device, int] = {}
    for layer, size in sizes.items():
        device = placement[layer]
        if size > room[device]:
            return []
        if not groups or left[device] < size:
            groups.append([])
            left = dict(room)
        groups[-1].append(layer)
        left[device] -= size
    return [tuple(group) for group in groups]
