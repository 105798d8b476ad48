"""What the tests of the two ops on a language-model head share."""

from __future__ import annotations

import torch


def capped_logits(hidden, head, bias, cap):
    """Logits of a head, with its bias and soft-cap."""
    logits = hidden @ head.T
    logits = logits if bias is None else logits + bias
    return cap * torch.tanh(logits / cap) if cap else logits
