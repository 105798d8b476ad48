"""Reports of where facts live: pictures are readable, files are whole, numbers in them are those of the parts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_pictures import check_inside, check_readable

from kedit_fast import EditRequest, collect_statistics, demo
from kedit_fast.errors import InvalidArgumentError, KeditError, MethodError, RequestError
from kedit_fast.locating.circuits import EdgeScores
from kedit_fast.locating.graph import Graph
from kedit_fast.locating.logit_lens import LogitLens
from kedit_fast.locating.tracing import Trace, average_effects, likely_layers
from kedit_fast.reports import locating, locating_pictures
from kedit_fast.reports.locating import Located
from kedit_fast.reports.suggest import suggest

SHORT = ("<s>", "F", "og", "odor", " is", " famous", " for", " its")
LONG = ("<s>", *(f" word{i}" for i in range(150)), " F$", "中国", "or$", " ", "\n", " internationalization_of", " its")
NAMES = {"block": 1, "mlp": 6, "attention": 6}


def one_trace(kind="mlp", tokens=SHORT, subject=(1, 4), layers=6, seed=0, peak=1):
    """A trace whose largest effect is at a layer, at the subject's last token."""
    values = 0.1 + 0.05 * torch.rand(len(tokens), layers, generator=torch.Generator().manual_seed(seed)).double()
    values[subject[1] - 1, peak] = 0.8
    return Trace(
        kind, NAMES[kind], f"model.layers.*.{kind}", values, 0.1, 0.95, subject, tokens, 3, " cork", "Fogodor", 0.2
    )


def of_kinds(**options):
    return [one_trace(kind, **options) for kind in NAMES]


def averages(count=5, **options):
    return [average_effects([one_trace(kind, seed=seed, **options) for seed in range(count)]) for kind in NAMES]


@pytest.mark.parametrize("tokens, subject", [(SHORT, (1, 4)), (LONG, (151, 154)), (LONG, (1, 3)), (SHORT[:2], (1, 2))])
def test_a_heat_map_names_its_tokens_and_its_scale(tokens, subject):
    figure = check_readable(locating_pictures.trace_figure(of_kinds(tokens=tokens, subject=subject, layers=32)))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    subjects = [label for label in labels if label.endswith("*")]
    assert len(subjects) == subject[1] - subject[0], labels
    assert figure.axes[-1].get_ylabel() == "probability of ' cork'"
    shown = figure.axes[1].images[0].get_array()  # the MLP's
    top = max(0, subject[0] - 1)
    assert shown.shape == (len(tokens) - top, 32) and float(shown[subject[1] - 1 - top, 1]) == pytest.approx(0.8)


def test_text_is_drawn_as_it_stands():
    assert figure_label("a$b$c") == r"a\$b\$c" and figure_label("\n") == r"\n" and figure_label(" ") == "' '"
    assert figure_label("x" * 30).endswith("…") and len(figure_label("x" * 30)) == 20


def figure_label(text):
    return locating_pictures.figures.plain(text)


def test_average_effects_have_one_scale_around_zero():
    figure = check_readable(locating_pictures.averages_figure(averages()))
    for panel in figure.axes[:-1]:
        low, high = panel.images[0].get_clim()
        assert low == -high and high == pytest.approx(0.7, abs=0.01)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[2] == "last subject token" and labels[-1] == "last token"


def test_a_group_without_tokens_is_no_zero():
    shown = locating_pictures.averages_figure(averages(tokens=SHORT[:4], subject=(3, 4))).axes[0].images[0].get_array()
    assert bool(shown.mask[0].all()) and not bool(shown.mask[2].any())


def test_effects_by_layer_lie_in_their_axes_with_the_likely_layers_shaded():
    figure = check_readable(locating_pictures.effects_figure(averages(layers=32), (1, 2, 5)))
    curves = check_inside(figure.axes[0])
    assert set(curves) == {"block", "MLP, 6 layers", "attention, 6 layers"}
    assert curves["MLP, 6 layers"][1][1] == pytest.approx(0.7)
    assert len(figure.axes[0].patches) == 2 and not figure.axes[1].patches


@pytest.mark.parametrize("layers", (6, 32, 80))
def test_the_lens_begins_with_the_embedding(layers):
    rank = torch.randint(1, 30000, (9, layers + 1))
    lens = LogitLens("last", rank, torch.rand(9, layers + 1), (3,) * 9, (1,) * 9, ("x",) * 9)
    figure = check_readable(locating_pictures.lens_figure(lens))
    assert figure.axes[0].get_xticklabels()[0].get_text() == "emb"
    curve = figure.axes[1].get_lines()[0].get_ydata()
    assert list(curve) == rank.double().median(0).values.tolist()


@pytest.mark.parametrize("layers", (6, 32))
def test_shares_mark_the_edited_layers(layers):
    shares = {
        name: {"input": 0.2, **{f"{k}{n}": 0.4 / layers for k in ("attn", "mlp") for n in range(layers)}}
        for name in ("before", "after")
    }
    figure = check_readable(locating_pictures.shares_figure(shares, ("mlp2", "mlp3")))
    attention, mlp = figure.axes
    assert len(attention.patches) == 2 * (layers + 1) and len(mlp.patches) == 2 * layers + 1
    assert attention.patches[0].get_height() == pytest.approx(0.2)


def test_shares_of_nodes_add_up():
    graph = Graph(2, 2)
    scores = torch.randn(graph.mask.shape) * graph.mask
    shares = locating.shares_by_node(EdgeScores(graph, scores, "eap", 1, "kl", 1, 0.0, 1.0))
    assert list(shares) == ["input", "attn0", "mlp0", "attn1", "mlp1"] and sum(shares.values()) == pytest.approx(1)
    assert shares["attn1"] == pytest.approx(float(scores[4:6].abs().sum() / scores.abs().sum()))


def test_windows_are_a_fifth_of_the_depth_and_at_most_the_published_ten():
    assert [locating.window_of(layers) for layers in (2, 6, 12, 32, 48, 80)] == [1, 1, 2, 6, 10, 10]


def test_a_report_holds_everything_and_json_can_read_it(tmp_path):
    traces = of_kinds(tokens=SHORT[:4], subject=(3, 4))
    each = locating.averages_of(traces)
    located = Located(1, tuple(traces), each, likely_layers(each[1]))
    names = locating.save(located, tmp_path / "out", {"model": "demo"})
    assert {"locating.json", "trace_001.png", "trace_averages.png", "trace_by_layer.png"} == set(names)
    written = json.loads((tmp_path / "out" / "locating.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert written["about"] == {"model": "demo"} and "lens" not in written
    assert written["trace"]["prompts"][1]["probabilities"] == traces[1].probabilities.tolist()
    assert written["trace"]["likely"]["layers"] == [1] and written["trace"]["averages"][0]["mean"][0] == [None] * 6


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    located = Located(1, tuple(of_kinds()), locating.averages_of(of_kinds()), None)

    def refuses(*_):
        raise KeditError("the disk is full")

    monkeypatch.setattr(locating.pictures, "averages_figure", refuses)
    with pytest.raises(KeditError, match="disk is full"):
        locating.save(located, tmp_path / "out", {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(KeditError, match="exists"):
        locating.save(located, tmp_path / "out", {})


def test_traces_of_a_prompt_stay_together():
    groups = locating.by_prompt([*of_kinds(), *of_kinds()])
    assert [[one.kind for one in group] for group in groups] == [list(NAMES)] * 2
    assert len(locating.by_prompt([one_trace(), one_trace()])) == 2


@pytest.fixture(scope="module")
def loaded():
    return demo.load()


def test_requests_that_cannot_be_traced_are_named_or_left_out(loaded):
    requests = [*demo.requests(2), EditRequest("The river is", None, "granite")]
    with pytest.raises(RequestError, match="request 3: it has no subject"):
        locating.locate(*loaded, requests)
    located = locating.locate(*loaded, requests, on_error="skip", kinds=("mlp",), samples=2)
    assert [trace.label for trace in located.traces] == ["Fogodor", requests[1].subject]
    assert list(located.skipped["trace"]) == [2] and located.skipped["trace"][2].startswith(
        "request 3: it has no subject"
    )


@pytest.mark.parametrize("requests, parts, error", [
    ([], ("trace",), (RequestError, "no requests given")),
    (demo.requests(1), (), (InvalidArgumentError, "parts = none")),
    (demo.requests(1), ("trace", "map"), (InvalidArgumentError, "parts = 'map': choose of trace, lens")),
])  # fmt: skip
def test_what_cannot_be_located_is_said(loaded, requests, parts, error):
    with pytest.raises(error[0], match=error[1]):
        locating.locate(*loaded, requests, parts)


def test_a_search_may_ask_a_trace_for_its_layers(loaded):
    speaks = locating.traced_layers(*loaded, demo.requests(3), most=2)
    assert speaks.peak == 0 and speaks.layers[0] == 0 and speaks.requests == 2 and math.isfinite(speaks.effect)
    assert "2 requests speaks for layer" in speaks.sentence


def test_a_traced_search_begins_at_the_traced_layers_and_takes_fewer_trials(loaded):
    statistics = collect_statistics(*loaded, demo.corpus(60), (0, 1, 2, 3))
    options = {"statistics": statistics, "effort": "short", "hparams": {"v_num_grad_steps": 6, "residual_share": 0.2}}
    plain, traced = (suggest(*loaded, demo.requests(2), "memit", trace=trace, **options) for trace in (False, True))
    assert traced.trials[0].layers[-1] == 0 and len(traced.trials) < len(plain.trials)
    assert (
        traced.notes[0].startswith("the trace of 2 requests speaks for layer 0") and plain.notes[0] != traced.notes[0]
    )
    assert traced.best.score >= 0.9 * plain.best.score > 0


def test_a_trace_and_layers_that_are_given_exclude_each_other(loaded):
    with pytest.raises(MethodError, match="layers are given"):
        suggest(*loaded, demo.requests(1), "memit", trace=True, last_layers=[1])
    with pytest.raises(MethodError, match="layers are given"):
        suggest(*loaded, demo.requests(1), "memit", trace=True, hparams={"layers": (0, 1)})
