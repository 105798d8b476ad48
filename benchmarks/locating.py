"""Time what locates facts against the published algorithms.

    python -m benchmarks.locating tracing [--only demo|gpt2] [--runs 5] [--json FILE]

Causal tracing of prompts of the demo model, and of a random model of GPT-2 small's shape, whose prompts are token ids:
12 tokens, a subject of 3 behind the first. Blocks, and MLPs and attentions in windows of 10 layers, with 10 samples.
Ours is the whole call: all checks of the model, all prompts and kinds. The baseline is the published loop
(`published_locating.py`), a pass of 11 whole rows for each token and layer, the head at all tokens.

Before anything is timed, the numbers are compared; a wrong result has no ratio. Runs are in turns. Where the loop would
take too long it runs for some of the cells, others in each run, and its time is multiplied: it runs them one after
another, so it has no economies of scale. Times are of the wall; `cpu_ratio` is that of processor time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import (
    Row,
    document_of,
    fail_on_wrong_results,
    in_turns,
    provenance,
    require_clean,
    save,
    timing,
    title_of,
    with_baseline,
)
from benchmarks.published_locating import published_trace
from kedit_fast import demo
from kedit_fast.locating.traced_prompts import TracedPrompt, traced_prompts
from kedit_fast.locating.tracing import KINDS, SAMPLES, WINDOW, Trace, subject_noise, trace
from kedit_fast.models.forward import Site, module_at
from kedit_fast.models.restoring import RestoredKind
from kedit_fast.models.view import ModelView

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=180, highlight=False)
TRACING_LIMIT = 1e-5
"""Of the largest difference of a probability, as a share of the largest effect of its prompt and kind. Both sides are
in fp32, and in the demo model each is up to 9e-7 from what fp64 gives."""
BASELINE = "published loop, a pass a cell"


Cells = dict[tuple[int, RestoredKind], list[tuple[int, int]]]
"""By prompt and kind, the (token, layer) of each cell."""


@dataclass
class Subject:
    """A model with prompts."""

    title: str
    model: Any
    prompts: list[TracedPrompt]
    noise: float
    floor: float
    goal: float

    def modules(self, kind: RestoredKind) -> list[torch.nn.Module]:
        """What is restored in each layer."""
        view = ModelView(self.model)
        return [module_at(view, Site(layer, kind)) for layer in range(view.num_layers)]


def subject(name: str, prompts: int) -> Subject:
    """The demo model with its requests, or a random one of GPT-2 small's shape with random tokens."""
    if name == "demo":
        model, tokenizer = demo.load()
        requests = demo.requests(prompts)
        noise = subject_noise(model, tokenizer, [request.subject or "" for request in requests])
        return Subject("demo model", model, traced_prompts(tokenizer, requests), noise, 5.0, 10.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")).eval()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(50000, (prompts, 12), generator=generator).tolist()
    made = [TracedPrompt(tuple(row), (1, 4), None, f"prompt {i + 1}") for i, row in enumerate(rows)]
    return Subject("GPT-2-small shape, random weights", model, made, 0.1, 2.5, 4.0)


def ours(on: Subject) -> list[Trace]:
    """All prompts and kinds in one call."""
    return trace(on.model, None, on.prompts, noise=on.noise)


def cells_of(on: Subject, each: int, run: int = 0) -> Cells:
    """By prompt and kind, `each` cells spread over all of them, others in each run; 0 for all."""
    layers = len(on.modules("block"))
    chosen = {}
    for p, prompt in enumerate(on.prompts):
        every = [(token, layer) for token in range(len(prompt.ids)) for layer in range(layers)]
        for k, kind in enumerate(KINDS):
            count = min(each or len(every), len(every))
            step = len(every) / count
            begin = (run * 7 + p * 3 + k) % len(every)
            chosen[p, kind] = [every[int(begin + j * step) % len(every)] for j in range(count)]
    return chosen


def published(on: Subject, cells: Cells) -> dict[tuple[int, str], torch.Tensor]:
    """The scores of these cells by the published loop."""
    modules = {kind: on.modules(kind) for kind in KINDS}
    results = {}
    for (p, kind), some in cells.items():
        prompt = on.prompts[p]
        results[p, kind] = published_trace(
            on.model, modules[kind], prompt.ids, prompt.subject, kind, on.noise, WINDOW, SAMPLES, cells=some
        ).scores
    return results


def error_of(on: Subject, each: int) -> float:
    """The largest difference of a probability over some cells, as a share of the largest effect: a random model's
    probabilities are small."""
    traces = {(i // len(KINDS), one.kind): one for i, one in enumerate(ours(on))}
    worst = 0.0
    for key, scores in published(on, cells_of(on, each)).items():
        known = ~scores.isnan()
        one = traces[key]
        differences = (one.probabilities[known] - scores[known]).abs()
        worst = max(worst, float(differences.max() / one.effects.abs().max()))
    return worst


def tracing_row(on: Subject, each: int, runs: int) -> Row:
    """Ours on all cells, the published loop on `each` of every prompt and kind (0: all)."""
    total = sum(len(prompt.ids) for prompt in on.prompts) * len(on.modules("block")) * len(KINDS)
    timed = sum(len(some) for some in cells_of(on, each).values())
    row: Row = {
        "op": "trace", "case": f"{on.title}, {len(on.prompts)} prompts, {total:,} cells", "dtype": "float32",
        "backend": "torch", "isa": torch.backends.cpu.get_cpu_capability().lower(), "error": error_of(on, each),
        "error_limit": TRACING_LIMIT, "flops": None, "bytes": None, "share_of_peak": None, "floor": on.floor,
        "goal": on.goal,
        "note": "" if timed == total
        else f"baseline timed on {timed:,} of the {total:,} cells, others in each run; scaled",
    }  # fmt: skip
    if not row["error"] <= TRACING_LIMIT:
        return {**row, "baseline": BASELINE, "ratio": None}
    mine, theirs = in_turns([lambda run: ours(on), lambda run: published(on, cells_of(on, each, run))], runs)
    # A call of the loop has one pass more for each prompt and kind, the one with nothing restored.
    extra = len(on.prompts) * len(KINDS)
    scale = (total + extra) / (timed + extra)
    wall, cpu = ([seconds * scale for seconds in part] for part in theirs)
    row |= timing(mine[0]) | {"cells_per_s": total / statistics.median(mine[0])}
    row |= {"cpu_s": statistics.median(mine[1]), "baseline_cpu_s": statistics.median(cpu)}
    row["cpu_ratio"] = row["baseline_cpu_s"] / row["cpu_s"]
    return with_baseline(row, BASELINE, wall)


def show(rows: Sequence[Row], origin: Row) -> None:
    """A table of rows."""
    table = Table(
        "case", "seconds", "baseline seconds", "ratio", "ratio of processor time", "floor", "goal", "error",
        title=title_of(origin),
    )  # fmt: skip
    for row in rows:
        if row["ratio"] is None:
            table.add_row(row["case"], "wrong result", "", "", "", "", "", f"{row['error']:.1e}")
            continue
        table.add_row(
            row["case"], f"{row['median_s']:.4g}", f"{row['baseline_median_s']:.4g}", f"{row['ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}", f"{row['floor']}", f"{row['goal']}", f"{row['error']:.1e}",
        )  # fmt: skip
    console.print(table)


@app.callback()
def main() -> None:
    """Time what locates facts against the published algorithms."""


@app.command("tracing")
def tracing_command(
    only: Annotated[str, typer.Option(help="demo or gpt2; both if not given")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    runs: Annotated[int, typer.Option(min=2, help="interleaved runs of each")] = 5,
    prompts: Annotated[int, typer.Option(min=1, help="of the demo model")] = 20,
    prompts_gpt2: Annotated[int, typer.Option(min=1, help="of GPT-2 small's shape")] = 2,
    timed: Annotated[int, typer.Option(min=0, help="cells of the baseline by prompt and kind, demo model; 0: all")] = 0,
    timed_gpt2: Annotated[int, typer.Option(min=0, help="the same of GPT-2 small's shape")] = 12,
) -> None:
    """Causal tracing against a pass a cell; rows to a file when asked."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    rows = []
    for name, count, each in (("demo", prompts, timed), ("gpt2", prompts_gpt2, timed_gpt2)):
        if only in ("", name):
            rows.append(tracing_row(subject(name, count), each, runs))
            save(json_file, document_of(rows, origin))
    show(rows, origin)
    fail_on_wrong_results(rows)


if __name__ == "__main__":
    app()
