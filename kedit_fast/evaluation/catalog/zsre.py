"""zsRE's accuracy, as memit has it: token by token, each after the text of those before it."""

from __future__ import annotations

from typing import Any

from kedit_fast.evaluation.asks import Ask, Forced
from kedit_fast.evaluation.catalog.counterfact import Answers, forced_answers, probes_of
from kedit_fast.evaluation.metric import Case, FittedScoring, Fitting, Metric, Prompts, Scoring, request_of
from kedit_fast.requests.prompts import separator_before
from kedit_fast.requests.request import EditRequest


def preserved(request: EditRequest) -> tuple[Case, ...]:
    """The neighborhood prompts, and the questions of locality and neighborhood probes with their first answer."""
    cases = []
    if request.target_true is not None:
        cases += [
            Case(prompt, true=request.target_true, name="neighborhood", record=request)
            for prompt in request.neighborhood_prompts
        ]
    cases += [
        Case(question.prompt, true=question.answers[0][0], name=probe.name or probe.kind, record=request)
        for probe in probes_of(request, "locality", "neighborhood")
        for question in probe.questions
        if question.answers
    ]
    return tuple(cases)


PROMPTS = {"preserved": Prompts("requests", preserved)}


def _target(case: Case) -> str | None:
    """The answer that is scored: the new one, or, beside the edit, the one to preserve."""
    return case.true if case.new is None else case.new


def _pieces(case: Case, target: str, tokenizer: Any) -> list[tuple[str, str]]:
    """For each token of a target: the text before it, and its own, both decoded from the tokens of the target."""
    requested = request_of(case).target_separator
    between = separator_before(tokenizer, case.prompt, target, requested)
    tokens = tokenizer(between + target, add_special_tokens=False)["input_ids"]
    return [(tokenizer.decode(tokens[:i]), tokenizer.decode([token])) for i, token in enumerate(tokens)]


def _scoring(attribute: str) -> FittedScoring:
    """The scoring of one of a case's targets. Token ids are compared, so it is fitted to the tokenizer."""

    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        target = getattr(case, attribute)
        if target is None:
            return ()
        return tuple(  # the target matters as little as its tokens do: the first answer is compared with `piece`
            Forced(case.prompt + before, piece if piece.strip() else target, "", plain=True)
            for before, piece in _pieces(case, target, tokenizer)
        )

    def score_with(tokenizer: Any):
        def score(case: Case, answers: Answers) -> float | None:
            given = forced_answers(answers)
            if not given:
                return None
            pieces = _pieces(case, getattr(case, attribute), tokenizer)
            ids = [tokenizer(piece, add_special_tokens=False)["input_ids"][:1] for _, piece in pieces]
            return sum([one.top[0]] == first for one, first in zip(given, ids, strict=True)) / len(given)

        return score

    def fit(run: Fitting) -> Scoring:
        return Scoring(asks, score_with(run.tokenizer))

    return fit


SCORINGS = {"zsre.accuracy": _scoring("new"), "zsre.accuracy, preserved": _scoring("true")}

_DEFINITION = (
    "Share of {}'s tokens t[i] with: the most probable token after the text prompt + decode(t[:i]) is the first one of "
    "the text decode(t[i]); without BOS, and without a chat format."
)
METRICS = tuple(
    Metric(
        id=f"zsre.accuracy/{prompts}",
        prompts=prompts,
        scoring=scoring,
        definition=_DEFINITION.format(answer),
        source=f"memit experiments/py/eval_utils_zsre.py:52-120, {published}_prompts_correct",
        scale=100.0,
    )
    for prompts, scoring, answer, published in (
        ("rewrite", "zsre.accuracy", "the new target", "rewrite"),
        ("paraphrase", "zsre.accuracy", "the new target", "paraphrase"),
        ("neighborhood", "zsre.accuracy, preserved", "the true target", "neighborhood"),
        ("preserved", "zsre.accuracy, preserved", "the first right answer", "neighborhood"),
    )
)
