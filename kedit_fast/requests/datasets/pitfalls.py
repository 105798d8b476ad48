"""ConflictEdit and RoundEdit of "Unveiling the Pitfalls of Knowledge Editing" (arXiv:2310.02129): edits in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kedit_fast.requests.datasets.dataset import NO_CHANGE, DataSet, Fault
from kedit_fast.requests.datasets.parts import Part, make_request, with_subject
from kedit_fast.requests.probes import Probe, ProbeKind, Question
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import EditRequest


def read_conflict(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    """The two edits of a record of ConflictEdit, in order.

    Paraphrases are the file's prompts of the relation, where `options.relation_prompts` has them. The first request has
    the probes: "implicit", the answer that the second edit implies to the first one's question (reverse and composite),
    and of composite records "prerequisite", the fact that ties the two edits together, which no edit changes.
    """
    part = Part(record, where)
    kind = part["type"].text()
    if kind not in ("reverse", "composite", "coverage"):
        raise part["type"].error(f"must be reverse, composite or coverage; got {kind!r}")
    edits = part["edits"].items()
    if len(edits) != 2:
        raise part["edits"].error(f"must hold two edits; it holds {len(edits)}")
    first, second = edits
    new = second["new_object"]["label"].text()
    probes: list[Probe] = []
    if kind == "reverse":
        probes.append(_probe("portability", "implicit", first, new, _label(first, "new_object"), options))
    elif kind == "composite":
        triples = part["triples"].items()
        if not triples:
            raise part["triples"].error("is empty: a composite record has the fact that ties its edits first")
        probes.append(_probe("portability", "implicit", first, _label(first, "subject"), new, options))
        tied = triples[0]
        probes.append(_probe("tied", "prerequisite", tied, _label(tied, "subject"), _label(tied, "object"), options))
    return [
        _request(first, "object", "new_object", where, options, probes=tuple(probes)),
        _request(second, "object", "new_object", where, options),
    ]


def read_round(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    """The edit of a record of RoundEdit, and the one that takes it back; of the reading "all" one for each true answer.

    The first request has a probe "true_objects" for each other true answer of its prompt, which should stay as probable
    as it was.
    """
    part = Part(record, where)
    edit = part["edit"]
    old, subject = _label(edit, "object"), _label(edit, "subject")
    others = dict.fromkeys(item["label"].text() for item in part["true_objects"].items())
    written = list(others) if options.reading == "all" else [old]
    others.pop(old, None)
    probes = tuple(_probe("locality", "true_objects", edit, subject, other, options) for other in others)
    return [
        _request(edit, "object", "new_object", where, options, probes=probes),
        *(replace(_request(edit, "new_object", "object", where, options), target_new=answer) for answer in written),
    ]


def _label(part: Part, name: str) -> str:
    return part[name]["label"].text()


def _paraphrases(relation: Part, subject: str, options: Options) -> tuple[str, ...]:
    """The prompts of a relation with a subject; a space at their end belongs to the target's side and is left out."""
    name = relation["id"].text()
    if options.relation_prompts and name not in options.relation_prompts:
        given = ", ".join(options.relation_prompts)
        raise relation["id"].error(f"is {name!r}, of which relation_prompts has none; it has those of {given}")
    templates = options.relation_prompts.get(name, ())
    return tuple(template.replace("{}", subject).rstrip() for template in templates)


def _probe(kind: ProbeKind, name: str, fact: Part, subject: str, answer: str, options: Options) -> Probe:
    """A relation of a subject, asked with its own prompt and with the file's others."""
    relation = fact["relation"]
    prompts = (with_subject(relation["prompt"], subject), *_paraphrases(relation, subject, options))
    return Probe(kind, tuple(Question(prompt, ((answer,),)) for prompt in prompts), name=name)


def _request(edit: Part, old: str, new: str, where: str, options: Options, **others: Any) -> EditRequest:
    relation, subject = edit["relation"], _label(edit, "subject")
    return make_request(
        where,
        options,
        prompt=relation["prompt"].text(),
        subject=subject,
        target_new=_label(edit, new),
        target_true=_label(edit, old),
        paraphrase_prompts=_paraphrases(relation, subject, options),
        relation=relation["id"].text(),
        **others,
    )


def _repeated(cases: Sequence[Sequence[EditRequest]]) -> set[int]:
    """Indices of records with an edit that an earlier record has, too."""
    seen: set[tuple[str | None, str, str]] = set()
    places = set()
    for place, requests in enumerate(cases):
        facts = {(request.subject, request.prompt, request.target_new) for request in requests}
        if facts & seen:
            places.add(place)
        seen |= facts
    return places


def _round_is_open(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    labels = [item.get("label") for item in record["true_objects"]]
    return requests[0].target_true not in labels or requests[0].target_new in labels


DATA_SETS = (
    DataSet(
        name="conflictedit",
        title="ConflictEdit: two edits that contradict each other (arXiv:2310.02129)",
        fields=frozenset({"edits"}),
        read=read_conflict,
        optional=frozenset({"type", "triples"}),
        cases=True,
        unused=frozenset({"rule", "prerequisites"}),
        faults=(
            NO_CHANGE,
            Fault("an edit that an earlier record has, too", among=_repeated),
        ),
    ),
    DataSet(
        name="roundedit",
        title="RoundEdit: an edit and its reverse, beside other true answers (arXiv:2310.02129)",
        fields=frozenset({"edit", "true_objects"}),
        read=read_round,
        unused=frozenset({"type"}),
        choices={
            "reverse": "the second edit brings the old answer back",
            "all": "MLE: the old answer and all other true ones are brought back, in one batch",
        },
        usual="reverse",
        cases=True,
        faults=(
            NO_CHANGE,
            Fault("true objects without the old one, or with the new one", _round_is_open),
        ),
    ),
)
