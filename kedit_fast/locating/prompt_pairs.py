"""Pairs of prompts that differ in the subject alone: a clean one, and a corrupted one with as many tokens.

Edge scores and circuits compare what a model computes on the two, token by token. So both must have the same length,
and what stands around the subject must be the same tokens at the same places.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from kedit_fast.errors import InvalidArgumentError, RequestError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import evaluating, last_states, pad, unknown_token
from kedit_fast.models.view import ModelView, view_without_memory
from kedit_fast.requests.chat import is_plain
from kedit_fast.requests.problems import OnError, check_on_error, numbered, require_no_problems
from kedit_fast.requests.prompts import (
    Prompt,
    PromptFormat,
    adds_special,
    continuation,
    fill,
    in_format,
    requested_separator,
    separator_before,
    target_tokens,
    without_closing,
)
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.requests.tokens import non_words
from kedit_fast.support.torch_state import plain_torch

Answers = Literal["model", "true", "new"]
"""Which answer a pair stands for: what the model says on the clean prompt, or a request's `target_true` or
`target_new`, which the model must say."""
MOST_TRIED = 16
"""Other subjects of a request that the model is asked about, at most."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt with as many tokens, and the two answers that are compared at their end.

    Raises:
        RequestError: prompts of unequal length, without tokens, or the same; answers that are the same token; a
            `subject` outside of the prompt.

    Example:
        >>> pair = PromptPair((5, 6, 7), (5, 8, 7), answer=3, wrong=4, label="Ada")
        >>> pair.subject_end
        1
    """

    clean: tuple[int, ...]
    """Token ids of the prompt whose answer is explained."""
    corrupted: tuple[int, ...]
    """Token ids of the same prompt with another subject."""
    answer: int
    """The token that is the answer to the clean prompt."""
    wrong: int
    """The token that it is compared with: the answer to the corrupted prompt, or a request's other target."""
    label: str
    """How messages and pictures call the pair."""
    subject: int | None = None
    """Index of the subject's last token in both prompts; None where it is not known."""

    def __post_init__(self):
        for name in ("clean", "corrupted"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        if len(self.clean) != len(self.corrupted):
            raise RequestError(
                f"{self.label}: the clean prompt has {len(self.clean)} tokens and the corrupted one "
                f"{len(self.corrupted)}: choose a subject with as many tokens"
            )
        if not self.clean:
            raise RequestError(f"{self.label}: its prompts have no tokens")
        if self.clean == self.corrupted:
            raise RequestError(f"{self.label}: the clean and the corrupted prompt are the same")
        if self.answer == self.wrong:
            raise RequestError(f"{self.label}: both answers are token {self.answer}: nothing sets the prompts apart")
        if min(*self.clean, *self.corrupted, self.answer, self.wrong) < 0:
            raise RequestError(f"{self.label}: a token id is negative")
        if self.subject is not None and not 0 <= self.subject < len(self.clean):
            raise RequestError(f"{self.label}: the subject's last token is {self.subject} of {len(self.clean)}")

    @property
    def subject_end(self) -> int:
        """Index of the subject's last token; where that is not known, of the last token that differs."""
        if self.subject is not None:
            return self.subject
        return max(i for i, (one, other) in enumerate(zip(self.clean, self.corrupted, strict=True)) if one != other)


class PromptPairList(list[PromptPair]):
    """The pairs that could be made, in the order of their requests, and what was left out."""

    places: tuple[int, ...]
    """The index of each pair's request."""
    skipped: dict[int, str]
    """Index of a request -> why there is no pair of it."""

    def __init__(self, pairs: Iterable[PromptPair], places: Iterable[int], skipped: Mapping[int, str]):
        super().__init__(pairs)
        self.places, self.skipped = tuple(places), dict(skipped)


def prompt_pairs(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    answers: Answers = "model",
    others: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    on_error: OnError = "raise",
    spec: ArchSpec | None = None,
) -> PromptPairList:
    """A pair for each request: its prompt, and the same prompt with another subject of the same relation.

    The other subject has as many tokens and another answer: of those that fit, the first in an order that `seed`
    draws for each request. It is another request's of the same relation (of the same prompt, where a request has no
    relation), or one of `others`.

    Args:
        model: a causal language model of transformers, or a ModelView of it; nothing in it changes.
        tokenizer: its tokenizer.
        requests: what to make pairs of.
        answers: "model": the answer is what the model says on the clean prompt, and the wrong one what it says on the
            corrupted prompt. "true": the first token of `target_true`, compared with that of `target_new`; the model
            must say it. "new": the other way round, for edited models.
        others: more subjects, by relation (or by prompt, where requests have none).
        seed: of the order in which other subjects are tried.
        prompt_format: from a prompt to the text that the model reads; None for the prompt itself.
        on_error: "raise" names all requests that have no pair; "skip" leaves them out, with reasons in `skipped`.
        spec: the model's module names; None to find them.

    Returns:
        pairs, with `places` and `skipped`.

    Raises:
        RequestError: a request without a subject, or whose subject has no tokens in its prompt; no other subject with
            as many tokens, or none with another answer; a target that is missing, or that the model does not say; two
            targets with the same first token; prompts that the model does not take, or on which its output is not
            finite. The message names every request. Also: no pair is left.
        UnsupportedModelError: a memory is attached to the model.

    Cost: one pass over the prompts and over at most 16 corrupted ones of each.

    Example:
        >>> pairs = prompt_pairs(model, tokenizer, requests, on_error="skip")
        >>> len(pairs) + len(pairs.skipped) == len(requests)
        True
    """
    check_on_error(on_error)
    if answers not in get_args(Answers):
        raise InvalidArgumentError(f"answers = {answers!r}: choose {', '.join(get_args(Answers))}")
    requests = list(requests)
    if not requests:
        raise RequestError("no requests given: there are no prompts to pair")
    view = view_without_memory(model, spec)
    subjects = _subjects(requests, others or {})
    problems: dict[int, str] = {}
    drafts: dict[int, _Draft] = {}
    for index, request in enumerate(requests):
        try:
            pool = subjects[relation_of(request)]
            drafts[index] = _draft(view, tokenizer, request, answers, pool, f"{seed} {index}", prompt_format)
        except RequestError as error:
            problems[index] = f"{numbered(request.id, index)}: {error}"
    rows = dict.fromkeys(row for draft in drafts.values() for row in (draft.clean.ids, *draft.corrupted))
    said = _said(view, list(rows))
    pairs: dict[int, PromptPair] = {}
    for index, draft in drafts.items():
        try:
            pairs[index] = _pair(tokenizer, draft, said, numbered(requests[index].id, index))
        except RequestError as error:
            problems[index] = f"{numbered(requests[index].id, index)}: {error}"
    if on_error == "raise" or not pairs:
        require_no_problems(problems, "no prompts to compare:")
    places = sorted(pairs)
    return PromptPairList((pairs[place] for place in places), places, problems)


def pairs_from_texts(
    tokenizer: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[str | int],
    wrongs: Sequence[str | int],
    prompt_format: PromptFormat | None = None,
) -> list[PromptPair]:
    """Pairs from texts: clean prompts, corrupted prompts with as many tokens, and the two answers of each.

    Args:
        tokenizer: of the model.
        clean: prompts.
        corrupted: as many.
        answers: the answer to each clean prompt: a text, of which the first token counts, or a token id.
        wrongs: what it is compared with.
        prompt_format: from a prompt to the text that the model reads.

    Raises:
        RequestError: lists of unequal length, or a pair that is none (see `PromptPair`), with its number.

    Example:
        >>> [pair] = pairs_from_texts(tokenizer, ["The sun is"], ["The car is"], [" hot"], [" fast"])
        >>> len(pair.clean) == len(pair.corrupted)
        True
    """
    given = {"clean": clean, "corrupted": corrupted, "answers": answers, "wrongs": wrongs}
    if texts := [name for name, values in given.items() if isinstance(values, str)]:
        raise RequestError(f"{texts[0]} must be a list of texts; got one text")
    lengths = {name: len(values) for name, values in given.items()}
    if len(set(lengths.values())) > 1:
        raise RequestError(f"as many of each are needed; got {', '.join(f'{n} {name}' for name, n in lengths.items())}")
    pairs = []
    for number, (text, other, answer, wrong) in enumerate(zip(clean, corrupted, answers, wrongs, strict=True), 1):
        try:
            ids, _ = continuation(tokenizer, text, "", prompt_format)
            others, _ = continuation(tokenizer, other, "", prompt_format)
            tokens = [
                part if isinstance(part, int) else _first_token(tokenizer, text, part, prompt_format)
                for part in (answer, wrong)
            ]
            if len(ids) != len(others):
                raise RequestError(
                    f"{text!r} has {len(ids)} tokens and {other!r} {len(others)}: prompts must have as many tokens"
                )
            pairs.append(PromptPair(tuple(ids), tuple(others), tokens[0], tokens[1], text))
        except RequestError as error:
            raise RequestError(f"pair {number}: {error}") from None
    return pairs


@dataclass(frozen=True)
class _Draft:
    """What a request's pair is made of, before the model is asked."""

    request: EditRequest
    clean: Prompt
    """The prompt with its subject."""
    corrupted: dict[tuple[int, ...], str]
    """Token ids with other subjects -> the subject, in the order in which they are tried."""
    answers: tuple[int, int] | None
    """The answer and the wrong one; None for what the model says."""


def relation_of(request: EditRequest) -> str:
    """What requests have in common whose subjects can stand for each other: the relation, or else the prompt."""
    return request.prompt if request.relation is None else request.relation


def _subjects(requests: Sequence[EditRequest], others: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """All subjects of each relation, each once, in order."""
    pools: dict[str, dict[str, None]] = {}
    for request in requests:
        pool = pools.setdefault(relation_of(request), {})
        if request.subject is not None:
            pool[request.subject] = None
    for relation, subjects in others.items():
        if isinstance(subjects, str):
            raise RequestError(f"others[{relation!r}] must be a list of subjects; got the text {subjects!r}")
        pools.setdefault(relation, {}).update(dict.fromkeys(subjects))
    return {relation: list(pool) for relation, pool in pools.items()}


def _draft(
    view: ModelView,
    tokenizer: Any,
    request: EditRequest,
    answers: Answers,
    pool: Sequence[str],
    seed: str,
    prompt_format: PromptFormat | None,
) -> _Draft:
    if request.subject is None:
        raise RequestError("it has no subject that another could stand for")
    clean, before = _filled(tokenizer, request.prompt, request.subject, prompt_format)
    if len(clean.ids) > view.max_length:
        raise RequestError(f"its prompt has {len(clean.ids)} tokens, the model takes {view.max_length}")
    if problem := unknown_token(tokenizer, clean.ids, view.vocabulary):
        raise RequestError(problem)
    chosen = None if answers == "model" else _targets(view, tokenizer, request, answers, prompt_format)
    candidates = [subject for subject in pool if subject.strip() and subject.strip() != request.subject.strip()]
    random.Random(seed).shuffle(candidates)
    corrupted: dict[tuple[int, ...], str] = {}
    for subject in candidates:
        with_other, _ = _filled(tokenizer, request.prompt, subject, prompt_format)
        if _fits(clean, with_other, before) and not unknown_token(tokenizer, with_other.ids, view.vocabulary):
            corrupted.setdefault(with_other.ids, subject)
        if len(corrupted) == MOST_TRIED:
            break
    corrupted.pop(clean.ids, None)
    if not corrupted:
        relation = f"relation {request.relation!r}" if request.relation is not None else f"prompt {request.prompt!r}"
        raise RequestError(
            f"the {relation} has no other subject with as many tokens as {request.subject!r} at the same places "
            f"({len(candidates)} others): give more subjects in `others`"
        )
    return _Draft(request, clean, corrupted, chosen)


def _filled(
    tokenizer: Any, template: str, subject: str, prompt_format: PromptFormat | None
) -> tuple[Prompt, tuple[int, ...]]:
    """A prompt with a subject, without closing tokens; and the tokens of what stands before the subject by itself."""
    prompt = fill(tokenizer, template, subject, "", prompt_format)
    text, begin, _ = in_format(template, subject, prompt_format)
    before = tokenizer(text[:begin], add_special_tokens=adds_special(tokenizer, text, prompt_format))["input_ids"]
    closing = non_words(tokenizer).closing
    if is_plain(prompt_format):
        prompt = prompt.open_ended(tokenizer, closing)
    return prompt, tuple(without_closing(tokenizer, before, 0, closing))


def _fits(clean: Prompt, other: Prompt, before: Sequence[int]) -> bool:
    """Whether two prompts differ at most in the subject's tokens, and have as many."""
    if len(clean.ids) != len(other.ids) or clean.lookup != other.lookup:
        return False
    both = zip(clean.ids, before, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))  # tokens before the subject
    return clean.ids[:same] == other.ids[:same] and clean.ids[clean.lookup + 1 :] == other.ids[clean.lookup + 1 :]


def _targets(
    view: ModelView, tokenizer: Any, request: EditRequest, answers: Answers, prompt_format: PromptFormat | None
) -> tuple[int, int]:
    """The first tokens of the target that should be said and of the other one."""
    names = ("target_true", "target_new") if answers == "true" else ("target_new", "target_true")
    texts = [getattr(request, name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if text is None:
            raise RequestError(f"it has no {name}, which answers={answers!r} compares: use answers='model'")
    text, *_ = in_format(request.prompt, request.subject or "", prompt_format)
    tokens = [_first_token(tokenizer, text, target, prompt_format, request, is_framed=True) for target in texts]
    if problem := unknown_token(tokenizer, tokens, view.vocabulary):
        raise RequestError(problem)
    if tokens[0] == tokens[1]:
        raise RequestError(
            f"its targets {texts[0]!r} and {texts[1]!r} begin with the same token "
            f"{tokenizer.decode([tokens[0]])!r}, so the first token does not tell them apart"
        )
    return tokens[0], tokens[1]


def _first_token(
    tokenizer: Any,
    prompt: str,
    target: str,
    prompt_format: PromptFormat | None,
    request: EditRequest | None = None,
    is_framed: bool = False,
) -> int:
    """The first token of a target after a prompt, which is in the caller's format already where `is_framed`."""
    text = prompt if is_framed or prompt_format is None else prompt_format(prompt)
    requested = AUTO if request is None else requested_separator(request, AUTO)
    between = separator_before(tokenizer, text, target, requested, prompt_format)
    return target_tokens(tokenizer, text, target, adds_special(tokenizer, text, prompt_format), between)[0]


@plain_torch()
@torch.no_grad()
def _said(view: ModelView, rows: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int | None]:
    """The most probable next token of each row; None where the model's output is not finite."""
    result: dict[tuple[int, ...], int | None] = {}
    order = sorted(rows, key=len, reverse=True)
    with evaluating(view):
        while order:
            count = max(1, _BATCH_TOKENS // len(order[0]))
            chunk, order = order[:count], order[count:]
            hidden = last_states(view, pad(chunk, view.device))
            ends = torch.tensor([len(row) - 1 for row in chunk], device=hidden.device)
            states = hidden[torch.arange(len(chunk), device=hidden.device), ends].to(view.head.device)
            targets = torch.zeros(len(chunk), dtype=torch.int64, device=states.device)
            scored = view.head.target_log_probs(states, targets, return_top1=True)
            assert scored.top1 is not None and scored.top1_log_prob is not None
            finite = torch.isfinite(scored.top1_log_prob).tolist()
            tokens = zip(scored.top1.tolist(), finite, strict=True)
            result |= {row: token if good else None for row, (token, good) in zip(chunk, tokens, strict=True)}
    return result


def _pair(tokenizer: Any, draft: _Draft, said: Mapping[tuple[int, ...], int | None], label: str) -> PromptPair:
    request, answer = draft.request, said[draft.clean.ids]
    if answer is None:
        raise RequestError("the model's output on its prompt is not finite")
    if draft.answers is not None and answer != draft.answers[0]:
        raise RequestError(
            f"the model says {tokenizer.decode([answer])!r} to {request.text!r}, not "
            f"{tokenizer.decode([draft.answers[0]])!r}: there is nothing to explain"
        )
    for ids in draft.corrupted:
        other = said[ids]
        if other is not None and other != answer:
            wrong = other if draft.answers is None else draft.answers[1]
            named = request.label if request.id is None else f"{request.label} ({label})"
            return PromptPair(draft.clean.ids, ids, answer, wrong, named, draft.clean.lookup)
    tried = ", ".join(repr(subject) for subject in itertools.islice(draft.corrupted.values(), 5))
    raise RequestError(
        f"the model says {tokenizer.decode([answer])!r} with every other subject of as many tokens, too "
        f"({len(draft.corrupted)} tried: {tried}): give more subjects in `others`"
    )
