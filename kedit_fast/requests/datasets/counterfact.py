"""CounterFact and multi-CounterFact: records with `requested_rewrite`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.dataset import NO_CHANGE, DataSet, object_of
from kedit_fast.requests.datasets.easyedit import NAMES as EASYEDIT_NAMES
from kedit_fast.requests.datasets.easyedit import PLACEHOLDERS, with_hop
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.records import Options, read_flat
from kedit_fast.requests.request import FIELDS, EditRequest

REWRITE = "requested_rewrite"
NAMES = {**EASYEDIT_NAMES, "relation_id": "relation"}


def rewrites_of(record: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The rewrites of a record, which may be an object or a list of them; raises RequestError for anything else."""
    value = record[REWRITE]
    return [object_of(one, REWRITE, where) for one in (value if isinstance(value, list | tuple) else [value])]


def _read(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    inner = rewrites_of(record, where)
    if len(inner) != 1:
        raise RequestError(f"{where}: {REWRITE} holds {len(inner)} rewrites: make a record of each")
    options.notes.take(inner[0], {*FIELDS, *NAMES}, frozenset())
    request = read_flat([inner[0], record], where, options, NAMES, absent=PLACEHOLDERS)
    probes = _references(inner[0], request, options)
    return [with_hop(replace(request, probes=(*request.probes, *probes)) if probes else request, record, where)]


def _references(rewrite: Mapping[str, Any], request: EditRequest, options: Options) -> tuple[Probe, ...]:
    """Texts about subjects that have the new target, and of these the ones about the request's own subject."""
    target = rewrite.get("target_new")
    identifier = target.get("id") if isinstance(target, Mapping) else None
    samples = options.snippets.get((str(rewrite.get("relation_id")), str(identifier)), ())
    about = [sample for sample in samples if sample[0] == request.subject]
    return tuple(
        Probe("reference", tuple(Question(text) for _, text in chosen), name)
        for name, chosen in (("consistency", samples), ("essence", about))
        if chosen
    )


DATA_SETS = (
    DataSet(
        name="counterfact",
        title="CounterFact and multi-CounterFact (memit): requested_rewrite with paraphrases and neighbors",
        fields=frozenset({REWRITE}),
        read=_read,
        optional=frozenset({*NAMES, "portability"}),
        unused=frozenset({"pararel_idx", "attribute_prompts"}),
        faults=(NO_CHANGE,),
    ),
)
