"""Processes that share work under torchrun: each takes a part, all get the whole."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


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
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
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
