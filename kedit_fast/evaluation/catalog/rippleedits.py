"""RippleEdits: what follows from an edit, and what must not, by six criteria.

A test runs if the model before the edit answers its condition queries (`Probe.before`), and passes if one or all of its
queries are answered. A query is answered if each of its groups of answers has an alternative in the greedy text, with
the same letters. The published code looks for them in the prompt, too, and generates as many tokens as the prompt has
characters, and 30 (`.published`); otherwise the text is 30 new tokens without the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kedit_fast.evaluation.asks import Answer, Ask, Generated
from kedit_fast.evaluation.catalog.generation import said, written
from kedit_fast.evaluation.catalog.wild import new_answers
from kedit_fast.evaluation.metric import Case, Derived, Metric, Prompts, Scoring, request_of
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.request import EditRequest

TOKENS = 30
AXES = {
    "RS": ("Relation_Specificity", "MAKING_UP", "other facts of the subject stay"),
    "LG": ("Logical_Generalization", "LOGICAL_CONSTRAINTS", "facts that follow from the new one by logic"),
    "SA": ("Subject_Aliasing", "SUBJECT_PARAPHRASING", "the new fact by another name of its subject"),
    "CI": ("Compositionality_I", "TWO_HOP", "facts of the new target, asked by way of the subject"),
    "CII": ("Compositionality_II", "FORWARD_TWO_HOP", "the new target, asked by way of facts about the subject"),
    "PV": ("Forgetfulness", "PREVIOUS_STORAGE", "other answers of a relation that has several stay"),
}
"""Axis -> its criterion in the files, its name in the released code, and what it asks."""
Answers = Mapping[str, tuple[Answer, ...]]


def _tests(name: str) -> Callable[[EditRequest], tuple[Case, ...]]:
    def cases(request: EditRequest) -> tuple[Case, ...]:
        return tuple(
            Case(probe.prompts[0], answers=probe.questions[0].answers, name=name, record=request, probe=probe)
            for probe in request.probes
            if probe.name == name and probe.questions and all(question.answers for question in probe.questions)
        )

    return cases


def _probe(case: Case) -> Probe:
    assert case.probe is not None
    return case.probe


def _published(prompt: str) -> Generated:
    return Generated(prompt, len(prompt) + TOKENS, total=True)


def _short(prompt: str) -> Generated:
    return Generated(prompt, TOKENS)


def _answered(question: Question, text: str) -> bool:
    return all(any(answer in text for answer in group) for group in question.answers)


def _scoring(published: bool = False, edited: bool = True) -> Scoring:
    """Tests as the published code runs them, or by the new text alone; with `edited`, of edits that took alone."""
    ask = _published if published else _short

    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        probe = _probe(case)
        prompts = (request_of(case).text, *probe.prompts, *(question.prompt for question in probe.before))
        return tuple(map(ask, prompts))

    def passes(question: Question, answer: Answer) -> bool:
        return _answered(question, written(question.prompt, answer) if published else said(answer))

    def score(case: Case, answers: Answers) -> float | None:
        request, probe = request_of(case), _probe(case)
        edit, *given = answers["now"]
        if edited and not passes(Question(request.text, (new_answers(request),)), edit):
            return None
        before = answers["pre"][1 + len(probe.questions) :]
        if not all(passes(question, answer) for question, answer in zip(probe.before, before, strict=True)):
            return None
        results = (passes(question, answer) for question, answer in zip(probe.questions, given, strict=False))
        return float(any(results) if probe.condition == "any" else all(results))

    return Scoring(asks, score, ("pre",))


PROMPTS = {f"ripple.{axis}": Prompts("requests", _tests(name)) for axis, (name, _, _) in AXES.items()}
SCORINGS = {
    "ripple": _scoring(),
    "ripple.published": _scoring(published=True),
    "ripple.every_edit": _scoring(edited=False),
}
_SCORED = {
    "": (
        "ripple",
        "of those whose conditions the unedited model meets, mean over edits that the model answers; the answer is "
        "looked for in 30 new tokens",
        ", there with the prompt in the text",
    ),
    ".published": (
        "ripple.published",
        "of those whose conditions the unedited model meets, mean over edits that the model answers; the answer is "
        "looked for in the prompt and a text of as many tokens as it has characters, and 30",
        "",
    ),
    ".every_edit": (
        "ripple.every_edit",
        "of those whose conditions the unedited model meets, mean over all edits, which gives it a value before the "
        "edit; the answer is looked for in 30 new tokens",
        ", there of edits that took alone",
    ),
}
METRICS: tuple[Metric | Derived, ...] = tuple(
    Metric(
        f"ripple.{axis}{suffix}",
        f"ripple.{axis}",
        scoring,
        f"Share of tests passed ({meaning}), {how}.",
        f"RippleEdits (arXiv:2307.12976), src/evaluation.py and testrunner.py: {code}{beside}",
    )
    for suffix, (scoring, how, beside) in _SCORED.items()
    for axis, (_, code, meaning) in AXES.items()
)
