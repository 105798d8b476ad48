"""Edge scores: time against the published algorithm, and memory a token at Llama 2 7B's shape.

    python -m benchmarks.edge_scores time [--pairs 4] [--steps 30] [--runs 3] [--json FILE]
    python -m benchmarks.edge_scores memory [--layers 2 4] [--tokens 1024 1536]
    python -m benchmarks.edge_scores contraction

`time`: EAP-IG of a random model of GPT-2 small's shape, against `published_locating.published_edge_scores`, in turns in
one process; the scores are compared first, and a wrong result has no ratio.

`memory`: the growth of a process's peak memory with the number of tokens, of edge scores less that of a plain forward
and backward pass over the same row (without gradients of parameters), for models of a few layers of Llama 2 7B's shape
with random fp32 weights. It is linear in layers, so two numbers of layers give that of 32. Steps run in two passes, so
that slopes of the first stand beside the activations of the second, which is the most there ever is. Rows are so long
that these are more than the tiles of the contraction, which do not grow with them. The formula is
that of what is stored: ((2 L + 1) d of differences, (4 L + 1) d of slopes, 3 L d of q, k and v) times 4 bytes.

`contraction`: the op alone, against the flops that it needs at the speed of one large product.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import (
    Row,
    console,
    document_of,
    fail_on_wrong_results,
    interleaved,
    provenance,
    require_clean,
    save,
    timing,
    title_of,
    with_baseline,
)
from benchmarks.published_locating import published_edge_scores
from kedit_fast.locating.circuits import edge_scores
from kedit_fast.models.components import Visitor, open_components
from kedit_fast.models.forward import TokenBatch, evaluating, last_states
from kedit_fast.models.view import ModelView
from kedit_fast.reference.edge_contraction import edge_contraction

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
BASELINE = "published EAP-IG, heads in d_model, a product a step"
LIMIT = 1e-5  # of the largest score
LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
LLAMA_7B_LAYERS = 32


def random_pairs(count: int, length: int, vocabulary: int, first: int = 1, differing: int = 3) -> list[Any]:
    """Prompt pairs that differ in a subject behind the first token."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(vocabulary, (count, 2, length + 1), generator=generator).tolist()
    pairs = []
    for i, (clean, other) in enumerate(rows):
        corrupted = [*clean[:first], *other[first : first + differing], *clean[first + differing : length]]
        pairs.append(
            SimpleNamespace(clean=clean[:length], corrupted=corrupted, answer=clean[-1], wrong=other[-1], label=str(i))
        )
    return pairs


def time_rows(pairs: int, length: int, steps: int, runs: int) -> list[Row]:
    """EAP-IG of GPT-2 small's shape, against the published algorithm as it is, and without gradients of parameters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")).eval().requires_grad_(False)
    rows = random_pairs(pairs, length, 50_000)
    clean, corrupted = (torch.tensor([getattr(row, name) for row in rows]) for name in ("clean", "corrupted"))
    answers, wrongs = (torch.tensor([getattr(row, name) for row in rows]) for name in ("answer", "wrong"))
    components = open_components(ModelView(model))

    def ours() -> torch.Tensor:
        return edge_scores(components, rows, scoring="eap-ig", steps=steps).scores

    def published(parameters: bool = True) -> torch.Tensor:
        return published_edge_scores(model, clean, corrupted, answers, wrongs, steps, parameters)

    expected = published()
    error = float((ours() - expected).abs().max() / expected.abs().max())
    row: Row = {
        "op": "edge_scores", "case": f"GPT-2-small shape, {pairs} pairs of {length} tokens, {steps} steps",
        "dtype": "float32", "backend": "torch", "isa": torch.backends.cpu.get_cpu_capability().lower(), "error": error,
        "error_limit": LIMIT, "flops": None, "bytes": None, "share_of_peak": None, "floor": 1.5, "goal": 3.0,
    }  # fmt: skip
    if not error <= LIMIT:
        return [{**row, "baseline": BASELINE, "ratio": None}]
    mine, theirs, lighter = interleaved([ours, published, lambda: published(False)], runs, "cpu")
    row |= timing(mine)
    return [
        with_baseline(row, BASELINE, theirs),
        with_baseline(row, f"{BASELINE}, without gradients of parameters", lighter),
    ]


@app.command("time")
def time_command(
    pairs: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=5)] = 12,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    runs: Annotated[int, typer.Option(min=2)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the row here")] = None,
) -> None:
    """Time against the published algorithm."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    rows = time_rows(pairs, length, steps, runs)
    save(json_file, document_of(rows, origin))
    console.print(title_of(origin))
    for row in rows:
        console.print({name: value for name, value in row.items() if name not in ("dtype", "backend")})
    fail_on_wrong_results(rows)


class _FromLeaf(Visitor):
    """Passes that are differentiated down to the first block."""

    def entering(self, states: torch.Tensor) -> torch.Tensor:
        self.leaf = states.detach().requires_grad_()
        return self.leaf


@app.command()
def peak(way: str, layers: int, tokens: int) -> None:
    """Peak memory in bytes of one process, for `memory`: of "plain" passes or of edge "scores"."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **LLAMA_7B, num_hidden_layers=layers, vocab_size=1000)
        )
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        torch.nn.init.ones_(tensor) if "norm" in name else tensor.uniform_(-0.03, 0.03)
    rotary = model.model.rotary_emb
    rotary.inv_freq.copy_(1 / 10_000 ** (torch.arange(0, 128, 2) / 128))
    components = open_components(ModelView(model))
    pairs = random_pairs(1, tokens, 1000, 0)
    _ = components.view.head  # its check is not measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if way == "scores":
        edge_scores(components, pairs, steps=2, max_tokens=tokens)
    else:
        ids = torch.tensor([pair.clean for pair in pairs])
        view = components.view
        visitor = _FromLeaf()
        with evaluating(view), torch.enable_grad(), components.running(visitor):
            states = last_states(view, TokenBatch(ids, None))
            torch.autograd.grad(view.head.logits(states[:, -1]).sum(), visitor.leaf)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(1024 * int(status.partition("VmHWM:")[2].split()[0]))


@app.command()
def memory(
    layers: Annotated[tuple[int, int], typer.Option(help="of the models measured")] = (2, 4),
    tokens: Annotated[tuple[int, int], typer.Option(help="of the rows measured")] = (1024, 1536),
    json_file: Annotated[Path | None, typer.Option("--json", help="write the row here")] = None,
) -> None:
    """Memory a token beside a plain forward and backward pass."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}  # what is freed goes back at once
    growth: dict[tuple[str, int], float] = {}
    for way in ("plain", "scores"):
        for count in layers:
            peaks = []
            for size in tokens:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.edge_scores",
                    "peak",
                    way,
                    *map(str, (count, size)),
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                peaks.append(float(done.stdout.strip().splitlines()[-1]))
            growth[way, count] = (peaks[1] - peaks[0]) / (tokens[1] - tokens[0])
            console.print(f"{way}, {count} layers: {growth[way, count] / 1e6:.3f} MB a token")
    extra = [growth["scores", count] - growth["plain", count] for count in layers]
    slope = (extra[1] - extra[0]) / (layers[1] - layers[0])
    width, deep = LLAMA_7B["hidden_size"], LLAMA_7B_LAYERS
    row = {
        "case": f"{deep} layers of Llama 2 7B's shape, fp32",
        "measured_mb": [round(value / 1e6, 4) for value in extra],
        "extrapolated_mb": (extra[0] + slope * (deep - layers[0])) / 1e6,
        "formula_mb": 4e-6 * width * ((2 * deep + 1) + (4 * deep + 1) + 3 * deep),
        "limit_mb": 5.0,
    }
    save(json_file, document_of([row], origin))
    console.print("extra(L) = extra(L0) + (L - L0) * (extra(L1) - extra(L0)) / (L1 - L0)")
    console.print("formula(L) = 4 bytes * d * ((2 L + 1) + (4 L + 1) + 3 L)")
    console.print(row)


@app.command()
def contraction(
    layers: int = 12, heads: int = 12, size: int = 64, tokens: int = 256, runs: Annotated[int, typer.Option(min=1)] = 5
) -> None:
    """The op against its flops at the speed of one large product; all layers have the same matrices."""
    torch.manual_seed(0)
    d = heads * size
    sources = (
        torch.randn(tokens, d), torch.randn(layers, tokens, heads, size),
        [torch.randn(d, heads, size)] * layers, torch.randn(layers, tokens, d),
    )  # fmt: skip
    targets = (
        torch.randn(layers, 3, tokens, heads, size), [torch.randn(heads, size, d)] * 3 * layers,
        [torch.ones(d)] * layers, True, torch.randn(layers, tokens, d), torch.randn(tokens, d),
    )  # fmt: skip
    first, second = torch.randn(2, 2048, 2048)
    sources_of = [1 + layer * (heads + 1) for layer in range(layers)]
    edges = 3 * heads * sum(sources_of) + (1 + layers * (heads + 1)) * (layers + 1)
    flops = 2 * tokens * d * edges + 8 * layers * tokens * d * d
    best = [1e9, 1e9]
    for _ in range(runs):
        calls = (lambda: first @ second, lambda: edge_contraction(*sources, *targets, [], None, False))
        for i, call in enumerate(calls):
            begin = time.process_time()  # of all threads, without what other programs do
            call()
            best[i] = min(best[i], time.process_time() - begin)
    rate = 2 * 2048**3 / best[0]
    console.print(
        f"{flops / 1e9:.1f} GF at {rate / 1e9:.0f} GF/s: {flops / rate:.3f} s; took {best[1]:.3f} s, "
        f"ratio {best[1] * rate / flops:.2f}"
    )


if __name__ == "__main__":
    app()
