"""Labels of the loss whose gradients make the output metric: drawn from the model, or the text's next tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.models.head import Head
from kedit_fast.support.messages import comma_list

Labels = Literal["sampled", "text"]
"""Drawn from the model's own probabilities at every token, or the text's next token."""
LABELS: tuple[Labels, ...] = get_args(Labels)
TOKENS_A_DIMENSION = 10
"""Tokens for each number that a layer puts out, where `OutputGradients.tokens` is None."""
_CHUNK_BYTES = 1 << 26
_STEP = 0x9E3779B97F4A7C15  # between the seeds of two tokens, modulo 2^63


@dataclass(frozen=True)
class OutputGradients:
    """Of which loss the gradients at the outputs of edited layers are: -sum log p(label), one label a token."""

    labels: Labels = "sampled"
    """"sampled" labels give the curvature of the KL divergence to the model as it is; "text" takes next tokens."""
    seed: int = 0
    """Of sampled labels. A label depends on the seed, the document's number and the token's place, not on batches."""
    tokens: int | None = None
    """How many, from the beginning of the corpus; None for 10 for each number that a layer puts out, and at most those
    that the inputs are collected from."""

    def __post_init__(self):
        if self.labels not in LABELS:
            raise InvalidArgumentError(f"labels must be {comma_list(LABELS)}; got {self.labels!r}")
        for name, least in (("seed", 0), ("tokens", 1)):
            value = getattr(self, name)
            if value is None and name == "tokens":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidArgumentError(f"{name} must be an integer of at least {least}; got {value!r}")

    def about(self) -> dict[str, str]:
        """The settings by name, as the files record them."""
        return {"labels": self.labels, "label_seed": str(self.seed) if self.labels == "sampled" else ""}


@torch.no_grad()
def sampled_labels(head: Head, states: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """One token [n] int64 for each of n last states [n, h], drawn from the model's probabilities.

    The largest of logits + Gumbel noise has exactly these probabilities, and hardly depends on the rounding of logits.
    The noise of a row depends on its seed alone.

    Args:
        head: of the model.
        states: what the head takes.
        seeds: of the rows.

    Cost: the logits, and V random numbers a row; 64 MiB at a time.
    """
    labels = torch.empty(len(seeds), dtype=torch.int64, device=head.device)
    generator = torch.Generator(head.device)
    begin = 0
    rows = 1
    while begin < len(seeds):
        logits = head.logits(states[begin : begin + rows]).double()  # [rows, V]
        noise = torch.empty_like(logits)
        for row, seed in zip(noise, seeds[begin : begin + rows], strict=True):
            row.uniform_(generator=generator.manual_seed(seed))
        noise.log_().neg_().log_().neg_()  # of a Gumbel distribution
        labels[begin : begin + rows] = noise.add_(logits).argmax(1)
        begin += rows
        rows = max(1, _CHUNK_BYTES // (16 * logits.shape[1]))
    return labels


def row_seeds(seed: int, document: int, length: int) -> list[int]:
    """The seeds of a document's tokens."""
    first = int.from_bytes(hashlib.sha256(f"{seed} {document}".encode()).digest()[:8], "big")
    return [(first + place * _STEP) % (1 << 63) for place in range(length)]
