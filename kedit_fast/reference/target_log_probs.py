"""Reference of `target_log_probs`: log-softmax of a language-model head at target tokens, in vocabulary chunks.

With z = cap tanh((H E^T + b) / cap) (no cap: z = H E^T + b), log p(t) = z_t - logsumexp(z), and its gradient with
respect to a row of H is cap'(z_t) E_t - sum_v p_v cap'(z_v) E_v. Both sums over v run together and are rescaled
whenever a higher logit turns up, so that each chunk of logits is computed once: two matrix products, as in autograd.
"""

from __future__ import annotations

import torch

from kedit_fast.reference._lm_head import (
    OnlineSum,
    add_product_,
    capped,
    default_chunk,
    product_dtype,
    raw_logits,
    through_cap,
)


def target_log_probs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    gradient: bool = False,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log p(targets), the top-1 id and its log p, each [rows], and d log p / d hidden from hidden [rows, h].

    The gradient is [rows, h], or [0, h] where `gradient` is false.
    """
    rows, width = hidden.shape
    dtype, step = product_dtype(hidden, head), chunk or default_chunk(hidden)
    states = hidden.to(dtype)
    total = OnlineSum(rows, hidden)
    at_target = torch.full_like(total.peak, torch.nan)  # NaN: outside the vocabulary
    best_id = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    expected = torch.zeros(rows if gradient else 0, width, dtype=total.sum.dtype, device=hidden.device)
    for begin in range(0, head.shape[0], step):
        part = head[begin : begin + step].to(dtype)  # [c, h]
        logits = capped(raw_logits(states, part), None if bias is None else bias[begin : begin + step], softcap)
        inside = (targets >= begin) & (targets < begin + part.shape[0])
        index = torch.where(inside, targets - begin, 0)[:, None]
        at_target = torch.where(inside, logits.gather(1, index)[:, 0], at_target)
        value, place = logits.max(dim=1)
        best_id = torch.where(value > total.peak, place + begin, best_id)
        weights, fade = total.add(logits, value)
        if gradient:
            expected *= fade[:, None]
            add_product_(expected, through_cap(weights, logits, softcap), part)
    if gradient:
        known = targets.clamp(0, head.shape[0] - 1)
        chosen = through_cap(head[known].to(expected.dtype), at_target[:, None], softcap)
        expected = chosen - expected / total.sum[:, None]
    log_sum = total.log()
    return at_target - log_sum, best_id, total.peak - log_sum, expected
