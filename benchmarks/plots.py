"""Pictures of a results file: ratio bars against the strongest baseline, a roofline, and curves.

Every picture has a function that makes its figure (`ratio_figure`, ...), which the tests look at, and one that saves it
as PNG and SVG. Nothing of matplotlib's settings is changed outside of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

from kedit_fast.support import figures

COLORS = {
    "symmetric_rank_k_update_": "#4c72b0", "rank_k_update_": "#dd8452", "target_log_probs": "#55a868",
    "distribution_kl": "#8172b3", "spd_solve": "#937860", "rms_norm": "#da8bc3", "gated_silu": "#64b5cd",
}  # fmt: skip
OTHERS = ("#c44e52", "#ccb974", "#8c8c8c", "#2f4b3c")  # ops without a color of their own, in order
MARKS = {"bfloat16": "o", "float16": "D", "float32": "s", "float64": "^"}
STYLE = {"font.size": 8, "svg.hashsalt": "kedit_fast"}  # the same picture from the same numbers
Document = dict[str, Any]


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw under STYLE and matplotlib's own defaults, whatever the process has set."""

    @wraps(draw)
    def call(*args: Any) -> Any:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args)

    return call


def strongest(document: Document) -> list[dict[str, Any]]:
    """One row a case and backend: that of its fastest baseline.

    Wrong results and call overheads have no place in a picture.
    """
    best: dict[tuple, dict[str, Any]] = {}
    for row in document["rows"]:
        if row["ratio"] is None or row.get("flops") is None:
            continue
        key = (row["op"], row["case"], row["dtype"], row["backend"])
        if key not in best or row["ratio"] < best[key]["ratio"]:
            best[key] = row
    return list(best.values())


def colors(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A color for every op of the rows, each another one."""
    ops = dict.fromkeys(row["op"] for row in rows)
    others = [op for op in ops if op not in COLORS]
    return {op: COLORS.get(op) or OTHERS[others.index(op) % len(OTHERS)] for op in ops}


@_styled
def ratio_figure(document: Document) -> Any:
    """Bars from 1, where both are as fast, to the ratio, on a log axis: twice and half as fast are as long."""
    rows = _some(strongest(document), "rows with a ratio and counted flops")
    figure, (axes,) = figures.figure(1, 9, 1.2 + 0.23 * len(rows))
    color = colors(rows)
    several = len({row["backend"] for row in rows}) > 1
    extent = [row["ratio"] for row in rows] + [row["floor"] for row in rows if row.get("floor")]
    low, high = _powers_of_two(min(extent), max(extent))
    places = range(len(rows))
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.barh(
        places, [row["ratio"] - 1 for row in rows], left=1, color=[color[row["op"]] for row in rows], label="ratio"
    )
    for place, row in zip(places, rows, strict=True):
        end, side = (row["ratio"], -1) if row["ratio"] < 1 else (max(row["ratio"], row.get("floor") or 0), 1)
        axes.annotate(
            f"{row['ratio']:.2f}", (end, place), xytext=(4 * side, 0), textcoords="offset points", va="center",
            ha="left" if side > 0 else "right", fontsize=7,
        )  # fmt: skip
        if row.get("floor"):
            axes.plot([row["floor"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(places, [_label(row, several) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    floors = "; black mark: floor" if any(row.get("floor") for row in rows) else ""
    axes.set_xlabel(f"median of the fastest baseline / our median\n(log scale; right of 1: ours is faster{floors})")
    figure.suptitle(_machine(rows))
    return figure


def _label(row: dict[str, Any], several: bool) -> str:
    """Op, case, dtype, and the backend where there are several; what a case's name says is not said again."""
    case = row["case"].split(", forward")[0]
    for said in (row["dtype"], row["backend"]):
        case = case.removesuffix(f", {said}")
    return f"{row['op']}  {case}  {row['dtype']}" + (f"  ({row['backend']})" if several else "")


def _powers_of_two(least: float, most: float) -> tuple[float, float]:
    """Limits of an axis that hold both, 1, and room for a number beside a bar's end."""
    least, most = min(least, 1.0), max(most, 1.0)
    room = max(1.15, (most / least) ** 0.08)
    return 2.0 ** min(-1, math.floor(math.log2(least / room))), 2.0 ** max(1, math.ceil(math.log2(most * room)))


@_styled
def roofline_figure(document: Document) -> Any:
    """Rates against flops a byte, under what the machine's own copy and products reach."""
    rows, peaks = _some(strongest(document), "rows with a ratio and counted flops"), document["peaks"]
    figure, (axes,) = figures.figure(1, 9, 5)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    names = ["fp32", "bf16", *(["fp64"] if any(row["dtype"] == "float64" for row in rows) else [])]
    for name, style in zip(names, ("-", "--", ":"), strict=False):
        if f"{name}_flops_per_s" not in peaks:
            continue
        rate = peaks[f"{name}_flops_per_s"] / 1e9
        knee = rate * 1e9 / peaks["copy_bytes_per_s"]
        axes.plot([low, min(max(knee, low), high), high],
                  [min(rate, low * peaks["copy_bytes_per_s"] / 1e9), rate, rate], style, color="black", linewidth=1,
                  label=f"torch.mm {name}: {rate:.0f} GFLOP/s")  # fmt: skip
    color = colors(rows)
    for row, intensity in zip(rows, intensities, strict=True):
        axes.plot(intensity, row["flops"] / row["median_s"] / 1e9, MARKS.get(row["dtype"], "*"),
                  color=color[row["op"]], markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops / byte that must move")
    axes.set_ylabel("GFLOP/s")
    ops = [Line2D([], [], marker="o", linestyle="", color=color[op], label=op) for op in color]
    kinds = [Line2D([], [], marker=MARKS.get(dtype, "*"), linestyle="", color="grey", label=dtype)
             for dtype in dict.fromkeys(row["dtype"] for row in rows)]  # fmt: skip
    figure.legend(handles=[*axes.get_legend_handles_labels()[0], *ops, *kinds], fontsize=7, loc="outside right upper")
    axes.set_title(f"{_machine(rows)}\ncopy {peaks['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    return figure


@_styled
def batch_figure(document: Document) -> Any:
    """Edits a second, and peak memory, against the number of requests optimized together: a panel each."""
    rows = _some(document.get("batches") or [], "rows of --suite batches")
    sizes = [row["batch"] for row in rows]
    panels = [("edits_per_s", 1, "edits a second", "o-", "#4c72b0")]
    if all(row["peak_bytes"] is not None for row in rows):
        panels.append(("peak_bytes", 2**20, "peak memory, MiB", "s--", "#dd8452"))
    figure, every = figures.figure(len(panels), 4.5, 3.4)
    for axes, (name, unit, label, mark, color) in zip(every, panels, strict=True):
        axes.plot(sizes, [row[name] / unit for row in rows], mark, color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("requests optimised together")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    figure.suptitle(_machine([document["about"]]))
    return figure


@_styled
def saving_figure(document: Document) -> Any:
    """What each saving alone is worth to one iteration of the published loop."""
    every = [row for row in document["rows"] if row["op"] == "value iteration" and row["ratio"] is not None]
    rows = _some(every, "rows of --suite savings")
    figure, (axes,) = figures.figure(1, 8, 1.2 + 0.3 * len(rows))
    models = list(dict.fromkeys(row["case"].split(",")[0] for row in rows))
    color = dict(zip(models, figures.colors(len(models)), strict=True))
    axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    axes.barh(
        range(len(rows)), [row["ratio"] for row in rows], color=[color[row["case"].split(",")[0]] for row in rows]
    )
    for place, row in enumerate(rows):
        axes.annotate(
            f"{row['ratio']:.2f}", (row["ratio"], place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=7, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['case'].split(',')[0]}: {row['case'].split(': ')[-1]}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(1.0, *(row["ratio"] for row in rows)))
    axes.set_xlabel("seconds of the published iteration / of the same with this saving alone (right of 1 is faster)")
    figure.suptitle(_machine([document["about"]]))
    return figure


@_styled
def sequence_figure(document: Document) -> Any:
    """Seconds of a batch, and bytes of the state, against the keys kept before it: each form and the published one."""
    rows = _some(document.get("sequence") or [], "rows of --suite sequence")
    figure, (left, right) = figures.figure(2, 5, 3.8)
    for form, mark in (("dual", "o-"), ("primal", "s-"), ("auto", "x--")):
        curve = [row for row in rows if row["form"] == form]
        changes = "".join(f" (changes form at {n})" for n in _changes(curve))
        left.plot([row["n"] for row in curve], [row["seconds"] for row in curve], mark, label=form + changes)
        right.plot([row["n"] for row in curve], [row["bytes"] / 2**20 for row in curve], mark, label=form)
    curve = [row for row in rows if "published_seconds" in row]
    left.plot([row["n"] for row in curve], [row["published_seconds"] for row in curve], "^:", label="published, fp32")
    right.plot([row["n"] for row in curve], [row["published_bytes"] / 2**20 for row in curve], "^:",
               label="published: P and cache, fp32")  # fmt: skip
    _label_halves(
        figure, left, right, "seconds a batch", f"keys kept (d {rows[0]['d']}, {rows[0]['u']} a batch)", document
    )
    return figure


@_styled
def frontier_figure(document: Document) -> Any:
    """KL on other text and same-subject facts against paraphrases, along lambda: a curve for each solve and count."""
    rows = _some([row for row in document["rows"] if row["lambda"] is not None], "points of lambda")
    counts = sorted({row["edits"] for row in rows})
    figure, panels = figures.figure(2 * len(counts), 3.3, 3.4)
    for edits, (left, right) in zip(counts, zip(panels[::2], panels[1::2], strict=True), strict=True):
        for solve, mark in zip(dict.fromkeys(row["solve"] for row in rows), ("o-", "s-", "^-", "D-"), strict=False):
            curve = [row for row in rows if row["solve"] == solve and row["edits"] == edits]
            curve.sort(key=lambda row: row["lambda"])
            paraphrase = [100 * row["paraphrase"] for row in curve]
            left.plot(paraphrase, [row["kl"] for row in curve], mark, markersize=3.5, linewidth=1, label=solve)
            right.plot(
                paraphrase, [100 * row["same_subject"] for row in curve], mark, markersize=3.5, linewidth=1, label=solve
            )
        left.set_yscale("log")
        figures.log_ticks(left.yaxis)
        left.set_ylabel("KL on other text, nats a token (lower is better)")
        right.set_ylabel("same subject, % (higher is better)")
        for axes in (left, right):
            axes.set_title(f"{edits} edits")
            axes.set_xlabel("paraphrase, % (higher is better)")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.suptitle(_machine([document["about"]]))
    return figure


@_styled
def endless_figure(document: Document) -> Any:
    """Seconds of an edit, by fold period, and bytes of the state, against the number of edits before it."""
    row, periods = document["rows"][0], _some(document["periods"], "whole fold periods")
    figure, (left, right) = figures.figure(2, 5, 3.8)
    places = [period["last"] for period in periods]
    left.plot(places, [period["mean_s"] for period in periods], label="mean of a fold period")
    left.plot(places, [period["edit_s"] for period in periods], label="median edit")
    if row["baseline_median_s"] is not None:
        left.axhline(row["baseline_median_s"], color="black", linestyle=":", label="published, fp32 (samples)")
    right.plot(places, [period["bytes"] / 2**20 for period in periods], label=f"window of {row['window']}")
    whole = [8 * (row["d"] ** 2 + row["d"] + row["d"] * place) / 2**20 for place in places]
    right.plot(places, whole, "--", label="no window: all keys, computed")
    right.axhline(row["bound"] / 2**20, color="black", linestyle=":", label="bound with the window")
    _label_halves(figure, left, right, "seconds an edit", f"single edits (d {row['d']})", document)
    return figure


GROWTH_TITLES = {"edits": "edits in one batch", "layers": "blocks", "hidden": "hidden size", "vocabulary": "vocabulary"}


@_styled
def growth_figure(document: Document) -> Any:
    """Edits a second above, peak bytes below, against each axis of growth; log-log, with the limit and the plan."""
    rows = _some([row for row in document["rows"] if not row["wrong"]], "points with right results")
    axes_of = [name for name in GROWTH_TITLES if any(row["axis"] == name for row in rows)]
    figure, panels = figures.figure(len(axes_of), 3.1, 2.9, rows=2)
    for name, above, below in zip(axes_of, panels, panels[len(axes_of) :], strict=False):
        curve = [row for row in rows if row["axis"] == name]
        places = [row["value"] for row in curve]
        whole = max(row["iterations"] for row in curve)
        alike = [row for row in curve if row["iterations"] == whole]
        for part, mark in ((alike, "o-"), ([row for row in curve if row not in alike], "o")):
            at = [row["value"] for row in part]
            above.plot(at, [row["edits_per_s"] for row in part], mark, color="#4c72b0", markersize=5,
                       markerfacecolor="#4c72b0" if part is alike else "white")  # fmt: skip
            dashes = {"linestyle": "--"} if part is alike else {"linestyle": "", "marker": "_", "markersize": 9}
            above.plot(at, [row["limit_edits_per_s"] for row in part], color="black", linewidth=1, **dashes)
        for row in curve:
            if row["iterations"] < whole:
                place = (row["value"], row["edits_per_s"])
                above.annotate(f"{row['iterations']} of {whole}\niterations", place, xytext=(-7, 0),
                               textcoords="offset points", ha="right", va="center", fontsize=6)  # fmt: skip
        memory = [row for row in curve if row["peak_bytes"]]
        below.plot([row["value"] for row in memory], [row["peak_bytes"] / 2**20 for row in memory], "s-",
                   color="#dd8452", markersize=4)  # fmt: skip
        below.plot(places, [sum(row["planned"].values()) / 2**20 for row in curve], "--", color="black", linewidth=1)
        for axes in (above, below):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.margins(0.12)
            figures.log_ticks(axes.yaxis)
            figures.ticks_at(axes.xaxis, places)
            axes.grid(alpha=0.3)
        below.set_xlabel(GROWTH_TITLES[name])
        above.set_title(f"{curve[0]['edits']} edits" if name != "edits" else curve[0]["case"])
    panels[0].set_ylabel("edits a second")
    panels[len(axes_of)].set_ylabel("peak above model and statistics, MiB")
    handles = [
        Line2D([], [], marker="o", color="#4c72b0", label="measured edits a second"),
        Line2D([], [], marker="s", color="#dd8452", label="measured peak"),
        Line2D([], [], linestyle="--", color="black", label="above: limit by formula; below: bytes by kedit-fast plan"),
    ]
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=3)
    figure.suptitle(_machine([document["about"]]))
    return figure


@_styled
def circuits_figure(document: Document) -> Any:
    """How the shares of all |score| by node changed with each method, beside halves and facts that were not edited.

    Grey bands are what halves of the prompts differ by; crosses are changes of the unedited facts.
    """
    rows = _some(document["rows"], "circuits before and after edits")
    figure, axes = figures.figure(len(rows), 3.6, 3.2)
    reach = max(abs(share["after"] - share["before"]) for row in rows for share in row["shares"])
    reach = max(reach, *(share["floor"] for row in rows for share in row["shares"])) * 1.1
    for panel, row in zip(axes, rows, strict=True):
        shares = row["shares"]
        places = range(len(shares))
        floors = [share["floor"] for share in shares]
        panel.bar(places, [2 * floor for floor in floors], 0.9, bottom=[-floor for floor in floors], color="0.9",
                  label="halves differ by")  # fmt: skip
        for edited, color, label in ((True, "#c44e52", "change, edited"), (False, "#4c72b0", "change, others")):
            some = [i for i in places if shares[i]["is_edited"] == edited]
            panel.bar(some, [shares[i]["after"] - shares[i]["before"] for i in some], 0.5, color=color, label=label)
        known = [i for i in places if shares[i]["control"] is not None]
        panel.plot(known, [shares[i]["control"] for i in known], "kx", markersize=4, label="change, facts not edited")
        panel.axhline(0, color="0.3", linewidth=0.6)
        panel.set_title(f"{row['method']}, {row['pairs']} facts", fontsize=8)
        panel.set_xticks(list(places), [share["name"] for share in shares], rotation=90, fontsize=6)
        panel.set_ylim(-reach, reach)
        panel.set_yticks([tick for tick in panel.get_yticks() if abs(tick) <= reach])
    axes[0].set_ylabel("change of the share of all |score|")
    figures.legend_beside(figure, axes[-1])
    figure.suptitle(_machine(rows))
    return figure


def _label_halves(figure: Any, left: Any, right: Any, seconds: str, places: str, document: Document) -> None:
    """Name the axes of a picture whose left half shows seconds, on a log scale, and whose right half bytes."""
    left.set_yscale("log")
    left.set_ylabel(seconds)
    left.margins(y=0.12)
    figures.log_ticks(left.yaxis)
    right.set_ylabel("state, MiB")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel(places)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.suptitle(_machine([document["about"]]))


def _changes(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Keys kept before a batch that took more than three times what both neighbors took: the form is made anew."""
    return [row["n"] for before, row, after in zip(rows, rows[1:], rows[2:], strict=False)
            if row["form"] == "auto" and row["seconds"] > 3 * max(before["seconds"], after["seconds"])]  # fmt: skip


def _some(rows: list[dict[str, Any]], description: str) -> list[dict[str, Any]]:
    if not rows:
        sys.exit(f"nothing to draw: this file has no {description}")
    return rows


def _machine(rows: Sequence[dict[str, Any]]) -> str:
    """Machines, versions of torch and commits of the rows."""
    machines = dict.fromkeys(f"{row['machine']}, torch {row['versions']['torch']}" for row in rows)
    commits = dict.fromkeys(row["commit"] for row in rows)
    return f"{'; '.join(machines)}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


@_styled
def _save(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def ratio_bars(document: Document, stem: Path) -> list[Path]:
    """Save `ratio_figure`."""
    return _save(ratio_figure(document), stem)


def roofline(document: Document, stem: Path) -> list[Path]:
    """Save `roofline_figure`."""
    return _save(roofline_figure(document), stem)


def batch_curves(document: Document, stem: Path) -> list[Path]:
    """Save `batch_figure`."""
    return _save(batch_figure(document), stem)


def saving_bars(document: Document, stem: Path) -> list[Path]:
    """Save `saving_figure`."""
    return _save(saving_figure(document), stem)


def sequence_curves(document: Document, stem: Path) -> list[Path]:
    """Save `sequence_figure`."""
    return _save(sequence_figure(document), stem)


def frontier_curves(document: Document, stem: Path) -> list[Path]:
    """Save `frontier_figure`."""
    return _save(frontier_figure(document), stem)


def endless_curves(document: Document, stem: Path) -> list[Path]:
    """Save `endless_figure`."""
    return _save(endless_figure(document), stem)


def growth_curves(document: Document, stem: Path) -> list[Path]:
    """Save `growth_figure`."""
    return _save(growth_figure(document), stem)


def circuit_bars(document: Document, stem: Path) -> list[Path]:
    """Save `circuits_figure`."""
    return _save(circuits_figure(document), stem)
