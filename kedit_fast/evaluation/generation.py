"""How a model continues prompts: in batches that finished texts leave, with draws that depend on the prompt alone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from kedit_fast.evaluation.asks import Answer, Ask, Generated, GeneratedAnswer
from kedit_fast.evaluation.rows import Row, batches, require_finite
from kedit_fast.models.cached import cache_bytes, cache_limit, run_beginnings
from kedit_fast.models.forward import last_states, pad
from kedit_fast.models.routes import prompt_tokens
from kedit_fast.models.view import ModelView
from kedit_fast.support.free_memory import free_bytes

BATCH_TOKENS = 4096
"""Tokens of the texts of a batch that run whole, when all are at their longest."""
LARGEST_ROWS = 512
"""Of a batch with keys and values, which also take at most an eighth of the free memory, and this much:"""
LARGEST_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
FULL = 0.875
"""Finished texts leave a batch when at most this share of its rows goes on: leaving copies the others' states."""
Put = Callable[[Mapping[Ask, Answer]], None]


def generate(
    view: ModelView,
    tokenizer: Any,
    rows: Mapping[Generated, Row],
    put: Put,
) -> None:
    """Continue prompts, and `put` the answers as they come.

    Greedy texts take the lowest of the most probable tokens. Drawn ones take the token in whose share of the `top_k`
    probabilities, the largest first, a uniform number falls; numbers are those of a generator for each prompt.

    Raises:
        EvaluationError: the model gives no finite probabilities for a prompt, which is named.
    """
    ends = end_tokens(view, tokenizer)
    texts = [Text(tokenizer, ask, row, ends) for ask, row in rows.items()]
    put({text.ask: text.answer() for text in texts if text.is_done})
    texts = [text for text in texts if not text.is_done]
    if not texts:
        return
    limit = cache_limit(view)
    tokens, most = (_batch_tokens(view), LARGEST_ROWS) if limit else (BATCH_TOKENS, None)
    # Prompts of one length leave no gaps; texts of one length end together.
    for chunk in batches(range(len(texts)), lambda i: (texts[i].longest, texts[i].length), tokens, most):
        whole, parts = _parts([texts[i] for i in chunk], limit)
        for part in parts:
            _continue(view, part, put)
        if whole:
            _continue_whole(view, whole, put)


def _parts(texts: Sequence[Text], limit: int) -> tuple[list[Text], list[list[Text]]]:
    """A batch as texts that need more than `limit` places and must run whole, and parts that need no more together.

    Gaps count, so that prompts of different lengths may need more together than each by itself; a text's last token is
    not read.
    """
    whole: list[Text] = []
    parts: list[list[Text]] = []
    width = left = 0  # of the last part: its longest prompt, and the most tokens to come
    for text in sorted(texts, key=lambda text: text.length, reverse=True):
        if text.length + text.left - 1 > limit:
            whole.append(text)
        elif parts and width + max(left, text.left) - 1 <= limit:
            parts[-1].append(text)
            left = max(left, text.left)
        else:
            parts.append([text])
            width, left = text.length, text.left
    return whole, parts


def _batch_tokens(view: ModelView) -> int:
    """How many tokens a batch may have whose keys and values stay in memory."""
    largest = LARGEST_BYTES.get(view.device.type, LARGEST_BYTES["cuda"])
    return min(largest, free_bytes(view.device) // 8) // max(1, cache_bytes(view))


def _continue(view: ModelView, texts: Sequence[Text], put: Put) -> None:
    """Continue texts token by token, from the keys and values of the tokens before; finished ones leave."""
    hidden, rows = run_beginnings(view, [text.ids for text in texts], max(text.left for text in texts))
    at = torch.tensor([text.length - 1 for text in texts], device=hidden.device)
    states = hidden[torch.arange(len(texts), device=hidden.device), at]
    in_rows: list[Text | None] = list(texts)  # the text of each row; None where it has left
    while True:
        places = [r for r, text in enumerate(in_rows) if text is not None]
        active = [text for text in in_rows if text is not None]
        tokens = next_tokens(view, states[places] if len(places) < len(in_rows) else states, active)
        for r, text, token in zip(places, active, tokens, strict=True):
            text.take(token)
            in_rows[r] = None if text.is_done else text
        put({text.ask: text.answer() for text in active if text.is_done})
        places = [r for r, text in enumerate(in_rows) if text is not None]
        if not places:
            return
        if len(places) <= FULL * len(in_rows):
            room = max(text.left for text in active)
            rows, in_rows = rows.select(places, room=room), [in_rows[r] for r in places]
        states = rows.follow([(text.last,) if text is not None else (0,) for text in in_rows])[:, 0]


def _continue_whole(view: ModelView, texts: Sequence[Text], put: Put) -> None:
    """Continue texts by whole passes over all that they have."""
    active = list(texts)
    while active:
        with prompt_tokens(view.model, [text.prompt_length for text in active]):
            hidden = last_states(view, pad([text.ids for text in active], view.device))
        at = torch.tensor([text.length - 1 for text in active], device=hidden.device)
        tokens = next_tokens(view, hidden[torch.arange(len(active), device=hidden.device), at], active)
        for text, token in zip(active, tokens, strict=True):
            text.take(token)
        put({text.ask: text.answer() for text in active if text.is_done})
        active = [text for text in active if not text.is_done]


class Text:
    """One text while it is generated."""

    def __init__(self, tokenizer: Any, ask: Generated, row: Row, ends: Collection[int]):
        self.ask = ask
        self._tokenizer = tokenizer
        self._prompt = row.prompt
        self._new: list[int] = []
        self._limit = row.new
        self._ends = ends
        self._ended = False
        draws = row.new if ask.top_k > 1 else 0
        generator = torch.Generator().manual_seed(_seed(ask.seed, row.prompt))
        self._draws = torch.rand(draws, generator=generator, dtype=torch.float64).tolist()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens so far."""
        return (*self._prompt, *self._new)

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self._prompt) + len(self._new)

    @property
    def prompt_length(self) -> int:
        """Number of tokens of the prompt."""
        return len(self._prompt)

    @property
    def longest(self) -> int:
        """The number of tokens that it may have in the end."""
        return len(self._prompt) + self._limit

    @property
    def last(self) -> int:
        """The last token so far."""
        return self._new[-1] if self._new else self._prompt[-1]

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be added."""
        return self._ended or len(self._new) >= self._limit

    @property
    def left(self) -> int:
        """How many tokens may still be added."""
        return self._limit - len(self._new)

    @property
    def draw(self) -> float:
        """The uniform number for the next token."""
        return self._draws[len(self._new)]

    def take(self, token: int) -> None:
        """Add a token, or end."""
        if token in self._ends:
            self._ended = True
            return
        self._new.append(token)
        if self.ask.stops and _stop(self._said(), self.ask.stops) is not None:
            self._ended = True

    def answer(self) -> GeneratedAnswer:
        """The text as it is."""
        said = self._said()
        return GeneratedAnswer(self._prompt, tuple(self._new), said[: _stop(said, self.ask.stops)], self._ended)

    def _said(self) -> str:
        before = self._tokenizer.decode(self._prompt[-1:], skip_special_tokens=True)
        text = self._tokenizer.decode([*self._prompt[-1:], *self._new], skip_special_tokens=True)
        if text.startswith(before):
            return text[len(before) :]
        return self._tokenizer.decode(self._new, skip_special_tokens=True)


def _seed(seed: int, prompt: Sequence[int]) -> int:
    digest = hashlib.sha256(repr((seed, tuple(prompt))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop begins; None if there is none."""
    return min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=None)


def end_tokens(view: ModelView, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: of the model's generation configuration, of its configuration, of the tokenizer."""
    named = [
        getattr(owner, "eos_token_id", None)
        for owner in (getattr(view.model, "generation_config", None), view.config, tokenizer)
    ]
    lists = (ids if isinstance(ids, list | tuple) else [ids] for ids in named)
    return frozenset(token for token in itertools.chain.from_iterable(lists) if isinstance(token, int))


def next_tokens(view: ModelView, states: torch.Tensor, texts: Sequence[Text]) -> list[int]:
    """The next token of each text from its last state [R, h]."""
    logits = view.head.logits(states)
    greedy = logits.argmax(1)
    require_finite(logits.gather(1, greedy[:, None])[:, 0], [text.ask for text in texts], [1] * len(texts))
    tokens = greedy.tolist()
    for top_k in sorted({text.ask.top_k for text in texts} - {1}):
        places = [r for r, text in enumerate(texts) if text.ask.top_k == top_k]
        best = (logits if len(places) == len(texts) else logits[places]).topk(min(top_k, logits.shape[1]), 1)
        shares = torch.softmax(best.values.double(), 1).cumsum(1).cpu()
        draws = torch.tensor([[texts[r].draw] for r in places], dtype=torch.float64) * shares[:, -1:]
        drawn = torch.searchsorted(shares, draws, right=True).clamp(max=shares.shape[1] - 1)
        for r, token in zip(places, best.indices.cpu().gather(1, drawn)[:, 0].tolist(), strict=True):
            tokens[r] = token
    return tokens
