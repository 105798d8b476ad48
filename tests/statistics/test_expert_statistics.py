"""Second moments of stacked keys: against autograd through the experts module, one token at a time, in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from floors import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import MIXTURES, TEXT, make_model, make_tokenizer
from typer.testing import CliRunner

from kedit_fast.cli import main
from kedit_fast.errors import StatisticsError
from kedit_fast.integrations.framework_statistics import framework_statistics
from kedit_fast.models.experts import ExpertRows
from kedit_fast.models.view import ModelView
from kedit_fast.ops import symmetric_rank_k_update_
from kedit_fast.reports.spectra import expert_condition, spectra
from kedit_fast.solver.block_diagonal import EXPERT_RIDGE
from kedit_fast.statistics import checkpoint, corpus, expert_moments, memory_plan
from kedit_fast.statistics.collect import Job, collect_statistics, growing_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.expert_moments import ExpertMomentSum, ExpertTokens
from kedit_fast.statistics.labels import OutputGradients
from kedit_fast.statistics.resumable import collect_into
from kedit_fast.statistics.store import load_statistics, read_layer, save_statistics
from kedit_fast.statistics.token_weights import CONFIDENCE

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts need transformers 5")
TEXTS = [*TEXT[:3], "One."]
LAYERS = (1, 2)
KIND = "qwen3_moe"


def made(kind=KIND, dtype=torch.float64, **options):
    return make_model(kind, dtype), make_tokenizer(bos=True, **options)


def collect(model, tokenizer, texts=TEXTS, layers=LAYERS, **options):
    return collect_statistics(model, tokenizer, texts, layers, **{"batch_tokens": 100, **options})


def stacked_keys(model, tokenizer, layer, texts=TEXTS):
    """The stacked key of every token: the gradient of one number that the experts put out, by their last matrices.

    Returns:
        keys [T, E, m], and how many experts each token chose of which [T, E].
    """
    module, seen = ModelView(model).edited_module(layer), []
    hook = module.register_forward_pre_hook(lambda m, a, k: seen.append((*a, *k.values())), with_kwargs=True)
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    hook.remove()
    keys, chosen = [], []
    for states, index, weights in seen:
        for t in range(len(index)):
            out = module(states.flatten(0, -2)[t : t + 1], index[t : t + 1], weights[t : t + 1])
            (gradient,) = torch.autograd.grad(out.flatten()[0], module.down_proj)  # of the first output
            keys.append(gradient[:, :, 0] if module.is_transposed else gradient[:, 0])
            chosen.append(torch.bincount(index[t], minlength=len(gradient)))
    return torch.stack(keys), torch.stack(chosen)


def moments_of(keys, weights=None):
    """The blocks on the diagonal of the second moment of stacked keys [T, E, m]."""
    weights = torch.ones(len(keys), dtype=torch.float64) if weights is None else weights
    return torch.einsum("t,tea,teb->eab", weights, keys.double(), keys.double()) / weights.sum()


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("batch_tokens, limit", ((1, 1e-12), (100, 1e-6)))  # a part of these models is float32
def test_moments_are_those_of_stacked_keys_one_token_at_a_time(kind, batch_tokens, limit):
    model, tokenizer = made(kind, side="left")
    collected = collect(model, tokenizer, batch_tokens=batch_tokens)
    for layer in LAYERS:
        keys, chosen = stacked_keys(model, tokenizer, layer)
        second = collected.moment(layer)
        assert second.count == len(keys)
        assert relative_error(second.moment, moments_of(keys)) < limit
        assert second.tokens_by_expert.tolist() == chosen.sum(0).tolist()
        assert second.module == ModelView(model).module_name(layer)
        assert second.module.endswith(".experts.down_proj")


def test_the_mean_is_over_all_tokens_also_those_of_other_experts():
    rows = ExpertRows(
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]),
        torch.tensor([0.5, 1.0, 2.0]),
        torch.tensor([1, 3, 1]),
        torch.tensor([0, 2, 2, 3]),
    )
    total = ExpertMomentSum("m", 3, 2)
    total.update(rows, (8, 8.0))
    second = total.result()
    assert (second.moment * 8).tolist() == [[[0.25, 0], [0, 4]], [[0, 0], [0, 0]], [[4, 4], [4, 4]]]
    assert second.count == 8 and second.tokens_by_expert.tolist() == [2, 0, 1]
    total.update(rows, (1, 3.0), torch.tensor([9.0, 0.0, 9.0, 3.0]))  # token 1 has no weight
    second = total.finish()
    assert (second.moment * 11).tolist() == [[[0.25, 0], [0, 16]], [[0, 0], [0, 0]], [[4, 4], [4, 4]]]
    assert second.count == 9 and second.tokens_by_expert.tolist() == [3, 0, 1]


@pytest.mark.parametrize("dtype, limit", ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)), ids=str)
def test_other_dtypes_are_near_to_float64(dtype, limit):
    model, tokenizer = made(dtype=dtype)
    collected = collect(model, tokenizer)
    expected = collect(model.double(), tokenizer)
    assert collected.dtype in ("float32", "bfloat16")
    for layer in LAYERS:
        assert relative_error(collected.moment(layer).moment, expected.moment(layer).moment) < limit


def test_batches_padding_and_limits_change_rounding_alone():
    model, tokenizer = made()
    whole = collect(model, tokenizer, batch_tokens=10**4)
    single = collect(model, tokenizer, batch_tokens=1)
    for layer in LAYERS:
        one, other = whole.moment(layer), single.moment(layer)
        assert relative_error(one.moment, other.moment) < 1e-6
        assert torch.equal(one.tokens_by_expert, other.tokens_by_expert)
    few = collect(model, tokenizer, max_tokens=30).moment(1)
    keys, chosen = stacked_keys(model, tokenizer, 1)
    assert relative_error(few.moment, moments_of(keys[:30])) < 1e-6
    assert few.tokens_by_expert.tolist() == chosen[:30].sum(0).tolist()


def test_token_weights_multiply_the_squared_gates():
    model, tokenizer = made()

    def weigh(ids):
        return [0.0 if i % 4 == 0 else 1.0 + i / 7 for i in range(len(ids))]

    second = collect(model, tokenizer, token_weights=weigh).moment(2)
    keys, chosen = stacked_keys(model, tokenizer, 2)
    weights = torch.tensor([w for text in TEXTS for w in weigh(tokenizer(text)["input_ids"])], dtype=torch.float64)
    assert relative_error(second.moment, moments_of(keys, weights)) < 1e-6
    assert second.count == int((weights != 0).sum())
    assert second.tokens_by_expert.tolist() == chosen[weights != 0].sum(0).tolist()


def test_weights_by_confidence_are_known_after_the_pass():
    model, tokenizer = made()
    second = collect(model, tokenizer, token_weights=CONFIDENCE).moment(1)
    keys, _ = stacked_keys(model, tokenizer, 1)
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in TEXTS]
    confidence = torch.softmax(torch.cat(logits).double(), -1).max(1).values
    assert relative_error(second.moment, moments_of(keys, confidence)) < 1e-6  # the head is float32
    assert second.count == len(keys)


@pytest.mark.parametrize("kind", MIXTURES)
def test_output_metrics_are_those_of_autograd_one_document_at_a_time(kind):
    model, tokenizer = made(kind)
    metric = OutputGradients("text", tokens=10**6)
    collected = collect(model, tokenizer, output_metric=metric)
    for layer in LAYERS:
        module, rows = ModelView(model).edited_module(layer), []
        for text in TEXTS:
            ids, outputs = torch.tensor(tokenizer(text)["input_ids"]), []

            def hook(module, args, output, outputs=outputs):
                outputs.append(output.detach().requires_grad_())
                return outputs[0]

            handle = module.register_forward_hook(hook)
            log_probs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
            handle.remove()
            (-log_probs.gather(1, ids[1:, None]).sum()).backward()
            rows.append(outputs[0].grad.flatten(0, -2)[:-1])
        rows = torch.cat(rows).double()
        size = ModelView(model).edited_shape(layer)[0]
        assert collected.output_metric(layer).shape == (size, size) and collected.outputs[layer].count == len(rows)
        assert collected.outputs[layer].tokens_by_expert is None
        assert relative_error(collected.output_metric(layer), rows.T @ rows / len(rows)) < 1e-6


# Memory and places


def test_a_sum_takes_the_bytes_of_its_experts():
    view = ModelView(made()[0])
    stack = view.experts(1)
    size = 8 * stack.count * stack.inputs**2
    assert memory_plan.sum_bytes(view, 1) == size
    assert memory_plan.sum_bytes(view, 1, "output") == 8 * stack.outputs**2
    room = memory_plan.plan_groups(view, LAYERS, 0, "device", size)
    assert [group.layers for group in room] == [(1,), (2,)]
    needs = memory_plan.needs(view, room)
    assert needs.sum_bytes == size and needs.file_bytes == 2 * size and needs.passes == 2


@pytest.mark.parametrize("at_once", (1, 2, 100))
def test_masters_elsewhere_get_the_same_sums(monkeypatch, at_once):
    experts, size, n = 5, 16, 60
    monkeypatch.setattr(expert_moments, "STAGED_BYTES", at_once * 4 * size * size)
    offsets = torch.tensor([0, 20, 20, 21, 50, 60])
    rows = ExpertRows(torch.randn(n, size), torch.rand(n), torch.randint(0, 30, (n,)), offsets)
    weights = torch.rand(30, dtype=torch.float64)
    here, there = (ExpertMomentSum("m", experts, size) for _ in range(2))
    there._staged = True  # as where the rows are on another device
    for weigh in (None, weights):
        here.update(rows, (30, 30.0), weigh)
        there.update(rows, (30, 30.0), weigh)
    one, other = here.finish(), there.finish()
    assert relative_error(other.moment, one.moment) < 1e-6 and not other.moment[1].any()
    assert torch.equal(one.tokens_by_expert, other.tokens_by_expert) and one.count == other.count == 60


def test_sums_are_those_of_one_update_for_each_expert():
    """The same bits as the ungrouped op, expert by expert: whether an expert is alone does not matter."""
    offsets = torch.tensor([0, 33, 33, 100])
    rows = ExpertRows(torch.randn(100, 24), torch.rand(100), torch.arange(100), offsets)
    total = ExpertMomentSum("m", 3, 24)
    total.update(rows, (100, 1.0))
    moment = total.finish().moment
    squares = rows.gates.double().square()
    for expert, (first, last) in enumerate(((0, 33), (33, 33), (33, 100))):
        acc = torch.zeros(24, 24, dtype=torch.float64)
        symmetric_rank_k_update_(acc, rows.rows[first:last], squares[first:last])
        assert torch.equal(moment[expert], torch.tril(acc) + torch.tril(acc, -1).T)


# Files and interruptions

DOCUMENTS = [f"{text} Number {i}." for i, text in enumerate(TEXT * 10)]


@pytest.fixture
def two():
    return make_model(KIND), make_tokenizer()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(corpus, "LEAST_WINDOW", 1000)
    monkeypatch.setattr(corpus, "BATCHES_A_WINDOW", 2)


def into(folder, two, layers=LAYERS, texts=DOCUMENTS, **options):
    options = {"batch_tokens": 200, "checkpoint_every": 1e9, **options}
    return collect_into(folder, *two, Corpus(texts), layers, **options)


def same(a, b):
    one, other = ({path.name: load_file(path) for path in folder.glob("*.safetensors")} for folder in (a, b))
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys() and all(torch.equal(t, other[name][key]) for key, t in one[name].items())
        for name in one
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("batches", (1, 4))
def test_a_stopped_job_goes_on_to_the_same_bits(tmp_path, two, monkeypatch, batches):
    into(tmp_path / "whole", two)
    count, update = [0], ExpertMomentSum.update

    def stopping(self, *args):
        count[0] += 1
        if count[0] > len(LAYERS) * batches:
            raise Stop
        update(self, *args)

    monkeypatch.setattr(ExpertMomentSum, "update", stopping)
    with pytest.raises(Stop):
        into(tmp_path / "part", two, checkpoint_every=0)
    monkeypatch.setattr(ExpertMomentSum, "update", update)
    with safe_open(tmp_path / "part" / "checkpoint-1-of-1.safetensors", "pt") as file:
        counts, chosen = (json.loads(file.metadata()[name]) for name in ("counts", "tokens_by_expert"))
    assert all(sum(chosen[layer]) == 2 * counts[layer][0] > 0 for layer in counts)  # two experts a token
    done = into(tmp_path / "part", two, resume=True)
    assert 0 < done.resumed < done.tokens and same(tmp_path / "whole", tmp_path / "part")
    again = into(tmp_path / "part", two, resume=True)
    assert again.passes == 0 and again.experts == done.experts and sorted(done.experts) == list(LAYERS)


def test_files_give_back_what_they_were_given(tmp_path, two):
    collected = collect(*two)
    (path, _) = save_statistics(collected, tmp_path)
    assert path.name == f"{ModelView(two[0]).module_name(1)}.safetensors"
    with torch.no_grad():
        ModelView(two[0]).weight(1).mul_(2)  # an edited model still fits its statistics
    loaded = load_statistics(tmp_path, *two)
    assert sorted(loaded.layers) == list(LAYERS)
    for layer in LAYERS:
        one, other = loaded.moment(layer), collected.moment(layer)
        assert torch.equal(one.moment, other.moment) and torch.equal(one.tokens_by_expert, other.tokens_by_expert)
        assert one.count == other.count
    with pytest.raises(StatisticsError, match="another model: different"):
        load_statistics(tmp_path, make_model(KIND, seed=3), two[1])


def test_damaged_files_are_named(tmp_path, two):
    (path, _) = save_statistics(collect(*two), tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    good = load_file(path)
    changes = {
        "not what was written": {"tokens_by_expert": good["tokens_by_expert"].flip(0) + 1},
        "not what was written ": {"second_moment": good["second_moment"] + 1e-3},
        r"tokens_by_expert is not \[": {"tokens_by_expert": good["tokens_by_expert"][1:].clone()},
        "second_moment is": {"second_moment": good["second_moment"][0].clone()},
        "second_moment is ": {"second_moment": good["second_moment"][:, 1:].clone()},
    }
    for message, change in changes.items():
        save_file({**good, **change}, path, metadata)
        with pytest.raises(StatisticsError, match=f"{path.name}.*{message.strip()}"):
            load_statistics(tmp_path, *two)
    save_file({"second_moment": good["second_moment"]}, path, metadata)
    with pytest.raises(StatisticsError, match="second_moment is"):
        read_layer(tmp_path, path.stem)


def test_a_dense_moment_does_not_fit_experts(tmp_path, two):
    dense, path = make_model("llama"), ModelView(two[0]).module_name(1)
    (file, _) = save_statistics(collect(dense, two[1]), tmp_path)
    file.rename(tmp_path / f"{path}.safetensors")
    with pytest.raises(StatisticsError, match=r"another model|the layer takes \["):
        load_statistics(tmp_path, *two, layers=(1,))


def test_a_checkpoint_without_counts_of_experts_is_damaged(tmp_path, two):
    job = Job(*two, Corpus(DOCUMENTS), LAYERS)
    (group,) = job.plan(job.layers, "auto")
    sums = job.accumulators(group)
    end = job.run(sums)
    progress = checkpoint.Progress(group.layers, end, {})
    checkpoint.save(tmp_path, progress, sums)
    empty = job.accumulators(group)
    checkpoint.restore(tmp_path, empty)
    for layer, total in empty.items():
        assert torch.equal(total.sum, sums[layer].sum) and total.count == sums[layer].count
        assert torch.equal(total.tokens_by_expert, sums[layer].tokens_by_expert)
    path = checkpoint.path_of(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {name: text for name, text in metadata.items() if name != "tokens_by_expert"})
    with pytest.raises(StatisticsError, match="is damaged"):
        checkpoint.restore(tmp_path, job.accumulators(group))


def test_growing_counts_contain_each_other(two):
    small, large = growing_statistics(*two, Corpus(DOCUMENTS, max_tokens=600), LAYERS, (100, 600), 100)
    gap = large.moment(1).moment * large.moment(1).count - small.moment(1).moment * small.moment(1).count
    assert float(torch.linalg.eigvalsh(gap).min()) > -1e-6 * float(gap.max())
    assert bool((large.moment(1).tokens_by_expert >= small.moment(1).tokens_by_expert).all())


PROGRAM = """
import torch
from tiny_models import TEXT, make_model, make_tokenizer
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.resumable import collect_into
from kedit_fast.support import process_group
process_group.start()
torch.set_num_threads(1)
documents = [f"{text} Number {i}." for i, text in enumerate(TEXT * 10)]
done = collect_into("out", make_model("qwen3_moe", torch.float64), make_tokenizer(), Corpus(documents), (1, 2),
                    batch_tokens=200)
if process_group.world()[0] == 0:
    print("tokens", done.tokens, done.experts[1].least)
process_group.stop()
"""


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_add_up_to_one(tmp_path):
    tests = str(Path(__file__).parents[1])
    (tmp_path / "program.py").write_text(PROGRAM)
    run = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "program.py")
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    model, tokenizer = make_model(KIND, torch.float64), make_tokenizer()
    loaded = load_statistics(tmp_path / "out", model, tokenizer)
    whole = collect(model, tokenizer, DOCUMENTS)
    for layer in LAYERS:
        one, other = loaded.moment(layer), whole.moment(layer)
        assert one.count == other.count and torch.equal(one.tokens_by_expert, other.tokens_by_expert)
        assert relative_error(one.moment, other.moment) < 1e-12
    assert done.stdout.split() == ["tokens", str(one.count), str(int(loaded.moment(1).tokens_by_expert.min()))]


# What is said of them


def test_experts_that_are_never_chosen_are_named(caplog):
    model, tokenizer = made()
    experts, gate = ModelView(model).experts(1).count, ModelView(model).mlp(1).gate

    def routed(module, args, output):
        """The first two experts, and the last two of tokens that would have chosen the first one before all."""
        logits, weights, index = output
        return logits, weights, torch.arange(2) + (index[:, :1] == 0) * (experts - 2)

    hook = gate.register_forward_hook(routed)
    try:
        second = collect(model, tokenizer, layers=(1,), batch_tokens=10**4).moment(1)
    finally:
        hook.remove()
    use = ExpertTokens.of(second.tokens_by_expert)
    assert experts == 6 and use.never == (2, 3) and use.least == 0 and use.experts == 6
    last, text = int(second.tokens_by_expert[-1]), caplog.text
    assert second.tokens_by_expert.tolist() == [second.count - last] * 2 + [0, 0, last, last]
    assert 0 < last < 24 and use.median == last
    assert f"{second.module}: none of {second.count} tokens chose 2 of 6 experts (2, 3)" in text
    assert "2 of 6 experts were chosen by fewer tokens than the 24 of their activations" in text


def test_the_condition_is_that_of_the_ridged_block_diagonal_matrix(two, tmp_path):
    statistics = collect(*two, texts=DOCUMENTS)
    second = statistics.moment(1)
    whole = torch.block_diag(*second.moment)
    whole.diagonal().add_(EXPERT_RIDGE * float(whole.diagonal().mean()))
    values = torch.linalg.eigvalsh(whole)
    exact = float(values[-1] / values[0])
    assert 0.5 * exact < expert_condition(second) <= exact * (1 + 1e-9)
    save_statistics(statistics, tmp_path)
    spectrum = spectra(tmp_path)[0]
    assert abs(spectrum.condition - exact) < 1e-6 * exact
    plain = torch.linalg.eigvalsh(torch.block_diag(*second.moment))
    assert torch.allclose(spectrum.eigenvalues, plain, atol=1e-12 * float(plain[-1]))
    assert spectrum.size == len(plain) and not [name for name in spectrum.null_dimensions if "absolute" in name]
    by_expert = [torch.linalg.eigvalsh(block) for block in second.moment]
    dimension = sum(int((v < 1e-3 * v[-1]).sum()) for v in by_expert)
    assert spectrum.null_dimensions["relative 0.001"] == dimension > 0
    assert spectrum.experts == ExpertTokens.of(second.tokens_by_expert)


def run(*arguments):
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def test_commands_report_experts_and_refuse_files_of_one_matrix(tmp_path, two):
    two[0].save_pretrained(tmp_path / "model")
    two[1].save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(DOCUMENTS))
    out = tmp_path / "stats"
    options = ("--text", tmp_path / "texts.txt", "--layers", "1-2", "--out", out, "--dtype", "float32")
    done = run("stats", tmp_path / "model", *options)
    assert done.exit_code == 0, done.output
    assert "Tokens that chose each expert" in done.output and "never chosen" in done.output
    again = run("stats", tmp_path / "model", *options, "--resume", "--json")
    experts = json.loads(again.output[again.output.index("{") :])["experts"]
    tokens = load_file(next(out.glob("*.1.*.safetensors")))["tokens_by_expert"]
    assert experts["1"]["least"] == int(tokens.min()) and experts["1"]["experts"] == len(tokens)
    shown = run("stats", "show", out, "--no-draw", "--json")
    assert json.loads(shown.output)["layers"][0]["experts"] == {
        k: v for k, v in experts["1"].items() if k != "condition"
    }
    assert run("stats", "show", out, "--no-draw").exit_code == 0
    exported = run("stats", "export", out, "--out", tmp_path / "npz", "--model-name", "m")
    assert exported.exit_code == 1 and "one matrix a layer" in " ".join(exported.output.split())
    assert not (tmp_path / "npz").exists()
    projected = run("stats", "project", out, "--out", tmp_path / "p.pt", "--rule", "energy", "--threshold", "0.1")
    assert projected.exit_code == 1 and "one matrix a layer" in " ".join(projected.output.split())


def test_frameworks_read_our_files_of_experts_and_are_refused_theirs(tmp_path, two):
    with pytest.raises(StatisticsError, match=r"layers 1, 2 are mixtures of experts.*`kedit-fast stats`"):
        framework_statistics(*two, LAYERS, {"mom2_n_samples": 10}, tmp_path, DOCUMENTS)
    assert not list(tmp_path.iterdir())
    into(tmp_path, two)
    statistics = framework_statistics(*two, LAYERS, {"mom2_n_samples": 10}, tmp_path)
    assert statistics.moment(2).moment.ndim == 3
