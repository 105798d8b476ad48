"""Whom a memory beside the weights answers for: edited prompts that it misses, and unrelated ones that it takes.

Routes are decided on prompts alone, as everywhere in an evaluation. In states without a memory there is no value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_fast.evaluation.asks import Answer, Ask, RouteAnswer, RouteOf
from kedit_fast.evaluation.catalog.drift import TEXT_TOKENS
from kedit_fast.evaluation.metric import Case, Metric, Prompts, Scoring
from kedit_fast.requests.request import EditRequest

Answers = Mapping[str, tuple[Answer, ...]]


def _rewrite(request: EditRequest) -> tuple[Case, ...]:
    return (Case(request.text, request.target_new, request.target_true, record=request),)


def _paraphrases(request: EditRequest) -> tuple[Case, ...]:
    new, true = request.target_new, request.target_true
    return tuple(Case(prompt, new, true, record=request) for prompt in request.paraphrase_prompts)


PROMPTS = {
    "memory.rewrite": Prompts("requests", _rewrite),
    "memory.paraphrase": Prompts("requests", _paraphrases),
}


def _prompt(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (RouteOf(case.prompt),)


def _text(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (RouteOf(case.prompt, TEXT_TOKENS),)


def _answers_for(answers: Answers) -> bool | None:
    """Whether the memory answers for the prompt; None without a memory."""
    (answer,) = answers["now"]
    assert isinstance(answer, RouteAnswer)
    return None if answer.route is None else answer.route >= 0


def _missed(case: Case, answers: Answers) -> float | None:
    taken = _answers_for(answers)
    return None if taken is None else float(not taken)


def _taken(case: Case, answers: Answers) -> float | None:
    taken = _answers_for(answers)
    return None if taken is None else float(taken)


SCORINGS = {
    "memory.missed_route": Scoring(_prompt, _missed),
    "memory.false_route": Scoring(_prompt, _taken),
    "memory.false_route, texts": Scoring(_text, _taken),
}
_SOURCE = "defined here"
METRICS = (
    *(
        Metric(
            f"memory.missed_route/{name}",
            f"memory.{name}",
            "memory.missed_route",
            "Share of prompts of edits that the attached memory does not answer for.",
            _SOURCE,
            scale=100.0,
            better="lower",
            needs="memory",
        )
        for name in ("rewrite", "paraphrase")
    ),
    Metric(
        "memory.false_route/neighborhood",
        "neighbors",
        "memory.false_route",
        "Share of neighborhood prompts and prompts of locality probes that the attached memory answers for.",
        _SOURCE,
        scale=100.0,
        better="lower",
        needs="memory",
    ),
    Metric(
        "memory.false_route/text",
        "text",
        "memory.false_route, texts",
        f"Share of natural texts, cut to {TEXT_TOKENS} tokens and read as prompts, that the attached memory answers "
        "for.",
        _SOURCE,
        unit="prompt",
        scale=100.0,
        better="lower",
        needs="memory",
    ),
)
