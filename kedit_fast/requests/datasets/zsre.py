"""zsRE in the form of MEND (zsre_mend_eval.json), which is published with two readings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.dataset import NO_CHANGE, DataSet, Fault, require, stray_spaces
from kedit_fast.requests.datasets.easyedit import question_of, with_hop, with_locality
from kedit_fast.requests.probes import Question
from kedit_fast.requests.record_fields import alternatives
from kedit_fast.requests.records import Options, read_flat
from kedit_fast.requests.request import EditRequest

_NAMES = {"src": "prompt", "rephrase": "paraphrase_prompts", "case_id": "id"}
_BESIDE = ("loc", "loc_ans")


def _read(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    written = options.reading or ""
    require(record, ("src", written), where)
    if written == "alt":
        names = {**_NAMES, "alt": "target_new", "answers": "target_true"}
        request = read_flat([record], where, options, names, strip=True)
    else:
        answers = alternatives(record["answers"])
        if not answers:
            raise RequestError(f"{where}: answers holds no text")
        names = {**_NAMES, "answers": "target_new"}
        changed = {**record, "answers": answers[0]}
        request = read_flat([changed], where, options, names, strip=True, target_aliases=answers[1:])
    question = question_of(record, *_BESIDE, where)
    if question is None:
        return [with_hop(request, record, where)]
    if written == "answers" and not question.prompt.endswith("?"):  # as memit's reader does; EasyEdit's does not
        question = Question(question.prompt + "?", question.answers)
    return [with_locality(with_hop(request, record, where), [question], "nq")]


def _dash(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    return any(text.startswith("- ") for request in requests for text in request.paraphrase_prompts)


DATA_SETS = (
    DataSet(
        name="zsre",
        title="zsRE as MEND cut it (zsre_mend_eval.json)",
        fields=frozenset({"src"}),
        read=_read,
        marks=frozenset({"alt", "answers"}),
        optional=frozenset({*_NAMES, *_BESIDE, "portability"}),
        unused=frozenset({"pred", "cond"}),
        choices={
            "answers": "memit: writes the first of `answers`, which is true",
            "alt": "EasyEdit: writes `alt`, which is not; `answers` is what was true",
        },
        faults=(
            NO_CHANGE,
            Fault(
                "spaces around a text, which are taken away",
                lambda record, _: stray_spaces(record, (*_NAMES, "subject", "alt", "answers", *_BESIDE)),
            ),
            Fault('a paraphrase begins with a stray "- ", which is taken as it is', _dash),
        ),
    ),
)
