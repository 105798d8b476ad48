"""A plan on paper: MEMIT edits of Llama-3-70B on eight GPUs, from the formulas of `limits.py` and `kedit-fast plan`.

    python -m benchmarks.paper_plan

Nothing here is measured. The model is never loaded: its shape, on the meta device, is all that the formulas need. Peaks
are those of the maker's data sheet, token counts are assumed (`texts`), and every second is a lower bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.limits import Shape, Texts, Work, works
from kedit_fast.editing.values.batch_size import MOST_ELSEWHERE, SHARE
from kedit_fast.methods.presets import make_hparams
from kedit_fast.reports.plan import ASSUMED_TOKENS, Plan, plan

EDITS = (1, 100, 10000)
GPUS = 8
GPU_BYTES = 80e9
PEAKS = {"bf16": 989e12, "fp64": 67e12, "bytes": 3.35e12}
"""Of an H100 SXM with 80 GB: dense products of tensor cores, flops a second; memory, bytes a second."""
LLAMA_3_70B: dict[str, Any] = {
    "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
ELEMENT = 2
"""Bytes of a bf16 number."""
CONTEXTS = 6
"""The bare prompt and five with a prefix."""
PREFIX = 12
"""Tokens of a prefix, the same for all requests; those of a prompt up to its lookup token are the rest of
ASSUMED_TOKENS."""
TAIL = 6
"""Tokens from the lookup token on, with the target but for its last one."""
TARGET = 2
"""Tokens of a target."""
STATISTICS_TOKENS = 1_000_000
"""Of the text for statistics."""


def texts(edits: int) -> Texts:
    """The tokens of so many requests, by the assumptions above; the bare prompt is as long as those with a prefix less
    the prefix, and "{subject} is a" as a bare prompt up to its lookup token."""
    bare = ASSUMED_TOKENS - PREFIX
    lengths = (bare, *(ASSUMED_TOKENS,) * (CONTEXTS - 1))
    attended = sum(length + place for length in lengths for place in range(TAIL)) + bare
    shared = (CONTEXTS - 1) * PREFIX
    return Texts(
        requests=edits,
        tails=edits * (CONTEXTS * TAIL + 1),
        attended=edits * attended,
        scored=edits * (CONTEXTS * TARGET + 1),
        whole=shared + edits * CONTEXTS * (bare + TAIL - 1),
        until_lookup=shared + edits * CONTEXTS * bare,
    )


@dataclass(frozen=True)
class Placement:
    """What one of the GPUs holds, where consecutive blocks stand on one GPU."""

    weights: int
    """Bytes of its blocks, and of the embedding or the head."""
    originals: int
    """Bytes of the edited matrices' originals and fp32 masters."""
    factors: int
    """Bytes of the Cholesky factors of its edited layers."""
    saved: int
    """Bytes that a request's value needs there while it is optimized."""

    @property
    def fixed(self) -> int:
        """What does not depend on the requests."""
        return self.weights + self.originals + self.factors

    @property
    def batch(self) -> int:
        """Requests that fit beside that, by the share of the free memory that values take."""
        return int(SHARE * max(0.0, GPU_BYTES - self.fixed) // self.saved) if self.saved else MOST_ELSEWHERE


@dataclass(frozen=True)
class PaperPlan:
    """The numbers of one batch."""

    edits: int
    """Requests."""
    layers: tuple[int, ...]
    """Edited ones: by relative depth, as `kedit_fast` guesses where a model has no preset."""
    parameters: int
    """Of the model."""
    works: dict[str, Work]
    """Phase -> flops and bytes."""
    bytes: dict[str, int]
    """What `kedit-fast plan` says is held, over all GPUs and the host."""
    factors: Work
    """Of the Cholesky factors, once for any number of batches; they are part of the solve."""
    statistics: Work
    """Of collecting the statistics, once for any number of batches."""
    placements: dict[int, tuple[Placement, ...]]
    """Bytes of a number in the factors, 8 or 4 -> what each GPU holds."""

    def seconds(self, phase: str) -> float:
        """At the peaks of one GPU: where blocks stand on several GPUs, these take turns."""
        return self.works[phase].seconds(PEAKS["fp64" if phase == "solve" else "bf16"], PEAKS["bytes"])

    def batch(self, size: int) -> int:
        """Requests whose values are optimized together, with factors of numbers of this size; 0 where they do not fit.

        The GPU with the least room decides.
        """
        return min(MOST_ELSEWHERE, self.edits, *(placement.batch for placement in self.placements[size]))


@functools.cache
def _model() -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA_3_70B), dtype=torch.bfloat16)


@functools.cache
def planned(edits: int) -> PaperPlan:
    """The plan of a batch."""
    model = _model()
    config: Any = model.config
    shape, (hparams, _) = Shape.of(config), make_hparams("memit", config)
    sizes: Plan = plan(model, None, edits, "memit")
    layers, d, count = sizes.layers, shape.inner, len(sizes.layers)
    last = layers[-1]
    draft = PaperPlan(
        edits, layers, sum(p.numel() for p in model.parameters()), {}, dict(sizes.bytes),
        Work(count * d**3 / 3, count * 16.0 * d * d),
        Work(
            STATISTICS_TOKENS * (2.0 * shape.block * (last + 1) + count * float(d) * d),
            ELEMENT * shape.block * (last + 1) + count * 8.0 * d * d,
        ),
        {size: tuple(_placement(shape, layers, gpu, size) for gpu in range(GPUS)) for size in (8, 4)},
    )  # fmt: skip
    # The optimizer takes a step less than there are iterations. Weights move once for each batch that runs together.
    steps, batch = hparams.v_num_grad_steps - 1, max(1, draft.batch(4))
    each = works(shape, layers, texts(edits), steps, batch=batch, element=ELEMENT)
    return PaperPlan(**{**vars(draft), "works": each})


def _placement(shape: Shape, layers: Sequence[int], gpu: int, size: int) -> Placement:
    """Of a GPU by number: blocks in equal parts, the embedding with the first, the head with the last."""
    each = shape.layers // GPUS
    blocks = range(gpu * each, (gpu + 1) * each)
    edited = [layer for layer in layers if layer in blocks]
    live = [block for block in blocks if block > layers[-1]]
    # Of a tail token and block: states before and after two norms, queries, keys, values, attention's output, and the
    # gate, the other half and their product. Of a prefix token: keys and values.
    token = ELEMENT * (4 * shape.hidden + 2 * shape.queries + 2 * shape.groups + 3 * shape.inner)
    prefixes = CONTEXTS * ASSUMED_TOKENS - PREFIX
    return Placement(
        weights=ELEMENT * (each * shape.block + (shape.head if gpu in (0, GPUS - 1) else 0)),
        originals=len(edited) * shape.hidden * shape.inner * (ELEMENT + 4),
        factors=len(edited) * size * shape.inner**2,
        saved=len(live) * (texts(1).tails * token + prefixes * ELEMENT * 2 * shape.groups),
    )


def lines() -> list[tuple[str, ...]]:
    """A line a quantity, a column for each of EDITS."""
    plans = [planned(edits) for edits in EDITS]
    one = plans[0]

    def row(name: str, cell: Callable[[PaperPlan], str]) -> tuple[str, ...]:
        return (name, *(cell(each) for each in plans))

    def gigabytes(number: float) -> str:
        return f"{number / 1e9:,.3g} GB"

    def held(name: str) -> tuple[str, ...]:
        return row(f"{name}, in all", lambda each: gigabytes(each.bytes[name]))

    fullest = {size: max(one.placements[size], key=lambda placement: placement.fixed) for size in (8, 4)}
    return [
        row("edited layers", lambda each: f"{each.layers[0]} to {each.layers[-1]}"),
        *(held(name) for name in one.bytes if one.bytes[name]),
        row("on the fullest GPU before any request, factors in fp64", lambda each: gigabytes(fullest[8].fixed)),
        row("the same, factors in fp32", lambda each: gigabytes(fullest[4].fixed)),
        row("a request's value while it is optimized, in all",
            lambda each: gigabytes(sum(placement.saved for placement in each.placements[4]))),
        row("values optimized together, factors in fp32", lambda each: f"{each.batch(4)}"),
        *(row(f"{phase}, flops", lambda each, phase=phase: f"{each.works[phase].flops:.2g}") for phase in one.works),
        row("of the solve, factors (once)", lambda each: f"{each.factors.flops:.2g}"),
        row("statistics of 1,000,000 tokens, flops (once)", lambda each: f"{each.statistics.flops:.2g}"),
        *(row(f"{phase}, seconds at the peak, GPUs in turns", lambda each, phase=phase: f"{each.seconds(phase):.2g}")
          for phase in one.works),
        row("in all, seconds, GPUs in turns", lambda each: f"{sum(map(each.seconds, each.works)):.2g}"),
        row("in all, seconds, all eight at once", lambda each: f"{sum(map(each.seconds, each.works)) / GPUS:.2g}"),
    ]  # fmt: skip


def main() -> None:
    """Print the lines."""
    for line in lines():
        print(" | ".join(line))


if __name__ == "__main__":
    main()
