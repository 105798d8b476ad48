"""KnowEdit: WikiRecent, ZsRE and WikiCounterfact share a form; WikiBio, Sanitation and ConvSent have their own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.dataset import NO_CHANGE, DataSet, Fault, list_of, object_of, text_of
from kedit_fast.requests.datasets.easyedit import NAMES, PLACEHOLDERS, STRAY_SPACES
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.record_fields import is_empty
from kedit_fast.requests.records import NEED_NONE, Options, read_flat
from kedit_fast.requests.request import EditRequest, shorten

_SECTIONS = ("portability", "locality")
_BIO = {"text": "prompt", "labels": "target_new", "concept": "subject"}


def _read(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    request = read_flat([record], where, options, NAMES, absent=PLACEHOLDERS, strip=True)
    return [_with_probes(request, record, where)]


def _read_bio(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    text, concept = record.get("text"), record.get("concept")
    if isinstance(text, str) and isinstance(concept, str) and concept.strip() and concept not in text:
        spelled = re.findall(re.escape(concept.strip()), text, re.IGNORECASE)
        record = {**record, "concept": spelled[0]} if len(spelled) == 1 else record
    return [_with_probes(read_flat([record], where, options, _BIO, strip=True), record, where)]


def _with_probes(request: EditRequest, record: Mapping[str, Any], where: str) -> EditRequest:
    """A request with a probe for every criterion of `portability` and `locality` that asks something."""
    probes = list(request.probes)
    for kind, name, rows in _criteria(record, where):
        questions = [question for row in rows for question in _questions(row, f"{where}: {kind}, {name}")]
        if questions:
            probes.append(Probe(kind, tuple(questions), name))
    return replace(request, probes=tuple(probes))


def _criteria(record: Mapping[str, Any], where: str) -> Iterator[tuple[Any, str, list[Any]]]:
    """Kind, name and rows of every criterion."""
    for kind in _SECTIONS:
        if is_empty(record.get(kind)):
            continue
        for name, rows in object_of(record[kind], kind, where).items():
            given = _rows(rows, f"{where}: {kind}, {name}") if isinstance(rows, Mapping) else rows
            yield kind, str(name), list_of(given, f"{kind}, {name}", where)


def _rows(columns: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The rows of {prompt, ground_truth}, each a text or a list, as EasyEdit's editors pass criteria on."""
    prompts, answers = columns.get("prompt"), columns.get("ground_truth")
    if is_empty(prompts):
        return []
    if not isinstance(prompts, list | tuple):
        return [{"prompt": prompts, "ground_truth": answers}]
    if not isinstance(answers, list | tuple) or len(answers) != len(prompts):
        raise RequestError(f"{where}: {len(prompts)} prompts need as many in ground_truth; got {shorten(answers)}")
    pairs = zip(prompts, answers, strict=True)
    return [{"prompt": prompt, "ground_truth": answer} for prompt, answer in pairs if not is_empty(prompt)]


def _questions(row: Any, where: str) -> Iterator[Question]:
    """The questions of a row {prompt, ground_truth}; none where there is no answer."""
    fields = object_of(row, "a question", where)
    groups = _groups(fields.get("ground_truth"), where)
    prompts = fields.get("prompt")
    for prompt in prompts if isinstance(prompts, list | tuple) else [prompts]:
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError(f"{where}: prompt must be a non-empty text, or a list of such; got {shorten(prompts)}")
        if groups:
            yield Question(prompt.strip(), groups)


def _groups(value: Any, where: str) -> tuple[tuple[str, ...], ...]:
    """Answers as groups of alternatives: a text, alternatives in a list, or a list of such lists; no empty ones."""
    if is_empty(value):
        return ()
    if isinstance(value, list | tuple) and all(isinstance(item, str) or item is None for item in value):
        value = [value]
    groups = []
    for group in value if isinstance(value, list | tuple) else [value]:
        texts = [text for text in (group if isinstance(group, list | tuple) else [group]) if not is_empty(text)]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{where}: ground_truth must be a text, or texts in lists; got {shorten(value)}")
        if texts:
            groups.append(tuple(text.strip() for text in texts))
    return tuple(groups)


def _asks_nothing(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    return any(
        not rows or any(not _groups(row.get("ground_truth"), "") for row in rows)
        for _, _, rows in _criteria(record, "")
    )


ASKS_NOTHING = Fault("a criterion without questions, or a question without answers, which is not asked", _asks_nothing)


def _read_sanitation(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    if options.need_subject:
        raise RequestError(f"{where} has no subject, which this method needs: {NEED_NONE}")
    edited = [object_of(row, "success", where) for row in list_of(record["success"], "success", where)]
    if not edited:
        raise RequestError(f"{where}: success is empty")
    asked = {text_of(row, "question", where) for row in edited}
    stays = [object_of(row, "locality", where) for row in list_of(record.get("locality"), "locality", where)]
    questions = [
        Question(question, _groups(row.get("ground_truth"), where))
        for question, row in ((text_of(row, "question", where), row) for row in stays)
        if question not in asked and not is_empty(row.get("ground_truth"))
    ]
    probes = (Probe("locality", tuple(questions), "locality"),) if questions else ()
    names = {"question": "prompt", "ground_truth": "target_true"}
    return [read_flat([row], where, options, names, strip=True, probes=probes) for row in edited]


def _stays_and_changes(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    prompts = {request.prompt for request in requests}
    return any(text_of(row, "question", "") in prompts for row in list_of(record.get("locality"), "locality", ""))


DATA_SETS = (
    DataSet(
        name="knowedit-wikibio",
        title="KnowEdit's WikiBio: text, labels and concept",
        fields=frozenset(_BIO),
        read=_read_bio,
        optional=frozenset(_SECTIONS),
        faults=(
            ASKS_NOTHING,
            Fault(
                "the subject stands in its text in other upper and lower case, and is taken as it stands there",
                lambda record, requests: any(r.subject and r.subject not in record["concept"] for r in requests),
            ),
        ),
    ),
    DataSet(
        name="knowedit-sanitation",
        title="KnowEdit's Sanitation: questions that should be answered by a refusal",
        fields=frozenset({"success"}),
        read=_read_sanitation,
        optional=frozenset({"locality"}),
        faults=(Fault("what should stay is what is changed, so that it is not asked", _stays_and_changes),),
    ),
    DataSet(
        name="knowedit-convsent",
        title="KnowEdit's ConvSent: sentiment about a topic",
        fields=frozenset({"pos", "neg"}),
        read=lambda record, where, options: [],
        refused="which is not read: it asks for a mood in all answers about a topic, which is no fact with one answer; "
        "methods that train on pairs of texts take it, closed forms do not",
    ),
    DataSet(
        name="knowedit",
        title="KnowEdit's WikiRecent, ZsRE and WikiCounterfact: portability and locality by criterion",
        fields=frozenset({"prompt", "subject", "target_new"}),
        read=_read,
        marks=frozenset(_SECTIONS),
        optional=frozenset(NAMES),
        unused=frozenset({"cond", "loc_prompt"}),
        faults=(NO_CHANGE, STRAY_SPACES, ASKS_NOTHING),
    ),
)
