"""Negated prompts: an edit that holds when its prompt is denied is a reflex, not a fact."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from kedit_fast.evaluation.asks import Ask
from kedit_fast.evaluation.catalog.counterfact import Answers, both_targets, forced, forced_answers, probability
from kedit_fast.evaluation.metric import Case, Metric, Prompts, Scoring, request_of
from kedit_fast.requests.request import EditRequest

_VERB = re.compile(r"\b(is|are|was|were|can|will|would|should|could|has been|have been|had been)\b(?! not\b)")
_KEEPS_CAPITAL = re.compile(r"I\b|[A-Z]\w*[A-Z]")


def it_is_false_that(request: EditRequest) -> str | None:
    """The prompt as a clause behind "It is false that"."""
    text, subject = request.text, request.subject or ""
    names_first = bool(subject) and text.startswith(subject)
    if text[:1].isupper() and not names_first and not _KEEPS_CAPITAL.match(text):
        text = text[0].lower() + text[1:]
    return f"It is false that {text}"


def is_not(request: EditRequest) -> str | None:
    """The prompt with "not" behind its verb; None unless it has exactly one of a few verbs outside its subject."""
    before, brace, after = request.prompt.partition("{}") if request.subject is not None else (request.prompt, "", "")
    parts = [before, after]
    places = [(place, match) for place, part in enumerate(parts) for match in _VERB.finditer(part)]
    if len(places) != 1 or request.text.rstrip().endswith("?"):
        return None
    place, match = places[0]
    end = match.end() if " " not in match[0] else match.start() + match[0].index(" ")  # has not been
    parts[place] = f"{parts[place][:end]} not{parts[place][end:]}"
    return f"{parts[0]}{request.subject if brace else ''}{parts[1]}"


def _negated(negate: Callable[[EditRequest], str | None]) -> Callable[[EditRequest], tuple[Case, ...]]:
    def cases(request: EditRequest) -> tuple[Case, ...]:
        prompt = negate(request)
        if prompt is None:
            return ()
        return (Case(prompt, request.target_new, request.target_true, record=request),)

    return cases


PROMPTS = {"false_that": Prompts("requests", _negated(it_is_false_that)), "not": Prompts("requests", _negated(is_not))}


def _new(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return () if case.new is None else (forced(case, case.new),)


def _plain_too(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    if case.new is None:
        return ()
    return forced(case, case.new), forced(case, case.new, request_of(case).text)


def _probability(case: Case, answers: Answers) -> float | None:
    given = forced_answers(answers)
    return probability(given[0]) if given else None


def _drop(case: Case, answers: Answers) -> float | None:
    given = forced_answers(answers)
    return probability(given[1]) - probability(given[0]) if given else None


def _survives(case: Case, answers: Answers) -> float | None:
    given = forced_answers(answers)
    return float(given[0].nll < given[1].nll) if given else None


SCORINGS = {
    "neg.probability": Scoring(_new, _probability),
    "neg.drop": Scoring(_plain_too, _drop),
    "neg.success": Scoring(both_targets(), _survives),
}

_SOURCE = "defined here; arXiv 2510.00625 asks the question"


def _metrics(prompts: str, denied: str) -> tuple[Metric, ...]:
    return (
        Metric(
            id=f"neg.probability/{prompts}",
            prompts=prompts,
            scoring="neg.probability",
            definition=f"exp(-NLL) of the new target {denied}.",
            source=_SOURCE,
            better="lower",
        ),
        Metric(
            id=f"neg.drop/{prompts}",
            prompts=prompts,
            scoring="neg.drop",
            definition=f"exp(-NLL) of the new target behind the prompt minus that {denied}.",
            source=_SOURCE,
            share=False,
        ),
        Metric(
            id=f"neg.success/{prompts}",
            prompts=prompts,
            scoring="neg.success",
            definition=f"Share of requests whose new target still has a lower NLL than the true one {denied}.",
            source=_SOURCE,
            scale=100.0,
            better="lower",
        ),
    )


METRICS = (
    Metric(
        id="neg.probability/plain",
        prompts="rewrite",
        scoring="neg.probability",
        definition="exp(-NLL) of the new target behind the prompt.",
        source=_SOURCE,
    ),
    *_metrics("false_that", 'behind "It is false that" and the prompt'),
    *_metrics("not", 'behind the prompt with "not" at its verb'),
)
