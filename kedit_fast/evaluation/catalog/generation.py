"""What a model writes by itself: entropy of n-grams, likeness to reference texts, perplexity of given ones.

Texts are those of CounterFact's generation prompts, and of probes of the kind "generation": sampled from the five most
probable tokens until prompt and continuation have 100 tokens. The text of a score is the prompt with its continuation,
without special tokens. Reference texts are a request's probes of the kind "reference".
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kedit_fast.evaluation.asks import Answer, Ask, Generated, GeneratedAnswer, Likelihood, LikelihoodAnswer
from kedit_fast.evaluation.metric import Case, Derived, FittedScoring, Fitting, Metric, Prompts, Scoring, request_of
from kedit_fast.evaluation.words import (
    HAS_NLTK,
    HAS_SKLEARN,
    PublishedTfIdf,
    TfIdf,
    ngram_entropy,
    nltk_words,
    words,
)
from kedit_fast.requests.request import EditRequest

_log = logging.getLogger("kedit_fast")
_MEMIT = "memit experiments/py/eval_utils_counterfact.py"
Answers = Mapping[str, tuple[Answer, ...]]


class Similarity(Protocol):
    """What compares two texts."""

    def similarity(self, a: str, b: str) -> float | None:
        """From 0 to 1; None where a text has nothing to compare."""
        ...


def generation_prompts(request: EditRequest) -> tuple[str, ...]:
    """The prompts that a request wants continued freely."""
    probes = (probe for probe in request.probes if probe.kind == "generation")
    return (*request.generation_prompts, *(prompt for probe in probes for prompt in probe.prompts))


def references(request: EditRequest, name: str) -> tuple[str, ...]:
    """The reference texts of a request, "consistency" or "essence"."""
    probes = (probe for probe in request.probes if probe.kind == "reference" and probe.name == name)
    return tuple(prompt for probe in probes for prompt in probe.prompts)


def written(prompt: str, answer: Answer) -> str:
    """A prompt with what the model said after it."""
    return prompt + said(answer)


def said(answer: Answer) -> str:
    """What the model said, without the prompt."""
    assert isinstance(answer, GeneratedAnswer)
    return answer.text


def as_published(text: str) -> str:
    """A text as `generate_fast` of memit and EasyEdit returns it: decomposed (NFKD), each empty line a space."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


def sampled(prompt: str) -> Generated:
    """A text of 100 tokens with its prompt, drawn from the five most probable tokens with seed 0."""
    return Generated(prompt, 100, total=True, top_k=5)


def greedy(prompt: str) -> Generated:
    """A text of 100 tokens with its prompt, of the most probable tokens."""
    return Generated(prompt, 100, total=True)


def _entropy(tokenize: Callable[[str], list[str]], ask: Callable[[str], Generated] = sampled) -> Scoring:
    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        return (ask(case.prompt),)

    def score(case: Case, answers: Answers) -> float:
        return ngram_entropy(tokenize(written(case.prompt, answers["now"][0])))

    return Scoring(asks, score)


def _consistency(fitted: Callable[[Sequence[str]], Similarity], name: str) -> FittedScoring:
    """Of the texts of a request together, with its reference texts together; idf is that of the run's texts."""

    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        return tuple(map(sampled, generation_prompts(request_of(case))))

    def fit(run: Fitting) -> Scoring:
        if not run.texts:
            _log.warning("%s is left out: give texts, from which it learns how common each word is", name)
            return Scoring(lambda case, tokenizer: (), lambda case, answers: None)
        weights = fitted(run.texts)

        def score(case: Case, answers: Answers) -> float | None:
            request = request_of(case)
            texts = map(written, generation_prompts(request), answers["now"])
            return weights.similarity(" ".join(texts), " ".join(references(request, "consistency")))

        return Scoring(asks, score)

    return fit


def _perplexity(published: bool = False) -> Scoring:
    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        return (Likelihood(case.prompt, 100),)

    def score(case: Case, answers: Answers) -> float:
        answer = answers["now"][0]
        assert isinstance(answer, LikelihoodAnswer)
        count = len(answer.tokens)
        return math.exp(-math.fsum(answer.log_probs) / (count + 1 if published else count))

    return Scoring(asks, score)


def _to_continue(request: EditRequest) -> tuple[Case, ...]:
    return tuple(Case(prompt, record=request) for prompt in generation_prompts(request))


def _to_compare(request: EditRequest) -> tuple[Case, ...]:
    prompts = generation_prompts(request)
    if not prompts or not references(request, "consistency"):
        return ()
    return (Case(prompts[0], request.target_new, request.target_true, record=request),)


def _to_read(request: EditRequest) -> tuple[Case, ...]:
    texts = references(request, "essence")
    return (Case(" ".join(texts), record=request),) if texts else ()


def _to_rewrite(request: EditRequest) -> tuple[Case, ...]:
    return (Case(request.text, request.target_new, request.target_true, record=request),)


PROMPTS = {
    "generation": Prompts("requests", _to_continue),
    "generation.rewrite": Prompts("requests", _to_rewrite),
    "generation.consistency": Prompts("requests", _to_compare),
    "generation.essence": Prompts("requests", _to_read),
}
SCORINGS = {
    "entropy": _entropy(words),
    "entropy.greedy": _entropy(words, greedy),
    "entropy.nltk": _entropy(lambda text: nltk_words(as_published(text))),
    "consistency": _consistency(TfIdf.fit, "gen.consistency"),
    "consistency.sklearn": _consistency(PublishedTfIdf, "gen.consistency.sklearn"),
    "essence": _perplexity(),
    "essence.published": _perplexity(published=True),
}
_ENTROPY = "entropy in bits of the bigrams and trigrams of words, (2/3 H2 + 4/3 H3) / 2, of text and prompt: 100 tokens"
_SAMPLED = f"{_ENTROPY}, drawn from the five most probable"
_METRICS = (
    Metric(
        "gen.entropy",
        "generation",
        "entropy",
        f"Times 100: {_SAMPLED}; words are those of kedit_fast.evaluation.words.words.",
        f"{_MEMIT}: ngram_entropy (GE, fluency), there with nltk's words and with special tokens in the text",
        scale=100.0,
        share=False,
    ),
    Metric(
        "gen.entropy.greedy",
        "generation",
        "entropy.greedy",
        f"Times 100: {_ENTROPY}, each the most probable one; words are those of kedit_fast.evaluation.words.words.",
        "as gen.entropy, without draws",
        scale=100.0,
        share=False,
    ),
    Metric(
        "gen.entropy.nltk",
        "generation",
        "entropy.nltk",
        f"Times 100: {_SAMPLED}; words are NLTK's of the text as a whole.",
        f"{_MEMIT}: ngram_entropy; there each sentence has its words apart, and special tokens are in the text",
        scale=100.0,
        share=False,
    ),
    Metric(
        "gen.consistency",
        "generation.consistency",
        "consistency",
        "Times 100: cosine of tf-idf of a request's drawn texts and its reference texts, each joined by spaces.",
        f"{_MEMIT}: reference_score (RS); idf is learned from the run's texts as scikit-learn's defaults learn it",
        scale=100.0,
    ),
    Metric(
        "gen.consistency.sklearn",
        "generation.consistency",
        "consistency.sklearn",
        "Times 100: gen.consistency as scikit-learn itself computes it.",
        f"{_MEMIT}: reference_score (RS)",
        scale=100.0,
    ),
    Metric(
        "gen.essence",
        "generation.essence",
        "essence",
        "Perplexity of the first 100 tokens of texts about the subject: exp of the mean over the tokens but the first.",
        f"{_MEMIT}: essence_score",
        better="lower",
        share=False,
    ),
    Metric(
        "gen.essence.published",
        "generation.essence",
        "essence.published",
        "As gen.essence, but the sum over the n - 1 tokens is divided by n: too low.",
        f"{_MEMIT}: essence_score; memit util/perplexity.py",
        better="lower",
        share=False,
    ),
    Metric(
        "ee.fluency",
        "generation.rewrite",
        "entropy",
        f"Of the edited prompt, not times 100: {_SAMPLED}; words are those of kedit_fast.evaluation.words.words.",
        "EasyEdit evaluate/evaluate_utils.py: fluency.ngram_entropy, there with nltk's words",
        share=False,
    ),
    Metric(
        "ee.fluency.nltk",
        "generation.rewrite",
        "entropy.nltk",
        f"Of the edited prompt, not times 100: {_SAMPLED}; words are NLTK's of the text as a whole.",
        "EasyEdit evaluate/evaluate_utils.py: fluency.ngram_entropy",
        share=False,
    ),
)
ABSENT = {
    metric.id: f"needs the package {package}, which is not installed"
    for metric in _METRICS
    for suffix, package, there in ((".nltk", "nltk", HAS_NLTK), (".sklearn", "scikit-learn", HAS_SKLEARN))
    if metric.id.endswith(suffix) and not there
}
"""Metrics that need an optional package which is not there, and why."""
METRICS: tuple[Metric | Derived, ...] = tuple(metric for metric in _METRICS if metric.id not in ABSENT)
