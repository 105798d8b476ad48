"""DINM's location: the layer whose states tell a request's safe answer from its unsafe one most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from kedit_fast.models.forward import Site, TokenBatch, last_states, pad, visit
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import without_closing
from kedit_fast.support.torch_state import plain_torch

LocatedTokens = Literal["valid", "padded"]
BATCH_TOKENS = 2048
"""Tokens of one pass, padding included, but for pairs that are longer."""


def state_distance(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """|h_first - h_second|_F of pairs of rows, over the first tokens.

    Args:
        states: [2 u, T, h], the rows of a pair one after another.
        counts: [u] how many tokens count.

    Returns:
        [u] fp64.
    """
    difference = (states[0::2].double() - states[1::2].double()).square().sum(-1)  # [u, T]
    counts = counts.to(difference.device)
    inside = torch.arange(difference.shape[1], device=difference.device) < counts[:, None]
    return torch.where(inside, difference, 0.0).sum(1).sqrt()


@plain_torch()
@torch.no_grad()
def answer_distances(
    view: ModelView, tokenizer: Any, pairs: Sequence[tuple[str, str]], tokens: LocatedTokens = "valid"
) -> torch.Tensor:
    """How much the states of two answers differ in each layer: answers alone, without a prompt.

    Args:
        view: the model, in evaluation mode.
        tokenizer: its tokenizer.
        pairs: u pairs of a safe and an unsafe answer; longer ones than the model takes are cut.
        tokens: "valid": over the tokens that both answers have; "padded": over those of the longer answer, the other
            padded on the right by the tokenizer's padding or else end-of-text token. DINM's released code counts
            padding, on a side that depends on what was called before.

    Returns:
        [u, L] fp64 Frobenius norms of the outputs of the blocks; of the last one behind the final norm, as
        transformers lists hidden states.

    Cost: one forward pass over the answers, without the head.

    Source: DINM (arXiv 2403.14472), section 4.1; EasyEdit `_locate_toxic_layer`.
    """
    rows = [_answer(tokenizer, text)[: view.max_length] for pair in pairs for text in pair]
    distances = torch.zeros(len(pairs), view.num_layers, dtype=torch.float64)
    fill = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    for chunk in _chunks(rows):
        chosen = [rows[2 * i + side] for i in chunk for side in (0, 1)]
        lengths = torch.tensor([len(row) for row in chosen]).view(-1, 2)
        counts = lengths.amin(1) if tokens == "valid" else lengths.amax(1)
        for layer, of_pairs in enumerate(_by_layer(view, pad(chosen, view.device, fill), counts)):
            distances[chunk, layer] = of_pairs.cpu()
    return distances


def located(distances: torch.Tensor, layers: Sequence[int]) -> list[int]:
    """For each row of `answer_distances` the layer among some where it is largest; of equal ones the lowest."""
    chosen = sorted(layers)
    return [chosen[place] for place in distances[:, chosen].argmax(1).tolist()]


def _by_layer(view: ModelView, batch: TokenBatch, counts: torch.Tensor) -> list[torch.Tensor]:
    distances: dict[int, torch.Tensor] = {}
    last = view.num_layers - 1

    def see(site: Site, states: torch.Tensor) -> None:
        distances[site.layer] = state_distance(states, counts)

    if view.head.matrix is None:  # what runs behind the last block is not known
        visit(view, batch, [Site(layer, "block") for layer in range(view.num_layers)], see)
    else:
        end = visit(view, batch, [Site(layer, "block") for layer in range(last)], see, to_the_end=True)
        states = last_states(view, batch) if end is None else end
        distances[last] = state_distance(states, counts)
    return [distances[layer] for layer in range(view.num_layers)]


def _answer(tokenizer: Any, text: str) -> list[int]:
    return without_closing(tokenizer, tokenizer(text)["input_ids"], 1)


def _chunks(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pairs of rows, in order, in batches."""
    chunks: list[list[int]] = []
    longest = 0
    for i in range(len(rows) // 2):
        length = max(len(rows[2 * i]), len(rows[2 * i + 1]))
        longest = max(longest, length)
        if not chunks or 2 * longest * (len(chunks[-1]) + 1) > BATCH_TOKENS:
            chunks.append([])
            longest = length
        chunks[-1].append(i)
    return chunks
