"""WISE's margin: how far a tuned matrix may change the outputs of edited prompts and of unrelated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kedit_fast.editing.tuning.captured import CapturedRows

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


class Margin:
    """WISE's margin between the rows of a request and its unrelated ones: a `Term`.

    Args:
        captured: the rows, of requests 0 to u - 1, with rows whose role is "irrelevant" for each.
        margins: alpha, beta, gamma.
        activation: the model's activation function.
        bias: [h] the layer's bias, or None.
        reference: [N, h] outputs of the model's own matrix, without bias; None for the captured ones. A matrix that
            equals the model's must give exactly these: the gradient of a norm makes a direction out of any rounding.
    """

    def __init__(
        self,
        captured: CapturedRows,
        margins: Sequence[float],
        activation: Activation,
        bias: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
    ):
        self.margins, self.activation = tuple(margins), activation
        self.bias = None if bias is None else bias.to(captured.original)
        reference = captured.original if reference is None else reference.to(captured.original)
        self.reference = reference if self.bias is None else reference + self.bias
        self.places = torch.zeros(0, dtype=torch.int64, device=captured.view.head.device)
        self.device, self.rows = captured.view.head.device, len(captured.rows)
        device = captured.x.device
        lengths = torch.tensor(captured.lengths, device=device)
        self.row_of_token = torch.arange(self.rows, device=device).repeat_interleave(lengths)
        offset = torch.arange(len(captured.x), device=device) - captured.starts[:-1][self.row_of_token]
        prompts = torch.tensor([row.prompt for row in captured.rows], device=device)
        self.in_prompt = offset < prompts[self.row_of_token]  # [N]
        edited = [row.role == "rewriting" for row in captured.rows]
        owners = [row.request for row in captured.rows]
        self.inside, self.outside = (
            [
                torch.tensor(
                    [i for i, owner in enumerate(owners) if owner == request and edited[i] == inside],
                    device=device,
                    dtype=torch.int64,
                )
                for request in captured.requests
            ]
            for inside in (True, False)
        )

    def changes(self, outputs: torch.Tensor, prompts_alone: bool = False) -> torch.Tensor:
        """The mean change [R] of each row's tokens, or of those of its prompt alone, at outputs [N, h] without bias."""
        outputs = outputs.to(self.reference)
        outputs = outputs if self.bias is None else outputs + self.bias
        change = activation_change(outputs, self.reference, self.activation)
        return row_means(change, self.row_of_token, self.rows, self.in_prompt if prompts_alone else None)

    def losses(self, outputs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """See `objective.Term.losses`."""
        changes = self.changes(outputs)
        losses = [
            margin_loss(changes[inside], changes[outside], self.margins)
            for inside, outside in zip(self.inside, self.outside, strict=True)
        ]
        return torch.stack(losses).to(self.device)
