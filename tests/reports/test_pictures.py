"""What pictures say: bars end at their numbers, axes hold the data, every series is there, no text hides another."""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
from kedit_fast.reports import convergence, spectra
from kedit_fast.reports.convergence import Row
from kedit_fast.reports.spectra import Spectrum
from kedit_fast.support import figures

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NAME = "cpu_sapphire_rapids_2_threads"
source_tree = pytest.mark.skipif(not RESULTS.is_dir(), reason="no source tree")
ABOUT = {"machine": "A processor, 2 threads", "versions": {"torch": "2.13.0"}, "commit": "abc1234"}


def check_readable(figure):
    """Tick labels of an axis stay apart, no block of text lies on another or on the axes, nothing is cut off."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    blocks = [figure._suptitle, *figure.legends]
    inside = []
    for axes in figure.axes:
        blocks += [axes.title, axes.xaxis.label, axes.yaxis.label, axes.get_legend()]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            labels = [tick.label1 for tick in ticks if min(low, high) <= tick.get_loc() <= max(low, high)]
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()]
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2)), [label.get_text() for label in labels]
            inside += boxes
        frame = axes.get_window_extent(renderer)
        for text in axes.texts:  # numbers beside bars
            box = text.get_window_extent(renderer)
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    shown = [block for block in blocks if block is not None and getattr(block, "get_text", lambda: "legend")()]
    frames = [axes.get_window_extent(renderer) for axes in figure.axes]
    boxes = [block.get_window_extent(renderer) for block in shown]
    assert not any(a.overlaps(b) for a, b in combinations([*boxes, *frames], 2)), shown
    whole = figure.bbox
    for box in [*boxes, *inside]:
        assert whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1 and whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1
    return figure


def check_inside(axes):
    """Every point of every curve lies in the axes' limits; returns the curves by label."""
    (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    found = {}
    for line in axes.get_lines():
        if line.get_transform() == axes.transData:
            assert all(left <= x <= right for x in line.get_xdata()), line.get_label()
            assert all(bottom <= y <= top for y in line.get_ydata()), line.get_label()
            found[line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


def committed(suffix=""):
    return json.loads((RESULTS / f"{NAME}{suffix}.json").read_text(encoding="utf-8"))


def row(op, ratio, case="case", dtype="float32", floor=None, **other):
    return {"op": op, "case": case, "dtype": dtype, "backend": "cpu", "ratio": ratio, "floor": floor, "flops": 10**9,
            "bytes": 10**8, "median_s": 0.01, **ABOUT, **other}  # fmt: skip


PEAKS = {"copy_bytes_per_s": 2e10, "fp32_flops_per_s": 2e11, "bf16_flops_per_s": 6e11, "fp64_flops_per_s": 9e10}
RATIOS = {
    "what is committed": None,
    "one row": [1.7],
    "all near one": [0.98, 1.0, 1.01],
    "all slower": [0.3, 0.25, 0.9],
    "far apart": [0.004, 0.5, 1.0, 30.0, 900.0],
    "a failed floor": [(0.8, 5.0), (1.2, 5.0)],
}


@source_tree
@pytest.mark.parametrize("kind", RATIOS)
def test_ratio_bars_end_at_their_ratios_and_begin_at_one(kind):
    from benchmarks import plots

    if RATIOS[kind] is None:
        document = committed()
    else:
        pairs = [given if isinstance(given, tuple) else (given, None) for given in RATIOS[kind]]
        document = {"rows": [row("spd_solve", r, f"case {i}", floor=f) for i, (r, f) in enumerate(pairs)]}
    rows = plots.strongest(document)
    (axes,) = check_readable(plots.ratio_figure(document)).axes
    assert len(axes.patches) == len(rows)
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log" and 0 < low < 1 < high
    lengths = []
    for bar, wanted, label, text in zip(axes.patches, rows, axes.get_yticklabels(), axes.texts, strict=True):
        begin, end = bar.get_x(), bar.get_x() + bar.get_width()
        assert begin == 1 and end == pytest.approx(wanted["ratio"]) and low < end < high
        assert wanted["op"] in label.get_text() and text.get_text() == f"{wanted['ratio']:.2f}"
        box = bar.get_window_extent()
        lengths.append((box.x1 - box.x0, abs(math.log(wanted["ratio"]))))
    # What is seen is as long as the ratio's logarithm says: no bar runs into the frame.
    scale = max(seen for seen, _ in lengths) / max(log for _, log in lengths)
    assert all(seen == pytest.approx(log * scale, abs=0.5) for seen, log in lengths)
    marks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linewidth() == 1.5]
    assert marks == [r["floor"] for r in rows if r["floor"]] and all(low < mark < high for mark in marks)
    assert len([t for t in axes.get_xticklabels() if t.get_text() and low <= t.get_position()[0] <= high]) >= 3


@source_tree
def test_a_case_that_ran_on_two_backends_has_a_bar_for_each():
    from benchmarks import plots

    rows = [row("rank_k_update_", 2.0), row("rank_k_update_", 3.0) | {"backend": "triton"}]
    (axes,) = plots.ratio_figure({"rows": rows}).axes
    assert [label.get_text().split("(")[1] for label in axes.get_yticklabels()] == ["cpu)", "triton)"]


@source_tree
def test_a_title_names_every_commit_that_was_measured():
    from benchmarks import plots

    document = committed()
    for figure in (plots.ratio_figure(document), plots.roofline_figure(document)):
        title = (figure._suptitle or figure.axes[0].title).get_text()
        assert all(commit in title for commit in {r["commit"] for r in document["rows"]})


@source_tree
@pytest.mark.parametrize("which", ("what is committed", "one row"))
def test_the_roofline_has_a_point_a_row_in_the_colour_of_its_op_and_its_roofs(which):
    from benchmarks import plots

    document = committed() if which == "what is committed" else {"rows": [row("an op", 1.0)], "peaks": PEAKS}
    rows = plots.strongest(document)
    figure = check_readable(plots.roofline_figure(document))
    (axes,) = figure.axes
    check_inside(axes)
    points = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    legend = figure.legends[0]
    named = dict(zip((text.get_text() for text in legend.get_texts()), legend.legend_handles, strict=True))
    assert len(points) == len(rows)
    for point, wanted in zip(points, rows, strict=True):
        assert point.get_xdata()[0] == pytest.approx(wanted["flops"] / wanted["bytes"])
        assert point.get_ydata()[0] == pytest.approx(wanted["flops"] / wanted["median_s"] / 1e9)
        assert point.get_color() == named[wanted["op"]].get_color()
        assert point.get_marker() == named[wanted["dtype"]].get_marker()
    ops = {wanted["op"] for wanted in rows}
    assert len({named[op].get_color() for op in ops}) == len(ops)
    roofs = {line.get_label(): max(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) == 3}
    for name in ("fp32", "bf16", *(["fp64"] if any(r["dtype"] == "float64" for r in rows) else [])):
        rate = document["peaks"][f"{name}_flops_per_s"] / 1e9
        assert roofs[f"torch.mm {name}: {rate:.0f} GFLOP/s"] == pytest.approx(rate)


@source_tree
@pytest.mark.parametrize("with_memory", (True, False))
def test_batches_have_a_panel_for_speed_and_one_for_memory(with_memory):
    from benchmarks import plots

    rows = [{"batch": 2**i, "edits": 8, "edits_per_s": 2.0 + i % 3, "peak_bytes": (500 + 9 * i) * 2**20 if with_memory
             else None} for i in range(8)]  # fmt: skip
    every = check_readable(plots.batch_figure({"about": ABOUT, "batches": rows})).axes
    assert len(every) == 1 + with_memory
    speed = check_inside(every[0])["edits a second"]
    assert speed == ([r["batch"] for r in rows], [r["edits_per_s"] for r in rows])
    if with_memory:
        assert check_inside(every[1])["peak memory, MiB"][1] == [500 + 9 * i for i in range(8)]
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylabel() for axes in every)


@source_tree
@pytest.mark.parametrize("which", ("what is committed", "all slower"))
def test_saving_bars_begin_at_zero_and_end_at_their_ratios(which):
    from benchmarks import plots

    slower = [row("value iteration", 0.5 + 0.1 * i, f"model, one iteration: saving {i} alone") for i in range(4)]
    document = committed("_values") if which == "what is committed" else {"rows": slower, "about": ABOUT}
    rows = [r for r in document["rows"] if r["op"] == "value iteration"]
    (axes,) = check_readable(plots.saving_figure(document)).axes
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "linear" and low == 0 and high > 1 and len(axes.patches) == len(rows) > 0
    for bar, wanted, text in zip(axes.patches, rows, axes.texts, strict=True):
        assert bar.get_x() == 0 and bar.get_width() == pytest.approx(wanted["ratio"]) and bar.get_width() < high
        assert text.get_text() == f"{wanted['ratio']:.2f}"


@source_tree
def test_sequence_curves_hold_every_form_and_the_published_one():
    from benchmarks import plots

    document = committed("_solver")
    left, right = check_readable(plots.sequence_figure(document)).axes
    seconds, state = check_inside(left), check_inside(right)
    for form in ("dual", "primal", "auto"):
        own = [r for r in document["sequence"] if r["form"] == form]
        (label,) = (label for label in seconds if label.startswith(form))
        assert seconds[label] == ([r["n"] for r in own], [r["seconds"] for r in own])
        assert state[form][1] == [r["bytes"] / 2**20 for r in own]
    assert "auto (changes form at 2000)" in seconds  # its peak is said
    own = [r for r in document["sequence"] if "published_seconds" in r]
    assert seconds["published, fp32"][1] == [r["published_seconds"] for r in own]
    assert state["published: P and cache, fp32"][1] == [r["published_bytes"] / 2**20 for r in own]
    assert right.get_ylim()[0] == 0


def spectrum(layer, values):
    values = torch.tensor(sorted(values), dtype=torch.float64)
    return Spectrum("m", layer, len(values), 100, float(values.sum()), 1.0, 1.0, {}, values)


@pytest.mark.parametrize("layers", (1, 5, 32, 80))
def test_a_spectrum_has_a_curve_a_layer_in_a_colour_of_its_own(layers):
    found = [spectrum(i, [10.0 ** (3 - 5 * j / 63 - i / 40) for j in range(64)]) for i in range(layers)]
    figure = check_readable(spectra.figure_of(found))
    (axes,) = figure.axes
    curves = check_inside(axes)
    for each in found:
        assert curves[f"layer {each.layer}"] == (list(range(1, 65)), each.eigenvalues.flip(0).tolist())
    assert len({str(line.get_color()) for line in axes.get_lines()}) == layers + 1
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [*(f"layer {i}" for i in range(layers)), "AlphaEdit's threshold, 0.02"]
    assert "E[k k^T]" in axes.get_ylabel() and axes.get_xlabel()


def test_eigenvalues_of_zero_are_said_not_drawn_as_numbers():
    figure = check_readable(spectra.figure_of([spectrum(4, [-1e-20, 0.0, 0.5, 10.0])]))
    assert "layer 4 (2 of 4 are 0: at the bottom)" in check_inside(figure.axes[0])


def rows_of(counts, layers):
    last = len(counts) - 1
    return [
        Row(n, layer, 1.0, None if not i else 0.1, 0.0 if i == last else 1 / (i + 1), 500 - i - layer,
            None if not i else 0.9 + 0.005 * i, 1e5 / (i + 1), "")
        for i, n in enumerate(counts) for layer in range(layers)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "layers"),
    (((1000, 3000, 10_000, 20_000), 2), ((1000,), 1), (tuple(1000 * 2**i for i in range(14)), 5),
     (tuple(range(10_000, 40_000, 1000)), 1), ((1000, 1_000_000), 32)),
)  # fmt: skip
def test_convergence_has_four_panels_with_a_curve_a_layer(counts, layers):
    rows = rows_of(counts, layers)
    figure = check_readable(convergence.figure_of(rows))
    names = ("change_to_last", "null_dimension", "null_overlap", "condition")
    for axes, name in zip(figure.axes, names, strict=True):
        curves = check_inside(axes)
        for layer in range(layers):
            own = [(r.tokens, getattr(r, name)) for r in rows if r.layer == layer and getattr(r, name)]
            assert curves[f"layer {layer}"] == ([x for x, _ in own], [y for _, y in own])
        ticks = [t.get_text() for t in axes.get_xticklabels()]
        assert f"{counts[-1]:,}" in ticks and all(int(t.replace(",", "")) in counts for t in ticks)
        assert axes.get_xlabel() == "tokens" and axes.get_ylabel()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [f"layer {i}" for i in range(layers)]


def test_convergence_without_numbers_says_so_in_the_panel():
    figure = check_readable(convergence.figure_of(rows_of((1000,), 1)))
    assert figure.axes[0].texts[0].get_text() == "no two counts to compare"
    broken = [Row(n, 0, None, None, None, 5, None, None, "singular") for n in (100, 200)]
    figure = check_readable(convergence.figure_of(broken))
    assert [bool(axes.texts) for axes in figure.axes] == [True, False, True, True]
    assert figure.axes[3].texts[0].get_text() == "none could be computed"


@source_tree
def test_a_file_without_rows_to_draw_is_named_not_drawn_empty(tmp_path):
    from benchmarks import plots

    overhead = row("spd_solve", 2.0) | {"flops": None}
    for draw in (plots.ratio_bars, plots.roofline, plots.batch_curves, plots.saving_bars, plots.sequence_curves):
        with pytest.raises(SystemExit, match="nothing to draw"):
            draw({"rows": [overhead], "batches": [], "sequence": [], "about": ABOUT, "peaks": PEAKS}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@source_tree
def test_drawing_leaves_matplotlib_as_it_was_and_does_not_depend_on_it():
    import matplotlib

    from benchmarks import plots

    document = {"rows": [row("spd_solve", 2.0)], "peaks": PEAKS}
    with matplotlib.rc_context({"font.size": 30, "xtick.labelsize": 40}):
        before = dict(matplotlib.rcParams)
        check_readable(plots.ratio_figure(document))
        assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in vars(sys.modules["benchmarks.plots"])


@source_tree
def test_committed_pictures_are_those_of_the_committed_numbers():
    """By the strings that matplotlib writes beside the shapes of an SVG."""
    from benchmarks import plots

    def document(name: str):
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))

    drawn = {
        f"{NAME}_ratios": plots.ratio_figure(committed()), f"{NAME}_roofline": plots.roofline_figure(committed()),
        f"{NAME}_values_savings": plots.saving_figure(committed("_values")),
        f"{NAME}_solver_sequence": plots.sequence_figure(committed("_solver")),
        "h200_ratios": plots.ratio_figure(document("h200")),
        "frontier_demo": plots.frontier_figure(document("frontier_demo")),
        "sequence_edits": plots.endless_figure(document("sequence")),
        "circuits_after_edits": plots.circuits_figure(document("circuits_after_edits")),
    }  # fmt: skip
    assert {path.stem for path in RESULTS.glob("*.svg")} == {path.stem for path in RESULTS.glob("*.png")} == set(drawn)
    for stem, figure in drawn.items():
        written = set(re.findall(r"<!-- (.*?) -->", (RESULTS / f"{stem}.svg").read_text(encoding="utf-8")))
        title = figure._suptitle or figure.axes[0].title
        texts = [title, *(text for axes in figure.axes for text in axes.texts)]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        texts += [text for axes in figure.axes if axes.get_yscale() == "linear" and axes.patches
                  for text in axes.get_yticklabels()]  # fmt: skip
        wanted = {line for text in texts for line in text.get_text().split("\n")}
        assert wanted <= written, (stem, wanted - written)


@source_tree
def test_the_page_of_benchmarks_shows_every_committed_picture_and_no_other():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(results/(\S+\.png)\)", text)) == {path.name for path in RESULTS.glob("*.png")}


def test_more_layers_than_colours_still_have_one_each():
    for count in (0, 1, 10, 11, 126):
        assert len(set(map(tuple, figures.colors(count)))) == count
