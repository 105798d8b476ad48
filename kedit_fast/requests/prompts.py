"""Prompts as token ids: where the subject ends, what the target's tokens are."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.models.forward import unknown_token
from kedit_fast.requests.chat import ChatFormat
from kedit_fast.requests.request import EditRequest, require_none
from kedit_fast.requests.spacing import AUTO, check_separator, separator
from kedit_fast.requests.tokens import ends_with, known_tokens, unknown_id

_log = logging.getLogger("kedit_fast")
KL_PROMPT = "{} is a"
PromptFormat = Callable[[str], str]  # from a prompt, which may hold a place for its subject, to what the model reads
_ANCHORS = ("\n", ":", "。")  # texts that rarely join the tokens of what follows
_PLACE = "\ue000\ue001\ue000"  # private characters that stand for a prompt's {} in a format, which may hold {} itself


@dataclass(frozen=True)
class Prompt:
    """Token ids of a filled prompt, and the index of the subject's last token in them."""

    ids: tuple[int, ...]
    lookup: int

    def cut(self) -> Prompt:
        """The prompt up to and including the lookup token: nothing after it can matter to it."""
        return Prompt(self.ids[: self.lookup + 1], self.lookup)


@dataclass(frozen=True)
class PreparedRequest:
    """All token ids an edit needs. `rewriting[0]` is the bare prompt, the others have a context prefix."""

    request: EditRequest
    rewriting: tuple[Prompt, ...]
    kl: Prompt
    target: tuple[int, ...]
    separator: str  # what was put between the bare prompt and the target

    @property
    def name(self) -> str:
        """How messages call the request."""
        request = self.request
        return f"request {request.id!r}" if request.id is not None else f"the request on {request.about!r}"


def fill(
    tokenizer: Any, template: str, subject: str, prefix: str = "", prompt_format: PromptFormat | None = None
) -> Prompt:
    """Tokenise `prefix + template` with `subject` at the template's {}; raises RequestError when it has no tokens."""
    frame = prefix.replace("{}", "") + template
    text, begin = in_format(frame, subject, prompt_format)
    end = begin + len(subject.rstrip())
    special = _adds_special(tokenizer, text, prompt_format)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        ids = encoded["input_ids"]
        covering = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin and b > a]
    else:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        covering = _covering_without_offsets(tokenizer, text, begin, end, ids, special)
    if not covering:
        raise RequestError(f"the subject {subject!r} has no tokens in {text!r}")
    return Prompt(tuple(ids), covering[-1])


def in_format(template: str, subject: str, prompt_format: PromptFormat | None) -> tuple[str, int]:
    """A template in the caller's format with its subject, and where the subject begins."""
    if prompt_format is None:
        prompt_format, places = str, ("{}",)
    else:
        subject = subject.strip()  # as templates do with the whole message
        places = (_PLACE, "{}") if isinstance(prompt_format, ChatFormat) else ("{}", _PLACE)
    for place in places:
        framed = prompt_format(template.replace("{}", place))
        if framed.count(place) == 1:
            before, _, after = framed.partition(place)
            return before + subject + after, len(before)
    shown = prompt_format(template)
    raise RequestError(f"the prompt format must keep the {{}} of {template!r} once; it made {shown!r}")


def _adds_special(tokenizer: Any, text: str, prompt_format: PromptFormat | None) -> bool:
    """Whether the tokenizer should add its special tokens: not where the format has written the first already."""
    return prompt_format is None or not (tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token))


def _covering_without_offsets(
    tokenizer: Any, text: str, begin: int, end: int, ids: Sequence[int], special: bool
) -> list[int]:
    """The last token of text[begin:end], for tokenizers without offsets, whatever they normalise.

    The tokens of text[:end] begin those of the whole text, unless one of these goes on past `end`: then it is the last
    of the shortest run that decodes to all that those of text[:end] do, up to white space, case and composition.
    """

    def encoded(part: str) -> list[int]:
        return open_ended(tokenizer, tokenizer(part, add_special_tokens=special)["input_ids"])

    def decoded(tokens: Sequence[int]) -> str:
        shown = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return "".join(unicodedata.normalize("NFKD", shown).casefold().split())

    upto = encoded(text[:end])
    wanted = decoded(upto)
    if wanted == decoded(encoded(text[:begin])):
        return []
    if list(ids[: len(upto)]) == upto:
        return [len(upto) - 1]
    runs = (count for count in range(1, len(ids) + 1) if decoded(ids[:count]).startswith(wanted))
    return [count - 1 for count in (next(runs, 0),) if count]


def separator_before(
    tokenizer: Any, prompt: str, target: str, asked: str = AUTO, prompt_format: PromptFormat | None = None
) -> str:
    """What stands between a prompt as the model reads it and a target.

    "auto" is what a chat's template puts before an answer, where it tells; nothing after a chat's marker; else what
    kedit_fast.requests.spacing decides. White space that is there already is never added to.
    """
    if asked == AUTO and not prompt[-1:].isspace() and not target[:1].isspace():
        if isinstance(prompt_format, ChatFormat) and prompt_format.separator is not None:
            return prompt_format.separator
        if ends_with(prompt, known_tokens(tokenizer).marker_ends):
            return ""
    return separator(prompt, target, asked)


def target_tokens(
    tokenizer: Any, prompt: str, target: str, special: bool = True, between: str | None = None
) -> tuple[int, ...]:
    """The tokens of `target` as the continuation of `prompt`, with `between` them; None: see `separator_before`.

    They are what prompt and target together have beyond the prompt, so neither a special token nor a lone space that
    the tokenizer would put before a separate text can enter. With `special` the tokenizer adds its special tokens, as
    it does to the prompt.
    """
    tokens = known_tokens(tokenizer)
    known = tokens.special
    unknown = unknown_id(tokenizer)
    joined = prompt + (separator_before(tokenizer, prompt, target) if between is None else between) + target
    base = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    if not ends_with(prompt, tokens.special_ends):
        base = open_ended(tokenizer, base, special=tokens.closing)
    full = list(tokenizer(joined, add_special_tokens=special)["input_ids"])
    while full and full[-1] in known and not joined.rstrip().endswith(tokenizer.decode(full[-1:]).strip()):
        if full[-1] == unknown:
            break
        full.pop()
    if full[: len(base)] == base and len(full) > len(base):
        ids = full[len(base) :]
    else:
        ids = _tokens_apart(tokenizer, joined[len(prompt) :])
    if unknown is not None and unknown in ids:
        raise RequestError(f"the tokenizer has no tokens for a part of the target {target!r}")
    if any(token in known for token in ids):
        raise RequestError(f"the target {target!r} holds a special token")
    if not ids or not tokenizer.decode(ids).strip():
        raise RequestError(f"the target {target!r} has no tokens")
    return tuple(ids)


def _tokens_apart(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on from tokens it does not join, without what is put before a text's beginning."""
    for anchor in _ANCHORS:
        base, full = (
            open_ended(tokenizer, tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in (anchor, anchor + text)
        )
        if base and full[: len(base)] == base and len(full) > len(base):
            return full[len(base) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def continuation(
    tokenizer: Any, prompt: str, target: str, prompt_format: PromptFormat | None = None, asked: str = AUTO
) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a text prompt, open for what follows, and of a target that continues it.

    Raises:
        RequestError: the target has no tokens or holds a special one.
    """
    text = prompt if prompt_format is None else prompt_format(prompt)
    special = _adds_special(tokenizer, text, prompt_format)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if prompt_format is None:
        ids = open_ended(tokenizer, ids, 1)
    if not target:
        return list(ids), ()
    between = separator_before(tokenizer, text, target, asked, prompt_format)
    return list(ids), target_tokens(tokenizer, text, target, special, between)


def prepare(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None = None,
    *,
    vocabulary: int | None = None,
    target_separator: str = AUTO,
) -> list[PreparedRequest]:
    """Tokenise requests once, for keys and values alike.

    Raises:
        RequestError: naming every request that cannot be used, see `prepare_each`.
    """
    prepared, problems = prepare_each(
        tokenizer, dict(enumerate(requests)), prefixes, max_length, prompt_format, vocabulary=vocabulary,
        target_separator=target_separator,
    )  # fmt: skip
    require_none(problems)
    return prepared


def prepare_each(
    tokenizer: Any,
    requests: Mapping[int, EditRequest],
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None = None,
    *,
    vocabulary: int | None = None,
    target_separator: str = AUTO,
) -> tuple[list[PreparedRequest], dict[int, str]]:
    """Tokenise requests, by index, once; those that cannot be used come back as index -> what is wrong, with a name.

    What can be wrong: a subject or target without tokens, a special token in the target, more tokens than the model
    takes, a token past its `vocabulary`, a chat template that fails. `target_separator` is for requests that say
    "auto".
    """
    check_separator(target_separator)
    prepared, problems = [], {}
    for index, request in requests.items():
        name = f"request {request.id!r}" if request.id is not None else f"request {index + 1}"
        try:
            made = _prepared(tokenizer, request, prefixes, max_length, prompt_format, target_separator)
            ids = [i for prompt in (*made.rewriting, made.kl) for i in prompt.ids] + list(made.target)
            if why := unknown_token(tokenizer, ids, vocabulary):
                raise RequestError(why)
            prepared.append(made)
        except RequestError as error:
            problems[index] = f"{name}: {error}"
    return prepared, problems


def _prepared(
    tokenizer: Any,
    request: EditRequest,
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None,
    target_separator: str,
) -> PreparedRequest:
    if request.subject is None:
        return _without_subject(tokenizer, request, prefixes, max_length, prompt_format, target_separator)
    text, _ = in_format(request.prompt, request.subject, prompt_format)
    asked = asked_separator(request, target_separator)
    between = separator_before(tokenizer, text, request.target_new, asked, prompt_format)
    special = _adds_special(tokenizer, text, prompt_format)
    target = target_tokens(tokenizer, text, request.target_new, special, between)
    filled = [fill(tokenizer, request.prompt, request.subject, prefix, prompt_format) for prefix in ("", *prefixes)]
    kl = fill(tokenizer, KL_PROMPT, request.subject, "", prompt_format)
    if prompt_format is None:  # a format ends where the answer begins, its special tokens belong there
        ends = _closing(tokenizer)
        filled, kl = [_without_end(tokenizer, prompt, ends) for prompt in filled], _without_end(tokenizer, kl, ends)
    return _fitting(PreparedRequest(request, tuple(filled), kl, target, between), max_length)


def _without_subject(
    tokenizer: Any,
    request: EditRequest,
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None,
    target_separator: str,
) -> PreparedRequest:
    """A prompt as it stands, for methods that look at whole prompts: the lookup is its last token."""
    texts = [prefix.replace("{}", "") + request.prompt for prefix in ("", *prefixes)]
    asked = asked_separator(request, target_separator)
    rows = [continuation(tokenizer, text, request.target_new, prompt_format, asked) for text in texts]
    if not all(ids for ids, _ in rows):
        raise RequestError(f"the prompt {request.prompt!r} has no tokens")
    filled = tuple(Prompt(tuple(ids), len(ids) - 1) for ids, _ in rows)
    shown = request.prompt if prompt_format is None else prompt_format(request.prompt)
    between = separator_before(tokenizer, shown, request.target_new, asked, prompt_format)
    return _fitting(PreparedRequest(request, filled, filled[0], rows[0][1], between), max_length)


def _fitting(prepared: PreparedRequest, max_length: int) -> PreparedRequest:
    longest = max(len(prompt.ids) for prompt in prepared.rewriting) + len(prepared.target) - 1
    if longest > max_length:
        raise RequestError(f"{longest} tokens with context and target, the model takes {max_length}")
    return prepared


def asked_separator(request: EditRequest, default: str) -> str:
    """What a request asks for between prompt and target, or the run's default where it says nothing."""
    return default if request.target_separator == AUTO else request.target_separator


def open_ended(tokenizer: Any, ids: Sequence[int], keep: int = 0, special: AnySet[int] | None = None) -> list[int]:
    """Token ids without the special tokens a tokenizer adds after a text, where something is to follow.

    The first `keep` ids stay whatever they are. `special` is what `_closing` gives, where it is at hand.
    """
    special, end = _closing(tokenizer) if special is None else special, len(ids)
    while end > keep and ids[end - 1] in special:
        end -= 1
    return list(ids[:end])


def _closing(tokenizer: Any) -> AnySet[int]:
    """The special tokens that a tokenizer may put after a text; what it does not know is text."""
    return known_tokens(tokenizer).closing


def _without_end(tokenizer: Any, prompt: Prompt, special: AnySet[int]) -> Prompt:
    return Prompt(tuple(open_ended(tokenizer, prompt.ids, prompt.lookup + 1, special)), prompt.lookup)
