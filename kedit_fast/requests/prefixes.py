"""Context prefixes: short texts that the model itself writes, put before a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.errors import EditError
from kedit_fast.models.forward import evaluating, last_states, pad, unknown_token
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import without_closing
from kedit_fast.requests.tokens import chat_markers, special_tokens
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


@dataclass(frozen=True)
class PrefixStyle:
    """How context prefixes are written."""

    starts: tuple[str, ...]
    """First words, which take turns."""
    top_k: int
    """Tokens are sampled from so many most probable ones; 1 takes the most probable one."""
    ending: str
    """What every prefix ends in."""
    counts_start: bool
    """Whether the number of tokens includes the start, as memit's max_out_len does."""


STYLES = {
    "sampled": PrefixStyle(("The", "Therefore", "Because", "I", "You"), 5, ". ", True),  # memit's
    "greedy": PrefixStyle(("I", "You", "Because", "Yes", "Q: "), 1, " ", False),  # WISE's
}
"""Name of a recipe's decoding -> how its prefixes are written, as published."""


@plain_torch()
def generate_prefixes(
    view: ModelView,
    tokenizer: Any,
    lengths: Sequence[tuple[int, int]],
    seed: int,
    top_k: int | None = None,
    style: str = "sampled",
) -> tuple[str, ...]:
    """Context prefixes that the model itself writes, each ending in ". ": `count` of them per (tokens, count).

    Tokens are sampled with a generator seeded by `seed`; special tokens and chat markers are never drawn.

    Args:
        view: the model.
        tokenizer: its tokenizer.
        lengths: (tokens, count), as the style counts tokens.
        seed: of the generator.
        top_k: tokens are sampled from so many most probable ones; None for the style's number.
        style: a name of `STYLES`; the prefixes of "greedy" end in a space alone.

    Raises:
        EditError: the model's output is not finite, or it has no embedding for a token of a start.

    Cost: `tokens` forward passes over all prefixes together.
    """
    form = STYLES[style]
    top_k = form.top_k if top_k is None else top_k
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted({*special_tokens(tokenizer), *chat_markers(tokenizer)}), dtype=torch.int64)
    prefixes: list[str] = []
    for tokens, count in lengths:
        starts = [form.starts[i % len(form.starts)] for i in range(count)]
        rows = [without_closing(tokenizer, tokenizer(start)["input_ids"], 1) for start in starts]
        if problem := unknown_token(tokenizer, [token for row in rows for token in row], view.vocabulary):
            raise EditError(f"context prefixes cannot be generated: {problem}")
        start_lengths = [len(row) for row in rows]
        with evaluating(view), torch.no_grad():
            for _ in range(max(1, tokens - form.counts_start)):
                hidden = last_states(view, pad(rows, view.device))
                ends = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
                states = hidden[torch.arange(len(rows), device=hidden.device), ends]  # [count, h]
                logits = view.head.logits(states).float().cpu()
                if not bool(torch.isfinite(logits).all()):
                    raise EditError("the model's output is not finite (NaN or overflow in its weights?)")
                logits[:, special[special < logits.shape[1]]] = -torch.inf
                values, ids = logits.topk(min(top_k, logits.shape[1]), dim=-1)
                drawn = torch.multinomial(values.softmax(-1), 1, generator=generator)
                for row, token in zip(rows, ids.gather(1, drawn)[:, 0].tolist(), strict=True):
                    row.append(token)
        for start, row, length in zip(starts, rows, start_lengths, strict=True):
            text = start + tokenizer.decode(row[length:], skip_special_tokens=True)
            prefixes.append(" ".join(text.split()).rstrip(". ") + form.ending)
    _log.debug("context prefixes: %s", prefixes)
    return tuple(prefixes)
