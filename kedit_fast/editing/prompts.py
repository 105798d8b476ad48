"""Prompts as token ids: where the subject ends, what the target's tokens are, and generated context prefixes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.editing.requests import EditRequest, require_none
from kedit_fast.errors import EditError, RequestError
from kedit_fast.models.architectures import ModelView
from kedit_fast.models.forward import evaluating, last_hidden, pad
from kedit_fast.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_STARTS = ("The", "Therefore", "Because", "I", "You")  # what prefixes are grown from, as published
KL_PROMPT = "{} is a"
PromptFormat = Callable[[str], str]  # from a prompt, which may hold {}, to the text that the model reads


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
        covering = _covering_without_offsets(tokenizer, text, begin, end, ids)
    if not covering:
        raise RequestError(f"the subject {subject!r} has no tokens in {text!r}")
    return Prompt(tuple(ids), covering[-1])


def in_format(template: str, subject: str, prompt_format: PromptFormat | None) -> tuple[str, int]:
    """A template in the caller's format with its subject, and where the subject begins."""
    framed = template if prompt_format is None else prompt_format(template)
    subject = subject if prompt_format is None else subject.strip()  # as templates do with the whole message
    if framed.count("{}") != 1:
        raise RequestError(f"the prompt format must keep the {{}} of {template!r} once; it made {framed!r}")
    begin = framed.index("{}")
    return framed[:begin] + subject + framed[begin + 2 :], begin


def chat_format(tokenizer: Any) -> PromptFormat:
    """The prompt as a user's message in the tokenizer's chat template, up to where the answer begins.

    Raises:
        RequestError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("the tokenizer has no chat template, so prompts cannot be formatted as a chat")

    def prompt_format(prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    return prompt_format


def _adds_special(tokenizer: Any, text: str, prompt_format: PromptFormat | None) -> bool:
    """Whether the tokenizer should add its special tokens: not where the format has written the first already."""
    return prompt_format is None or not (tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token))


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token by id: the named ones and those added as special."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))}


def _covering_without_offsets(tokenizer: Any, text: str, begin: int, end: int, ids: list[int]) -> list[int]:
    """Tokens of text[begin:end] for tokenizers without offsets: the shortest prefix of `ids` that decodes past them."""
    before, upto = text[:begin], text[:end]
    special = special_tokens(tokenizer)
    for count in range(1, len(ids) + 1):
        kept = [i for i in ids[:count] if i not in special]
        decoded = tokenizer.decode(kept, clean_up_tokenization_spaces=False).lstrip()
        if decoded.startswith(upto.strip()):  # part of a multi-byte character decodes to something else
            return [count - 1] if len(upto) > len(before) else []
    return []


def target_tokens(tokenizer: Any, prompt: str, target: str, special: bool = True) -> tuple[int, ...]:
    """The tokens of `target` as the continuation of `prompt`, a space between them unless one is there.

    They are what prompt and target together have beyond the prompt, so neither a special token nor a lone space that
    the tokenizer would put before a separate text can enter. No space follows a special token that ends the prompt.
    With `special` the tokenizer adds its special tokens, as it does to the prompt.
    """
    known = special_tokens(tokenizer)
    marks = tuple(token for token in known.values() if token)
    apart = target[:1].isspace() or prompt[-1:].isspace() or prompt.endswith(marks)
    joined = prompt + ("" if apart else " ") + target
    base = open_ended(tokenizer, tokenizer(prompt, add_special_tokens=special)["input_ids"])
    full = list(tokenizer(joined, add_special_tokens=special)["input_ids"])
    if prompt.endswith(marks):
        base = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    while full and full[-1] in known and not joined.rstrip().endswith(tokenizer.decode(full[-1:]).strip()):
        full.pop()
    if full[: len(base)] == base and len(full) > len(base):
        ids = full[len(base) :]
    else:
        ids = tokenizer(joined[len(prompt) :], add_special_tokens=False)["input_ids"]
    if set(known) & set(ids):
        raise RequestError(f"the target {target!r} holds a special token")
    if not ids or not tokenizer.decode(ids).strip():
        raise RequestError(f"the target {target!r} has no tokens")
    return tuple(ids)


def continuation(
    tokenizer: Any, prompt: str, target: str, prompt_format: PromptFormat | None = None
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
    return list(ids), target_tokens(tokenizer, text, target, special) if target else ()


def prepare(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None = None,
) -> list[PreparedRequest]:
    """Tokenise requests once, for keys and values alike.

    Raises:
        RequestError: naming every request that cannot be used, see `prepare_each`.
    """
    prepared, problems = prepare_each(tokenizer, dict(enumerate(requests)), prefixes, max_length, prompt_format)
    require_none(problems)
    return prepared


def prepare_each(
    tokenizer: Any,
    requests: Mapping[int, EditRequest],
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None = None,
) -> tuple[list[PreparedRequest], dict[int, str]]:
    """Tokenise requests, by index, once; those that cannot be used come back as index -> what is wrong, with a name.

    What can be wrong: a subject or target without tokens, a special token in the target, more tokens than the model
    takes.
    """
    prepared, problems = [], {}
    for index, request in requests.items():
        name = f"request {request.id!r}" if request.id is not None else f"request {index + 1}"
        try:
            prepared.append(_prepared(tokenizer, request, prefixes, max_length, prompt_format))
        except RequestError as error:
            problems[index] = f"{name}: {error}"
    return prepared, problems


def _prepared(
    tokenizer: Any,
    request: EditRequest,
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None,
) -> PreparedRequest:
    if request.subject is None:
        return _without_subject(tokenizer, request, prefixes, max_length, prompt_format)
    text, _ = in_format(request.prompt, request.subject, prompt_format)
    target = target_tokens(tokenizer, text, request.target_new, _adds_special(tokenizer, text, prompt_format))
    filled = [fill(tokenizer, request.prompt, request.subject, prefix, prompt_format) for prefix in ("", *prefixes)]
    kl = fill(tokenizer, KL_PROMPT, request.subject, "", prompt_format)
    if prompt_format is None:  # a format ends where the answer begins, its special tokens belong there
        filled, kl = [_without_end(tokenizer, prompt) for prompt in filled], _without_end(tokenizer, kl)
    return _fitting(PreparedRequest(request, tuple(filled), kl, target), max_length)


def _without_subject(
    tokenizer: Any,
    request: EditRequest,
    prefixes: Sequence[str],
    max_length: int,
    prompt_format: PromptFormat | None,
) -> PreparedRequest:
    """A prompt as it stands, for methods that look at whole prompts: the lookup is its last token."""
    texts = [prefix.replace("{}", "") + request.prompt for prefix in ("", *prefixes)]
    rows = [continuation(tokenizer, text, request.target_new, prompt_format) for text in texts]
    if not all(ids for ids, _ in rows):
        raise RequestError(f"the prompt {request.prompt!r} has no tokens")
    filled = tuple(Prompt(tuple(ids), len(ids) - 1) for ids, _ in rows)
    return _fitting(PreparedRequest(request, filled, filled[0], rows[0][1]), max_length)


def _fitting(prepared: PreparedRequest, max_length: int) -> PreparedRequest:
    longest = max(len(prompt.ids) for prompt in prepared.rewriting) + len(prepared.target) - 1
    if longest > max_length:
        raise RequestError(f"{longest} tokens with context and target, the model takes {max_length}")
    return prepared


def open_ended(tokenizer: Any, ids: Sequence[int], keep: int = 0) -> list[int]:
    """Token ids without the special tokens a tokenizer adds after a text, where something is to follow.

    The first `keep` ids stay whatever they are.
    """
    special, end = special_tokens(tokenizer), len(ids)
    while end > keep and ids[end - 1] in special:
        end -= 1
    return list(ids[:end])


def _without_end(tokenizer: Any, prompt: Prompt) -> Prompt:
    return Prompt(tuple(open_ended(tokenizer, prompt.ids, prompt.lookup + 1)), prompt.lookup)


@plain_torch()
def generate_prefixes(
    view: ModelView, tokenizer: Any, lengths: Sequence[tuple[int, int]], seed: int, top_k: int = 5
) -> tuple[str, ...]:
    """Context prefixes the model itself writes, each ending in ". ": `count` of them for each (tokens, count).

    `tokens` counts the start, as the published max_out_len does. Sampled from the `top_k` most probable tokens with a
    generator of `seed`; special tokens are never drawn, so none is in a prefix. The five published starts take turns.

    Raises:
        EditError: the model's output is not finite.

    Cost: `tokens` forward passes over all prefixes together.
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(special_tokens(tokenizer)), dtype=torch.int64)
    prefixes: list[str] = []
    for tokens, count in lengths:
        starts = [_STARTS[i % len(_STARTS)] for i in range(count)]
        rows = [open_ended(tokenizer, tokenizer(start)["input_ids"], 1) for start in starts]
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
