from __future__ import annotations

import csv
import json
import math
import sys

import pytest
import torch
from support import run

from kedit_fast import Editor, collect_statistics, demo
from kedit_fast.errors import KeditError, MethodError, StatisticsError
from kedit_fast.reports.convergence import Row, convergence, draw, write_csv
from kedit_fast.reports.spectra import spectra
from kedit_fast.statistics.collect import Statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.moments import SecondMoment
from kedit_fast.statistics.store import save_statistics

NUMBERS = {"v_num_grad_steps": 3, "clamp_norm_factor": 0.75}
COUNTS = (1000, 4000, 12000)


@pytest.fixture(scope="module")
def rows(demo_model):
    requests = demo.requests(3)
    return convergence(*demo_model, Corpus(demo.corpus(800)), requests, counts=COUNTS, hparams=NUMBERS)


def test_a_report_has_what_two_editors_would_show(rows, demo_model):
    assert [(row.tokens, row.layer) for row in rows] == [(count, layer) for count in COUNTS for layer in (0, 1)]
    updates = []
    prefixes = None
    for count in COUNTS[::2]:
        statistics = collect_statistics(*demo_model, demo.corpus(800), (0, 1), max_tokens=count, progress=False)
        editor = Editor(*demo_model, "memit", statistics=statistics, hparams=NUMBERS, prefixes=prefixes)
        prefixes = editor.prefixes
        result = editor.edit(demo.requests(3))
        updates.append(result.updates[editor.view.weight_name(0)][0].dense().double())
        editor.restore()
    gap = float((updates[0] - updates[1]).norm() / updates[1].norm())
    assert rows[0].change_to_last == pytest.approx(gap, rel=0.02)  # counts end inside a document: not quite one text
    assert rows[-1].change_to_last == 0 and rows[-2].change_to_last == 0
    for layer in (0, 1):
        changes = [row.change_to_last for row in rows if row.layer == layer]
        assert changes[0] > changes[1] > changes[2]
        assert rows[2 + layer].change_from_previous is not None and rows[layer].change_from_previous is None


def test_null_spaces_and_conditions_are_those_of_the_moments(rows, demo_model):
    statistics = collect_statistics(*demo_model, demo.corpus(800), (0, 1), max_tokens=1000, progress=False)
    values = torch.linalg.eigvalsh(statistics.moment(0).moment)
    assert rows[0].condition == pytest.approx(float(values[-1] / values[0]), rel=1e-6)
    share = values.cumsum(0) / values.sum()
    assert rows[0].null_dimension == int((share <= 0.1).sum())  # the demo's AlphaEdit preset: energy 0.1
    assert rows[0].null_overlap is None and all(0.5 < row.null_overlap < 1 for row in rows[2:])


def test_the_model_is_left_as_it_was(demo_model):
    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convergence(model, tokenizer, Corpus(demo.corpus(100)), demo.requests(1), counts=(2000,), hparams=NUMBERS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_singular_count_has_a_note_and_no_update(demo_model):
    found = convergence(*demo_model, Corpus(demo.corpus(200)), demo.requests(1), counts=(300, 3000), hparams=NUMBERS)
    assert [row.update_norm is None for row in found] == [True, True, False, False]
    assert "not positive definite" in found[0].note and found[0].condition is None and not found[2].note
    assert found[0].change_to_last is None and found[2].change_from_previous is None


def test_bad_calls_are_named(demo_model):
    corpus = Corpus(demo.corpus(50))
    with pytest.raises(StatisticsError, match="must grow"):
        convergence(*demo_model, corpus, demo.requests(1), counts=(5, 5))
    with pytest.raises(MethodError, match="no update of low rank"):
        convergence(*demo_model, corpus, demo.requests(1), "ultraedit")
    with pytest.raises(StatisticsError, match="read the text again"):
        convergence(*demo_model, Corpus(iter(["a"])), demo.requests(1))
    with pytest.raises(StatisticsError, match="no text"):
        convergence(*demo_model, Corpus([]), demo.requests(1))


def test_the_table_and_the_picture(rows, tmp_path, monkeypatch):
    write_csv(rows, tmp_path / "c.csv")
    with (tmp_path / "c.csv").open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == list(Row.__dataclass_fields__) and len(read) == 6
    assert float(read[0]["change_to_last"]) == rows[0].change_to_last and read[0]["null_overlap"] == ""
    draw(rows, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KeditError, match=r"pip install 'kedit-fast\[plot\]'"):
        draw(rows, tmp_path / "d.png")
    assert not (tmp_path / "d.png").exists()


def stored(folder, values, count=100):
    torch.manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    moment = (vectors * torch.tensor(values, dtype=torch.float64)) @ vectors.T
    found = Statistics({4: SecondMoment("model.layers.4.mlp.down_proj", (moment + moment.T) / 2, count)},
                       {"model_config": "{}", "model_samples": "{}", "tokenizer": "t"}, "c", 10, "float32")  # fmt: skip
    save_statistics(found, folder)


def test_a_spectrum_in_numbers(tmp_path):
    stored(tmp_path, [1e-4, 5e-3, 0.5, 9.9])
    (found,) = spectra(tmp_path)
    assert (found.layer, found.size, found.count) == (4, 4, 100)
    assert found.trace == pytest.approx(10.4051) and found.condition == pytest.approx(9.9e4, rel=1e-6)
    shares = [v / 10.4051 for v in (1e-4, 5e-3, 0.5, 9.9)]
    assert found.effective_rank == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    expected = {"absolute 0.001": 1, "absolute 0.02": 2, "relative 0.001": 2, "relative 1e-05": 0, "energy 0.05": 3}
    assert {name: found.null_dimensions[name] for name in expected} == expected
    stored(tmp_path, [0.0, 1.0, 2.0, 3.0])
    assert spectra(tmp_path)[0].condition is None


def test_show_prints_and_draws(tmp_path, monkeypatch):
    stored(tmp_path / "s", [1e-4, 5e-3, 0.5, 10.0])
    done = run("stats", "show", tmp_path / "s")
    assert done.returncode == 0 and "1e+05" in done.stdout and "spectra.png" in done.stdout
    assert (tmp_path / "s" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    done = run("stats", "show", tmp_path / "s", "--json", "--png", tmp_path / "x.png")
    shown = json.loads(done.stdout)
    (layer,) = shown["layers"]
    assert layer["tokens"] == 100 and layer["condition"] == pytest.approx(1e5) and (tmp_path / "x.png").exists()
    assert layer["null_dimensions"]["absolute 0.02"] == 2 and shown["png"] == str(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("stats", "show", tmp_path / "s", "--json")  # a table needs no picture
    assert done.returncode == 0 and json.loads(done.stdout)["png"] is None and "no picture" in done.stderr
    assert run("stats", "show", tmp_path / "s", "--png", tmp_path / "y.png").returncode == 1
    missing = run("stats", "show", tmp_path / "absent")
    assert missing.returncode == 1 and "no statistics folder" in missing.stderr and not missing.stdout
