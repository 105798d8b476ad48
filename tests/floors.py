"""Error limits: relative Frobenius against float64.

A kernel passes when its error is at most max(floor, twice the error of the torch reference in the same dtype). The
worst measured error stands beside each floor.
"""

from __future__ import annotations

import torch

SYMMETRIC = {  # by rows of x, fp32 or fp64 accumulator
    torch.float32: 6e-7,  # 5.4e-7 (avx512, n 1500)
    torch.bfloat16: 6e-7,  # 4.7e-7 (avx2)
    torch.float16: 6e-7,  # 4.6e-7 (avx512)
    torch.float64: 4e-15,  # 1.7e-15
}
RANK_K = {  # by weight: half an ulp of it, relative to norms
    torch.float32: 1e-6,  # 9.9e-7 (avx512, k 70)
    torch.bfloat16: 4e-3,  # 3.4e-3
    torch.float16: 5e-4,  # 4.6e-4
    torch.float64: 2e-14,  # 1.1e-14
}
NORM = {  # rms_norm by x, the product alone rounded: rows of one number have an error of up to half an ulp
    torch.float32: 1.5e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
    torch.float64: 3e-16,
}
GATED = {  # gated_silu by gate: silu is rounded before the product
    torch.float32: 1.5e-7,
    torch.bfloat16: 6e-3,
    torch.float16: 8e-4,
    torch.float64: 3e-16,
}
NORM_GRADIENT = {  # relative to the norm of the gradient's first term, which the second may cancel
    torch.float32: 1.5e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
    torch.float64: 4e-16,
}
GATED_GRADIENT = {  # in gate and in up
    torch.float32: 2e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
    torch.float64: 4e-16,
}
HEAD = {  # log probabilities and KL by states, relative to the larger of 1 and their norm
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}
HEAD_GRADIENT = {  # gradients by states: the rounding of their dtype
    torch.float32: 1e-6,
    torch.bfloat16: 2.5e-3,
    torch.float16: 3.2e-4,
}
TAILS = {  # tail_attention and its gradients: weights of up to a few hundred keys, summed in fp32
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,  # weights, or slopes by scores, are rounded to 16 bits by the reference
    torch.float16: 1.5e-3,
    torch.float64: 1e-13,
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| (Frobenius); NaN anywhere gives NaN, which no limit accepts."""
    found, expected = found.detach(), expected.detach()
    scale = expected.double().norm()
    error = (found.double() - expected.double()).norm()
    return float(error / scale) if scale > 0 else float(error)
