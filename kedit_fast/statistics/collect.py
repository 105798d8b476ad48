"""One forward pass over a corpus for the second moments of all layers asked for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from kedit_fast.errors import StatisticsError
from kedit_fast.models.architectures import ArchSpec, ModelView
from kedit_fast.models.fingerprint import fingerprint
from kedit_fast.models.forward import Site, capture, evaluating, pad
from kedit_fast.statistics.moments import SecondMoment, SecondMomentAccumulator

_log = logging.getLogger("kedit_fast")


@dataclass(frozen=True)
class Statistics:
    """Second moments by layer, with what they belong to."""

    layers: dict[int, SecondMoment]
    model: dict[str, str]  # fingerprint of model and tokenizer
    corpus: str  # SHA-256 of the token ids, in order
    max_length: int  # tokens a sequence is cut to
    dtype: str  # the model's dtype while it ran

    def moment(self, layer: int) -> SecondMoment:
        """The second moment of one layer; raises StatisticsError when it was not collected."""
        if layer not in self.layers:
            have = ", ".join(map(str, sorted(self.layers)))
            raise StatisticsError(f"no statistics for layer {layer}: they were collected for layers {have}")
        return self.layers[layer]


def collect_statistics(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    max_tokens: int | None = None,
    max_length: int = 1024,
    batch_tokens: int = 4096,
    progress: bool = True,
    spec: ArchSpec | None = None,
) -> Statistics:
    """Second moments of the inputs of the edited linear layers over a corpus.

    Args:
        model: a causal language model of a known architecture; runs in its own dtype, nothing in it changes.
        tokenizer: its tokenizer; special tokens it adds by itself count, padding does not.
        texts: documents, each one sequence.
        layers: zero-based layers.
        max_tokens: stop after this many tokens; None for all.
        max_length: sequences are cut to this many tokens (and to what the model takes).
        batch_tokens: tokens of a batch, padding included; sequences of like length share one.
        progress: show a bar on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Returns:
        Statistics, fp64 moments on the model's device.

    Raises:
        StatisticsError: no text, or moments that are not finite.

    Cost: one pass through the blocks up to the last layer, and tokens * d (d + 1) flops a layer.
    """
    view = ModelView(model, spec)
    layers = view.check_layers(tuple(layers))
    max_length = min(max_length, view.max_length)
    sequences, digest = _tokenise(tokenizer, texts, max_length, max_tokens)
    total = sum(map(len, sequences))
    if total == 0:
        raise StatisticsError("the corpus has no text")
    sums = {}
    for layer in layers:
        weight = view.weight(layer)
        sums[layer] = SecondMomentAccumulator(view.module_name(layer), weight.shape[1], weight.device)
        if total < weight.shape[1]:
            _log.warning(
                "%d tokens for second moments of dimension %d: they are singular, use more text", total, weight.shape[1]
            )
    bar = tqdm(total=total, unit="tok", unit_scale=True, desc="statistics", disable=not progress, leave=False)
    with evaluating(view), bar:
        for rows in _batches(sequences, batch_tokens):
            batch = pad(rows, view.device)
            seen, _ = capture(view, batch, [Site(layer, "key") for layer in layers])
            mask = batch.attention_mask.bool().flatten()
            for layer in layers:
                states = seen[Site(layer, "key")].flatten(0, 1)  # [R T, d]
                sums[layer].update(states, None if bool(mask.all()) else mask.to(states.device))
            bar.update(sum(map(len, rows)))
    return Statistics(
        layers={layer: accumulator.result() for layer, accumulator in sums.items()},
        model=fingerprint(view, tokenizer),
        corpus=digest,
        max_length=max_length,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _tokenise(tokenizer: Any, texts: Iterable[str], max_length: int, max_tokens: int | None):
    sequences: list[list[int]] = []
    digest, total = hashlib.sha256(), 0
    for text in texts:
        if max_tokens is not None and total >= max_tokens:
            break
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if max_tokens is not None:
            ids = ids[: max_tokens - total]
        if ids:
            digest.update(repr(ids).encode())
            sequences.append(ids)
            total += len(ids)
    return sequences, digest.hexdigest()[:32]


def _batches(sequences: list[list[int]], batch_tokens: int):
    """Sequences by length, as many together as `batch_tokens` holds once padded; longest first."""
    rows: list[list[int]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if rows and len(rows[0]) * (len(rows) + 1) > batch_tokens:
            yield rows
            rows = []
        rows.append(sequence)
    if rows:
        yield rows
