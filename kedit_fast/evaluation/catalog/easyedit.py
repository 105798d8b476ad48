"""EasyEdit's metrics that are teacher-forced: accuracy by token, locality, and its two perplexities."""

from __future__ import annotations

from typing import Any

from kedit_fast.evaluation.asks import Ask, Likelihood, LikelihoodAnswer
from kedit_fast.evaluation.catalog.counterfact import Answers, exponential, forced, forced_answers, probes_of
from kedit_fast.evaluation.metric import Case, Metric, Prompts, Scoring, Within, request_of
from kedit_fast.requests.request import EditRequest

LONGEST = 1024
"""Tokens that EasyEdit cuts its texts to for perplexities."""
SURE = 0.8
"""The probability above which ee.ood_ppl counts a token."""


def portability(request: EditRequest) -> tuple[Case, ...]:
    """The questions of portability probes, with their first answer."""
    return tuple(
        Case(question.prompt, question.answers[0][0], name=probe.name, record=request)
        for probe in probes_of(request, "portability")
        for question in probe.questions
        if question.answers
    )


def together(request: EditRequest) -> tuple[Case, ...]:
    """One case for all paraphrase prompts of a request."""
    if not request.paraphrase_prompts:
        return ()
    return (Case(request.paraphrase_prompts[0], request.target_new, request.target_true, record=request),)


PROMPTS = {"portability": Prompts("requests", portability), "paraphrases together": Prompts("requests", together)}


def _new(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return () if case.new is None else (forced(case, case.new),)


def _true(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return () if case.true is None else (forced(case, case.true),)


def _share_of_tokens(case: Case, answers: Answers) -> float | None:
    given = forced_answers(answers)
    return sum(given[0].hits) / len(given[0].hits) if given else None


def _unchanged(case: Case, answers: Answers) -> float | None:
    now, before = forced_answers(answers), forced_answers(answers, "pre")
    if not now:
        return None
    return sum(a == b for a, b in zip(now[0].top, before[0].top, strict=True)) / len(now[0].top)


def _every_paraphrase(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    request = request_of(case)
    return tuple(forced(case, request.target_new, prompt) for prompt in request.paraphrase_prompts)


def _perplexity(case: Case, answers: Answers) -> float | None:
    given = forced_answers(answers)
    tokens = sum(len(answer.tokens) for answer in given)
    return exponential(-sum(sum(answer.log_probs) for answer in given) / tokens) if tokens else None


def _prompt_alone(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    has_tokens_to_score = len(tokenizer(case.prompt)["input_ids"]) > 1
    return (Likelihood(case.prompt, LONGEST),) if has_tokens_to_score else ()


def _share_of_sure_tokens(case: Case, answers: Answers) -> float | None:
    if not answers["now"]:
        return None
    (answer,) = answers["now"]
    assert isinstance(answer, LikelihoodAnswer)
    return sum(exponential(log_prob) > SURE for log_prob in answer.log_probs) / len(answer.log_probs)


SCORINGS = {
    "ee.token_accuracy": Scoring(_new, _share_of_tokens),
    "ee.locality": Scoring(_true, _unchanged, states=("pre",)),
    "ee.ppl": Scoring(_new, _perplexity),
    "ee.ppl, together": Scoring(_every_paraphrase, _perplexity),
    "ee.ood_ppl": Scoring(_prompt_alone, _share_of_sure_tokens),
}

_FILE = "EasyEdit easyeditor/evaluate/evaluate_utils.py"


def _token_accuracy(name: str, prompts: str, note: str, published: str, within: Within = "mean") -> Metric:
    return Metric(
        id=f"ee.token_accuracy/{name}",
        prompts=prompts,
        scoring="ee.token_accuracy",
        definition=f"Share of the answer's tokens that are the most probable ones, teacher-forced; {note}.",
        source=f"{_FILE}:267-317, {published}",
        within=within,
    )


def _ood_ppl(name: str, prompts: str) -> Metric:
    return Metric(
        id=f"ee.ood_ppl/{name}",
        prompts=prompts,
        scoring="ee.ood_ppl",
        definition=f"Share of the prompt's tokens, from the second on, with a probability above {SURE}; it is no "
        "perplexity, and no target is used.",
        source=f"{_FILE}:434-474, ood_acc",
        better="",
    )


METRICS = (
    _token_accuracy(
        "rewrite", "rewrite", "a wrong answer that shares tokens with the right one counts in part", "rewrite_acc"
    ),
    _token_accuracy("rephrase", "paraphrase", "mean over the paraphrase prompts", "rephrase_acc"),
    _token_accuracy(
        "portability",
        "portability",
        "mean over each name's questions, then over names; of several right answers the first",
        "portability {key}_acc",
        "mean of names",
    ),
    Metric(
        id="ee.locality",
        prompts="preserved",
        scoring="ee.locality",
        definition="Share of tokens that are the same as in the unedited model, at the places of the right answer's, "
        "which is fed and not judged; mean over each name's prompts, then over names.",
        source="EasyEdit easyeditor/editors/editor.py:56-96, locality {key}_acc",
        within="mean of names",
    ),
    Metric(
        id="ee.ppl/rewrite",
        prompts="rewrite",
        scoring="ee.ppl",
        definition="exp of the mean NLL of the new target's tokens.",
        source=f"{_FILE}:404-431, rewrite_ppl",
        better="lower",
        share=False,
    ),
    Metric(
        id="ee.ppl/rephrase",
        prompts="paraphrases together",
        scoring="ee.ppl, together",
        definition="exp of the mean NLL of the new target's tokens behind all paraphrase prompts of a request.",
        source=f"{_FILE}:404-431, rephrase_ppl",
        better="lower",
        share=False,
    ),
    _ood_ppl("rewrite", "rewrite"),
    _ood_ppl("rephrase", "paraphrase"),
)
