"""Everything a GPU has to show, in stages, each in a process of its own.

    python -m benchmarks.gpu --out DIR [--stage build --stage test ...] [--shape GPT-J] [--budget SECONDS] [--dry-run]

    build       the CUDA module with nvcc, in place
    test        every test file that uses a GPU, whole, and compute-sanitizer over the kernels where the machine has it
    peaks       copy bandwidth, bf16, TF32, fp32 and fp64 matrix rate of this device
    ops         every op over real shapes against torch eager, torch.compile and cuBLAS
    tune        all candidate tiles of the Triton kernels over those shapes: what belongs into kernels/triton/configs.py
    sequential  AlphaEdit's algebra in batches of 100 up to 3,000 keys, against the published solve
    statistics  five layers of both shapes against the published loop; 10 d tokens, and what 44 million would take
    values      25 iterations without early stop on Llama-3-8B's and GPT-J's shapes, against the published loop; MEMIT

Weights are random and made on the device. Every stage writes DIR/gpu_STAGE.json when it ends, rows as in
benchmarks.run and `figures`, which are times without a ratio; a stage that fails or outlasts the budget says so and the
next one runs. At the end come a table, a picture of the ratios, and status 1 if a stage failed or a result was wrong.

On an H200 with 16 cores `build` took one minute, `test` two to three, `peaks` and `ops` one together, `statistics`
three and `sequential` 20 s for six of its eight sizes. `values` of GPT-J's shape took under three minutes with 100
edits; 1,000 edits need two more. `tune` did not end within 150 s. So it is laid out for four runs of ten minutes on one
machine: `build`, `test`, `peaks` and `ops`; `statistics` and `sequential`; `values`; `tune`.

`--dry-run` runs the same code on the CPU over tiny shapes: for a look at whether it works, not for numbers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import published, second_moments, solver
from benchmarks.cases import GPU_OPS, SMALL
from benchmarks.harness import (
    Row,
    interleaved,
    measured_peaks,
    provenance,
    require_clean,
    synchronize,
    timing,
    with_baseline,
)
from benchmarks.problems import build as build_problem
from benchmarks.run import rows_of
from kedit_fast import Editor, collect_statistics, demo
from kedit_fast.backends import probe
from kedit_fast.editing.values.loop import find_values
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models.fingerprint import fingerprint
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import prepare
from kedit_fast.statistics.collect import Statistics
from kedit_fast.statistics.moments import SecondMoment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=200, highlight=False)
ROOT = Path(__file__).parent.parent
RUNS = 7
PUBLISHED_TOKENS, MANY_TOKENS = 16_384, 44_000_000
PYTEST = (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
# Kernels first; after these come all other test files that ask torch.cuda for a device.
FIRST_TESTS = ("tests/ops/test_gpu.py", "tests/ops/test_triton.py", "tests/models/test_gpu_model.py")
FILES_AT_ONCE, WORKERS, THREADS = 4, 4, 2  # of the tests; worker processes of a file where pytest-xdist is installed


class Stage(str, Enum):
    """What to run."""

    build = "build"
    test = "test"
    peaks = "peaks"
    ops = "ops"
    tune = "tune"
    sequential = "sequential"
    statistics = "statistics"
    values = "values"


@dataclass(frozen=True)
class Shape:
    """A model's shape; `cut` blocks are enough for its statistics."""

    name: str
    config: dict[str, Any]
    layers: tuple[int, ...]
    cut: dict[str, int]

    @property
    def width(self) -> int:
        """Of a key."""
        return self.config.get("intermediate_size") or 4 * self.config["n_embd"]

    @property
    def hidden(self) -> int:
        return self.config.get("hidden_size") or self.config["n_embd"]


SHAPES = (
    Shape(
        "Llama-3-8B shape",
        dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
             num_key_value_heads=8, num_hidden_layers=32, vocab_size=128256, max_position_embeddings=8192),
        (4, 5, 6, 7, 8), dict(num_hidden_layers=9),
    ),
    Shape(
        "GPT-J shape",
        dict(model_type="gptj", n_embd=4096, n_layer=28, n_head=16, n_positions=2048, rotary_dim=64, vocab_size=50400),
        (3, 4, 5, 6, 7), dict(n_layer=8),
    ),
)  # fmt: skip
TINY = (
    Shape(
        "tiny Llama shape",
        dict(model_type="llama", hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1,
             num_hidden_layers=4, vocab_size=2048, max_position_embeddings=1024),
        (0, 1), dict(num_hidden_layers=2),
    ),
    Shape(
        "tiny GPT-J shape",
        dict(model_type="gptj", n_embd=32, n_layer=4, n_head=2, n_positions=1024, rotary_dim=8, vocab_size=2048),
        (0, 1), dict(n_layer=2),
    ),
)  # fmt: skip


@dataclass
class Place:
    """Where and how a stage runs, and what it has found."""

    device: str
    dry: bool
    deadline: float
    shape: str = ""
    """Part of the names of the shapes to run; "" for all."""
    rows: list[Row] = field(default_factory=list)
    figures: list[Row] = field(default_factory=list)
    peaks: Row = field(default_factory=dict)
    write: Callable[[], None] = lambda: None
    """Writes the results so far to the file of the stage."""

    @property
    def shapes(self) -> Sequence[Shape]:
        return [shape for shape in (TINY if self.dry else SHAPES) if self.shape in shape.name]

    @property
    def runs(self) -> int:
        return 2 if self.dry else RUNS

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.time()

    def figure(self, title: str, **measured: Any) -> None:
        """A measured time or count that has no ratio."""
        self.figures.append({"what": title, **measured})
        console.print(title, measured)
        self.write()

    def add(self, rows: Sequence[Row]) -> None:
        """Rows of a ratio."""
        self.rows += rows
        self.write()

    def enough(self, title: str, seconds: float) -> bool:
        """Whether there is time for something; if not, that is a figure too."""
        if self.dry or self.left() > seconds:
            return True
        self.figure(title, skipped=f"{self.left():.0f} s were left")
        return False


def model_of(shape: Shape, dtype: torch.dtype, device: str, cut: bool = False) -> Any:
    """A random model, made on the device in its dtype."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            config = AutoConfig.for_model(**{**shape.config, **(shape.cut if cut else {})})
            return AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def free(device: str) -> None:
    """Give back what the last model took."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int | None:
    """Bytes that torch has had at most since `free`."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else None


# The stages


def build(place: Place) -> None:
    """Compile, and ask a fresh process what can run."""
    switches = {"KEDIT_FAST_NATIVE": "off", "KEDIT_FAST_CUDA": "off"} if place.dry else {
        "KEDIT_FAST_NATIVE": "on", "KEDIT_FAST_CUDA": "on",
        "KEDIT_FAST_CUDA_ARCHS": "".join(map(str, torch.cuda.get_device_capability())),
    }  # fmt: skip
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        where = ["--build-lib", folder, "--build-temp", folder] if place.dry else ["--inplace"]
        command = [sys.executable, "setup.py", "-q", "build_ext", *where]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **switches}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the build failed:\n{done.stderr[-4000:]}")
    place.figure("build", seconds=time.perf_counter() - begin)
    environment = subprocess.run([sys.executable, "-m", "kedit_fast"], cwd=ROOT, capture_output=True, text=True)
    place.figure("environment", text=environment.stdout[-4000:])


def gpu_tests() -> list[str]:
    """The test files that run something on a GPU where there is one: those that name torch.cuda or move to it.

    Not this script's own tests, which would start it again.
    """
    files = [
        path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"torch\.cuda\.|\.cuda\(\)", path.read_text(encoding="utf-8")) and path.stem != "test_gpu_script"
    ]  # fmt: skip
    return [*FIRST_TESTS, *(name for name in files if name not in FIRST_TESTS)]


def pytest_command(name: str) -> list[str]:
    """The command that runs a test file, whole."""
    command = [*PYTEST, name]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 1) // FILES_AT_ONCE)))]
    return command


def test(place: Place) -> None:
    """Those files, each whole and in processes of its own: four at a time, since compiling takes most of the seconds.

    A failure, a file that had no time, or a kernel's file that cannot run a single test here, is an error of the stage
    when all have run. Each gives its memory back at its end; a test for which too little is free says so.
    """
    if place.dry:
        done = subprocess.run([*PYTEST, "--collect-only", *gpu_tests()], cwd=ROOT, capture_output=True, text=True)
        place.figure("tests", result=(done.stdout.strip().splitlines() or [""])[-1])
        if done.returncode:
            raise RuntimeError(f"tests cannot be collected:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")

    def outcome(name: str) -> tuple[str, float, Any]:
        """The name, its seconds, and the finished process, or why there is none."""
        begin, left = time.perf_counter(), place.left() - 10
        if left < 10:
            return name, 0.0, "no time was left"
        try:
            done = subprocess.run(
                pytest_command(name), cwd=ROOT, capture_output=True, text=True, timeout=left,
                env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            done = "did not end in time"
        return name, time.perf_counter() - begin, done

    failed = []
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for name, seconds, done in pool.map(outcome, [] if place.dry else gpu_tests()):
            if isinstance(done, str):
                place.figure(f"tests, {name}", seconds=seconds, result=done)
                failed.append(f"{name}: {done}")
                continue
            lines = done.stdout.strip().splitlines() or [""]
            skipped = [line for line in lines if line.startswith("SKIPPED")]
            place.figure(f"tests, {name}", seconds=seconds, result=lines[-1], skipped=skipped)
            if done.returncode:
                failed.append(f"{name}:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
            elif name in FIRST_TESTS and " passed" not in lines[-1]:
                failed.append(f"{name}: no test could run here: {'; '.join(skipped)}")
    if failed:
        raise RuntimeError("GPU tests failed:\n" + "\n".join(failed))
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None or place.dry:
        place.figure("compute-sanitizer", result="not on this machine" if sanitizer is None else "not in a dry run")
        return
    if not place.enough("compute-sanitizer", 60):
        return
    command = [sanitizer, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "tests/ops/test_gpu.py", "-k", "layout and float32"]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30, place.left() - 20))
    except subprocess.TimeoutExpired:
        place.figure("compute-sanitizer", result="did not end in time")
        return
    text = done.stdout + done.stderr
    summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "passed" in line or "failed" in line]
    place.figure("compute-sanitizer", result="; ".join(summary[-3:]), status=done.returncode)
    if done.returncode == 9 and any(marker in text for marker in ("Invalid __", "out of bounds", "Race", "Misaligned")):
        raise RuntimeError(f"compute-sanitizer found errors:\n{text[-6000:]}")
    if " passed" not in text:
        place.figure("compute-sanitizer", result="cannot run the kernels on this machine")


def peaks(place: Place) -> None:
    """What this device reaches by torch's own calls."""
    place.peaks = peaks_of(place)
    for name, value in place.peaks.items():
        place.figure(name, value=value)


def peaks_of(place: Place) -> Row:
    if place.dry:  # the same code on a small matrix takes a second as well
        a = torch.randn(256, 256)
        rate = 2 * 256**3 / min(interleaved([lambda: a @ a], 3, "cpu")[0])
        return {"copy_bytes_per_s": 1e10, **{f"{n}_flops_per_s": rate for n in ("fp32", "bf16", "fp64", "tf32")}}
    measured = measured_peaks(place.device)
    a, b = (torch.randn(8192, 8192, device=place.device) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        measured["tf32_flops_per_s"] = 2 * 8192**3 / min(interleaved([lambda: torch.mm(a, b)], RUNS, place.device)[0])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return measured


def ops(place: Place) -> None:
    """Rows of benchmarks.run over the shapes of real models; both GPU backends where an op has two."""
    place.peaks, failed = peaks_of(place), []
    for case in SMALL if place.dry else GPU_OPS:
        backends = ("triton", "cuda") if case.op == "rank_k_update_" and not place.dry else (None,)
        for backend in backends:
            if not place.enough(f"{case} {backend or ''}", 15):
                return
            if backend is not None and (reason := probe(backend).reason):
                place.figure(f"{case} {backend}", skipped=reason)
                continue
            try:
                problem = build_problem(case, place.device, backend, compiled=not place.dry)
                named = case if backend is None else replace(case, name=f"{case.name}, {backend}")
                place.add(rows_of(named, problem, place.peaks, max(place.runs, 7), place.device))
                del problem
            except Exception:  # one case's; the stage fails when the others are done
                place.figure(f"{case} {backend or ''}", failed=traceback.format_exc()[-2000:])
                failed.append(str(case))
            torch.compiler.reset()
            free(place.device)
    if failed:
        raise RuntimeError(f"{len(failed)} cases failed: {', '.join(failed)}")


def tune(place: Place) -> None:
    """The winners of KEDIT_FAST_AUTOTUNE=1 over the shapes of `ops`, with the table's time beside each."""
    if place.dry:
        place.figure("tune", result="tiles are timed on a GPU alone")
        return
    from kedit_fast.errors import BackendUnavailableError
    from kedit_fast.kernels.triton import launch

    os.environ["KEDIT_FAST_AUTOTUNE"] = "1"
    for case in GPU_OPS:
        if not place.enough(f"tune {case}", 30):
            break
        try:
            build_problem(case, place.device, "triton", compiled=False).ours()
        except BackendUnavailableError:
            continue  # no Triton kernel
        except Exception:
            place.figure(f"tune {case}", failed=traceback.format_exc()[-2000:])
        free(place.device)
    for (op, shape_class, where), winner in launch.tuned().items():
        place.figure("tuned", op=op, shape_class=shape_class, where=where, config=asdict(winner.config),
                     milliseconds=winner.milliseconds, table_milliseconds=winner.table_milliseconds)  # fmt: skip


def requests_of(count: int) -> list[Any]:
    """Of the demo's 600 requests, as many as asked for; past them again from the start."""
    known = demo.requests()
    return [replace(known[i % len(known)], id=i) for i in range(count)]


def random_statistics(view: ModelView, tokenizer: Any, layers: Sequence[int], rank: int = 512) -> Statistics:
    """Second moments with a decaying spectrum: collected ones take as many tokens as dimensions, and time."""
    moments = {}
    for layer in layers:
        d, device = view.weight(layer).shape[1], view.weight(layer).device
        rows = torch.randn(min(rank, d), d, device=device)
        moment = (rows.T @ rows).double() / len(rows)
        moment.diagonal().add_(0.1)
        moments[layer] = SecondMoment(view.module_name(layer), moment, 10 * d)
    return Statistics(moments, fingerprint(view, tokenizer), "random", 1024, "float32")


def values(place: Place) -> None:
    """Values against the published loop, fp32 on both sides and bf16 against fp32; then whole MEMIT edits."""
    demo_model, tokenizer = demo.load()
    contexts = generate_prefixes(ModelView(demo_model), tokenizer, ((10, 5),), 0)
    for shape in place.shapes:
        if place.enough(f"values, {shape.name}", 90):
            values_of(place, shape, tokenizer, contexts)
            free(place.device)


def values_of(place: Place, shape: Shape, tokenizer: Any, contexts: Sequence[str]) -> None:
    count, timed = (6, 1) if place.dry else (32, 1)
    fixed = {"layers": shape.layers, "v_stop_loss": 0.0, "v_num_grad_steps": 3 if place.dry else 25,
             "on_predicted": "allow", "clamp_norm_factor": 0.75, "v_lr": 0.1, "v_weight_decay": 0.5}  # fmt: skip
    prepared = prepare(tokenizer, requests_of(count), contexts, 1024)
    full, half = (model_of(shape, dtype, place.device) for dtype in (torch.float32, torch.bfloat16))
    half.load_state_dict(full.state_dict())  # the same numbers: a generator gives others in each dtype
    views = {"float32": ModelView(full), "bfloat16": ModelView(half)}
    del full, half
    hparams, _ = make_hparams("memit", views["float32"].config, fixed)
    layer = shape.layers[-1]

    def theirs(requests: Sequence[Any]) -> list[published.Value]:
        view = views["float32"]
        return [published.serial_value(view.model, [view.block(layer)], request, hparams) for request in requests]

    def ours(name: str, requests: Sequence[Any]) -> Any:
        return find_values(views[name], requests, layer, "block", hparams)

    chosen = prepared[:: max(1, count // 3)][:3]
    ours_full, expected = ours("float32", chosen), theirs(chosen)
    error = max(
        float((ours_full.targets[:, i] - value.targets[0].to(ours_full.targets)).norm() / value.deltas[0].norm())
        for i, value in enumerate(expected)
    )
    baseline, floors = "published serial loop, fp32", {"float32": (5.0, 10.0), "bfloat16": (15.0, 30.0)}
    rows = {
        name: {
            "op": "find_values", "case": f"{shape.name}, {count} requests, layer {layer}, 6 contexts",
            "dtype": name, "backend": "torch", "isa": "cuda" if place.device != "cpu" else "cpu",
            "error": error, "error_limit": 1e-2,
            "flops": None, "bytes": None, "share_of_peak": None, "floor": floor, "goal": goal,
            "note": f"baseline timed on {timed} of the {count} requests, scaled; random weights, "
            f"{hparams.v_num_grad_steps} iterations, no early stop" + ("" if name == "float32" else "; dtypes differ"),
        }
        for name, (floor, goal) in floors.items()
    }  # fmt: skip
    if not error <= 1e-2:
        place.add([{**row, "baseline": baseline, "ratio": None} for row in rows.values()])
        return
    rounded, scale = ours("bfloat16", chosen), ours_full.deltas.norm(dim=0)
    error = float(((rounded.deltas - ours_full.deltas).norm(dim=0) / scale).max())
    rows["bfloat16"] |= {"error": error, "error_limit": 1.0}
    rows["bfloat16"]["note"] += "; its error is the distance of its deltas from those in fp32"
    if not rows["bfloat16"]["error"] <= 1.0:
        place.add([{**rows.pop("bfloat16"), "baseline": baseline, "ratio": None}])
    free(place.device)
    serial: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in views}
    for run in range(place.runs):
        if len(serial) > 1 and not place.enough(f"values, {shape.name}: run {run + 1}", 60):
            break
        part = [prepared[(run * timed + j) * 7 % count] for j in range(timed)]
        serial.append(clock(lambda part=part: theirs(part), place.device) * count / timed)
        for name in views:
            seconds[name].append(clock(lambda name=name: ours(name, prepared), place.device))
    place.figure(f"values, {shape.name}: peak bytes, both models included", value=peak(place.device))
    for name, row in rows.items():
        place.add([with_baseline({**row, **timing(seconds[name]), "runs": len(serial)}, baseline, serial)])
        place.figure(f"10,000 values, {shape.name}, {name}, extrapolated",
                     seconds=median(seconds[name]) * 10_000 / count)  # fmt: skip
    view = views.pop("bfloat16")
    del views["float32"]
    free(place.device)
    edits(place, shape, view, tokenizer, contexts, fixed)


def edits(place: Place, shape: Shape, view: ModelView, tokenizer: Any, contexts: Sequence[str], fixed: Row) -> None:
    """Whole MEMIT edits in bf16, statistics ready: seconds by phase, one run each."""
    moments = random_statistics(view, tokenizer, shape.layers)
    for count in (4, 8) if place.dry else (100, 1000):
        title = f"{count} MEMIT edits, {shape.name}, bfloat16, statistics ready"
        if not place.enough(title, 20 + 0.12 * count):
            return
        editor = Editor(view.model, tokenizer, "memit", statistics=moments, prefixes=contexts, hparams=fixed)
        spent = clock(lambda editor=editor, count=count: editor.edit(requests_of(count)), place.device)
        distinct = min(count, len(demo.requests()))
        place.figure(title, seconds=spent, distinct_requests=distinct, peak_bytes=peak(place.device))
        editor.restore()


def clock(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def statistics(place: Place) -> None:
    """Ratios over 16,384 tokens; then bf16 alone over 10 d."""
    place.peaks = peaks_of(place)
    _, tokenizer = demo.load()
    for shape in place.shapes:
        if not place.enough(f"statistics, {shape.name}", 120):
            return
        tokens = 600 if place.dry else PUBLISHED_TOKENS
        config = {**shape.config, **shape.cut}
        case = second_moments.Shape(
            f"{shape.name} cut to {shape.layers[-1] + 1} blocks", shape.layers, tokens, 24, config
        )
        place.add(second_moments.rows_of(case, place.runs, place.device, place.peaks))
        free(place.device)
        title = f"statistics of 10 d tokens, {shape.name}, bfloat16"
        if not place.enough(title, 60):
            return
        model = model_of(shape, torch.bfloat16, place.device, cut=True)
        tokens = 10 * shape.width
        texts = second_moments.documents(tokenizer, replace(case, tokens=tokens))

        def collect(count: int, model=model, texts=texts, layers=shape.layers) -> None:
            collect_statistics(model, tokenizer, texts, layers, max_tokens=count, batch_tokens=16384, progress=False)

        collect(min(tokens, 4000))
        spent = clock(lambda tokens=tokens, collect=collect: collect(tokens), place.device)
        place.figure(title, seconds=spent, tokens_per_s=tokens / spent, peak_bytes=peak(place.device),
                     extrapolated_44_million_s=MANY_TOKENS / tokens * spent)  # fmt: skip
        del model, collect
        free(place.device)


def sequential(place: Place) -> None:
    """AlphaEdit's algebra after ever more keys."""
    for shape in place.shapes:
        u, last = (4, 12) if place.dry else (100, 3000)
        for n in (0, last // 2, last) if place.dry else (0, 1000, 2000, last):
            if not place.enough(f"AlphaEdit algebra, {shape.name}, n {n}", 30):
                return
            rows = solver.alphaedit_rows(shape.width, shape.hidden, u, n, max(place.runs, 7), place.device)
            rows = [{**row, "case": f"{shape.name}: {row['case']}", "floor": None, "goal": None} for row in rows]
            place.add(rows)
            if rows[0]["ratio"] is not None:
                place.figure(f"AlphaEdit algebra, {shape.name}, a layer, n {n}", milliseconds=1e3 * rows[0]["median_s"])
            free(place.device)


STAGES: dict[Stage, Callable[[Place], None]] = {
    Stage.build: build, Stage.test: test, Stage.peaks: peaks, Stage.ops: ops, Stage.tune: tune,
    Stage.sequential: sequential, Stage.statistics: statistics, Stage.values: values,
}  # fmt: skip


def file_of(out: Path, stage: Stage) -> Path:
    return out / f"gpu_{stage.value}.json"


def run_stage(stage: Stage, place: Place, out: Path) -> bool:
    """One stage in this process; its file holds what there is, whatever happens."""
    origin, begin = provenance(place.device), time.monotonic()

    def write(error: str | None = "it did not end") -> None:
        document = {
            "stage": stage.value, "dry_run": place.dry, "seconds": time.monotonic() - begin, "error": error,
            "about": origin, "peaks": place.peaks, "rows": [{**row, **origin} for row in place.rows],
            "figures": place.figures,
        }  # fmt: skip
        part = file_of(out, stage).with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        part.replace(file_of(out, stage))

    place.write, error = write, None
    try:
        STAGES[stage](place)
    except Exception:  # the file says it, and the other stages go on
        error = traceback.format_exc()
        console.print(error, markup=False)
    write(error)
    return error is None and all(row["ratio"] is not None for row in place.rows)


def summary(out: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    """All stages of a folder as one document, which `benchmarks.run markdown` and `compare` read."""
    merged: dict[str, Any] = {"stages": {}, "peaks": {}, "rows": [], "figures": []}
    for stage in stages:
        path = file_of(out, stage)
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            merged["stages"][stage.value] = {"seconds": document["seconds"], "error": document["error"]}
            merged["peaks"] |= document["peaks"]
            merged["rows"] += document["rows"]
            merged["figures"] += [{"stage": stage.value, **figure} for figure in document["figures"]]
        else:
            merged["stages"][stage.value] = {"seconds": None, "error": "it did not end"}
    return merged


def show(document: dict[str, Any]) -> None:
    table = Table("op", "case", "dtype", "backend", "ms", "baseline", "baseline ms", "ratio", "of peak", "error")
    for row in document["rows"]:
        if row["ratio"] is None:
            table.add_row(row["op"], row["case"], row["dtype"], row["backend"], "wrong result", row["baseline"], "", "",
                          "", f"{row['error']:.1e}")  # fmt: skip
            continue
        share = row["share_of_peak"]
        table.add_row(
            row["op"], row["case"], row["dtype"], row["backend"], f"{row['median_s'] * 1e3:.4g}", row["baseline"],
            f"{row['baseline_median_s'] * 1e3:.4g}", f"{row['ratio']:.2f}", "" if share is None else f"{share:.0%}",
            f"{row['error']:.1e}",
        )  # fmt: skip
    console.print(table)
    for name, stage in document["stages"].items():
        state = "done" if stage["error"] is None else f"FAILED: {stage['error'].strip().splitlines()[-1]}"
        console.print(f"{name:10} {stage['seconds'] or 0:6.0f} s  {state}", markup=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="folder for the files")],
    stage: Annotated[list[Stage] | None, typer.Option(help="which; all by default; repeatable")] = None,
    shape: Annotated[str, typer.Option(help="part of the names of the shapes to run; all by default")] = "",
    budget: Annotated[float, typer.Option(min=1, help="seconds for all of them")] = 540.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tiny shapes on the CPU, the same code")] = False,
    until: Annotated[float, typer.Option(hidden=True)] = 0.0,
) -> None:
    """Run stages and write what they find."""
    if not dry_run and not torch.cuda.is_available():
        console.print("no GPU here: --dry-run runs the same code on the CPU over tiny shapes")
        raise typer.Exit(2)
    stages = stage or list(Stage)
    require_clean(out / "gpu.json", provenance("cpu" if dry_run else "cuda"))
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + budget
    if until:  # a stage, in its own process
        place = Place("cpu" if dry_run else "cuda", dry_run, until, shape)
        raise typer.Exit(0 if run_stage(stages[0], place, out) else 1)
    failed = False
    for chosen in stages:
        file_of(out, chosen).unlink(missing_ok=True)
        left = deadline - time.time()
        if left < 5:
            failed = True
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--until", str(deadline - 5), "--stage", chosen.value,
                   "--out", str(out), "--shape", shape, *(["--dry-run"] if dry_run else [])]  # fmt: skip
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
        child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
        try:
            status = child.wait(left)
        except BaseException as error:  # with all that it has started: the next stage is timed alone
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = 1
        failed = failed or status != 0
    document = summary(out, stages)
    (out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(document)
    if any(row["ratio"] and row["flops"] for row in document["rows"]):
        from benchmarks.plots import ratio_bars

        ratio_bars(document, out / "gpu_ratios")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    app()
