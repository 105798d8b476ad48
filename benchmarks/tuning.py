"""Time the tuning of one matrix against the published loops, which run the whole model in every iteration.

    python -m benchmarks.tuning [--json FILE] [--row NAME]... [--edits 32] [--runs 3] [--device cuda]

Both sides get the same token ids, the same model in the same dtype and the same number of steps, and run in turns; no
loop stops early. Ours is a whole call of `Editor.edit`. Before anything is timed, the weight that a few requests end
with is compared with that of the published loop on rows that run alone, without padding.

`compare` and `markdown` of benchmarks.run read the rows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import published_tuning as published
from benchmarks.harness import (
    Row,
    document_of,
    fail_on_wrong_results,
    provenance,
    require_clean,
    save,
    synchronize,
    timing,
    title_of,
    with_baseline,
)
from benchmarks.published_tuning import Text
from kedit_fast import Editor, EditRequest, demo
from kedit_fast.models.view import ModelView
from kedit_fast.ops import unpack_bits
from kedit_fast.requests.irrelevant import SENTENCES
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import PreparedRequest, continuation
from kedit_fast.solver.entry_bits import random_bits

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=180, highlight=False)
GPT2_SMALL = "GPT-2-small shape, random weights"
DEMO = "demo model"
ERROR_LIMIT = 1e-3  # of a weight's change, relative to its norm, in fp32
CHECKED = 3  # requests of the gate
GENERAL, ANSWER = "The weather in the valley is", "mild in spring and dry"
UNRELATED = SENTENCES[:8]


@dataclass
class Subject:
    """A model, its tokenizer and requests."""

    name: str
    model: Any
    tokenizer: Any
    requests: list[EditRequest]
    prefixes: tuple[str, ...]

    def editor(self, method: str, layer: int, **hparams: Any) -> Editor:
        """An editor of one layer whose requests never stop early."""
        contexts = self.prefixes if method in ("wise", "memoir") else ()
        return Editor(
            self.model,
            self.tokenizer,
            method,
            layers=[layer],
            hparams=hparams,
            prefixes=contexts,
            irrelevant=UNRELATED,
        )


def subject(name: str, edits: int, device: str) -> Subject:
    """The demo model, or a random one of GPT-2 small's shape fed with the demo's requests."""
    model, tokenizer = demo.load()
    prefixes = generate_prefixes(ModelView(model), tokenizer, ((5, 5), (10, 5)), 0)
    if name == GPT2_SMALL:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")).eval()
    general = {"neighborhood_prompts": (GENERAL,), "target_true": ANSWER, "probes": ()}  # DINM's general prompt
    requests = [replace(request, **general) for request in demo.requests(edits)]
    return Subject(name, model.to(device), tokenizer, requests, tuple(prefixes))


def texts_of(prepared: PreparedRequest, end: int | None = None) -> list[Text]:
    """The rows of a request, each with the target."""
    target = prepared.target if end is None else (*prepared.target, end)
    return [Text(prompt.ids, target) for prompt in prepared.rewriting]


@dataclass
class Case:
    """A method on a subject: how it runs here and as published, on the first `count` requests."""

    method: str
    on: Subject
    layer: int
    hparams: dict[str, Any]
    floor: float
    goal: float | None
    published: Callable[[Case, int, published.Side], torch.Tensor]
    """The weight [h, d], or values, that the published loop ends with."""

    def edited(self, count: int, steps: int | None = None) -> tuple[Editor, float]:
        """Our editor after one call of `edit`, and the seconds of that call."""
        hparams = self.hparams if steps is None else {**self.hparams, "num_steps": steps}
        editor = self.on.editor(self.method, self.layer, **hparams)
        synchronize(self.device)
        begin = time.perf_counter()
        editor.edit(self.on.requests[:count])
        synchronize(self.device)
        return editor, time.perf_counter() - begin

    @property
    def device(self) -> str:
        return next(self.on.model.parameters()).device.type

    def prepared(self, count: int) -> list[PreparedRequest]:
        """The requests as token ids."""
        return self.on.editor(self.method, self.layer, **self.hparams).check(self.on.requests[:count])[0]

    def module(self) -> Any:
        """The tuned module."""
        editor = self.on.editor(self.method, self.layer, **self.hparams)
        return editor.view.edited_module(self.layer)

    def error(self) -> float:
        """The largest error of our change against the published loop's on rows without padding."""
        editor, _ = self.edited(CHECKED)
        if editor.recipe.makes_memory:
            memory = editor.memory
            mine = memory.values if self.method == "grace" else memory.weights[0]
        else:
            mine = editor.view.weight(self.layer).clone()
        editor.rollback()
        before = editor.view.weight(self.layer).clone() if self.method != "grace" else torch.zeros_like(mine)
        theirs = self.published(self, CHECKED, None)
        return float((mine - theirs).norm() / (theirs - before).norm())


def as_matrix(case: Case, stored: torch.Tensor) -> torch.Tensor:
    """A stored weight as [h, d]."""
    return stored.T if type(case.module()).__name__ == "Conv1D" else stored


def published_breadth(case: Case, count: int, side: published.Side) -> torch.Tensor:
    """LocFT-BF."""
    end = case.on.tokenizer.eos_token_id
    texts = [texts_of(request, end)[0] for request in case.prepared(count)]
    settings = {"epochs": case.hparams["num_steps"], "lr": case.hparams["lr"], "skip": case.hparams["stop_loss"]}
    minibatch = case.hparams["minibatch"]
    tuned = published.fine_tune(
        case.on.model, case.module().weight, [texts], minibatch=minibatch, seed=0, side=side, **settings
    )
    return as_matrix(case, tuned.weight)


def published_depth(case: Case, count: int, side: published.Side) -> torch.Tensor:
    """FT-L or FT-M."""
    texts = [texts_of(request)[:1] for request in case.prepared(count)]
    settings = {"epochs": case.hparams["num_steps"], "lr": case.hparams["lr"], "skip": case.hparams["stop_loss"]}
    at_last = case.method == "ft-l"
    tuned = published.fine_tune(case.on.model, case.module().weight, texts, at_last=at_last, side=side, **settings)
    return as_matrix(case, tuned.weight)


def published_wise(case: Case, count: int, side: published.Side) -> torch.Tensor:
    """WISE, in one shard."""
    module, hparams = case.module(), case.hparams
    editor = case.on.editor(case.method, case.layer, **hparams)
    shape = editor.view.edited_shape(case.layer)
    size, name = shape[0] * shape[1], f"{editor.view.module_name(case.layer)} shard 0"
    mask = (
        unpack_bits(random_bits(size, editor.hparams.mask_ratio, 0, name), size)
        .view(shape)
        .long()
        .to(module.weight.device)
    )
    unrelated = itertools.cycle(Text(tuple(continuation(case.on.tokenizer, text, "")[0])) for text in UNRELATED)
    requests = [(texts_of(request), next(unrelated)) for request in case.prepared(count)]
    activation = case.on.model.get_submodule(editor.view.module_name(case.layer).rpartition(".")[0])
    tuned = published.wise(
        case.on.model,
        module,
        requests,
        getattr(activation, "act_fn", None) or activation.act,
        mask,
        num_steps=hparams["num_steps"],
        lr=hparams["lr"],
        decay=hparams["weight_decay"],
        bound=hparams["norm_constraint"],
        margins=hparams["act_margin"],
        stop_loss=hparams["stop_loss"],
        stop_change=0.0,
        side=side,
    )
    return tuned.weight


def published_dinm(case: Case, count: int, side: published.Side) -> torch.Tensor:
    """DINM in one layer."""
    hparams = case.hparams
    requests = []
    for request in case.prepared(count):
        ((prompt, answer),) = request.general
        requests.append((texts_of(request)[0], Text(tuple(prompt), tuple(answer))))
    settings = {name: hparams[name] for name in ("num_steps", "lr", "edit_factor", "stop_loss")}
    tuned = published.dinm(case.on.model, case.module().weight, requests, side=side, **settings)
    return as_matrix(case, tuned.weight)


def published_grace(case: Case, count: int, side: published.Side) -> torch.Tensor:
    """GRACE, whose rows run alone in any case: its values."""
    texts = [texts_of(request)[0] for request in case.prepared(count)]
    settings = {name: case.hparams[name] for name in ("num_steps", "lr", "eps")}
    return published.grace(case.on.model, case.module(), texts, **settings).values


def cases(edits: int, device: str) -> dict[str, Case]:
    """Name of a row -> the case."""
    gpt2, small = subject(GPT2_SMALL, edits, device), subject(DEMO, edits, device)
    wise = {
        "num_steps": 10, "lr": 1.0, "stop_loss": -1.0, "weight_decay": 1e-5, "decay_entries": "weight",
        "norm_constraint": 1.0, "act_margin": (5.0, 20.0, 10.0), "units": "published",
    }  # fmt: skip
    grace = {"num_steps": 10, "lr": 1.0, "eps": 1e-3, "val_init": "warm", "units": "published"}
    adam = {"num_steps": 10, "lr": 5e-4, "stop_loss": -1.0}
    return {
        "wise": Case("wise", gpt2, 8, wise, 2.5, 4.0, published_wise),
        "wise-demo": Case("wise", small, 4, {**wise, "lr": 0.1}, 3.0, None, published_wise),
        "dinm": Case("dinm", gpt2, 8, {**adam, "edit_factor": 0.1}, 2.5, None, published_dinm),
        "grace": Case("grace", gpt2, 8, grace, 4.0, None, published_grace),
        "locft-bf": Case("locft-bf", gpt2, 6, {**adam, "minibatch": 100}, 1.5, 2.0, published_breadth),
        "ft-m": Case("ft-m", gpt2, 8, adam, 1.5, None, published_depth),
    }


def row_of(case: Case, edits: int, runs: int) -> Row:
    """One case, ours against the published loop."""
    layers = case.on.model.config.num_hidden_layers
    row: Row = {
        "op": f"tuning {case.method}",
        "case": f"{case.on.name}, {edits} requests, layer {case.layer} of {layers}, {case.hparams['num_steps']} steps",
        "dtype": "float32", "backend": "torch",
        "isa": torch.backends.cpu.get_cpu_capability().lower() if case.device == "cpu" else "cuda",
        "error": case.error(), "error_limit": ERROR_LIMIT, "flops": None, "bytes": None, "share_of_peak": None,
        "floor": case.floor, "goal": case.goal, "note": "",
    }  # fmt: skip
    baseline = "published loop"
    if not row["error"] <= ERROR_LIMIT:
        return {**row, "baseline": baseline, "ratio": None}
    mine, slow = [], []
    for _ in range(runs):  # the comparison of results has warmed up both sides
        editor, seconds = case.edited(edits)
        editor.rollback()
        mine.append(seconds)
        begin = time.perf_counter()
        case.published(case, edits, "left")
        synchronize(case.device)
        slow.append(time.perf_counter() - begin)
    return with_baseline({**row, **timing(mine)}, baseline, slow)


@app.callback(invoke_without_command=True)
def main(
    json: Annotated[Path | None, typer.Option("--json", help="Write a document with all rows.")] = None,
    row: Annotated[list[str] | None, typer.Option("--row", help="A row, or several; all by default.")] = None,
    edits: Annotated[int, typer.Option("--edits", min=CHECKED, help="Requests.")] = 32,
    runs: Annotated[int, typer.Option("--runs", min=2, help="Timed runs of each side.")] = 3,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
):
    """Time the tuning of one matrix against the published loops."""
    origin = provenance(device)
    require_clean(json, origin)
    every = cases(edits, device)
    rows: list[Row] = []
    for name in row or list(every):
        rows.append(row_of(every[name], edits, runs))
        show(rows[-1])
    table = Table("row", "case", "ours, s", "published, s", "ratio", "floor", "error", title=title_of(origin))
    for one in rows:
        times = [f"{one[key]:.2f}" if key in one else "" for key in ("median_s", "baseline_median_s")]
        ratio = "wrong" if one["ratio"] is None else f"{one['ratio']:.2f}"
        table.add_row(one["op"], one["case"], *times, ratio, f"{one['floor']:g}", f"{one['error']:.0e}")
    console.print(table)
    save(json, document_of(rows, origin))
    fail_on_wrong_results(rows)


def show(row: Row) -> None:
    """Say a row as soon as it is there."""
    console.print(f"{row['op']}, {row['case']}: ratio {row['ratio']}, error {row['error']:.1e}")


if __name__ == "__main__":
    app()
