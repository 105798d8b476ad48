"""The count-th largest size of an entry, by the digits of the sizes' bits: sizes are ordered as their bits are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.configs import DIGITS, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, processors, run, size_class

PLAIN, QUOTIENT, DIFFERENCE = 0, 1, 2
BINS = 256
SHIFTS = (24, 16, 8, 0)
INFINITY = 0x7F800000
"""The bits of infinity; those of a NaN are larger."""
WAVES = 1 if INTERPRET else 8  # programs per multiprocessor; few to interpret, so that each has several blocks


@triton.jit
def size_bits(x, y, offset, inside, KIND: tl.constexpr):
    """The bits of |x|, |x / (y + 1e-8)| or |x - y| as integers."""
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if KIND == 1:
        value = tl.div_rn(value, tl.load(y + offset, mask=inside, other=1.0).to(tl.float32) + 1e-8)
    if KIND == 2:
        value = value - tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _count_digits_kernel(
    x, y, prefix, histogram, largest, n, shift,
    KIND: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """histogram [512] += digits of the sizes whose higher digits are `prefix`; bin 256 has all others."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    counts = tl.zeros((512,), tl.int32)
    top = tl.zeros((BLOCK,), tl.int32)
    higher = tl.load(prefix)
    for first in range(start, n, step):
        offset = first + tl.arange(0, BLOCK)
        inside = offset < n
        bits = size_bits(x, y, offset, inside, KIND)
        if FIRST:
            top = tl.maximum(top, tl.where(inside, bits, 0))
            counted = inside
        else:
            counted = inside & (((bits >> shift) >> 8) == higher)
        counts += tl.histogram(tl.where(counted, (bits >> shift) & 255, 256), 512)
    tl.atomic_add(histogram + tl.arange(0, 512), counts.to(tl.int64))
    if FIRST:
        tl.atomic_max(largest, tl.max(top, axis=0))


@dataclass(frozen=True)
class Selection:
    """Of a rank among sizes, on the device of the entries."""

    bits: torch.Tensor
    """[1] int32, those of the size of that rank."""
    above: torch.Tensor
    """[1] int64, how many entries are larger."""
    equal: torch.Tensor
    """[1] int64, how many are as large."""
    largest: torch.Tensor
    """[1] int32, the bits of the largest size; of a NaN where there is one."""


def launches(
    x: torch.Tensor,
    y: torch.Tensor | None,
    kind: int,
    shift: int,
    prefix: torch.Tensor,
    histogram: torch.Tensor,
    largest: torch.Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that counts one digit of contiguous entries [n]."""
    n = x.numel()
    programs = min(ceil_div(n, config.n), WAVES * processors(x.device))
    arguments = {
        "x": x, "y": x if y is None else y, "prefix": prefix, "histogram": histogram, "largest": largest, "n": n,
        "shift": shift,
    }  # fmt: skip
    constants = {"KIND": kind, "FIRST": shift == SHIFTS[0], "BLOCK": config.n}
    return [Launch(_count_digits_kernel, (programs,), arguments, constants, config)]


def select_size(x: torch.Tensor, y: torch.Tensor | None, kind: int, count: int) -> Selection:
    """The size of that rank (from 1, the largest) among contiguous entries [n]; nothing waits for the device."""
    prefix, largest = (torch.zeros(1, dtype=torch.int32, device=x.device) for _ in range(2))
    wanted = torch.full((1,), count, dtype=torch.int64, device=x.device)
    equal = torch.zeros_like(wanted)

    def trial(config: Config) -> list[Launch]:
        return launches(x, y, kind, 0, prefix, torch.zeros(512, dtype=torch.int64, device=x.device), largest, config)

    config = choose(DIGITS, "entries", x.device, trial, f"{x.dtype}, {kind}, {size_class(x.numel())}")
    for shift in SHIFTS:
        histogram = torch.zeros(512, dtype=torch.int64, device=x.device)
        run(launches(x, y, kind, shift, prefix, histogram, largest, config), x.device)
        downward = histogram[:BINS].flip(0)
        reached = downward.cumsum(0)
        place = (reached < wanted).sum(0, keepdim=True).clamp_(max=BINS - 1)
        equal = downward.gather(0, place)
        wanted = wanted - (reached.gather(0, place) - equal)
        prefix = (prefix << 8) | (BINS - 1 - place).to(torch.int32)
    return Selection(prefix, count - wanted, equal, largest)


def magnitude_bound(x: torch.Tensor, count: int, divisor: torch.Tensor | None) -> torch.Tensor:
    """Run the op of the same name on entries [n]; see kedit_fast/ops/magnitude_bound.py."""
    selection = select_size(x, divisor, PLAIN if divisor is None else QUOTIENT, count)
    bound = selection.bits.view(torch.float32)
    return torch.where(selection.largest > INFINITY, torch.nan, bound)[0]
