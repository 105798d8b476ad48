"""Every form of records that is read, the most specific first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_fast.requests.datasets import (
    akew,
    choices,
    counterfact,
    easyedit,
    knowedit,
    lre,
    mquake,
    pitfalls,
    rippleedits,
    safeedit,
    unke,
    zsre,
)
from kedit_fast.requests.datasets.dataset import DataSet
from kedit_fast.requests.records import Options, read_flat
from kedit_fast.requests.request import EditRequest


def _read(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    return [read_flat([record], where, options)]


FLAT = DataSet(
    name="flat",
    title="this package's own records: the fields of EditRequest",
    fields=frozenset({"prompt", "target_new"}),
    read=_read,
)
_FAMILIES = (lre, akew, mquake, rippleedits, pitfalls, safeedit, choices, unke, zsre, knowedit, counterfact, easyedit)
DATA_SETS: dict[str, DataSet] = {
    one.name: one for one in (*(one for family in _FAMILIES for one in family.DATA_SETS), FLAT)
}
"""By name, in the order in which a record's form is looked for."""
