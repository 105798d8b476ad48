"""Some of many requests, in which cases stay whole."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kedit_fast.errors import RequestError
from kedit_fast.requests.reading import RequestList
from kedit_fast.requests.request import EditRequest


def sampled(requests: Sequence[EditRequest], count: int, seed: int) -> list[EditRequest]:
    """`count` requests, or cases of several requests, drawn without replacement; in their order.

    Raises:
        RequestError: there are fewer.
    """
    cases = cases_of(requests)
    if not 0 < count <= len(cases):
        raise RequestError(f"{count} requests cannot be drawn of {len(cases)} (cases of several requests count once)")
    drawn = random.Random(seed).sample(cases, count)
    return [requests[index] for index in sorted(index for case in drawn for index in case)]


def cases_of(requests: Sequence[EditRequest]) -> list[list[int]]:
    """Indices of the requests of each case, in order; a request without a group is a case by itself."""
    cases: dict[tuple[str, object], list[int]] = {}
    for index, request in enumerate(requests):
        key = ("alone", index) if request.group is None else ("group", request.group)
        cases.setdefault(key, []).append(index)
    return list(cases.values())


def first_cases(records: RequestList, count: int) -> RequestList:
    """The first requests or whole cases, with the records that were left out between them."""
    cases = cases_of(records)
    if count >= len(cases):
        return records
    part = part_of(records, sorted(index for case in cases[:count] for index in case))
    end = min(records.places[case[0]] for case in cases[count:])
    part.skipped = {place: reason for place, reason in records.skipped.items() if place < end}
    return part


def part_of(records: RequestList, indices: Sequence[int]) -> RequestList:
    """Some of the records, with all that were left out."""
    return RequestList([records[i] for i in indices], [records.places[i] for i in indices], records.skipped)
