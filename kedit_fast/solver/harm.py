"""What an update will do to the model's distributions of the next token, from its factors and two second moments.

With A = E[k k^T] of a layer's inputs and B = E[g g^T] of the gradients of -sum_s log p(y_s) by its outputs, with labels
y drawn from the model, the KL divergence of the edited from the unedited model has the second-order term

    1/2 tr(B Delta A Delta^T)    nats a token,

which is K-FAC's approximation of the Fisher information (arXiv 1503.05671): inputs and gradients count as independent,
and products of two positions or of two layers are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.solver.low_rank import LowRankUpdate, Update
from kedit_fast.support.torch_state import plain_torch


@plain_torch()
def predicted_kl(update: Update | torch.Tensor, input_moment: torch.Tensor, output_moment: torch.Tensor) -> float:
    """1/2 tr(B Delta A Delta^T), the predicted KL divergence in nats a token of a small change of one matrix.

    Args:
        update: Delta [out, d]: factors of rank k, factors with a mask, or the matrix itself.
        input_moment: A [d, d], the second moment of the layer's inputs.
        output_moment: B [out, out], the *raw* second moment of its outputs' gradients, not normalized.

    Raises:
        InvalidArgumentError: shapes that do not fit.

    Cost: 2 k (d^2 + out^2) flops in the moments' dtypes from factors; 2 out d (out + d) from a matrix, or with a mask.
    Moments on another device than the update's are read there.

    Example:
        >>> update = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.0], [4.0]]))
        >>> predicted_kl(update, torch.eye(3), torch.eye(2))  # of the identities, half of |Delta|^2
        62.5
    """
    shape = tuple(update.shape) if isinstance(update, torch.Tensor) else (len(update.left), len(update.right))
    out, d = shape if len(shape) == 2 else (-1, -1)
    if tuple(input_moment.shape) != (d, d) or tuple(output_moment.shape) != (out, out):
        raise InvalidArgumentError(
            f"an update {list(shape)} needs moments [in, in] and [out, out]; got {list(input_moment.shape)} and "
            f"{list(output_moment.shape)}"
        )
    if isinstance(update, LowRankUpdate):
        inner, outer = (
            side.T @ (moment @ side)  # [k, k]
            for moment in (input_moment, output_moment)
            for side in [(update.right if moment is input_moment else update.left).to(moment)]
        )
        product = (inner.double() * outer.to(inner.device).double()).sum()
    else:
        dense = (update if isinstance(update, torch.Tensor) else update.dense()).to(output_moment)
        through = (output_moment @ dense).to(input_moment)  # [out, d]
        product = ((through @ input_moment).double() * dense.to(input_moment).double()).sum()
    return 0.5 * max(float(product), 0.0)
