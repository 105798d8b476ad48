"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextlib.contextmanager
def replacing(path: str | os.PathLike, error: type[Exception]) -> Iterator[Path]:
    """A name beside `path` to write to; what is there when the block ends takes the place of `path`.

    An older file stays until then, and for good when the block raises.

    Raises:
        error: the file cannot be written, naming it.
    """
    path = Path(path)
    part = None
    try:
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        part = Path(name)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    except (OSError, SafetensorError) as cause:  # safetensors reports a full disk with an error of its own
        raise error(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}") from cause
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_file(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    error: type[Exception],
) -> None:
    """Write a safetensors file; see `replacing`."""
    with replacing(path, error) as part:
        save_file(dict(tensors), part, dict(metadata))


def read_file(path: str | os.PathLike, error: type[Exception]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        error: the file cannot be read or is damaged, naming it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as cause:
        raise error(f"cannot read {path}: {getattr(cause, 'strerror', None) or cause}") from cause


def checksum(tensor: torch.Tensor) -> str:
    """Of the bits of a matrix: SHA-256 of the sums of its rows, read as integers.

    Runs at the speed of memory. Any change within one number shows.
    """
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    rows = tensor.detach().cpu().contiguous().view(integers).sum(-1, dtype=torch.int64)
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()
