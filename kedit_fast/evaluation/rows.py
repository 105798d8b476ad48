"""Asks as rows of token ids, and which of them a model cannot take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from kedit_fast.errors import EvaluationError, RequestError
from kedit_fast.evaluation.asks import Ask, Distributions, Forced, Generated, Likelihood, RouteOf
from kedit_fast.models.forward import unknown_token
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PromptFormat, continuation, separator_before
from kedit_fast.requests.spacing import AUTO
from kedit_fast.requests.tokens import non_words


@dataclass(frozen=True)
class Row:
    """An ask as token ids."""

    prompt: tuple[int, ...]
    """The tokens of a prompt, or of a text."""
    target: tuple[int, ...] = ()
    """The tokens that are scored: of a forced target."""
    read: tuple[int, ...] = ()
    """The tokens behind the prompt that the model reads, so that all of `target` can be scored."""
    new: int = 0
    """The largest number of tokens to generate."""

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.prompt) + len(self.read)


def rows_of(
    view: ModelView,
    tokenizer: Any,
    asks: Iterable[Ask],
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    least: int = 2,
) -> tuple[dict[Ask, Row], dict[Ask, str]]:
    """Rows of asks, each once, in order; and for each ask that cannot be measured why not, with its prompt.

    Args:
        view: the model that will run.
        tokenizer: its tokenizer.
        asks: any number of equal ones count as one.
        prompt_format: what makes prompts into the text that the model reads.
        target_separator: what stands between prompts and targets of asks that say "auto".
        least: number of tokens that a text must have for its likelihood; the first one is not scored.
    """
    rows: dict[Ask, Row] = {}
    problems: dict[Ask, str] = {}
    distinct = list(dict.fromkeys(asks))
    remembered = _Remembering(tokenizer)
    remembered.read_together(distinct, prompt_format, target_separator)
    for ask in distinct:
        try:
            rows[ask] = _row(view, remembered, ask, prompt_format, target_separator, least)
        except RequestError as error:
            problems[ask] = str(error)
    return rows, problems


class _Remembering:
    """A tokenizer that reads each text once, and many texts together, which is faster; and says everything else once.

    Made for one plan: what it remembers is right as long as nobody changes the tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self._texts: dict[tuple[int, ...], str] = {}

    def read_together(self, asks: Sequence[Ask], prompt_format: PromptFormat | None, target_separator: str) -> None:
        """Read the prompts, and prompts with targets, of asks as they stand; what is read otherwise is read later."""
        if not getattr(self._tokenizer, "is_fast", False):
            return
        plain = [a for a in asks if isinstance(a, Forced | Generated) and (prompt_format is None or a.plain)]
        texts = dict.fromkeys(ask.prompt for ask in plain)
        for ask in plain:
            if isinstance(ask, Forced):
                separator = target_separator if ask.separator == AUTO else ask.separator
                between = separator_before(self, ask.prompt, ask.target, separator)
                texts[ask.prompt + between + ask.target] = None
        if texts:
            together = self._tokenizer(list(texts), add_special_tokens=True)["input_ids"]
            self._ids.update({(text, True): list(ids) for text, ids in zip(texts, together, strict=True)})

    def __call__(self, text: str, add_special_tokens: bool = True, **more: Any) -> dict[str, list[int]]:
        """The tokens of one text."""
        if more:
            return self._tokenizer(text, add_special_tokens=add_special_tokens, **more)
        key = text, add_special_tokens
        if key not in self._ids:
            self._ids[key] = list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        return {"input_ids": self._ids[key]}

    def decode(self, ids: Sequence[int], **more: Any) -> str:
        """The text of tokens."""
        if more:
            return self._tokenizer.decode(ids, **more)
        key = tuple(ids)
        if key not in self._texts:
            self._texts[key] = self._tokenizer.decode(list(ids))
        return self._texts[key]

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tokenizer, name)
        setattr(self, name, value)
        return value


def _row(
    view: ModelView, tokenizer: Any, ask: Ask, prompt_format: PromptFormat | None, target_separator: str, least: int
) -> Row:
    if _is_text(ask):
        length = min(ask.max_tokens, view.max_length)
        ids = tuple(tokenizer(ask.text, truncation=True, max_length=length)["input_ids"])
        least = least if isinstance(ask, Likelihood) else 1
        if len(ids) < least:
            raise RequestError(f"the text {ask.text[:40]!r} has {len(ids)} tokens, and {least} are needed")
        if problem := unknown_token(tokenizer, ids, view.vocabulary):
            raise RequestError(f"the text that begins {ask.text[:40]!r}: {problem}")
        return Row(ids)
    written = None if getattr(ask, "plain", False) else prompt_format
    text = prompt_of(ask)
    target, separator = (ask.target, ask.separator) if isinstance(ask, Forced) else ("", AUTO)
    target = ask.answer if isinstance(ask, Distributions) else target
    if isinstance(ask, Forced) and not target.strip():
        raise RequestError(f"the prompt {text!r} has an empty target")
    separator = target_separator if separator == AUTO else separator
    prompt, tokens = continuation(tokenizer, text, target, written, separator)
    if not prompt:
        raise RequestError(f"the prompt {text!r} has no tokens")
    if problem := unknown_token(tokenizer, [*prompt, *tokens], view.vocabulary):
        raise RequestError(f"the prompt {text!r} with its target: {problem}")
    read, new = tokens[:-1], 0
    if isinstance(ask, Generated):
        new = ask.tokens - len(prompt) if ask.total else ask.tokens
        new = max(0, min(new, view.max_length + 1 - len(prompt)))
    elif isinstance(ask, Forced) and ask.special and (before := _special_before(tokenizer, target)):
        if len(before) > 1:
            raise RequestError(f"the tokenizer puts {len(before)} special tokens before {target!r}; one can be scored")
        tokens, read = (*before, *tokens), tokens
    length = len(prompt) + max(len(read), new - 1)
    if length > view.max_length:
        beside = " with target" if tokens else ""
        raise RequestError(
            f"{length} tokens{beside} in a prompt that begins {text[:40]!r}, the model takes {view.max_length}"
        )
    return Row(tuple(prompt), tokens, read, new)


def _is_text(ask: Ask) -> TypeGuard[Likelihood | Distributions | RouteOf]:
    """Whether an ask is about a natural text, which is read as it stands and cut."""
    if isinstance(ask, RouteOf):
        return ask.max_tokens > 0
    return isinstance(ask, Likelihood) or (isinstance(ask, Distributions) and not ask.last and not ask.answer)


def _special_before(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before a text."""
    special = non_words(tokenizer).special
    return tuple(itertools.takewhile(lambda token: token in special, tokenizer(text)["input_ids"]))


def prompt_of(ask: Ask) -> str:
    """The text that an ask begins with."""
    return ask.text if isinstance(ask, Likelihood | Distributions | RouteOf) else ask.prompt


def batches(
    rows: Sequence[int], length: Callable[[int], int | tuple[int, ...]], tokens: int, most: int | None = None
) -> Iterable[list[int]]:
    """Row numbers in batches, the longest first, at least one row each.

    Args:
        rows: row numbers.
        length: of a row; of several numbers the first counts, the others order rows that are equal in it.
        tokens: the largest number of tokens of a batch, padding included.
        most: the largest number of rows; None for no limit.
    """
    lengths = {row: length(row) for row in rows}
    order = sorted(rows, key=lengths.__getitem__, reverse=True)
    begin = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        longest = longest if isinstance(longest, int) else longest[0]
        count = max(1, min(tokens // max(1, longest), len(order) if most is None else most))
        yield order[begin : begin + count]
        begin += count


def require_finite(values: torch.Tensor, asks: Sequence[Ask], lengths: Sequence[int]) -> None:
    """Raise EvaluationError unless all values are finite; `lengths` says how many belong to each ask."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    owners = [ask for ask, length in zip(asks, lengths, strict=True) for _ in range(length)]
    first = owners[int((~finite).int().argmax())]
    raise EvaluationError(
        f"the model gives no finite probabilities (NaN or infinite) for the prompt {prompt_of(first)[:80]!r}: its "
        "weights hold such values, or its passes overflow in its dtype"
    )
