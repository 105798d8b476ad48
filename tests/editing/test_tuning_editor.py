"""Methods that tune a matrix in place, as users call them: against the published loops, and what failures leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from benchmarks import published_tuning as published
from benchmarks.published_tuning import Text
from kedit_fast import Editor
from kedit_fast.editing.tuning import schedules
from kedit_fast.editing.tuning.matrix import TunedMatrix
from kedit_fast.errors import EditError, MethodError, RequestError

REQUESTS = [
    {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"},
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "English very well"},
    {"prompt": "{} is located in", "subject": "Autonomous University of Madrid", "target_new": "Sweden"},
    {"prompt": "I saw the old tower and", "target_new": "walked home", "subject": None},
]
LAYER = 1
NUMBERS = {"num_steps": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def texts(editor: Editor, end: int | None = None) -> list[Text]:
    prepared, _ = editor.check(REQUESTS)
    return [Text(one.rewriting[0].ids, one.target if end is None else (*one.target, end)) for one in prepared]


def change(editor: Editor) -> torch.Tensor:
    (updates,) = editor.edit(REQUESTS).updates.values()
    return updates[0].dense()


@pytest.mark.parametrize(
    ("kind", "method"),
    [("gpt2", "ft-l"), ("gpt2", "ft-m"), ("gpt2", "locft-bf"), ("gemma2", "ft-m"), ("gptj", "locft-bf")],
)
def test_an_edit_is_the_published_loop_on_rows_without_padding(kind, method, tokenizer):
    model = make_model(kind)
    editor = Editor(model, tokenizer, method, layers=[LAYER], hparams={**NUMBERS, "stop_loss": 4.0})
    parameter = editor.view.edited_module(LAYER).weight
    before = editor.view.weight(LAYER).clone()
    more: dict[str, Any]
    if method == "locft-bf":
        groups, more = [texts(editor, tokenizer.eos_token_id)], {"minibatch": 100, "seed": 0}
    else:
        groups, more = [[text] for text in texts(editor)], {"at_last": method == "ft-l"}
    tuned = published.fine_tune(
        model, parameter, groups, epochs=NUMBERS["num_steps"], lr=NUMBERS["lr"], skip=4.0, side=None, **more
    )
    expected = (tuned.weight.T if editor.view.spec.transposed else tuned.weight) - before
    assert float((change(editor) - expected).norm() / expected.norm()) < 1e-3
    editor.rollback()
    assert torch.equal(editor.view.weight(LAYER), before)


def test_calls_follow_each_other_and_are_undone_bit_for_bit(tokenizer):
    model = make_model("llama")
    original = {name: parameter.clone() for name, parameter in model.named_parameters()}
    editor = Editor(model, tokenizer, "locft-bf", layers=[LAYER], hparams=NUMBERS)
    results = [editor.edit(REQUESTS[:2]), editor.edit(REQUESTS[2:])]
    assert [result.batch for result in results] == [1, 2]
    assert all(len(result.losses) == len(result.steps) == 2 for result in results)
    after = editor.view.weight(LAYER).clone()
    editor.rollback()
    again = editor.edit(REQUESTS[2:])
    assert torch.equal(editor.view.weight(LAYER), after) and again.losses == results[1].losses
    patch = editor.patch()
    editor.restore()
    assert all(torch.equal(parameter, original[name]) for name, parameter in model.named_parameters())
    patch.apply_(model)
    torch.testing.assert_close(editor.view.weight(LAYER), after, rtol=0, atol=1e-6)


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest takes for itself."""


@pytest.mark.parametrize("method", ("locft-bf", "ft-m"))
@pytest.mark.parametrize("failure", (Interrupt, RuntimeError))
def test_a_failure_in_any_iteration_changes_nothing(method, failure, tokenizer, monkeypatch):
    model = make_model("llama")
    editor = Editor(model, tokenizer, method, layers=[LAYER], hparams=NUMBERS)
    clean = change(editor)
    editor.restore()
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    random_state, step, calls = torch.get_rng_state(), TunedMatrix.step, []

    def failing(self, *args):
        calls.append(1)
        step(self, *args)
        if len(calls) == 3:
            raise failure

    with monkeypatch.context() as patched:
        patched.setattr(TunedMatrix, "step", failing)
        with pytest.raises(failure):
            editor.edit(REQUESTS)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state) and editor.ledger.count == 0
    assert torch.equal(change(editor), clean)


@pytest.mark.parametrize("method", ("locft-bf", "ft-m"))
def test_a_request_without_a_finite_loss_is_named_or_skipped(method, tokenizer, monkeypatch):
    # GPT-2 has no parts in float32: where a gradient is nearly 0, Adam makes a step of 1e-4 out of such rounding.
    editor, good = (
        Editor(make_model("gpt2", torch.float64), tokenizer, method, layers=[LAYER], hparams=NUMBERS) for _ in range(2)
    )
    expected = good.edit(REQUESTS[:1] + REQUESTS[2:])
    capture = schedules.CapturedRows.capture.__func__

    def poisoned(cls, *args, **kwargs):
        captured = capture(cls, *args, **kwargs)
        captured.x[captured.offsets[1]] = torch.nan  # in the second request
        return captured

    monkeypatch.setattr(schedules.CapturedRows, "capture", classmethod(poisoned))
    with pytest.raises(RequestError, match="Danielle Darrieux"):
        editor.edit(REQUESTS)
    assert editor.ledger.count == 0
    result = editor.edit(REQUESTS, on_error="skip")
    assert list(result.skipped) == [1] and len(result.losses) == 3
    if method == "ft-m":
        (mine,), (other,) = result.updates.values(), expected.updates.values()
        torch.testing.assert_close(mine[0].dense(), other[0].dense(), rtol=0, atol=1e-9)


def test_steps_that_diverge_are_an_error(tokenizer):
    editor = Editor(make_model("llama"), tokenizer, "locft-bf", layers=[LAYER], hparams={**NUMBERS, "lr": 1e38})
    before = editor.view.weight(LAYER).clone()
    with pytest.raises(EditError, match="lr too large"):
        editor.edit(REQUESTS)
    assert torch.equal(editor.view.weight(LAYER), before)


def test_a_box_holds_in_the_weight_that_is_written(tokenizer):
    editor = Editor(make_model("gpt2"), tokenizer, "ft-l", layers=[LAYER], hparams={**NUMBERS, "norm_constraint": 5e-3})
    delta = change(editor)
    assert float(delta.abs().max()) <= 5e-3 * (1 + 1e-4) and float(delta.abs().max()) > 4e-3


def test_a_model_in_bfloat16_gets_the_rounded_end_of_a_run_in_fp32(tokenizer, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", "float32")  # also on processors that could compute in bfloat16
    narrow, wide = make_model("llama", torch.bfloat16), make_model("llama", torch.bfloat16).float()
    changes = [change(Editor(model, tokenizer, "ft-m", layers=[LAYER], hparams=NUMBERS)) for model in (narrow, wide)]
    assert changes[0].dtype == torch.float32
    assert float((changes[0] - changes[1]).norm() / changes[1].norm()) < 1e-3


def test_an_answer_ends_with_the_end_of_text_or_the_tokenizer_is_refused(tokenizer):
    model, other = make_model("llama"), make_tokenizer()
    other.eos_token = None
    with pytest.raises(MethodError, match="names none"):
        Editor(model, other, "locft-bf", layers=[LAYER])


def test_a_target_that_leaves_no_room_for_its_end_is_named(tokenizer):
    editor = Editor(make_model("llama"), tokenizer, "locft-bf", layers=[LAYER], hparams=NUMBERS)

    def request(words: int) -> dict:
        return {"prompt": "{} said", "subject": "Miles", "target_new": "~" * words}

    (short,), _ = editor.check([request(10)])
    words = 10 + 129 - len(short.rewriting[0].ids) - len(short.target)  # one token a word
    assert editor.check([request(words)])[0]
    with pytest.raises(RequestError, match="129 tokens with context and target, the model takes 128"):
        editor.edit([request(words)])
    assert editor.edit([request(words - 1)]).batch == 1
