"""What a batch of MEMIT edits costs as edits, layers, hidden size and vocabulary grow: seconds by phase, and bytes.

    python -m benchmarks.growth edits|layers|hidden|vocabulary|all [--json FILE]
    python -m benchmarks.growth plot FILE [--out DIR]

The axis of edits is the demo model with its preset: its own requests first, then requests on invented subjects of a
larger world, each about another subject. The other axes are Llamas of the demo model's shape but for one size, random
weights, REQUESTS edits, ITERATIONS iterations of each value and no early stop, so that they differ in the size alone.
10,000 edits take FEWER iterations of each value, because all would take too long; their row says so.

Every point runs in a process of its own, so that its peak of memory is its own. Statistics are collected and one edit
is made and undone before the clock starts; the factors of the statistics are computed within the measured call. The
making of an Editor, whose check of the head takes memory in proportion to the vocabulary, is a peak of its own
(`editor_peak_bytes`).

A point without a right result has no number. Read back are the keys and outputs of the edited model: with S = lambda C,
K the keys of a layer and Delta its update, Delta = R (S + K K^T)^-1 K must hold in fp64, the weight must have changed
by Delta, and what the residual has become, measured by running the edited model, must be R - Delta k. On the demo
model the edits must also take (EFFICACY of them), up to as many as its layers have room for.

Beside each point stand the limit (`limits.py`: flops and bytes by formula, at the peaks that torch reaches on this
machine) and the bytes that `kedit-fast plan` says.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import (
    Row,
    console,
    document_of,
    draw,
    isa,
    measured_peaks,
    provenance,
    read,
    require_clean,
    save,
    title_of,
)
from benchmarks.limits import PHASES, Shape, Texts, Work, limits, works
from benchmarks.values import forget_peak, peak_bytes
from kedit_fast import Editor, EditRequest, collect_statistics, demo, evaluate
from kedit_fast.backends import requested, select
from kedit_fast.demo import world
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.result import EditResult
from kedit_fast.editing.values.batch_size import MOST
from kedit_fast.models.forward import Site
from kedit_fast.reports.plan import Plan, plan
from kedit_fast.requests.reading import as_requests
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.statistics.collect import Statistics

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
AXES: dict[str, tuple[int, ...]] = {
    "edits": (1, 10, 100, 1000, 10000),
    "layers": (6, 12, 24, 48),
    "hidden": (128, 256, 512, 1024),
    "vocabulary": (2048, 8192, 32768, 131072),
}
TITLES = {"edits": "edits", "layers": "blocks", "hidden": "hidden size", "vocabulary": "vocabulary"}
REQUESTS = 16  # of the axes but that of edits
ITERATIONS = 10
FEWER = 2  # iterations of each value
FEWER_ABOVE = 1000  # edits
RUNS = {1: 5, 10: 3}  # edits -> measured calls, of which the median is taken; others are measured once
WIDER = (8000, 300, 5000)  # people, cities and companies of the larger world
DOCUMENTS = 150  # for statistics of a random model, about 40 tokens each
DEPTH = 0.26  # of the last edited block of a random model, as in Llama's family of presets
RANDOM = {
    "v_lr": 0.5, "v_weight_decay": 0.5, "clamp_norm_factor": 2.0, "mom2_update_weight": 100.0, "mom2_ridge": 1e-2,
    "v_num_grad_steps": ITERATIONS, "v_stop_loss": -1.0, "most_probable_steps": 0, "on_predicted": "allow",
}  # fmt: skip
ERROR_LIMIT = 1e-3
EFFICACY, ROOMY = 0.9, 100  # share of the edits that must take, of so many at most
SECONDS = 600  # that a point may take


@dataclass
class Subject:
    """A model, its statistics and requests."""

    case: str
    model: Any
    tokenizer: Any
    moments: Statistics
    requests: list[EditRequest]
    hparams: dict[str, Any]


def requests_of(count: int) -> list[EditRequest]:
    """The demo's requests, and beyond them others of a larger world with the same relations; a subject each."""
    chosen = list(demo.requests(count))
    if len(chosen) < count:
        named = {request.subject for request in chosen}
        wider = world.requests(count + len(chosen), seed=12, of=world.world(counts=WIDER))
        chosen += as_requests([record for record in wider if record["subject"] not in named][: count - len(chosen)])
    if len(chosen) < count:
        raise ValueError(f"the larger world has {len(chosen)} subjects with requests, {count} are wanted")
    return chosen


def config_of(axis: str, value: int) -> Any:
    """The demo model's configuration with one other size; an MLP is three times as wide as the states."""
    config = AutoConfig.from_pretrained(demo.DATA).to_dict()
    changes = {
        "layers": {"num_hidden_layers": value},
        "hidden": {
            "hidden_size": value, "intermediate_size": 3 * value, "num_attention_heads": value // 64,
            "num_key_value_heads": max(1, value // 128),
        },
        "vocabulary": {"vocab_size": value},
    }  # fmt: skip
    return AutoConfig.for_model(config.pop("model_type"), **{**config, **changes[axis], "dtype": "float32"})


def subject(axis: str, value: int) -> Subject:
    """What a point edits."""
    model, tokenizer = demo.load()
    if axis == "edits":
        hparams: dict[str, Any] = {"on_predicted": "allow"}
        if value > FEWER_ABOVE:
            hparams["v_num_grad_steps"] = FEWER
        case, layers, documents, count = "demo model", (0, 1), 500, value
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(axis, value)).eval()
        last = max(1, round(DEPTH * (model.config.num_hidden_layers - 1)))
        layers, documents, count = (last - 1, last), DOCUMENTS, REQUESTS
        case, hparams = f"random Llama, {value} {TITLES[axis]}", {**RANDOM, "layers": layers}
    moments = collect_statistics(model, tokenizer, demo.corpus(documents), layers, progress=False)
    return Subject(case, model, tokenizer, moments, requests_of(count), hparams)


def editor_of(on: Subject, prefixes: Sequence[str] | None) -> Editor:
    return Editor(on.model, on.tokenizer, "memit", statistics=on.moments, hparams=on.hparams, prefixes=prefixes)


def measure(on: Subject, runs: int = 1) -> Row:
    """Edit, read back, undo: a row without a limit, whose peaks this process does not know."""
    warm = editor_of(on, None)
    warm.edit([EditRequest("{} plays the", "Ada Novak", "violin")])
    warm.restore()
    prepared = warm.check(on.requests)[0]
    weights = {name: weight.clone() for name, weight in warm.modules.items()}
    timed: list[tuple[float, dict[str, float]]] = []
    error, residual, efficacy = 0.0, 0.0, None
    opened, held = [], []
    result: EditResult | None = None
    for _ in range(runs):
        result = None  # of the run before
        before = marked_peak()
        editor = editor_of(on, warm.prefixes)
        opened.append(peak_above(before))
        marked_peak()
        begin = time.perf_counter()
        result = editor.edit(prepared)
        spent = time.perf_counter() - begin
        timed.append((spent, {phase: result.seconds[phase] for phase in PHASES}))
        held.append(peak_above(before))
        error, residual = max(error, error_of(on, editor, prepared, result, weights)), result.residual
        if not on.hparams.get("layers"):  # the demo model
            sample = on.requests[:: max(1, len(on.requests) // ROOMY)][:ROOMY]
            efficacy = evaluate(on.model, on.tokenizer, sample, ["cf.accuracy/rewrite"], average="prompt")
            efficacy = efficacy.value("cf.accuracy/rewrite") / 100
        editor.restore()
    assert result is not None
    total, seconds = sorted(timed, key=lambda run: run[0])[len(timed) // 2]
    texts = Texts.of(prepared)
    wrong = not error <= ERROR_LIMIT
    if efficacy is not None and len(on.requests) <= ROOMY:
        wrong = wrong or not efficacy >= EFFICACY
    hparams = warm.hparams
    planned = plan(on.model, on.tokenizer, len(on.requests), "memit", requests=on.requests, hparams=on.hparams)
    each = works(Shape.of(on.model.config), hparams.layers, texts, statistics.mean(result.steps), batch=MOST["cpu"])
    return {
        "case": on.case, "edits": len(on.requests), "layers": list(hparams.layers), "runs": runs,
        "iterations": hparams.v_num_grad_steps, "steps": statistics.mean(result.steps),
        "isa": instruction_set(), "threads": torch.get_num_threads(), "dtype": "float32",
        "error": error, "error_limit": ERROR_LIMIT, "wrong": wrong, "residual": residual, "efficacy": efficacy,
        "seconds": seconds, "total_s": total, "edits_per_s": None if wrong else len(on.requests) / total,
        "peak_bytes": None if wrong else largest(held), "editor_peak_bytes": largest(opened),
        "planned": planned_bytes(planned, on),
        "planned_s": planned.seconds, "texts": asdict(texts),
        "work": {phase: asdict(work) for phase, work in each.items()},
    }  # fmt: skip


def marked_peak() -> int:
    """Measure the peak from here on; the bytes of this process now (0 where the system does not say).

    Freed memory goes back to the system first, where the C library can: what it holds would be in no peak after.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak("cpu")
    return peak_bytes("cpu") or 0


def peak_above(before: int) -> int | None:
    """The peak since `marked_peak` above what it returned then or earlier; None where the system does not say."""
    peak = peak_bytes("cpu")
    return None if peak is None else max(0, peak - before)


def largest(peaks: Sequence[int | None]) -> int | None:
    """Of some peaks; None where there are none."""
    return max((peak for peak in peaks if peak is not None), default=None)


def instruction_set() -> str:
    """Of the op that writes, by whatever backend."""
    matrix = torch.zeros(1, 1)
    return isa(select("rank_k_update_", requested(None), matrix, matrix, matrix).backend, "", "float32", "cpu")


def planned_bytes(planned: Plan, on: Subject) -> dict[str, int]:
    """What the plan says beside what a measured process holds before the edits: weights and statistics."""
    sums = sum(moment.moment.nbytes for moment in on.moments.layers.values())
    sizes = {name: size for name, size in planned.bytes.items() if name != "weights"}
    return {**sizes, "statistics and factors": sizes["statistics and factors"] - sums}


def error_of(
    on: Subject, editor: Editor, prepared: Sequence[Any], result: EditResult, before: dict[str, torch.Tensor]
) -> float:
    """The largest relative error of the layers' equations, of the written weights, and of what became of residuals."""
    view, layers, site = editor.view, editor.hparams.layers, Site(editor.hparams.layers[-1], "block")
    passes, worst = KeyPass(view, prepared, site, editor.recipe.key_weights), 0.0
    first = predicted = 0.0
    for layer in layers:
        measured = passes.at(layer)  # lower layers are as they were when this one was solved
        (update,) = result.updates[view.weight_name(layer)]
        assert isinstance(update, LowRankUpdate)  # as of all layers without experts
        keys, right = measured.keys.double(), update.right.double()
        moment = on.moments.moment(layer).moment.double()
        ridged = moment + editor.hparams.mom2_ridge * moment.diagonal().mean() * torch.eye(len(moment)).double()
        system = float(editor.hparams.mom2_update_weight) * ridged + keys @ keys.T  # [d, d]
        delta = update.left.double() @ right.T
        written = view.weight(layer).double() - before[view.module_name(layer)].double()
        worst = max(worst, relative(system @ right, keys), relative(written, delta))
        if layer == layers[0]:
            first = float(update.left.double().norm()) * len(layers)
        predicted = float((update.left - delta @ measured.bare_keys).norm())
    return max(worst, abs(result.residual - predicted / first))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """|one - other| / |other|."""
    return float((one - other).norm() / other.norm())


def in_child(axis: str, value: int) -> Row:
    """Measure a point in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.growth", "point", axis, str(value), str(out)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, timeout=SECONDS)
        if done.returncode:
            raise SystemExit(f"{axis} {value}: the process ended with {done.returncode}")
        return read(out)


def with_limit(row: Row, peaks: Row) -> Row:
    """The row with seconds at the machine's peaks, and the share of the limit that is reached."""
    seconds = limits({phase: Work(**work) for phase, work in row["work"].items()}, peaks)
    total = sum(seconds.values())
    return {
        **row, "limit_s": seconds, "limit_edits_per_s": row["edits"] / total,
        "share_of_limit": None if row["wrong"] else total / row["total_s"],
    }  # fmt: skip


def show(rows: Sequence[Row], origin: Row) -> None:
    table = Table(
        "axis", "", "edits", "iterations", "edits/s", *PHASES, "limit", "share", "peak MiB", "planned", "error",
        "efficacy", title=title_of(origin),
    )  # fmt: skip
    for row in rows:
        rate = "wrong result" if row["wrong"] else f"{row['edits_per_s']:.2f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        table.add_row(
            row["axis"], f"{row['value']}", f"{row['edits']}", f"{row['iterations']} ({row['steps']:.1f})", rate,
            *(f"{row['seconds'][phase]:.3g}" for phase in PHASES), f"{row['limit_edits_per_s']:.1f}",
            "" if row["wrong"] else f"{row['share_of_limit']:.0%}", peak,
            f"{sum(row['planned'].values()) / 2**20:.0f}", f"{row['error']:.0e}",
            "" if row["efficacy"] is None else f"{row['efficacy']:.2f}",
        )  # fmt: skip
    console.print(table)


def run(axes: Sequence[str], json_file: Path | None) -> None:
    """Measure every point of some axes; write after each, and print."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    peaks = measured_peaks("cpu")
    rows: list[Row] = []
    begin = time.perf_counter()
    for axis in axes:
        for value in AXES[axis]:
            rows.append(with_limit({"axis": axis, "value": value, **in_child(axis, value)}, peaks))
            save(json_file, document_of(rows, origin, peaks))
            console.print(f"{axis} {value}: {rows[-1]['total_s']:.1f} s of {time.perf_counter() - begin:.0f}")
    show(rows, origin)
    if any(row["wrong"] for row in rows):
        raise typer.Exit(1)


def _command(axes: Sequence[str]) -> Callable[..., None]:
    def command(
        json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    ) -> None:
        run(axes, json_file)

    command.__doc__ = f"Measure the growth with {', '.join(TITLES[axis] for axis in axes)}."
    return command


for _axis in AXES:
    app.command(_axis)(_command([_axis]))
app.command("all")(_command(list(AXES)))


@app.command(hidden=True)
def point(axis: str, value: int, out: Path) -> None:
    """Measure one point and write its row: what `run` starts."""
    save(out, measure(subject(axis, value), RUNS.get(value, 1) if axis == "edits" else 1))


@app.command()
def plot(
    file: Path, out: Annotated[Path, typer.Option(help="folder for the picture")] = Path("benchmarks/results")
) -> None:
    """Draw edits a second and bytes against each axis, as PNG and SVG."""
    from benchmarks.plots import growth_curves

    draw(read(file), file, out, {"curves": growth_curves})


if __name__ == "__main__":
    app()
