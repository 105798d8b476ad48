"""Files that appear complete or not at all, are read back after writing, and have the same bytes every time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kedit_fast.support.matrix_bits import aligned, same_bits
from kedit_fast.support.messages import size_text

ALIGNMENT = 64  # bytes; of torch's own allocations on a CPU


@contextlib.contextmanager
def replacing(path: str | os.PathLike, error: type[Exception]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; when the block ends, that file replaces `path`.

    An older file stays until then; when the block raises, it stays.

    Raises:
        error: the file cannot be written, naming it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a folder, a device: never to be replaced
        raise error(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no regular file'}")
    part = None
    try:
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        part = Path(name)
        yield part
        with part.open("r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
        _sync_folder(path.absolute().parent)
    except (OSError, SafetensorError) as cause:  # safetensors reports a full disk with an error of its own
        raise error(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}") from cause
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder outlast the machine, where its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_of_disk(error: BaseException) -> bool:
    """Whether an error comes from a file that could not be read or written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (OSError, SafetensorError)):
            return True
        cause = cause.__cause__
    return False


def require_space(needs: Mapping[Path, int], error: type[Exception]) -> None:
    """Raise when disks have less room than files take; files on one disk add up.

    Args:
        needs: path of a file or folder, there or to be made -> bytes.
        error: what is raised, naming the paths.
    """
    disks: dict[int, list[Path]] = {}
    for path in needs:
        place = path.absolute()
        while not place.exists():
            place = place.parent
        disks.setdefault(place.stat().st_dev, []).append(path)
    for paths in disks.values():
        place = paths[0].absolute()
        while not place.exists():
            place = place.parent
        free, needed = shutil.disk_usage(place).free, sum(needs[path] for path in paths)
        if needed > free:
            names = " and ".join(map(str, paths))
            raise error(f"{names}: {size_text(needed)} are needed there, and the disk has {size_text(free)} free")


def write_file(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    error: type[Exception],
) -> None:
    """Write a safetensors file with the same bytes every time, and read it back; see `replacing`.

    Raises:
        error: also when what is read back differs from what was written; then the file does not appear.
    """
    with replacing(path, error) as part:
        save_file(dict(tensors), part, dict(metadata))
        _sort_metadata(part)
        with safe_open(part, framework="pt") as file:  # one tensor in memory at a time
            names = set(file.keys())
            wrong = [n for n, tensor in tensors.items() if n not in names or not same_bits(file.get_tensor(n), tensor)]
            if wrong or names != tensors.keys() or (file.metadata() or {}) != dict(metadata):
                part_name = wrong[0] if wrong else "its header"
                raise error(f"cannot write {path}: {part_name} is read back as something else")


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name: safetensors writes it in any order."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same names and values take the same bytes"
        file.seek(8)
        file.write(text.ljust(length))


def write_npz(path: str | os.PathLike, entries: Mapping[str, Any], error: type[Exception]) -> None:
    """Write numpy's npz file and read it back; see `replacing`."""
    entries = {name: numpy.asarray(value) for name, value in entries.items()}
    with replacing(path, error) as part:
        with part.open("wb") as file:  # savez would put .npz behind another name
            numpy.savez(file, **entries)
        with numpy.load(part, allow_pickle=False) as stored:
            for name, value in entries.items():
                if not _same_array(stored.get(name), value):
                    raise error(f"cannot write {path}: {name} is read back as something else")


def _same_array(one: numpy.ndarray | None, other: numpy.ndarray) -> bool:
    if one is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return numpy.array_equal(one.reshape(-1).view(numpy.uint8), other.reshape(-1).view(numpy.uint8))


def write_text(path: str | os.PathLike, text: str, error: type[Exception]) -> None:
    """Write a text file and read it back; see `replacing`."""
    data = text.encode("utf-8")
    with replacing(path, error) as part:
        part.write_bytes(data)
        if part.read_bytes() != data:
            raise error(f"cannot write {path}: it is read back as something else")


def read_file(path: str | os.PathLike, error: type[Exception]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        error: the file cannot be read or is damaged, naming it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: aligned(file.get_tensor(name)) for name in file.keys()}, metadata  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as cause:
        raise error(f"cannot read {path}: {getattr(cause, 'strerror', None) or cause}") from cause


def tensor_files(folder: Path, error: type[Exception]) -> dict[str, Path]:
    """Tensor -> its file, of a folder that save_pretrained wrote: what from_pretrained finds there.

    Raises:
        error: there is none, or it cannot be read, naming it.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        if single.exists():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weights.items()}
    except FileNotFoundError:
        raise error(f"{folder} has neither {single.name} nor {index.name}: the model was not written there") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise error(f"cannot read the model in {folder}: {getattr(cause, 'strerror', None) or cause}") from cause


@contextlib.contextmanager
def locked(path: str | os.PathLike, error: type[Exception], busy: str) -> Iterator[None]:
    """Hold a lock file, created if absent, for as long as the block lasts.

    On Linux and macOS the lock is that of `fcntl.flock`: the file stays, and the lock ends with the process. Where
    Python has no `fcntl` (Windows), the file itself is the lock: it is there only while the block lasts, and one that a
    killed process left has to be deleted by hand, which the message says.

    Raises:
        error: it cannot be written; or, with the text of `busy`, another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        with _exclusive_file(Path(path), error, busy):
            yield
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # no child inherits it (PEP 446)
    except OSError as cause:
        raise error(f"cannot write {path}: {cause.strerror or cause}") from cause
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            raise error(busy) from cause
        yield
    finally:
        os.close(handle)  # this releases the lock; so does the death of the process


@contextlib.contextmanager
def _exclusive_file(path: Path, error: type[Exception], busy: str) -> Iterator[None]:
    """Create a file that must not be there yet, with the number of this process in it, and delete it at the end."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError as cause:
        raise error(
            f"{busy}, or was killed: without file locks (Python has no fcntl here) {path} stays behind then. It holds "
            "the number of its process; delete it when that process has ended"
        ) from cause
    except OSError as cause:
        raise error(f"cannot write {path}: {cause.strerror or cause}") from cause
    try:
        try:
            os.write(handle, f"{os.getpid()}\n".encode())
        except OSError as cause:
            raise error(f"cannot write {path}: {cause.strerror or cause}") from cause
        finally:
            os.close(handle)
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, overwrite: bool, error: type[Exception]) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends without an error.

    Raises:
        error: `path` exists and `overwrite` is not set, or cannot be written.
    """
    path = Path(path)
    check_new(path, overwrite, error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as cause:
        raise error(f"cannot write {path}: {cause.strerror or cause}") from cause
    try:
        yield work
        os.chmod(work, 0o755)
        _replace(work, path)
    except OSError as cause:
        raise error(f"cannot write {path}: {cause.strerror or cause}") from cause
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_new(path: str | os.PathLike, overwrite: bool, error: type[Exception]) -> None:
    """Raise `error` when `path` exists and may not be overwritten, or cannot be created."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise error(f"{path} exists: choose another --out or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise error(f"{path} is a file, not a folder")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent))
    except OSError as cause:
        raise error(f"cannot write {path}: {parent}: {cause.strerror or cause}") from cause


def check_writable(folder: str | os.PathLike, error: type[Exception]) -> None:
    """Raise `error` when files cannot be made in a folder, or it cannot be made itself."""
    folder = Path(folder)
    if not folder.exists():
        check_new(folder, False, error)
        return
    if not folder.is_dir():
        raise error(f"{folder} is a file, not a folder")
    try:
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as cause:
        raise error(f"cannot write {folder}: {cause.strerror or cause}") from cause


def _replace(work: Path, path: Path) -> None:
    """Move `work` to `path`; an old folder is removed only after the new one is in place."""
    if not path.exists():
        os.rename(work, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        os.rename(path, old / path.name)
        os.rename(work, path)
    except BaseException:
        if (old / path.name).exists() and not path.exists():
            os.rename(old / path.name, path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
