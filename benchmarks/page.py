"""The tables of benchmarks/README.md, from the committed results: one metric a table.

    python -m benchmarks.page            print them
    python -m benchmarks.page PAGE       replace them in a page

A page holds `<!-- table: NAME -->` and `<!-- end -->` around each table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import paper_plan
from benchmarks.architectures import VERDICTS
from benchmarks.frontier import compared
from benchmarks.harness import RESULTS, Row, read
from benchmarks.limits import PHASES
from benchmarks.long_targets import HEADER, cells
from benchmarks.mixture import EDITED, MODELS
from benchmarks.mixture import METHODS as MIXTURE_METHODS
from benchmarks.plots import GROWTH_TITLES, strongest
from benchmarks.quality import SEQUENCES, TITLES, VARIANTS
from benchmarks.quality_tuning import ROWS as TUNING_ROWS
from benchmarks.quality_tuning import TABLES as TUNING_TABLES
from benchmarks.quality_tuning import TUNING_SCENARIOS
from benchmarks.quality_tuning import cell as tuning_cell
from benchmarks.untuned import FIXED, points
from kedit_fast.methods.registry import RECIPES

MACHINE = "cpu_sapphire_rapids_2_threads"
GPU = "h200"
WHOLE = ("collect_statistics", "find_values", "KeyMemory")  # rows of the GPU that are no single ops
VARIANTS_FILE = "quality_variants"
TUNING_FILE = "quality_tuning"
LOOP_FILE = "cpu_zen4_2_threads_tuning"
TUNING_OPS_FILE = "cpu_zen4_2_threads_tuning_ops"
GROUPED_OPS_FILE = "cpu_zen4_2_threads_grouped_ops"
TRACING_FILE = "cpu_zen4_2_threads_tracing"
EDGES_FILE = "edge_scores"
EDGE_MEMORY_FILE = "edge_memory"
CIRCUITS_FILE = "circuits_after_edits"
METRICS = {
    "efficacy": lambda value: f"{value:.2f}",
    "paraphrase": lambda value: f"{value:.2f}",
    "neighborhood": lambda value: f"{value:.2f}",
    "drift": lambda value: f"{value:+.3f}",
    "seconds": lambda value: f"{value:.0f}",
    "retention": lambda value: f"{value:.2f}",
}

CAUSES = {
    "is a mixture-of-experts model": "a mixture whose experts are no plain stack",
    "decoder blocks stands beside the input embedding": "no list of decoder blocks stands beside the input embedding",
    "share memory": "blocks share their MLP: an edit of one changes the others",
    "no linear layer that ends an MLP": "no MLP was found in its blocks",
    "a size that no small number reaches": "a size that no small number reaches",
    "validation error": "its configuration refuses the small numbers",
}
"""Words of a reason -> how the page says it."""


def rows_in(name: str) -> list[Row]:
    """The rows of a committed document."""
    return read(RESULTS / f"{name}.json")["rows"]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in (columns, *rows))
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def quality(metric: str) -> str:
    """A row for each method and a column for each scenario."""
    rows = {(row["method"], row["scenario"]): row for row in rows_in("quality_demo")}
    scenarios = [name for name in TITLES if any((method, name) in rows for method in RECIPES)]
    scenarios = [s for s in scenarios if any(rows.get((m, s), {}).get(metric) is not None for m in RECIPES)]

    def cell(method: str, scenario: str) -> str:
        row = rows.get((method, scenario), {})
        return "n/a" if "n/a" in row else "" if row.get(metric) is None else METRICS[metric](row[metric])

    methods = [method for method in RECIPES if any((method, scenario) in rows for scenario in scenarios)]
    return table(
        ["method", *(TITLES[scenario] for scenario in scenarios)],
        ([f"`{method}`", *(cell(method, scenario) for scenario in scenarios)] for method in methods),
    )


def frontier() -> str:
    """KL and shares of both solves at equal paraphrase."""
    lines, measured = [], (RESULTS / "frontier_demo.json").exists()
    for edits, level, plain, weighed in compared(rows_in("frontier_demo") if measured else []):
        pairs = [f"{plain[name]:.3f} / {weighed[name]:.3f}" for name in ("same_subject", "neighborhood", "efficacy")]
        lambdas = f"{plain['lambda']:.0f} / {weighed['lambda']:.0f}"
        kl = f"{plain['kl']:.3g} / {weighed['kl']:.3g}"
        lines.append((str(edits), f"{level:.2f}", kl, f"{weighed['kl'] / plain['kl'] - 1:+.0%}", *pairs, lambdas))
    names = ("same subject", "neighborhood", "efficacy", "lambda")
    return table(("edits", "paraphrase", "KL, nats a token", "change", *names), lines)


def quality_variants() -> str:
    """A row for each variant and scenario."""
    if not (RESULTS / f"{VARIANTS_FILE}.json").exists():
        return "Not measured yet."
    rows = {(row["variant"], row["scenario"]): row for row in rows_in(VARIANTS_FILE)}
    metrics = [metric for metric in METRICS if metric != "seconds"]

    def cells(row: Row) -> list[str]:
        return [METRICS[metric](row[metric]) if row.get(metric) is not None else "n/a" for metric in metrics]

    scenarios = [scenario for scenario in SEQUENCES if any((name, scenario) in rows for name in VARIANTS)]
    return table(
        ["variant", *(f"{TITLES[scenario]}: {metric}" for scenario in scenarios for metric in metrics)],
        (
            [name, *(cell for scenario in scenarios for cell in cells(rows.get((name, scenario), {})))]
            for name in VARIANTS
            if any((name, scenario) in rows for scenario in scenarios)
        ),
    )


def quality_tuning(name: str) -> str:
    """A row for each method that tunes or is compared with those, and a column for each scenario."""
    if not (RESULTS / f"{TUNING_FILE}.json").exists():
        return "Not measured yet."
    rows = {(row["variant"], row["scenario"]): row for row in rows_in(TUNING_FILE)}
    scenarios = [
        scenario for scenario in TUNING_SCENARIOS if any((variant, scenario) in rows for variant in TUNING_ROWS)
    ]
    return table(
        ["method", *(TITLES[scenario] for scenario in scenarios)],
        (
            [f"`{variant}`", *(tuning_cell(rows.get((variant, s)), TUNING_TABLES[name]) for s in scenarios)]
            for variant in TUNING_ROWS
            if any((variant, scenario) in rows for scenario in scenarios)
        ),
    )


def tuning_loop() -> str:
    """Our median, the published loop's, and their ratio beside its floor."""
    if not (RESULTS / f"{LOOP_FILE}.json").exists():
        return "Not measured yet."
    lines = [
        (f"`{row['op'].removeprefix('tuning ')}`", row["case"], f"{row['median_s']:.3g}",
         f"{row['baseline_median_s']:.3g}", f"{row['ratio']:.1f}", f"{row['floor']:g}", f"{row['error']:.0e}")
        for row in rows_in(LOOP_FILE)
    ]  # fmt: skip
    names = ("method", "case", "seconds", "seconds of the published loop", "ratio", "floor", "error of the change")
    return table(names, lines)


def op_ratios(name: str) -> str:
    """Ratios of the ops in a file over every baseline, and our median times."""
    lines = [
        (f"`{op}`", case, dtype, rows[0]["isa"], f"{rows[0]['median_s'] * 1e3:.3g}",
         "; ".join(f"{row['ratio']:.1f} over `{row['baseline']}`" for row in rows))
        for (op, case, dtype), rows in cases(name).items()
    ]  # fmt: skip
    return table(("op", "case", "dtype", "instruction set", "ms", "ratios"), lines)


def cases(name: str = MACHINE) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of the ops by case: the first against the expression, the next against it compiled."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows_in(name):
        grouped.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    return grouped


def ops_ratios() -> str:
    """Ratios against the torch expressions."""
    lines = []
    for (op, case, dtype), rows in cases().items():
        if rows[0]["flops"] is not None:
            compiled = [f"{row['ratio']:.1f}" for row in rows if "compile" in row["baseline"]]
            lines.append((f"`{op}`", case, dtype, f"{rows[0]['ratio']:.1f}", "".join(compiled[:1])))
    return table(("op", "case", "dtype", "over eager", "over compiled"), lines)


def ops_times() -> str:
    """Our median times."""
    lines = [
        (f"`{op}`", case, dtype, rows[0]["isa"], f"{rows[0]['median_s'] * 1e3:.3g}")
        for (op, case, dtype), rows in cases().items()
        if rows[0]["flops"] is not None
    ]
    return table(("op", "case", "dtype", "instruction set", "ms"), lines)


def ops_overhead() -> str:
    """Time of a call on 16 elements."""
    lines = [
        (f"`{op}`", first["backend"], f"{first['median_s'] * 1e6:.0f}", f"{first['baseline_median_s'] * 1e6:.0f}")
        for (op, _, _), (first, *_) in cases().items()
        if first["flops"] is None
    ]
    return table(("op", "backend", "µs", "µs of the torch expression"), lines)


def seconds_and_ratio(name: str, op: str | None = None) -> str:
    """Our median, the baseline's, and their ratio."""
    lines = [
        (
            row["case"],
            row["baseline"],
            f"{row['median_s']:.3g}",
            f"{row['baseline_median_s']:.3g}",
            f"{row['ratio']:.1f}",
        )
        for row in rows_in(f"{MACHINE}_{name}")
        if (row["op"] == "value iteration") == (op == "value iteration")
    ]
    return table(("case", "baseline", "seconds", "seconds of the baseline", "ratio"), lines)


def tracing() -> str:
    """Seconds of ours and of the published loop, and their ratio beside floor and goal."""
    lines = [
        (row["case"], f"{row['median_s']:.3g}", f"{row['baseline_median_s']:.3g}", f"{row['ratio']:.1f}",
         f"{row['cpu_ratio']:.1f}", f"{row['floor']:g}, {row['goal']:g}", f"{row['error']:.0e}")
        for row in rows_in(TRACING_FILE)
    ]  # fmt: skip
    names = ("case", "seconds", "seconds of the published loop", "ratio", "ratio of processor time", "floor, goal",
             "largest error of a probability, of the largest effect")  # fmt: skip
    return table(names, lines)


def edge_time() -> str:
    """Seconds of ours and of the published algorithm, and their ratio beside floor and goal."""
    lines = [
        (row["case"], row["baseline"], f"{row['median_s']:.3g}", f"{row['baseline_median_s']:.3g}",
         f"{row['ratio']:.2f}", f"{row['floor']:g}, {row['goal']:g}", f"{row['error']:.0e}")
        for row in rows_in(EDGES_FILE)
    ]  # fmt: skip
    names = ("case", "baseline", "seconds", "seconds of the baseline", "ratio", "floor, goal", "error")
    return table(names, lines)


def edge_memory() -> str:
    """Bytes a token above a plain forward and backward pass, measured and by formula."""
    lines = []
    for row in rows_in(EDGE_MEMORY_FILE):
        measured = ", ".join(f"{value:.3f}" for value in row["measured_mb"])
        rest = (f"{row[name]:.2f}" for name in ("extrapolated_mb", "formula_mb", "limit_mb"))
        lines.append((row["case"], measured, *rest))
    names = ("case", "MB a token, measured on fewer layers", "extrapolated", "by formula", "at most")
    return table(names, lines)


def circuits_after_edits() -> str:
    """The circuits of the edited facts before and after, beside split halves and facts that were not edited."""
    lines = []
    for row in rows_in(CIRCUITS_FILE):
        for overlap in row["overlaps"]:
            floor = min(overlap["floor_before"]["low"], overlap["floor_after"]["low"])
            control = "" if overlap["control"] is None else f"{overlap['control']['value']:.2f}"
            claim = "below both" if overlap["is_beyond"] else ""
            lines.append((
                f"`{row['method']}`", f"{row['pairs']} of {row['requests']}", overlap["name"],
                f"{overlap['edited']['value']:.2f}", f"{floor:.2f}", control, f"{overlap['chance']:.2f}", claim,
            ))  # fmt: skip
    names = ("method", "facts", "of |score|", "before against after", "lowest of halves", "not edited", "by chance", "")
    return table(names, lines)


def circuit_faithfulness() -> str:
    """What the circuits from before and after do in both models."""
    lines = []
    for row in rows_in(CIRCUITS_FILE):
        runs = {(run["circuit"], run["model"]): run for run in row["runs"]}

        def cell(circuit: str, model: str, runs: dict[tuple[str, str], Row] = runs) -> str:
            run = runs.get((circuit, model))
            if run is None or run["value"] is None:
                return "n/a"
            return f"{run['value']:.2f} ({run['low']:.2f} to {run['high']:.2f})"

        edited = ", ".join(row["edited"])
        lines.append((
            f"`{row['method']}`", edited,
            *(cell(circuit, model) for model in ("before", "after") for circuit in ("before", "after", "random")),
        ))  # fmt: skip
    names = (f"{model} model: {circuit}" for model in ("unedited", "edited")
             for circuit in ("circuit before", "circuit after", "random ones"))  # fmt: skip
    return table(("method", "edited", *names), lines)


def circuit_shares() -> str:
    """Shares of all |score| that leave the attention and the MLP of a layer: the edited ones and those that changed."""
    lines = []
    for row in rows_in(CIRCUITS_FILE):
        for share in (share for share in row["shares"] if share["is_edited"] or share["is_beyond"]):
            control = "" if share["control"] is None else f"{share['control']:+.3f}"
            name = f"**{share['name']}**" if share["is_edited"] else share["name"]
            lines.append((
                f"`{row['method']}`", name, f"{share['before']:.3f}", f"{share['after']:.3f}",
                f"{share['after'] - share['before']:+.3f}", f"{share['floor']:.3f}", control,
                "beyond both" if share["is_beyond"] else "",
            ))  # fmt: skip
    return table(("method", "part", "before", "after", "change", "halves differ by", "change, not edited", ""), lines)


def evaluation() -> str:
    """Records a second, and how much faster than the published code by the wall's clock and by processor time."""
    measured = (RESULTS / "evaluation.json").exists()
    lines = [
        (row["case"], f"{row['records_per_s']:.2f}", f"{row['ratio']:.1f}", f"{row['cpu_ratio']:.1f}",
         f"{row['error']:.0e}")
        for row in (rows_in("evaluation") if measured else ())
    ]  # fmt: skip
    return table(("case", "records per second", "ratio", "ratio of processor time", "largest error of an NLL"), lines)


def sequence() -> str:
    """What a single edit costs over a long sequence, and what is held."""
    if not (RESULTS / "sequence.json").exists():
        return "Not measured yet."
    document = read(RESULTS / "sequence.json")
    (row,), flat, periods = document["rows"], document["flat"], document["periods"]
    parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in document["profile"].items())
    lines = [
        ("mean of all edits, folds included, ms", f"{row['mean_s'] * 1e3:.2f}"),
        ("median edit, ms", f"{row['median_s'] * 1e3:.2f}: {parts}"),
        ("fold, ms", f"{row['fold_s'] * 1e3:.0f}, every {row['columns']} edits"),
        ("first and last fold period, ms an edit", " ".join(f"{periods[i]['mean_s'] * 1e3:.2f}" for i in (0, -1))),
        (
            f"largest deviation from the mean after edit {flat['after']}: of a period, of four together",
            f"{flat['largest_deviation']:.1%}, {flat['largest_deviation_together']:.1%}",
        ),
        ("last to first quarter of these", f"{flat['last_to_first_quarter']:.3f}"),
        ("state, MiB", f"{row['bytes'] / 2**20:.1f} of at most {row['bound'] / 2**20:.1f}"),
        ("error of the last update's equation", f"{row['error']:.0e}"),
        (f"{row['baseline']}, ms", f"{row['baseline_median_s'] * 1e3:.0f}, {row['baseline_samples']} samples"),
        ("its update differs by", f"{row['baseline_error']:.0e}"),
        ("ratio", f"{row['ratio']:.0f}"),
    ]
    return table((row["case"], f"{row['machine']}, {row['commit']}"), lines)


def growth() -> str:
    """Each point's rate, time by phase, limit, peak and the plan's bytes."""
    if not (RESULTS / "growth.json").exists():
        return "Not measured yet."
    lines = []
    for row in rows_in("growth"):
        size = f"{row['value']:,} {GROWTH_TITLES[row['axis']]}" if row["axis"] != "edits" else "demo model"
        start = (size, f"{row['edits']:,}", f"{row['iterations']}", f"{row['steps']:.1f}")
        if row["wrong"]:
            lines.append((*start, "wrong result", *("",) * 9))
            continue
        seconds = (f"{row['seconds'][phase]:.3g}" for phase in PHASES)
        efficacy = "" if row["efficacy"] is None else f"{row['efficacy']:.2f}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append((
            *start, f"{row['edits_per_s']:.3g}", *seconds, f"{row['limit_edits_per_s']:.3g}",
            f"{row['share_of_limit']:.0%}", memory, f"{sum(row['planned'].values()) / 2**20:,.0f}", efficacy,
        ))  # fmt: skip
    names = ("model", "edits", "iterations", "steps", "edits a second", *(f"{phase}, s" for phase in PHASES),
             "limit", "share of it", "peak MiB", "plan's MiB", "efficacy")  # fmt: skip
    picture = "\n\n![edits a second and bytes against each size](results/growth_curves.png)"
    return table(names, lines) + (picture if (RESULTS / "growth_curves.png").exists() else "")


def growth_on_paper() -> str:
    """Llama-3-70B on eight GPUs, by formula."""
    return table(("Llama-3-70B", *(f"{edits:,} edits" for edits in paper_plan.EDITS)), paper_plan.lines())


def long_targets() -> str:
    """How much of a long target an edit makes the model say, by the length of its chunks."""
    measured = (RESULTS / "long_targets.json").exists()
    return table(HEADER, [cells(row) for row in (rows_in("long_targets") if measured else ())])


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows by the values of some fields, in order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def untuned() -> str:
    """A row for each model, method and source of hyper-parameters, with points against the best of the grid."""
    lines, rows = [], rows_in("untuned")
    for row in rows:
        shares = [METRICS[name](row[name]) for name in ("efficacy", "paraphrase", "neighborhood", "drift")]
        above = [f"{value:+.0f}" if row["source"] != "grid" else "" for value in points(row, rows).values()]
        lines.append((row["model"], f"`{row['method']}`", row["source"], *shares, *above))
    names = ("efficacy", "paraphrase", "neighborhood")
    return table(("model", "method", "numbers", *names, "drift", *(f"points of {name}" for name in names)), lines)


def untuned_grid() -> str:
    """The values of every hyper-parameter of each grid."""
    lines = []
    for (model, method), rows in grouped(read(RESULTS / "untuned.json")["grid"], "model", "method").items():
        chosen = [{name: value for name, value in row["hparams"].items() if name not in FIXED} for row in rows]
        runs = {(hparams["layers"][-1], hparams["clamp_norm_factor"], hparams["v_lr"]) for hparams in chosen}
        values = (f"`{name}` {', '.join(dict.fromkeys(shown(h[name]) for h in chosen))}" for name in chosen[0])
        lines.append((model, f"`{method}`", str(len(runs)), str(len(rows)), "; ".join(values)))
    return table(("model", "method", "runs of values", "solves", "hyper-parameters"), lines)


def mixture() -> str:
    """A row for each model, scenario and method, with the routing shift of the mixture."""
    rows = rows_in("mixture") if (RESULTS / "mixture.json").exists() else []

    def order(row: Row) -> tuple[int, int, int]:
        return MODELS.index(row["model"]), EDITED.index(row["scenario"]), MIXTURE_METHODS.index(row["method"])

    def line(row: Row) -> list[str]:
        shares = [f"{row[n]:.2f}" for n in ("efficacy", "paraphrase", "neighborhood_before", "neighborhood")]
        retention = "" if row["retention"] is None else f"{row['retention']:.2f}"
        shift = "" if row["routing"] is None else f"{row['routing']:.3f}"
        layers = ", ".join(map(str, row["layers"]))
        nll = f"{row['nll_before']:.3f} {row['drift']:+.3f}"
        return [row["model"], TITLES[row["scenario"]], f"`{row['method']}`", layers, *shares, nll, retention, shift]

    names = ("model", "edits", "method", "layers", "efficacy", "paraphrase", "neighborhood before", "neighborhood",
             "NLL", "retention", "routing shift")  # fmt: skip
    return table(names, [line(row) for row in sorted(rows, key=order)])


def shown(value: Any) -> str:
    """A hyper-parameter; layers as first-last."""
    return (
        "-".join(str(layer) for layer in dict.fromkeys((value[0], value[-1])))
        if isinstance(value, list)
        else f"{value}"
    )


def statistics_rate() -> str:
    """Tokens a second of statistics."""
    lines = [
        (row["case"], f"{row['tokens_per_s']:,.0f}", f"{row['share_of_peak']:.0%}", f"{row['error']:.0e}")
        for row in rows_in(f"{MACHINE}_statistics")
    ]
    return table(("case", "tokens per second", "share of peak", "error against fp64 sums"), lines)


MEANINGS = {
    "tails": "the fast path: the tail of each prompt, from the subject on",
    "whole": "whole prompts in every step, probabilities from the head's matrix",
    "logits": "whole prompts in every step, probabilities from the model's own logits",
    "wrong": "see below",
    "refused": "see below",
    "no decoder": "encoder-decoders, and models in which later tokens change earlier ones",
    "not built": "no tiny model could be made",
}


def architectures() -> str:
    """The types of each verdict; those whose modules were found and not listed in `ARCHITECTURES` in italics."""
    lines = []
    for verdict in VERDICTS:
        rows = [row for row in rows_in("architectures") if row["verdict"] == verdict]
        types = (f"*{row['type']}*" if row.get("spec") == "found" else row["type"] for row in rows)
        if rows:
            lines.append((verdict, MEANINGS[verdict], str(len(rows)), ", ".join(types)))
    return table(("values", "by", "types", "which"), lines)


def architectures_errors() -> str:
    """The worst relative errors among the types of each path."""
    lines = []
    for verdict in VERDICTS[:3]:
        rows = [row for row in rows_in("architectures") if row["verdict"] == verdict]
        names = ("values mlp_error", "values block_error", "keys_error", "statistics_error", "update_error")
        worst = [max((row[name] for row in rows if name in row), default=None) for name in names]
        if rows:
            lines.append((verdict, *("" if error is None else f"{error:.0e}" for error in worst)))
    return table(("path", "values at the MLP", "values at the block", "keys", "statistics", "MEMIT's update"), lines)


def architectures_refused() -> str:
    """Why types are refused, and what is wrong: the beginning of each reason, and the types."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows_in("architectures"):
        if row["verdict"] in ("wrong", "refused", "not built"):
            reasons.setdefault((row["verdict"], cause(row)), []).append(row["type"])
    return table(("verdict", "reason", "types"), ((v, reason, ", ".join(t)) for (v, reason), t in reasons.items()))


def cause(row: Row) -> str:
    """A reason without the names and numbers of one model."""
    for words, text in CAUSES.items():
        if words in row["reason"]:
            return text
    return row["reason"].split(". ")[0].replace("|", "/")


def gpu_ops() -> str:
    """Our median, and the ratio over the fastest baseline."""
    lines = [
        (f"`{row['op']}`", row["case"].removesuffix(f", {row['backend']}"), row["dtype"], row["backend"],
         f"{row['median_s'] * 1e3:.3g}", f"{row['ratio']:.2f}", f"{row['error']:.0e}")
        for row in strongest({"rows": rows_in(GPU)})
        if row["op"] not in WHOLE
    ]  # fmt: skip
    return table(("op", "case", "dtype", "backend", "ms", "over the fastest baseline", "error"), lines)


def gpu_whole() -> str:
    """Our median, the baseline's, and their ratio."""
    lines = [
        (f"`{row['op']}`", row["case"], row["dtype"], row["baseline"], f"{row['median_s']:.3g}",
         f"{row['baseline_median_s']:.3g}", f"{row['ratio']:.1f}", f"{row['error']:.0e}")
        for row in rows_in(GPU)
        if row["op"] in WHOLE
    ]  # fmt: skip
    columns = ("function", "case", "dtype", "baseline", "seconds", "seconds of the baseline", "ratio", "error")
    return table(columns, lines)


def gpu_heads() -> str:
    """The head ops on Triton's kernels and on torch's products, and the fastest baseline beside each."""
    now = {(row["op"], row["case"]): row for row in strongest({"rows": rows_in(GPU)})}
    lines = []
    for row in strongest({"rows": rows_in(f"{GPU}_head_kernels")}):
        products = now[row["op"], row["case"]]
        lines.append((
            f"`{row['op']}`", row["case"], row["dtype"],
            *(f"{each['median_s'] * 1e3:.3g} ({each['ratio']:.2f})" for each in (row, products)),
        ))  # fmt: skip
    return table(("op", "case", "dtype", "kernel: ms (ratio)", "torch's products: ms (ratio)"), lines)


def gpu_tests() -> str:
    """What pytest said of every file with tests that use a GPU."""
    figures = [figure for figure in read(RESULTS / f"{GPU}.json")["figures"] if figure["stage"] == "test"]
    lines = [
        (figure["what"].removeprefix("tests, "), re.sub(r" in [\d.]+s.*", "", figure["result"]), figure["commit"])
        for figure in figures
    ]
    return table(("tests", "result", "commit"), lines)


def harm() -> str:
    """Measured over predicted divergence, for each method and number of edits."""
    rows = {(row["method"], row["edits"]): row for row in rows_in("harm")}
    counts = list(dict.fromkeys(count for _, count in rows))
    lines = []
    for method in dict.fromkeys(method for method, _ in rows):
        cells = []
        for row in (rows.get((method, count)) for count in counts):
            if row is None:
                cells.append("")
                continue
            spread = "" if row["groups"] == 1 else f", {row['lowest']:.2f} to {row['highest']:.2f}"
            cells.append(f"{row['ratio']:.2f} ({row['predicted_kl']:.1e}{spread})")
        lines.append((f"`{method}`", *cells))
    return table(("method", *(f"{count} edits" if count > 1 else "1 edit" for count in counts)), lines)


def harm_of(kind: str, name: str, title: str) -> str:
    """Measured over predicted divergence of the same edits, by another number."""
    rows = read(RESULTS / "harm.json")[kind]
    return table(
        (title, *(f"{row[name]:g}" for row in rows)),
        [("measured / predicted", *(f"{row['ratio']:.2f}" for row in rows))],
    )


def erasure() -> str:
    """What a probe reads before and after, and what it costs."""
    return table(
        ("way", "layer", "kinds", "probe before", "probe after", "chance", "drift", "facts still said"),
        (
            (
                row["way"], str(row["layer"]), str(row["kinds"]), f"{row['before']:.2f}", f"{row['after']:.2f}",
                f"{1 / row['kinds']:.2f}", f"{row['drift']:+.3f}", f"{row['facts']:.2f}",
            )
            for row in rows_in("erasure")
        ),
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    **{f"quality {metric}": lambda metric=metric: quality(metric) for metric in METRICS},
    "frontier": frontier,
    "quality variants": quality_variants,
    **{f"quality tuning {name}": lambda name=name: quality_tuning(name) for name in TUNING_TABLES},
    "long targets": long_targets,
    "ops ratios": ops_ratios,
    "ops times": ops_times,
    "ops overhead": ops_overhead,
    "tuning loop": tuning_loop,
    "tuning ops": lambda: op_ratios(TUNING_OPS_FILE),
    "grouped ops": lambda: op_ratios(GROUPED_OPS_FILE),
    "values": lambda: seconds_and_ratio("values"),
    "savings": lambda: seconds_and_ratio("values", "value iteration"),
    "solver": lambda: seconds_and_ratio("solver"),
    "sequence": sequence,
    "growth": growth,
    "growth on paper": growth_on_paper,
    "statistics": lambda: seconds_and_ratio("statistics"),
    "statistics rate": statistics_rate,
    "evaluation": evaluation,
    "tracing": tracing,
    "edge scores": edge_time,
    "edge memory": edge_memory,
    "circuits after edits": circuits_after_edits,
    "circuit faithfulness": circuit_faithfulness,
    "circuit shares": circuit_shares,
    "harm": harm,
    "harm of parts": lambda: harm_of("scales", "scale", "part of the update"),
    "harm by lambda": lambda: harm_of("lambdas", "lambda", "lambda"),
    "erasure": erasure,
    "untuned": untuned,
    "untuned grid": untuned_grid,
    "mixture": mixture,
    "architectures": architectures,
    "architectures errors": architectures_errors,
    "architectures refused": architectures_refused,
    "gpu whole": gpu_whole,
    "gpu ops": gpu_ops,
    "gpu heads": gpu_heads,
    "gpu tests": gpu_tests,
}


def replaced(page: str) -> str:
    """A page with every table between its marks replaced."""
    return re.sub(
        r"<!-- table: ([\w ]+) -->.*?<!-- end -->",
        lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        path = Path(sys.argv[1])
        path.write_text(replaced(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{build()}" for name, build in TABLES.items()))
