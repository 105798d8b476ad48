"""What a tokenizer's tokens are: special ones, chat markers, the unknown one."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from collections.abc import Set as AnySet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary


def added_tokens(tokenizer: Any) -> dict[int, Any]:
    """Tokens that were added to a vocabulary, by id; none of a tokenizer that does not tell (mistral-common's)."""
    try:
        added = tokenizer.added_tokens_decoder
    except (AttributeError, NotImplementedError):
        return {}
    return dict(added) if isinstance(added, Mapping) else {}


@dataclass(frozen=True)
class _Known:
    """What a vocabulary says of its tokens that are no words; without a reference to the tokenizer."""

    special: Mapping[int, str]
    markers: Mapping[int, str]
    closing: AnySet[int]  # the special tokens that may be put after a text
    special_ends: Mapping[str, tuple[str, ...]]  # texts of special tokens, by their last character
    marker_ends: Mapping[str, tuple[str, ...]]


# What was read of tokenizers, with the state it was read in; an entry goes with its tokenizer.
_READ: WeakKeyDictionary[Any, tuple[Any, _Known]] = WeakKeyDictionary()


def known_tokens(tokenizer: Any) -> _Known:
    """What a tokenizer says of its tokens, read again only after tokens were added or special tokens changed.

    Reading takes milliseconds where thousands of tokens are added. A token of the vocabulary itself that is declared
    an added one later, without being special, does not change what is looked at here: the vocabulary's size, the
    special tokens and the unknown one.
    """
    try:
        state = (len(tokenizer), tuple(tokenizer.all_special_tokens), unknown_id(tokenizer))
        read = _READ.get(tokenizer)
    except (TypeError, AttributeError, NotImplementedError):  # no length, no list, no hash or no weak references
        return _read_known(tokenizer)
    if read is None or read[0] != state:
        read = (state, _read_known(tokenizer))
        _READ[tokenizer] = read
    return read[1]


def _read_known(tokenizer: Any) -> _Known:
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
    return _Known(
        MappingProxyType(special), MappingProxyType(markers), frozenset(special) - {unknown_id(tokenizer)},
        _by_last_character(special.values()), _by_last_character(markers.values()),
    )  # fmt: skip


def _by_last_character(tokens: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for token in tokens:
        if token:
            found.setdefault(token[-1], []).append(token)
    return {character: tuple(ending) for character, ending in found.items()}


def ends_with(text: str, tokens: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a text ends with one of the tokens that are given by their last character."""
    return text.endswith(tokens.get(text[-1:], ()))


def special_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Every special token by id: the named ones and those added as special."""
    return known_tokens(tokenizer).special


def chat_markers(tokenizer: Any) -> Mapping[int, str]:
    """Special tokens and, flagged or not, added ones between brackets or signs, as `<|user|>`: no word of a text."""
    return known_tokens(tokenizer).markers


def _looks_like_marker(token: str) -> bool:
    token = token.strip(" ▁")
    ends = token[:1] + token[-1:]
    return any(c.isalnum() for c in token) and all(unicodedata.category(c)[0] in "PS" for c in ends)


def unknown_id(tokenizer: Any) -> int | None:
    """The token of what a vocabulary lacks, where it is not also one that a tokenizer puts around a text (GPT-2)."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    around = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")]
    return None if unknown in around else unknown
