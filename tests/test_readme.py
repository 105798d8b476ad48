"""Every block of Python in README.md, in order, in one namespace, on the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kedit_fast import Editor, collect_statistics, demo
from kedit_fast.methods.hparams import make_hparams
from kedit_fast.statistics import memit_npz

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def namespace(demo_model, tmp_path, monkeypatch):
    """What the examples take for granted: a model, texts, requests, files of memit; and the tensors of a framework."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hparams, _ = make_hparams("memit", model.config)
    requests, texts = demo.requests()[:6], demo.corpus(800)
    statistics = collect_statistics(model, tokenizer, texts, hparams.layers, progress=False)
    folder = tmp_path / "data" / "stats" / "demo" / "wikipedia_stats"
    folder.mkdir(parents=True)
    for second in statistics.layers.values():
        memit_npz.write(folder / f"{second.module}_float32_mom2_100000.npz", second, {}, 100000)
    (tmp_path / "hparams" / "MEMIT").mkdir(parents=True)
    (tmp_path / "kvs").mkdir()
    values = {"layers": list(hparams.layers), "v_num_grad_steps": 8, "v_lr": 0.3, "clamp_norm_factor": 2,
              "kl_factor": 0.0625, "v_weight_decay": 0.5, "mom2_adjustment": True, "mom2_update_weight": 300,
              "model_name": "demo", "mom2_dataset": "wikipedia", "fact_token": "subject_last"}  # fmt: skip
    (tmp_path / "hparams" / "MEMIT" / "demo.json").write_text(json.dumps(values))
    editor = Editor(model, tokenizer, "memit", statistics=statistics, hparams={"v_num_grad_steps": 8})
    editor.edit(requests[:2], on_error="skip")
    patch = editor.patch()
    editor.restore()
    yield {
        "model": model, "tokenizer": tokenizer, "texts": texts, "requests": requests, "batches": [requests[:2]],
        "torch": torch, "rows": torch.randn(500, 48), "K": torch.randn(48, 5), "R": torch.randn(32, 5),
        "weight": torch.randn(32, 48), "mom2_update_weight": 300, "patch": patch, "Editor": Editor,
    }  # fmt: skip
    model.load_state_dict(before)
    vars(model).pop("_kedit_fast_run", None)


def test_every_example_runs(namespace, capsys):
    found = blocks()
    assert len(found) >= 9
    model = namespace["model"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, block in enumerate(found, 1):
        block = block.replace("layers=[4, 5, 6, 7, 8]", f"layers={list(range(model.config.num_hidden_layers - 1))}")
        exec(compile(block, f"README.md, example {number}", "exec"), namespace)
        model.load_state_dict(before)
    assert namespace["edited"] is model and len(namespace["answers"]) == 4
    assert namespace["requests"][0].subject.split()[-1] in capsys.readouterr().out
