"""The order in which requests are optimized, and the groups of them that share a value."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from kedit_fast.requests.prompts import PreparedRequest


def by_length(prepared: Sequence[PreparedRequest]) -> list[int]:
    """Indices of requests sorted by the length of their tails, then of their prefixes: a batch has little padding."""

    def lengths(i: int) -> tuple[int, int]:
        prompts = prepared[i].rewriting
        tail = max(len(prompt.ids) - prompt.lookup for prompt in prompts) + len(prepared[i].target) - 1
        return tail, max(prompt.lookup for prompt in prompts)

    return sorted(range(len(prepared)), key=lengths)


def in_groups(order: Sequence[int], groups: Sequence[Hashable] | None) -> list[list[int]]:
    """Indices in `order`, split into groups; a group stands where its first member does.

    Args:
        order: indices into `groups`.
        groups: a name for each request; those with the same name form a group. None: each request alone.
    """
    if groups is None:
        return [[i] for i in order]
    members: dict[Hashable, list[int]] = {}
    for i in order:
        members.setdefault(groups[i], []).append(i)
    return [sorted(group) for group in members.values()]
