"""Which of a tokenizer's tokens are no words: special ones, chat markers, the unknown one."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from collections.abc import Set as AnySet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary


def added_tokens(tokenizer: Any) -> dict[int, Any]:
    """Tokens that were added to a vocabulary, by id; none for a tokenizer that does not say (mistral-common's)."""
    try:
        added = tokenizer.added_tokens_decoder
    except (AttributeError, NotImplementedError):
        return {}
    return dict(added) if isinstance(added, Mapping) else {}


@dataclass(frozen=True)
class NonWords:
    """The tokens of a vocabulary that are no words; holds no reference to the tokenizer."""

    special: Mapping[int, str]
    """Special tokens: id -> text."""
    markers: Mapping[int, str]
    """Special tokens and others that look like chat markers: id -> text."""
    closing: AnySet[int]
    """Ids of the special tokens that a tokenizer may add after a text."""
    special_by_last: Mapping[str, tuple[str, ...]]
    """Last character -> texts of the special tokens that end with it; see `ends_with_one_of`."""
    markers_by_last: Mapping[str, tuple[str, ...]]
    """The same of markers."""


# Tokenizer -> (its state when it was read, the result); an entry goes with its tokenizer. No result depends on it.
_CACHE: WeakKeyDictionary[Any, tuple[Any, NonWords]] = WeakKeyDictionary()


def non_words(tokenizer: Any) -> NonWords:
    """A tokenizer's tokens that are no words, read again only after tokens were added or special tokens changed.

    Reading takes milliseconds where thousands of tokens were added. What counts as a change is the vocabulary's size,
    the special tokens and the unknown one. So a token that was in the vocabulary and is declared an added one later,
    without being special, is not noticed.
    """
    try:
        state = (len(tokenizer), tuple(tokenizer.all_special_tokens), unknown_id(tokenizer))
        cached = _CACHE.get(tokenizer)
    except (TypeError, AttributeError, NotImplementedError):  # no length, no list, no hash or no weak references
        return _read(tokenizer)
    if cached is None or cached[0] != state:
        cached = (state, _read(tokenizer))
        _CACHE[tokenizer] = cached
    return cached[1]


def _read(tokenizer: Any) -> NonWords:
    added = added_tokens(tokenizer)
    if hasattr(tokenizer, "all_special_ids"):
        special = {i: token.content for i, token in added.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    else:  # mistral-common's before transformers 5
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        named = {getattr(tokenizer, f"{name}_id", None): getattr(tokenizer, name, None) for name in names}
        special = {i: token for i, token in named.items() if i is not None and token is not None}
    marking = {i: token.content for i, token in added.items() if _looks_like_marker(token.content)}
    markers = {i: token for i, token in {**marking, **special}.items() if token}
    return NonWords(
        special=MappingProxyType(special),
        markers=MappingProxyType(markers),
        closing=frozenset(special) - {unknown_id(tokenizer)},
        special_by_last=_by_last_character(special.values()),
        markers_by_last=_by_last_character(markers.values()),
    )


def _by_last_character(tokens: Iterable[str]) -> dict[str, tuple[str, ...]]:
    grouped: dict[str, list[str]] = {}
    for token in tokens:
        if token:
            grouped.setdefault(token[-1], []).append(token)
    return {character: tuple(group) for character, group in grouped.items()}


def ends_with_one_of(text: str, tokens: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a text ends with one of the tokens, which are grouped by their last character."""
    return text.endswith(tokens.get(text[-1:], ()))


def special_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Every special token by id: the named ones and those added as special."""
    return non_words(tokenizer).special


def chat_markers(tokenizer: Any) -> Mapping[int, str]:
    """Special tokens and, flagged as special or not, added ones between brackets or signs (`<|user|>`), by id."""
    return non_words(tokenizer).markers


def _looks_like_marker(token: str) -> bool:
    token = token.strip(" ▁")
    ends = token[:1] + token[-1:]
    return any(c.isalnum() for c in token) and all(unicodedata.category(c)[0] in "PS" for c in ends)


def unknown_id(tokenizer: Any) -> int | None:
    """The token for what a vocabulary lacks; None if the tokenizer also puts that token around texts (GPT-2)."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    around = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")]
    return None if unknown in around else unknown
