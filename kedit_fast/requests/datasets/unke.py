"""Long targets by whole prompts: UnKEBench (arXiv:2405.15349), and AnyEdit's records of the same form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_fast.requests.datasets.dataset import DataSet
from kedit_fast.requests.datasets.parts import Part, make_request
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import EditRequest


def read_unke(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    """A question and its paragraph, without a subject; the sub-questions are a probe "sub_question"."""
    part = Part(record, where)
    identity, paraphrase = part.get("id"), part.get("para_question")
    probes: tuple[Probe, ...] = ()
    if part.get("sub_question") is not None or part.get("sub_answer") is not None:
        asked, answers = part["sub_question"].texts(), part["sub_answer"].texts()
        if len(asked) != len(answers):
            raise part["sub_answer"].error(f"has {len(answers)} answers to {len(asked)} questions of sub_question")
        questions = tuple(Question(text, ((answer,),)) for text, answer in zip(asked, answers, strict=True))
        probes = (Probe("portability", questions, name="sub_question"),) if questions else ()
    return [
        make_request(
            where,
            options,
            prompt=part["question"].text(),
            subject=None,
            target_new=part["answer"].text(),
            paraphrase_prompts=() if paraphrase is None else (paraphrase.text(),),
            id=None if identity is None else identity.value,
            probes=probes,
        )
    ]


DATA_SETS = (
    DataSet(
        name="unkebench",
        title="UnKEBench (arXiv:2405.15349): paragraphs as targets, with no subject",
        fields=frozenset({"question", "para_question", "answer"}),
        read=read_unke,
        optional=frozenset({"sub_question", "sub_answer"}),
    ),
    DataSet(
        name="editeverything",
        title="EditEverything of AnyEdit (arXiv:2502.05628): long answers of several kinds, with no subject",
        fields=frozenset({"question", "answer", "category"}),
        read=read_unke,
    ),
)
