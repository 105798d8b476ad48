"""Keys: what the edited linear layer receives at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kedit_fast.editing.prompts import PreparedRequest
from kedit_fast.models.architectures import ModelView
from kedit_fast.models.forward import Site, capture, evaluating, pad

ROWS = 256  # prompts of one forward pass


@dataclass(frozen=True)
class KeysAndOutputs:
    """What one pass over the prompts of a batch shows."""

    keys: torch.Tensor  # [d, u] weighted over contexts, fp64
    bare_keys: torch.Tensor  # [d, u] of the bare prompts alone, fp64
    outputs: torch.Tensor  # [h, u] of the value's site at the bare prompts, fp64


def keys_and_outputs(
    view: ModelView, prepared: Sequence[PreparedRequest], layer: int, site: Site, weights: str
) -> KeysAndOutputs:
    """Keys at `layer` and outputs at `site` for a batch of requests, at the subject's last token.

    Args:
        view: the model, as it is now.
        prepared: u requests.
        layer: whose linear layer the keys enter.
        site: where the value lives.
        weights: "bare_half": half the bare prompt plus half the mean of the prefixed ones (MEMIT);
            "mean": the plain mean of all contexts (ROME).

    Cost: one pass over u * contexts prompts, cut after the subject, through the blocks up to the site.
    """
    contexts = len(prepared[0].rewriting)
    prompts = [prompt.cut() for request in prepared for prompt in request.rewriting]
    sites = [Site(layer, "key"), site]
    keys, outputs = [], []
    with evaluating(view):
        for begin in range(0, len(prompts), ROWS):
            chunk = prompts[begin : begin + ROWS]
            positions = torch.tensor([prompt.lookup for prompt in chunk])
            seen, _ = capture(view, pad([prompt.ids for prompt in chunk], view.device), sites, positions)
            keys.append(seen[sites[0]].double())
            outputs.append(seen[site].double())
    all_keys = torch.cat(keys).unflatten(0, (len(prepared), contexts))  # [u, contexts, d]
    bare = all_keys[:, 0]
    if weights == "mean" or contexts == 1:
        mixed = all_keys.mean(1)
    else:
        mixed = (bare + all_keys[:, 1:].mean(1)) / 2
    bare_outputs = torch.cat(outputs).unflatten(0, (len(prepared), contexts))[:, 0]
    return KeysAndOutputs(mixed.T.contiguous(), bare.T.contiguous(), bare_outputs.T.contiguous())


def collisions(keys: torch.Tensor, above: float = 0.99) -> list[tuple[int, int]]:
    """Pairs of columns of `keys` [d, u] whose cosine is above a bound: requests that pull on the same key."""
    unit = torch.nn.functional.normalize(keys, dim=0)
    pairs = torch.nonzero(torch.triu(unit.T @ unit, 1) > above)
    return [(int(i), int(j)) for i, j in pairs]
