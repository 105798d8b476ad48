"""GRACE in an editor: one batch is one edit after another, chains of shared entries, undoing, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from floors import relative_error
from support import REQUESTS
from tiny_models import make_model, make_tokenizer

from kedit_fast import Editor, EditRequest
from kedit_fast.editing.tuning import grace
from kedit_fast.editing.tuning.codebook import Entered, Entering
from kedit_fast.errors import EditError, RequestError
from kedit_fast.memories.memory import KeyValueMemory, SideMemory
from kedit_fast.models.view import ModelView

NUMBERS = dict(num_steps=5, lr=0.05, eps=0.05, val_init="warm", units="published")
SHARING = [  # two that say the same of neighboring prompts, the first prompt again with another target, and others
    *REQUESTS,
    EditRequest("{} plays the", "Miles Davis", "guitar"),
    EditRequest("{} plays the", "Miles Davis", "guitar"),
    EditRequest("{} sang in", "Danielle Darrieux", "English"),
]


def editor(kind="llama", dtype=torch.float32, model=None, layers=(1,), **hparams):
    model = make_model(kind, dtype) if model is None else model
    return Editor(model, make_tokenizer(), "grace", layers=layers, hparams={**NUMBERS, **hparams})


def serial_value(model, request, ids, target, start, layer, steps, lr, replacement="replace_last"):
    """The released loop for one request: Adam on the value in place of the edited module's output."""
    view = ModelView(model)
    value = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([value], lr)
    row, last = torch.tensor([[*ids, *target]]), len(ids) - 1
    places = {"replace_last": slice(last, last + 1), "replace_prompt": slice(0, last), "replace_all": slice(None)}

    def hook(module, args, output):
        output = output.clone()
        output[:, places[replacement]] = value
        return output

    handle = view.edited_module(layer).register_forward_hook(hook)
    try:
        for _ in range(steps):
            logits = model(row).logits[0, last:-1].float()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
            adam.zero_grad()
            loss.backward()
            adam.step()
    finally:
        handle.remove()
    return value.detach()


def seen_at_last(model, ids, layer):
    """The input [d] and the output [h] of a layer's edited module at the last token."""
    seen = []
    handle = ModelView(model).edited_module(layer).register_forward_hook(lambda *parts: seen.extend(parts[1:]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    (inputs,), output = seen
    return inputs[0, -1], output[0, -1]


@pytest.mark.parametrize("kind", ("gpt2", "llama", "gemma2"))
def test_a_batch_is_the_released_loop_over_its_requests(kind):
    one = editor(kind, eps=0.01)
    result = one.edit(REQUESTS)
    memory = one.memory
    assert isinstance(memory, KeyValueMemory) and memory.entries == 3 and result.steps == (5, 5, 5)
    model, prepared = make_model(kind), one.check(REQUESTS)[0]
    for row, request in enumerate(prepared):
        ids = request.rewriting[0].ids
        key, start = seen_at_last(model, ids, 1)
        assert relative_error(memory.keys[row], key) < 1e-5
        value = serial_value(model, request, ids, request.target, start, 1, 5, 0.05)
        assert relative_error(memory.values[row] - start, value - start) < 2e-3, kind


@pytest.mark.parametrize("init", ("warm", "cold"))
def test_chains_are_one_edit_after_another(init):
    together, apart = editor(eps=0.3, val_init=init), editor(eps=0.3, val_init=init)
    result = together.edit(SHARING)
    losses = [apart.edit([request]).losses[0] for request in SHARING]
    assert (
        torch.equal(together.memory.keys, apart.memory.keys)
        or relative_error(together.memory.keys, apart.memory.keys) < 1e-6
    )
    assert relative_error(together.memory.radii, apart.memory.radii) < 1e-5
    assert relative_error(together.memory.values, apart.memory.values) < 1e-4
    assert result.losses == pytest.approx(losses, abs=1e-4)
    assert together.memory.entries < len(SHARING) and (0, 3) in result.collisions and (3, 4) in result.collisions


def test_rounds_have_each_entry_once():
    entered = [Entered(Entering.INSIDE, entry, True) for entry in (0, 1, 0, 2, 0, 1)]
    assert grace.rounds(entered) == [[0, 1, 3], [2, 5], [4]]


@pytest.mark.parametrize("replacement", ("replace_all", "replace_prompt"))
def test_values_at_several_tokens_are_the_released_loop(replacement):
    one = editor(replacement=replacement, eps=0.01)
    one.edit(REQUESTS[:2])
    model, prepared = make_model("llama"), one.check(REQUESTS[:2])[0]
    for row, request in enumerate(prepared):
        ids = request.rewriting[0].ids
        _, start = seen_at_last(model, ids, 1)
        value = serial_value(model, request, ids, request.target, start, 1, 5, 0.05, replacement)
        assert relative_error(one.memory.values[row] - start, value - start) < 2e-3


def test_relative_units_have_no_scale():
    """A layer whose inputs and outputs are four times as large gets keys, radii and values of that size."""
    plain = editor(units="relative", eps=0.1, lr=0.1)
    plain.edit(REQUESTS)
    model = make_model("llama")
    with torch.no_grad():
        ModelView(model).weight(1).mul_(0.25)
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight.mul_(4.0)
    scaled = editor(model=model, units="relative", eps=0.1, lr=0.1)
    scaled.edit(REQUESTS)
    assert relative_error(scaled.memory.keys, 4 * plain.memory.keys) < 1e-5
    assert relative_error(scaled.memory.radii, 4 * plain.memory.radii) < 1e-5
    assert relative_error(scaled.memory.values, plain.memory.values) < 1e-3


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_undoing_gives_the_bits_of_before_and_the_weights_never_change(dtype):
    one = editor(dtype=dtype, eps=0.3)
    before = {name: tensor.clone() for name, tensor in one.view.model.state_dict().items()}
    digests = []
    for part in ([0, 1], [2, 3], [4, 5]):
        one.edit([SHARING[i] for i in part])
        digests.append(one.memory.digest)
    for count in (2, 1):
        one.rollback()
        assert one.memory.digest == digests[count - 1]
    one.edit([SHARING[2], SHARING[3]])
    assert one.memory.digest == digests[1]  # first values are drawn by the number of the edit
    one.restore()
    with pytest.raises(EditError, match="no memory"):
        _ = one.memory
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.view.model.state_dict().items())


def test_the_second_answer_to_a_prompt_wins_and_is_named(caplog):
    again = [REQUESTS[0], EditRequest("{} plays the", "Miles Davis", "guitar")]
    one = editor(num_steps=40, lr=0.3)
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        one.edit(again)
    assert one.memory.entries == 1 and "1 of 2 edits replace one of the same prompt" in caplog.text
    alone = editor(num_steps=40, lr=0.3)
    alone.edit(again[1:])
    assert relative_error(one.memory.values, alone.memory.values) < 1e-5
    assert one.memory.radii.tolist() == alone.memory.radii.tolist()


def test_a_file_holds_the_memory(tmp_path):
    one = editor()
    one.edit(REQUESTS)
    one.memory.save(tmp_path / "m.safetensors")
    loaded = SideMemory.load(tmp_path / "m.safetensors")
    assert loaded.digest == one.memory.digest and loaded.method == "grace" and len(loaded.requests) == 3


def test_a_request_that_fails_leaves_no_trace(monkeypatch):
    one, other = editor(eps=0.3), editor(eps=0.3)
    real, calls = grace.find_shared_values, []

    def broken(view, tokenizer, prepared, *args, **options):
        values = real(view, tokenizer, prepared, *args, **options)
        bad = [place for place, request in enumerate(prepared) if request.request is REQUESTS[1]]
        values.status[bad] = 4
        calls.append(len(prepared))
        return values

    monkeypatch.setattr(grace, "find_shared_values", broken)
    with pytest.raises(RequestError, match="not finite"):
        one.edit(REQUESTS)
    with pytest.raises(EditError, match="no memory"):
        _ = one.memory
    result = one.edit(REQUESTS, on_error="skip")
    assert list(result.skipped) == [1] and calls == [3, 3, 2] and len(result.losses) == 2
    monkeypatch.undo()
    other.edit([REQUESTS[0], REQUESTS[2]])
    assert one.memory.radii.tolist() == other.memory.radii.tolist() and one.memory.entries == 2
    assert relative_error(one.memory.values, other.memory.values) < 1e-5


def test_a_prompt_of_one_token_has_nothing_before_its_last():
    one = editor(replacement="replace_prompt")
    request = EditRequest("{}", "Sweden", "Spain")
    if len(one.check([request])[0][0].rewriting[0].ids) == 1:
        with pytest.raises(RequestError, match="tokens before the last"):
            one.edit([request])
