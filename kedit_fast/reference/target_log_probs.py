"""Reference of `target_log_probs`: log-softmax of a language-model head at target tokens, in vocabulary chunks.

With z = cap tanh((H E^T + b) / cap) (no cap: z = H E^T + b), log p(t) = z_t - logsumexp(z). The gradient with respect
to z is g (onehot(t) - p), and with respect to H it is that times cap' times E.
"""

from __future__ import annotations

import torch

CHUNK = 16384  # vocabulary entries whose logits exist at once


def chunk_logits(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, softcap: float, begin: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Capped logits [rows, c] of vocabulary entries [begin, begin + chunk), and the head's part [c, h], both wide."""
    dtype = wide(hidden)
    part = head[begin : begin + chunk].to(dtype)
    logits = hidden.to(dtype) @ part.T
    if bias is not None:
        logits = logits + bias[begin : begin + chunk].to(dtype)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    return logits, part


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp64 for fp64 input, otherwise fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def cap_slope(logits: torch.Tensor, softcap: float) -> torch.Tensor | float:
    """d capped / d raw logit, from the capped logits."""
    return 1 - (logits / softcap) ** 2 if softcap > 0 else 1.0


def target_log_probs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log p(targets), logsumexp, the top-1 id and its log p, each [rows], from hidden [rows, h], head [V, h]."""
    rows, dtype = hidden.shape[0], wide(hidden)
    total = torch.full((rows,), -torch.inf, dtype=dtype, device=hidden.device)
    at_target = torch.full((rows,), torch.nan, dtype=dtype, device=hidden.device)  # NaN: outside the vocabulary
    best = torch.full((rows,), -torch.inf, dtype=dtype, device=hidden.device)
    best_id = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    for begin in range(0, head.shape[0], chunk):
        logits, _ = chunk_logits(hidden, head, bias, softcap, begin, chunk)
        total = torch.logaddexp(total, torch.logsumexp(logits, dim=1))
        inside = (targets >= begin) & (targets < begin + logits.shape[1])
        index = torch.where(inside, targets - begin, 0)
        at_target = torch.where(inside, logits.gather(1, index[:, None])[:, 0], at_target)
        value, where = logits.max(dim=1)
        better = value > best
        best, best_id = torch.where(better, value, best), torch.where(better, where + begin, best_id)
    return at_target - total, total, best_id, best - total


def target_log_probs_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    total: torch.Tensor,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Gradient [rows, h] of sum(grad * log p(targets)) with respect to `hidden`."""
    result = torch.zeros(hidden.shape, dtype=wide(hidden), device=hidden.device)
    grad = grad.to(result.dtype)
    for begin in range(0, head.shape[0], chunk):
        logits, part = chunk_logits(hidden, head, bias, softcap, begin, chunk)
        slope = cap_slope(logits, softcap)
        d_logits = -torch.exp(logits - total[:, None]) * grad[:, None]
        inside = (targets >= begin) & (targets < begin + logits.shape[1])
        index = torch.where(inside, targets - begin, 0)
        d_logits.scatter_add_(1, index[:, None], torch.where(inside, grad, 0.0)[:, None])
        result += (d_logits * slope) @ part
    return result.to(hidden.dtype)
