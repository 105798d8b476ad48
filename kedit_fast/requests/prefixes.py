"""Context prefixes: short texts that the model itself writes, put before a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from kedit_fast.errors import EditError
from kedit_fast.models.forward import evaluating, last_states, pad, unknown_token
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import without_closing
from kedit_fast.requests.tokens import chat_markers, special_tokens
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_STARTS = ("The", "Therefore", "Because", "I", "You")  # first words of prefixes, as published


@plain_torch()
def generate_prefixes(
    view: ModelView, tokenizer: Any, lengths: Sequence[tuple[int, int]], seed: int, top_k: int = 5
) -> tuple[str, ...]:
    """Context prefixes that the model itself writes, each ending in ". ": `count` of them per (tokens, count).

    `tokens` includes the start, as the published max_out_len does. Tokens are sampled from the `top_k` most probable
    ones with a generator seeded by `seed`; special tokens and chat markers are never drawn. The five published starts
    take turns.

    Raises:
        EditError: the model's output is not finite, or it has no embedding for a token of a start.

    Cost: `tokens` forward passes over all prefixes together.
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted({*special_tokens(tokenizer), *chat_markers(tokenizer)}), dtype=torch.int64)
    prefixes: list[str] = []
    for tokens, count in lengths:
        starts = [_STARTS[i % len(_STARTS)] for i in range(count)]
        rows = [without_closing(tokenizer, tokenizer(start)["input_ids"], 1) for start in starts]
        if problem := unknown_token(tokenizer, [token for row in rows for token in row], view.vocabulary):
            raise EditError(f"context prefixes cannot be generated: {problem}")
        start_lengths = [len(row) for row in rows]
        with evaluating(view), torch.no_grad():
            for _ in range(max(1, tokens - 1)):
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
            prefixes.append(" ".join(text.split()).rstrip(". ") + ". ")
    _log.debug("context prefixes: %s", prefixes)
    return tuple(prefixes)
