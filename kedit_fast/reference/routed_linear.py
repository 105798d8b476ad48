"""Reference of `routed_linear`: every row through the matrix that its route names."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kedit_fast.support.dtypes import accumulation_dtype


def routed_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    output: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows [N, h] in the dtype of `x`; see `kedit_fast.ops.routed_linear`."""
    out = torch.full((x.shape[0], memories.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    matrices = list(enumerate(memories)) if weight is None else [(-1, weight), *enumerate(memories)]
    if output is not None:
        out = torch.where((route < 0)[:, None], output, out)
    for index, matrix in matrices:
        if x.device.type == "cpu":  # the rows of a group alone; elsewhere their number is not known without waiting
            rows = (route == index).nonzero()[:, 0]
            if rows.numel():
                out[rows] = _product(x[rows], matrix, bias)
        else:
            out = torch.where((route == index)[:, None], _product(x, matrix, bias), out)
    return out


def _product(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x matrix^T + bias, rounded once to the dtype of x."""
    if matrix.dtype == x.dtype and bias is None:
        return F.linear(x, matrix)
    dtype = accumulation_dtype(x)
    return F.linear(x.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
