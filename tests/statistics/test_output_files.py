"""Output metrics in folders: beside second moments of inputs, with a provenance of their own, resumed after kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.statistics import checkpoint, corpus
from kedit_fast.statistics.collect import collect_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.labels import OutputGradients
from kedit_fast.statistics.moments import SecondMomentAccumulator
from kedit_fast.statistics.resumable import collect_into
from kedit_fast.statistics.store import load_statistics, modules_in, save_statistics

DOCUMENTS = [f"{text} Number {i}." for i, text in enumerate(TEXT * 4)]
GRADIENTS = OutputGradients(tokens=300)
NAMES = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 2)]
HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two():
    return make_model("llama"), make_tokenizer()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(corpus, "LEAST_WINDOW", 1000)
    monkeypatch.setattr(corpus, "BATCHES_A_WINDOW", 2)


def into(folder, two, output_metric=GRADIENTS, *, layers=(0, 2), texts=DOCUMENTS, max_tokens=None, **options):
    options = {"batch_tokens": 400, "checkpoint_every": 1e9, **options}
    return collect_into(folder, *two, Corpus(texts, max_tokens), layers, output_metric=output_metric, **options)


def bits(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("model*.safetensors"))}


def same(first, second):
    left, right = bits(first), bits(second)
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name][key]) for name, file in left.items() for key, tensor in file.items()
    )


def test_a_folder_holds_what_memory_would(tmp_path, two):
    heard = []
    found = into(tmp_path / "s", two, on_plan=heard.append)
    suffixes = ("", ".output_metric")
    assert [p.name for p in found.files] == [f"{name}{suffix}.safetensors" for suffix in suffixes for name in NAMES]
    assert found.output_tokens == 300 < found.tokens and found.passes == 2
    assert [(needs.side, needs.file_bytes) for needs in heard] == [("input", 2 * 8 * 64**2), ("output", 2 * 8 * 32**2)]
    loaded = load_statistics(tmp_path / "s", *two)
    memory = collect_statistics(*two, DOCUMENTS, (0, 2), output_metric=GRADIENTS, batch_tokens=400)
    for layer in (0, 2):
        assert relative_error(loaded.output_metric(layer), memory.output_metric(layer)) < 1e-5
        assert torch.equal(loaded.moment(layer).moment, memory.moment(layer).moment)
        assert loaded.outputs[layer].count == 300
    assert loaded.outputs_from == memory.outputs_from and loaded.tokens == memory.tokens
    assert modules_in(tmp_path / "s") == NAMES
    with safe_open(found.files[2], "pt") as file:
        metadata = file.metadata()
    expected = {
        "labels": "sampled",
        "label_seed": "0",
        "count": "300",
        "tokens": "300",
        "max_tokens": "300",
        "layer": "0",
    }
    assert expected.items() <= metadata.items() and metadata["dtype"] == "float32"
    assert {"corpus", "documents", "model_config", "model_samples", "tokenizer", "checksum"} <= metadata.keys()
    paths = save_statistics(loaded, tmp_path / "again")
    assert len(paths) == 4 and same(tmp_path / "s", tmp_path / "again")
    assert into(tmp_path / "again", two, resume=True).passes == 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("share", (0.1, 0.75, 1))
def test_a_stopped_job_goes_on_to_the_same_bits(tmp_path, two, monkeypatch, share):
    """In the pass of inputs, or in that of gradients, which ends with the last update."""
    count, last, before = [0], [10**9], SecondMomentAccumulator.update

    def update(self, *args):
        count[0] += 1
        if count[0] >= last[0]:
            raise Stop
        before(self, *args)

    monkeypatch.setattr(SecondMomentAccumulator, "update", update)
    into(tmp_path / "whole", two)
    last[0], count[0] = round(share * count[0]), 0
    with pytest.raises(Stop):
        into(tmp_path / "part", two, checkpoint_every=0)
    assert (tmp_path / "part" / f"{NAMES[0]}.safetensors").exists() == (share > 0.5)
    last[0] = 10**9
    into(tmp_path / "part", two, resume=True)
    assert same(tmp_path / "whole", tmp_path / "part")
    assert into(tmp_path / "part", two, resume=True).passes == 0


PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from tiny_models import TEXT, make_model, make_tokenizer
from kedit_fast.statistics import checkpoint, corpus
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.labels import OutputGradients
from kedit_fast.statistics.resumable import collect_into
corpus.LEAST_WINDOW, corpus.BATCHES_A_WINDOW = 1000, 2
documents = [f"{{text}} Number {{i}}." for i, text in enumerate(TEXT * 4)]
before = checkpoint.save
def save(*args):
    before(*args)
    print(args[3], flush=True)
checkpoint.save = save
collect_into(sys.argv[1], make_model("llama"), make_tokenizer(), Corpus(documents), (0, 2), batch_tokens=400,
             output_metric=OutputGradients(tokens=300), inputs=False, checkpoint_every=0, resume=True)
"""


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path, two):
    """SIGKILL in the pass of gradients."""
    (program := tmp_path / "program.py").write_text(PROGRAM.format(tests=str(HERE)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        (sys.executable, str(program), str(tmp_path / "part")), stdout=subprocess.PIPE, text=True, env=environment
    )
    assert [process.stdout.readline().strip() for _ in range(2)] == ["output"] * 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "part" / "checkpoint-output-1-of-1.safetensors").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = into(tmp_path / "part", two, inputs=False, resume=True)
        into(tmp_path / "whole", two, inputs=False)
    finally:
        torch.set_num_threads(threads)
    assert 0 < found.resumed < found.output_tokens == 300 and found.tokens == 0
    assert same(tmp_path / "whole", tmp_path / "part")
    with pytest.raises(StatisticsError, match="holds no statistics"):
        load_statistics(tmp_path / "part", *two)
    with pytest.raises(StatisticsError, match="holds output metrics alone"):
        modules_in(tmp_path / "part")


def test_a_metric_is_added_to_statistics_and_replaced_alone(tmp_path, two):
    folder = tmp_path / "s"
    into(folder, two, False)
    inputs = bits(folder)
    assert not load_statistics(folder, *two).outputs
    added = into(folder, two, resume=True)
    assert added.passes == 1 and added.resumed == added.tokens  # the inputs were finished
    with pytest.raises(
        StatisticsError, match=r"output_metric.safetensors .*different labels \(sampled there, text here"
    ):
        into(folder, two, OutputGradients("text", tokens=300), resume=True)
    other = into(folder, two, OutputGradients("text"), texts=DOCUMENTS[::-1], inputs=False, overwrite=True)
    loaded = load_statistics(folder, *two)
    assert loaded.outputs_from["labels"] == "text" and loaded.outputs_from["corpus"] != loaded.corpus
    tokens, documents = (int(loaded.outputs_from[name]) for name in ("tokens", "documents"))
    assert other.output_tokens == loaded.outputs[0].count == tokens - documents  # the last one has no label
    assert all(torch.equal(bits(folder)[name]["second_moment"], file["second_moment"]) for name, file in inputs.items())
    # Fewer tokens have labels than were read, which a finished job must not take for a text that grew.
    again = into(folder, two, OutputGradients("text"), texts=DOCUMENTS[::-1], inputs=False, resume=True)
    assert again.passes == 0
    into(folder, two, False, overwrite=True)  # anew, without the metric of before
    assert bits(folder).keys() == inputs.keys() and not list(folder.glob(".overwriting*"))
    with pytest.raises(InvalidArgumentError, match="give output_metric"):
        into(tmp_path / "none", two, False, inputs=False)


def test_wrong_and_damaged_files_are_named(tmp_path, two):
    folder = tmp_path / "s"
    files = into(folder, two).files
    with pytest.raises(StatisticsError, match="another model"):
        load_statistics(folder, make_model("llama", seed=3), two[1])
    into(tmp_path / "other", two, OutputGradients(seed=1, tokens=300), inputs=False)
    good = files[3].read_bytes()
    files[3].write_bytes((tmp_path / "other" / files[3].name).read_bytes())
    with pytest.raises(
        StatisticsError, match=r"layers.2.*something else than the output metrics .*different label_seed"
    ):
        load_statistics(folder, *two)
    files[3].write_bytes(good[:-8])
    with pytest.raises(StatisticsError, match=f"{files[3].name} is damaged"):
        load_statistics(folder, *two)
    files[3].write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(StatisticsError, match=f"{files[3].name} is damaged: it is not what was written"):
        load_statistics(folder, *two)
    with safe_open(files[2], "pt") as file:
        metadata = file.metadata()
    save_file({"output_metric": torch.eye(31, dtype=torch.float64)}, files[2], {**metadata, "checksum": ""})
    with pytest.raises(StatisticsError, match="damaged"):
        load_statistics(folder, *two)
    foreign = {k: v for k, v in metadata.items() if k != "labels"}
    save_file({"output_metric": torch.eye(32, dtype=torch.float64)}, files[2], foreign)
    with pytest.raises(StatisticsError, match="its labels is None"):
        load_statistics(folder, *two)
    assert checkpoint.path_of(folder, "output").name == "checkpoint-output-1-of-1.safetensors"


def test_a_finished_job_whose_weights_leave_tokens_out_is_finished(tmp_path, two):
    def without_first(ids):
        return [0.0] + [1.0] * (len(ids) - 1)

    weighted = Corpus(DOCUMENTS, 200, token_weights=without_first)
    found = collect_into(tmp_path / "s", *two, weighted, (0,))
    assert found.tokens < 200
    assert collect_into(tmp_path / "s", *two, weighted, (0,), resume=True).passes == 0
