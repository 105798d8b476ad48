"""Backend `cpu`: the C++ kernels of `kedit_fast._cpu`, on tensors of the host.

The callers have the names of their ops; kedit_fast/ops documents the arguments and checks them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from kedit_fast.backends import Probe, register_probe
from kedit_fast.errors import BackendUnavailableError
from kedit_fast.kernels.native.loader import ISA_VARIABLE, call, capsule, load
from kedit_fast.support.dtypes import accumulation_dtype

PRODUCT_BYTES = 64 << 20
"""Of products of queries and keys in memory at a time."""
SAMPLED_QUERIES = 8
"""Queries from which it is told whether the first columns decide."""
OPEN_SHARE = 0.1
"""Share of pairs left open by the first columns, above which a product of queries and keys pays."""
WIDENED_KEYS = 1024
"""Keys of 16 bits that are widened at a time."""


def module() -> ModuleType:
    """`kedit_fast._cpu`; raises BackendUnavailableError with the reason when it cannot be used."""
    loaded, reason = load("_cpu")
    if loaded is None:
        raise BackendUnavailableError(f"backend 'cpu' cannot run here: {reason}")
    return loaded


@lru_cache(maxsize=1)
def probe() -> Probe:
    """Whether `kedit_fast._cpu` can run here."""
    reason = load("_cpu")[1]
    return Probe(reason, misconfigured=reason.startswith(ISA_VARIABLE))


def _describe() -> str:
    return f"{module().isa()}, {torch.get_num_threads()} threads ({module().thread_source()})"


def declines_device(tensor: torch.Tensor) -> str:
    """Why the C++ kernels do not take tensors of this device, or ''."""
    return "" if tensor.device.type == "cpu" else f"tensors on {tensor.device}"


def declines_older(op: str, tensor: torch.Tensor) -> str:
    """Why a module built before it had this op's kernel, or tensors of this device, are declined, or ''."""
    if hasattr(module(), op):
        return declines_device(tensor)
    return "the built module is older than this kernel: build it again"


def declines_float64(first: torch.Tensor, *_: object) -> str:
    """Why the C++ kernels that compute only in fp32 do not take these tensors, or ''."""
    return declines_device(first) or ("float64" if first.dtype == torch.float64 else "")


def symmetric_rank_k_update_(
    acc: torch.Tensor, x: torch.Tensor, row_weights: torch.Tensor | None, mask: torch.Tensor | None, alpha: float
) -> None:
    """Call the C++ kernel of the op of the same name."""
    flags = None if mask is None else mask.view(torch.uint8)
    tensors = (capsule(acc), capsule(x), capsule(row_weights), capsule(flags))
    call(module().symmetric_rank_k_update_, *tensors, alpha, torch.get_num_threads())


def rank_k_update_(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, copy: torch.Tensor | None
) -> None:
    """Call the C++ kernel of the op of the same name."""
    threads = torch.get_num_threads()
    call(module().rank_k_update_, capsule(weight), capsule(left), capsule(right), alpha, capsule(copy), threads)


def grouped_symmetric_rank_k_update_(
    acc: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, row_weights: torch.Tensor | None, alpha: float
) -> None:
    """Call the C++ kernel of the op of the same name."""
    tensors = (capsule(acc), capsule(x), capsule(offsets.contiguous()), capsule(row_weights))
    call(module().grouped_symmetric_rank_k_update_, *tensors, alpha, torch.get_num_threads())


def grouped_rank_k_update_(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
) -> None:
    """Call the C++ kernel of the op of the same name, which writes nothing of a matrix without rows."""
    order = capsule(columns.contiguous()), capsule(offsets.contiguous())
    tensors = (capsule(weight), capsule(left), capsule(right), *order)
    call(module().grouped_rank_k_update_, *tensors, alpha, capsule(copy), torch.get_num_threads())
    if copy is not None:
        for group in (offsets.diff() == 0).nonzero().flatten().tolist():
            copy[group].copy_(weight[group])


def masked_descent_(
    weight: torch.Tensor,
    lr: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    decay: float,
    decay_all: bool,
    origin: torch.Tensor | None,
    bound: float | None,
    copy: torch.Tensor | None,
) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    gradient = capsule(grad), capsule(left), capsule(right), _bits(entries)
    box = capsule(origin), -1.0 if bound is None else bound
    step = (capsule(weight), lr, *gradient, decay, decay_all, *box, capsule(copy))
    return torch.tensor(call(module().masked_descent_, *step, torch.get_num_threads()))


def masked_adam_(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    origin: torch.Tensor | None,
    bound: float | None,
    active: torch.Tensor | None,
    copy: torch.Tensor | None,
) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    on = active is None or bool(active)
    count.add_(int(on))
    steps = max(1.0, float(count))
    corrected = lr / (1 - beta1**steps), (1 - beta2**steps) ** -0.5
    gradient = capsule(grad), capsule(left), capsule(right), _bits(entries)
    box = capsule(origin), -1.0 if bound is None else bound
    state = capsule(weight), capsule(mean), capsule(square)
    step = (*state, *corrected, beta1, beta2, eps, on, *gradient, *box, capsule(copy))
    return torch.tensor(call(module().masked_adam_, *step, torch.get_num_threads()))


def _bits(entries: torch.Tensor | None) -> Any:
    return None if entries is None else capsule(entries.contiguous())


def activation_distance(
    x: torch.Tensor,
    reference: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    activation: str,
    long: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    distances = x.new_empty((weights.shape[0], starts.shape[0] - 1), dtype=accumulation_dtype(x))
    tensors = capsule(distances), capsule(x), capsule(reference), capsule(weights), starts.tolist()
    call(module().activation_distance, *tensors, activation, long, capsule(bias), torch.get_num_threads())
    return distances


def routed_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    shape = x.shape[0], memories.shape[1]
    out = x.new_empty(shape) if output is None else output.clone(memory_format=torch.contiguous_format)
    tensors = capsule(out), capsule(x), capsule(weight), capsule(memories), route.tolist(), capsule(bias)
    call(module().routed_linear, *tensors, torch.get_num_threads())
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tensors = capsule(_rows(out)), capsule(_rows(x)), capsule(weight.contiguous())
    call(module().rms_norm, *tensors, eps, round_first, torch.get_num_threads(), capsule(rstd.view(-1)))
    return out, rstd


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = capsule(_rows(out)), capsule(_rows(grad)), capsule(_rows(x)), capsule(weight.contiguous())
    call(module().rms_norm_backward, *tensors, capsule(rstd.reshape(-1)), torch.get_num_threads())
    return out


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    return _gated("gated_silu", gate, up)


def gated_silu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name."""
    return _gated_backward("gated_silu_backward", grad, gate, up)


def gated_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    return _gated("gated_gelu", gate, up)


def gated_gelu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name."""
    return _gated_backward("gated_gelu_backward", grad, gate, up)


def _gated(kernel: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    tensors = (_rows(part) for part in (out, gate, up))
    call(getattr(module(), kernel), *map(capsule, tensors), torch.get_num_threads())
    return out


def _gated_backward(
    kernel: str, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    tensors = (_rows(part) for part in (d_gate, d_up, grad, gate, up))
    call(getattr(module(), kernel), *map(capsule, tensors), torch.get_num_threads())
    return d_gate, d_up


def nearest_key(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name: index and distance [N]."""
    wide = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
    queries, keys = _by_rows(queries.to(wide)), _by_rows(keys.to(wide) if wide == torch.float64 else keys)
    index, distance = queries.new_empty(len(queries), dtype=torch.int64), queries.new_empty(len(queries))
    threads, rows = torch.get_num_threads(), max(1, PRODUCT_BYTES // (len(keys) * queries.element_size()))
    sample = queries[:: max(1, len(queries) // SAMPLED_QUERIES)][:SAMPLED_QUERIES]
    multiplied = (
        len(queries) > 2 * SAMPLED_QUERIES
        and len(keys) > 2 * SAMPLED_QUERIES
        and (call(module().nearest_open_share, capsule(sample), capsule(keys), threads) > OPEN_SHARE)
    )
    for begin in range(0, len(queries), rows) if multiplied else (0,):
        part = slice(begin, begin + rows if multiplied else None)
        product = _product(queries[part], keys) if multiplied else None
        tensors = (index[part], distance[part], queries[part], keys, product)
        call(module().nearest_key, *map(capsule, tensors), threads)
    return index, distance


def _product(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[N, K] in the dtype of queries, keys of 16 bits widened in parts."""
    if keys.dtype == queries.dtype:
        return queries @ keys.T
    return torch.cat([queries @ part.to(queries.dtype).T for part in keys.split(WIDENED_KEYS)], 1)


def target_log_probs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name: log p, the top-1 id, its log p, and the gradient of log p."""
    rows, width = hidden.shape
    dtype, device = accumulation_dtype(hidden), hidden.device
    log_prob, best = (torch.empty(rows, dtype=dtype, device=device) for _ in range(2))
    top1 = torch.empty(rows, dtype=torch.int64, device=device)
    slope = torch.empty(rows if gradient else 0, width, dtype=dtype, device=device)
    filled = capsule(log_prob), capsule(top1), capsule(best), capsule(slope if gradient else None)
    given = capsule(hidden.detach()), capsule(head.detach()), capsule(targets.contiguous()), _detached(bias)
    call(module().target_log_probs, *filled, *given, softcap, torch.get_num_threads())
    return log_prob, top1, best, slope


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name: the divergence, and its gradient."""
    rows, width = hidden.shape
    kl = torch.empty(rows, dtype=accumulation_dtype(hidden), device=hidden.device)
    slope = torch.empty(rows if gradient else 0, width, dtype=kl.dtype, device=hidden.device)
    filled = capsule(kl), capsule(slope if gradient else None)
    given = capsule(hidden.detach()), capsule(hidden_ref.detach()), capsule(head.detach()), _detached(bias)
    call(module().distribution_kl, *filled, *given, softcap, reverse, torch.get_num_threads())
    return kl, slope


def _detached(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else capsule(tensor.detach())


def best_overlap(masks: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name."""
    index, count = (masks.new_empty(len(masks), dtype=torch.int64) for _ in range(2))
    tensors = (capsule(index), capsule(count), capsule(_by_rows(masks)), capsule(_by_rows(book)))
    call(module().best_overlap, *tensors, torch.get_num_threads())
    return index, count


def magnitude_bound(x: torch.Tensor, count: int, divisor: torch.Tensor | None) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name on entries [n]."""
    out = x.new_empty(1, dtype=accumulation_dtype(x))
    call(module().magnitude_bound, capsule(out), capsule(x), capsule(divisor), count, torch.get_num_threads())
    return out[0]


def ties_merge_(
    out: torch.Tensor, base: torch.Tensor, memories: torch.Tensor, coefficients: Sequence[float], count: int
) -> bool:
    """Call the C++ kernel of the op of the same name on entries [n] and [M, n]; False where one is not finite."""
    tensors = (capsule(out), capsule(base), capsule(memories))
    return call(module().ties_merge_, *tensors, list(coefficients), count, torch.get_num_threads())


def tail_attention(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the op of the same name."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    normalizer = torch.empty((*query.shape[:2], 2), dtype=torch.float32, device=query.device)
    inputs, options = _tails(query, *rest)
    call(module().tail_attention, capsule(out), capsule(normalizer), inputs, *options, torch.get_num_threads())
    return out, normalizer


def tail_attention_backward(
    grad: torch.Tensor, normalizer: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the C++ kernel of the backward pass of `tail_attention`."""
    results = tuple(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query, key, key))
    inputs, options = _tails(query, key, *rest)
    tensors = (*map(capsule, results), capsule(_by_last(grad)), capsule(normalizer.contiguous()), inputs)
    call(module().tail_attention_backward, *tensors, *options, torch.get_num_threads())
    return results  # pyright: ignore[reportReturnType] - a tuple of three


def _tails(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    prefix_keys: torch.Tensor | None,
    prefix_values: torch.Tensor | None,
    spans: torch.Tensor | None,
    prefix_rows: torch.Tensor | None,
    *options: float,
) -> tuple[tuple[Any, ...], tuple[float, ...]]:
    """The tensors of both passes as capsules; scale, softcap and window. The longest tail is in `starts`."""
    rows = [
        None if part is None else _by_last(part.detach()) for part in (query, key, value, prefix_keys, prefix_values)
    ]
    indices = [None if part is None else part.contiguous() for part in (starts, spans, prefix_rows)]
    return tuple(map(capsule, (*rows[:3], indices[0], *rows[3:], *indices[1:]))), options


def _by_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where numbers of its last dimension are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[.., d] as [n, d] with contiguous rows: the tensor's own memory where its strides allow it."""
    return _by_rows(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def _by_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself where its rows are contiguous, else a copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


register_probe("cpu", probe, _describe)
