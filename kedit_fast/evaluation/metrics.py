"""Efficacy, paraphrase and neighborhood of edit requests on the model as it is now.

efficacy, paraphrase: share of prompts with every token of `target_new` the argmax. efficacy_success: share of requests
with a higher mean token log-probability of `target_new` than of `target_true`. neighborhood: share of neighborhood
prompts with every token of `target_true` the argmax. All are fractions in [0, 1]; None where no request has the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kedit_fast.editing.prompts import open_ended, target_tokens
from kedit_fast.editing.requests import EditRequest
from kedit_fast.errors import RequestError
from kedit_fast.models.architectures import ArchSpec, ModelView
from kedit_fast.models.forward import evaluating, last_hidden, pad
from kedit_fast.ops import target_log_probs

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Metrics:
    """Means over requests and prompts."""

    efficacy: float
    efficacy_success: float | None
    paraphrase: float | None
    neighborhood: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The metrics by name."""
        return asdict(self)


@dataclass(frozen=True)
class Continuation:
    """How the model sees a target after a prompt."""

    argmax: bool  # every target token is the most probable one
    log_prob: float  # mean over the target's tokens


def evaluate(
    model: torch.nn.Module, tokenizer: Any, requests: Sequence[EditRequest], spec: ArchSpec | None = None
) -> Metrics:
    """Measure requests on `model`; nothing in it changes.

    Cost: one forward pass over every prompt with its target, in batches by length; the head on target rows alone.
    """
    view = ModelView(model, spec)
    pairs: list[tuple[str, str]] = []
    uses: dict[str, list[int]] = {"new": [], "true": [], "paraphrase": [], "neighborhood": []}

    def ask(use: str, prompt: str, target: str) -> None:
        uses[use].append(len(pairs))
        pairs.append((prompt, target))

    compared = []
    for request in requests:
        if request.target_true is not None:
            compared.append(len(uses["new"]))
            ask("true", request.text, request.target_true)
        ask("new", request.text, request.target_new)
        for text in request.paraphrase_prompts:
            ask("paraphrase", text, request.target_new)
        for text in request.neighborhood_prompts if request.target_true is not None else ():
            ask("neighborhood", text, request.target_true)
    seen = score(view, tokenizer, pairs)
    new = [seen[i] for i in uses["new"]]
    true = [seen[i] for i in uses["true"]]
    success = [new[i].log_prob > old.log_prob for i, old in zip(compared, true, strict=True)]
    return Metrics(
        efficacy=_share([c.argmax for c in new]) or 0.0,
        efficacy_success=_share(success),
        paraphrase=_share([seen[i].argmax for i in uses["paraphrase"]]),
        neighborhood=_share([seen[i].argmax for i in uses["neighborhood"]]),
    )


def score(view: ModelView, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
    """How the model sees each (prompt, target)."""
    rows = []
    for prompt, target in pairs:
        ids = open_ended(tokenizer, tokenizer(prompt)["input_ids"], 1)
        rows.append((ids, target_tokens(tokenizer, prompt, target)))
        if not ids:
            raise RequestError(f"the prompt {prompt!r} has no tokens")
        if len(ids) + len(rows[-1][1]) - 1 > view.max_length:
            raise RequestError(
                f"{len(ids) + len(rows[-1][1]) - 1} tokens with target in a prompt that begins {prompt[:40]!r}, "
                f"the model takes {view.max_length}"
            )
    found: list[Continuation | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]), reverse=True)
    with evaluating(view), torch.no_grad():
        while order:
            longest = len(rows[order[0]][0]) + len(rows[order[0]][1])
            count = max(1, BATCH_TOKENS // longest)
            chunk, order = order[:count], order[count:]
            for i, continuation in zip(chunk, _score_batch(view, [rows[i] for i in chunk]), strict=True):
                found[i] = continuation
    return [c for c in found if c is not None]


def _score_batch(view: ModelView, rows: Sequence[tuple[list[int], tuple[int, ...]]]) -> list[Continuation]:
    hidden = last_hidden(view, pad([(*ids, *target[:-1]) for ids, target in rows], view.device))
    where = [(r, len(ids) - 1 + t) for r, (ids, target) in enumerate(rows) for t in range(len(target))]
    index = torch.tensor(where, device=hidden.device)
    targets = torch.tensor([token for _, target in rows for token in target], device=view.head.device)
    states = hidden[index[:, 0], index[:, 1]].to(view.head.device)
    scored = target_log_probs(states, view.head, targets, view.head_bias, view.softcap, return_top1=True)
    assert scored.top1 is not None
    lengths = [len(target) for _, target in rows]
    log_probs = scored.log_prob.cpu().split(lengths)
    hits = (scored.top1 == targets).cpu().split(lengths)
    return [Continuation(bool(h.all()), float(p.mean())) for h, p in zip(hits, log_probs, strict=True)]


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
