"""Processes that share work under torchrun: each computes a part, and all get the result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kedit_fast.errors import KeditError
from kedit_fast.support.messages import first_line

Result = TypeVar("Result")


def world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def described_size() -> int:
    """How many processes torchrun says there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> bool:
    """Join the process group that torchrun describes, unless one exists; True when this call created it.

    It uses nccl and gloo where there is a GPU, otherwise only gloo.
    """
    if described_size() < 2 or not dist.is_available() or dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Processes finish their shares at different times, so the timeout is long; a dead one is noticed by its connection.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    return True


def stop() -> None:
    """Leave the process group."""
    dist.destroy_process_group()


def gather(mine: Any) -> list[Any]:
    """The objects of all ranks, in order of rank; they are pickled, so pass tensors on the CPU."""
    _, size = world()
    if size < 2:
        return [mine]
    gathered: list[Any] = [None] * size
    with _connected():
        dist.all_gather_object(gathered, mine)
    return gathered


def sum_(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes; without a process group it stays as it is.

    Raises:
        KeditError: another process has ended, or the network failed.
    """
    if world()[1] < 2:
        return
    with _connected():
        dist.all_reduce(tensor)


def in_any(flag: bool) -> bool:
    """Whether a condition holds in one of the processes."""
    return any(gather(flag))


def from_all(run: Callable[[], Result], error_type: type[KeditError] = KeditError) -> list[Result]:
    """What `run` returns in every process, by rank; when it raises in one, all raise.

    Raises:
        KeditError: of `error_type`, in the processes where `run` has not failed, with the name of one where it has.
    """
    result, message, error = None, "", None
    try:
        result = run()
    except BaseException as raised:
        message, error = f"{type(raised).__name__}: {raised}", raised
    answers = gather((result, message))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(answers):
        if failure:
            raise error_type(f"process {rank} failed: {failure}")
    return [value for value, _ in answers]


def wait_for_all() -> None:
    """Return when every process has called this; see `sum_` for errors."""
    if world()[1] < 2:
        return
    with _connected():
        dist.barrier()


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Turn a lost connection into an error that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what gloo and nccl raise, without a type of their own in older versions
        rank, size = world()
        raise KeditError(
            f"process {rank} of {size} lost the others: one has ended, or the network failed ({first_line(error)})"
        ) from error
