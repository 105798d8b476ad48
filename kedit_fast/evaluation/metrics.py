"""Efficacy, paraphrase and neighborhood of edit requests, and the likelihood of text, on the model as it is now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kedit_fast.errors import RequestError
from kedit_fast.evaluation.asks import Answer, Forced, ForcedAnswer, Likelihood, LikelihoodAnswer
from kedit_fast.evaluation.engine import answer_rows
from kedit_fast.evaluation.metric import State
from kedit_fast.evaluation.results import Evaluation
from kedit_fast.evaluation.rows import rows_of
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.view import ModelView
from kedit_fast.requests.problems import numbered, require_no_problems
from kedit_fast.requests.prompts import PromptFormat, requested_separator
from kedit_fast.requests.reading import as_requests
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO, check_separator
from kedit_fast.support.torch_state import plain_torch

SHARES = ("cf.accuracy", "cf.success/rewrite")
"""The metrics that `Metrics` are made of."""


@dataclass(frozen=True)
class Metrics:
    """Means over requests and prompts, as fractions in [0, 1]; None where no request has the data."""

    efficacy: float
    """Share of requests with every token of `target_new` the most probable one."""
    efficacy_success: float | None
    """Share of requests in which `target_new` has a higher mean token log-probability than `target_true`."""
    paraphrase: float | None
    """Share of paraphrase prompts with every token of `target_new` the most probable one."""
    neighborhood: float | None
    """Share of neighborhood prompts with every token of `target_true` the most probable one."""

    def as_dict(self) -> dict[str, float | None]:
        """The metrics by name."""
        return asdict(self)


@dataclass(frozen=True)
class Continuation:
    """How probable a target is after a prompt."""

    argmax: bool
    """Whether every token of the target is the most probable one."""
    log_prob: float
    """Natural logarithm of a token's probability, mean over the target's tokens."""


@plain_torch()
def shares(
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    spec: ArchSpec | None = None,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
) -> Metrics:
    """Measure how far a model, as it is now, does what requests ask for.

    Args:
        model: a causal language model; nothing in it changes.
        tokenizer: its tokenizer.
        requests: as `Editor.edit` takes them. Their paraphrase and neighborhood prompts and `target_true` are used.
        spec: module names of an architecture that is not known.
        prompt_format: what makes each prompt into the text that the model reads, for example `chat_format(tokenizer)`.
        target_separator: what stands between prompts and targets of requests that say "auto": "auto", which decides
            for each prompt as editing does, " " or "".

    Returns:
        `Metrics`: the efficacy, paraphrase and neighborhood shares.

    Raises:
        RequestError: `requests` is no collection of requests, or some cannot be measured.

    Cost: one forward pass over every prompt, with its targets; the head on the targets' rows alone.

    Example:
        >>> metrics = shares(model, tokenizer, requests)
        >>> metrics.efficacy, metrics.neighborhood  # before any edit: the new facts are not there, the old ones are
        (0.0, 1.0)
    """
    return summary(evaluate_each(model, tokenizer, requests, spec, prompt_format, target_separator))


@dataclass(frozen=True)
class RequestScores:
    """How probable the targets of one request are."""

    new: Continuation
    """`target_new` after the prompt."""
    true: Continuation | None
    """`target_true` after the prompt; None for a request without."""
    paraphrases: tuple[Continuation, ...]
    """`target_new` after each paraphrase prompt."""
    neighborhood: tuple[Continuation, ...]
    """`target_true` after each neighborhood prompt."""


@plain_torch()
def evaluate_each(
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    spec: ArchSpec | None = None,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
) -> list[RequestScores]:
    """What `shares` measures, request by request.

    Raises:
        RequestError: `requests` is no collection of requests, or some cannot be measured; it names all of these, and
            nothing has run.
    """
    requests = as_requests(requests)
    check_separator(target_separator)
    view = ModelView(model, spec)
    asks = [_asks_by_kind(request, prompt_format, target_separator) for request in requests]
    rows, unusable = rows_of(view, tokenizer, (ask for parts in asks for part in parts for ask in part), prompt_format)
    problems = {}
    for index, (request, parts) in enumerate(zip(requests, asks, strict=True)):
        if problem := next((unusable[ask] for part in parts for ask in part if ask in unusable), ""):
            problems[index] = f"{numbered(request.id, index)}: {problem}"
    require_no_problems(problems)
    answers = answer_rows(view, tokenizer, rows, finite=False)
    scores = []
    for parts in asks:
        new, true, paraphrases, neighbors = (tuple(_continuation(answers[ask]) for ask in part) for part in parts)
        scores.append(RequestScores(new[0], true[0] if true else None, paraphrases, neighbors))
    return scores


@plain_torch()
def mean_nll(
    model: torch.nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int = 256, spec: ArchSpec | None = None
) -> float:
    """Mean negative log-likelihood per token of `texts`, in nats; edits should not raise it for unrelated text.

    Args:
        model: nothing in it changes.
        tokenizer: its tokenizer.
        texts: documents; the first token of each is not scored.
        max_length: the number of tokens that documents are cut to.
        spec: module names of an architecture that is not known.

    Raises:
        RequestError: no document has two tokens or more, or the model has no embedding for a token.

    Cost: one forward pass over the texts; the head on all tokens, in chunks of the vocabulary.
    """
    view = ModelView(model, spec)
    asks = [Likelihood(text, max_length) for text in texts]
    rows, unusable = rows_of(view, tokenizer, asks, least=1)
    for number, ask in enumerate(asks, 1):
        if ask in unusable:
            raise RequestError(f"text {number}: {unusable[ask]}")
    rows = {ask: row for ask, row in rows.items() if len(row.prompt) > 1}
    if not rows:
        raise RequestError("no text of two tokens or more to measure")
    answers = answer_rows(view, tokenizer, rows, finite=False)
    scored = [log_prob for ask in asks if ask in rows for log_prob in _log_probs(answers[ask])]
    return -math.fsum(scored) / len(scored)


def unusable(
    view: ModelView,
    tokenizer: Any,
    request: EditRequest,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
) -> str:
    """Why a request cannot be measured; "" if it can."""
    parts = _asks_by_kind(request, prompt_format, target_separator)
    _, problems = rows_of(view, tokenizer, (ask for part in parts for ask in part), prompt_format)
    return next(iter(problems.values()), "")


def _asks_by_kind(
    request: EditRequest, prompt_format: PromptFormat | None, target_separator: str
) -> tuple[list[Forced], ...]:
    """What to score: the new target, the true one, paraphrases, the neighborhood."""
    new, true = request.target_new, request.target_true
    text = request.text
    if prompt_format is not None and request.subject is not None:
        text = request.prompt.replace("{}", request.subject.strip())
    between = requested_separator(request, target_separator)
    old = [] if true is None else [Forced(text, true, between)]
    neighbors = [] if true is None else [Forced(other, true, between) for other in request.neighborhood_prompts]
    return (
        [Forced(text, new, between)],
        old,
        [Forced(other, new, between) for other in request.paraphrase_prompts],
        neighbors,
    )


def _continuation(answer: Answer) -> Continuation:
    assert isinstance(answer, ForcedAnswer)
    return Continuation(all(answer.hits), -answer.nll)


def _log_probs(answer: Answer) -> tuple[float, ...]:
    assert isinstance(answer, LikelihoodAnswer)
    return answer.log_probs


def summary(scores: Sequence[RequestScores]) -> Metrics:
    """The metrics of scored requests."""
    return Metrics(
        efficacy=_share([s.new.argmax for s in scores]) or 0.0,
        efficacy_success=_share([s.new.log_prob > s.true.log_prob for s in scores if s.true is not None]),
        paraphrase=_share([c.argmax for s in scores for c in s.paraphrases]),
        neighborhood=_share([c.argmax for s in scores for c in s.neighborhood]),
    )


def shares_of(evaluation: Evaluation, state: State = "final") -> Metrics:
    """The four shares from an evaluation that has the metrics SHARES: means over all prompts alike."""

    def share(id: str) -> float | None:
        scores = [c.scores[state] for record in evaluation.scores[id] for c in record.cases if state in c.scores]
        return sum(scores) / len(scores) if scores else None

    return Metrics(
        efficacy=share("cf.accuracy/rewrite") or 0.0,
        efficacy_success=share("cf.success/rewrite"),
        paraphrase=share("cf.accuracy/paraphrase"),
        neighborhood=share("cf.accuracy/neighborhood"),
    )


@plain_torch()
def score(
    view: ModelView,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    prompt_format: PromptFormat | None = None,
    separators: Sequence[str] | None = None,
) -> list[Continuation]:
    """How probable the target of each (prompt, target) is, with `separators` between them; "auto" by default."""
    separators = [AUTO] * len(pairs) if separators is None else separators
    asks = [Forced(prompt, target, between) for (prompt, target), between in zip(pairs, separators, strict=True)]
    rows, unusable = rows_of(view, tokenizer, asks, prompt_format)
    if unusable:
        raise RequestError(next(iter(unusable.values())))
    answers = answer_rows(view, tokenizer, rows, finite=False)
    return [_continuation(answers[ask]) for ask in asks]


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
