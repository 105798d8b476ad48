from __future__ import annotations

import os

import pytest
import torch
from floors import relative_error
from tiny_models import CONFIGS, KINDS, TEXT, make_model, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from kedit_fast import use_backend
from kedit_fast.errors import InvalidArgumentError, StatisticsError, UnsupportedModelError
from kedit_fast.models.view import ModelView
from kedit_fast.statistics import updates
from kedit_fast.statistics.collect import Job, collect_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.memory_plan import Group
from kedit_fast.statistics.moments import SecondMomentAccumulator
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("weighted", (False, True), ids=("plain", "weighted"))
@pytest.mark.parametrize("masters", ("device", "cpu"))
def test_gathered_rows_give_the_moments_of_masked_ones(dtype, weighted, masters, monkeypatch):
    """What a GPU does instead of masking. Where the rows are summed in the same order, the bits are the same."""
    tokenizer, model = make_tokenizer(), make_model("llama").to(dtype)
    weigh = (lambda ids: [1.0 + i % 3 for i in range(len(ids))]) if weighted else None
    calls = []
    update = SecondMomentAccumulator.update

    def spy(self, rows, mask, weights, totals):
        calls.append((len(rows), mask, totals[0]))
        assert weights is None or len(weights) == len(rows)
        update(self, rows, mask, weights, totals)

    def collected(gathers):
        calls.clear()
        monkeypatch.setattr(updates, "_gathers", lambda device: gathers)
        result = collect(model, tokenizer, batch_tokens=400, masters=masters, token_weights=weigh)
        assert any(mask is not None for _, mask, _ in calls) is not gathers
        assert not gathers or all(rows == count for rows, _, count in calls)  # no padding among them
        return result

    monkeypatch.setattr(SecondMomentAccumulator, "update", spy)
    with use_backend("torch"):
        masked, gathered = collected(False), collected(True)
    default = collected(True)  # C++ divides rows into chunks by their place, padding included
    for layer in (0, 2):
        assert torch.equal(gathered.moment(layer).moment, masked.moment(layer).moment)
        assert relative_error(default.moment(layer).moment, masked.moment(layer).moment) < 1e-6
        assert gathered.moment(layer).count == masked.moment(layer).count == default.moment(layer).count


def test_rows_are_gathered_on_a_gpu_alone():
    assert updates._gathers(torch.device("cuda", 0)) and not updates._gathers(torch.device("cpu"))


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


def test_token_weights_are_those_of_a_weighted_mean():
    tokenizer, model = make_tokenizer(bos=True), make_model("gpt2")

    def weigh(ids):
        return [0.0 if i == 0 else 1.0 + i / 7 for i in range(len(ids))]

    found = collect(model, tokenizer, token_weights=weigh, batch_tokens=100)
    rows, weights = [], []
    hook = ModelView(model).edited_module(2).register_forward_pre_hook(lambda m, a: rows.append(a[0][0]))
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            weights += weigh(ids)
            model(torch.tensor([ids]))
    hook.remove()
    keys, w = torch.cat(rows).double(), torch.tensor(weights, dtype=torch.float64)
    assert relative_error(found.moment(2).moment, keys.T @ (w[:, None] * keys) / w.sum()) < 1e-6
    assert found.moment(2).count == int((w != 0).sum()) and "weigh" in found.settings["token_weights"]
    for bad in (lambda ids: [1.0], lambda ids: [-1.0] * len(ids), lambda ids: [float("nan")] * len(ids)):
        with pytest.raises(StatisticsError, match="finite weights, not negative"):
            collect(model, tokenizer, token_weights=bad)
    with pytest.raises(StatisticsError, match="none of its tokens has a weight"):
        collect(model, tokenizer, token_weights=lambda ids: [0.0] * len(ids))


class Made(TorchDispatchMode):
    """Sizes of all tensors that operations make, and where fp64 matrices of a layer's size lie."""

    def __init__(self):
        super().__init__()
        self.sizes, self.sums = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.sizes |= set(tensor.shape)
                if tensor.dtype == torch.float64 and tensor.shape == (640, 640):
                    self.sums.add(tensor.untyped_storage().data_ptr())
        return found


def test_nothing_of_the_size_of_the_vocabulary_and_no_second_sum_is_made(monkeypatch):
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], "intermediate_size": 640})
    tokenizer, model = make_tokenizer(), make_model("llama")
    assert model.config.vocab_size == 400
    job = Job(model, tokenizer, Corpus(TEXTS), (0, 2), 60)  # its fingerprint reads the head's weights
    _ = job.view.head  # tried with a few tokens
    with torch.no_grad(), Made() as seen:
        sums = job.accumulators(Group((0, 2), False))
        job.run(sums)
        found = dict(job.finish(sums))
    assert len(found) == 2 and 640 in seen.sizes and 400 not in seen.sizes
    assert len(seen.sums) == 2


def test_offloaded_weights_give_the_same(tmp_path):
    """What a device_map with cpu or disk makes of a model: weights that are there for their forward pass alone."""
    import accelerate

    tokenizer, cpu = make_tokenizer(), torch.device("cpu")
    expected = collect(make_model("llama"), tokenizer)
    for offload in (
        lambda model: accelerate.cpu_offload(model, execution_device=cpu),
        lambda model: accelerate.disk_offload(model, str(tmp_path), execution_device=cpu),
    ):
        model = make_model("llama")
        offload(model)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        found = collect(model, tokenizer)
        assert found.model == expected.model
        for layer in (0, 2):  # norms and activations of hooked modules run as transformers wrote them
            assert found.moment(layer).count == expected.moment(layer).count
            assert relative_error(found.moment(layer).moment, expected.moment(layer).moment) < 1e-6
    with torch.device("meta"):
        empty = make_model("llama")
    with pytest.raises(UnsupportedModelError, match="has no values"):
        collect(empty, tokenizer)


def test_a_device_map_is_passed_to_transformers(tmp_path):
    from kedit_fast.models.loading import load_model

    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, torch.float32, device_map={"": "cpu"})
    found = collect(model, tokenizer)
    assert relative_error(found.moment(2).moment, collect(make_model("llama"), tokenizer).moment(2).moment) < 1e-6
