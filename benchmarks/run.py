"""Time the ops against torch.

    python -m benchmarks.run [--suite ops|overhead|all] [--json FILE] [--only TEXT]...
    python -m benchmarks.run compare OLD NEW      exit status 1 when a ratio fell by more than a tenth or a row is gone
    python -m benchmarks.run plot FILE --out DIR  ratio bars and a roofline, PNG and SVG
    python -m benchmarks.run markdown FILE        every row of a file as a table

Runs of an op and its baselines are interleaved in one process (A B C A B C ...); a ratio is baseline median / our
median. A case whose result is wrong has no numbers. The machine's own peaks are measured in the same run. On a CPU the
baselines of 16-bit rows widen to fp32 first: torch's own 16-bit products are slower there, up to a hundred times on
processors without units for them, and a ratio against those would flatter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kedit_fast
from benchmarks.cases import GPU_OPS, OPS, SMALL, Case
from benchmarks.harness import (
    Row,
    console,
    document_of,
    draw,
    fail_on_wrong_results,
    interleaved,
    isa,
    measured_peaks,
    provenance,
    require_clean,
    save,
    timing,
    title_of,
    with_baseline,
)
from benchmarks.problems import Problem, build
from kedit_fast.backends import probe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Suite(str, Enum):
    """What to time."""

    ops = "ops"
    overhead = "overhead"
    small = "small"
    all = "all"


def rows_of(case: Case, problem: Problem, peaks: Row, runs: int, device: str) -> list[Row]:
    """A row for each baseline, from one interleaved run; without numbers when the result is wrong."""
    error = problem.error()
    runs_on = isa(problem.backend, case.op, case.dtype, device)
    floor, goal = case.bars(runs_on)
    row = {
        "op": case.op, "case": case.name, "dtype": case.dtype, "backend": problem.backend, "isa": runs_on,
        "error": error, "error_limit": problem.limit, "flops": problem.flops, "bytes": problem.bytes,
        "floor": floor, "goal": goal, "note": case.note,
    }  # fmt: skip
    if not error <= problem.limit:
        return [{**row, "baseline": name, "ratio": None} for name in problem.baselines]
    mine, *others = interleaved([problem.ours, *problem.baselines.values()], runs, device)
    row |= timing(mine)
    least = max(problem.flops / peaks[f"{problem.rate}_flops_per_s"], problem.bytes / peaks["copy_bytes_per_s"])
    row["share_of_peak"] = least / row["median_s"]
    unbarred = {**row, "floor": None, "goal": None}
    return [
        with_baseline(unbarred if name in problem.beside else row, name, times)
        for name, times in zip(problem.baselines, others, strict=True)
    ]


def overhead_rows(device: str, runs: int) -> list[Row]:
    """Seconds of a call on 16 elements, by op and backend, against the torch expression: 100 calls a run."""
    w, x = torch.randn(4, 4, device=device), torch.randn(4, 4, device=device)
    one, targets = torch.randn(4, 1, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    spd = torch.eye(4, device=device)
    calls = {
        "symmetric_rank_k_update_": (
            lambda b: kedit_fast.symmetric_rank_k_update_(w, x, backend=b), "acc.addmm_(x.T, x)",
            lambda: w.addmm_(x.T, x),
        ),
        "rank_k_update_": (
            lambda b: kedit_fast.rank_k_update_(w, one, one, backend=b), "W += (left @ right.T).to(W.dtype)",
            lambda: w.add_((one @ one.T).to(w.dtype)),
        ),
        "target_log_probs": (
            lambda b: kedit_fast.target_log_probs(x, w, targets, backend=b), "log_softmax(h @ E.T).gather(1, t)",
            lambda: torch.log_softmax(x @ w.T, -1).gather(1, targets[:, None]),
        ),
        "distribution_kl": (
            lambda b: kedit_fast.distribution_kl(x, x, w, backend=b), "kl_div(log_softmax(r), log_softmax(h))",
            lambda: torch.nn.functional.kl_div(
                torch.log_softmax(x @ w.T, -1), torch.log_softmax(x @ w.T, -1), log_target=True, reduction="none"
            ).sum(-1),
        ),
        "spd_solve": (
            lambda b: kedit_fast.spd_solve(spd, x, backend=b), "torch.linalg.solve(A, B)",
            lambda: torch.linalg.solve(spd, x),
        ),
    }  # fmt: skip
    measured = []
    for op, (ours, name, baseline) in calls.items():
        for backend in ("torch", "cpu", "triton", "cuda"):
            if probe(backend).reason or probe(backend).explicit_only:
                continue
            try:
                ours(backend)
            except kedit_fast.errors.BackendUnavailableError:
                continue  # no implementation of this op there, or not on this device
            with torch.no_grad():
                pair = (hundred(partial(ours, backend)), hundred(baseline))
                mine, theirs = ([t / 100 for t in times] for times in interleaved(pair, runs, device))
            row = {"op": op, "case": f"call overhead, 16 elements, {backend}", "dtype": "float32", "backend": backend,
                   "isa": isa(backend, op, "float32", device), "flops": None, "bytes": None, "share_of_peak": None,
                   "error": None, "error_limit": None, "floor": None, "goal": None, "note": ""}  # fmt: skip
            measured.append(with_baseline({**row, **timing(mine)}, name, theirs))
    return measured


def hundred(call: Callable[[], Any]) -> Callable[[], Any]:
    def calls() -> None:
        for _ in range(100):
            call()

    return calls


def show(rows: list[Row], origin: Row, peaks: Row) -> None:
    table = Table(title=title_of(origin), title_justify="left")
    for column in ("op", "case", "dtype", "backend", "baseline", "ms", "baseline ms", "ratio", "floor", "of peak",
                   "error"):  # fmt: skip
        table.add_column(column, overflow="fold")
    for row in rows:
        left = (row["op"], row["case"], row["dtype"], f"{row['backend']} {row['isa']}", row["baseline"])
        if row["ratio"] is None:
            table.add_row(*left, "wrong result", "", "", "", "", f"{row['error']:.1e}")
            continue
        share, error = row["share_of_peak"], row["error"]
        table.add_row(
            *left, f"{row['median_s'] * 1e3:.4g}", f"{row['baseline_median_s'] * 1e3:.4g}", f"{row['ratio']:.2f}",
            f"{row['floor'] or ''}", "" if share is None else f"{share:.0%}", "" if error is None else f"{error:.1e}",
        )  # fmt: skip
    console.print(table)
    console.print("peaks:", ", ".join(f"{name} {value / 1e9:.0f}e9" for name, value in peaks.items()))


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    suite: Annotated[
        Suite, typer.Option(help="ops: real shapes; overhead: a 16-element call; small: odd tiny shapes")
    ] = Suite.all,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    runs: Annotated[int, typer.Option(min=7, help="interleaved runs of each")] = 9,
    only: Annotated[list[str] | None, typer.Option(help="cases whose op, name or dtype contains one of these")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="force a backend: torch, cpu, triton or cuda")] = None,
    compiled: Annotated[bool, typer.Option(help="torch.compile baselines too")] = True,
) -> None:
    """Time the cases, print a table, and write the rows to a file when asked."""
    if context.invoked_subcommand is not None:
        return
    origin = provenance(device)  # of what is loaded now, whatever is edited meanwhile
    require_clean(json_file, origin)
    real = OPS if device == "cpu" else GPU_OPS
    chosen = {Suite.ops: real, Suite.all: real, Suite.small: SMALL, Suite.overhead: []}[suite]

    def is_wanted(text: str) -> bool:
        return not only or any(part in text for part in only)

    chosen = [case for case in chosen if is_wanted(str(case))]
    peaks, rows = measured_peaks(device), []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in progress.track(chosen, description="cases"):
            problem = build(case, device, backend, compiled)
            rows += rows_of(case, problem, peaks, runs, device)
            del problem
            torch.compiler.reset()
    if suite in (Suite.overhead, Suite.all):
        rows += [row for row in overhead_rows(device, runs) if is_wanted(f"{row['op']} {row['case']} {row['dtype']}")]
    show(rows, origin, peaks)
    save(json_file, document_of(rows, origin, peaks))
    fail_on_wrong_results(rows)


def read(path: Path) -> dict[str, Any]:
    """A file that `run --json` wrote."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not all({"op", "case", "dtype", "baseline", "ratio"} <= set(row) for row in document["rows"]):
            raise KeyError("rows")
        return document
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not a file that benchmarks.run --json wrote")


@app.command()
def compare(
    old: Path,
    new: Path,
    drop: Annotated[float, typer.Option(help="a ratio may fall by this share")] = 0.1,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="rows of OLD need not be in NEW")] = False,
) -> None:
    """Exit with 1 when a ratio of NEW is below (1 - drop) of that in OLD, a row is gone, or a result is wrong."""
    before, after = ({_key(row): row for row in read(path)["rows"]} for path in (old, new))
    worse = 0
    for key in after.keys() - before.keys():
        if after[key]["ratio"] is None:
            console.print(*key, "wrong result")
            worse += 1
    table = Table("op", "case", "dtype", "baseline", "old", "new", "change")
    for key, row in before.items():
        if key not in after:
            table.add_row(*key, _ratio(row), "not measured", "" if allow_missing else "worse")
            worse += not allow_missing
            continue
        new_ratio = after[key]["ratio"]
        fell = new_ratio is None or (row["ratio"] is not None and new_ratio < (1 - drop) * row["ratio"])
        worse += fell
        change = "" if not row["ratio"] or not new_ratio else f"{new_ratio / row['ratio'] - 1:+.0%}"
        table.add_row(*key, _ratio(row), _ratio(after[key]), f"{change} worse" if fell else change)
    console.print(table)
    console.print(f"{worse} of {len(before)} rows fell by more than {drop:.0%}, are gone, or are wrong")
    raise typer.Exit(1 if worse else 0)


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["op"], row["case"], row["dtype"], row["baseline"]


def _ratio(row: Row) -> str:
    return "wrong result" if row["ratio"] is None else f"{row['ratio']:.2f}"


@app.command()
def plot(
    file: Path, out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("benchmarks/results")
) -> None:
    """Draw ratio bars and a roofline as PNG and SVG."""
    from benchmarks.plots import ratio_bars, roofline

    draw(read(file), file, out, {"ratios": ratio_bars, "roofline": roofline})


@app.command()
def markdown(file: Path) -> None:
    """Print the rows compactly: the ratio against the expression, and against it compiled."""
    document = read(file)
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in document["rows"]:
        cases.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    overhead = {key: rows for key, rows in cases.items() if rows[0]["flops"] is None}
    print("| op | case | dtype | runs on | ms | ratio: eager | ratio: compiled | of peak |\n" + "|---" * 8 + "|")
    for (op, case, dtype), rows in cases.items():
        if (op, case, dtype) in overhead:
            continue
        first, compiled = rows[0], [row for row in rows if "compile" in row["baseline"]]
        if first["ratio"] is None:
            print(f"| `{op}` | {case} | {dtype} | {first['backend']} {first['isa']} | wrong result | | | |")
            continue
        print(
            f"| `{op}` | {case} | {dtype} | {first['backend']} {first['isa']} | {first['median_s'] * 1e3:.3g} "
            f"| {_ratio(first)} | {_ratio(compiled[0]) if compiled else ''} | {first['share_of_peak']:.0%} |"
        )
    print("\n| op | backend | µs a call | torch expression | µs |\n" + "|---" * 5 + "|")
    for (op, _, _), (row, *_) in overhead.items():
        print(
            f"| `{op}` | {row['backend']} | {row['median_s'] * 1e6:.0f} | `{row['baseline']}` "
            f"| {row['baseline_median_s'] * 1e6:.0f} |"
        )


if __name__ == "__main__":
    app()
