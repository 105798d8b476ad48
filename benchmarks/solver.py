"""Time the small solves against the published dense ones, and follow the cost of a sequence of batches.

    python -m benchmarks.solver [--suite solves|sequence|all] [--d 4096] [--json FILE] [--device cuda]
    python -m benchmarks.solver plot FILE [--out DIR]

Both sides get the same tensors and run in turns in one process. A row whose result is wrong has no numbers. `compare`
and `markdown` of benchmarks.run read the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import (
    Row,
    document_of,
    draw,
    fail_on_wrong_results,
    interleaved,
    provenance,
    read,
    require_clean,
    save,
    synchronize,
    timing,
    title_of,
    with_baseline,
)
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.least_squares import solve_update
from kedit_fast.solver.preconditioner import Covariance, NullSpace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=180, highlight=False)
LAMBDA, L2 = 15000.0, 10.0
CONDITION = 1e4
REST_SHARE = 0.2  # of the dimensions that are not null space


class Suite(str, Enum):
    """What to time."""

    solves = "solves"
    sequence = "sequence"
    all = "all"


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def row_of(op: str, case: str, dtype: str, error: float, limit: float, floor: float | None, goal: float | None,
           note: str, device: str) -> Row:  # fmt: skip
    return {"op": op, "case": case, "dtype": dtype, "backend": "torch",
            "isa": torch.backends.cpu.get_cpu_capability().lower() if device == "cpu" else "cuda",
            "error": error, "error_limit": limit, "flops": None, "bytes": None, "share_of_peak": None,
            "floor": floor, "goal": goal, "note": note}  # fmt: skip


def second_moment(d: int, condition: float, device: str) -> torch.Tensor:
    """A random symmetric matrix with eigenvalues from 1 to 1 / condition, fp64."""
    q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=device))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64, device=device)
    return (q * values) @ q.T


def rows_against(row: Row, ours: Callable[[], Any], baselines: dict[str, Callable[[], Any]], runs: int, device: str):
    if not row["error"] <= row["error_limit"]:
        return [{**row, "baseline": name, "ratio": None} for name in baselines]
    mine, *others = interleaved([ours, *baselines.values()], runs, device)
    row = {**row, **timing(mine)}
    floors = [row, *({**row, "floor": None, "goal": None} for _ in others[1:])]  # against the first, the published one
    return [with_baseline(r, name, times) for r, name, times in zip(floors, baselines, others, strict=True)]


def memit_rows(d: int, u: int, runs: int, device: str) -> list[Row]:
    """K -> (lambda C + K K^T)^-1 K of one layer and batch, C's factor kept."""
    moment = second_moment(d, CONDITION, device)
    keys = torch.randn(d, u, dtype=torch.float64, device=device)
    residuals = torch.randn(16, u, dtype=torch.float64, device=device)  # passes through

    def lu() -> torch.Tensor:
        return torch.linalg.solve(LAMBDA * moment + keys @ keys.T, keys)

    def cholesky() -> torch.Tensor:
        return torch.cholesky_solve(keys, torch.linalg.cholesky(LAMBDA * moment + keys @ keys.T))

    expected = lu()
    baselines = {"torch.linalg.solve(lambda C + K K^T, K), fp64": lu,
                 "torch.cholesky_solve(K, cholesky(lambda C + K K^T)), fp64": cholesky}  # fmt: skip
    rows = []
    for dtype, limit, floor, goal in ((torch.float64, 1e-9, 10.0, 14.0), (torch.float32, 1e-5, 18.0, 25.0)):
        covariance = Covariance.from_moment(moment, weight=LAMBDA, dtype=dtype)
        error = relative(solve_update(keys, residuals, covariance).right, expected)
        name = str(dtype).removeprefix("torch.")
        bound = f", error bound {covariance.error_bound:.0e}" if dtype == torch.float32 else ""
        note = f"{name} factor kept, condition {CONDITION:.0e}{bound}"
        case = f"MEMIT solve, d {d}, u {u}, {name} factor"
        row = row_of("solve_update", case, name, error, limit, floor, goal, note, device)
        rows += rows_against(row, partial(solve_update, keys, residuals, covariance), baselines, runs, device)
    return rows


class AlphaEdit:
    """One layer's state after n keys: ours, and the published projector and cache."""

    def __init__(self, d: int, out: int, u: int, n: int, device: str, form: str = "auto"):
        torch.manual_seed(0)
        rest, _ = torch.linalg.qr(torch.randn(d, int(REST_SHARE * d), dtype=torch.float64, device=device))
        self.space = NullSpace(rest.contiguous(), True, L2, 2e-2, "absolute")
        self.projector = (torch.eye(d, dtype=torch.float64, device=device) - rest @ rest.T).float()
        self.eye = torch.eye(d, device=device)
        self.cache = torch.zeros(d, d, device=device)
        self.memory = KeyMemory(self.space, form)
        self.key_batches: list[torch.Tensor] = []
        for _ in range(n // u):
            self.learn(torch.randn(d, u, device=device))
        self.keys, self.residuals = torch.randn(d, u, device=device), torch.randn(out, u, device=device)
        self.weights = [torch.zeros(out, d, device=device) for _ in range(2)]

    def learn(self, keys: torch.Tensor) -> None:
        _, appended = self.memory.solve(keys, keys[:1])
        self.memory.commit(appended)
        self.cache += keys @ keys.T
        self.key_batches.append(keys)

    def step(self) -> None:
        """The batch, which is not kept."""
        update, _ = self.memory.solve(self.keys, self.residuals)
        update.to(torch.float32).apply_(self.weights[0])

    def ours(self) -> None:
        """The batch, and back to before it, so that it can be timed again."""
        update, appended = self.memory.solve(self.keys, self.residuals)
        update.to(torch.float32).apply_(self.weights[0])
        self.memory.commit(appended)
        self.memory.rollback()

    def published(self) -> None:
        x = torch.linalg.solve(
            self.projector @ (self.keys @ self.keys.T + self.cache) + L2 * self.eye,
            self.projector @ self.keys @ self.residuals.T,
        )
        self.weights[1] += x.T
        self.cache + self.keys @ self.keys.T  # what it would keep

    def errors(self) -> tuple[float, float]:
        """Ours and the published fp32 solve's, against the same system in fp64."""
        keys, eye = self.keys.double(), self.eye.double()
        past = self.space.project(torch.cat([keys[:, :0], *self.key_batches], 1).double())  # [d, n] P k
        new = self.space.project(keys)
        system = past @ past.T + new @ new.T + L2 * eye
        expected = torch.linalg.solve(system, new @ self.residuals.double().T).T
        for weight in self.weights:
            weight.zero_()
        self.ours()
        self.published()
        mine, theirs = (relative(weight, expected) for weight in self.weights)
        return mine, theirs


def alphaedit_rows(d: int, out: int, u: int, n: int, runs: int, device: str) -> list[Row]:
    """One batch after n keys: the update, its write, and the state's."""
    on = AlphaEdit(d, out, u, n, device)
    error, theirs = on.errors()
    mine = on.space.nbytes + on.memory.nbytes
    published = on.projector.nbytes + on.cache.nbytes
    note = (f"null space of {on.space.dimension} of {d}; published fp32 error {theirs:.0e}; "
            f"state {mine / 2**20:.0f} MiB (fp64) against P and cache {published / 2**20:.0f} MiB (fp32)")  # fmt: skip
    case = f"AlphaEdit batch algebra, d {d}, out {out}, u {u}, n {n}"
    row = row_of("KeyMemory", case, "float64", error, 1e-6, 20.0, 30.0, note, device)
    row |= {"state_bytes": mine, "published_state_bytes": published}
    name = "solve(P (K K^T + cache) + L2 I, P K R^T), fp32"
    return rows_against(row, on.ours, {name: on.published}, runs, device)


def sequence_rows(d: int, out: int, u: int, device: str, repeats: int = 3) -> list[Row]:
    """Seconds of a batch, and bytes of the state, after n keys: each form, the choice, and the published solve."""
    rows = []
    counts = [0, *(n for n in (d // 16 * i // u * u for i in (1, 2, 4, 6, 8, 10, 12, 16, 20, 24)) if n)]
    for form in ("dual", "primal", "auto"):
        on = AlphaEdit(d, out, u, 0, device, form)
        done = 0
        for n in counts:
            for _ in range((n - done) // u):
                on.learn(torch.randn(d, u, device=device))
            done = n
            row = {"form": form, "n": n, "d": d, "u": u, "bytes": on.space.nbytes + on.memory.nbytes,
                   "seconds": best(on.step, repeats, device)}  # fmt: skip
            if form == "dual":
                row["published_seconds"] = best(on.published, repeats, device)
                row["published_bytes"] = on.projector.nbytes + on.cache.nbytes
            rows.append(row)
    return rows


def best(call: Callable[[], Any], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def show(rows: list[Row], sequence: list[Row], origin: Row) -> None:
    table = Table(
        "case", "ms", "baseline", "baseline ms", "ratio", "floor", "goal", "error", "note", title=title_of(origin)
    )
    for row in rows:
        if row["ratio"] is None:
            table.add_row(row["case"], "wrong result", row["baseline"], "", "", "", "", f"{row['error']:.1e}", "")
            continue
        table.add_row(
            row["case"], f"{row['median_s'] * 1e3:.4g}", row["baseline"], f"{row['baseline_median_s'] * 1e3:.4g}",
            f"{row['ratio']:.2f}", f"{row['floor'] or ''}", f"{row['goal'] or ''}", f"{row['error']:.1e}", row["note"],
        )  # fmt: skip
    if rows:
        console.print(table)
    for row in sequence:
        line = f"{row['form']:7s} n {row['n']:6d}: {row['seconds'] * 1e3:8.1f} ms, {row['bytes'] / 2**20:.0f} MiB"
        if "published_seconds" in row:
            line += f"; published {row['published_seconds'] * 1e3:.0f} ms"
        console.print(line)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    suite: Annotated[Suite, typer.Option(help="what to time")] = Suite.all,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    d: Annotated[int, typer.Option(min=64, help="inputs of the layer")] = 4096,
    runs: Annotated[int, typer.Option(min=2, help="interleaved runs of each")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Time, print, and write the rows to a file when asked."""
    if context.invoked_subcommand is not None:
        return
    torch.manual_seed(0)
    origin = provenance(device)
    require_clean(json_file, origin)
    u, out = max(4, 100 * d // 4096), d // 4
    n = 10 * u
    rows: list[Row] = []
    sequence: list[Row] = []
    if suite in (Suite.solves, Suite.all):
        rows += memit_rows(d, u, runs, device)
        rows += alphaedit_rows(d, out, u, n, runs, device)
    if suite in (Suite.sequence, Suite.all):
        sequence = sequence_rows(d, out, u, device)
    save(json_file, document_of(rows, origin, sequence=sequence))
    show(rows, sequence, origin)
    fail_on_wrong_results(rows)


@app.command()
def plot(
    file: Path, out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("benchmarks/results")
) -> None:
    """Draw seconds of a batch and bytes of the state against the keys kept, as PNG and SVG."""
    from benchmarks.plots import sequence_curves

    draw(read(file), file, out, {"sequence": sequence_curves})


if __name__ == "__main__":
    app()
