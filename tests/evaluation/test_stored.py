"""A run that was killed goes on where it was, and takes no answer of another model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from kedit_fast import EditRequest
from kedit_fast.errors import KeditError
from kedit_fast.evaluation import evaluator as module
from kedit_fast.evaluation.evaluator import evaluate
from kedit_fast.evaluation.stored import FILE

REQUEST = EditRequest(
    "{} plays the", "Miles Davis", "violin", "trumpet", ("Ebro is",), ("Danielle Darrieux plays the",)
)
METRICS = "cf.success,wild.f1/rewrite,loc.kl/neighborhood,text.nll"


def measured(model, folder, monkeypatch=None, fail_after=None):
    """An evaluation, and how many asks the model answered."""
    answered = []

    def counting(view, tokenizer, rows, progress, store):
        if store is None:
            return original(view, tokenizer, rows, progress, store)
        add = store.add

        def add_and_count(answers, rows):
            if fail_after is not None and len(answered) >= fail_after:
                raise KeyboardInterrupt
            add(answers, rows)
            answered.extend(answers)

        store.add = add_and_count
        return original(view, tokenizer, rows, progress, store)

    original = module.answer_rows
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "answer_rows", counting)
        base = make_model("llama")
        result = None
        try:
            result = evaluate(
                model, make_tokenizer(), [REQUEST], METRICS, base=base, texts=("Miles Davis plays the",), folder=folder
            )
        except KeyboardInterrupt:
            assert fail_after is not None
    return result, len(answered)


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
    expected, _ = measured(model, None)
    folder = tmp_path / "answers"
    _, first = measured(model, folder, fail_after=3)
    with (folder / FILE).open("a") as file:
        file.write('["a line that was being written')
    result, rest = measured(model, folder)
    assert result.as_dict(records=True) == expected.as_dict(records=True)
    assert first >= 3 and rest > 0
    _, again = measured(model, folder)
    assert again == 0
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] += 1
    _, others = measured(model, folder)
    assert 0 < others < first + rest  # the base's answers are there, the other model's are not
    model.generation_config.eos_token_id = 3
    _, ended = measured(model, folder)
    assert 0 < ended < others  # texts alone: they end elsewhere
    model.config.rms_norm_eps *= 2
    _, configured = measured(model, folder)
    assert configured == others  # the same weights in another model


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / FILE).write_text("{\n")
    with pytest.raises(KeditError, match=r"answers.jsonl is damaged, delete it"):
        measured(make_model("llama"), tmp_path)
