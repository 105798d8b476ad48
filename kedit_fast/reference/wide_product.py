"""Products of 16-bit matrices with fp32 results, where torch has them: on CUDA, from torch 2.8 on."""

from __future__ import annotations

import torch

HALVES = (torch.bfloat16, torch.float16)


def has_wide_product(*matrices: torch.Tensor) -> bool:
    """Whether torch multiplies these matrices, all of one 16-bit dtype, into an fp32 one."""
    first = matrices[0]
    same = all(matrix.dtype == first.dtype for matrix in matrices)
    on_cuda = first.is_cuda and torch.version.hip is None
    return same and first.dtype in HALVES and on_cuda and hasattr(torch.ops.aten.mm, "dtype")


def wide_product(left: torch.Tensor, right: torch.Tensor, depth: int) -> torch.Tensor:
    """left right in fp32. The matrix unit truncates its sums, so they are only `depth` long; their sum is rounded."""
    total = torch.mm(left[:, :depth], right[:depth], out_dtype=torch.float32)
    for begin in range(depth, left.shape[1], depth):
        end = begin + depth
        total += torch.mm(left[:, begin:end], right[begin:end], out_dtype=torch.float32)
    return total
