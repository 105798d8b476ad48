"""A random part of requests, in which cases stay whole."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kedit_fast.errors import RequestError
from kedit_fast.requests.request import EditRequest


def sampled(requests: Sequence[EditRequest], count: int, seed: int) -> list[EditRequest]:
    """`count` requests, or cases of several requests, drawn without replacement; in their order.

    Raises:
        RequestError: there are fewer.
    """
    cases: dict[tuple[str, object], list[int]] = {}
    for index, request in enumerate(requests):
        key = ("alone", index) if request.group is None else ("group", request.group)
        cases.setdefault(key, []).append(index)
    if not 0 < count <= len(cases):
        raise RequestError(f"{count} requests cannot be drawn of {len(cases)} (cases of several requests count once)")
    drawn = random.Random(seed).sample(list(cases.values()), count)
    return [requests[index] for index in sorted(index for case in drawn for index in case)]
