"""Reference of `rms_norm`: rows over their root mean square, times a weight."""

from __future__ import annotations

import torch

from kedit_fast.support.dtypes import accumulation_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool) -> torch.Tensor:
    """x [.., d] / sqrt(mean(x^2) + eps) * weight [d], in fp32 (fp64 for fp64 x), in the dtype of x.

    With `round_first` the quotient is rounded to that dtype before the product.
    """
    dtype = accumulation_dtype(x)
    wide = x.to(dtype)
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if round_first:
        unit = unit.to(x.dtype).to(dtype)
    return (unit * weight.to(dtype)).to(x.dtype)
