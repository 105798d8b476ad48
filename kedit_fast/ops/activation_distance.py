"""What a memory of activations routes by: how far it moves the activations of a layer."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import (
    describe,
    require,
    require_dtype,
    require_no_grad,
    require_rising,
    require_same_device,
)
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import activation_distance as reference
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype

OP = "activation_distance"
LIBRARY.define(
    f"{OP}(Tensor x, Tensor reference, Tensor weights, Tensor starts, str activation, int long, Tensor? bias, "
    "str backend) -> Tensor"
)
_op = torch.ops.kedit_fast.activation_distance.default


def activation_distance(
    x: torch.Tensor,
    reference: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str = "silu",
    long: int = 0,
    *,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`|s(W_m x + bias) - s(reference)|` of tokens, averaged over each sequence, for every memory m.

    Equivalent, for one memory and one sequence, to
    `(s(F.linear(x, weight, bias)) - s(reference)).norm(dim=1).mean()`.

    Args:
        x: [N, d] of a floating dtype: the tokens of R sequences, packed.
        reference: [N, h] of a floating dtype: the outputs of the layer as it is, its bias included.
        weights: [M, h, d] of a floating dtype: the memories.
        starts: int64 [R + 1] on the device: where each sequence begins, and N. Checked on a CPU alone.
        activation: s: "identity", "relu", "silu", "gelu" or "gelu_tanh".
        long: sequences of more tokens than this count by their farthest token instead of the mean. 0: none does.
        bias: [h] of a floating dtype, or None.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [M, R] fp32 (fp64 for fp64 `x`), 0 for a sequence without tokens. Computed in that dtype, summed in an order
        that shapes alone fix; the host never waits for a GPU.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device, activation, or starts that are not sorted from 0 to N.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: 2 M N h d flops; reads the memories once. Of the outputs of memories none is kept, but by the reference.
    Source: the routing activation of WISE (arXiv 2405.14768, eq. 3).

    Example:
        >>> x, starts = torch.eye(2), torch.tensor([0, 2])
        >>> activation_distance(x, torch.zeros(2, 2), torch.eye(2)[None], starts, "identity")
        tensor([[1.]])
    """
    require_no_grad(OP, x=x, reference=reference, weights=weights, bias=bias)
    return _op(x, reference, weights, starts, activation, int(long), bias, backend or "")


def _check(
    x: torch.Tensor,
    reference_: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str,
    long: int,
    bias: torch.Tensor | None,
) -> None:
    names = ", ".join(reference.ACTIVATIONS)
    require(activation in reference.ACTIVATIONS, lambda: f"activation must be one of {names}; got {activation!r}")
    require(long >= 0, lambda: f"long must not be negative; got {long}")
    require(x.ndim == 2, lambda: f"x must be [N, d]; got {describe(x)}")
    require_dtype("x", x, FLOATS)
    rows, d = x.shape
    require(
        weights.ndim == 3 and weights.shape[2] == d, lambda: f"weights must be [M, h, {d}]; got {describe(weights)}"
    )
    require_dtype("weights", weights, FLOATS)
    h = weights.shape[1]
    require(
        tuple(reference_.shape) == (rows, h), lambda: f"reference must be [{rows}, {h}]; got {describe(reference_)}"
    )
    require_dtype("reference", reference_, FLOATS)
    require(starts.ndim == 1 and starts.numel() > 0, lambda: f"starts must be [R + 1]; got {describe(starts)}")
    require_dtype("starts", starts, (torch.int64,))
    if bias is not None:
        require(tuple(bias.shape) == (h,), lambda: f"bias must be [{h}]; got {describe(bias)}")
        require_dtype("bias", bias, FLOATS)
    require_same_device(x=x, reference=reference_, weights=weights, starts=starts, bias=bias)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    x: torch.Tensor,
    reference: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str,
    long: int,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(x, reference, weights, starts, activation, long, bias)
    require_rising("starts", starts, x.shape[0], "the rows of x")
    tensors = (x, reference, weights, starts, bias)
    return dispatch(OP, backend, tensors, x, reference, weights, starts, activation, long, bias)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    x: torch.Tensor,
    reference: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str,
    long: int,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(x, reference, weights, starts, activation, long, bias)
    return x.new_empty((weights.shape[0], starts.shape[0] - 1), dtype=accumulation_dtype(x))


_token_distances = triton.lazy("row_products", "token_distances")


def _by_triton(
    x: torch.Tensor,
    reference_: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str,
    long: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return reference.by_sequence(_token_distances(x, reference_, weights, activation, bias), starts, long)


def _cpu_declines(x: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_older(OP, x)


def _cpu_is_slower(x: torch.Tensor, _reference: object = None, weights: torch.Tensor | None = None, *_: object) -> str:
    """Measured: products of torch's library are faster where they need no other dtype."""
    plain = weights is not None and x.dtype == weights.dtype == torch.float32
    return "torch's products are faster on float32" if plain else ""


def _triton_declines(x: torch.Tensor, *others: torch.Tensor | None) -> str:
    return triton.declines_device(x) or triton.declines_float64(x, *others)


register(Implementation(OP, "torch", reference.activation_distance))
register(Implementation(OP, "cpu", native.cpu.activation_distance, _cpu_declines, _cpu_is_slower))
register(Implementation(OP, "triton", _by_triton, _triton_declines))
