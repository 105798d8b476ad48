"""Processes that share work under torchrun: each takes a part, all get the whole."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from kedit_fast.errors import EditError


def world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def start() -> bool:
    """Join the process group that torchrun describes, unless there is one; True when this call made it.

    nccl and gloo where there is a GPU, gloo alone otherwise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized():
        return False
    import torch

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return True


def stop() -> None:
    """Leave the process group."""
    dist.destroy_process_group()


def gather(mine: Any) -> list[Any]:
    """Every rank's object, in the order of ranks; they are pickled, so tensors belong on the CPU."""
    _, size = world()
    found: list[Any] = [None] * size
    dist.all_gather_object(found, mine)
    return found


def require_same(what: str, digest: str) -> None:
    """Raise on every rank when one of them has something else.

    Raises:
        EditError: the ranks differ.
    """
    if world()[1] > 1 and len(set(gather(digest))) > 1:
        raise EditError(f"the processes have different {what}: start them all with the same arguments")
