"""Reference of `rms_norm`: rows over their root mean square, times a weight."""

from __future__ import annotations

import torch

from kedit_fast.support.dtypes import accumulation_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool) -> torch.Tensor:
    """x [.., d] / sqrt(mean(x^2) + eps) * weight [d], in fp32 (fp64 for fp64 x), in the dtype of x.

    With `round_first` the quotient is rounded to that dtype before the product.
    """
    return rms_norm_with_rstd(x, weight, eps, round_first)[0]


def rms_norm_with_rstd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and 1 / sqrt(mean(x^2) + eps) of each row [..] in fp32 (fp64 for fp64 x)."""
    dtype = accumulation_dtype(x)
    wide = x.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * rstd
    if round_first:
        unit = unit.to(x.dtype).to(dtype)
    return (unit * weight.to(dtype)).to(x.dtype), rstd[..., 0]


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """The gradient in x [.., d] from that in the norm: r g - x r^3 mean(g x), with r = rstd and g = grad * weight.

    Computed in the dtype of rstd [..] and rounded once, to that of x; a rounded quotient has the gradient of the exact
    one.
    """
    wide, scale = x.to(rstd.dtype), rstd[..., None]
    weighted = grad.to(rstd.dtype) * weight.to(rstd.dtype)
    mean = (weighted * wide).mean(-1, keepdim=True)
    return (scale * weighted - wide * (scale.pow(3) * mean)).to(x.dtype)
