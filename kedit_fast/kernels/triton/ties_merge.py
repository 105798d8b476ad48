"""Changed copies of a matrix merged into one: a selection for each, then one pass over all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import narrow
from kedit_fast.kernels.triton.configs import MERGE, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, run, size_class
from kedit_fast.kernels.triton.magnitude_bound import DIFFERENCE, INFINITY, select_size


@triton.jit
def _weighted(memories, base, offset, inside, bounds, lasts, coefficients, memory: tl.constexpr, memory_stride):
    """c_m times the trimmed difference. The choice after the product keeps it out of a fused multiply-add."""
    value = tl.load(memories + memory * memory_stride + offset, mask=inside, other=0.0).to(tl.float32) - base
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bound = tl.load(bounds + memory)
    stays = (bits > bound) | ((bits == bound) & (offset <= tl.load(lasts + memory)))
    return tl.where(stays & inside, value * tl.load(coefficients + memory), 0.0)


@triton.jit
def _ties_merge_kernel(
    out, base, memories, bounds, lasts, coefficients, n, memory_stride,
    MEMORIES: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    start = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for memory in tl.static_range(MEMORIES):
        total += _weighted(memories, start, offset, inside, bounds, lasts, coefficients, memory, memory_stride)
    merged = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for memory in tl.static_range(MEMORIES):
        part = _weighted(memories, start, offset, inside, bounds, lasts, coefficients, memory, memory_stride)
        agrees = tl.where(total >= 0, part > 0, part < 0)
        merged += tl.where(agrees, part, 0.0)
        share += tl.where(agrees, tl.load(coefficients + memory), 0.0)
    result = start + tl.div_rn(merged, tl.where(share == 0, 1.0, share))
    tl.store(out + offset, narrow(result, out.dtype.element_ty, INTERPRET), mask=inside)


def launches(
    out: torch.Tensor,
    base: torch.Tensor,
    memories: torch.Tensor,
    bounds: torch.Tensor,
    lasts: torch.Tensor,
    coefficients: torch.Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that merges: bounds [M] int32, lasts [M] int64, coefficients [M] fp32."""
    n = base.numel()
    arguments = {
        "out": out, "base": base, "memories": memories, "bounds": bounds, "lasts": lasts,
        "coefficients": coefficients, "n": n, "memory_stride": memories.stride(0),
    }  # fmt: skip
    constants = {"MEMORIES": len(memories), "BLOCK": config.n, "INTERPRET": INTERPRET}
    return [Launch(_ties_merge_kernel, (ceil_div(n, config.n),), arguments, constants, config)]


def ties_merge_(
    out: torch.Tensor, base: torch.Tensor, memories: torch.Tensor, coefficients: Sequence[float], count: int
) -> bool:
    """Run the op of the same name on entries [n] and [M, n]; False where a difference is not finite."""
    n, device = base.numel(), base.device
    bounds, lasts = [], []
    for memory in memories:
        selection = select_size(memory, base, DIFFERENCE, max(1, count))
        parts = (selection.bits, selection.above, selection.equal, selection.largest)
        bits, above, equal, largest = torch.cat([part.long() for part in parts]).tolist()
        if largest >= INFINITY:
            return False
        last = n
        if count and bits and count - above < equal:
            at_bound = (memory.float() - base.float()).abs() == selection.bits.view(torch.float32)
            last = int((at_bound.cumsum(0) < count - above).sum())
        bounds.append(bits if count else INFINITY)
        lasts.append(last)
    tensors = (
        torch.tensor(bounds, dtype=torch.int32, device=device), torch.tensor(lasts, dtype=torch.int64, device=device),
        torch.tensor(coefficients, dtype=torch.float32, device=device),
    )  # fmt: skip

    def trial(config: Config) -> list[Launch]:
        return launches(torch.empty_like(out), base, memories, *tensors, config)

    config = choose(MERGE, "entries", device, trial, f"{memories.dtype}, {len(memories)}, {size_class(n)}")
    run(launches(out, base, memories, *tensors, config), device)
    return True
