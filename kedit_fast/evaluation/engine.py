"""What a model answers to asks: one plan of rows for everything that all metrics of a run ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from kedit_fast.evaluation.asks import (
    Answer,
    Ask,
    Distributions,
    DistributionsAnswer,
    Forced,
    ForcedAnswer,
    Generated,
    Likelihood,
    LikelihoodAnswer,
    RouteAnswer,
    RouteOf,
)
from kedit_fast.evaluation.generation import Put, generate
from kedit_fast.evaluation.rows import Row, batches, require_finite, rows_of
from kedit_fast.models.cached import cache_limit, run_beginnings
from kedit_fast.models.forward import evaluating, last_states, pad
from kedit_fast.models.routes import attached_routes, prompt_tokens, recorded_routes
from kedit_fast.models.view import ModelView
from kedit_fast.requests.problems import require_no_problems
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.spacing import AUTO, check_separator
from kedit_fast.support.torch_state import plain_torch

BATCH_TOKENS = 4096


class Store(Protocol):
    """Where answers are written as they come, so that a run that was killed goes on where it was."""

    def get(self, ask: Ask, row: Row) -> Answer | None:
        """An answer of an earlier run; None if there is none."""
        ...

    def add(self, answers: Mapping[Ask, Answer], rows: Mapping[Ask, Row]) -> None:
        """Write the answers of one batch."""
        ...


@plain_torch()
def answer(
    view: ModelView,
    tokenizer: Any,
    asks: Iterable[Ask],
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    progress: Callable[[int], Any] | None = None,
    store: Store | None = None,
) -> dict[Ask, Answer]:
    """Answers of a model, as it is now, to asks; equal asks are answered once.

    Args:
        view: the model; nothing in it changes.
        tokenizer: its tokenizer.
        asks: in any order.
        prompt_format: what makes prompts into the text that the model reads, but for asks that are `plain`.
        target_separator: what stands between prompts and targets of asks that say "auto".
        progress: called with the number of asks that were answered since the last call.
        store: where answers are read and written.

    Raises:
        RequestError: asks that cannot be measured, all of them, by prompt; nothing has run.
        EvaluationError: the model gives no finite probabilities for a prompt, which is named.
    """
    check_separator(target_separator)
    rows, problems = rows_of(view, tokenizer, asks, prompt_format, target_separator)
    require_no_problems(dict(enumerate(problems.values())))
    return answer_rows(view, tokenizer, rows, progress, store)


@plain_torch()
def answer_rows(
    view: ModelView,
    tokenizer: Any,
    rows: Mapping[Ask, Row],
    progress: Callable[[int], Any] | None = None,
    store: Store | None = None,
    finite: bool = True,
) -> dict[Ask, Answer]:
    """`answer` for asks whose rows were made and checked before.

    Args:
        finite: raise at probabilities that are not finite; else they are answers of forced targets and likelihoods.
    """
    answers: dict[Ask, Answer] = {}
    if store is not None:
        answers = {ask: known for ask, row in rows.items() if (known := store.get(ask, row)) is not None}
        if progress is not None and answers:
            progress(len(answers))

    def put(new: Mapping[Ask, Answer]) -> None:
        answers.update(new)
        if store is not None:
            store.add(new, rows)
        if progress is not None:
            progress(len(new))

    open_rows = {ask: row for ask, row in rows.items() if ask not in answers}
    with evaluating(view), torch.no_grad():
        _force(view, {ask: row for ask, row in open_rows.items() if isinstance(ask, Forced)}, put, finite)
        read = {ask: row for ask, row in open_rows.items() if isinstance(ask, Likelihood | Distributions)}
        _read(view, read, put, finite)
        _route(view, {ask: row for ask, row in open_rows.items() if isinstance(ask, RouteOf)}, put)
        said = {ask: row for ask, row in open_rows.items() if isinstance(ask, Generated)}
        generate(view, tokenizer, said, put)
    return answers


def _force(view: ModelView, rows: Mapping[Forced, Row], put: Put, finite: bool) -> None:
    prompts: dict[tuple[int, ...], _Branches] = {}
    for ask, row in sorted(rows.items(), key=lambda pair: len(pair[1].read), reverse=True):
        prompts.setdefault(row.prompt, _Branches(row.prompt)).add(ask, row)
    single = [branches for branches in prompts.values() if len(branches.reads) == 1]
    several = [branches for branches in prompts.values() if len(branches.reads) > 1]
    limit = cache_limit(view) if several else 0
    longest = max((len(read) for branches in several for read in branches.reads), default=0)
    parted = [branches for branches in several if len(branches.prompt) + longest <= limit]
    single += [part for branches in several if len(branches.prompt) + longest > limit for part in branches.apart()]
    for group in (parted, single):
        for chunk in batches(range(len(group)), lambda i: group[i].length, BATCH_TOKENS):  # noqa: B023
            _force_batch(view, [group[i] for i in chunk], rows, put, finite)


class _Branches:
    """What is forced after one prompt: the token lists to read, none the beginning of another, and whose they are."""

    def __init__(self, prompt: tuple[int, ...]):
        self.prompt = prompt
        self.reads: list[tuple[int, ...]] = []
        self.asks: list[list[Forced]] = []

    def add(self, ask: Forced, row: Row) -> None:
        """Add an ask of the prompt, the longest reads first."""
        for read, asks in zip(self.reads, self.asks, strict=True):
            if read[: len(row.read)] == row.read:
                asks.append(ask)
                return
        self.reads.append(row.read)
        self.asks.append([ask])

    def apart(self) -> list[_Branches]:
        """The same as rows that run by themselves."""
        result = []
        for read, asks in zip(self.reads, self.asks, strict=True):
            part = _Branches(self.prompt)
            part.reads, part.asks = [read], [asks]
            result.append(part)
        return result

    @property
    def length(self) -> int:
        """Number of tokens of the prompt with the first read."""
        return len(self.prompt) + len(self.reads[0])


def _force_batch(
    view: ModelView, group: Sequence[_Branches], rows: Mapping[Forced, Row], put: Put, finite: bool
) -> None:
    """Run prompts with their first reads, then the other reads from the prompts' keys and values; score all."""
    first = [(*branches.prompt, *branches.reads[0]) for branches in group]
    others = [(r, read) for r, branches in enumerate(group) for read in branches.reads[1:]]
    prompts = [len(branches.prompt) for branches in group]
    if others:
        with prompt_tokens(view.model, prompts):
            hidden, beginnings = run_beginnings(view, first)
        which = [r for r, _ in others]
        part = beginnings.select(which, [prompts[r] for r in which])
        following = part.follow([read for _, read in others]).flatten(0, 1)
    else:
        with prompt_tokens(view.model, prompts):
            hidden, following = last_states(view, pad(first, view.device)), None
    width, behind = hidden.shape[1], len(first) * hidden.shape[1]
    each = 0 if following is None else len(following) // len(others)
    asks: list[Forced] = []
    places: list[int] = []
    begin = behind
    for r, branches in enumerate(group):
        end = r * width + len(branches.prompt) - 1
        for number, branch in enumerate(branches.asks):
            for ask in branch:
                count = len(rows[ask].target)
                asks.append(ask)
                places += [end, *(range(end + 1, end + count) if not number else range(begin, begin + count - 1))]
            begin += each if number else 0
    index = torch.tensor(places, device=hidden.device)
    if following is None:
        states = hidden.flatten(0, 1)[index]
    else:
        states = hidden.new_empty(len(index), hidden.shape[-1])
        states[index < behind] = hidden.flatten(0, 1)[index[index < behind]]
        states[index >= behind] = following[index[index >= behind] - behind]
    targets = torch.tensor([token for ask in asks for token in rows[ask].target], device=view.head.device)
    lengths = [len(rows[ask].target) for ask in asks]
    log_probs, top = scored(view, states.to(view.head.device), targets, asks, lengths, finite)
    put({ask: ForcedAnswer(rows[ask].target, log_probs[i], top[i]) for i, ask in enumerate(asks)})


def scored(
    view: ModelView,
    states: torch.Tensor,
    targets: torch.Tensor,
    asks: Sequence[Ask],
    lengths: Sequence[int],
    finite: bool,
) -> tuple[list[tuple[float, ...]], list[tuple[int, ...]]]:
    """Of asks with so many states each: the log probabilities of their targets, and the most probable tokens.

    Raises:
        EvaluationError: where they must be finite, a log probability that is not, by the prompt.
    """
    result = view.head.target_log_probs(states, targets, return_top1=True)
    assert result.top1 is not None
    if finite:
        require_finite(result.log_prob, asks, lengths)
    log_probs = result.log_prob.cpu().split(list(lengths))
    top = result.top1.cpu().split(list(lengths))
    return [tuple(part.tolist()) for part in log_probs], [tuple(part.tolist()) for part in top]


def _read(view: ModelView, rows: Mapping[Likelihood | Distributions, Row], put: Put, finite: bool) -> None:
    asks = list(rows)
    for chunk in batches(range(len(asks)), lambda i: rows[asks[i]].length, BATCH_TOKENS):
        part = [(*rows[asks[i]].prompt, *rows[asks[i]].read) for i in chunk]
        with prompt_tokens(view.model, [len(rows[asks[i]].prompt) for i in chunk]):
            hidden = last_states(view, pad(part, view.device))
        texts = [j for j, i in enumerate(chunk) if isinstance(asks[i], Likelihood)]
        answers: dict[Ask, Answer] = {}
        if texts:
            index = torch.tensor([(j, t) for j in texts for t in range(len(part[j]) - 1)], device=hidden.device)
            targets = torch.tensor([token for j in texts for token in part[j][1:]], device=view.head.device)
            states = hidden[index[:, 0], index[:, 1]].to(view.head.device)
            asked = [asks[chunk[j]] for j in texts]
            log_probs, _ = scored(view, states, targets, asked, [len(part[j]) - 1 for j in texts], finite)
            for j, log_prob in zip(texts, log_probs, strict=True):
                answers[asks[chunk[j]]] = LikelihoodAnswer(part[j][1:], log_prob)
        for j, i in enumerate(chunk):
            ask = asks[i]
            if isinstance(ask, Distributions):
                begin = len(rows[ask].prompt) - 1 if ask.last or ask.answer else 0
                states = hidden[j, begin : len(part[j])].cpu().clone()
                require_finite(states.sum(1), [ask], [len(states)])
                answers[ask] = DistributionsAnswer(states, view.head)
        put(answers)


def _route(view: ModelView, rows: Mapping[RouteOf, Row], put: Put) -> None:
    asks = list(rows)
    if attached_routes(view.model) is None:
        put(dict.fromkeys(asks, RouteAnswer(None)))
        return
    for chunk in batches(range(len(asks)), lambda i: rows[asks[i]].length, BATCH_TOKENS):
        with recorded_routes(view.model) as routes:
            last_states(view, pad([rows[asks[i]].prompt for i in chunk], view.device))
        (route,) = routes
        put({asks[i]: RouteAnswer(entry) for i, entry in zip(chunk, route.tolist(), strict=True)})
