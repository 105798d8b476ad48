"""How far a collection has come, on disk: a file a process beside the statistics, replaced as a whole.

It holds the sums of the layers of the running pass, fp64, and the place in the corpus they stand for.
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
from kedit_fast.statistics.moments import SecondMomentAccumulator
from kedit_fast.support import process_group
from kedit_fast.support.files import locked, write_file
from kedit_fast.support.matrix_bits import row_checksum

FORMAT_VERSION = "1"
LOCK = ".lock"
OVERWRITING = ".overwriting"  # there while a job replaces files of an older one


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says of itself."""

    layers: tuple[int, ...]
    position: Position
    plan: dict[str, str]  # what the pass was asked for; another one may not go on from here


@contextlib.contextmanager
def claimed(folder: Path, hold: bool = True) -> Iterator[None]:
    """A folder, made if absent, that no other job collects into as long as the block lasts.

    One process of a job holds it for all.

    Raises:
        StatisticsError: it cannot be written, or another process holds it.
    """
    if not hold:
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StatisticsError(f"cannot write statistics to {folder}: {error.strerror or error}") from error
    with locked(folder / LOCK, StatisticsError, f"another process is collecting statistics into {folder}"):
        try:
            for left in folder.glob(".*.safetensors.*"):  # what a killed process was writing
                left.unlink(missing_ok=True)
            yield
        finally:
            if made and os.listdir(folder) == [LOCK]:  # nothing came of it
                (folder / LOCK).unlink()
                folder.rmdir()


def path_of(folder: Path) -> Path:
    """The checkpoint of this process."""
    rank, world = process_group.world()
    return folder / f"checkpoint-{rank + 1}-of-{world}.safetensors"


def save(folder: Path, progress: Progress, sums: Mapping[int, SecondMomentAccumulator]) -> None:
    """Replace this process's checkpoint.

    Raises:
        StatisticsError: it cannot be written, by its name; the one before stays.
    """
    tensors = {str(layer): found.sum.cpu() for layer, found in sums.items()}
    for layer, found in sums.items():
        if not bool(torch.isfinite(tensors[str(layer)].sum())):
            raise StatisticsError(
                f"{found.module}: the second moment is not finite after {found.count} tokens (NaN or overflow in the "
                "model); the checkpoint from before stays"
            )
    counts = {str(layer): (found.count, found.weight) for layer, found in sums.items()}
    metadata = {
        "format_version": FORMAT_VERSION,
        "plan": json.dumps(progress.plan),
        "position": json.dumps(progress.position.as_dict()),
        "counts": json.dumps(counts),
        "checksums": json.dumps({name: row_checksum(tensor) for name, tensor in tensors.items()}),
    }
    write_file(path_of(folder), tensors, metadata, StatisticsError)


def read(folder: Path) -> Progress | None:
    """What this process's checkpoint says, None where there is none.

    Raises:
        StatisticsError: a damaged file, or the checkpoints of a job with another number of processes.
    """
    path = path_of(folder)
    others = sorted(p.name for p in folder.glob("checkpoint-*-of-*.safetensors"))
    _, world = process_group.world()
    if wrong := [name for name in others if not name.endswith(f"-of-{world}.safetensors")]:
        number = wrong[0].removesuffix(".safetensors").rpartition("-of-")[2]
        raise StatisticsError(
            f"{folder / wrong[0]} is of a job of {number} processes, this one has {world}: go on with {number}, or "
            "start anew with --overwrite"
        )
    if not path.exists():
        return None
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format_version") != FORMAT_VERSION or "position" not in metadata:
            raise StatisticsError(f"{path} is no checkpoint of this version (format {FORMAT_VERSION})")
        layers = tuple(int(layer) for layer in json.loads(metadata["counts"]))
        plan = {str(name): str(value) for name, value in json.loads(metadata["plan"]).items()}
        return Progress(layers, Position(**json.loads(metadata["position"])), plan)


def restore(folder: Path, sums: Mapping[int, SecondMomentAccumulator]) -> None:
    """Put a checkpoint's sums into empty accumulators.

    Raises:
        StatisticsError: a damaged file, or one of other sizes, by its name.
    """
    path = path_of(folder)
    with _opened(path) as file:
        counts = json.loads(file.metadata()["counts"])
        checksums = json.loads(file.metadata()["checksums"])
        for layer, found in sums.items():
            total = file.get_tensor(str(layer))
            if total.shape != found.sum.shape or total.dtype != torch.float64:
                raise StatisticsError(f"{path}: the sum of layer {layer} is {list(total.shape)} {total.dtype}")
            if row_checksum(total) != checksums[str(layer)]:
                raise ValueError(f"the sum of layer {layer} is not what was written")
            found.sum.copy_(total)
            found.count, found.weight = int(counts[str(layer)][0]), float(counts[str(layer)][1])


def remove(folder: Path) -> None:
    """Forget this process's checkpoint."""
    path_of(folder).unlink(missing_ok=True)


def remove_all(folder: Path) -> None:
    """Forget the checkpoints of every process, of any job."""
    for path in folder.glob("checkpoint-*-of-*.safetensors"):
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
