"""Many requests as token ids at once: where prompt, subject and target meet, and whether a token spans two of them.

`prompts.py` prepares one request after another for editing. Here a tokenizer gets all texts in one call, which is many
times as fast, to look at their boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.requests.prompts import (
    PromptFormat,
    adds_special,
    covering,
    covering_without_offsets,
    decoded_plain,
    in_format,
    requested_separator,
    separator_before,
    without_closing,
)
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.requests.tokens import non_words

PREFIX = "The sun had set. "
"""A context prefix. They all end in ". ", so that what follows has the same tokens after each of them."""


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text without closing special tokens, and what each token covers."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] | None
    """Of each token the first character and the one after the last; None where the tokenizer does not say."""


@dataclass(frozen=True)
class Lookup:
    """The lookup token of a prompt."""

    token: int
    """Its id."""
    beyond: str
    """The text after the subject that it covers, too."""


@dataclass(frozen=True)
class EncodedRequest:
    """A request's texts as the model reads them, and their tokens."""

    request: EditRequest
    bare: EncodedText
    """The prompt with its subject."""
    full: EncodedText
    """Prompt and `target_new`."""
    full_true: EncodedText | None
    """Prompt and `target_true`."""
    stripped: EncodedText | None
    """Prompt and `target_new` without white space between them but the separator; None where that is the same text."""
    lookups: tuple[Lookup, ...]
    """In the bare prompt, and after a context prefix; empty where the subject has no tokens, or there is none."""

    @property
    def merges(self) -> bool:
        """Whether prompt and target have other tokens together than apart."""
        return not _begins(self.full, self.bare)

    def target_ids(self, full: EncodedText | None) -> tuple[int, ...]:
        """The tokens that a target adds to the prompt's; empty where there is none, or it merges with the prompt."""
        return full.ids[len(self.bare.ids) :] if full is not None and _begins(full, self.bare) else ()


def encode_requests(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
) -> list[EncodedRequest | str]:
    """The tokens of requests, in order; of one that cannot be written as a text, why.

    Args:
        tokenizer: of the model.
        requests: what to encode.
        prompt_format: from a prompt to the text that the model reads.
        target_separator: for requests that say "auto".

    Cost: four texts a request, in one call of a fast tokenizer.
    """
    framed: list[_Framed | str] = []
    for request in requests:
        try:
            framed.append(_frame(tokenizer, request, prompt_format, target_separator))
        except RequestError as error:
            framed.append(str(error))
    texts = [text for one in framed if not isinstance(one, str) for text in one.texts if text is not None]
    encoded = _encoded(tokenizer, texts, prompt_format)
    result: list[EncodedRequest | str] = []
    for request, one in zip(requests, framed, strict=True):
        if isinstance(one, str):
            result.append(one)
            continue
        bare, prefixed, full, true, stripped = (None if text is None else next(encoded) for text in one.texts)
        assert bare is not None and prefixed is not None and full is not None
        lookups = [
            lookup
            for text, ends in ((bare, one.ends), (prefixed, one.prefixed_ends))
            if ends is not None and (lookup := _lookup(tokenizer, text, *ends, prompt_format)) is not None
        ]
        result.append(EncodedRequest(request, bare, full, true, stripped, tuple(lookups) if len(lookups) == 2 else ()))
    return result


@dataclass(frozen=True)
class _Framed:
    """Texts of a request, and where its subject begins and ends in the first two."""

    texts: tuple[str | None, ...]
    ends: tuple[int, int] | None
    prefixed_ends: tuple[int, int] | None


def _frame(tokenizer: Any, request: EditRequest, prompt_format: PromptFormat | None, default: str) -> _Framed:
    text, ends = _in_frame(request, "", prompt_format)
    prefixed, prefixed_ends = _in_frame(request, PREFIX, prompt_format)
    requested = requested_separator(request, default)

    def joined(prompt: str, target: str) -> str:
        return prompt + separator_before(tokenizer, prompt, target, requested, prompt_format) + target

    new, true, trimmed = request.target_new, request.target_true, None
    if prompt_format is None and (text[-1:].isspace() or new[:1].isspace()):
        trimmed = joined(text.rstrip(), new.lstrip())
    return _Framed(
        (text, prefixed, joined(text, new), None if true is None else joined(text, true), trimmed), ends, prefixed_ends
    )


def _in_frame(
    request: EditRequest, prefix: str, prompt_format: PromptFormat | None
) -> tuple[str, tuple[int, int] | None]:
    """A request's prompt after a prefix as the model reads it, and where its subject begins and ends."""
    frame = prefix + request.prompt
    if request.subject is None:
        return frame if prompt_format is None else prompt_format(frame), None
    text, begin, end = in_format(frame, request.subject, prompt_format)
    return text, (begin, end)


def _encoded(tokenizer: Any, texts: Sequence[str], prompt_format: PromptFormat | None) -> Iterator[EncodedText]:
    """Texts as tokens; a format ends where the answer begins, and keeps its special tokens."""
    closing = non_words(tokenizer).closing
    special = [adds_special(tokenizer, text, prompt_format) for text in texts]
    rows: list[Sequence[int]] = [()] * len(texts)
    spans: list[Sequence[tuple[int, int]] | None] = [None] * len(texts)
    for adds in sorted(set(special)):
        places = [i for i, one in enumerate(special) if one == adds]
        chosen = [texts[i] for i in places]
        if getattr(tokenizer, "is_fast", False):
            batch = tokenizer(chosen, add_special_tokens=adds, return_offsets_mapping=True)
            for i, ids, covered in zip(places, batch["input_ids"], batch["offset_mapping"], strict=True):
                rows[i], spans[i] = ids, covered
        else:
            for i, text in zip(places, chosen, strict=True):
                rows[i] = tokenizer(text, add_special_tokens=adds)["input_ids"]
    for text, ids, covered in zip(texts, rows, spans, strict=True):
        open_ended = tuple(without_closing(tokenizer, ids, 1, closing) if prompt_format is None else ids)
        yield EncodedText(text, open_ended, None if covered is None else tuple(covered[: len(open_ended)]))


def _begins(longer: EncodedText, shorter: EncodedText) -> bool:
    return longer.ids[: len(shorter.ids)] == shorter.ids and len(longer.ids) > len(shorter.ids)


def _lookup(
    tokenizer: Any, encoded: EncodedText, begin: int, end: int, prompt_format: PromptFormat | None
) -> Lookup | None:
    """The last token of text[begin:end]; None where there is none. Without spans, `beyond` is without white space."""
    text, ids = encoded.text, encoded.ids
    if encoded.spans is not None:
        places = covering(encoded.spans, begin, end)
        if not places:
            return None
        return Lookup(ids[places[-1]], text[end : encoded.spans[places[-1]][1]].strip())
    special = adds_special(tokenizer, text, prompt_format)
    places = covering_without_offsets(tokenizer, text, begin, end, ids, special)
    if not places:
        return None
    up_to_end = without_closing(tokenizer, tokenizer(text[:end], add_special_tokens=special)["input_ids"])
    shown, wanted = decoded_plain(tokenizer, ids[: places[-1] + 1]), decoded_plain(tokenizer, up_to_end)
    return Lookup(ids[places[-1]], shown[len(wanted) :] if shown.startswith(wanted) else "")
