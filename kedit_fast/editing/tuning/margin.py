"""WISE's margin: how far a tuned matrix may change the outputs of edited prompts and of unrelated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]


def activation_change(outputs: torch.Tensor, reference: torch.Tensor, activation: Activation) -> torch.Tensor:
    """D = |s(o) - s(o0)|_2 of every token [N], with s the model's activation, as released (the paper has none).

    Args:
        outputs: o [N, h] of the tuned matrix.
        reference: o0 [N, h] of the model's own.
        activation: s.
    """
    return torch.linalg.vector_norm(activation(outputs) - activation(reference), dim=-1)


def row_means(
    of_tokens: torch.Tensor, row_of_token: torch.Tensor, rows: int, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean of each row's tokens, [rows].

    Args:
        of_tokens: [N].
        row_of_token: [N] int64.
        rows: how many.
        counts: [N], 1 for the tokens that count and 0 for others; None for all.
    """
    counts = torch.ones_like(of_tokens) if counts is None else counts.to(of_tokens)
    total = of_tokens.new_zeros(rows).index_add(0, row_of_token, of_tokens * counts)
    return total / counts.new_zeros(rows).index_add(0, row_of_token, counts)


def positive_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of the positive values alone, 0 where there is none: satisfied rows do not dilute the others' gradient.

    No value is read by the host.
    """
    return values.clamp(min=0).sum() / (values > 0).sum().clamp(min=1)


def margin_loss(inside: torch.Tensor, outside: torch.Tensor, margins: Sequence[float]) -> torch.Tensor:
    """pm(out - in + gamma) + pm(out - alpha) + pm(beta - in) over all pairs of rows, pm the mean of positive values.

    Args:
        inside: [R] mean change of the tokens of each edited row.
        outside: [O] the same of unrelated rows.
        margins: alpha, beta, gamma: what unrelated rows may change at most, edited ones at least, and the distance
            between the two.

    Source: WISE (arXiv 2405.14768), equation 4, and its released `_cal_activation_loss`; padding is in no mean here.
    """
    alpha, beta, gamma = margins
    pairs = outside[:, None] - inside + gamma  # [O, R]
    return positive_mean(pairs) + positive_mean(outside - alpha) + positive_mean(beta - inside)
