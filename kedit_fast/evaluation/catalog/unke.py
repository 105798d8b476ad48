"""UnKE: long answers, compared word by word with the target (ROUGE-L).

The published code also gives BLEU, ROUGE-1 and ROUGE-2, and cosines of MiniLM's embeddings. They are left out: its BLEU
counts characters (`sentence_bleu` of two texts), and the cosines need another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kedit_fast.evaluation.asks import Answer, Ask, Generated
from kedit_fast.evaluation.catalog.generation import said
from kedit_fast.evaluation.metric import Case, Derived, Metric, Prompts, Scoring
from kedit_fast.evaluation.words import Overlap, rouge_l
from kedit_fast.requests.request import EditRequest

TOKENS = 512
SUB_QUESTIONS = "sub_question"
"""Name of the probe with questions about parts of the target."""
Answers = Mapping[str, tuple[Answer, ...]]


def _rewrite(request: EditRequest) -> tuple[Case, ...]:
    return (Case(request.text, request.target_new, answers=((request.target_new,),), record=request),)


def _paraphrases(request: EditRequest) -> tuple[Case, ...]:
    new = request.target_new
    return tuple(Case(prompt, new, answers=((new,),), record=request) for prompt in request.paraphrase_prompts)


def _sub_questions(request: EditRequest) -> tuple[Case, ...]:
    return tuple(
        Case(question.prompt, answers=question.answers, name=probe.name, record=request, probe=probe)
        for probe in request.probes
        if probe.name == SUB_QUESTIONS
        for question in probe.questions
        if any(question.answers)
    )


def _asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Generated(case.prompt, TOKENS),)


def _rouge(of: Callable[[Overlap], float]) -> Scoring:
    """The best of a case's answers; None where none has a word."""

    def score(case: Case, answers: Answers) -> float | None:
        text = said(answers["now"][0])
        overlaps = (rouge_l(text, answer) for group in case.answers for answer in group)
        return max((of(overlap) for overlap in overlaps if overlap is not None), default=None)

    return Scoring(_asks, score)


PROMPTS = {
    "unke.rewrite": Prompts("requests", _rewrite),
    "unke.paraphrase": Prompts("requests", _paraphrases),
    "unke.sub_question": Prompts("requests", _sub_questions),
}
SCORINGS = {
    "unke.rouge_l": _rouge(lambda overlap: overlap.f1),
    "unke.rouge_l.recall": _rouge(lambda overlap: overlap.recall),
}
_PLACES = ("rewrite", "paraphrase", "sub_question")
_COMMON = "longest common subsequence of words of the greedy answer (up to 512 tokens) and the target"
_SCORED = {
    "unke.rouge_l": (
        f"ROUGE-L F1, of the {_COMMON}, in lower case and without marks.",
        "UnKE (arXiv:2405.15349) evaluate.py, which gives the recall alone; F1 also counts what is said too much",
    ),
    "unke.rouge_l.recall": (
        f"ROUGE-L recall, of the {_COMMON}, in lower case and without marks.",
        "UnKE (arXiv:2405.15349) evaluate.py: rouge-l r, there with words split at spaces and full stops",
    ),
}
METRICS: tuple[Metric | Derived, ...] = tuple(
    Metric(f"{id}/{place}", f"unke.{place}", id, definition, source)
    for id, (definition, source) in _SCORED.items()
    for place in _PLACES
)
