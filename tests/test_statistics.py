from __future__ import annotations

import os

import pytest
import torch
from floors import relative_error
from tiny_models import KINDS, TEXT, make_model, make_tokenizer

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.architectures import ModelView
from kedit_fast.statistics.collect import collect_statistics
from kedit_fast.statistics.store import load_statistics, save_statistics

TEXTS = TEXT * 3 + ["One."]


def collect(model, tokenizer, layers=(0, 2), **options):
    return collect_statistics(model, tokenizer, TEXTS, layers, progress=False, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ("left", "right"))
def test_moments_are_those_of_unpadded_sentences_one_at_a_time(kind, side):
    tokenizer, model = make_tokenizer(bos=True, side=side), make_model(kind)
    found = collect(model, tokenizer, batch_tokens=100)
    view = ModelView(model)
    for layer in (0, 2):
        rows = []
        hook = view.edited_module(layer).register_forward_pre_hook(lambda m, a, rows=rows: rows.append(a[0][0]))
        with torch.no_grad():
            for text in TEXTS:
                model(torch.tensor([tokenizer(text)["input_ids"]]))
        hook.remove()
        keys = torch.cat(rows).double()
        assert found.moment(layer).count == len(keys)
        assert relative_error(found.moment(layer).moment, keys.T @ keys / len(keys)) < 1e-6
        assert found.moment(layer).module == view.module_name(layer)


def test_batching_and_limits():
    tokenizer, model = make_tokenizer(), make_model("llama")
    whole = collect(model, tokenizer)
    small = collect(model, tokenizer, batch_tokens=1)
    assert relative_error(small.moment(0).moment, whole.moment(0).moment) < 1e-6
    assert collect(model, tokenizer, max_tokens=50).moment(0).count == 50
    assert collect(model, tokenizer, max_length=4).moment(0).count == 4 * len(TEXTS) - 4 + len(
        tokenizer("One.")["input_ids"]
    )


def test_bad_corpora_and_layers_are_named():
    tokenizer, model = make_tokenizer(), make_model("llama")
    with pytest.raises(StatisticsError, match="no text"):
        collect_statistics(model, tokenizer, [], (0,), progress=False)
    with pytest.raises(InvalidArgumentError, match="layer 9"):
        collect(model, tokenizer, layers=(9,))
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.fill_(float("nan"))
    with pytest.raises(StatisticsError, match="not finite"):
        collect(model, tokenizer)


def test_the_store_gives_back_what_it_was_given(tmp_path):
    tokenizer, model = make_tokenizer(), make_model("llama")
    found = collect(model, tokenizer)
    paths = save_statistics(found, tmp_path / "stats")
    assert [p.name for p in paths] == [f"model.layers.{i}.mlp.down_proj.safetensors" for i in (0, 2)]
    with torch.no_grad():
        ModelView(model).weight(0).mul_(2)  # an edited model still fits its statistics
    loaded = load_statistics(tmp_path / "stats", model, tokenizer)
    assert sorted(loaded.layers) == [0, 2]
    for layer in (0, 2):
        assert torch.equal(loaded.moment(layer).moment, found.moment(layer).moment)
        assert loaded.moment(layer).count == found.moment(layer).count
    assert loaded.corpus == found.corpus and loaded.dtype == "float32"


def test_wrong_missing_and_damaged_files_are_named(tmp_path):
    tokenizer, model = make_tokenizer(), make_model("llama")
    paths = save_statistics(collect(model, tokenizer), tmp_path)
    with pytest.raises(StatisticsError, match=r"another model: different weights"):
        load_statistics(tmp_path, make_model("llama", seed=3), tokenizer)
    with pytest.raises(StatisticsError, match="different tokenizer"):
        load_statistics(tmp_path, model, make_tokenizer(bos=True))
    with pytest.raises(StatisticsError, match=r"layers.1.mlp.down_proj.safetensors"):
        load_statistics(tmp_path, model, tokenizer, layers=(1,))
    with pytest.raises(StatisticsError, match="no statistics folder"):
        load_statistics(tmp_path / "absent", model, tokenizer)
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[: len(data) // 2])
    with pytest.raises(StatisticsError, match=f"{paths[0].name} is damaged"):
        load_statistics(tmp_path, model, tokenizer)
    paths[0].write_bytes(b"")
    with pytest.raises(StatisticsError, match="is damaged"):
        load_statistics(tmp_path, model, tokenizer)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    tokenizer, model = make_tokenizer(), make_model("llama")
    found = collect(model, tokenizer)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StatisticsError, match="cannot write"):
        save_statistics(found, tmp_path / "file")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StatisticsError, match="No space left"):
        save_statistics(found, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []
