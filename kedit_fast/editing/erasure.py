"""Erasing a concept: the inputs of edited layers at texts, and what was written because of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kedit_fast.errors import InvalidArgumentError, MethodError, RequestError
from kedit_fast.models.forward import Site, capture, pad, unknown_token
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PromptFormat, continuation
from kedit_fast.solver.erasure import difference_directions, erasing_update, label_directions, shrunk_covariance
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.preconditioner import Covariance, Identity, Preconditioner

BATCH_TOKENS = 2048
"""Tokens of one forward pass."""
TextTokens = Literal["last", "all"]
"""Tokens of a text that have its label."""
ErasureCost = Literal["texts", "statistics", "none"]
"""What an erasing update should change least: S = Sigma_xx of the texts (LEACE), C of ordinary text, or I (ProFS)."""


@dataclass(frozen=True)
class Erasure:
    """What a call of `Editor.erase` has written."""

    batch: int
    """Number of the batch in the ledger."""
    updates: dict[str, LowRankUpdate]
    """Name of a weight -> what was added to it; on the host."""
    relative_norms: dict[str, float]
    """Name of a weight -> |Delta| / |W|, with W as it was before."""


@dataclass(frozen=True)
class ErasurePlan:
    """What is erased, and at what cost; see `Editor.erase`."""

    rows: Sequence[Sequence[int]]
    """Token ids of each text."""
    labels: torch.Tensor
    """[texts] int64, the number of each text's label, from 0."""
    tokens: TextTokens
    """Tokens of a text that have its label."""
    cost: ErasureCost
    """What an update should change least."""
    pairs: int
    """Directions between paired texts; 0 for the covariance with the labels."""
    keep_mean: bool
    """Whether the mean input gets the output that it had."""

    def update(
        self, view: ModelView, layer: int, weight: torch.Tensor, moment: torch.Tensor | None, ridge: float
    ) -> LowRankUpdate:
        """The update of one layer, in the model as it is.

        Args:
            view: the model.
            layer: the layer.
            weight: W [out, d] of its edited matrix.
            moment: C [d, d] of ordinary text, where that is the cost; else None.
            ridge: added to C, as a multiple of its mean diagonal.

        Raises:
            InvalidArgumentError: pairs of other than two labels.
            MethodError: the layer has experts.
        """
        if view.experts(layer) is not None:
            raise MethodError(f"layer {layer} has experts: erase() is for layers with one matrix")
        inputs, owner = inputs_at_texts(view, self.rows, layer, self.tokens)
        label = self.labels[owner].to(inputs.device)
        if self.pairs:
            if (count := int(self.labels.max()) + 1) != 2:
                raise InvalidArgumentError(f"pairs have two labels; got {count}")
            directions = difference_directions(inputs[:, label == 0], inputs[:, label == 1], self.pairs)
        else:
            directions = label_directions(inputs, label)
        space: Preconditioner
        if self.cost == "none":
            space = Identity(inputs.shape[0], inputs.device)
        elif moment is None:
            space = Covariance.from_moment(shrunk_covariance(inputs), 0.0)
        else:
            space = Covariance.from_moment(moment.to(inputs.device), ridge)
        still = inputs.double().mean(1) if self.keep_mean else None
        return erasing_update(weight, directions, space, still)


def tokenized_texts(
    view: ModelView, tokenizer: Any, texts: Sequence[str], prompt_format: PromptFormat | None
) -> list[list[int]]:
    """Token ids of texts; raises RequestError, naming a text that the model cannot take."""
    rows = []
    for number, text in enumerate(texts, 1):
        ids, _ = continuation(tokenizer, text, "", prompt_format)
        why = unknown_token(tokenizer, ids, view.vocabulary) or ("" if ids else "it has no tokens")
        if not why and view.max_length is not None and len(ids) > view.max_length:
            why = f"it has {len(ids)} tokens, the model takes {view.max_length}"
        if why:
            raise RequestError(f"text {number} ({text[:40]!r}): {why}")
        rows.append(ids)
    return rows


def inputs_at_texts(
    view: ModelView, rows: Sequence[Sequence[int]], layer: int, tokens: TextTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [d, n] fp32 of a layer's edited matrix in the model as it is, and the text [n] that each is of.

    Args:
        view: the model.
        rows: token ids of the texts.
        layer: the layer.
        tokens: the "last" token of each text, or "all".
    """
    if tokens not in ("last", "all"):
        raise InvalidArgumentError(f"tokens must be last or all; got {tokens!r}")
    site, keys, owners = Site(layer, "key"), [], []
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    while order:
        count = max(1, BATCH_TOKENS // len(rows[order[-1]]))
        chunk, order = order[-count:], order[:-count]
        batch = pad([rows[place] for place in chunk], view.device)
        spots = [
            (at, position)
            for at, place in enumerate(chunk)
            for position in (range(len(rows[place])) if tokens == "all" else [len(rows[place]) - 1])
        ]
        at, position = torch.tensor(spots, device=view.device).T
        states, _ = capture(view, batch, [site], position, rows=at)
        keys.append(states[site].float())
        owners.append(torch.tensor(chunk)[at.cpu()])
    owner = torch.cat(owners)
    back = torch.argsort(owner, stable=True)
    inputs = torch.cat(keys)[back.to(keys[0].device)]
    return inputs.T, owner[back]
