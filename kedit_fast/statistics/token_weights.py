"""Weights of tokens in a second moment: sum w k k^T / sum w."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.head import Head
from kedit_fast.support.messages import comma_list

TokenWeights = Callable[[list[int]], Sequence[float]]
"""From a document's token ids to as many weights, finite and not negative."""
NamedWeights = Literal["uniform", "teacher-confidence"]
"""One for every token, or the probability of the token that the model finds most likely to come next."""
NAMED_WEIGHTS: tuple[NamedWeights, ...] = get_args(NamedWeights)
UNIFORM, CONFIDENCE = NAMED_WEIGHTS
PROBE = 64  # token ids 0 to 63, by whose weights a function is recognized


def check_weights(weights: TokenWeights | str | None) -> None:
    """Raise InvalidArgumentError for a name that there is not."""
    if isinstance(weights, str) and weights not in NAMED_WEIGHTS:
        raise InvalidArgumentError(
            f"token_weights must be {comma_list(NAMED_WEIGHTS)}, or a function of token ids; got {weights!r}"
        )


def describe(weights: TokenWeights | NamedWeights | None) -> str:
    """The name, for a function with a hash of what it gives for the ids 0 to 63; "" for uniform weights."""
    if weights is None or weights == UNIFORM:
        return ""
    if isinstance(weights, str):
        return weights
    probe = [float(weight) for weight in weights(list(range(PROBE)))]
    name = getattr(weights, "__qualname__", type(weights).__qualname__)
    return f"{name} {hashlib.sha256(repr(probe).encode()).hexdigest()[:16]}"


def weights_of(weights: TokenWeights, ids: Sequence[int]) -> torch.Tensor:
    """The weights [T] of a document's tokens, fp64; raises StatisticsError where there are not as many valid ones."""
    values = torch.as_tensor(weights(list(ids)), dtype=torch.float64)
    if values.shape != (len(ids),) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise StatisticsError(
            f"token_weights must give {len(ids)} finite weights, not negative, for as many tokens; got {values}"
        )
    return values


@torch.no_grad()
def confidences(head: Head, states: torch.Tensor) -> torch.Tensor:
    """The probability [n] of the most likely next token at last states [n, h], fp64. Cost: the logits, in chunks."""
    states = states.to(head.device)
    anything = torch.zeros(len(states), dtype=torch.int64, device=head.device)
    best = head.target_log_probs(states, anything, return_top1=True).top1_log_prob
    assert best is not None
    return best.double().exp()
