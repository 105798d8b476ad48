"""Steps on matrices of odd shapes and layouts, with what beside them is of another dtype and layout."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from kedit_fast.ops import pack_bits

STEP_SHAPES = ((1, 1), (7, 63), (33, 300))


def layouts(h, d, dtype):
    """A weight as rows, as a transposed Conv1D weight, as a slice of a larger matrix, and with steps."""
    yield torch.randn(h, d).to(dtype)
    yield torch.randn(d, h).to(dtype).T
    yield torch.randn(h + 3, d + 5).to(dtype)[1 : h + 1, 2 : d + 2]
    yield torch.randn(2 * h, 3 * d).to(dtype)[::2, ::3]


def problem(weight, rows, share, index):
    """A gradient (of `rows` factors; 0: the matrix itself), chosen entries, and a box around another matrix."""
    (h, d), dtype = weight.shape, weight.dtype
    half = (torch.bfloat16, torch.float16)[index % 2]
    grad, left, right = torch.randn(d, h).to(dtype).T if index % 2 else torch.randn(h, d).to(half), None, None
    if rows:
        grad, left, right = None, torch.randn(rows, h) / 4, torch.randn(d, rows).T / 4
        if index == 1:
            left, right = left.bfloat16(), right.bfloat16()
        if index == 2:
            left, right = left.double(), right.half()
    origin = (weight.detach() + torch.randn(h, d) / 4).to(half if index % 2 else dtype)
    entries = None if share is None else pack_bits(torch.rand(h, d) < share)
    copy = torch.full((h, d), float("nan"), dtype=half) if dtype == torch.float32 and index != 3 else None
    tensors = {"grad": grad, "left": left, "right": right, "entries": entries, "origin": origin}
    return SimpleNamespace(tensors=tensors, bound=0.3, copy=copy)
