"""The cost of growth: formulas against counts by hand, a point in small, its gate, its picture and its tables."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import growth, harness, limits, page, paper_plan
from benchmarks.limits import Shape, Texts, Work, distinct
from benchmarks.plots import growth_curves, growth_figure
from kedit_fast import EditRequest
from kedit_fast.editing.keys import KeyPass
from kedit_fast.requests.prompts import PreparedRequest, Prompt

SHAPE = Shape(layers=4, hidden=2, inner=3, queries=2, groups=1, vocabulary=7)


def test_beginnings_that_rows_share_count_once():
    assert distinct([]) == 0
    assert distinct([(1, 2, 3), (1, 2, 3)]) == 3
    assert distinct([(2, 9), (1, 2, 4), (1, 2, 3), (1,), (2,)]) == 6  # 1, 12, 123, 124, 2, 29


def test_tokens_of_prepared_requests():
    def prepared(subject: int, *target: int) -> PreparedRequest:
        rewriting = (Prompt((subject, 5), 0), Prompt((8, 8, subject, 5), 2))
        return PreparedRequest(EditRequest("{} is", "a", "b"), rewriting, Prompt((subject, 6), 0), target, " ")

    # Rows 1 5 3, 8 8 1 5 3 and 1; 2 5, 8 8 2 5 and 2. Tails: 1 5 3 twice, 1; 2 5 twice, 2.
    texts = Texts.of([prepared(1, 3, 4), prepared(2, 3)])
    assert texts == Texts(
        requests=2,
        tails=3 + 3 + 1 + 2 + 2 + 1,
        attended=(1 + 2 + 3) + (3 + 4 + 5) + 1 + (1 + 2) + (3 + 4) + 1,
        scored=2 + 2 + 1 + 1 + 1 + 1,
        whole=3 + 2 + 3 + 2 + 2,
        until_lookup=1 + 3 + 1 + 1,
    )


def test_the_phases_by_hand():
    assert (SHAPE.attention, SHAPE.mlp, SHAPE.block, SHAPE.head) == (4 + 2 + 2 + 4, 18, 30, 14)
    texts = Texts(requests=2, tails=10, attended=40, scored=3, whole=20, until_lookup=12)
    each = limits.works(SHAPE, (0, 1), texts, steps=2, batch=1)
    # Two live blocks: attention's weights on 10 tokens in both, the MLP's on 10 in one and on 3 in the other.
    once = 2 * 10 * (2 * 12 + 18) + 2 * 3 * (18 + 14)
    assert each["values"].flops == 5 * once + 7 * 4 * 2 * 2 * 40 + 2 * 30 * (2 * 20 + 2 * 12)
    assert each["values"].bytes == 4 * (5 * 2 * (2 * 30 + 14) + 4 * 30)
    assert each["keys"] == Work(2 * 30 * 2 * 12, 4 * 2 * 30)
    whitened, dual = 2 * 9 * 2, 3 * 2 * 2 + 8 / 3 + 2 * 2 * 2 * 3
    assert 2 <= 0.67 * 3 and each["solve"].flops == pytest.approx(2 * (9 + whitened + dual))
    assert each["solve"].bytes == 2 * 8 * (2 * 9 + 2 * 3 * 2)
    assert each["write"] == Work(2 * 2 * 2 * 3 * 2, 2 * (2 * 4 * 6 + 4 * 5 * 2))


def test_values_at_the_last_block_leave_the_head_alone():
    texts = Texts(requests=1, tails=10, attended=40, scored=3, whole=5, until_lookup=4)
    each = limits.works(SHAPE, (3,), texts, steps=0)
    assert each["values"].flops == 2 * 14 * 3 + 2 * 30 * 4 * 5


def test_a_limit_is_of_what_takes_longer():
    peaks = {"fp32_flops_per_s": 10.0, "fp64_flops_per_s": 5.0, "copy_bytes_per_s": 2.0}
    works = {"keys": Work(100.0, 4.0), "solve": Work(100.0, 4.0), "write": Work(1.0, 8.0)}
    assert limits.limits(works, peaks) == {"keys": 10.0, "solve": 20.0, "write": 4.0}


def test_requests_are_about_different_subjects_and_begin_alike():
    some, more = growth.requests_of(605), growth.requests_of(650)
    assert len(some) == 605 and len({request.subject for request in more}) == 650
    assert [(r.prompt, r.subject) for r in more[:600]] == [(r.prompt, r.subject) for r in some[:600]]


@pytest.fixture(scope="module")
def on():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "REQUESTS", 3)
        patch.setattr(growth, "DOCUMENTS", 30)
        subject = growth.subject("hidden", 64)
    subject.hparams["v_num_grad_steps"] = 2
    return subject


def test_a_point_in_small(on, tmp_path):
    row = growth.measure(on)
    assert not row["wrong"] and row["error"] < 1e-4 and row["steps"] == 1 and row["edits"] == 3
    assert row["layers"] == [0, 1] and row["residual"] > 0 and row["edits_per_s"] == pytest.approx(3 / row["total_s"])
    assert 0 < sum(row["seconds"].values()) <= row["total_s"]
    assert row["planned"]["statistics and factors"] == 2 * 8 * 192**2  # the statistics were there before
    peaks = {"fp32_flops_per_s": 1e11, "fp64_flops_per_s": 5e10, "copy_bytes_per_s": 1e10}
    limited = growth.with_limit(row, peaks)
    assert 0 < limited["share_of_limit"] < 1
    assert limited["limit_edits_per_s"] == pytest.approx(3 / sum(limited["limit_s"].values()))


def test_the_gate_sees_a_wrong_weight_and_a_wrong_update(on):
    editor = growth.editor_of(on, None)
    prepared = editor.check(on.requests)[0]
    before = {name: weight.clone() for name, weight in editor.modules.items()}
    result = editor.edit(prepared)
    try:
        assert growth.error_of(on, editor, prepared, result, before) < 1e-4
        name = editor.view.weight_name(1)
        (update,) = result.updates[name]
        no_weight = {**before, editor.view.module_name(1): torch.zeros(64, 192)}
        assert growth.error_of(on, editor, prepared, result, no_weight) > 0.1
        update.right.mul_(1.01)
        assert growth.error_of(on, editor, prepared, result, before) > 5e-3
        update.right.div_(1.01)
        object.__setattr__(result, "residual", result.residual + 0.01)
        assert growth.error_of(on, editor, prepared, result, before) > 5e-3
        assert KeyPass(editor.view, prepared, growth.Site(1, "block"), "bare_half").count == 3
    finally:
        editor.restore()


def document(**changes) -> dict:
    about = {"machine": "a machine", "versions": {"torch": "2"}, "commit": "abc1234"}
    row = {
        "case": "demo model", "edits": 1, "iterations": 25, "steps": 3.5, "wrong": False, "edits_per_s": 2.0,
        "limit_edits_per_s": 8.0, "share_of_limit": 0.25, "peak_bytes": 3 << 20, "planned": {"keys": 4 << 20},
        "seconds": dict.fromkeys(limits.PHASES, 0.1), "efficacy": 1.0, **about,
    }  # fmt: skip
    rows = [{**row, "axis": axis, "value": value, **({"edits": value} if axis == "edits" else {})}
            for axis, values in growth.AXES.items() for value in values]  # fmt: skip
    rows[4] = {**rows[4], "iterations": 2, **changes}
    return {"rows": rows, "peaks": {}, "about": about}


def test_the_picture_has_a_column_for_each_axis(tmp_path):
    figure = growth_figure(document())
    assert len(figure.axes) == 8 and all(axes.get_xscale() == axes.get_yscale() == "log" for axes in figure.axes)
    dashed = [line for axes in figure.axes for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in (dashed[0], dashed[4])] == [[8.0] * 4, [4.0] * 5]
    assert any("2 of 25" in text.get_text() for text in figure.axes[0].texts)
    assert growth_curves(document(), tmp_path / "growth")[0].read_bytes()[:4] == b"\x89PNG"


def test_the_table_names_wrong_results(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page.growth() == "Not measured yet."
    harness.save(tmp_path / "growth.json", document(wrong=True))
    lines = page.growth().splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 17
    assert "wrong result" in lines[6] and "| 2 | 0.1 | 0.1 | 0.1 | 0.1 | 8 | 25% | 3 | 4 | 1.00 |" in lines[2]


def test_the_plan_on_paper_follows_from_the_shape():
    one, hundred = paper_plan.planned(1), paper_plan.planned(100)
    assert one.parameters == 70_553_706_496 and one.bytes["weights"] == 2 * one.parameters
    count, d = len(one.layers), 28672
    assert one.factors.flops == count * d**3 / 3 and one.works["solve"].flops > one.factors.flops
    assert hundred.works["write"].flops == 100 * one.works["write"].flops == 100 * 2 * count * 8192 * d
    # The prefixes are the same text for all requests, and run once.
    assert 95 < hundred.works["values"].flops / one.works["values"].flops < 100
    for size, places in one.placements.items():
        assert sum(place.weights for place in places) == pytest.approx(2 * one.parameters, rel=1e-3)
        assert sum(place.factors for place in places) == count * size * d * d
    assert 1 <= one.batch(4) <= hundred.batch(4) <= 256 and hundred.batch(8) <= hundred.batch(4)
    assert {len(line) for line in paper_plan.lines()} == {4}


def test_a_changed_tree_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    about = {"machine": "m", "versions": {"torch": "2"}, "commit": "abc1234-dirty"}
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(growth, "provenance", lambda device: about)
    for measuring in ("measured_peaks", "in_child"):
        monkeypatch.setattr(growth, measuring, lambda *a, **k: pytest.fail("it measured"))
    target = tmp_path / "results" / "growth.json"
    done = CliRunner().invoke(growth.app, ["all", "--json", str(target)])
    assert done.exit_code != 0 and "commit first, or write elsewhere" in str(done.exception), done.output
