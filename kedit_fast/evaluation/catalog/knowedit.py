"""KnowEdit's four numbers: edit success, portability, locality, fluency, each the mean over requests, times 100.

Portability and locality are means of means: of the prompts of each criterion, of a request's criteria, and of the
requests that have any. The published code takes the first alternative of an answer and forgets the others
(`.published`); here each alternative of each group counts as the right answer, and the best one is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_fast.evaluation.asks import Answer, Ask, Forced, ForcedAnswer
from kedit_fast.evaluation.metric import Case, Derived, Metric, Prompts, Scoring, request_of
from kedit_fast.evaluation.words import HAS_NLTK
from kedit_fast.requests.probes import ProbeKind
from kedit_fast.requests.request import EditRequest

Answers = Mapping[str, tuple[Answer, ...]]
_SOURCE = "EasyEdit examples/run_knowedit_llama2.py: eval"


def _edit(request: EditRequest) -> tuple[Case, ...]:
    answers = ((request.target_new,),)
    return (Case(request.text, request.target_new, request.target_true, answers, record=request),)


def _questions(request: EditRequest, kind: ProbeKind) -> tuple[Case, ...]:
    """The questions of a kind of probe, named by their criterion; those without an answer are absent."""
    return tuple(
        Case(question.prompt, answers=question.answers, name=probe.name, record=request, probe=probe)
        for probe in request.probes
        if probe.kind == kind
        for question in probe.questions
        if any(question.answers)
    )


def alternatives(case: Case) -> tuple[str, ...]:
    """Every right answer of a case once, whatever group it is of."""
    return tuple(dict.fromkeys(text for group in case.answers for text in group))


def _all(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return tuple(Forced(case.prompt, text, request_of(case).target_separator) for text in alternatives(case))


def _first(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Forced(case.prompt, alternatives(case)[0], request_of(case).target_separator),)


def _forced(answers: Answers, state: str = "now") -> list[ForcedAnswer]:
    return [answer for answer in answers[state] if isinstance(answer, ForcedAnswer)]


def _best(case: Case, answers: Answers) -> float:
    return max(sum(answer.hits) / len(answer.hits) for answer in _forced(answers))


def _unchanged(case: Case, answers: Answers) -> float:
    now, before = _forced(answers)[0].top, _forced(answers, "pre")[0].top
    return sum(a == b for a, b in zip(now, before, strict=True)) / len(now)


PROMPTS = {
    "knowedit.edit": Prompts("requests", _edit),
    "knowedit.portability": Prompts("requests", lambda request: _questions(request, "portability")),
    "knowedit.locality": Prompts("requests", lambda request: _questions(request, "locality")),
}
SCORINGS = {
    "knowedit.best": Scoring(_all, _best),
    "knowedit.first": Scoring(_first, _best),
    "knowedit.unchanged": Scoring(_first, _unchanged, ("pre",)),
}
METRICS: tuple[Metric | Derived, ...] = (
    Metric(
        "knowedit.edit_success",
        "knowedit.edit",
        "knowedit.first",
        "Percent of the new target's tokens that are the most probable ones, teacher-forced.",
        f"{_SOURCE}, Edit_Succ",
        scale=100.0,
    ),
    Metric(
        "knowedit.portability",
        "knowedit.portability",
        "knowedit.best",
        "Percent of an answer's tokens that are the most probable ones, teacher-forced, of the best alternative; the "
        "mean over prompts of a criterion, then over criteria, then over requests that have any.",
        f"{_SOURCE}, Overall_portability, there with the first alternative",
        within="mean of names",
        scale=100.0,
    ),
    Metric(
        "knowedit.portability.published",
        "knowedit.portability",
        "knowedit.first",
        "As knowedit.portability, with the first alternative of the first group of answers alone.",
        f"{_SOURCE}, Overall_portability",
        within="mean of names",
        scale=100.0,
    ),
    Metric(
        "knowedit.locality",
        "knowedit.locality",
        "knowedit.unchanged",
        "Percent of the places of an answer, teacher-forced, where the most probable token is that of the unedited "
        "model, right or wrong; means as of knowedit.portability.",
        f"{_SOURCE}, Overall_locality",
        within="mean of names",
        scale=100.0,
    ),
    Metric(
        "knowedit.fluency",
        "knowedit.edit",
        "entropy",
        "ee.fluency times 100.",
        f"{_SOURCE}, Fluency, there with nltk's words",
        scale=100.0,
        share=False,
    ),
    *(
        [
            Metric(
                "knowedit.fluency.nltk",
                "knowedit.edit",
                "entropy.nltk",
                "ee.fluency.nltk times 100.",
                f"{_SOURCE}, Fluency",
                scale=100.0,
                share=False,
            )
        ]
        if HAS_NLTK
        else []
    ),
)
ABSENT = {} if HAS_NLTK else {"knowedit.fluency.nltk": "needs the package nltk, which is not installed"}
"""Metrics that need an optional package which is not there, and why."""
