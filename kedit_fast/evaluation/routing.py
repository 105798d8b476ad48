"""Routing shift: in a text that names no edited subject, how many choices of experts an edit has changed.

A router sends each token to the k experts with the highest scores. An edit of a layer changes the states of all layers
above it, and with them the choices there; the router of the edited layer itself sees what it saw before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.evaluation.asks import Likelihood
from kedit_fast.evaluation.rows import batches, rows_of
from kedit_fast.models.forward import Site, TokenBatch, evaluating, pad, visit
from kedit_fast.models.view import ModelView
from kedit_fast.support.torch_state import plain_torch

MOST_TOKENS = 1024
"""Of the text, at most: each batch of edits costs a pass over them."""
_TEXT_TOKENS, _BATCH_TOKENS = 256, 4096


@dataclass(frozen=True)
class RoutingShift:
    """Choices of experts that are others than in the unedited model.

    Example:
        >>> shift = RoutingShift({2: 1, 3: 3}, tokens=4)  # of four tokens, one changed in layer 2 and three in layer 3
        >>> shift.share
        0.5
    """

    changed: Mapping[int, int]
    """Layer -> tokens whose set of chosen experts is another one; order and gates aside."""
    tokens: int
    """Tokens of the text."""

    @property
    def share(self) -> float:
        """Share of all pairs of a token and a layer whose set of chosen experts is another one."""
        return sum(self.changed.values()) / (self.tokens * len(self.changed))

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        changed = {str(layer): count for layer, count in self.changed.items()}
        return {"share": self.share, "tokens": self.tokens, "changed_by_layer": changed}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> RoutingShift:
        """What `as_dict` returned, also after it went through JSON."""
        return cls({int(layer): count for layer, count in entry["changed_by_layer"].items()}, entry["tokens"])


class RoutingProbe:
    """A text, and the experts that a model has chosen for its tokens when the probe was made: `routing_probe`.

    Args:
        view: a mixture of experts, as it is before the edits.
        rows: token ids of each text, at least one token.
        layers: layers with experts, at least one.

    Cost: a pass over the text, and as much for each `shift`; k numbers of memory a token and layer.
    """

    def __init__(self, view: ModelView, rows: Sequence[Sequence[int]], layers: Sequence[int]):
        self.view, self.rows, self.layers = view, rows, tuple(layers)
        self.tokens = sum(map(len, rows))
        """Tokens of the text."""
        self._before = self.chosen()

    @plain_torch()
    def chosen(self) -> dict[int, torch.Tensor]:
        """Layer -> the experts [tokens, k] int32 of every token in the model as it is now, each row in rising order."""
        parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.layers}
        sites = [Site(layer, "key") for layer in self.layers]
        with evaluating(self.view):
            for chunk in batches(range(len(self.rows)), lambda i: len(self.rows[i]), _BATCH_TOKENS):
                batch = pad([self.rows[i] for i in chunk], self.view.device)
                visit(self.view, batch, sites, _collector(batch, parts))
        return {layer: torch.cat(chosen) for layer, chosen in parts.items()}

    def shift(self) -> RoutingShift:
        """The choices of the model as it is now against those when the probe was made."""
        now = self.chosen()
        changed = {layer: int((now[layer] != before).any(1).sum()) for layer, before in self._before.items()}
        return RoutingShift(changed, self.tokens)


def _collector(batch: TokenBatch, parts: Mapping[int, list[torch.Tensor]]) -> Callable[[Site, Any], None]:
    """What `visit` calls: it adds to `parts` the experts of the tokens of a batch, without those of padding."""
    assert batch.attention_mask is not None
    real = batch.attention_mask.bool().flatten()

    def see(site: Site, entering: Any) -> None:
        chosen = entering.index[real.to(entering.index.device)]
        parts[site.layer].append(chosen.sort(1).values.to("cpu", torch.int32))

    return see


def routing_probe(view: ModelView, tokenizer: Any, texts: Sequence[str], above: int | None) -> RoutingProbe | None:
    """A probe of what an edit of a mixture of experts does to the routing of a text.

    Args:
        view: the model, as it is before the edits.
        tokenizer: its tokenizer.
        texts: that name no edited subject; the first ones are used, up to `MOST_TOKENS` tokens. One that the model
            cannot take is passed over.
        above: the lowest edited layer; None where it is not known, for all layers.

    Returns:
        the probe; None where no layer above has experts, or no text has tokens.

    Example:
        >>> routing_probe(ModelView(model), tokenizer, texts, above=0) is None  # this model has no experts
        True
    """
    first = 0 if above is None else above + 1
    layers = [layer for layer in view.editable if layer >= first and view.experts(layer) is not None]
    if not layers:
        return None
    asks = [Likelihood(text, min(_TEXT_TOKENS, view.max_length)) for text in texts]
    rows, left = [], MOST_TOKENS
    for row in rows_of(view, tokenizer, asks)[0].values():
        if left > 0:
            rows.append(row.prompt[:left])
            left -= len(rows[-1])
    return RoutingProbe(view, rows, layers) if rows else None
