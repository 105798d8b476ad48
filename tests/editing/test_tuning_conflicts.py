"""Requests that contradict each other, that do not fit with an end token, and weights that change below a memory."""

from __future__ import annotations

import pytest
import torch

import kedit_fast
from kedit_fast import Editor
from kedit_fast.errors import EditError, MethodError, RequestError
from tests.tiny_models import make_model, make_tokenizer

GOOD = {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"}
OTHER = {**GOOD, "target_new": "piano"}


def editor_of(method: str, **hparams) -> Editor:
    """An editor of a tiny model."""
    return Editor(
        make_model("llama"), make_tokenizer(), method, layers=[1], hparams={"lr": 1e-3, "num_steps": 2, **hparams}
    )


@pytest.mark.parametrize("method, outcome", [("ft-m", "the later one wins"), ("locft-bf", "no step serves both")])
def test_one_prompt_with_two_targets_is_named(method, outcome, caplog):
    caplog.set_level("WARNING", "kedit_fast")
    result = editor_of(method).edit([GOOD, OTHER])
    assert result.collisions == ((0, 1),)
    assert any(outcome in record.getMessage() for record in caplog.records)


def test_a_target_that_does_not_fit_with_its_end_is_left_out():
    editor = editor_of("locft-bf")
    room = editor.view.max_length - len(editor.check([GOOD])[0][0].rewriting[0].ids)
    long = None
    for count in range(room + 1, 0, -1):  # the longest target that fits without the end token
        record = {**GOOD, "target_new": "~" * count}
        prepared, problems = editor.check([record], "skip")
        if not problems and max(len(p.ids) for p in prepared[0].rewriting) + len(prepared[0].target) > room:
            long = record
            break
    assert long is not None
    before = {name: tensor.clone() for name, tensor in editor.view.model.state_dict().items()}
    with pytest.raises(RequestError, match="tokens with context and target, the model takes"):
        editor.edit([long, GOOD])
    result = editor.edit([long, GOOD], "skip")
    assert list(result.skipped) == [0] and len(result.losses) == 1
    assert editor.edit([long], "skip").batch == 0
    editor.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.view.model.state_dict().items())


def test_weights_below_a_memory_are_not_changed_unseen():
    tuner = editor_of("ft-m")
    tuner.edit([GOOD])
    beside = Editor(
        tuner.view.model, tuner.tokenizer, "grace", layers=[1], hparams={"lr": 0.1, "num_steps": 2, "eps": 1.0}
    )
    beside.edit([OTHER])
    for undo in (tuner.rollback, tuner.restore):
        with pytest.raises(EditError, match=r"a memory is attached beside model\.layers\.1"):
            undo()
    memory = kedit_fast.detach(tuner.view.model)
    tuner.rollback()
    with pytest.raises(EditError, match="was changed by something else since the first edit beside it"):
        beside.edit([GOOD])
    assert memory is not None


def test_a_memory_that_was_attached_anew_is_still_the_editors():
    editor = editor_of("grace", eps=1.0)
    editor.edit([GOOD])
    kedit_fast.detach(editor.view.model)
    kedit_fast.attach(editor.view.model, editor.memory)
    editor.restore()
    assert kedit_fast.attached(editor.view.model) is None


def test_nothing_is_erased_by_an_editor_that_changes_no_weight():
    editor = editor_of("grace", eps=1.0)
    editor.edit([GOOD])
    with pytest.raises(MethodError, match="grace changes no weight"):
        editor.erase(["He plays", "She speaks"], ["a", "b"])
    editor.rollback()
    assert kedit_fast.attached(editor.view.model) is None
