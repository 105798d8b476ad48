"""The benchmark harness: a wrong result has no numbers, a fall is an exit status, pictures are drawn."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")
FIELDS = {
    "op", "case", "dtype", "backend", "isa", "baseline", "median_s", "p20_s", "p80_s", "baseline_median_s", "ratio",
    "error", "error_limit", "bytes", "flops", "share_of_peak", "machine", "versions", "commit",
}  # fmt: skip


PEAKS = {f"{name}_flops_per_s": 1e11 for name in ("fp32", "bf16", "fp64")} | {"copy_bytes_per_s": 1e10}


def bench(*arguments):
    """benchmarks.run in this process."""
    from benchmarks.run import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def harness():
    from benchmarks import problems, run

    return problems, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "rows.json"
    with pytest.MonkeyPatch.context() as patch:  # peaks have a test of their own
        patch.setattr("benchmarks.run.measured_peaks", lambda device: PEAKS)
        done = bench("--suite", "small", "--no-compiled", "--json", path)
    assert done.exit_code == 0, done.output
    return path


def test_every_row_has_every_field(results):
    document = json.loads(results.read_text())
    assert {"copy_bytes_per_s", "fp32_flops_per_s", "bf16_flops_per_s"} <= set(document["peaks"])
    assert {row["op"] for row in document["rows"]} >= {"symmetric_rank_k_update_", "rank_k_update_", "spd_solve"}
    for row in document["rows"]:
        assert set(row) >= FIELDS
        assert row["ratio"] == pytest.approx(row["baseline_median_s"] / row["median_s"])
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"] and 0 <= row["error"] <= row["error_limit"]


def test_peaks_of_a_slow_machine_take_seconds_and_bf16_has_fp32s_without_units(harness, monkeypatch):
    _, run = harness
    sides, real = [], torch.mm

    def slow(a, b):
        sides.append((a.dtype, len(a)))
        time.sleep(0.05)
        return real(a[:8, :8], b[:8, :8])

    monkeypatch.setattr(run.torch, "mm", slow)
    for units, dtypes in ((False, 2), (True, 3)):
        sides.clear()
        monkeypatch.setattr("benchmarks.harness.has_units", lambda dtype, units=units: units)
        peaks = run.measured_peaks("cpu")
        assert len({dtype for dtype, _ in sides}) == dtypes and {side for _, side in sides} == {512}
        assert (peaks["bf16_flops_per_s"] == peaks["fp32_flops_per_s"]) == (not units)


def test_floors_are_those_of_the_instruction_set(harness):
    _, run = harness
    case = next(c for c in run.OPS if c.op == "symmetric_rank_k_update_" and c.dtype == "bfloat16" and c.floor)
    assert (case.bars("amx"), case.bars("avx2")) == ((5.0, 10.0), (1.6, None))


def test_a_wrong_result_prints_no_number(harness):
    problems, run = harness
    case = next(c for c in run.SMALL if c.op == "spd_solve")
    problem = problems.build(case)
    wrong = problems.Problem(**{**problem.__dict__, "error": lambda: float("nan")})
    rows = run.rows_of(case, wrong, PEAKS, 7, "cpu")
    assert rows and all(row["ratio"] is None and "median_s" not in row for row in rows)
    assert run.rows_of(case, problem, PEAKS, 7, "cpu")[0]["ratio"] > 0


def test_the_check_sees_a_wrong_kernel(harness, monkeypatch):
    problems, run = harness
    for case in run.SMALL:
        assert problems.build(case, compiled=False).error() < 5e-3, case
    case = next(c for c in run.SMALL if c.op == "rank_k_update_")
    broken = problems.build(case, compiled=False)
    monkeypatch.setattr("kedit_fast.rank_k_update_", lambda weight, *a, **k: weight.mul_(1.1))
    assert broken.error() > broken.limit
    case = next(c for c in run.SMALL if c.op == "symmetric_rank_k_update_")
    broken = problems.build(case, compiled=False)
    monkeypatch.setattr("kedit_fast.symmetric_rank_k_update_", lambda acc, x, **k: torch.ones_like(acc))
    assert broken.error() > broken.limit


def test_compare_exits_with_1_when_a_ratio_fell(harness, results, tmp_path):
    def compare(*arguments):
        return CliRunner().invoke(harness[1].app, ["compare", *map(str, arguments)])

    document, new = json.loads(results.read_text()), tmp_path / "new.json"
    assert compare(results, results).exit_code == 0
    first, *rest = document["rows"]
    for change, status in ((0.95, 0), (0.85, 1), (None, 1), (2.0, 0)):
        ratio = None if change is None else first["ratio"] * change
        new.write_text(json.dumps({**document, "rows": [{**first, "ratio": ratio}, *rest]}))
        done = compare(results, new)
        assert done.exit_code == status, (change, done.output)
    assert compare(new, results).exit_code == 1  # back from twice as fast
    assert compare(new, results, "--drop", "0.6").exit_code == 0
    new.write_text(json.dumps({**document, "rows": rest}))
    assert compare(results, new).exit_code == 1 and "not measured" in compare(results, new).output
    assert compare(results, new, "--allow-missing").exit_code == 0
    new.write_text(json.dumps({**document, "rows": [*rest, {**first, "case": "another", "ratio": None}]}))
    assert compare(results, new, "--allow-missing").exit_code == 1
    new.write_text("{}")
    assert "not a file that benchmarks.run" in str(compare(results, new).exception)
    assert "No such file" in str(compare(results, tmp_path / "none.json").exception)


def test_markdown_has_a_line_a_case_even_for_a_wrong_result(harness, results, tmp_path):
    document = json.loads(results.read_text())
    wrong = {k: v for k, v in document["rows"][0].items() if not k.endswith("_s") and k != "share_of_peak"}
    (tmp_path / "rows.json").write_text(
        json.dumps({**document, "rows": [{**wrong, "ratio": None}, *document["rows"][1:]]})
    )
    done = CliRunner().invoke(harness[1].app, ["markdown", str(tmp_path / "rows.json")])
    assert done.exit_code == 0 and done.output.count("wrong result") == 1
    assert all(case.name in done.output for case in harness[1].SMALL)


def test_plot_draws_png_and_svg(results, tmp_path):
    done = bench("plot", results, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    for name in ("ratios", "roofline"):
        png, svg = tmp_path / f"rows_{name}.png", tmp_path / f"rows_{name}.svg"
        assert png.read_bytes()[:4] == b"\x89PNG" and len(png.read_bytes()) > 10_000
        assert "</svg>" in svg.read_text()


def test_committed_results_are_complete_and_meet_their_floors():
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu_*.json"))
    assert files
    for path in files:
        for row in json.loads(path.read_text())["rows"]:
            assert set(row) >= FIELDS and row["ratio"] is not None, (path.name, row["op"], row["case"])
            if row["floor"] and "compile" not in row["baseline"]:
                assert row["ratio"] >= row["floor"], (path.name, row["case"], row["dtype"], row["ratio"])


def test_the_published_pipeline_is_what_the_editor_does(harness):
    from tiny_models import make_model, make_tokenizer

    from benchmarks import published
    from kedit_fast import Editor, EditRequest

    requests = [EditRequest("{} plays the", "Miles Davis", "violin"), EditRequest("{} is in", "Ebro", "Spain")]
    numbers = dict(v_num_grad_steps=4, v_lr=0.1, clamp_norm_factor=0.75, v_weight_decay=0.5, mom2_update_weight=2.0,
                   mom2_adjustment=False)  # fmt: skip
    editor = Editor(make_model("llama"), make_tokenizer(), "memit", layers=[0, 1], hparams=numbers,
                    prefixes=("The old tower. ", "I saw. "))  # fmt: skip
    view = Editor(make_model("llama"), make_tokenizer(), "memit", layers=[0, 1], hparams=numbers, prefixes=()).view
    prepared, _ = editor.check(requests)
    weights = {layer: view.weight(layer) for layer in (0, 1)}
    before = {layer: weight.clone() for layer, weight in weights.items()}
    editor.edit(requests)
    blocks = [view.block(layer) for layer in range(view.num_layers)]
    edited = {layer: view.edited_module(layer) for layer in (0, 1)}
    identity = {layer: torch.eye(64, dtype=torch.float64) for layer in (0, 1)}
    published.memit(view.model, blocks, edited, weights, identity, prepared, editor.hparams)
    for layer in (0, 1):
        gap = (editor.view.weight(layer) - weights[layer]).norm() / (weights[layer] - before[layer]).norm()
        assert float(gap) < 1e-3


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_each_saving_computes_the_published_gradient(harness, kind):
    from tiny_models import make_model, make_tokenizer

    from benchmarks import savings
    from kedit_fast import EditRequest
    from kedit_fast.models.view import ModelView
    from kedit_fast.requests.prompts import prepare

    requests = [EditRequest("{} plays the", "Miles Davis", "violin"), EditRequest("Now {} is in", "Ebro", "Spain")]
    view = ModelView(make_model(kind))
    prepared = prepare(make_tokenizer(), requests, ("The old tower. ",), 128)
    expected = savings.iteration(view, prepared, 1, ())()
    assert float(expected.abs().max()) > 0
    for saving in savings.SAVINGS:
        torch.testing.assert_close(savings.iteration(view, prepared, 1, (saving,))(), expected, rtol=1e-3, atol=1e-5)


def test_pictures_of_values_are_drawn(harness, tmp_path):
    from benchmarks import values

    about = {"machine": "a machine", "versions": {"torch": "2"}, "commit": "abc"}
    batches = [{"batch": 2**i, "edits": 8, "edits_per_s": 1.0 + i, "peak_bytes": 2**20 * i} for i in range(4)]
    rows = [{"op": "value iteration", "case": f"model: {name} alone", "ratio": 1.5} for name in ("depth", "batching")]
    path = tmp_path / "values.json"
    path.write_text(json.dumps({"about": about, "rows": rows, "batches": batches, "peaks": {}}))
    done = CliRunner().invoke(values.app, ["plot", str(path), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for name in ("batches", "savings"):
        assert (tmp_path / f"values_{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (tmp_path / f"values_{name}.svg").read_text()


def test_a_sample_covers_the_lengths_and_changes_from_run_to_run(harness):
    from types import SimpleNamespace

    from benchmarks import values

    requests = [SimpleNamespace(rewriting=[SimpleNamespace(ids=range(i))]) for i in range(64)]
    seen = set()
    for run in range(4):
        chosen = [len(r.rewriting[0].ids) for r in values.sample(requests, 16, run, 4)]
        assert len(set(chosen)) == 16 and chosen == sorted(chosen) and max(chosen) - min(chosen) >= 60
        seen |= set(chosen)
    assert len(seen) == 64


def test_the_solver_benchmark_times_right_results_and_draws(harness, tmp_path):
    from benchmarks import solver

    path = tmp_path / "solver.json"
    done = CliRunner().invoke(solver.app, ["--d", "96", "--runs", "2", "--json", str(path)])
    assert done.exit_code == 0, done.output
    document = json.loads(path.read_text())
    assert all(
        set(row) >= FIELDS and row["ratio"] > 0 and row["error"] <= row["error_limit"] for row in document["rows"]
    )
    assert {row["op"] for row in document["rows"]} == {"solve_update", "KeyMemory"}
    assert {row["form"] for row in document["sequence"]} == {"dual", "primal", "auto"}
    done = CliRunner().invoke(solver.app, ["plot", str(path), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "solver_sequence.png").read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_solve_has_no_numbers(harness, monkeypatch):
    from benchmarks import solver
    from kedit_fast.solver.low_rank import LowRankUpdate

    real = solver.solve_update

    def wrong(*args):
        update = real(*args)
        return LowRankUpdate(update.left, update.right * (1 + 1e-4))

    monkeypatch.setattr(solver, "solve_update", wrong)
    assert all(row["ratio"] is None for row in solver.memit_rows(64, 8, 2, "cpu"))


def test_the_statistics_benchmark_times_right_moments(harness, tmp_path, monkeypatch):
    from benchmarks import published, second_moments
    from kedit_fast import demo
    from kedit_fast.models.view import ModelView
    from kedit_fast.statistics.collect import collect_statistics

    monkeypatch.setattr(second_moments, "measured_peaks", lambda device: PEAKS)
    small = tuple(replace(shape, layers=(0, 3)) for shape in second_moments.SHAPES)
    monkeypatch.setattr(second_moments, "SHAPES", small)
    path = tmp_path / "statistics.json"
    arguments = ["--only", "demo", "--tokens", "300", "--runs", "2", "--json", str(path)]
    done = CliRunner().invoke(second_moments.app, arguments)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert all(set(row) >= FIELDS and row["ratio"] > 0 and row["error"] <= row["error_limit"] for row in rows)
    assert rows[0]["gap_to_published"] < 1e-6 and rows[0]["tokens_per_s"] > 0

    model, tokenizer = demo.load()
    texts = demo.corpus(40)  # the baseline: two groups of documents, each in batches of its own
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    found = list(published.length_batches(sequences, 512))
    assert sorted(map(tuple, sequences)) == sorted(tuple(ids) for rows in found for ids in rows)
    total, count = published.layer_moment(model, ModelView(model).edited_module(2), sequences, 512)
    ours = collect_statistics(model, tokenizer, texts, (2,), progress=False).moment(2)
    gap = (total.double() / count - ours.moment).norm() / ours.moment.norm()
    assert count == ours.count and float(gap) < 1e-6

    wrong = second_moments.collect_statistics
    monkeypatch.setattr(second_moments, "collect_statistics", lambda *a, **k: scaled(wrong(*a, **k)))
    assert CliRunner().invoke(second_moments.app, arguments[:-2]).exit_code == 1


def scaled(statistics):
    layers = {n: type(s)(s.module, s.moment * (1 + 1e-5), s.count) for n, s in statistics.layers.items()}
    return type(statistics)(**{**vars(statistics), "layers": layers})


def test_the_quality_benchmark_measures_methods_and_leaves_the_model(harness, monkeypatch, tmp_path):
    from benchmarks import quality

    small = {
        "1": (2, 1),
        "100": (6, None),
        "500": (6, None),
        "sequence": (6, 3),
        "singly": (2, 1),
        "subjects": (5, None),
    }
    monkeypatch.setattr(quality, "SCENARIOS", small)
    real_corpus, real_text = quality.demo.corpus, quality.demo.held_out
    monkeypatch.setattr(quality.demo, "corpus", lambda: real_corpus(150))
    monkeypatch.setattr(quality.demo, "held_out", lambda subjects: real_text(subjects, 40))
    path = tmp_path / "quality.json"
    args = ["--methods", "memit-merge,ultraedit,rome", "--scenarios", "1,100,sequence,subjects", "--json", str(path)]
    done = CliRunner().invoke(quality.app, args)
    assert done.exit_code == 0, done.output
    rows = {(row["method"], row["scenario"]): row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 12 and rows["rome", "100"]["n/a"] and rows["ultraedit", "subjects"]["n/a"]
    assert rows["memit-merge", "100"]["efficacy"] >= 0.8 and rows["rome", "1"]["efficacy"] >= 0.5
    assert rows["memit-merge", "sequence"]["retention"] > 0.5 and rows["memit-merge", "100"]["retention"] is None
    shown = CliRunner().invoke(quality.app, ["markdown", str(path)]).output
    assert "| `memit-merge` | " in shown and "| n/a |" in shown and "; kept " in shown
    people = quality.shared_subjects(100)
    assert len(people) == 100 and len({request.subject for request in people}) == 20
    assert all(request.target_new != request.target_true for request in people)


def test_held_out_text_names_no_edited_subject(harness):
    from kedit_fast import demo

    subjects = [request.subject for request in demo.requests()]
    text = demo.held_out(subjects)
    assert len(text) == 400 and not set(text) & set(" ".join(demo.corpus()).split(". "))
    assert not any(subject in sentence for subject in subjects for sentence in text)
