"""What a request takes in a slot; see `slots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kedit_fast.requests.prompts import PreparedRequest


@dataclass(frozen=True)
class SlotShape:
    """What every request of a set takes; see `Objective.build`.

    Example:
        >>> SlotShape(prefix=3, tail=4, target=2)
        SlotShape(prefix=3, tail=4, target=2)
    """

    prefix: int
    """Tokens before the lookup token, in each row."""
    tail: int
    """Tokens from the lookup token on, in each row."""
    target: int
    """Target tokens, in each context."""

    @classmethod
    def of(cls, prepared: Sequence[PreparedRequest], max_length: int) -> SlotShape | None:
        """The shape of the largest of some requests; None where they do not fit into slots.

        Args:
            prepared: the requests.
            max_length: tokens that the model takes: a row is padded behind its own tokens, not only before them.
        """
        if len({len(request.rewriting) for request in prepared}) != 1:
            return None  # slots have one number of rows
        prompts = [(prompt, request) for request in prepared for prompt in request.rewriting]
        target = max(len(request.target) for request in prepared)
        prefix = max([prompt.lookup for prompt, _ in prompts] + [request.kl.lookup for request in prepared])
        tail = max(len(prompt.ids) - prompt.lookup for prompt, _ in prompts) + target - 1
        return cls(prefix, tail, target) if prefix + tail <= max_length else None
