"""StableEdit through the editor, and the warm-up of running normalizers: statistics alone, part of the state."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import REQUESTS, make_editor, run, same, saved, weights
from tiny_models import make_model

from benchmarks.published import serial_gradients
from kedit_fast import EditRequest, Patch
from kedit_fast.editing.batch_record import BatchRecord
from kedit_fast.errors import EditError, MethodError, RequestError, StatisticsError
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare
from kedit_fast.workflow import STATE_FILE

NUMBERS = {"lr": 1e-2, "token": "mask", "ridge": 10.0, "whitening_floor": 1e-3}
OTHERS = [
    EditRequest("{} speaks", "Ebro", "French and English"),
    EditRequest("The old tower of {} is in", "Madrid", "Spain"),
    EditRequest("{} plays the", "Danielle Darrieux", "cello, and the violin"),
]


def editor_of(method="stableedit", **numbers):
    return make_editor("llama", method, torch.float64, **{**NUMBERS, "layers": (1, 2), **numbers})


def known(editor):
    """Every tensor of the editor's normalizers."""
    return {
        f"{shape}.{name}": tensor
        for shape, normalizer in editor.solver_state.normalizers.items()
        for name, tensor in normalizer.tensors().items()
    }


def alike(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_the_published_turn_with_statistics_of_a_warm_up():
    """Gradients one request at a time, moments of all rows so far by their definitions, a dense d x d solve."""
    editor = editor_of()
    names = [editor.view.module_name(layer) for layer in (1, 2)]
    other = ModelView(make_model("llama", torch.float64))
    modules = [other.linear(name)[0] for name in names]
    editor.warm_up(OTHERS)
    assert not editor.ledger.batches and same(editor, {k: v for k, v in other.model.state_dict().items()})
    rows = []
    for batch in (OTHERS, REQUESTS[:2], REQUESTS[2:]):
        prepared = prepare(editor.tokenizer, batch, (), 128)
        gathered = [serial_gradients(other.model, modules, one, every_token=True) for one in prepared]
        of_batch = [tuple(torch.cat([pair[part][m] for pair in gathered]) for part in (0, 1)) for m in (0, 1)]
        rows += [torch.cat(pair, 1) for pair in of_batch]
        seen = torch.cat(rows)
        if batch is OTHERS:
            continue
        editor.edit(batch)
        n, out = len(seen), 32
        assert n > out + 1
        mean, std = seen.mean(0), seen.var(0).sqrt()
        covariance = torch.cov(seen[:, -out:].T, correction=0) * n / (n - out - 1)
        values, vectors = torch.linalg.eigh(covariance)
        assert values[0] < 1e-3 < values[-1]  # the floor matters
        root = vectors @ torch.diag(values.clamp(min=1e-3).rsqrt()) @ vectors.T
        for name, (keys, gradients) in zip(names, of_batch, strict=True):
            h, g = (keys - mean[:-out]) / std[:-out], (gradients - mean[-out:]) @ root
            v = -1e-2 * h.square().sum(1, keepdim=True) * g
            shift = torch.linalg.solve(keys.T @ keys + 10 * torch.eye(64, dtype=torch.float64), keys.T @ v)
            other.linear(name)[1].add_(shift.T)
        for name in names:
            moved = other.linear(name)[1] - ModelView(make_model("llama", torch.float64)).linear(name)[1]
            gap = editor.view.linear(name)[1] - other.linear(name)[1]
            assert float(gap.norm()) < 1e-4 * float(moved.norm())  # rows are gathered in fp32


def test_undoing_batches_gives_the_normalizer_its_bits_back():
    editor = editor_of()
    editor.warm_up(OTHERS[:2])
    states, matrices = [known(editor)], [weights(editor)]
    for batch in (REQUESTS[:1], REQUESTS[1:2], REQUESTS[2:]):
        editor.edit(batch)
        states.append(known(editor))
        matrices.append(weights(editor))
    scatters = 2 * 8 * 32 * 32  # as it is, and after the warm-up
    tokens = [int(state["64x32.count"]) for state in states]
    assert editor.solver_state.nbytes == 2 * 8 * 96 + scatters + 4 * 32 * (tokens[-1] - tokens[0])
    assert all(snapshot.normalizers["64x32"].scatter is None for snapshot in editor.solver_state._history.snapshots)
    for undone, left in ((1, 2), (2, 0)):
        editor.rollback(undone)
        assert alike(known(editor), states[left]) and same(editor, matrices[left])
    for i, batch in enumerate((REQUESTS[:1], REQUESTS[1:2], REQUESTS[2:]), 1):
        editor.edit(batch)
        assert alike(known(editor), states[i]) and same(editor, matrices[i])
    editor.restore()
    assert alike(known(editor), states[0])  # the warm-up stays


def test_a_window_bounds_what_undoing_needs():
    editor, usual = editor_of(memory_window=1), editor_of()
    states = []
    for one in (editor, usual):
        one.warm_up(OTHERS)
        states.append(known(one))
    for batch in (REQUESTS[:1], REQUESTS[1:2], REQUESTS[2:]):
        for one in (editor, usual):
            one.edit(batch)
        assert alike(known(editor), known(usual))
    assert editor.solver_state.nbytes < usual.solver_state.nbytes
    for one in (editor, usual):
        one.rollback()
    assert alike(known(editor), known(usual)) and same(editor, weights(usual))
    editor.restore()
    assert alike(known(editor), states[0])
    editor.edit(REQUESTS[:1])


def test_a_failure_leaves_the_normalizer_as_it_was(monkeypatch):
    editor = editor_of()
    editor.warm_up(OTHERS)
    before = known(editor)
    monkeypatch.setattr(editor.ledger, "write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        editor.edit(REQUESTS)
    assert alike(known(editor), before)
    gather, calls = editor.gradients, []

    def stop_at_second(*args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return gather(*args, **options)

    editor.gradients = stop_at_second
    monkeypatch.setattr("kedit_fast.editing.schedules.gradients.WARM_UP_BATCH", 2)
    with pytest.raises(KeyboardInterrupt):
        editor.warm_up(OTHERS)
    assert alike(known(editor), before)


@pytest.mark.parametrize("method", ("ultraedit", "stableedit"))
def test_a_stored_state_goes_on_with_the_same_bits(method, tmp_path):
    numbers = {} if method == "stableedit" else {"whitening_floor": 1e-6}
    editor = editor_of(method, **numbers)
    assert editor.warm_up(OTHERS) == {} and editor.warm_up(OTHERS[:1]) == {}  # again: more rows
    editor.save_state(tmp_path / "warm")
    editor.edit(REQUESTS[:2])
    editor.save_state(tmp_path / "later")
    middle = weights(editor)
    editor.edit(REQUESTS[2:])
    after = weights(editor)
    for path, start, batches in (("warm", None, (REQUESTS[:2], REQUESTS[2:])), ("later", middle, (REQUESTS[2:],))):
        other = editor_of(method, **numbers)
        if start is not None:
            other.view.model.load_state_dict(start)
        other.load_state(tmp_path / path)
        for batch in batches:
            other.edit(batch)
        assert same(other, after)
        other.rollback(len(batches))
        other.edit(batches[0])
        assert same(other, middle if len(batches) > 1 else after)
    cold = editor_of(method, **numbers)
    with pytest.raises(StatisticsError, match="another run: different method"):
        editor_of("ultraedit" if method == "stableedit" else "stableedit").load_state(tmp_path / "warm")
    cold.edit(REQUESTS[:2])
    assert not same(cold, middle)  # the warm-up matters


def test_what_cannot_be_warmed_up_is_refused_by_name():
    with pytest.raises(MethodError, match="memit has no running normalizer to warm up"):
        make_editor().warm_up(OTHERS)
    editor = editor_of()
    bad = [OTHERS[0], {"prompt": "{} is", "subject": "Ebro", "target_new": ""}, OTHERS[1]]
    with pytest.raises(RequestError, match="target_new"):
        editor.warm_up(bad)
    assert not editor.solver_state.normalizers
    assert set(editor.warm_up(bad, on_error="skip")) == {1}
    usual = editor_of()
    usual.warm_up([OTHERS[0], OTHERS[1]])
    assert alike(known(editor), known(usual))
    editor.edit(REQUESTS)
    with pytest.raises(EditError, match="before the first edit"):
        editor.warm_up(OTHERS)
    editor.restore()
    editor.warm_up(OTHERS)
    with pytest.raises(EditError, match="a state is loaded before the first edit"):
        editor.load_state("nowhere")
    with pytest.raises(EditError, match="inference_mode"), torch.inference_mode():
        editor.warm_up(OTHERS)


def test_a_recorded_batch_is_added_again_with_the_same_bits():
    first, second = editor_of(), editor_of()
    for editor in (first, second):
        editor.warm_up(OTHERS)
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        record = first.recorded(result := first.edit(batch))
        assert not any("scatter" in name for name in record.tensors())  # rows instead of out x out
        again = BatchRecord.from_parts(json.loads(json.dumps(record.facts())), record.tensors())
        second.repeat(again, result.requests)
        assert alike(known(first), known(second)) and same(first, weights(second))
    for editor in (first, second):
        editor.rollback()
    assert alike(known(first), known(second))


def test_the_command_warms_up_and_stores_it(tmp_path):
    model = saved(tmp_path / "model", "llama")
    for name, requests in (("others", OTHERS), ("requests", REQUESTS)):
        lines = [json.dumps({"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new}) for r in requests]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    common = ("edit", model, "--requests", tmp_path / "requests.jsonl", "--metrics", "cf.accuracy/rewrite")
    numbers = [part for name, value in NUMBERS.items() for part in ("--set", f"{name}={value}")]
    here = (*common, "--method", "stableedit", "--layers", "1", *numbers, "--json")
    warm = ("--warm-up", tmp_path / "others.jsonl")
    done = run(*here, *warm, "--out", tmp_path / "out", "--checkpoint", tmp_path / "safe", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["warm_up"] == 3
    cold = run(*here, "--patch", tmp_path / "cold", "--batch-size", "2")
    assert "warm_up" not in json.loads(cold.stdout)
    again = run(*here, *warm, "--patch", tmp_path / "warm", "--checkpoint", tmp_path / "safe", "--batch-size", "2")
    assert again.returncode == 0, again.stderr
    hashes = [Patch.load(tmp_path / name).targets["model.layers.1.mlp.down_proj"].result for name in ("warm", "cold")]
    assert hashes[0] != hashes[1]
    state = load_file(tmp_path / "out" / STATE_FILE)
    assert int(state["normaliser.64x32.count"]) > 40 and state["normaliser.64x32.scatter"].shape == (32, 32)
    other = run(*here, "--patch", tmp_path / "other", "--checkpoint", tmp_path / "safe", "--batch-size", "2")
    assert other.returncode == 1 and "warm-up" in other.stderr
    refused = run(*common, "--method", "memit", *warm, "--patch", tmp_path / "p")
    assert refused.returncode == 1 and "memit has no running normalizer" in refused.stderr
    refused = run(*here, *warm, "--continue", "--patch", tmp_path / "p")
    assert refused.returncode == 1 and "--warm-up with --continue" in refused.stderr
