"""Requests as prompts whose subject is disturbed: token ids, the subject's tokens among them, the answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kedit_fast.errors import RequestError
from kedit_fast.models.forward import unknown_token
from kedit_fast.requests.chat import is_plain
from kedit_fast.requests.problems import OnError, check_on_error, numbered, require_no_problems
from kedit_fast.requests.prompts import PromptFormat, continuation, fill_span, without_closing
from kedit_fast.requests.request import EditRequest

_log = logging.getLogger("kedit_fast")
Expected = Literal["any", "true", "new"]
"""Which answer a request is traced for: the model's, whatever it is; or only if it is target_true, or target_new."""


@dataclass(frozen=True)
class TracedPrompt:
    """A prompt whose subject is disturbed."""

    ids: tuple[int, ...]
    """Token ids."""
    subject: tuple[int, int]
    """Index of the subject's first token, and of the one after its last."""
    answer: int | None
    """The token whose probability is read; None for the one that the model finds most probable."""
    label: str
    """How messages and pictures call it."""


def traced_prompts(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    prompt_format: PromptFormat | None = None,
    *,
    max_length: int | None = None,
    vocabulary: int | None = None,
    on_error: OnError = "raise",
) -> list[TracedPrompt]:
    """Requests as prompts to trace, for whatever answer the model gives.

    The subject's tokens are those that the tokenizer says cover its characters, at the request's {} and nowhere else.

    Args:
        tokenizer: of the model.
        requests: with a subject each.
        prompt_format: from a prompt to the text that the model reads.
        max_length: tokens that the model takes; None for any number.
        vocabulary: tokens that the model knows; None for any.
        on_error: "raise" for a prompt that cannot be traced, or "skip", which warns and leaves it out.

    Raises:
        RequestError: naming each request without a subject, or whose subject has no tokens in its prompt, whose prompt
            is too long, or that has tokens which the model does not know.

    Example:
        >>> import kedit_fast.demo as demo
        >>> tokenizer = demo.load()[1]
        >>> prompt, = traced_prompts(tokenizer, demo.requests(1))
        >>> [tokenizer.decode(prompt.ids[i]) for i in range(*prompt.subject)]
        ['F', 'og', 'odor']
    """
    check_on_error(on_error)
    prompts = prompts_of(tokenizer, requests, prompt_format, max_length, vocabulary)
    return [prompt for prompt in usable_prompts(prompts, on_error) if prompt is not None]


def _name(request: EditRequest | TracedPrompt, index: int) -> str:
    return numbered(getattr(request, "id", None), index)


def prompts_of(
    tokenizer: Any,
    requests: Sequence[EditRequest | TracedPrompt],
    prompt_format: PromptFormat | None,
    max_length: int | None,
    vocabulary: int | None,
) -> list[TracedPrompt | str]:
    """Each request as a prompt; of one that cannot be traced, why."""
    prompts: list[TracedPrompt | str] = []
    for i, request in enumerate(requests):
        try:
            if isinstance(request, TracedPrompt):
                prompt = request
            else:
                prompt = _prompt(tokenizer, request, prompt_format)
            _check_prompt(prompt, tokenizer, max_length, vocabulary)
            prompts.append(prompt)
        except RequestError as error:
            prompts.append(f"{_name(request, i)}: {error}")
    return prompts


def _prompt(tokenizer: Any, request: EditRequest, prompt_format: PromptFormat | None) -> TracedPrompt:
    if request.subject is None:
        raise RequestError(
            f"it has no subject, and tracing puts noise at one: write the prompt {request.prompt!r} with {{}} in place "
            "of its subject"
        )
    ids, first, last = fill_span(tokenizer, request.prompt, request.subject, "", prompt_format)
    if is_plain(prompt_format):
        ids = tuple(without_closing(tokenizer, ids, last + 1))
    return TracedPrompt(ids, (first, last + 1), None, request.label)


def _check_prompt(prompt: TracedPrompt, tokenizer: Any, max_length: int | None, vocabulary: int | None) -> None:
    begin, end = prompt.subject
    if not 0 <= begin < end <= len(prompt.ids):
        raise RequestError(
            f"the subject of {prompt.label!r} is tokens {begin} to {end} of {len(prompt.ids)}: it must be one token at "
            "least, inside of the prompt"
        )
    if max_length is not None and len(prompt.ids) > max_length:
        raise RequestError(f"its prompt has {len(prompt.ids)} tokens, and the model takes {max_length}: shorten it")
    answer = () if prompt.answer is None else (prompt.answer,)
    past = [token for token in (*prompt.ids, *answer) if token < 0 or (vocabulary is not None and token >= vocabulary)]
    if past:
        known = "" if tokenizer is None else unknown_token(tokenizer, past, vocabulary)
        raise RequestError(known or f"token {past[0]} is none of the model's {vocabulary} tokens")


def usable_prompts(prompts: Sequence[TracedPrompt | str], on_error: OnError) -> list[TracedPrompt | None]:
    """The prompts, with None for those that cannot be traced: these are named in an error, or in warnings."""
    problems = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
    if on_error == "raise":
        require_no_problems(problems)
    for problem in problems.values():
        _log.warning("not traced: %s", problem)
    return [None if isinstance(prompt, str) else prompt for prompt in prompts]


def as_expected(
    tokenizer: Any,
    request: EditRequest | TracedPrompt,
    index: int,
    prompt: TracedPrompt,
    answer: int,
    expect: Expected,
    prompt_format: PromptFormat | None,
) -> TracedPrompt | str:
    """The prompt with the answer that it is traced for; or why the model's answer is not that."""
    name = _name(request, index)
    field = f"target_{expect}"
    if isinstance(request, TracedPrompt):
        if request.answer in (None, answer):
            return replace(prompt, answer=answer)
        wanted, token = f"token {request.answer}", request.answer
    else:
        target = getattr(request, field)
        if not target:
            return f"{name}: it has no {field} to expect"
        try:
            token = continuation(tokenizer, request.text, target, prompt_format, request.target_separator)[1][0]
        except RequestError as error:
            return f"{name}: {error}"
        if token == answer:
            return replace(prompt, answer=answer)
        wanted = f"its {field} {target!r}"
    said = token_text(tokenizer, answer)
    return (
        f"{name}: the model answers {said!r} to {prompt.label!r}, not {token_text(tokenizer, token)!r}, as {wanted} "
        'begins: trace the answer that it gives with expect="any", or leave the request out'
    )


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text; its number where there is no tokenizer."""
    return str(token) if tokenizer is None else tokenizer.decode([token])
