"""Time the statistics of five layers against the published loop, and hold them to fp64.

    python -m benchmarks.second_moments [--only TEXT] [--tokens N] [--json FILE] [--device cuda]

The published loop (benchmarks/published.py) makes a pass over the corpus for each layer, with its length collation and
`a.T @ a` in fp32, on text that is tokenized already. Ours makes one pass, its tokenization included. All sides run in
turns in one process on the same documents; "bfloat16" rows are a bf16 model against the published fp32 one, since that
is what it loads: dtypes differ. Nothing is timed before our moments agree with fp64 sums over the same rows.

`compare` and `markdown` of benchmarks.run read the rows.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import published
from benchmarks.harness import (
    Row,
    document_of,
    fail_on_wrong_results,
    isa,
    measured_peaks,
    provenance,
    require_clean,
    save,
    synchronize,
    timing,
    title_of,
    with_baseline,
)
from benchmarks.values import forget_peak, peak_bytes
from kedit_fast import collect_statistics, demo
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype
from kedit_fast.statistics.collect import Job
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.memory_plan import Group

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=200, highlight=False)
BATCH_TOKENS, PUBLISHED_BATCH_TOKENS, MAX_LENGTH = 4096, 3 * 1024, 1024
ERROR_LIMIT = 1e-6  # of a moment, relative Frobenius, against fp64 sums of the same rows
FLOORS = {"float32": (2.5, 3.2), "bfloat16": (7.0, 10.0)}  # and goals; without bf16 units both are fp32's


@dataclass(frozen=True)
class Shape:
    """A model and how much text it is given."""

    name: str
    layers: tuple[int, ...]
    tokens: int
    pieces: int
    """Most pieces of text, of 40 tokens each, that a document is joined from."""
    config: dict[str, Any] | None = None
    """Arguments of the configuration; None for the demo model."""

    def model(self, dtype: torch.dtype, device: str) -> Any:
        if self.config is None:
            return demo.load()[0].to(device, dtype)
        torch.manual_seed(0)
        config = AutoConfig.for_model(**self.config)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config).to(dtype).eval()


SHAPES = (
    Shape("demo model, d 768", (0, 1, 2, 3, 4), 30_000, 6),
    Shape("GPT-2-small shape, random weights, d 3072", (3, 4, 5, 6, 7), 8_192, 24, dict(model_type="gpt2")),
    Shape(
        "Llama-3.2-1B shape cut to 9 blocks, random weights, d 8192", (4, 5, 6, 7, 8), 4_096, 24,
        dict(model_type="llama", hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
             num_key_value_heads=8, head_dim=64, num_hidden_layers=9, vocab_size=128256, tie_word_embeddings=True,
             max_position_embeddings=8192),
    ),
)  # fmt: skip


class ExactSum:
    """What an accumulator is given, summed in fp64."""

    def __init__(self, size: int, device: torch.device):
        self.device = device
        self.sum, self.count = torch.zeros(size, size, dtype=torch.float64, device=device), 0

    def update(self, rows: torch.Tensor, mask=None, weights=None, totals=None) -> None:
        rows = (rows if mask is None else rows[mask]).double()
        self.sum.addmm_(rows.T, rows)
        self.count += len(rows)

    def flush(self) -> None:
        """Nothing waits."""


def documents(tokenizer: Any, shape: Shape) -> list[str]:
    """Documents of many lengths, with `shape.tokens` tokens in all, the last one cut by the budget."""
    rng, parts, total, texts = random.Random(0), itertools.cycle(demo.corpus(4000)), 0, []
    while total < shape.tokens:
        texts.append(" ".join(next(parts) for _ in range(rng.randint(1, shape.pieces))))
        total += len(tokenizer(texts[-1], truncation=True, max_length=MAX_LENGTH)["input_ids"])
    return texts


def sequences_of(tokenizer: Any, texts: Sequence[str], tokens: int, max_length: int) -> list[list[int]]:
    sequences, left = [], tokens
    for text in texts:
        sequences.append(tokenizer(text, truncation=True, max_length=max_length)["input_ids"][:left])
        left -= len(sequences[-1])
    return [ids for ids in sequences if ids]


def errors_of(model: Any, tokenizer: Any, texts: Sequence[str], shape: Shape) -> tuple[float, dict[int, torch.Tensor]]:
    """The worst layer's error against fp64 sums of the same rows, and our moments."""
    ours = collect_statistics(
        model, tokenizer, texts, shape.layers, max_tokens=shape.tokens, batch_tokens=BATCH_TOKENS, progress=False
    )
    job = Job(model, tokenizer, Corpus(texts, shape.tokens), shape.layers, BATCH_TOKENS)
    worst = 0.0
    for layer in shape.layers:  # one at a time: a sum of the largest takes half a gigabyte
        accumulator = job.accumulators(Group((layer,), False))[layer]
        exact = {layer: ExactSum(len(accumulator.sum), accumulator.device)}
        job.run(exact)
        expected = exact[layer].sum / exact[layer].count
        worst = max(worst, float((ours.moment(layer).moment - expected).norm() / expected.norm()))
    return worst, {layer: second.moment for layer, second in ours.layers.items()}


def forward_flops(view: ModelView, shape: Shape) -> int:
    """Of the matrix products of one pass, attention scores left out."""
    last = shape.layers[-1]
    weights = sum(p.numel() for layer in range(last + 1) for p in view.block(layer).parameters() if p.ndim == 2)
    return 2 * (weights - view.weight(last).numel()) * shape.tokens


def gap_of(moments: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> float:
    return max(float((moments[n].double() - other[n].double()).norm() / other[n].double().norm()) for n in moments)


def rows_of(shape: Shape, runs: int, device: str, peaks: Row) -> list[Row]:
    """Ours in fp32 and bf16, and the published loop, in turns."""
    _, tokenizer = demo.load()
    texts = documents(tokenizer, shape)
    models = {name: shape.model(getattr(torch, name), device) for name in FLOORS}
    views = {name: ModelView(model) for name, model in models.items()}
    length = min(MAX_LENGTH, views["float32"].max_length)
    sequences = sequences_of(tokenizer, texts, shape.tokens, length)

    def theirs() -> dict[int, torch.Tensor]:
        moments = {}
        for layer in shape.layers:
            module = views["float32"].edited_module(layer)
            total, count = published.layer_moment(models["float32"], module, sequences, PUBLISHED_BATCH_TOKENS)
            moments[layer] = total / count
        return moments

    def ours(name: str) -> None:
        collect_statistics(
            models[name], tokenizer, texts, shape.layers, max_tokens=shape.tokens, batch_tokens=BATCH_TOKENS,
            progress=False,
        )  # fmt: skip

    calls = {"published": theirs, **{name: (lambda name=name: ours(name)) for name in FLOORS}}
    checked = {name: errors_of(models[name], tokenizer, texts, shape) for name in FLOORS}
    references, peak = {}, {}
    for name, call in calls.items():  # the warm-up
        forget_peak(device)
        before = peak_bytes(device)
        references[name] = call()
        after = peak_bytes(device)
        peak[name] = None if after is None or before is None else after - before
    gaps = {name: gap_of(moments, references["published"]) for name, (_, moments) in checked.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    good = [name for name in FLOORS if checked[name][0] <= ERROR_LIMIT]
    for _ in range(runs):
        for name in ("published", *good):
            begin = time.perf_counter()
            calls[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - begin)
    measured = []
    for name in FLOORS:
        computed = computing_dtype(models[name])
        floor, goal = FLOORS["float32" if computed == torch.float32 else name]
        sums = sum(shape.tokens * views[name].weight(layer).shape[1] * (views[name].weight(layer).shape[1] + 1)
                   for layer in shape.layers)  # fmt: skip
        flops = forward_flops(views[name], shape) + sums
        case = f"{shape.name}, {len(shape.layers)} layers, {shape.tokens} tokens, {name}"
        row = {
            "op": "collect_statistics", "case": case,
            "dtype": name, "backend": "cpu" if device == "cpu" else "triton",
            "isa": isa("cpu", "symmetric_rank_k_update_", name, device), "error": checked[name][0],
            "error_limit": ERROR_LIMIT, "flops": flops, "bytes": None, "share_of_peak": None, "floor": floor,
            "goal": goal, "tokens": shape.tokens, "sum_flops": sums, "peak_bytes": peak[name],
            "published_peak_bytes": peak["published"], "gap_to_published": gaps[name],
            "note": f"fp32 published loop, {gaps[name]:.0e} from its moments"
            + ("" if name == "float32" else "; dtypes differ" if computed != torch.float32 else
               "; a bf16 model computed in fp32, for want of bf16 units"),
        }  # fmt: skip
        if name not in good:
            measured.append({**row, "baseline": "published layer_stats, a pass a layer, fp32", "ratio": None})
            continue
        row |= timing(times[name])
        rate = peaks["fp32_flops_per_s" if computed == torch.float32 else "bf16_flops_per_s"]
        row["share_of_peak"] = flops / rate / row["median_s"]
        row["tokens_per_s"] = shape.tokens / row["median_s"]
        measured.append(with_baseline(row, "published layer_stats, a pass a layer, fp32", times["published"]))
    return measured


def show(rows: list[Row], origin: Row) -> None:
    columns = ("case", "s", "tokens/s", "published s", "ratio", "floor", "goal", "of peak", "MiB (published)", "error")
    table = Table(*columns, title=title_of(origin))
    for row in rows:
        if row["ratio"] is None:
            table.add_row(row["case"], "wrong result", "", "", "", "", "", "", "", f"{row['error']:.1e}")
            continue
        memory = "" if row["peak_bytes"] is None else (
            f"{row['peak_bytes'] / 2**20:.0f} ({row['published_peak_bytes'] / 2**20:.0f})"
        )  # fmt: skip
        table.add_row(
            row["case"], f"{row['median_s']:.3g}", f"{row['tokens_per_s']:.0f}", f"{row['baseline_median_s']:.3g}",
            f"{row['ratio']:.2f}", str(row["floor"]), str(row["goal"]), f"{row['share_of_peak']:.0%}", memory,
            f"{row['error']:.1e}",
        )  # fmt: skip
    console.print(table)


@app.command()
def run(
    only: Annotated[str, typer.Option(help="shapes whose name has this in it")] = "",
    tokens: Annotated[int | None, typer.Option(min=100, help="fewer tokens, to try")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    runs: Annotated[int, typer.Option(min=2, help="interleaved runs of each")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Time, print, and write the rows to a file when asked, after every shape."""
    logging.getLogger("kedit_fast").setLevel(logging.ERROR)  # moments of few tokens are singular, on purpose
    origin = provenance(device)
    require_clean(json_file, origin)
    peaks, rows = measured_peaks(device), []
    for shape in SHAPES:
        if only not in shape.name:
            continue
        if tokens is not None:
            shape = Shape(shape.name, shape.layers, tokens, shape.pieces, shape.config)
        rows += rows_of(shape, runs, device, peaks)
        save(json_file, document_of(rows, origin, peaks))
    show(rows, origin)
    fail_on_wrong_results(rows)


if __name__ == "__main__":
    app()
