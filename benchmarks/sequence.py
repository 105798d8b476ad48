"""A sequence of single AlphaEdit edits that does not end: what an edit costs after thousands of others.

    python -m benchmarks.sequence [--edits 20000] [--d 4096] [--window 64] [--json FILE]
    python -m benchmarks.sequence plot FILE [--out DIR]

One layer, keys drawn, algebra alone: `KeyMemory.solve` and `commit` with a window. First a short sequence is held to
the dense recursion in float64; where it differs, nothing is timed. The last update of the long one is put into its
equation, with all keys drawn again. The published solve runs on samples of the sequence, with its own cache of all
keys. 20,000 edits of d 4096 take about ten minutes on two quiet cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import Row, console, document_of, draw, provenance, read, require_clean, save, title_of
from kedit_fast.solver.key_memory import KeyMemory, window_columns
from kedit_fast.solver.preconditioner import NullSpace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
L2 = 10.0
REST_SHARE = 0.2  # of the dimensions that are not null space
OUT = 16  # outputs: the solve passes them through
CHUNK = 250  # keys that are drawn together
SETTLED = 5000  # edits after which the cost must be flat
TOGETHER = 4  # fold periods whose mean is compared, too: a single one takes seconds, in which a shared machine varies
LIMIT = 1e-9
PUBLISHED = "solve(P (K K^T + cache) + L2 I, P K R^T), fp32"


def null_space(d: int) -> NullSpace:
    """A random null space of four fifths of the dimensions."""
    torch.manual_seed(0)
    rest, _ = torch.linalg.qr(torch.randn(d, int(REST_SHARE * d), dtype=torch.float64))
    return NullSpace(rest.contiguous(), True, L2, 2e-2, "absolute")


def drawn(d: int, chunk: int) -> torch.Tensor:
    """Keys [CHUNK, d] of one chunk, fp32; the same at every call."""
    return torch.randn(CHUNK, d, generator=torch.Generator().manual_seed(chunk))


def edit(memory: KeyMemory, key: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """One edit; returns `right` [d, 1]."""
    update, appended = memory.solve(key[:, None], residual)
    memory.commit(appended)
    return update.right


def gate(d: int = 192, edits: int = 500, window: int = 7) -> float:
    """The largest relative error of a short sequence, over several folds and a rollback, against dense fp64 solves."""
    space, eye, worst = null_space(d), torch.eye(d, dtype=torch.float64), 0.0
    memory, projector, cache = KeyMemory(space, window=window), space.project(eye), torch.zeros_like(eye)
    keys = torch.cat([drawn(d, chunk) for chunk in range(-(-edits // CHUNK))])[:edits]
    for number, key in enumerate(keys, 1):
        right = edit(memory, key, torch.ones(1, 1))
        column = key.double()[:, None]
        cache += column @ column.T
        if number % 10 == 0:
            expected = torch.linalg.solve(projector @ cache + L2 * eye, projector @ column)
            worst = max(worst, float((right - expected).norm() / expected.norm()))
            memory.rollback(window)
            for earlier in keys[number - window : number]:
                again = edit(memory, earlier, torch.ones(1, 1))
            if not torch.equal(again, right):  # rollback is bit for bit
                return float("inf")
    return worst


def equation_error(space: NullSpace, right: torch.Tensor, edits: int) -> float:
    """|(P sum k k^T P + L2 I) x - P k| / |P k| of the last edit's x = `right`, fp64, with all keys."""
    d, key = space.size, drawn(space.size, (edits - 1) // CHUNK)[(edits - 1) % CHUNK].double()[:, None]
    applied = L2 * right
    for chunk in range(-(-edits // CHUNK)):
        keys = space.project(drawn(d, chunk)[: min(CHUNK, edits - chunk * CHUNK)].T)  # [d, CHUNK]
        applied += keys @ (keys.T @ right)
    key = space.project(key)
    return float((applied - key).norm() / key.norm())


class Published:
    """The released solve of one layer: P and the cache of all keys, dense, fp32."""

    def __init__(self, space: NullSpace):
        eye = torch.eye(space.size, dtype=torch.float64)
        self.projector, self.eye = space.project(eye).float(), eye.float()
        self.cache = torch.zeros_like(self.eye)

    def remember(self, keys: torch.Tensor) -> None:
        """Add keys [n, d] to the cache. It is not timed: many at once are added faster."""
        self.cache.addmm_(keys.T, keys)

    def timed(self, earlier: torch.Tensor, key: torch.Tensor, residual: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Seconds, and the update [out, d], of one more key [d] after the cache's and `earlier` ones [n, d]."""
        cache, keys = self.cache.addmm(earlier.T, earlier), key[:, None]
        begin = time.perf_counter()
        update = torch.linalg.solve(
            self.projector @ (keys @ keys.T + cache) + L2 * self.eye, self.projector @ keys @ residual.T
        )
        cache += keys @ keys.T
        return time.perf_counter() - begin, update.T


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def profile(space: NullSpace, whole: float) -> Row:
    """Median seconds of an edit's parts: reading basis and fold once each; the rest grows with the keys since it."""
    d, vector = space.size, torch.randn(space.size, 1, dtype=torch.float64)
    upper = torch.randn(d + 1, d, dtype=torch.float64)[:-1]
    upper.diagonal().fill_(100.0)
    parts = {
        "whiten": lambda: space.whiten(vector),
        "into the fold's coordinates": lambda: torch.linalg.solve_triangular(upper.mT, vector, upper=False),
        "and back": lambda: torch.linalg.solve_triangular(upper, vector, upper=True),
        "unwhiten": lambda: space.unwhiten(vector),
    }
    medians = {name: statistics.median(seconds(part) for _ in range(9)) for name, part in parts.items()}
    return {**medians, "keys since the fold, and checks": whole - sum(medians.values())}


def flatness(periods: list[Row], after: int) -> Row:
    """How much the mean cost of whole fold periods after so many edits differs from their mean, and drifts."""
    settled = [period for period in periods if period["first"] > after]
    if len(settled) < 4:
        return {}
    means = [period["mean_s"] for period in settled]
    together = [statistics.fmean(means[i : i + TOGETHER]) for i in range(0, len(means) - TOGETHER + 1, TOGETHER)]
    mean, quarter = statistics.fmean(means), max(1, len(means) // 4)
    return {
        "periods": len(settled),
        "mean_s": mean,
        "largest_deviation": max(abs(one / mean - 1) for one in means),
        "largest_deviation_together": max(abs(one / mean - 1) for one in together),
        "last_to_first_quarter": statistics.fmean(means[-quarter:]) / statistics.fmean(means[:quarter]),
        "bytes": [min(period["bytes"] for period in settled), max(period["bytes"] for period in settled)],
    }


def sequence(d: int, edits: int, window: int, samples: int) -> tuple[Row, list[Row], Row]:
    """Run it: the row of the whole, the fold periods, and the profile of an edit."""
    space = null_space(d)
    memory, published = KeyMemory(space, window=window), Published(space)
    residual = torch.randn(OUT, 1)
    times, folds, held, their_times, their_errors = [], [], [], [], []
    at = {edits * (i + 1) // samples for i in range(samples)} if samples else set()
    keys = right = torch.empty(0)
    for number in range(1, edits + 1):
        place = (number - 1) % CHUNK
        if place == 0:
            if number > 1 and samples:
                published.remember(keys)
            keys = drawn(d, (number - 1) // CHUNK)
        begin = time.perf_counter()
        right = edit(memory, keys[place], residual)
        times.append(time.perf_counter() - begin)
        held.append(memory.nbytes)
        if memory.columns == 0:
            folds.append(number)
        if number in at:
            spent, theirs = published.timed(keys[:place], keys[place], residual)
            ours = residual.double() @ right.T
            their_times.append(spent)
            their_errors.append(float((theirs.double() - ours).norm() / ours.norm()))
        if number % 1000 == 0:
            recent = statistics.fmean(times[-1000:]) * 1e3
            console.print(f"{number} edits: {recent:.1f} ms each, {memory.nbytes / 2**20:.1f} MiB")
    periods = [
        {
            "first": first + 1,
            "last": last,
            "mean_s": statistics.fmean(times[first:last]),
            "edit_s": statistics.median(times[first : last - 1] or times[first:last]),
            "fold_s": times[last - 1],
            "bytes": max(held[first:last]),
        }
        for first, last in pairwise([0, *folds])
    ]
    mean = statistics.fmean(times)
    error = equation_error(space, right, edits)
    row = {
        "op": "KeyMemory", "case": f"{edits} single AlphaEdit edits, d {d}, window {window}", "dtype": "float64",
        "backend": "torch", "isa": torch.backends.cpu.get_cpu_capability().lower(),
        "error": error, "error_limit": LIMIT, "mean_s": mean, "median_s": statistics.median(times), "edits": edits,
        "d": d, "window": window, "columns": window_columns(d), "folds": len(folds),
        "fold_s": statistics.median(times[number - 1] for number in folds) if folds else None,
        "bytes": max(held), "bound": 16 * d * d + 8 * (d * window + window * window),
        "basis_bytes": space.nbytes, "baseline": PUBLISHED,
        "baseline_median_s": statistics.median(their_times) if their_times else None,
        "baseline_samples": len(their_times), "baseline_error": max(their_errors, default=None),
        "ratio": statistics.median(their_times) / mean if their_times and error <= LIMIT else None,
    }  # fmt: skip
    return row, periods, profile(space, statistics.median(times))


def show(row: Row, periods: list[Row], parts: Row, flat: Row, origin: Row) -> None:
    """Print what was measured."""
    console.print(title_of(origin))
    console.print(
        f"{row['case']}: {row['mean_s'] * 1e3:.2f} ms each, folds included ({row['folds']} of "
        f"{(row['fold_s'] or 0) * 1e3:.0f} ms, every {row['columns']} keys); {row['bytes'] / 2**20:.1f} MiB of at most "
        f"{row['bound'] / 2**20:.1f}; error of the last update's equation {row['error']:.1e}"
    )
    for name, spent in parts.items():
        console.print(f"  {name}: {spent * 1e3:.2f} ms")
    if row["baseline_median_s"] is not None:
        console.print(
            f"published, {row['baseline_samples']} samples: {row['baseline_median_s'] * 1e3:.0f} ms each; its update "
            f"differs by {row['baseline_error']:.1e}; ratio {row['ratio'] or float('nan'):.0f}"
        )
    if flat:
        console.print(
            f"{flat['periods']} whole fold periods after edit {flat['after']}: {flat['mean_s'] * 1e3:.2f} ms an edit, "
            f"none more than {flat['largest_deviation']:.1%} from it, the mean of {TOGETHER} no more than "
            f"{flat['largest_deviation_together']:.1%}; last to first quarter "
            f"{flat['last_to_first_quarter']:.3f}; bytes {flat['bytes'][0]} to {flat['bytes'][1]}"
        )


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    edits: Annotated[int, typer.Option(min=1, help="length of the sequence")] = 20000,
    d: Annotated[int, typer.Option(min=64, help="inputs of the layer")] = 4096,
    window: Annotated[int, typer.Option(min=1, help="batches that can be undone")] = 64,
    samples: Annotated[int, typer.Option(min=0, help="how often the published solve runs beside it")] = 8,
) -> None:
    """Check, time, print, and write the rows to a file when asked."""
    if context.invoked_subcommand is not None:
        return
    origin = provenance("cpu")
    require_clean(json_file, origin)
    error = gate()
    console.print(f"a short sequence against dense solves in float64: {error:.1e}")
    if not error <= LIMIT:
        raise typer.Exit(1)
    row, periods, parts = sequence(d, edits, window, samples)
    after = SETTLED if edits >= 2 * SETTLED else edits // 4
    flat = flatness(periods, after)
    flat = {**flat, "after": after} if flat else {}
    save(json_file, document_of([{**row, "gate_error": error}], origin, periods=periods, profile=parts, flat=flat))
    show(row, periods, parts, flat, origin)
    if not row["error"] <= LIMIT:
        raise typer.Exit(1)


@app.command()
def plot(
    file: Path, out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("benchmarks/results")
) -> None:
    """Draw seconds of an edit and bytes of the state against the number of edits, as PNG and SVG."""
    from benchmarks.plots import endless_curves

    draw(read(file), file, out, {"edits": endless_curves})


if __name__ == "__main__":
    app()
