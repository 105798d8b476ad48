"""Attention of the tails of rows over prefixes that do not change, all tails packed into one row."""

from __future__ import annotations

from typing import Any

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.errors import GradientError
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import (
    describe,
    require,
    require_dtype,
    require_finite_number,
    require_no_grad,
    require_offsets,
    require_rising,
    require_same_device,
)
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import tail_attention as reference
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype, dtype_name

OP = "tail_attention"
BACKWARD = f"{OP}_backward"
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor starts, int longest, Tensor? prefix_keys, Tensor? prefix_values, "
    "Tensor? spans, Tensor? prefix_rows, float scale, float softcap, int window, str backend"
)
LIBRARY.define(f"{OP}({_ARGUMENTS}) -> (Tensor, Tensor)")
LIBRARY.define(f"{BACKWARD}(Tensor grad, Tensor normalizer, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_op = torch.ops.kedit_fast.tail_attention.default
_backward_op = torch.ops.kedit_fast.tail_attention_backward.default


def tail_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    *,
    scale: float,
    prefix_keys: torch.Tensor | None = None,
    prefix_values: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    prefix_rows: torch.Tensor | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`softmax(cap(scale q k^T)) v` of every row's tail over its prefix and, causally, itself; no padding is computed.

    Equivalent to `F.scaled_dot_product_attention(q, torch.cat([prefix_keys[r], k]), torch.cat([prefix_values[r], v]),
    mask, scale=scale, enable_gqa=True)` for the tokens `starts[r]:starts[r + 1]` of every row r, with a causal mask.

    Args:
        query: [N, heads, size] of a floating dtype: the tail tokens of R rows, one row behind the other.
        key: [N, groups, size] of the same dtype; groups divide the heads, which share keys in order.
        value: [N, groups, size] of the same dtype.
        starts: [R + 1] int64, where each row's tokens begin, and N.
        longest: tokens of the longest tail, or more. On a CPU checked; on a GPU tokens behind it are not defined.
        scale: by which products of queries and keys are multiplied.
        prefix_keys: [M, groups, P, size] of the same dtype; any strides. None where rows have no prefixes.
        prefix_values: [M, groups, P, size], as the keys.
        spans: [R, 2] int64: before the tail of row r come the places spans[r, 0] up to spans[r, 1] of its prefix.
        prefix_rows: [R] int64, which prefix each row has; None where row r has prefix r.
        softcap: Gemma 2's cap of scores, `softcap tanh(score / softcap)`; 0 for none.
        window: tokens that a query sees, itself among them; None for all.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [N, heads, size] in the dtype of `query`, contiguous; differentiable, first order, in `query`, `key` and
        `value`. Sums are in fp32 (fp64 for fp64). NaN reaches all tokens that attend to it, and no other row. The host
        never waits for a GPU.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device, size or place.
        BackendUnavailableError: `backend` cannot run.
        GradientError: a prefix requires grad, or a second derivative is asked for.

    Cost: 4 size flops for each head, query and key that it attends to, and 10 for gradients; reads each key and value
    once for a group of heads, stores two numbers for each query and head ("torch": scores of all rows, padded).
    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; groups by Ainslie et al. 2023, arXiv 2305.13245; gradients
    from recomputed weights by Dao et al. 2022, arXiv 2205.14135, algorithm 4.

    Example:
        >>> query, key, value = (torch.randn(5, 2, 4) for _ in range(3))
        >>> starts = torch.tensor([0, 2, 5])  # two rows, of two and three tokens
        >>> out = tail_attention(query, key, value, starts, 3, scale=0.5)
        >>> row = (part[2:].transpose(0, 1) for part in (query, key, value))
        >>> expected = torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True)
        >>> torch.allclose(out[2:], expected.transpose(0, 1), atol=1e-6)
        True
    """
    require_no_grad(OP, prefix_keys=prefix_keys, prefix_values=prefix_values)
    require(window is None or window >= 1, lambda: f"window must be 1 or more, or None; got {window}")
    rest = (prefix_keys, prefix_values, spans, prefix_rows, float(scale), float(softcap), window or 0, backend or "")
    return _op(query, key, value, starts, int(longest), *rest)[0]


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    prefix_keys: torch.Tensor | None,
    prefix_values: torch.Tensor | None,
    spans: torch.Tensor | None,
    prefix_rows: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    require(query.ndim == 3, lambda: f"query must be [N, heads, size]; got {describe(query)}")
    require_dtype("query", query, FLOATS)
    tokens, heads, size = query.shape
    require(heads > 0 and size > 0, lambda: f"query must have heads and numbers; got {describe(query)}")
    fits = key.ndim == 3 and (key.shape[0], key.shape[2]) == (tokens, size)
    require(fits, lambda: f"key must be [{tokens}, groups, {size}]; got {describe(key)}")
    groups = key.shape[1]
    require(groups > 0 and heads % groups == 0, lambda: f"groups of key must divide {heads} heads; got {groups}")
    require(value.shape == key.shape, lambda: f"value must be {list(key.shape)}; got {describe(value)}")
    require(starts.ndim == 1 and len(starts) > 0, lambda: f"starts must be [R + 1]; got {describe(starts)}")
    rows = len(starts) - 1
    require_offsets("starts", starts, rows)
    require(longest >= 0, lambda: f"longest must not be negative; got {longest}")
    prefixed = [part is not None for part in (prefix_keys, prefix_values, spans)]
    require(all(prefixed) or not any(prefixed), lambda: "prefix_keys, prefix_values and spans come together")
    if prefix_keys is not None and prefix_values is not None and spans is not None:
        fits = prefix_keys.ndim == 4 and (prefix_keys.shape[1], prefix_keys.shape[3]) == (groups, size)
        require(fits, lambda: f"prefix_keys must be [M, {groups}, P, {size}]; got {describe(prefix_keys)}")
        require(
            prefix_values.shape == prefix_keys.shape,
            lambda: f"prefix_values must be {list(prefix_keys.shape)}; got {describe(prefix_values)}",
        )
        require(tuple(spans.shape) == (rows, 2), lambda: f"spans must be [{rows}, 2]; got {describe(spans)}")
        require_dtype("spans", spans, (torch.int64,))
        if prefix_rows is None:
            require(
                len(prefix_keys) == rows,
                lambda: f"prefix_keys must be of {rows} rows, or pass prefix_rows; got {describe(prefix_keys)}",
            )
        for name, part in {"prefix_keys": prefix_keys, "prefix_values": prefix_values}.items():
            require_dtype(name, part, (query.dtype,))
    if prefix_rows is not None:
        require(prefix_keys is not None, lambda: "prefix_rows needs prefix_keys")
        require(
            tuple(prefix_rows.shape) == (rows,), lambda: f"prefix_rows must be [{rows}]; got {describe(prefix_rows)}"
        )
        require_dtype("prefix_rows", prefix_rows, (torch.int64,))
    for name, part in {"key": key, "value": value}.items():
        require_dtype(name, part, (query.dtype,))
    require_finite_number("scale", scale)
    require(0.0 <= softcap < float("inf"), lambda: f"softcap must be 0 (none) or a positive number; got {softcap}")
    require_same_device(
        query=query, key=key, value=value, starts=starts, prefix_keys=prefix_keys, prefix_values=prefix_values,
        spans=spans, prefix_rows=prefix_rows,
    )  # fmt: skip


def _check_places(
    tokens: int,
    starts: torch.Tensor,
    longest: int,
    prefix_keys: torch.Tensor | None,
    spans: torch.Tensor | None,
    prefix_rows: torch.Tensor | None,
) -> None:
    """Check what is read from tensors: of a CPU alone, since the host would wait for a GPU."""
    if starts.device.type != "cpu":
        return
    require_rising("starts", starts, tokens, "the tokens")
    if len(starts) > 1:
        most = int(starts.diff().max())
        require(longest >= most, lambda: f"longest must be {most} or more, the longest tail; got {longest}")
    if prefix_keys is not None and spans is not None and spans.numel():
        count, places = prefix_keys.shape[0], prefix_keys.shape[2]
        fits = bool((spans[:, 0] <= spans[:, 1]).all()) and int(spans.min()) >= 0 and int(spans.max()) <= places
        require(fits, lambda: f"spans must be begin <= end in [0, {places}]; got {spans.tolist()}")
        if prefix_rows is not None:
            low, high = (int(end) for end in prefix_rows.aminmax())
            require(low >= 0 and high < count, lambda: f"prefix_rows must be in [0, {count}); got {low} to {high}")


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(query: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *given, backend = arguments
    _check(query, *given)
    _, _, starts, longest, prefix_keys, _, spans, prefix_rows, *_ = given
    _check_places(query.shape[0], starts, longest, prefix_keys, spans, prefix_rows)
    return dispatch(OP, backend, (query,), query, *given)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(query: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _check(query, *arguments[:-1])
    normalizer = query.new_empty((*query.shape[:2], 2), dtype=accumulation_dtype(query))
    return query.new_empty(query.shape), normalizer


@torch.library.impl(LIBRARY, BACKWARD, "CompositeExplicitAutograd")
def _run_backward(
    grad: torch.Tensor, normalizer: torch.Tensor, query: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *given, backend = arguments
    return dispatch(BACKWARD, backend, (query,), grad, normalizer, query, *given)


@torch.library.register_fake(f"kedit_fast::{BACKWARD}", lib=LIBRARY)
def _fake_backward(
    grad: torch.Tensor, normalizer: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, starts, longest, *prefixes, scale, softcap, window, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], query, key, value, starts, *prefixes)
    ctx.longest, ctx.rest = longest, (scale, softcap, window, backend)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True
        raise GradientError(f"{OP} has no second derivative")
    normalizer, query, key, value, starts, *prefixes = ctx.saved_tensors
    arguments = (query, key, value, starts, ctx.longest, *prefixes, *ctx.rest)
    return *_backward_op(grad, normalizer, *arguments), *(None,) * 10


def _cpu_declines(query: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_older(BACKWARD, query) or native.cpu.declines_float64(query)


def _triton_declines(query: torch.Tensor, *_: object) -> str:
    if reason := triton.declines_device(query) or triton.declines_float64(query):
        return reason
    most = 64 if query.dtype == torch.float32 else 256  # gradients of larger heads do not fit the registers
    return f"heads of {query.shape[2]} numbers in {dtype_name(query.dtype)}" if query.shape[2] > most else ""


torch.library.register_autograd(f"kedit_fast::{OP}", _backward, setup_context=_setup_context, lib=LIBRARY)
register(Implementation(OP, "torch", reference.tail_attention))
register(Implementation(BACKWARD, "torch", reference.tail_attention_backward))
for _name in (OP, BACKWARD):
    register(Implementation(_name, "cpu", getattr(native.cpu, _name), _cpu_declines))
    register(Implementation(_name, "triton", triton.lazy("tail_attention", _name), _triton_declines))
