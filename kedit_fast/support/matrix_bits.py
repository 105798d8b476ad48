"""The bits of tensors, compared, hashed and summed.

| function | detects | cost |
|---|---|---|
| `same_bits` | every difference | one pass over both, on the host |
| `sha256` | every change, also of dtype and shape | SHA-256 on the host: about two seconds per GiB |
| `row_checksum` | any change of one number; not two numbers of a row that change places | one pass, on the host |
| `edit_fingerprint` | the same, and numbers that change places | one pass, on the tensor's device |
| `quick_sum` | a change that changes the sum of all bits | one pass, on the tensor's device |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

ALIGNMENT = 64  # bytes; torch's own allocations begin at multiples of it
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HASHED_AT_ONCE = 64 << 20  # bytes


def integer_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the same width."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it does not begin at a multiple of ALIGNMENT.

    A tensor read from a file may begin anywhere, and on some processors the rounding of torch's products depends on the
    alignment of their operands.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors on any devices have one shape, one dtype and the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = (t.detach().to("cpu").contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def row_checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of the sums of a matrix's rows, whose bits are read as integers.

    Runs at the speed of memory. Detects any change of one number.
    """
    rows = integer_view(tensor.detach().cpu().contiguous()).sum(-1, dtype=torch.int64)
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def edit_fingerprint(matrices: Iterable[torch.Tensor]) -> str:
    """A hash of matrices [out, in], or of stacks of them [E, out, in], from sums of each row's bits by their places.

    Cost: one pass over the matrices, 1,024 rows at a time.
    """
    digest = hashlib.sha256()
    for weight in matrices:
        place = torch.arange(1, weight.shape[-1] + 1, device=weight.device)
        for matrix in weight if weight.ndim == 3 else (weight,):
            for rows in matrix.split(1024):
                by_row = (integer_view(rows).to(torch.int64) * place).sum(1)  # wraps around; moved bits change it
                digest.update(by_row.cpu().numpy().tobytes())
    return digest.hexdigest()


def sha256(weight: torch.Tensor) -> str:
    """SHA-256 of a matrix [out, in], or of another tensor, row by row, whatever its strides."""
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)}".encode())
    rows = max(1, _HASHED_AT_ONCE // max(1, weight[:1].nbytes))
    for start in range(0, weight.shape[0], rows):
        part = weight.detach()[start : start + rows].cpu().contiguous()
        digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def quick_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bits, read as integers; it wraps around."""
    return int(integer_view(tensor).sum(dtype=torch.int64))
