"""Rows that wait for a large update of a sum: what a GPU does, on a processor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from floors import relative_error
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import load_statistics
from kedit_fast.models.experts import ExpertRows
from kedit_fast.statistics import expert_moments, memory_plan, moments, updates
from kedit_fast.statistics.collect import Job, collect_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.expert_moments import ExpertMomentSum
from kedit_fast.statistics.labels import OutputGradients
from kedit_fast.statistics.moments import SecondMomentAccumulator
from kedit_fast.statistics.resumable import collect_into
from kedit_fast.statistics.row_buffer import RowBuffer

DOCUMENTS = [f"{text} Number {i}." for i, text in enumerate(TEXT * 10)]
ROWS = 700
GRADIENTS = OutputGradients("text", tokens=1500)


def whole_numbers(n, d=6, seed=0):
    return torch.randint(-3, 4, (n, d), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("sizes", ((1, 2, 3), (7, 0, 7), (30, 1), (5, 5, 5), (4, 23, 2)), ids=str)
@pytest.mark.parametrize("weighted", (False, True))
def test_rows_come_out_as_they_went_in_in_updates_of_one_size(sizes, weighted):
    buffer, parts, expected = RowBuffer(5), [], []
    for i, size in enumerate(sizes):
        rows = whole_numbers(size, seed=i)
        weights = torch.arange(size) + 1.0 if weighted and i else None  # the first ones have none
        expected.append(torch.cat([rows, (torch.ones(size) if weights is None else weights)[:, None]], 1))
        for part, of_part in buffer.put(rows, weights):
            of_part = torch.ones(len(part)) if of_part is None else of_part
            parts.append(torch.cat([part, of_part[:, None]], 1))
    assert all(len(part) == 5 for part in parts) and buffer.waiting == sum(sizes) % 5
    for part, of_part in buffer.take():
        of_part = torch.ones(len(part)) if of_part is None else of_part
        parts.append(torch.cat([part, of_part[:, None]], 1))
    assert torch.equal(torch.cat(parts), torch.cat(expected)) and not list(buffer.take())


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("finish", ("result", "finish", "reduce_"))
def test_no_row_that_waits_is_forgotten(weighted, finish):
    plain, waiting = SecondMomentAccumulator("m", 6), SecondMomentAccumulator("m", 6, update_rows=50)
    for i, size in enumerate((20, 20, 45, 3)):
        rows, weights = whole_numbers(size, seed=i), (torch.arange(size) % 3).double() if weighted else None
        for total in (plain, waiting):
            total.update(rows, None, weights)
        assert waiting.count == plain.count and waiting.weight == plain.weight
    assert not torch.equal(waiting.sum, plain.sum)
    if finish == "reduce_":
        waiting.reduce_()
        assert torch.equal(waiting.sum, plain.sum)
    else:
        assert torch.equal(getattr(waiting, finish)().moment, plain.result().moment)


def expert_rows(tokens, experts, seed, shared):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])  # [T, 2]
    order = torch.argsort(chosen.flatten(), stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    return ExpertRows(
        whole_numbers(2 * tokens, 4, seed),
        torch.randint(1, 4, (2 * tokens,), generator=generator).float(),
        order // 2,
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        whole_numbers(tokens, 3, seed + 1) if shared else None,
        torch.randint(1, 3, (tokens,), generator=generator).float() if shared else None,
    )


@pytest.mark.parametrize("shared", (0, 3))
@pytest.mark.parametrize("weighted", (False, True))
def test_what_experts_wait_with_gives_the_same_sums(weighted, shared):
    plain, waiting = (ExpertMomentSum("m", 5, 4, shared=shared, update_rows=rows) for rows in (0, 20))
    for i, tokens in enumerate((8, 8, 8, 30, 2)):
        weights = (torch.arange(tokens) % 3).double() if weighted and i != 1 else None
        totals = (tokens, float(tokens)) if weights is None else (int((weights != 0).sum()), float(weights.sum()))
        for total in (plain, waiting):
            total.update(expert_rows(tokens, 5, i, shared), totals, weights)
    assert not torch.equal(waiting.sum, plain.sum)
    ours, theirs = waiting.finish(), plain.finish()
    assert torch.equal(ours.moment, theirs.moment) and ours.count == theirs.count
    assert torch.equal(ours.tokens_by_expert, theirs.tokens_by_expert)
    assert ours.shared is theirs.shared is None or torch.equal(ours.shared, theirs.shared)


def test_joined_pairs_are_sorted_by_expert_and_token():
    parts = [expert_rows(tokens, 5, tokens, True) for tokens in (3, 6, 2)]
    joined = ExpertRows.joined(parts, [3, 6, 2])
    keys = torch.cat([part.stacked(count) for part, count in zip(parts, (3, 6, 2), strict=True)])
    assert torch.equal(joined.stacked(11), keys)
    assert torch.equal(joined.experts, joined.experts.sort().values)
    for first, last in zip(joined.offsets[:-1].tolist(), joined.offsets[1:].tolist(), strict=True):
        assert joined.tokens[first:last].tolist() == sorted(joined.tokens[first:last].tolist())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Rows are gathered, and wait for updates of ROWS; the numbers of rows that updates had."""
    monkeypatch.setattr(memory_plan, "_waits", lambda device: True)
    monkeypatch.setattr(updates, "_gathers", lambda device: True)
    monkeypatch.setattr(memory_plan, "UPDATE_ROWS", ROWS)
    seen, update = [], moments.symmetric_rank_k_update_

    def spy(acc, rows, *args):
        seen.append(len(rows))
        return update(acc, rows, *args)

    monkeypatch.setattr(moments, "symmetric_rank_k_update_", spy)
    return seen


def collect(model, tokenizer, **options):
    return collect_statistics(model, tokenizer, DOCUMENTS, (0, 2), **{"batch_tokens": 200, **options})


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("weighted", (False, True))
def test_large_updates_give_the_moments_of_small_ones(dtype, weighted, monkeypatch, request):
    tokenizer, model = make_tokenizer(), make_model("llama").to(dtype)
    weigh = (lambda ids: [1.0 + i % 3 for i in range(len(ids))]) if weighted else None
    plain = collect(model, tokenizer, token_weights=weigh)
    seen = request.getfixturevalue("as_on_a_gpu")
    large = collect(model, tokenizer, token_weights=weigh)
    for layer in (0, 2):
        assert large.moment(layer).count == plain.moment(layer).count
        assert relative_error(large.moment(layer).moment, plain.moment(layer).moment) < 1e-6
    assert seen[:2] == [ROWS, ROWS] and sum(seen) == 2 * plain.moment(0).count
    assert sum(size != ROWS for size in seen) <= 2  # the rest of each layer


@pytest.mark.parametrize("weights", (None, "teacher-confidence"))
def test_experts_and_output_gradients_wait_too(weights, monkeypatch, request):
    model, tokenizer = make_model("qwen3_moe", torch.float64), make_tokenizer()
    options = dict(layers=(1, 2), batch_tokens=200, output_metric=GRADIENTS, token_weights=weights)
    calls, update = [], expert_moments.grouped_symmetric_rank_k_update_

    def spy(*args):
        calls.append(1)
        return update(*args)

    monkeypatch.setattr(expert_moments, "grouped_symmetric_rank_k_update_", spy)
    plain = collect_statistics(model, tokenizer, DOCUMENTS, **options)
    small = len(calls)
    seen = request.getfixturevalue("as_on_a_gpu")
    large = collect_statistics(model, tokenizer, DOCUMENTS, **options)
    assert 0 < len(calls) - small < small / 2
    assert ROWS in seen  # of gradients
    for layer in (1, 2):
        assert relative_error(large.moment(layer).moment, plain.moment(layer).moment) < 1e-12
        assert torch.equal(large.moment(layer).tokens_by_expert, plain.moment(layer).tokens_by_expert)
        assert relative_error(large.output_metric(layer), plain.output_metric(layer)) < 1e-6


def test_what_waits_is_planned_within_what_sums_leave_free(as_on_a_gpu):
    model, tokenizer = make_model("llama"), make_tokenizer()
    job = Job(model, tokenizer, Corpus(DOCUMENTS), (0, 2), 200)
    row, sums = memory_plan.row_bytes(job.view, 0), memory_plan.sum_bytes(job.view, 0)
    assert row == 4 * 64
    (group,) = job.plan((0, 2), "device", 2 * sums + 2 * 2 * row * 5000)
    assert group.update_rows == ROWS
    (group,) = job.plan((0, 2), "device", 2 * sums + 2 * 2 * row * 500)
    assert group.update_rows == 500  # half of what is left
    needs = memory_plan.needs(job.view, [group])
    assert needs.buffer_bytes == 2 * 500 * row and needs.sum_bytes == 2 * sums
    (group,) = job.plan((0, 2), "device", 2 * sums + 2 * 2 * row * 399)
    assert group.update_rows == 0  # less than two batches: a buffer would only copy them
    assert memory_plan.needs(job.view, [group]).buffer_bytes == 0
    groups = job.plan((0, 2), "device", sums)
    assert [part.layers for part in groups] == [(0,), (2,)]  # rows that wait cost no pass
    assert [part.update_rows for part in groups] == [0, 0]


def test_rows_wait_on_a_gpu_alone():
    assert memory_plan._waits(torch.device("cuda", 0)) and not memory_plan._waits(torch.device("cpu"))
    job = Job(make_model("llama"), make_tokenizer(), Corpus(DOCUMENTS), (0, 2), 200)
    assert [group.update_rows for group in job.plan((0, 2), "auto")] == [0]


class Stop(Exception):
    pass


def test_a_checkpoint_has_the_rows_that_waited(as_on_a_gpu, tmp_path, monkeypatch):
    model, tokenizer = make_model("llama"), make_tokenizer()
    plain = collect(model, tokenizer)
    before, batches = Job._add, []

    def add(self, *args):
        batches.append(1)
        if len(batches) == 6:  # five batches of at most 200 tokens: some rows wait
            raise Stop
        before(self, *args)

    common = dict(corpus=Corpus(DOCUMENTS), layers=(0, 2), batch_tokens=200)
    monkeypatch.setattr(Job, "_add", add)
    with pytest.raises(Stop):
        collect_into(tmp_path / "s", model, tokenizer, checkpoint_every=0, **common)
    monkeypatch.setattr(Job, "_add", before)
    found = collect_into(tmp_path / "s", model, tokenizer, resume=True, **common)
    assert 0 < found.resumed < found.tokens == plain.moment(0).count
    loaded = load_statistics(tmp_path / "s", model, tokenizer)
    for layer in (0, 2):
        assert relative_error(loaded.moment(layer).moment, plain.moment(layer).moment) < 1e-6


PROGRAM = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from tiny_models import TEXT, make_model, make_tokenizer
from kedit_fast.statistics import checkpoint, memory_plan, updates
from kedit_fast.statistics.collect import Job
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.resumable import collect_into
memory_plan._waits = updates._gathers = lambda device: True
memory_plan.UPDATE_ROWS = 700
documents = [f"{{text}} Number {{i}}." for i, text in enumerate(TEXT * 10)]
before, count = Job._add, []
def add(self, documents, sums, updates):
    before(self, documents, sums, updates)
    count.append(1)
    if len(count) == {batches}:
        print(next(iter(sums.values()))._waiting.waiting, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
Job._add = add
collect_into(sys.argv[1], make_model("llama"), make_tokenizer(), Corpus(documents), (0, 2), batch_tokens=200,
             checkpoint_every=0, resume=True)
"""


def test_a_process_killed_while_rows_wait_loses_none(as_on_a_gpu, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM.format(tests=str(Path(__file__).parents[1]), batches=5)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "s")], capture_output=True, text=True, env=environment
    )
    assert killed.returncode == -signal.SIGKILL and int(killed.stdout) > 0, killed.stderr[-2000:]
    model, tokenizer = make_model("llama"), make_tokenizer()
    found = collect_into(
        tmp_path / "s", model, tokenizer, Corpus(DOCUMENTS), (0, 2), batch_tokens=200, checkpoint_every=0, resume=True
    )
    plain = collect(model, tokenizer)
    assert 0 < found.resumed < found.tokens == plain.moment(0).count
    loaded = load_statistics(tmp_path / "s", model, tokenizer)
    for layer in (0, 2):
        assert relative_error(loaded.moment(layer).moment, plain.moment(layer).moment) < 1e-6


def test_the_command_says_what_waits(as_on_a_gpu):
    from kedit_fast.cli.stats import collect as command

    job = Job(make_model("llama"), make_tokenizer(), Corpus(DOCUMENTS), (0, 2), 200)
    needs = memory_plan.needs(job.view, job.plan((0, 2), "device", 1 << 24))
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.notices, "print", lambda text, **_: said.append(text))
        command._say_needs(needs)
        command._say_needs(replace(needs, buffer_bytes=0))
    assert "rows that wait for them 350.0 KiB; files" in said[0] and "wait" not in said[1]
