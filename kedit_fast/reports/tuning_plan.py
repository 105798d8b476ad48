"""What methods that tune a matrix need: bytes while they tune and while a memory answers, products, and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.editing.editor import Editor
from kedit_fast.editing.tuning.wise import TOGETHER
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype, copy_bytes
from kedit_fast.reports.trials import without_warnings
from kedit_fast.requests.prompts import PreparedRequest

STEPS = (1, 4)
"""Steps of the two trial runs; their difference is the time of a step."""
NEVER = -1.0
"""A loss that no request reaches: trials take all their steps."""


@dataclass(frozen=True)
class RoutingCost:
    """What a memory costs where it answers, beside the module's own product W_0 x."""

    memories: int
    """Matrices, features or keys among which a sequence is routed after all edits, at most."""
    bytes: int
    """Of the memory, at most."""
    prompt_products: float
    """Products of a matrix as large as the module's, for each token of a prompt, that decide the route."""
    token_products: float
    """The same for each token of a sequence that an edit answers, prompt and generated; 0 for all others."""
    sequence_bytes: int
    """Bytes of the memory that are read once for a sequence, when it begins."""


def memory_count(hparams: Hparams, edits: int) -> int:
    """Tuned copies of the matrix that WISE's router chooses among after so many edits."""
    saved = edits // hparams.save_freq
    merges, rest = divmod(edits, hparams.merge_freq)
    shards = merges + rest // hparams.save_freq if hparams.retrieve else rest // hparams.save_freq + bool(merges)
    open_one = bool(edits % hparams.save_freq) or not saved
    return shards + open_one


def routing_cost(view: ModelView, recipe: Recipe, hparams: Hparams, edits: int) -> RoutingCost | None:
    """What the memory of a method costs; None where edits go into the weights."""
    tuning = recipe.tuning
    assert tuning is not None
    weight = view.weight(hparams.layers[0])
    out, d = weight.shape
    if tuning.router == "activation":
        count = memory_count(hparams, edits)
        return RoutingCost(count, count * (out * d * weight.element_size() + 4), count, 1.0, 0)
    if tuning.router == "fingerprint":
        book = edits * -(-d // 8)
        features = hparams.top_k or max(1, round(hparams.top_share * d))
        return RoutingCost(edits, 4 * out * d + book + 12 * d, 0.0, features / d, book)
    if tuning.router == "nearest key":
        size = max(4, weight.element_size())
        return RoutingCost(edits, size * edits * (d + out + 1), 0.0, 0.0, size * edits * (d + 1))
    return None


def tuning_bytes(view: ModelView, recipe: Recipe, hparams: Hparams, edits: int, tokens: int) -> dict[str, int]:
    """Bytes by what they hold; `tokens` of the rows of one request."""
    tuning = recipe.tuning
    assert tuning is not None
    weight = view.weight(hparams.layers[0])
    (out, d), size = weight.shape, weight.element_size()
    wide, matrix = max(4, size), out * d
    passes = computing_dtype(view.base, meta_is_cpu=True).itemsize
    routing = routing_cost(view, recipe, hparams, edits)
    captured = min(edits, TOGETHER) if routing is not None else edits
    sizes = {"weights": sum(parameter.nbytes for parameter in view.model.parameters())}
    if copies := copy_bytes(view.base):
        sizes["their copies in float32, during a pass"] = copies
    if tuning.steps_weight:
        sizes["captured inputs and outputs"] = captured * tokens * (d * passes + out * (wide + passes))
        sizes["tuned matrix"] = matrix * (wide + (size if size == 2 else 0))
        if tuning.optimizer == "adam":
            sizes["optimizer"] = 2 * wide * matrix
        if tuning.mask == "entries":
            sizes["entry mask"] = -(-matrix // 8)
        if hparams.constrains_curvature:
            sizes["statistics of inputs and outputs, decomposed"] = 2 * 8 * (d * d + out * out)
    else:
        sizes["keys and values"] = edits * 8 * (d + 2 * out)
    if routing is None:
        layers = len(hparams.layers) if tuning.locates_layers else 1
        sizes["originals and masters"] = layers * matrix * (size + (4 if size == 2 else 0))
        sizes["update"] = layers * wide * matrix
    else:
        sizes["memory"] = routing.bytes
    return sizes


def tuning_seconds(
    model: torch.nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    hparams: Mapping[str, Any],
    steps: int,
    prepared: Sequence[PreparedRequest],
    edits: int,
    options: Mapping[str, Any],
) -> dict[str, float]:
    """Seconds by phase if no request stopped early, from trials that are undone bit for bit.

    Args:
        model, tokenizer: as in `Editor`.
        recipe: the method.
        hparams: overrides of its hyper-parameters, the layers among them.
        steps: of a request, or epochs.
        prepared: the requests of the trial.
        edits: how many there will be.
        options: further arguments of `Editor`.
    """
    never_stopping = (
        {**hparams, "stop_loss": NEVER} if recipe.tuning and recipe.tuning.stop != "used up" else {**hparams}
    )

    def phases(count: int, some: Sequence[PreparedRequest]) -> dict[str, float]:
        trial = {**never_stopping, "num_steps": count}
        trial.pop("curvature_energy", None)  # a constraint needs statistics, and costs little beside a pass
        editor = Editor(model, tokenizer, recipe.name, hparams=trial, **options)
        try:
            with without_warnings():  # nothing is learned in so few steps
                return editor.edit(some).seconds
        finally:
            editor.restore()

    u, half = len(prepared), -(-len(prepared) // 2)
    phases(STEPS[0], prepared[:half])  # warm-up
    fewer, short, long = (phases(STEPS[0], prepared[:half]), *(phases(count, prepared) for count in STEPS))
    result = {}
    for name in short:
        step = max(0.0, long[name] - short[name]) / (STEPS[1] - STEPS[0]) / u
        # What a request costs beside its steps, and what a call costs whatever its requests.
        request = max(0.0, short[name] - fewer[name]) / (u - half) - STEPS[0] * step if u > half else 0.0
        call = max(0.0, short[name] - u * (max(0.0, request) + STEPS[0] * step))
        result[name] = call + edits * (max(0.0, request) + steps * step)
    return {name: round(spent, 3) for name, spent in {**result, "total": sum(result.values())}.items()}
