"""What every benchmark shares: interleaved timing, rows, provenance, and documents.

A row is one case against one baseline: `op`, `case`, `dtype`, `median_s`, `p20_s`, `p80_s`, `baseline`,
`baseline_median_s`, `ratio` (None where the result was wrong), `error`, and the machine, versions and commit. A
document is {"peaks": ..., "rows": [...], "about": ...} and what a benchmark adds.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

import kedit_fast
from kedit_fast.kernels.native import cpu as native_cpu
from kedit_fast.models.widened import has_units

console = Console(width=200, highlight=False)
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def synchronize(device: str) -> None:
    """Wait for what was started on a device."""
    if device != "cpu":
        torch.cuda.synchronize()


def interleaved(calls: Sequence[Callable[[], Any]], runs: int, device: str) -> list[list[float]]:
    """Seconds of each run of each call, after one warm-up each."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    synchronize(device)
    for _ in range(runs):
        for seconds, call in zip(times, calls, strict=True):
            begin = time.perf_counter()
            call()
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
    return times


def in_turns(calls: Sequence[Callable[[int], Any]], runs: int) -> list[tuple[list[float], list[float]]]:
    """Of each call, wall and processor seconds of its runs, A B A B; each is told the number of the run."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in calls]
    for run in range(runs):
        for (wall, cpu), call in zip(times, calls, strict=True):
            begin = time.perf_counter(), time.process_time()
            call(run)
            wall.append(time.perf_counter() - begin[0])
            cpu.append(time.process_time() - begin[1])
    return times


def timing(times: list[float]) -> Row:
    """Median and spread of runs: the fields of a row that tell our time."""
    tenths = statistics.quantiles(times, n=10)
    return {"median_s": statistics.median(times), "p20_s": tenths[1], "p80_s": tenths[7]}


def with_baseline(row: Row, name: str, times: list[float]) -> Row:
    """The row with the time of its baseline and the ratio of medians, baseline / ours."""
    median = statistics.median(times)
    extra = {"baseline": name, "baseline_median_s": median, "ratio": median / row["median_s"]}
    return {**row, **extra}


def isa(backend: str, op: str, dtype: str, device: str) -> str:
    """The instruction set or device that runs this op: the AMX table has AVX-512 code but for moments of bf16."""
    if device != "cpu":
        return f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    if backend == "cpu":
        active = native_cpu.module().isa()
        matrix = op.endswith("symmetric_rank_k_update_") and dtype == "bfloat16"
        return "avx512" if active == "amx" and not matrix else active
    return torch.backends.cpu.get_cpu_capability().lower()


PEAK_SECONDS = 0.03  # a product that takes as long is large enough for its rate
PEAK_SIDES = {"cpu": (512, 4096), "cuda": (8192, 8192)}  # smallest and largest


def measured_peaks(device: str) -> Row:
    """Bytes and operations a second that torch reaches on this machine, in about a second each: the best of five runs.

    On a processor without bf16 matrix units the peak of bf16 is that of fp32, in which it computes bf16 best.
    """

    def best(call: Callable[[], Any], runs: int = 5) -> float:
        return min(interleaved([call], runs, device)[0])

    def copied() -> float:
        source = torch.ones(1 << (28 if device == "cpu" else 31), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source))

    def multiplied(dtype: torch.dtype) -> float:
        side, largest = PEAK_SIDES[torch.device(device).type]
        while True:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            seconds = best(lambda a=a, b=b: torch.mm(a, b))
            if seconds >= PEAK_SECONDS or side == largest:
                return 2 * side**3 / seconds
            side *= 2

    peaks = {"copy_bytes_per_s": copied()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        slow = device == "cpu" and name == "bf16" and not has_units(dtype)
        peaks[f"{name}_flops_per_s"] = peaks["fp32_flops_per_s"] if slow else multiplied(dtype)
    return peaks


def provenance(device: str) -> Row:
    """Machine, versions and commit, as they stand beside every row."""
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        machine = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    else:
        machine = torch.cuda.get_device_name()
    versions = {"kedit_fast": kedit_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"machine": machine, "versions": versions, "commit": commit_of(Path(__file__).parent.parent)}


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with -dirty when something but results and documents was changed since; '' for none."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder).stdout.strip()

    name = git("describe", "--always")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results",
                  ":(exclude)*.md")  # fmt: skip
    return f"{name}-dirty" if name and changed else name


def require_clean(target: Path | None, origin: Row) -> None:
    """End, before anything is measured, when results of a changed tree would be written among the committed ones."""
    clean = origin["commit"] and not origin["commit"].endswith("-dirty")
    if target is not None and not clean and target.resolve().is_relative_to(RESULTS.resolve()):
        sys.exit(
            f"{target}: {RESULTS.name} holds numbers of commits alone, and this tree is {origin['commit'] or 'none'}: "
            "commit first, or write elsewhere"
        )


def document_of(rows: Sequence[Row], origin: Row, peaks: Row | None = None, **more: Any) -> Row:
    """A document: every row with its provenance, and what a benchmark measures beside rows."""
    return {"peaks": peaks or {}, "rows": [{**row, **origin} for row in rows], **more, "about": origin}


def save(path: Path | None, document: Row) -> None:
    """Write a document where one is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A document that `save` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def title_of(origin: Row) -> str:
    """Machine, torch and commit, above a table."""
    return f"{origin['machine']}, torch {origin['versions']['torch']}, {origin['commit']}"


def fail_on_wrong_results(rows: Sequence[Row]) -> None:
    """Exit with 1 when a result was wrong."""
    if any(row["ratio"] is None for row in rows):
        raise typer.Exit(1)


def draw(document: Row, file: Path, out: Path, pictures: dict[str, Callable[[Row, Path], Sequence[Path]]]) -> None:
    """Draw pictures of a document into a folder: the end of the file's name -> what draws it."""
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        for path in picture(document, out / f"{file.stem}_{name}"):
            console.print(str(path))
