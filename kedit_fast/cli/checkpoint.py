"""What `edit --checkpoint` adds around a run: the choice of trials, and how to go on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from kedit_fast.cli.checks import make_folder
from kedit_fast.cli.console import notices
from kedit_fast.editing.checkpoint import CHOICE, recorded_batches
from kedit_fast.errors import CheckpointError, KeditError
from kedit_fast.support.files import write_text
from kedit_fast.support.textfiles import read_text


def read_choice(folder: Path) -> dict[str, Any] | None:
    """Hyper-parameters that trials of an earlier process have chosen: hparams, toml, chosen; None of none."""
    path = folder / CHOICE
    if not path.exists():
        return None
    try:
        return json.loads(read_text(path, KeditError))
    except ValueError as error:
        raise KeditError(f"{path} is damaged: {error}; remove it to try again") from error


def write_choice(folder: Path, choice: dict[str, Any]) -> None:
    """Store what trials have chosen, so that a run that goes on makes no trials again."""
    make_folder(folder)
    write_text(folder / CHOICE, json.dumps(choice), KeditError)


@contextlib.contextmanager
def going_on(checkpoint: Path | None) -> Iterator[None]:
    """Where the block is interrupted or fails, say that the same command goes on."""
    try:
        yield
    except (typer.Exit, CheckpointError):
        raise
    except (KeyboardInterrupt, Exception) as error:
        if checkpoint is None or not (batches := recorded_batches(checkpoint)):
            raise
        count = "1 batch is" if batches == 1 else f"{batches} batches are"
        safe = f"{count} safe in {checkpoint}; the same command goes on from there"
        if isinstance(error, KeyboardInterrupt):
            notices.print(f"kedit-fast: interrupted; {safe}", markup=False)
            raise typer.Exit(130) from None
        notices.print(f"kedit-fast: {safe}", markup=False)
        raise
