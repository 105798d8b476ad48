"""Prompts as token ids: where the subject ends, what the target's tokens are."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass, replace
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.models.forward import unknown_token
from kedit_fast.requests.chat import ChatFormat, is_plain
from kedit_fast.requests.general import general_prompts
from kedit_fast.requests.problems import numbered, require_no_problems
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO, check_separator, separator
from kedit_fast.requests.tokens import ends_with_one_of, non_words, unknown_id

KL_PROMPT = "{} is a"
PromptFormat = Callable[[str], str]
"""From a prompt, which may still have {} in place of its subject, to the text that the model reads."""
_ANCHORS = ("\n", ":", "。")  # texts that rarely merge into one token with what follows
_PLACE = "\ue000\ue001\ue000"  # stands for a prompt's {} in formats that contain {} themselves


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt with its subject."""

    ids: tuple[int, ...]
    lookup: int
    """Index of the lookup token, the subject's last token, in `ids`."""

    def cut(self) -> Prompt:
        """The prompt up to and including the lookup token, whose states do not depend on what follows it."""
        return Prompt(self.ids[: self.lookup + 1], self.lookup)

    def open_ended(self, tokenizer: Any, closing: AnySet[int]) -> Prompt:
        """The prompt without special tokens after it, where a target is to follow; see `without_closing`."""
        return Prompt(tuple(without_closing(tokenizer, self.ids, self.lookup + 1, closing)), self.lookup)


@dataclass(frozen=True)
class PreparedRequest:
    """All token ids that an edit needs."""

    request: EditRequest
    rewriting: tuple[Prompt, ...]
    """The bare prompt first, then the prompt after each context prefix."""
    kl: Prompt
    """The prompt ("{} is a") whose next-token distribution the value should preserve."""
    target: tuple[int, ...]
    """Token ids of `target_new` as the continuation of the bare prompt."""
    separator: str
    """What was put between the bare prompt and the target."""
    neighbors: tuple[Prompt, ...] = ()
    """Neighborhood prompts whose keys stand in the batch's system; see `neighbor_prompts`."""
    general: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    """Token ids of general prompts and of their answers, whose distributions a tuning method preserves."""

    def chunk(self, begin: int, end: int) -> PreparedRequest:
        """The target's tokens from `begin` up to `end`, to be written at the token before them in each context."""
        rewriting = tuple(
            Prompt((*prompt.ids, *self.target[:begin]), len(prompt.ids) + begin - 1) for prompt in self.rewriting
        )
        return replace(self, rewriting=rewriting, target=self.target[begin:end])

    @property
    def name(self) -> str:
        """How messages call the request."""
        request = self.request
        return f"request {request.id!r}" if request.id is not None else f"the request on {request.label!r}"


def chunk_spans(tokens: int, chunk_tokens: int, overlap: int = 0) -> list[tuple[int, int]]:
    """(begin, end) of the chunks of a target: one begins every `chunk_tokens - overlap` tokens; the last may be short.

    Source: AnyEdit (arXiv 2502.05628), its released `compute_z.py`.
    """
    return [(begin, min(begin + chunk_tokens, tokens)) for begin in range(0, tokens, chunk_tokens - overlap)]


def fill(
    tokenizer: Any, template: str, subject: str, prefix: str = "", prompt_format: PromptFormat | None = None
) -> Prompt:
    """Tokenize `prefix + template` with `subject` at the template's {}; raises RequestError when it has no tokens."""
    ids, _, last = fill_span(tokenizer, template, subject, prefix, prompt_format)
    return Prompt(ids, last)


def fill_span(
    tokenizer: Any, template: str, subject: str, prefix: str = "", prompt_format: PromptFormat | None = None
) -> tuple[tuple[int, ...], int, int]:
    """As `fill`: the token ids, and the index of the first and of the last token that covers the subject."""
    frame = prefix.replace("{}", "") + template
    text, begin, end = in_format(frame, subject, prompt_format)
    special = adds_special(tokenizer, text, prompt_format)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        ids = encoded["input_ids"]
        places = covering(encoded["offset_mapping"], begin, end)
    else:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        places = covering_without_offsets(tokenizer, text, begin, end, ids, special)
    if not places:
        raise RequestError(f"the subject {subject!r} has no tokens in {text!r}")
    return tuple(ids), places[0], places[-1]


def in_format(template: str, subject: str, prompt_format: PromptFormat | None) -> tuple[str, int, int]:
    """A template with its subject, in the caller's format, and where in it the subject begins and ends."""
    if prompt_format is None:
        prompt_format, places = str, ("{}",)
    else:
        subject = subject.strip()  # chat templates strip the whole message
        places = (_PLACE, "{}") if isinstance(prompt_format, ChatFormat) else ("{}", _PLACE)
    for place in places:
        framed = prompt_format(template.replace("{}", place))
        if framed.count(place) == 1:
            before, _, after = framed.partition(place)
            return before + subject + after, len(before), len(before) + len(subject.rstrip())
    result = prompt_format(template)
    raise RequestError(f"the prompt format must keep the {{}} of {template!r} once; it made {result!r}")


def adds_special(tokenizer: Any, text: str, prompt_format: PromptFormat | None) -> bool:
    """Whether the tokenizer should add its special tokens; not if the format has written the first one already."""
    return is_plain(prompt_format) or not (tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token))


def covering(spans: Iterable[tuple[int, int]], begin: int, end: int) -> list[int]:
    """Indices of the tokens that cover a part of text[begin:end]; `spans` are the characters of each token."""
    return [i for i, (first, after) in enumerate(spans) if first < end and after > max(begin, first)]


def covering_without_offsets(
    tokenizer: Any, text: str, begin: int, end: int, ids: Sequence[int], special: bool
) -> list[int]:
    """Indices of the first and the last token of text[begin:end], for tokenizers without offsets; or none.

    The tokens of the whole text usually begin with those of text[:end], whatever the tokenizer normalizes. They do not
    if one token extends past `end`. Then the last token is that of the shortest run, from the first token on, that
    decodes to everything that the tokens of text[:end] decode to, apart from white space, case and Unicode composition.
    The first token is the one that adds to what the tokens of text[:begin] decode to.
    """

    def encoded(part: str) -> list[int]:
        return without_closing(tokenizer, tokenizer(part, add_special_tokens=special)["input_ids"])

    before, up_to_end = encoded(text[:begin]), encoded(text[:end])
    shown, wanted = decoded_plain(tokenizer, before), decoded_plain(tokenizer, up_to_end)
    if wanted == shown:
        return []
    last = len(up_to_end) - 1
    if list(ids[: len(up_to_end)]) != up_to_end:
        runs = (count for count in range(1, len(ids) + 1) if decoded_plain(tokenizer, ids[:count]).startswith(wanted))
        last = next(runs, 0) - 1
        if last < 0:
            return []
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False)))
    markers = non_words(tokenizer).special
    adding = (
        i
        for i in range(same, last)
        if ids[i] not in markers and len(decoded_plain(tokenizer, ids[: i + 1])) > len(shown)
    )
    return [next(adding, last), last]


def decoded_plain(tokenizer: Any, ids: Sequence[int]) -> str:
    """What tokens decode to, apart from white space, case and Unicode composition."""
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return "".join(unicodedata.normalize("NFKD", text).casefold().split())


def separator_before(
    tokenizer: Any, prompt: str, target: str, requested: str = AUTO, prompt_format: PromptFormat | None = None
) -> str:
    """What stands between a prompt, as the model reads it, and a target.

    For "auto" it is what the chat template puts before an answer, if that is known; nothing after a chat marker;
    otherwise what kedit_fast.requests.spacing decides. Where there is white space already, none is added.
    """
    if requested == AUTO and not prompt[-1:].isspace() and not target[:1].isspace():
        if isinstance(prompt_format, ChatFormat) and prompt_format.separator is not None:
            return prompt_format.separator
        if ends_with_one_of(prompt, non_words(tokenizer).markers_by_last):
            return ""
    return separator(prompt, target, requested)


def target_tokens(
    tokenizer: Any, prompt: str, target: str, special: bool = True, between: str | None = None
) -> tuple[int, ...]:
    """The tokens of `target` as the continuation of `prompt`.

    They are the tokens that prompt and target together have beyond the prompt's. So there is neither a special token
    nor a lone space, which the tokenizer might put before a text of its own.

    Args:
        tokenizer: of the model.
        prompt: as the model reads it.
        target: the text that continues it.
        special: whether the tokenizer adds its special tokens, as it does to the prompt.
        between: what stands between the two; None for what `separator_before` says.

    Raises:
        RequestError: the target has no tokens, contains a special one or has a part that the vocabulary lacks.
    """
    tokens = non_words(tokenizer)
    unknown = unknown_id(tokenizer)
    joined = prompt + (separator_before(tokenizer, prompt, target) if between is None else between) + target
    base = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    if not ends_with_one_of(prompt, tokens.special_by_last):
        base = without_closing(tokenizer, base, closing=tokens.closing)
    full = list(tokenizer(joined, add_special_tokens=special)["input_ids"])
    while full and full[-1] in tokens.special and not joined.rstrip().endswith(tokenizer.decode(full[-1:]).strip()):
        if full[-1] == unknown:
            break
        full.pop()
    if full[: len(base)] == base and len(full) > len(base):
        ids = full[len(base) :]
    else:
        ids = _tokens_apart(tokenizer, joined[len(prompt) :])
    if unknown is not None and unknown in ids:
        raise RequestError(f"the tokenizer has no tokens for a part of the target {target!r}")
    if any(token in tokens.special for token in ids):
        raise RequestError(f"the target {target!r} holds a special token")
    if not ids or not tokenizer.decode(ids).strip():
        raise RequestError(f"the target {target!r} has no tokens")
    return tuple(ids)


def _tokens_apart(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text in the middle of another: without what the tokenizer puts before the beginning of a text."""
    for anchor in _ANCHORS:
        base, full = (
            without_closing(tokenizer, tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in (anchor, anchor + text)
        )
        if base and full[: len(base)] == base and len(full) > len(base):
            return full[len(base) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def continuation(
    tokenizer: Any, prompt: str, target: str, prompt_format: PromptFormat | None = None, requested: str = AUTO
) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a text prompt, without closing special tokens, and of a target that continues it.

    Raises:
        RequestError: the target has no tokens or holds a special one.
    """
    text = prompt if prompt_format is None else prompt_format(prompt)
    special = adds_special(tokenizer, text, prompt_format)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if is_plain(prompt_format):
        ids = without_closing(tokenizer, ids, 1)
    if not target:
        return list(ids), ()
    between = separator_before(tokenizer, text, target, requested, prompt_format)
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
    """Tokenize requests, once for keys and values.

    Raises:
        RequestError: naming every request that cannot be used, see `prepare_each`.
    """
    prepared, problems = prepare_each(
        tokenizer,
        dict(enumerate(requests)),
        prefixes,
        max_length,
        prompt_format,
        vocabulary=vocabulary,
        target_separator=target_separator,
    )
    require_no_problems(problems)
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
    neighbors: int = 0,
    general: bool = False,
    contrasted: bool = False,
) -> tuple[list[PreparedRequest], dict[int, str]]:
    """Tokenize requests, given by index.

    Args:
        tokenizer: of the model.
        requests: index -> request.
        prefixes: context prefixes.
        max_length: tokens that the model takes.
        prompt_format: what makes prompts into the text that the model reads, or None.
        vocabulary: number of tokens that the model knows; None to allow any.
        target_separator: for requests that say "auto".
        neighbors: so many neighborhood prompts of each request, at most, are tokenized, too.
        general: general prompts are tokenized, too, and a request needs one; see `requests.general`.
        contrasted: a request needs the answer that its target stands against, `target_true`.

    Returns:
        the requests that can be used, in order; and for each other one index -> what is wrong, with its name: a subject
        or target without tokens, a special token in the target, more tokens than the model takes, a token past its
        vocabulary, a chat template that fails, something that it lacks.
    """
    check_separator(target_separator)
    prepared, problems = [], {}
    for index, request in requests.items():
        name = numbered(request.id, index)
        try:
            one = _prepare_one(tokenizer, request, prefixes, max_length, prompt_format, target_separator)
            if neighbors:
                one = replace(one, neighbors=neighbor_prompts(tokenizer, request, neighbors, max_length, prompt_format))
            if contrasted and not (request.target_true or "").strip():
                raise RequestError("it has no target_true, the answer (of SafeEdit: the unsafe one) to compare with")
            if general:
                one = replace(one, general=_general(tokenizer, request, max_length, prompt_format))
            prompts = (*one.rewriting, one.kl, *one.neighbors)
            ids = [i for prompt in prompts for i in prompt.ids] + list(one.target)
            ids += [i for pair in one.general for part in pair for i in part]
            if problem := unknown_token(tokenizer, ids, vocabulary):
                raise RequestError(problem)
            prepared.append(one)
        except RequestError as error:
            problems[index] = f"{name}: {error}"
    return prepared, problems


def _prepare_one(
    tokenizer: Any,
    request: EditRequest,
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None,
    target_separator: str,
) -> PreparedRequest:
    if request.subject is None:
        return _prepare_whole_prompt(tokenizer, request, prefixes, max_length, prompt_format, target_separator)
    text, *_ = in_format(request.prompt, request.subject, prompt_format)
    requested = requested_separator(request, target_separator)
    between = separator_before(tokenizer, text, request.target_new, requested, prompt_format)
    special = adds_special(tokenizer, text, prompt_format)
    target = target_tokens(tokenizer, text, request.target_new, special, between)
    filled = [fill(tokenizer, request.prompt, request.subject, prefix, prompt_format) for prefix in ("", *prefixes)]
    kl = fill(tokenizer, KL_PROMPT, request.subject, "", prompt_format)
    if is_plain(prompt_format):  # a format ends where the answer begins, its special tokens belong there
        closing = non_words(tokenizer).closing
        filled = [prompt.open_ended(tokenizer, closing) for prompt in filled]
        kl = kl.open_ended(tokenizer, closing)
    return _require_fits(PreparedRequest(request, tuple(filled), kl, target, between), max_length)


def _prepare_whole_prompt(
    tokenizer: Any,
    request: EditRequest,
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None,
    target_separator: str,
) -> PreparedRequest:
    """A request without a subject, for methods that edit by whole prompts: the lookup token is the last one."""
    texts = [prefix.replace("{}", "") + request.prompt for prefix in ("", *prefixes)]
    requested = requested_separator(request, target_separator)
    rows = [continuation(tokenizer, text, request.target_new, prompt_format, requested) for text in texts]
    if not all(ids for ids, _ in rows):
        raise RequestError(f"the prompt {request.prompt!r} has no tokens")
    filled = tuple(Prompt(tuple(ids), len(ids) - 1) for ids, _ in rows)
    text = request.prompt if prompt_format is None else prompt_format(request.prompt)
    between = separator_before(tokenizer, text, request.target_new, requested, prompt_format)
    return _require_fits(PreparedRequest(request, filled, filled[0], rows[0][1], between), max_length)


def _require_fits(prepared: PreparedRequest, max_length: int) -> PreparedRequest:
    """The prepared request; raises RequestError if it has more tokens than the model takes."""
    longest = max(len(prompt.ids) for prompt in prepared.rewriting) + len(prepared.target) - 1
    if longest > max_length:
        raise RequestError(f"{longest} tokens with context and target, the model takes {max_length}")
    return prepared


def neighbor_prompts(
    tokenizer: Any, request: EditRequest, count: int, max_length: int, prompt_format: PromptFormat | None = None
) -> tuple[Prompt, ...]:
    """The first `count` neighborhood prompts of a request, tokenized.

    The lookup token of one that is the request's prompt with another subject is that subject's last token, where edits
    have their keys; of any other it is the last token.

    Raises:
        RequestError: one has no tokens, or more than the model takes.
    """
    before, place, after = request.prompt.partition("{}")
    prompts = []
    for text in request.neighborhood_prompts[:count]:
        other = text[len(before) : len(text) - len(after)]
        if request.subject is not None and place and text == before + other + after and other.strip():
            prompt = fill(tokenizer, request.prompt, other, "", prompt_format)
        else:
            ids, _ = continuation(tokenizer, text, "", prompt_format)
            prompt = Prompt(tuple(ids), len(ids) - 1)
        if not prompt.ids or prompt.lookup >= max_length:
            raise RequestError(
                f"the neighborhood prompt {text!r} has {len(prompt.ids)} tokens, the model takes 1 to {max_length}"
            )
        prompts.append(prompt)
    return tuple(prompts)


def _general(
    tokenizer: Any, request: EditRequest, max_length: int, prompt_format: PromptFormat | None
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Token ids of a request's general prompts and their answers."""
    pairs = []
    for prompt, answer in general_prompts(request):
        ids, target = continuation(tokenizer, prompt, answer, prompt_format)
        if not ids or len(ids) + len(target) > max_length:
            raise RequestError(
                f"the general prompt {prompt[:40]!r} has {len(ids) + len(target)} tokens with its answer, the model "
                f"takes {max_length}"
            )
        pairs.append((tuple(ids), target))
    if not pairs:
        raise RequestError(
            "it has no general prompt whose answer is to be preserved: a locality probe with an answer, or a "
            "neighborhood prompt and target_true"
        )
    return tuple(pairs)


def requested_separator(request: EditRequest, default: str) -> str:
    """The separator that a request asks for between prompt and target, or the run's default if it says "auto"."""
    return default if request.target_separator == AUTO else request.target_separator


def without_closing(
    tokenizer: Any, ids: Sequence[int], first: int = 0, closing: AnySet[int] | None = None
) -> list[int]:
    """Token ids without the special tokens that a tokenizer adds after a text; the `first` ids stay in any case.

    `closing` is `non_words(tokenizer).closing`, where the caller has it.
    """
    closing, end = non_words(tokenizer).closing if closing is None else closing, len(ids)
    while end > first and ids[end - 1] in closing:
        end -= 1
    return list(ids[:end])
