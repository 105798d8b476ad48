"""Efficacy, paraphrase and neighborhood of edit requests, and the likelihood of text, on the model as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kedit_fast.errors import RequestError
from kedit_fast.evaluation.metric import State
from kedit_fast.evaluation.results import Evaluation
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import evaluating, last_states, pad, unknown_token
from kedit_fast.models.view import ModelView
from kedit_fast.requests.problems import require_no_problems
from kedit_fast.requests.prompts import PromptFormat, continuation, requested_separator
from kedit_fast.requests.reading import as_requests
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO, check_separator
from kedit_fast.support.torch_state import plain_torch

BATCH_TOKENS = 4096
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

    Cost: one forward pass over every prompt with its target, in batches by length; the head on the targets' rows alone.

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
    rows: list[tuple[list[int], tuple[int, ...]]] = []
    counts = []
    problems = {}
    for index, request in enumerate(requests):
        pairs_by_kind = _pairs_by_kind(request, prompt_format)
        pairs = [pair for part in pairs_by_kind for pair in part]
        separators = [requested_separator(request, target_separator)] * len(pairs)
        try:
            rows += _rows(view, tokenizer, pairs, prompt_format, separators)
        except RequestError as error:
            name = f"request {request.id!r}" if request.id is not None else f"request {index + 1}"
            problems[index] = f"{name}: {error}"
        counts.append([len(part) for part in pairs_by_kind])
    require_no_problems(problems)
    scored = iter(_scored(view, rows))
    scores = []
    for _, old, paraphrases, neighbors in counts:
        new = next(scored)
        true = next(scored) if old else None
        lists = (tuple(next(scored) for _ in range(count)) for count in (paraphrases, neighbors))
        scores.append(RequestScores(new, true, *lists))
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
    length = min(max_length, view.max_length)
    rows = [tuple(tokenizer(text, truncation=True, max_length=length)["input_ids"]) for text in texts]
    for number, row in enumerate(rows, 1):
        if problem := unknown_token(tokenizer, row, view.vocabulary):
            raise RequestError(f"text {number}: {problem}")
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    if not rows:
        raise RequestError("no text of two tokens or more to measure")
    total, count = 0.0, 0
    with evaluating(view), torch.no_grad():
        while rows:
            size = max(1, BATCH_TOKENS // len(rows[0]))
            chunk, rows = rows[:size], rows[size:]
            hidden = last_states(view, pad(chunk, view.device))
            index = torch.tensor([(r, t) for r, row in enumerate(chunk) for t in range(len(row) - 1)])
            targets = torch.tensor([token for row in chunk for token in row[1:]], device=view.head.device)
            states = hidden[index[:, 0].to(hidden.device), index[:, 1].to(hidden.device)].to(view.head.device)
            scored = view.head.target_log_probs(states, targets)
            total -= float(scored.log_prob.double().sum())
            count += targets.numel()
    return total / count


def unusable(
    view: ModelView,
    tokenizer: Any,
    request: EditRequest,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
) -> str:
    """Why a request cannot be measured; "" if it can."""
    requested = requested_separator(request, target_separator)
    try:
        for part in _pairs_by_kind(request, prompt_format):
            _rows(view, tokenizer, part, prompt_format, [requested] * len(part))
    except RequestError as error:
        return str(error)
    return ""


def _pairs_by_kind(request: EditRequest, prompt_format: PromptFormat | None) -> tuple[list[tuple[str, str]], ...]:
    """(prompt, target) pairs to score: of the new target, of the true one, of paraphrases, of the neighborhood."""
    new, true = request.target_new, request.target_true
    text = request.text
    if prompt_format is not None and request.subject is not None:
        text = request.prompt.replace("{}", request.subject.strip())
    old = [] if true is None else [(text, true)]
    neighbors = [] if true is None else [(other, true) for other in request.neighborhood_prompts]
    return [(text, new)], old, [(other, new) for other in request.paraphrase_prompts], neighbors


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
    return _scored(view, _rows(view, tokenizer, pairs, prompt_format, separators))


def _scored(view: ModelView, rows: Sequence[tuple[list[int], tuple[int, ...]]]) -> list[Continuation]:
    """Continuations of (prompt ids, target ids), the longest first so that batches hold rows of similar lengths."""
    scores: list[Continuation | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]), reverse=True)
    with evaluating(view), torch.no_grad():
        while order:
            longest = len(rows[order[0]][0]) + len(rows[order[0]][1])
            count = max(1, BATCH_TOKENS // longest)
            chunk, order = order[:count], order[count:]
            for i, score_of_row in zip(chunk, _score_batch(view, [rows[i] for i in chunk]), strict=True):
                scores[i] = score_of_row
    return [score for score in scores if score is not None]


def _rows(
    view: ModelView,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    prompt_format: PromptFormat | None,
    separators: Sequence[str],
) -> list[tuple[list[int], tuple[int, ...]]]:
    """Token ids of prompts and targets; raises RequestError for a pair that the model cannot take."""
    rows = []
    for (prompt, target), requested in zip(pairs, separators, strict=True):
        ids, targets = continuation(tokenizer, prompt, target, prompt_format, requested)
        if not ids:
            raise RequestError(f"the prompt {prompt!r} has no tokens")
        if problem := unknown_token(tokenizer, [*ids, *targets], view.vocabulary):
            raise RequestError(f"the prompt {prompt!r} with its target: {problem}")
        if len(ids) + len(targets) - 1 > view.max_length:
            raise RequestError(
                f"{len(ids) + len(targets) - 1} tokens with target in a prompt that begins {prompt[:40]!r}, "
                f"the model takes {view.max_length}"
            )
        rows.append((ids, targets))
    return rows


def _score_batch(view: ModelView, rows: Sequence[tuple[list[int], tuple[int, ...]]]) -> list[Continuation]:
    hidden = last_states(view, pad([(*ids, *target[:-1]) for ids, target in rows], view.device))
    where = [(r, len(ids) - 1 + t) for r, (ids, target) in enumerate(rows) for t in range(len(target))]
    index = torch.tensor(where, device=hidden.device)
    targets = torch.tensor([token for _, target in rows for token in target], device=view.head.device)
    states = hidden[index[:, 0], index[:, 1]].to(view.head.device)
    scored = view.head.target_log_probs(states, targets, return_top1=True)
    assert scored.top1 is not None
    lengths = [len(target) for _, target in rows]
    log_probs = scored.log_prob.cpu().split(lengths)
    hits = (scored.top1 == targets).cpu().split(lengths)
    return [Continuation(bool(h.all()), float(p.mean())) for h, p in zip(hits, log_probs, strict=True)]


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
