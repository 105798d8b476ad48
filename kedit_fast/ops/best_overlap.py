"""Which stored set of features shares most with a given one, both as bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import describe, require, require_dtype, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import best_overlap as reference

OP = "best_overlap"
LIBRARY.define(f"{OP}(Tensor masks, Tensor book, str backend) -> (Tensor, Tensor)")
_op = torch.ops.kedit_fast.best_overlap.default


class BestOverlap(NamedTuple):
    """What `best_overlap` returns."""

    index: torch.Tensor
    """[R] int64, the row of the book that shares most bits; the lowest of equal ones, -1 where the book is empty."""
    count: torch.Tensor
    """[R] int64, how many bits it shares; 0 where the book is empty."""


def best_overlap(masks: torch.Tensor, book: torch.Tensor, *, backend: str | None = None) -> BestOverlap:
    """`max_j popcount(mask & book_j)` for every mask, on packed bits.

    Equivalent to `(unpacked_masks.float() @ unpacked_book.float().T).max(1)`, with ties to the lowest index.

    Args:
        masks: [R, b] uint8, eight features a byte.
        book: [K, b] uint8; K may be 0.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        BestOverlap. All backends return the same numbers.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        BackendUnavailableError: `backend` cannot run.

    Cost: reads K b bytes once for all masks; R K b conjunctions of bytes.
    Source: MEMOIR (arXiv 2506.07899), section 3.3.

    Example:
        >>> masks = torch.tensor([[0b1110]], dtype=torch.uint8)
        >>> best_overlap(masks, torch.tensor([[0b0001], [0b0110], [0b1100]], dtype=torch.uint8))
        BestOverlap(index=tensor([1]), count=tensor([2]))
    """
    return BestOverlap(*_op(masks, book, backend or ""))


def _check(masks: torch.Tensor, book: torch.Tensor) -> None:
    require(masks.ndim == 2, lambda: f"masks must be [R, b]; got {describe(masks)}")
    b = masks.shape[1]
    require(book.ndim == 2 and book.shape[1] == b, lambda: f"book must be [K, {b}]; got {describe(book)}")
    require_dtype("masks", masks, (torch.uint8,))
    require_dtype("book", book, (torch.uint8,))
    require_same_device(masks=masks, book=book)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(masks: torch.Tensor, book: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check(masks, book)
    if not len(book):
        count = torch.zeros(masks.shape[:1], dtype=torch.int64, device=masks.device)
        return count - 1, count
    return dispatch(OP, backend, (masks, book), masks, book)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(masks: torch.Tensor, book: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check(masks, book)
    index = masks.new_empty(masks.shape[0], dtype=torch.int64)
    return index, torch.empty_like(index)


def _cpu_declines(first: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_device(first)


def _triton_declines(first: torch.Tensor, *_: object) -> str:
    return triton.declines_device(first)


register(Implementation(OP, "torch", reference.best_overlap))
register(Implementation(OP, "cpu", native.cpu.best_overlap, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("best_overlap", "best_overlap"), _triton_declines))
