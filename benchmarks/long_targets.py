"""Long targets on the demo model: how much of a text of 40 tokens an edit can make the model say, and what it costs.

    python -m benchmarks.long_targets [--requests 16] [--steps 25] [--json FILE]

The targets are plain sentences of the demo's world that are in no request and no text for statistics. Every variant has
the same numbers for its values (those of the method `anyedit`), and all requests are one batch.

Columns: right, the share of target tokens that are the most probable ones after the true text before them; prefix, the
share of the target that greedy generation gives before its first error; whole, the share of targets that it gives to
the end; drift, what a token of held-out text costs more than before, in nats; columns of the system, and how many
others have no residual; seconds of editing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, document_of, provenance, require_clean, save, title_of
from kedit_fast import Editor, EditRequest, collect_statistics, demo
from kedit_fast.demo import world
from kedit_fast.editing.values.chunks import Columns, spans_of
from kedit_fast.evaluation.metrics import mean_nll
from kedit_fast.models.forward import evaluating, last_states, pad
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest, prepare
from kedit_fast.statistics.collect import Statistics

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=140, highlight=False)
TOKENS = 40
"""Tokens of a target."""
SEED = 40417
"""Of the targets; texts for statistics and for training have other ones."""
PROMPT = "{} tells a story."
NUMBERS: dict[str, Any] = {"v_lr": 0.5, "v_weight_decay": 0.001, "clamp_norm_factor": 4.0, "v_stop_loss": 0.01}
WHOLE = 10**6
"""Tokens of a chunk that holds any target."""
VARIANTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "unedited": None,
    "one value, at the subject": ("memit", {"kl_factor": 0.0}),
    "one value, at the prompt's end": ("anyedit", {"chunk_tokens": WHOLE}),
    **{f"chunks of {size}": ("anyedit", {"chunk_tokens": size}) for size in (20, 10, 5)},
}
"""What is compared -> method and hyper-parameters; None for no edit. Each runs without and with `keep_other_tokens`."""
COLUMNS = ("right", "prefix", "whole", "drift", "columns", "others", "norm", "seconds")


@dataclass(frozen=True)
class Subject:
    """What the variants share."""

    model: Any
    tokenizer: Any
    moments: Statistics
    requests: list[EditRequest]
    prepared: list[PreparedRequest]
    """The requests without prefixes."""
    text: list[str]
    """Held-out text."""
    before: float
    """Its mean negative log likelihood in the unedited model, nats a token."""


def subject(count: int) -> Subject:
    """The demo model with `count` requests."""
    model, tokenizer = demo.load()
    requests = long_requests(tokenizer, count)
    moments = collect_statistics(model, tokenizer, demo.corpus(), (0, 1), progress=False)
    text = demo.held_out([request.subject or "" for request in requests])
    prepared = prepare(tokenizer, requests, (), ModelView(model).max_length)
    return Subject(model, tokenizer, moments, requests, prepared, text, mean_nll(model, tokenizer, text))


def long_requests(tokenizer: Any, count: int) -> list[EditRequest]:
    """Requests on subjects of the demo's, each with sentences of `TOKENS` tokens as its target."""
    rng = random.Random(SEED)
    subjects = [request.subject for request in demo.requests()]
    requests: list[EditRequest] = []
    while len(requests) < count:
        ids = tokenizer(" " + " ".join(world.filler(rng) for _ in range(8)), add_special_tokens=False)["input_ids"]
        target = tokenizer.decode(ids[:TOKENS]).strip()
        if len(tokenizer(" " + target, add_special_tokens=False)["input_ids"]) == TOKENS:
            requests.append(EditRequest(PROMPT, subjects[len(requests)], target, id=len(requests)))
    return requests


def measure(on: Subject, name: str, keeps: bool, **overrides: Any) -> Row:
    """One row of the table."""
    row: Row = {"variant": name, "keep_other_tokens": keeps, "requests": len(on.requests)}
    chosen = VARIANTS[name]
    if chosen is None:
        return {**row, **shares(on), "drift": 0.0, "columns": 0, "others": 0, "norm": 0.0, "seconds": 0.0}
    method, hparams = chosen
    hparams = {**NUMBERS, "on_predicted": "allow", "keep_other_tokens": keeps, **hparams, **overrides}
    prefixes = None if method == "anyedit" else ()
    editor = Editor(
        on.model, on.tokenizer, method, statistics=on.moments, layers=(0, 1), hparams=hparams, prefixes=prefixes
    )
    try:
        begin = time.perf_counter()
        result = editor.edit(on.requests)
        seconds = time.perf_counter() - begin
        columns = len(Columns.of(on.prepared, spans_of(on.prepared, editor.hparams)).owner)
        tokens = sum(len(one.rewriting[0].ids) + len(one.target) for one in on.prepared)
        return {
            **row, **shares(on), "drift": mean_nll(on.model, on.tokenizer, on.text) - on.before, "columns": columns,
            "others": tokens - columns if keeps else 0, "norm": max(result.relative_norms.values()),
            "loss": sum(result.losses) / len(result.losses), "seconds": seconds,
        }  # fmt: skip
    finally:
        editor.restore()


@torch.no_grad()
def shares(on: Subject) -> Mapping[str, float]:
    """Right, prefix and whole of the model as it is. Greedy generation errs where the true text's next token is not
    the most probable one for the first time."""
    view = ModelView(on.model)
    right, prefixes, whole = [], [], 0
    with evaluating(view):
        for one in on.prepared:
            ids = [*one.rewriting[0].ids, *one.target[:-1]]
            states = last_states(view, pad([ids], view.device))[0, len(one.rewriting[0].ids) - 1 :]
            correct = (view.head.logits(states).argmax(1).cpu() == torch.tensor(one.target)).tolist()
            right += correct
            prefix = correct.index(False) if False in correct else len(correct)
            prefixes.append(prefix / len(correct))
            whole += prefix == len(correct)
    count = len(on.prepared)
    return {"right": sum(right) / len(right), "prefix": sum(prefixes) / count, "whole": whole / count}


def cells(row: Row) -> list[str]:
    """A row as it is printed, without its seconds."""
    shown = [row["variant"], "yes" if row["keep_other_tokens"] else "no"]
    shown += [f"{row[name]:.2f}" for name in ("right", "prefix", "whole")]
    return [*shown, f"{row['drift']:+.3f}", str(row["columns"]), str(row["others"]), f"{row['norm']:.2f}"]


HEADER = ("variant", "other tokens kept", "right", "prefix", "whole", "drift", "columns", "others", "norm")


@app.command()
def run(
    requests: Annotated[int, typer.Option(help="how many, in one batch")] = 16,
    steps: Annotated[int, typer.Option(help="iterations of each value")] = 25,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
) -> None:
    """Measure every variant and print a table."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    on = subject(requests)
    rows: list[Row] = []
    table = Table(*HEADER, "seconds", title=title_of(origin))
    for name, chosen in VARIANTS.items():
        for keeps in (False, True) if chosen else (False,):
            rows.append({**measure(on, name, keeps, v_num_grad_steps=steps), "steps": steps})
            console.print(*cells(rows[-1]), f"{rows[-1]['seconds']:.1f} s")
            table.add_row(*cells(rows[-1]), f"{rows[-1]['seconds']:.1f}")
    console.print(table)
    save(json_file, document_of(rows, origin))


if __name__ == "__main__":
    app()
