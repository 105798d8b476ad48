"""EasyEdit's own records, which are flat: CounterFact, WikiBigEdit and QAEdit are also published in this form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kedit_fast.requests.datasets.dataset import NO_CHANGE, DataSet, Fault, list_of, object_of, stray_spaces
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.record_fields import alternatives, is_empty
from kedit_fast.requests.records import Options, read_flat
from kedit_fast.requests.request import EditRequest

NAMES = {
    "case_id": "id",
    "target": "target_new",  # QAEdit
    "ground_truth": "target_true",
    "rephrase_prompt": "paraphrase_prompts",
    "rephrase_prompts": "paraphrase_prompts",
    "rephrase": "paraphrase_prompts",
}
PLACEHOLDERS = ("<|endoftext|>", "</s>")
"""Texts that stand in `ground_truth` where there is none."""
_BESIDE = ("locality_prompt", "locality_ground_truth")
_QAEDIT_BESIDE = ("loc", "loc_ans")
_HOP = ("New Question", "New Answer")
"""Names in `portability` of the files that EasyEdit extends by a question that follows from the edit."""


def question_of(record: Mapping[str, Any], prompt: str, answers: str, where: str) -> Question | None:
    """A prompt and its alternatives, from the fields of these names; None where one of them is missing or empty."""
    texts = [text.strip() if isinstance(text, str) else text for text in alternatives(record.get(answers))]
    if is_empty(record.get(prompt)) or not texts:
        return None
    asked = record[prompt]
    return Question(asked.strip() if isinstance(asked, str) else asked, (tuple(texts),))


def with_locality(request: EditRequest, questions: Sequence[Question], name: str = "locality") -> EditRequest:
    """A request with questions whose answers must stay.

    Those whose answer is target_true become neighborhood prompts, unless the record has some; the others a probe.
    """
    true = ((request.target_true,),)
    near = [] if request.neighborhood_prompts else [one.prompt for one in questions if one.answers == true]
    others = tuple(one for one in questions if one.prompt not in near)
    probes = (*request.probes, Probe("locality", others, name)) if others else request.probes
    neighborhood = (*request.neighborhood_prompts, *near)
    return replace(request, neighborhood_prompts=neighborhood, probes=probes) if questions else request


def with_hop(request: EditRequest, record: Mapping[str, Any], where: str) -> EditRequest:
    """A request with the question that follows from it, of the files that EasyEdit extends by one."""
    value = record.get("portability")
    question = None if is_empty(value) else question_of(object_of(value, "portability", where), *_HOP, where)
    if question is None:
        return request
    return replace(request, probes=(*request.probes, Probe("portability", (question,), "Reasoning")))


def _read(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    request = read_flat([record], where, options, NAMES, absent=PLACEHOLDERS, strip=True)
    questions = [question_of(record, *_BESIDE, where)]
    if not is_empty(record.get("locality")):
        for item in list_of(record["locality"], "locality", where):
            questions.append(question_of(object_of(item, "an item of locality", where), *_QAEDIT_BESIDE, where))
    return [with_locality(request, [one for one in questions if one is not None])]


def _half_a_question(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    locality = record.get("locality")
    items = [item for item in locality if isinstance(item, Mapping)] if isinstance(locality, list | tuple) else []
    pairs = [tuple(map(record.get, _BESIDE)), *(tuple(map(item.get, _QAEDIT_BESIDE)) for item in items)]
    return any(is_empty(prompt) != is_empty(answer) for prompt, answer in pairs)


HALF_A_QUESTION = Fault("a prompt whose answer should stay has no answer, so that it is not asked", _half_a_question)
STRAY_STAR = Fault(
    "the new answer ends in a star after a space, which is taken as it is",
    lambda _, requests: any(re.search(r"\s\*$", request.target_new) for request in requests),
)
STRAY_SPACES = Fault(
    "spaces around a text, which are taken away",
    lambda record, _: stray_spaces(record, ("prompt", "subject", "target_new", *NAMES, *_BESIDE)),
)


def _read_wikibigedit(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    request = read_flat([record], where, options, _WIKIBIGEDIT, absent=PLACEHOLDERS, strip=True)
    pairs = [(kind, question_of(record, *names, where)) for kind, names in _WIKIBIGEDIT_ASKED.items()]
    hops = [Probe("portability", (one,), kind) for kind, one in pairs if one is not None and kind != "locality"]
    if isinstance(record.get("personas"), str) and record["personas"].strip():
        asked = Question(record["personas"].strip(), ((request.target_new,),))
        hops.append(Probe("paraphrase", (asked,), "personas"))
    request = replace(request, probes=(*request.probes, *hops))
    return [with_locality(request, [one for kind, one in pairs if one is not None and kind == "locality"])]


_WIKIBIGEDIT = {"update": "prompt", "ans": "target_new", "rephrase": "paraphrase_prompts"}
_WIKIBIGEDIT_ASKED = {"mhop": ("mhop", "mhop_ans"), "locality": ("loc", "loc_ans")}

DATA_SETS = (
    DataSet(
        name="wikibigedit",
        title="WikiBigEdit as published: update, ans, rephrase, personas, mhop, loc",
        fields=frozenset({"update", "ans"}),
        read=_read_wikibigedit,
        optional=frozenset({*_WIKIBIGEDIT, "personas", *(n for names in _WIKIBIGEDIT_ASKED.values() for n in names)}),
        unused=frozenset({"tag"}),
        faults=(NO_CHANGE,),
    ),
    DataSet(
        name="easyedit",
        title="EasyEdit's flat records: CounterFact, WikiBigEdit and QAEdit in that form",
        fields=frozenset({"prompt"}),
        read=_read,
        marks=frozenset({*NAMES, *_BESIDE}),
        optional=frozenset({"locality"}),
        unused=frozenset({"source", "category", "cond", "loc_prompt", "target_neg", "pararel_idx", "relation_id"}),
        faults=(NO_CHANGE, STRAY_SPACES, STRAY_STAR, HALF_A_QUESTION),
    ),
)
