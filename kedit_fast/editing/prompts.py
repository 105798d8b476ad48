"""Prompts as token ids: where the subject ends, what the target's tokens are, and generated context prefixes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.editing.requests import EditRequest
from kedit_fast.errors import EditError, RequestError
from kedit_fast.models.architectures import ModelView
from kedit_fast.models.forward import evaluating, last_hidden, pad

_log = logging.getLogger("kedit_fast")
_STARTS = ("The", "Therefore", "Because", "I", "You")  # what prefixes are grown from, as in the memit repository
KL_PROMPT = "{} is a"


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
        return f"request {request.id!r}" if request.id is not None else f"the request on {request.subject!r}"


def fill(tokenizer: Any, template: str, subject: str, prefix: str = "") -> Prompt:
    """Tokenise `prefix + template` with `subject` at the template's {}; raises RequestError when it has no tokens."""
    text = prefix + template.replace("{}", subject, 1)
    begin = len(prefix) + template.index("{}")
    end = begin + len(subject.rstrip())
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        covering = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin and b > a]
    else:
        ids = tokenizer(text)["input_ids"]
        covering = _covering_without_offsets(tokenizer, text, begin, end, ids)
    if not covering:
        raise RequestError(f"the subject {subject!r} has no tokens in {text!r}")
    return Prompt(tuple(ids), covering[-1])


def _covering_without_offsets(tokenizer: Any, text: str, begin: int, end: int, ids: list[int]) -> list[int]:
    """Tokens of text[begin:end] for tokenizers without offsets: the shortest prefix of `ids` that decodes past them."""
    before, upto = text[:begin], text[:end]
    special = set(tokenizer.all_special_ids)
    for count in range(1, len(ids) + 1):
        kept = [i for i in ids[:count] if i not in special]
        decoded = tokenizer.decode(kept, clean_up_tokenization_spaces=False).lstrip()
        if decoded.startswith(upto.strip()):  # part of a multi-byte character decodes to something else
            return [count - 1] if len(upto) > len(before) else []
    return []


def target_tokens(tokenizer: Any, prompt: str, target: str) -> tuple[int, ...]:
    """The tokens of `target` as the continuation of `prompt`, a space between them unless one is there.

    They are what prompt and target together have beyond the prompt, so neither a special token nor a lone space that
    the tokenizer would put before a separate text can enter.
    """
    joined = prompt + ("" if target[:1].isspace() or prompt[-1:].isspace() else " ") + target
    base, full = open_ended(tokenizer, tokenizer(prompt)["input_ids"]), list(tokenizer(joined)["input_ids"])
    special = set(tokenizer.all_special_ids)
    while full and full[-1] in special and not joined.rstrip().endswith(tokenizer.decode(full[-1:]).strip()):
        full.pop()
    if full[: len(base)] == base and len(full) > len(base):
        ids = full[len(base) :]
    else:
        ids = tokenizer(joined[len(prompt) :], add_special_tokens=False)["input_ids"]
    if special & set(ids):
        raise RequestError(f"the target {target!r} holds a special token")
    if not ids or not tokenizer.decode(ids).strip():
        raise RequestError(f"the target {target!r} has no tokens")
    return tuple(ids)


def prepare(
    tokenizer: Any, requests: Sequence[EditRequest], prefixes: Sequence[str], max_length: int
) -> list[PreparedRequest]:
    """Tokenise requests once, for keys and values alike.

    Raises:
        RequestError: naming each request by id or position: no subject tokens, no target tokens, or too long.
    """
    prepared = []
    for number, request in enumerate(requests, 1):
        name = f"request {request.id!r}" if request.id is not None else f"request {number}"
        try:
            target = target_tokens(tokenizer, request.text, request.target_new)
            rewriting = tuple(fill(tokenizer, request.prompt, request.subject, prefix) for prefix in ("", *prefixes))
            rewriting = tuple(_without_end(tokenizer, prompt) for prompt in rewriting)
            kl = _without_end(tokenizer, fill(tokenizer, KL_PROMPT, request.subject))
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None
        longest = max(len(prompt.ids) for prompt in rewriting) + len(target) - 1
        if longest > max_length:
            raise RequestError(f"{name}: {longest} tokens with context and target, the model takes {max_length}")
        prepared.append(PreparedRequest(request, rewriting, kl, target))
    return prepared


def open_ended(tokenizer: Any, ids: Sequence[int], keep: int = 0) -> list[int]:
    """Token ids without the special tokens a tokenizer adds after a text, where something is to follow.

    The first `keep` ids stay whatever they are.
    """
    special, end = set(tokenizer.all_special_ids), len(ids)
    while end > keep and ids[end - 1] in special:
        end -= 1
    return list(ids[:end])


def _without_end(tokenizer: Any, prompt: Prompt) -> Prompt:
    return Prompt(tuple(open_ended(tokenizer, prompt.ids, prompt.lookup + 1)), prompt.lookup)


def generate_prefixes(
    view: ModelView, tokenizer: Any, lengths: Sequence[tuple[int, int]], seed: int, top_k: int = 5
) -> tuple[str, ...]:
    """Context prefixes the model itself writes, each ending in ". ": `count` of them for each (tokens, count).

    `tokens` counts the start, as the published max_out_len does. Sampled from the `top_k` most probable tokens with a
    generator of `seed`; special tokens are never drawn, so none is in a prefix. Several starts take turns.

    Raises:
        EditError: the model's output is not finite.

    Cost: `tokens` forward passes over all prefixes together.
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    prefixes: list[str] = []
    for tokens, count in lengths:
        starts = [_STARTS[i % len(_STARTS)] if count <= len(_STARTS) else _STARTS[0] for i in range(count)]
        rows = [open_ended(tokenizer, tokenizer(start)["input_ids"], 1) for start in starts]
        begins = [len(row) for row in rows]
        with evaluating(view), torch.no_grad():
            for _ in range(max(1, tokens - 1)):
                hidden = last_hidden(view, pad(rows, view.device))
                ends = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
                states = hidden[torch.arange(len(rows), device=hidden.device), ends]  # [count, h]
                logits = states.to(view.head.device) @ view.head.T
                if view.head_bias is not None:
                    logits = logits + view.head_bias
                logits = logits.float().cpu()
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
