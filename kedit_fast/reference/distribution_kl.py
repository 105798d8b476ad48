"""Reference of `distribution_kl`: KL(p || p_ref) of two next-token distributions, in vocabulary chunks.

With z, r the (capped) logits of `hidden` and `hidden_ref` and D = z - r: KL = E_p[D] - lse(z) + lse(r), and its
gradient with respect to a row of H is sum_v p_v (D_v - E_p[D]) cap'(z_v) E_v. The reverse one is KL(p_ref || p) =
-E_ref[D] + lse(z) - lse(r), with the gradient sum_v (p_v - ref_v) cap'(z_v) E_v. The sums run over chunks of logits
that are computed once; D is taken relative to its level in the first chunk, so that a large common offset does not
cancel digits.
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


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    gradient: bool = False,
    reverse: bool = False,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(p || p_ref), or with `reverse` KL(p_ref || p), [rows] and its derivative by `hidden`.

    hidden, hidden_ref are [rows, h], head is [V, h]. The derivative is [rows, h], or [0, h] where `gradient` is false.
    """
    rows, width = hidden.shape
    dtype, step = product_dtype(hidden, head), chunk or default_chunk(hidden)
    states = torch.cat([hidden, hidden_ref]).to(dtype)
    total, total_ref = OnlineSum(rows, hidden), OnlineSum(rows, hidden)
    mean_of = total_ref if reverse else total  # the distribution that the mean of D is over
    level: torch.Tensor | None = None
    apart = torch.zeros_like(total.sum)  # sum of exp(z - peak) (D - level), or of exp(r - peak) (D - level)
    sums = torch.zeros(2 if gradient else 0, rows, width, dtype=total.sum.dtype, device=hidden.device)
    for begin in range(0, head.shape[0], step):
        part = head[begin : begin + step].to(dtype)  # [c, h]
        both = capped(raw_logits(states, part), None if bias is None else bias[begin : begin + step], softcap)
        logits, logits_ref = both[:rows], both[rows:]  # [rows, c]
        weights, fade = total.add(logits)
        weights_ref, fade_ref = total_ref.add(logits_ref)
        if level is None:
            level = total.log() - total_ref.log()
            level = torch.where(level.isfinite(), level, 0.0)
        weighted = (weights_ref if reverse else weights) * (logits - logits_ref - level[:, None])
        apart = apart * (fade_ref if reverse else fade) + weighted.sum(dim=1)
        if gradient:
            sums *= torch.stack([fade_ref if reverse else fade, fade])[:, :, None]
            first = weights_ref if reverse else weighted
            slopes = torch.cat([through_cap(part_of, logits, softcap) for part_of in (first, weights)])
            add_product_(sums.view(2 * rows, width), slopes, part)
    mean = apart / mean_of.sum  # E[D] - level
    kl = mean - ((total.log() - total_ref.log()) - (0.0 if level is None else level))
    kl = -kl if reverse else kl
    if not gradient:
        return kl, sums.new_zeros(0, width)
    if reverse:
        return kl, sums[1] / total.sum[:, None] - sums[0] / total_ref.sum[:, None]
    return kl, (sums[0] - mean[:, None] * sums[1]) / total.sum[:, None]
