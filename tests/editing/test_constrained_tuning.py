"""Steps of low curvature through an editor and the command line, with statistics that were collected for it."""

from __future__ import annotations

import json

import pytest
import torch
from support import run, saved
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, demo
from kedit_fast.editing.tuning.low_curvature import LowCurvature
from kedit_fast.errors import MethodError, StatisticsError
from kedit_fast.models import row_runner
from kedit_fast.statistics.collect import collect_statistics

ENERGY = 0.8
GENERAL = {"neighborhood_prompts": ["Ebro is in"]}
REQUESTS = [
    {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin", "target_true": "trumpet", **GENERAL},
    {"prompt": "{} speaks", "subject": "Marcel Maupoint", "target_new": "Swedish", "target_true": "French", **GENERAL},
]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    return model, tokenizer, collect_statistics(model, tokenizer, TEXT * 2, (1, 2), output_metric=True)


def outside(update: torch.Tensor, statistics, layer: int) -> float:
    """The share of an update that is where curvature is high."""
    curvature = LowCurvature.of(statistics.moment(layer).moment, statistics.output_metric(layer), ENERGY)
    update = update.double()
    return float((update - curvature.projected(update)).norm() / update.norm())


@pytest.mark.parametrize("method", ("locft-bf", "ft-m", "dinm"))
def test_a_change_stays_where_curvature_is_low(method, tiny):
    model, tokenizer, statistics = tiny
    layers = (1, 2) if method == "dinm" else (1,)
    numbers = {"num_steps": 4, "lr": 1e-2}
    shares = []
    for energy in (0.0, ENERGY):
        editor = Editor(
            model, tokenizer, method, layers=layers, statistics=statistics,
            hparams={**numbers, "curvature_energy": energy},
        )  # fmt: skip
        updates = editor.edit(REQUESTS).updates
        editor.restore()
        shares.append(max(outside(updates[f"transformer.h.{layer}.mlp.c_proj.weight"][0].dense(), statistics, layer)
                          for layer in layers if f"transformer.h.{layer}.mlp.c_proj.weight" in updates))  # fmt: skip
    assert shares[0] > 0.1 and shares[1] < 1e-4


def test_what_is_missing_is_named_before_anything_runs(tiny, monkeypatch):
    model, tokenizer, statistics = tiny
    plain = collect_statistics(model, tokenizer, TEXT, (1,))
    monkeypatch.setattr(row_runner, "record_rows", None)  # nothing may run
    numbers = {"curvature_energy": ENERGY, "num_steps": 2, "lr": 1e-2}

    def editor(statistics, layer=1, **more):
        return Editor(model, tokenizer, "locft-bf", layers=[layer], statistics=statistics, hparams={**numbers, **more})

    with pytest.raises(StatisticsError, match=r"locft-bf needs statistics for layers 1.*output_metric=True"):
        editor(None)
    with pytest.raises(StatisticsError, match="output metric"):
        editor(plain)
    with pytest.raises(StatisticsError, match="layer 3"):
        editor(statistics, 3)
    with pytest.raises(MethodError, match="norm_constraint does not go with curvature_energy"):
        editor(statistics, norm_constraint=1e-3)


def test_the_demo_model_learns_facts_there(demo_model):
    statistics = collect_statistics(*demo_model, demo.corpus(30), (1,), output_metric=True)
    numbers = {"curvature_energy": ENERGY, "num_steps": 10}
    editor = Editor(*demo_model, "locft-bf", layers=[1], statistics=statistics, hparams=numbers)
    ((update,),) = editor.edit(demo.requests(3)).updates.values()
    after = editor.edit(demo.requests(3)).losses
    editor.restore()
    before = Editor(*demo_model, "locft-bf", layers=[1], hparams={"num_steps": 1, "lr": 1e-12})
    start = before.edit(demo.requests(3)).losses
    before.restore()
    assert outside(update.dense(), statistics, 1) < 1e-4
    assert sum(after) < 0.5 * sum(start)


def test_the_command_line_takes_it(tmp_path):
    saved(tmp_path / "model", "gpt2")
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    (tmp_path / "requests.json").write_text(json.dumps(REQUESTS))
    stats = ("stats", tmp_path / "model", "--text", tmp_path / "text.txt", "--layers", "1", "--output-metric")
    assert run(*stats, "--out", tmp_path / "stats").returncode == 0
    edit = (
        "edit", tmp_path / "model", "--method", "locft-bf", "--requests", tmp_path / "requests.json", "--layers", "1",
        "--set", "num_steps=2", "--set", "lr=1e-2", "--set", f"curvature_energy={ENERGY}",
    )  # fmt: skip
    done = run(*edit, "--stats", tmp_path / "stats", "--values", tmp_path / "rows", "--out", tmp_path / "edited")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rows").exists() and (tmp_path / "edited").exists()
    done = run(*edit, "--out", tmp_path / "other")
    assert done.returncode != 0 and "--output-metric" in " ".join(done.stderr.split())
