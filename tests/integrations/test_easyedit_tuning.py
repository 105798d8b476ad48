"""EasyEdit's WISE, GRACE, FT and DINM: signatures, what they return, and what stays with the model."""

from __future__ import annotations

import inspect

import pytest
import torch
from framework_stand_ins import BESIDE, BaseEditor, asked, hparams_of, same, state
from support import REQUESTS
from tiny_models import make_model, make_tokenizer

from kedit_fast import SideMemory, attach, attached, demo, detach
from kedit_fast.errors import MethodError
from kedit_fast.integrations import easyedit, sessions

DOWN = "model.layers.1.mlp.down_proj"
COPIES = ("copy", "return_orig_weights", "keep_original_weight")
SIGNATURES = {"WISE": ("copy",), "GRACE": COPIES, "FT": COPIES, "DINM": COPIES}


DEMO = demo.requests()[:3]


def of_easyedit(number=0, requests=DEMO):
    """A request as EasyEdit's editors make it: a whole prompt, and for WISE an unrelated text."""
    return {**asked(requests[number], number), "loc_prompt": "The kettle began to whistle in the evening."}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_are_easyedits(name):
    parameters = inspect.signature(easyedit.ALGORITHMS[name]).parameters
    assert tuple(parameters) == ("model", "tok", "requests", "hparams", *SIGNATURES[name], "kwargs")
    assert [parameters[option].default for option in SIGNATURES[name]] == [False] * len(SIGNATURES[name])
    assert "loc_prompt" in (easyedit.ALGORITHMS[name].__doc__ or "loc_prompt")  # None under -OO


def test_an_edited_model_answers_and_is_reset_between_requests(name="GRACE"):
    table, (model, tok) = {}, demo.load()
    before = state(model)
    easyedit.install(table)
    seen = BaseEditor(table, hparams_of(name), model, tok).edit([of_easyedit(0), of_easyedit(1)])
    easyedit.uninstall(table)
    targets = [tok(f" {request.target_new}", add_special_tokens=False)["input_ids"][:2] for request in DEMO[:2]]
    assert [answer[0, -2:].tolist()[: len(target)] for answer, target in zip(seen, targets, strict=True)] == targets
    assert same(state(model), before) and attached(model) is None
    editor = sessions.session_of(model).editor
    assert editor.ledger.count == 0


@pytest.mark.parametrize("name", BESIDE)
def test_calls_go_on_from_each_other_until_they_are_undone(name, tmp_path):
    (model, tok), hparams = demo.load(), hparams_of(name)
    before, ids = state(model), tok(DEMO[0].text, return_tensors="pt")["input_ids"]
    plain = model(ids).logits
    first, undo = easyedit.ALGORITHMS[name](model, tok, [of_easyedit(0)], hparams)
    answer = first(input_ids=ids).logits
    assert not torch.equal(answer, plain) and torch.equal(model(ids).logits, answer)
    assert torch.equal(first({"input_ids": ids}).logits, answer)
    assert torch.equal(first(batch={"input_ids": ids}).logits, answer)
    second, _ = easyedit.ALGORITHMS[name](model, tok, [of_easyedit(1)], hparams)
    assert second.session is first.session and len(second.memory.requests) == 2
    assert second.config is model.config and next(second.parameters()) is next(model.parameters())
    second.save(tmp_path / "new" / "memory.safetensors")
    stored = SideMemory.load(tmp_path / "new" / "memory.safetensors")
    assert stored.digest == second.memory.digest
    second.rollback()
    assert torch.equal(first(ids).logits, answer) and len(first.memory.requests) == 1
    undo()
    assert torch.equal(model(ids).logits, plain) and same(state(model), before)
    with pytest.raises(MethodError, match="no memory to save"):
        first.save(tmp_path / "none.safetensors")
    with attach(model, stored):
        assert not torch.equal(model(ids).logits, plain)


def test_labels_and_a_generation_without_a_cache_route_by_the_prompt_alone(name="GRACE"):
    """EasyEdit's evaluation feeds prompt and answer in one pass, and generates without a cache."""
    model, tok = demo.load()
    edited, _ = easyedit.ALGORITHMS[name](model, tok, [of_easyedit(0)], hparams_of(name))
    prompt = tok(DEMO[0].text)["input_ids"]
    answer = tok(" a kettle and the old tower", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    routed = edited(input_ids=ids, labels=labels).logits[0, len(prompt) - 1]
    assert torch.allclose(routed, edited(input_ids=torch.tensor([prompt])).logits[0, -1], atol=1e-5)
    other = tok("The old kettle in the hall is")["input_ids"]
    longest = max(len(prompt), len(other))
    padded = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in (prompt, other)]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in (prompt, other)]),
    }
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    with_cache = edited.generate(**padded, **options)
    without = edited.generate(**padded, use_cache=False, **options)
    assert torch.equal(with_cache, without)
    assert torch.equal(edited.generate(**padded, num_beams=2, **options),
                       edited.generate(**padded, num_beams=2, use_cache=False, **options))  # fmt: skip


@pytest.mark.parametrize("objective, method", (("prompt_last", "ft-l"), ("target_new", "ft-m")))
def test_ft_is_the_objective_that_its_file_names(objective, method):
    model, tok, hparams = make_model("llama"), make_tokenizer(), hparams_of("FT", objective_optimization=objective)
    before = state(model)
    edited, copies = easyedit.apply_ft_to_model(
        model, tok, [of_easyedit(0, REQUESTS)], hparams, return_orig_weights=True
    )
    assert edited is model and list(copies) == [f"{DOWN}.weight"]
    assert torch.equal(copies[f"{DOWN}.weight"], before[f"{DOWN}.weight"]) and not same(state(model), before)
    assert sessions.session_of(model).editor.recipe.name == method
    bounded = {**vars(hparams), "norm_constraint": 1e-4}
    easyedit.apply_ft_to_model(model, tok, [of_easyedit(0, REQUESTS)], bounded, copy=True)
    with pytest.raises(MethodError, match="objective_optimization = 'x': choose prompt_last"):
        easyedit.apply_ft_to_model(model, tok, [], hparams_of("FT", objective_optimization="x"))


def test_an_integer_bound_is_a_bound():
    """EasyEdit asks whether the type is float, so that 1 means none there."""
    model, tok = demo.load()
    call = sessions.Call("wise", model, tok, [], hparams_of("WISE", norm_constraint=1))
    assert sessions.get_or_create_session(call).editor.hparams.norm_constraint == 1.0


def test_a_copy_is_edited_and_the_model_is_not():
    model, tok = demo.load()
    ids = tok(DEMO[0].text, return_tensors="pt")["input_ids"]
    plain = model(ids).logits
    edited, _ = easyedit.apply_grace_to_model(model, tok, [of_easyedit()], hparams_of("GRACE"), copy=True)
    assert torch.equal(model(ids).logits, plain) and not torch.equal(edited(ids).logits, plain)
    assert sessions.session_of(model) is None


def test_a_memory_that_somebody_detached_starts_anew():
    (model, tok), hparams = demo.load(), hparams_of("GRACE")
    easyedit.apply_grace_to_model(model, tok, [of_easyedit()], hparams)
    detach(model)
    edited, _ = easyedit.apply_grace_to_model(model, tok, [of_easyedit(1)], hparams)
    assert len(edited.memory.requests) == 1


def test_what_cannot_be_done_is_named(tmp_path):
    model, tok = demo.load()
    path = tmp_path / "wise.pt"
    path.write_bytes(b"pickle")
    with pytest.raises(MethodError, match=r"load_path = .*attach\(model, path\)"):
        easyedit.apply_wise_to_model(model, tok, [of_easyedit()], hparams_of("WISE", load_path=str(path)))
    other = hparams_of("GRACE", inner_params=["transformer.h[1].mlp.fc_out.weight"])
    with pytest.raises(MethodError, match=r"inner_params names transformer\.h\.1\.mlp\.fc_out.*file of another model"):
        easyedit.apply_grace_to_model(model, tok, [of_easyedit()], other)
    with pytest.raises(MethodError, match="replay = True is not implemented"):
        easyedit.apply_wise_to_model(model, tok, [of_easyedit()], hparams_of("WISE", replay=True))


def test_unrelated_texts_are_those_of_the_requests_and_a_subject_is_none():
    requests = [
        {"prompt": "Ebro is in", "loc_prompt": "Ebro"},
        {"prompt": "a", "loc_prompt": "one two"},
        {"prompt": "b"},
    ]
    assert sessions.unrelated_texts(requests) == ("one two",) and sessions.unrelated_texts(requests[2:]) is None
