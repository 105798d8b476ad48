"""The picture and tables of circuits before and after edits, from a small record."""

from __future__ import annotations

from benchmarks import page
from benchmarks.plots import circuits_figure


def share(name, before, after, edited=False, beyond=False):
    return {
        "name": name, "before": before, "after": after, "floor": 0.02, "control": 0.005, "is_edited": edited,
        "is_beyond": beyond,
    }  # fmt: skip


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


ROW = {
    "method": "memit", "requests": 40, "pairs": 32, "edited": ["mlp0"], "commit": "abc1234", "machine": "m",
    "versions": {"torch": "2"},
    "shares": [share("input", 0.5, 0.4), share("mlp0", 0.5, 0.6, True, True)],
    "overlaps": [{
        "name": "top 50", "edited": estimate(0.3), "floor_before": estimate(0.7), "floor_after": estimate(0.8),
        "control": None, "chance": 0.01, "is_beyond": True,
    }],
    "runs": [
        {"circuit": "before", "model": "after", "edges": 200, "value": 0.5, "low": 0.4, "high": 0.6, "reason": ""},
        {"circuit": "after", "model": "after", "edges": 200, "value": None, "low": None, "high": None, "reason": "no"},
    ],
}  # fmt: skip


def test_the_picture_has_bars_of_changes_bands_of_halves_and_crosses_of_the_control():
    figure = circuits_figure({"rows": [ROW, {**ROW, "method": "ft-l"}]})
    assert [axes.get_title() for axes in figure.axes] == ["memit, 32 facts", "ft-l, 32 facts"]
    bars = {round(bar.get_height(), 9) for bar in figure.axes[0].patches}
    assert bars == {0.04, 0.1, -0.1}
    (crosses,) = (line for line in figure.axes[0].lines if line.get_marker() == "x")
    assert list(crosses.get_ydata()) == [0.005, 0.005]
    low, high = figure.axes[0].get_ylim()
    assert low < -0.1 and high > 0.1


def test_the_tables_say_what_is_beyond_and_what_has_no_value(monkeypatch):
    monkeypatch.setattr(page, "rows_in", lambda name: [ROW])
    assert "| `memit` | 32 of 40 | top 50 | 0.30 | 0.60 |  | 0.01 | below both |" in page.circuits_after_edits()
    line = page.circuit_faithfulness().splitlines()[-1]
    assert "| 0.50 (0.40 to 0.60) | n/a | n/a |" in line and line.startswith("| `memit` | mlp0 | n/a |")
    assert "input" not in page.circuit_shares()
    assert "| `memit` | **mlp0** | 0.500 | 0.600 | +0.100 | 0.020 | +0.005 | beyond both |" in page.circuit_shares()
