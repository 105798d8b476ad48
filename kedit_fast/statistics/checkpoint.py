"""Progress of a collection on disk: one file per process and side beside the statistics, replaced as a whole.

It holds the fp64 sums of the layers of the running pass, and the position in the corpus up to which they go.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kedit_fast.errors import StatisticsError
from kedit_fast.statistics.corpus import Position
from kedit_fast.statistics.moments import MomentSum, Side
from kedit_fast.support import process_group
from kedit_fast.support.files import locked, write_file
from kedit_fast.support.matrix_bits import row_checksum

FORMAT_VERSION = "1"
LOCK = ".lock"
_STEMS: dict[Side, str] = {"input": "checkpoint-", "output": "checkpoint-output-"}
OVERWRITING = ".overwriting"
"""Exists while a job replaces files of an older one."""
OVERWRITING_OUTPUTS = ".overwriting-output"
"""The same for a job that replaces output metrics alone."""


@dataclass(frozen=True)
class Progress:
    """What a checkpoint belongs to."""

    layers: tuple[int, ...]
    position: Position
    identity: dict[str, str]
    """Settings, model and number of processes of the job; only the same job may resume from the checkpoint."""


@contextlib.contextmanager
def claimed(folder: Path, hold: bool = True) -> Iterator[None]:
    """Lock a folder, made if absent, so that no other job collects into it while the block runs.

    Args:
        folder: of the statistics.
        hold: False does nothing: one process locks for all of a job.

    Raises:
        StatisticsError: the folder cannot be written, or another process has locked it.
    """
    if not hold:
        yield
        return
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StatisticsError(f"cannot write statistics to {folder}: {error.strerror or error}") from error
    with locked(folder / LOCK, StatisticsError, f"another process is collecting statistics into {folder}"):
        try:
            for unfinished in folder.glob(".*.safetensors.*"):  # of a killed process
                unfinished.unlink(missing_ok=True)
            yield
        finally:
            if created and os.listdir(folder) == [LOCK]:  # nothing was written
                (folder / LOCK).unlink()
                folder.rmdir()


def path_of(folder: Path, side: Side = "input") -> Path:
    """The path of this process's checkpoint."""
    rank, world = process_group.world()
    return folder / f"{_STEMS[side]}{rank + 1}-of-{world}.safetensors"


def save(folder: Path, progress: Progress, sums: Mapping[int, MomentSum], side: Side = "input") -> None:
    """Replace this process's checkpoint.

    Raises:
        StatisticsError: a sum is not finite, or the file cannot be written; the previous checkpoint stays.
    """
    for total in sums.values():
        total.flush()
    tensors = {str(layer): total.sum.cpu() for layer, total in sums.items()}
    tensors |= {_shared(layer): total.shared.cpu() for layer, total in sums.items() if total.shared is not None}
    for layer, total in sums.items():
        of_layer = [tensors[name] for name in (str(layer), _shared(layer)) if name in tensors]
        if not all(bool(torch.isfinite(tensor.sum())) for tensor in of_layer):
            raise StatisticsError(
                f"{total.module}: the second moment is not finite after {total.count} tokens (NaN or overflow in the "
                "model); the checkpoint from before stays"
            )
    counts = {str(layer): (total.count, total.weight) for layer, total in sums.items()}
    chosen = {str(layer): t.tokens_by_expert.tolist() for layer, t in sums.items() if t.tokens_by_expert is not None}
    metadata = {
        "format_version": FORMAT_VERSION,
        "plan": json.dumps(progress.identity),
        "position": json.dumps(progress.position.as_dict()),
        "counts": json.dumps(counts),
        "tokens_by_expert": json.dumps(chosen),
        "checksums": json.dumps({name: row_checksum(tensor) for name, tensor in tensors.items()}),
    }
    write_file(path_of(folder, side), tensors, metadata, StatisticsError)


def read(folder: Path, side: Side = "input") -> Progress | None:
    """Read what this process's checkpoint belongs to, without its sums; None where there is none.

    Raises:
        StatisticsError: a damaged file, or checkpoints of a job with another number of processes.
    """
    path = path_of(folder, side)
    others = sorted(p.name for p in folder.glob("checkpoint-*-of-*.safetensors"))
    _, world = process_group.world()
    if foreign := [name for name in others if not name.endswith(f"-of-{world}.safetensors")]:
        processes = foreign[0].removesuffix(".safetensors").rpartition("-of-")[2]
        raise StatisticsError(
            f"{folder / foreign[0]} is of a job of {processes} processes, this one has {world}: continue with "
            f"{processes}, or start anew with --overwrite"
        )
    if not path.exists():
        return None
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format_version") != FORMAT_VERSION or "position" not in metadata:
            raise StatisticsError(f"{path} is no checkpoint of this version (format {FORMAT_VERSION})")
        layers = tuple(int(layer) for layer in json.loads(metadata["counts"]))
        identity = {str(name): str(value) for name, value in json.loads(metadata["plan"]).items()}
        return Progress(layers, Position(**json.loads(metadata["position"])), identity)


def restore(folder: Path, sums: Mapping[int, MomentSum], side: Side = "input") -> None:
    """Read a checkpoint's sums into empty accumulators.

    Raises:
        StatisticsError: a damaged file, or sums of other sizes; the message names the file.
    """
    path = path_of(folder, side)
    with _opened(path) as file:
        counts = json.loads(file.metadata()["counts"])
        checksums = json.loads(file.metadata()["checksums"])
        for layer, total in sums.items():
            parts = {str(layer): total.sum}
            if total.shared is not None:
                parts[_shared(layer)] = total.shared
            for name, part in parts.items():
                stored = file.get_tensor(name)
                if stored.shape != part.shape or stored.dtype != torch.float64:
                    raise StatisticsError(f"{path}: the sum of layer {name} is {list(stored.shape)} {stored.dtype}")
                if row_checksum(stored) != checksums[name]:
                    raise ValueError(f"the sum of layer {name} is not what was written")
                part.copy_(stored)
            total.count, total.weight = int(counts[str(layer)][0]), float(counts[str(layer)][1])
            if total.tokens_by_expert is not None:
                chosen = json.loads(file.metadata()["tokens_by_expert"])[str(layer)]
                total.tokens_by_expert.copy_(torch.tensor(chosen, dtype=torch.int64))


def _shared(layer: int) -> str:
    """The name of the sum over a layer's shared experts."""
    return f"{layer}.shared"


def remove(folder: Path, side: Side = "input") -> None:
    """Delete this process's checkpoint."""
    path_of(folder, side).unlink(missing_ok=True)


def remove_all(folder: Path, side: Side = "input") -> None:
    """Delete the checkpoints of all processes, of any job of this side."""
    for path in folder.glob(f"{_STEMS[side]}[0-9]*-of-*.safetensors"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StatisticsError(
            f"{path} is damaged ({getattr(error, 'strerror', None) or error}): start anew with --overwrite"
        ) from error
