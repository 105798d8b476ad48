"""Time the update ops against their torch expressions: `python -m benchmarks.run [--json FILE]`.

Runs of the two are interleaved in one process (A B A B ...); a ratio is baseline median / our median. A case whose
result is wrong has no numbers.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import kedit_fast
from benchmarks.cases import RANK_K, SYMMETRIC
from kedit_fast.kernels import native


def interleaved(ours: Callable[[], Any], baseline: Callable[[], Any], runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each run of both, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for which in (ours, baseline):
        which()
    for _ in range(runs):
        for seconds, which in zip(times, (ours, baseline), strict=True):
            begin = time.perf_counter()
            which()
            seconds.append(time.perf_counter() - begin)
    return times


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def symmetric_row(case, runs: int) -> dict[str, Any]:
    x = torch.randn(case.rows, case.d).to(getattr(torch, case.dtype))
    acc, plain = torch.zeros(case.d, case.d), torch.zeros(case.d, case.d)
    wide = x.double()
    probe = kedit_fast.symmetric_rank_k_update_(torch.zeros(case.d, case.d), x)
    error, limit = relative(probe, torch.tril(wide.T @ wide)), 6e-7
    del wide, probe

    def baseline():
        wide = x.float()
        plain.addmm_(wide.T, wide)

    row = {
        "op": "symmetric_rank_k_update_",
        "case": f"x [{case.rows}, {case.d}]",
        "dtype": case.dtype,
        "baseline": "acc.addmm_(x.float().T, x.float())" if case.dtype == "bfloat16" else "acc.addmm_(x.T, x)",
        "flops": case.rows * case.d * (case.d + 1),
        "floor": case.floor,
    }
    return timed(row, error, limit, lambda: kedit_fast.symmetric_rank_k_update_(acc, x), baseline, runs)


def rank_k_row(case, runs: int) -> dict[str, Any]:
    weight = torch.randn(case.out, case.inner).to(getattr(torch, case.dtype))
    left, right = torch.randn(case.out, case.k) * 1e-3, torch.randn(case.inner, case.k)
    expected = torch.addmm(weight.double(), left.double(), right.double().T)
    error, limit = relative(kedit_fast.rank_k_update_(weight.clone(), left, right), expected), 4e-3
    del expected
    row = {
        "op": "rank_k_update_",
        "case": f"W [{case.out}, {case.inner}], k {case.k}",
        "dtype": case.dtype,
        "baseline": "W += (left @ right.T).to(W.dtype)",
        "flops": 2 * case.out * case.inner * case.k,
        "floor": case.floor,
    }
    return timed(
        row, error, limit, lambda: kedit_fast.rank_k_update_(weight, left, right),
        lambda: weight.add_((left @ right.T).to(weight.dtype)), runs,
    )  # fmt: skip


def timed(row, error, limit, ours, baseline, runs) -> dict[str, Any]:
    row.update(error=error, error_limit=limit)
    if not error <= limit:
        return {**row, "ratio": None}
    mine, theirs = interleaved(ours, baseline, runs)
    middle, theirs_middle = statistics.median(mine), statistics.median(theirs)
    deciles = statistics.quantiles(mine, n=10)
    return {
        **row,
        "median_s": middle,
        "p20_s": deciles[1],
        "p80_s": deciles[7],
        "baseline_median_s": theirs_middle,
        "ratio": theirs_middle / middle,
        "gflops": row["flops"] / middle / 1e9,
    }


def provenance() -> dict[str, Any]:
    """Machine, versions and commit, as they stand beside every row."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    isa = "none" if native.probe_cpu().reason else native.cpu().isa()
    return {
        "backend": kedit_fast.explain("rank_k_update_", torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)).runs,
        "isa": isa,
        "machine": f"{model}, {torch.get_num_threads()} threads",
        "versions": {
            "kedit_fast": kedit_fast.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "commit": commit,
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    runs: Annotated[int, typer.Option(min=7, help="interleaved runs of each")] = 9,
) -> None:
    """Print a table of ratios, and write the rows to a file when asked."""
    rows = [symmetric_row(case, runs) for case in SYMMETRIC] + [rank_k_row(case, runs) for case in RANK_K]
    about = provenance()
    table = Table(title=f"{about['machine']}, {about['isa']}, torch {torch.__version__}", title_justify="left")
    for column in ("op", "case", "dtype", "ms", "baseline ms", "ratio", "floor", "GFLOP/s", "error"):
        table.add_column(column)
    for row in rows:
        if row["ratio"] is None:
            table.add_row(row["op"], row["case"], row["dtype"], "wrong result", "", "", "", "", f"{row['error']:.1e}")
            continue
        table.add_row(
            row["op"], row["case"], row["dtype"], f"{row['median_s'] * 1e3:.1f}",
            f"{row['baseline_median_s'] * 1e3:.1f}", f"{row['ratio']:.2f}", f"{row['floor']}", f"{row['gflops']:.0f}",
            f"{row['error']:.1e}",
        )  # fmt: skip
    Console(width=140).print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([{**row, **about} for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
