"""Time the optimization of values, and whole edits, against the published algorithm.

    python -m benchmarks.values [--suite values|pipeline|savings|batches|prefixes|all] [--json FILE] [--device cuda]
    python -m benchmarks.values plot FILE [--out DIR]

Both sides get the same prepared requests and the same model in the same dtype, and run in turns. Before anything is
timed our values are compared with the serial loop's, request by request. Where a serial baseline would take too long it
runs on some of the requests, others in each run, and its time is multiplied: it does them one after another, so it has
no economies of scale. The row's note says so.

`compare` and `markdown` of benchmarks.run read the rows.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import published, savings
from benchmarks.harness import (
    Row,
    document_of,
    draw,
    fail_on_wrong_results,
    provenance,
    read,
    require_clean,
    synchronize,
    timing,
    title_of,
    with_baseline,
)
from benchmarks.harness import save as save_document
from kedit_fast import Editor, collect_statistics, demo
from kedit_fast.editing.values.loop import find_values
from kedit_fast.methods.hparams import DECLARATIONS, Hparams, reads
from kedit_fast.methods.presets import make_hparams, published_values
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models import shared_prefixes
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import PreparedRequest, prepare

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=180, highlight=False)
GPT2_SMALL = "GPT-2-small shape, random weights"
ERROR_LIMIT = 1e-4  # of a value, relative to its delta's norm
CHECKED = 4  # requests of the gate
SERIAL = "published serial loop"


class Suite(str, Enum):
    """What to time."""

    values = "values"
    pipeline = "pipeline"
    savings = "savings"
    batches = "batches"
    prefixes = "prefixes"
    all = "all"


@dataclass
class Subject:
    """A model with prepared requests and the numbers of its MEMIT preset or guess."""

    name: str
    model: Any
    tokenizer: Any
    view: ModelView
    prepared: list[PreparedRequest]
    hparams: Hparams

    @property
    def layer(self) -> int:
        return self.hparams.layers[-1]


def subject(name: str, requests: int, device: str, iterations: int | None = None) -> Subject:
    """The demo model, or a random one of GPT-2 small's shape fed with the demo's requests and prefixes."""
    model, tokenizer = demo.load()
    preset, _ = make_hparams("memit", model.config)
    prefixes = generate_prefixes(ModelView(model), tokenizer, preset.context_template_length_params, 0)
    if name == GPT2_SMALL:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")).eval()
    model = model.to(device)
    published = published_values("memit", model.config) if name == GPT2_SMALL else {}  # the published loop's
    if iterations is not None:
        published["v_num_grad_steps"] = iterations
    hparams, _ = make_hparams("memit", model.config, published)
    prepared = prepare(tokenizer, demo.requests(requests), prefixes, 1024)
    return Subject(name, model, tokenizer, ModelView(model), prepared, hparams)


def ours(on: Subject, prepared: Sequence[PreparedRequest] | None = None, **overrides: Any):
    """Our values."""
    return find_values(on.view, prepared or on.prepared, on.layer, "block", replace(on.hparams, **overrides))


def serial(on: Subject, prepared: Sequence[PreparedRequest]) -> list[published.Value]:
    """The published loop's values."""
    return [published.serial_value(on.model, [on.view.block(on.layer)], request, on.hparams) for request in prepared]


def error_of(on: Subject) -> float:
    """The largest error of our values against the serial loop's; infinite where a step count differs."""
    chosen = on.prepared[:: max(1, len(on.prepared) // CHECKED)][:CHECKED]
    result = ours(on, chosen)
    worst = 0.0
    for i, value in enumerate(serial(on, chosen)):
        scale = max(float(value.deltas[0].norm()), 1e-12)
        gap = float((result.targets[:, i] - value.targets[0].to(result.targets)).norm()) / scale
        worst = max(worst, gap if int(result.steps[i]) == value.steps else float("inf"))
    return worst


def in_turns(
    mine: Callable[[int], Any], theirs: Callable[[int], Any], runs: int, device: str
) -> tuple[list[float], list[float]]:
    """Seconds of both, A B A B; each is told the number of the run."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs):
        for seconds, call in zip(times, (mine, theirs), strict=True):
            begin = time.perf_counter()
            call(run)
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
    return times


def sample(prepared: Sequence[PreparedRequest], count: int, run: int, runs: int) -> list[PreparedRequest]:
    """`count` requests spread over the lengths, others in each run."""
    order = sorted(range(len(prepared)), key=lambda i: sum(len(p.ids) for p in prepared[i].rewriting))
    step = len(order) / count
    return [prepared[order[int((j + (run + 0.5) / runs) * step)]] for j in range(count)]


def row_of(op: str, case: str, error: float, floor: float | None, goal: float | None, note: str, device: str) -> Row:
    return {"op": op, "case": case, "dtype": "float32", "backend": "torch",
            "isa": torch.backends.cpu.get_cpu_capability().lower() if device == "cpu" else "cuda",
            "error": error, "error_limit": ERROR_LIMIT, "flops": None, "bytes": None, "share_of_peak": None,
            "floor": floor, "goal": goal, "note": note}  # fmt: skip


def values_row(name: str, device: str, runs: int, floor: float, goal: float, timed: int | None) -> Row:
    """64 requests, ours against the serial loop."""
    on = subject(name, 64, device)
    count = len(on.prepared)
    contexts = len(on.prepared[0].rewriting)
    note = "" if timed is None else f"baseline timed on {timed} of the {count} requests, others in each run; scaled"
    case = f"{name}, {count} requests, layer {on.layer} of {on.view.num_layers}, {contexts} contexts"
    row = row_of("find_values", case, error_of(on), floor, goal, note, device)
    if not row["error"] <= ERROR_LIMIT:
        return {**row, "baseline": SERIAL, "ratio": None}

    def theirs(run: int) -> None:
        serial(on, on.prepared if timed is None else sample(on.prepared, timed, run, runs))

    mine, slow = in_turns(lambda run: ours(on), theirs, runs, device)
    slow = [seconds * count / (timed or count) for seconds in slow]
    return with_baseline({**row, **timing(mine), "edits_per_s": count / statistics.median(mine)}, SERIAL, slow)


def pipeline_row(device: str, runs: int, edits: int = 500, timed: int = 20) -> Row:
    """MEMIT on the demo model, statistics ready: values, keys, solve and write."""
    on = subject("demo model", edits, device)
    moments = collect_statistics(on.model, on.tokenizer, demo.corpus(), on.hparams.layers, progress=False)
    editor = Editor(on.model, on.tokenizer, "memit", statistics=moments, prefixes=())
    dense = {layer: moments.moment(layer).moment.double().to(device) for layer in on.hparams.layers}
    ridged = {layer: m + on.hparams.mom2_ridge * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype, device=device)
              for layer, m in dense.items()}  # fmt: skip
    weights = {layer: on.view.weight(layer) for layer in on.hparams.layers}
    before = {layer: weight.clone() for layer, weight in weights.items()}
    blocks = [on.view.block(layer) for layer in range(on.view.num_layers)]
    edited = {layer: on.view.edited_module(layer) for layer in on.hparams.layers}
    targets = ours(on).targets

    def written(run: Callable[[], Any], undo: Callable[[], None]) -> dict[int, torch.Tensor]:
        run()
        updates = {layer: weight - before[layer] for layer, weight in weights.items()}
        undo()
        return updates

    def put_back() -> None:
        with torch.no_grad():
            for layer, weight in weights.items():
                weight.copy_(before[layer])

    def publish(values: torch.Tensor) -> None:
        published.memit(on.model, blocks, edited, weights, ridged, on.prepared, on.hparams, targets=values)

    one = written(lambda: editor.edit(on.prepared), editor.restore)
    other = written(lambda: publish(targets), put_back)
    error = max(float((one[layer] - other[layer]).norm() / other[layer].norm()) for layer in one)
    note = f"baseline's values timed on {timed} of the {edits} requests, others in each run, and scaled; the rest whole"
    row = row_of("Editor.edit", f"demo model, MEMIT, {edits} edits, statistics ready", error, 6.0, 15.0, note, device)
    name = "published pipeline"
    if not error <= ERROR_LIMIT:
        return {**row, "baseline": name, "ratio": None}
    mine, slow = [], []
    for run in range(runs):
        begin = time.perf_counter()
        editor.edit(on.prepared)
        synchronize(device)
        mine.append(time.perf_counter() - begin)
        editor.restore()
        begin = time.perf_counter()
        serial(on, sample(on.prepared, timed, run, runs))
        middle = time.perf_counter()
        publish(targets)
        synchronize(device)
        slow.append((middle - begin) * edits / timed + time.perf_counter() - middle)
        put_back()
    return with_baseline({**row, **timing(mine), "edits_per_s": edits / statistics.median(mine)}, name, slow)


def savings_rows(device: str, runs: int, requests: int = 16) -> list[Row]:
    """One iteration, forward and backward, of some requests: the published form, and that with one saving each."""
    rows = []
    for name in ("demo model", GPT2_SMALL):
        on = subject(name, requests, device)
        base = savings.iteration(on.view, on.prepared, on.layer, ())
        expected = base()
        for saving in savings.SAVINGS:
            mine = savings.iteration(on.view, on.prepared, on.layer, (saving,))
            error = float((mine() - expected).abs().max() / expected.abs().max())
            times = in_turns(lambda run, mine=mine: mine(), lambda run, base=base: base(), runs, device)
            case = f"{name}, {requests} requests, one iteration: {saving} alone"
            row = row_of("value iteration", case, error, None, None, "", device)
            rows.append(with_baseline({**row, **timing(times[0])}, "published iteration", times[1]))
    return rows


def prefix_rows(device: str, runs: int, edits: int = 100) -> list[Row]:
    """MEMIT edits with the contexts of all requests run once, and with every prompt run whole."""
    rows = []
    for name in ("demo model", GPT2_SMALL):
        on = subject(name, edits, device)
        moments = collect_statistics(on.model, on.tokenizer, demo.corpus(40), on.hparams.layers, progress=False)
        memit = find_recipe("memit")
        settings = {
            name: getattr(on.hparams, name)
            for name in DECLARATIONS
            if reads(memit, name) and on.hparams.has_effect(name)
        }
        settings["mom2_ridge"] = 1e-3  # of a few texts: what is timed does not depend on them
        editor = Editor(on.model, on.tokenizer, "memit", statistics=moments, hparams=settings)

        def edit(least: int, editor: Editor = editor, on: Subject = on) -> tuple[float, dict[str, torch.Tensor]]:
            """Seconds, and the changes of the matrices."""
            before, shared_prefixes.LEAST_TOKENS = shared_prefixes.LEAST_TOKENS, least
            try:
                begin = time.perf_counter()
                result = editor.edit(on.prepared, on_error="skip")
                synchronize(device)
                spent = time.perf_counter() - begin
            finally:
                shared_prefixes.LEAST_TOKENS = before
            editor.restore()
            return spent, {path: update.left @ update.right.T for path, (update,) in result.updates.items()}

        mine, whole = [], []
        one, other = {}, {}
        for _ in range(runs):
            for seconds, least in ((mine, shared_prefixes.LEAST_TOKENS), (whole, 1 << 40)):
                spent, changes = edit(least)
                seconds.append(spent)
                one, other = other, changes
        error = max(float((one[path] - other[path]).norm() / other[path].norm()) for path in one)
        case = f"{name}, MEMIT, {edits} edits, statistics ready"
        row = row_of("shared prefixes", case, error, None, None, "", device)
        rows.append(with_baseline({**row, **timing(mine), "edits_per_s": edits / statistics.median(mine)},
                                  "every prompt whole", whole))  # fmt: skip
    return rows


def batch_rows(device: str, requests: int = 128) -> list[Row]:
    """Edits a second and peak memory of the demo model's values, by batch."""
    on = subject("demo model", requests, device)
    ours(on, on.prepared[:8])
    rows = []
    for size in (1, 2, 4, 8, 16, 32, 64, 128):
        chosen = on.prepared[:: max(1, requests // (16 if size < 4 else requests))]
        forget_peak(device)
        begin = time.perf_counter()
        ours(on, chosen, values_batch=size)
        synchronize(device)
        spent = time.perf_counter() - begin
        rows.append({"batch": size, "edits": len(chosen), "edits_per_s": len(chosen) / spent,
                      "peak_bytes": peak_bytes(device)})  # fmt: skip
    return rows


def forget_peak(device: str) -> None:
    """Measure memory from here on: of the process on Linux, of torch on a GPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif (marks := Path("/proc/self/clear_refs")).exists():
        marks.write_text("5")


def peak_bytes(device: str) -> int | None:
    """The most memory since `forget_peak`: resident bytes of the process, or what torch allocated."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def show(rows: list[Row], batches: list[Row], origin: Row) -> None:
    table = Table(
        "op", "case", "seconds", "baseline seconds", "ratio", "floor", "goal", "error", title=title_of(origin)
    )
    for row in rows:
        if row["ratio"] is None:
            table.add_row(row["op"], row["case"], "wrong result", "", "", "", "", f"{row['error']:.1e}")
            continue
        table.add_row(
            row["op"], row["case"], f"{row['median_s']:.4g}", f"{row['baseline_median_s']:.4g}",
            f"{row['ratio']:.2f}", f"{row['floor'] or ''}", f"{row['goal'] or ''}", f"{row['error']:.1e}",
        )  # fmt: skip
    console.print(table)
    for row in batches:
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**20:.0f} MiB"
        console.print(f"batch {row['batch']:4d}: {row['edits_per_s']:.2f} edits/s{peak}")


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    suite: Annotated[Suite, typer.Option(help="what to time")] = Suite.all,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    runs: Annotated[int, typer.Option(min=2, help="interleaved runs of each")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Time, print a table, and write the rows to a file when asked."""
    if context.invoked_subcommand is not None:
        return
    origin = provenance(device)
    require_clean(json_file, origin)
    every = suite == Suite.all
    rows: list[Row] = []
    batches: list[Row] = []

    def save() -> None:
        save_document(json_file, document_of(rows, origin, batches=batches))

    if every or suite == Suite.batches:
        batches = batch_rows(device)
        save()
    if every or suite == Suite.savings:
        rows += savings_rows(device, runs)
        save()
    if every or suite == Suite.prefixes:
        rows += prefix_rows(device, runs)
        save()
    if every or suite == Suite.values:
        rows.append(values_row("demo model", device, runs, 8.0, 20.0, 16 if device == "cpu" else None))
        save()
    if every or suite == Suite.pipeline:
        rows.append(pipeline_row(device, runs))
        save()
    if every or suite == Suite.values:
        rows.append(values_row(GPT2_SMALL, device, runs, 6.0, 10.0, 2 if device == "cpu" else 8))
        save()
    show(rows, batches, origin)
    fail_on_wrong_results(rows)


@app.command()
def plot(
    file: Path, out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("benchmarks/results")
) -> None:
    """Draw edits a second and peak memory against the batch, and the gain of each saving, as PNG and SVG."""
    from benchmarks.plots import batch_curves, saving_bars

    document = read(file)
    measured = {"batches": bool(document["batches"]),
                "savings": any(row["op"] == "value iteration" for row in document["rows"])}  # fmt: skip
    if not any(measured.values()):
        sys.exit(f"{file} holds nothing to draw: --suite batches or --suite savings measures it")
    for name in (name for name, there in measured.items() if not there):
        console.print(f"no {name}: not measured in {file}", style="yellow")
    pictures = {"batches": batch_curves, "savings": saving_bars}
    draw(document, file, out, {name: picture for name, picture in pictures.items() if measured[name]})


if __name__ == "__main__":
    app()
