"""Prompts as token ids: where the subject ends, what the target's tokens are, and generated context prefixes."""

from __future__ import annotations

import inspect
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kedit_fast.errors import EditError, RequestError
from kedit_fast.models.forward import evaluating, last_hidden, pad, unknown_token
from kedit_fast.models.view import ModelView
from kedit_fast.requests.request import EditRequest, require_none
from kedit_fast.requests.spacing import AUTO, check_separator, separator
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_STARTS = ("The", "Therefore", "Because", "I", "You")  # what prefixes are grown from, as published
KL_PROMPT = "{} is a"
PromptFormat = Callable[[str], str]  # from a prompt, which may hold a place for its subject, to what the model reads
_ANCHORS = ("\n", ":", "。")  # texts that rarely join the tokens of what follows
_PLACE = "\ue000\ue001\ue000"  # private characters that stand for a prompt's {} in a format, which may hold {} itself
_THINKING = ("enable_thinking", "thinking")  # what chat templates call their thinking switch
_PROBE, _ANSWER = "Where is it?", "Here."  # a question and an answer that show what a chat template does


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


@dataclass(frozen=True)
class ChatFormat:
    """A prompt as a user's message in a tokenizer's chat template, up to where the answer begins; see `chat_format`."""

    tokenizer: Any = field(repr=False)
    system: str | None = None
    template: str | None = None  # its name, where there are several
    arguments: Mapping[str, Any] = field(default_factory=dict)
    separator: str | None = None  # white space that the template puts before an answer; None where it does not tell

    def __call__(self, prompt: str) -> str:
        """The text that the model reads; raises RequestError where the template does."""
        return self.rendered(prompt)

    def rendered(self, prompt: str, answer: str | None = None) -> str:
        """A prompt, open for its answer, or a prompt with its answer."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": prompt})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=answer is None,
                **self.arguments,
            )  # fmt: skip
        except Exception as error:  # a template raises what it likes
            roles = " and ".join(message["role"] for message in messages)
            text = str(error) or type(error).__name__
            advice = ""
            if "system" in text.lower():
                advice = ": " + ("give a system message" if self.system is None else "leave the system message out")
            raise RequestError(f"the chat template fails on messages of {roles}: {text}{advice}") from error


def chat_format(tokenizer: Any, system: str | None = None, template: str | None = None, **arguments: Any) -> ChatFormat:
    """The prompt as a user's message in the tokenizer's chat template, up to where the answer begins.

    What stands before a target is what the template itself puts before an answer (Llama 2: a space), where it tells.

    Args:
        tokenizer: with a chat template.
        system: a system message that goes first.
        template: the template's name, where the tokenizer has several and none called "default", or another is meant.
        **arguments: what the template reads beside messages, for example enable_thinking=False.

    Raises:
        RequestError: no template, none of that name, one that reads no such argument, leaves the system message out, or
            raises (its own message is given).
    """
    source = _template_source(tokenizer, template)
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
    for name in arguments:
        if name in taken - {"tools", "documents", "kwargs"}:
            raise RequestError(f"{name!r} cannot be given to a chat template: it is set here")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise RequestError(f"the chat template reads no {name!r}, so giving it would change nothing")
    several = isinstance(tokenizer.chat_template, Mapping)
    made = ChatFormat(tokenizer, system, template if several else None, arguments)
    prompt = made.rendered(_PROBE)
    if system is not None and system.strip() not in prompt:
        raise RequestError("the chat template leaves the system message out: put its text into the prompts")
    for name in _THINKING:
        if name not in arguments and re.search(rf"\b{name}\b", source) and _changes(made, prompt, name):
            _log.warning(
                "the chat template has a thinking switch: as it stands, targets are written where thoughts may begin; "
                "%s=false (--template-arg) puts them after", name,
            )  # fmt: skip
    try:
        answered = made.rendered(_PROBE, _ANSWER)
    except RequestError:
        return made
    between = answered[len(prompt) :].partition(_ANSWER)[0]
    tells = answered.startswith(prompt) and _ANSWER in answered[len(prompt) :] and not between.strip()
    return replace(made, separator=between) if tells else made


def _changes(made: ChatFormat, prompt: str, name: str) -> bool:
    """Whether a format writes the probe's `prompt` in another way where the argument `name` is false."""
    try:
        return replace(made, arguments={**made.arguments, name: False}).rendered(_PROBE) != prompt
    except RequestError:
        return False


def _template_source(tokenizer: Any, name: str | None) -> str:
    """The text of the chat template that is meant."""
    templates = getattr(tokenizer, "chat_template", None)
    if type(tokenizer).__name__.startswith("MistralCommon"):
        raise RequestError(
            f"{type(tokenizer).__name__} makes token ids of a chat but no text that it would read again as the same "
            "ids: use a folder with tokenizer.json and a chat template, or prompts without a chat"
        )
    if not templates:
        raise RequestError("the tokenizer has no chat template, so prompts cannot be formatted as a chat")
    if not isinstance(templates, Mapping):
        if name not in (None, "default"):
            raise RequestError(f"the tokenizer has one chat template without a name, and none called {name!r}")
        return str(templates)
    names = ", ".join(map(repr, sorted(templates)))
    if name is None and "default" not in templates:
        raise RequestError(f"the tokenizer has several chat templates and no default: choose one of {names}")
    if (name or "default") not in templates:
        raise RequestError(f"the tokenizer has no chat template {name!r}: choose one of {names}")
    return str(templates[name or "default"])


def _adds_special(tokenizer: Any, text: str, prompt_format: PromptFormat | None) -> bool:
    """Whether the tokenizer should add its special tokens: not where the format has written the first already."""
    return prompt_format is None or not (tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token))


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


def _known(tokenizer: Any) -> _Known:
    """What a tokenizer says of its tokens, read again only after tokens were added or special tokens changed.

    Reading takes milliseconds where thousands of tokens are added. A token of the vocabulary itself that is declared
    an added one later, without being special, does not change what is looked at here: the vocabulary's size, the
    special tokens and the unknown one.
    """
    try:
        state = (len(tokenizer), tuple(tokenizer.all_special_tokens), _unknown_id(tokenizer))
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
        MappingProxyType(special), MappingProxyType(markers), frozenset(special) - {_unknown_id(tokenizer)},
        _by_last_character(special.values()), _by_last_character(markers.values()),
    )  # fmt: skip


def _by_last_character(tokens: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for token in tokens:
        if token:
            found.setdefault(token[-1], []).append(token)
    return {character: tuple(ending) for character, ending in found.items()}


def _ends_with(text: str, tokens: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a text ends with one of the tokens that are given by their last character."""
    return text.endswith(tokens.get(text[-1:], ()))


def special_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Every special token by id: the named ones and those added as special."""
    return _known(tokenizer).special


def chat_markers(tokenizer: Any) -> Mapping[int, str]:
    """Special tokens and, flagged or not, added ones between brackets or signs, as `<|user|>`: no word of a text."""
    return _known(tokenizer).markers


def _looks_like_marker(token: str) -> bool:
    token = token.strip(" ▁")
    ends = token[:1] + token[-1:]
    return any(c.isalnum() for c in token) and all(unicodedata.category(c)[0] in "PS" for c in ends)


def _unknown_id(tokenizer: Any) -> int | None:
    """The token of what a vocabulary lacks, where it is not also one that a tokenizer puts around a text (GPT-2)."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    around = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")]
    return None if unknown in around else unknown


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
        if _ends_with(prompt, _known(tokenizer).marker_ends):
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
    tokens = _known(tokenizer)
    known = tokens.special
    unknown = _unknown_id(tokenizer)
    joined = prompt + (separator_before(tokenizer, prompt, target) if between is None else between) + target
    base = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    if not _ends_with(prompt, tokens.special_ends):
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
    return _known(tokenizer).closing


def _without_end(tokenizer: Any, prompt: Prompt, special: AnySet[int]) -> Prompt:
    return Prompt(tuple(open_ended(tokenizer, prompt.ids, prompt.lookup + 1, special)), prompt.lookup)


@plain_torch()
def generate_prefixes(
    view: ModelView, tokenizer: Any, lengths: Sequence[tuple[int, int]], seed: int, top_k: int = 5
) -> tuple[str, ...]:
    """Context prefixes the model itself writes, each ending in ". ": `count` of them for each (tokens, count).

    `tokens` counts the start, as the published max_out_len does. Sampled from the `top_k` most probable tokens with a
    generator of `seed`; special tokens and chat markers are never drawn, so none is in a prefix. The five published
    starts take turns.

    Raises:
        EditError: the model's output is not finite, or it has no embedding for a token of a start.

    Cost: `tokens` forward passes over all prefixes together.
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted({*special_tokens(tokenizer), *chat_markers(tokenizer)}), dtype=torch.int64)
    prefixes: list[str] = []
    for tokens, count in lengths:
        starts = [_STARTS[i % len(_STARTS)] for i in range(count)]
        rows = [open_ended(tokenizer, tokenizer(start)["input_ids"], 1) for start in starts]
        if why := unknown_token(tokenizer, [token for row in rows for token in row], view.vocabulary):
            raise EditError(f"context prefixes cannot be generated: {why}")
        begins = [len(row) for row in rows]
        with evaluating(view), torch.no_grad():
            for _ in range(max(1, tokens - 1)):
                hidden = last_hidden(view, pad(rows, view.device))
                ends = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
                states = hidden[torch.arange(len(rows), device=hidden.device), ends]  # [count, h]
                logits = view.logits(states).float().cpu()
                if not bool(torch.isfinite(logits).all()):
                    raise EditError("the model's output is not finite (NaN or overflow in its weights?)")
                logits[:, special[special < logits.shape[1]]] = -torch.inf
                values, ids = logits.topk(min(top_k, logits.shape[1]), dim=-1)
                drawn = torch.multinomial(values.softmax(-1), 1, generator=generator)
                for row, token in zip(rows, ids.gather(1, drawn)[:, 0].tolist(), strict=True):
                    row.append(token)
        for start, row, begin in zip(starts, rows, begins, strict=True):
            text = start + tokenizer.decode(row[begin:], skip_special_tokens=True)
            prefixes.append(" ".join(text.split()).rstrip(". ") + ". ")
    _log.debug("context prefixes: %s", prefixes)
    return tuple(prefixes)
