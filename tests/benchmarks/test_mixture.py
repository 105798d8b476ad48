"""The benchmark of a mixture of experts: how its model begins, a step of training, and its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree"),
    pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts modules need transformers 5"),
]


@pytest.fixture(scope="module")
def mixture():
    from benchmarks import mixture

    return mixture


@pytest.fixture(scope="module")
def trained(mixture, tmp_path_factory):
    """The mixture after one step."""
    from kedit_fast.demo import train

    out = tmp_path_factory.mktemp("mixture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "recall", lambda *arguments, **named: 0.0)
        done = CliRunner().invoke(mixture.app, ["train", "--out", str(out), "--steps", "1", "--rows", "2"])
    assert done.exit_code == 0, done.output
    return out


def test_a_mixture_of_all_units_is_the_dense_mlp(mixture, demo_model, monkeypatch):
    """With every unit in each expert, equal gates and no norm of queries and keys, nothing is lost."""
    dense, tokenizer = demo_model
    ids = tokenizer("The old man walked along the bridge.", return_tensors="pt")["input_ids"]
    monkeypatch.setattr(mixture, "UNITS", dense.config.intermediate_size)
    model = mixture.upcycled(dense, ids)
    layer, other = model.model.layers[2], dense.model.layers[2]
    states = torch.randn(1, 5, dense.config.hidden_size)
    with torch.no_grad():
        assert torch.allclose(layer.mlp(states), other.mlp(states), atol=1e-4)
        assert torch.equal(layer.self_attn.o_proj.weight, other.self_attn.o_proj.weight)
        heads = other.self_attn.q_proj(states).unflatten(-1, (-1, dense.config.head_dim))
        ours = layer.self_attn.q_norm(layer.self_attn.q_proj(states).unflatten(-1, (-1, dense.config.head_dim)))
    assert torch.nn.functional.cosine_similarity(heads, ours, dim=-1).min() > 0.999  # only the norms are others


def test_a_step_balances_the_experts(mixture, demo_model):
    dense, tokenizer = demo_model
    ids = tokenizer("The old man walked along the bridge.", return_tensors="pt")["input_ids"]
    model = mixture.upcycled(dense, ids)
    logits, extra = mixture.balanced(model)(ids, torch.zeros(1, 1, ids.shape[1], ids.shape[1]))
    assert logits.shape == (1, ids.shape[1], len(tokenizer)) and extra > 0
    extra.backward()
    assert all(layer.mlp.gate.weight.grad.norm() > 0 for layer in model.model.layers)


def test_a_comparison_has_a_row_for_each_model_method_and_scenario(mixture, trained, monkeypatch, tmp_path):
    from kedit_fast import demo

    path = tmp_path / "mixture.json"
    monkeypatch.setattr(mixture, "SCENARIOS", {"100": (2, None), "sequence": (4, 2)})
    monkeypatch.setattr(mixture, "chosen", lambda on, method: {"layers": (1,), "v_num_grad_steps": 2})
    monkeypatch.setattr(demo, "corpus", lambda documents=200: demo.world.corpus(200))
    arguments = ["compare", "--model", str(trained), "--methods", "memit", "--json", str(path), "--missing"]
    for models in ("mixture", "mixture,dense"):
        done = CliRunner().invoke(mixture.app, [*arguments, "--models", models])
        assert done.exit_code == 0, done.output
    assert "mixture" not in done.output  # its rows were there
    rows = json.loads(path.read_text())["rows"]
    assert [mixture.place_of(row) for row in rows] == [
        (model, "memit", scenario) for model in ("dense", "mixture") for scenario in ("100", "sequence")
    ]
    for row in rows:
        assert row["layers"] == [1] and row["commit"] and row["nll_before"] > 0 and row["seconds"] > 0
        assert (row["routing"] is None) == (row["model"] == "dense")
    assert all(0 <= row["routing"] <= 1 for row in rows if row["model"] == "mixture")


def test_the_dense_model_gets_no_number_of_its_preset(mixture, demo_model, monkeypatch):
    from types import SimpleNamespace

    from kedit_fast.methods.declaration import AUTO

    seen = {}

    def choose(model, tokenizer, requests, method, *, statistics, hparams):
        seen.update(hparams)
        assert len(requests) == 100
        return SimpleNamespace(hparams={"layers": (1,)}), ""

    monkeypatch.setattr(mixture, "choose", choose)
    on = SimpleNamespace(model=demo_model[0], tokenizer=demo_model[1], moments=SimpleNamespace(layers={0: None}))
    assert mixture.chosen(on, "alphaedit") == {**seen, "layers": (1,)}
    assert {name: seen[name] for name in ("v_lr", "clamp_norm_factor", "L2")} == dict.fromkeys(
        ("v_lr", "clamp_norm_factor", "L2"), AUTO
    )
