"""Values on disk: used again for what they were made for, and for nothing else."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kedit_fast import Editor, demo
from kedit_fast.editing.values import shared
from kedit_fast.editing.values.loop import ValueOptimizer
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.editing.values.store import ValueFile, edited_hash, open_values
from kedit_fast.errors import EditError, RequestError

NUMBERS = {"v_num_grad_steps": 3, "mom2_adjustment": False}
PREFIXES = ("The old man. ",)


@pytest.fixture
def editor(demo_model):
    def make(values, requests=3, **more):
        made = Editor(*demo_model, "memit", hparams={**NUMBERS, **more}, prefixes=PREFIXES, values=values)
        made.requests = demo.requests(requests)
        return made

    return make


@pytest.fixture
def optimised(monkeypatch):
    """How many values were optimised, call by call."""
    counts = []
    original = shared.find_values

    def counting(view, prepared, *args, **kwargs):
        counts.append(len(prepared))
        return original(view, prepared, *args, **kwargs)

    monkeypatch.setattr(shared, "find_values", counting)
    return counts


def edit(made):
    """Edit, restore, and return the result."""
    result = made.edit(made.requests)
    made.restore()
    return result


def test_values_are_used_again_and_give_the_same_update(tmp_path, editor, optimised):
    path = tmp_path / "values.safetensors"
    first = edit(editor(path))
    again = edit(editor(path))
    more = edit(editor(path, 5))
    assert optimised == [3, 2]  # nothing, then the two that are new
    for name, (update,) in first.updates.items():
        assert torch.equal(update.left, again.updates[name][0].left)
    assert again.losses == first.losses and again.steps == first.steps and len(more.losses) == 5


def test_another_configuration_layer_or_model_is_not_served(tmp_path, editor, optimised):
    path = tmp_path / "values.safetensors"
    edit(editor(path))
    edit(editor(path, v_lr=0.4))
    edit(editor(path, layers=(0, 2)))
    edit(editor(path, kl_temperature=2.0))
    edit(editor(path, kl_direction="original"))
    edit(editor(path, kl_direction="edited", kl_temperature=1.0))  # as published: those of the first
    made = editor(path)
    made.edit(demo.requests(5)[3:])  # the model is another one now
    made.edit(made.requests)
    made.restore()
    assert optimised == [3, 3, 3, 3, 3, 2, 3]
    edit(editor(path, mom2_update_weight=7.0))  # says nothing of values
    assert optimised == [3, 3, 3, 3, 3, 2, 3]


def test_edited_weights_have_another_hash(demo_model):
    from kedit_fast.models.view import ModelView

    view = ModelView(demo_model[0])
    before, weight = edited_hash(view), view.weight(3)
    with torch.no_grad():
        kept = weight.clone()
        weight[0, :2] = weight[0, :2].flip(0)  # the same numbers elsewhere
        assert edited_hash(view) != before
        weight.copy_(kept)
    assert edited_hash(view) == before


def test_an_interrupt_keeps_what_was_done(tmp_path, editor, optimised, monkeypatch):
    path = tmp_path / "values.safetensors"
    made = editor(path, 4, values_batch=1)
    original = ValueOptimizer._admit

    def stopping(self, active):
        active = original(self, active)
        if not self.queue:
            raise KeyboardInterrupt
        return active

    monkeypatch.setattr(ValueOptimizer, "_admit", stopping)
    with pytest.raises(KeyboardInterrupt):
        made.edit(made.requests)
    assert not made.ledger.batches and len(ValueFile(path).entries) == 3
    monkeypatch.setattr(ValueOptimizer, "_admit", original)
    edit(editor(path, 4, values_batch=1))
    assert optimised == [4, 1]


def test_files_that_are_not_ours_are_refused_by_name(tmp_path):
    broken, foreign = tmp_path / "broken", tmp_path / "foreign"
    broken.write_bytes(b"\x00" * 64)
    save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(EditError, match="broken is damaged"):
        ValueFile(broken)
    with pytest.raises(EditError, match="foreign is not a file of values"):
        ValueFile(foreign)
    with pytest.raises(EditError, match="cannot write"):
        ValueFile(tmp_path / "nowhere" / "values")


def test_a_full_disk_says_so_and_keeps_the_old_file(tmp_path, editor, monkeypatch):
    path = tmp_path / "values.safetensors"
    edit(editor(path))
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kedit_fast.support.files.save_file", full)
    made = editor(path, 5)
    with pytest.raises(EditError, match="No space left"):
        made.edit(made.requests)
    assert path.read_bytes() == before and not made.ledger.batches
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("where", ("values.safetensors", "layer_{}_clamp_{}_case_{}.npz"))
def test_what_cannot_be_written_to_a_model_is_not_kept(tmp_path, editor, where):
    """A value that took no step must be refused the next time too."""
    made = editor(tmp_path / where, v_stop_loss=1e9)
    for _ in range(2):
        with pytest.raises(RequestError, match="says the target already"):
            made.edit(made.requests)


def test_the_configuration_is_part_of_the_key(tmp_path, editor, optimised, demo_model):
    """The same weights with another norm are another model."""
    path = tmp_path / "values.safetensors"
    edit(editor(path))
    config = demo_model[0].config
    before = config.rms_norm_eps
    try:
        config.rms_norm_eps = 0.1
        edit(editor(path))
    finally:
        config.rms_norm_eps = before
    assert optimised == [3, 3]


def test_one_after_another_the_file_is_written_once(tmp_path, demo_model, monkeypatch):
    writes = []
    original = ValueFile.flush
    monkeypatch.setattr(ValueFile, "flush", lambda self: writes.append(1) or original(self))
    editor = Editor(*demo_model, "rome", layers=[0], hparams=NUMBERS, prefixes=(), values=tmp_path / "values")
    editor.edit(demo.requests(4))
    editor.restore()
    assert len(writes) == 1 and len(ValueFile(tmp_path / "values").entries) == 4


def test_memits_files_are_written_and_read(tmp_path, editor, optimised, demo_model):
    template = str(tmp_path / "kvs" / "layer_{}_clamp_{}_case_{}.npz")
    first = editor(template)
    assert isinstance(first.values, MemitCache)
    result = edit(first)
    layer, clamp = first.hparams.layers[-1], first.hparams.clamp_norm_factor
    path = tmp_path / "kvs" / f"layer_{layer}_clamp_{clamp:g}_case_{first.requests[0].id}.npz"
    with np.load(path) as file:
        assert list(file) == ["v_star"] and file["v_star"].dtype == np.float32
    again = edit(editor(template))
    assert optimised == [3]
    for name, (update,) in result.updates.items():
        torch.testing.assert_close(update.left, again.updates[name][0].left, rtol=1e-3, atol=1e-5)
    with pytest.raises(EditError, match="several requests have the id"):
        first.edit([first.requests[0], first.requests[0]])
    np.savez(path, v_star=np.zeros(7, np.float32))
    with pytest.raises(EditError, match=r"v_star is \[7\]"):
        edit(editor(template))
    path.write_bytes(b"junk")
    with pytest.raises(EditError, match="not one of memit's value files"):
        edit(editor(template))
    with pytest.raises(EditError, match=r"three \{\}"):
        open_values("case_{}.npz")


def test_a_repeated_case_id_is_refused_also_across_batches(tmp_path, demo_model):
    from dataclasses import replace

    from kedit_fast.workflow import run_edits

    first, second = (replace(request, id=1) for request in demo.requests(2))
    template = str(tmp_path / "layer_{}_clamp_{}_case_{}.npz")
    common = dict(statistics=None, hparams=NUMBERS, values=template, batch_size=1)
    with pytest.raises(RequestError, match=r"request 1: memit's value files.* 2 requests have this one"):
        run_edits(*demo_model, [first, second], "memit", **common)
    assert not list(tmp_path.iterdir())
