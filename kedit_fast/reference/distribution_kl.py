"""Reference of `distribution_kl`: KL(p || p_ref) of two next-token distributions, in vocabulary chunks.

With z, r the (capped) logits of `hidden` and `hidden_ref`: KL = sum_v p_v (z_v - r_v) - lse(z) + lse(r). The gradient
with respect to z_v is p_v (z_v - r_v - lse(z) + lse(r) - KL).
"""

from __future__ import annotations

import torch

from kedit_fast.reference.target_log_probs import CHUNK, cap_slope, chunk_logits, wide


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL(p || p_ref) and both logsumexps, each [rows], from hidden, hidden_ref [rows, h] and head [V, h]."""
    rows, dtype = hidden.shape[0], wide(hidden)
    total = torch.full((rows,), -torch.inf, dtype=dtype, device=hidden.device)
    total_ref = total.clone()
    for begin in range(0, head.shape[0], chunk):
        logits, _ = chunk_logits(hidden, head, bias, softcap, begin, chunk)
        logits_ref, _ = chunk_logits(hidden_ref, head, bias, softcap, begin, chunk)
        total = torch.logaddexp(total, torch.logsumexp(logits, dim=1))
        total_ref = torch.logaddexp(total_ref, torch.logsumexp(logits_ref, dim=1))
    kl = torch.zeros(rows, dtype=dtype, device=hidden.device)
    for begin in range(0, head.shape[0], chunk):
        logits, _ = chunk_logits(hidden, head, bias, softcap, begin, chunk)
        logits_ref, _ = chunk_logits(hidden_ref, head, bias, softcap, begin, chunk)
        log_p = logits - total[:, None]
        kl += (torch.exp(log_p) * (log_p - (logits_ref - total_ref[:, None]))).sum(dim=1)
    return kl, total, total_ref


def distribution_kl_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    kl: torch.Tensor,
    total: torch.Tensor,
    total_ref: torch.Tensor,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Gradient [rows, h] of sum(grad * KL) with respect to `hidden`."""
    result = torch.zeros(hidden.shape, dtype=wide(hidden), device=hidden.device)
    grad = grad.to(result.dtype)
    for begin in range(0, head.shape[0], chunk):
        logits, part = chunk_logits(hidden, head, bias, softcap, begin, chunk)
        logits_ref, _ = chunk_logits(hidden_ref, head, bias, softcap, begin, chunk)
        log_p = logits - total[:, None]
        difference = log_p - (logits_ref - total_ref[:, None])
        d_logits = torch.exp(log_p) * (difference - kl[:, None]) * grad[:, None]
        result += (d_logits * cap_slope(logits, softcap)) @ part
    return result.to(hidden.dtype)
