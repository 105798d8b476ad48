"""What a command checks before it starts: files, layers, devices and the group of processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import KeditError, MethodError
from kedit_fast.methods.presets import text_config
from kedit_fast.support import process_group
from kedit_fast.support.messages import first_line


def check_file(path: Path, option: str = "--out", overwrite: bool | None = None) -> None:
    """Raise KeditError when a new file cannot be made there.

    Args:
        path: the file.
        option: its name, for messages.
        overwrite: whether an older file may be replaced; None where the command has no --overwrite.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        other = " or pass --overwrite" if overwrite is False and not path.is_dir() else ""
        raise KeditError(f"{path} exists: choose another {option}{other}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise KeditError(f"cannot write {path}: its folder is not there or read-only")


def make_folder(path: Path) -> None:
    """Make a folder with its parents, unless it is there; raise KeditError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeditError(f"cannot write {path}: {error.strerror or error}") from error


def check_range(layers: tuple[int, ...], config: Any) -> None:
    """Raise MethodError when a model has no such layer."""
    count = text_config(config).num_hidden_layers
    outside = [layer for layer in layers if layer >= count]
    if outside:
        raise MethodError(f"layer {outside[0]} is out of range: the model has layers 0-{count - 1}")


def checked_device(name: str) -> str:
    """The name of a device that can be used here."""
    try:
        if torch.empty(0, device=name).device.type == "meta":
            raise KeditError("device 'meta' holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise KeditError(f"device {name!r} cannot be used: {first_line(error)}") from None
    return name


def check_device_map(device_map: str | None, device: str) -> None:
    """Raise KeditError when --device-map is given together with a --device, or under torchrun."""
    if device_map is None:
        return
    if device != "cpu":
        raise KeditError("--device-map places the model: leave --device out")
    if process_group.described_size() > 1:
        raise KeditError("--device-map spreads one process over all devices: use it without torchrun")


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[int, str]]:
    """The rank of this process and its device, in the group that torchrun describes if there is one."""
    started = process_group.start()
    rank, size = process_group.world()
    try:
        yield (
            rank,
            checked_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if size > 1 and device == "cuda" else device),
        )
    finally:
        if started:
            process_group.stop()
