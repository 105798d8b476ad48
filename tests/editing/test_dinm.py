"""DINM: the located layer, its loss with general prompts, and edits in several layers of one call. Invented texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import make_model, make_tokenizer
from toy_rows import GOLDEN, toy_rows

from kedit_fast import Editor, EditRequest
from kedit_fast.editing.tuning.captured import TuningRow
from kedit_fast.editing.tuning.general_kl import GeneralKL
from kedit_fast.editing.tuning.locating import answer_distances, located, state_distance
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.errors import RequestError
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.models.forward import evaluating
from kedit_fast.models.view import ModelView
from kedit_fast.requests.chat import chat_format, with_suffix
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.prompts import prepare, prepare_each

ANSWERS = [
    ("You and I walked home.", "Nobody waited in the old tower; therefore you walked."),
    ("The piano.", "trumpet"),
    ("Ebro, which is located in Sweden.", "I saw the old tower."),
]


def golden_rows():
    edit, general = GOLDEN["dinm.ids.edit"].tolist(), GOLDEN["dinm.ids.general"].tolist()
    return [
        TuningRow(tuple(edit[:-1]), 0, len(edit) - 3, tuple(edit[-3:])),
        TuningRow(tuple(general), 0, len(general) - 3, role="general", compared=3),
    ]


@pytest.mark.parametrize(("tag", "gradient", "factor"), [("fixed", True, 0.1), ("published", False, 0.1),
                                                         ("published_c1", False, 1.0)])  # fmt: skip
def test_the_descent_is_the_golden_one(tag, gradient, factor):
    captured = toy_rows(golden_rows())
    terms = {"likelihood": Likelihood(captured), "kl": GeneralKL(captured, gradient=gradient)}
    objective = Objective(captured, terms, {"likelihood": factor})
    matrix = TunedMatrix.of(GOLDEN["toy.W0"], Steps("adam", 0.02))
    losses = []
    for _ in range(10):
        found, left = objective.gradient(matrix.outputs(captured.x))
        losses.append([float(found.terms["likelihood"]), float(found.terms["kl"]), float(found.total)])
        matrix.step(left, captured.x)
    assert torch.allclose(torch.tensor(losses, dtype=torch.float64), GOLDEN[f"dinm.{tag}.losses"], atol=1e-10, rtol=0)
    assert torch.allclose(matrix.weight, GOLDEN[f"dinm.{tag}.W"], atol=1e-9, rtol=0)


def test_general_kl_is_of_each_request_and_of_what_the_matrix_says_before_it():
    rows = golden_rows()
    others = [TuningRow(r.ids[1:], 1, r.prompt - 1, r.target, r.role, compared=r.compared) for r in rows]
    two = [*rows, *others]
    captured = toy_rows(two)
    changed = GOLDEN["toy.W0"] * 1.1
    before, after = captured.x @ changed.T, captured.x @ (GOLDEN["toy.W0"] * 1.3).T
    term = GeneralKL(captured, before)
    losses = term.losses(after, captured.hidden(after, term.places))
    for i in (0, 1):
        alone = captured.of_requests([i])
        term = GeneralKL(alone, alone.x @ changed.T)
        outputs = alone.x @ (GOLDEN["toy.W0"] * 1.3).T
        assert float(term.losses(outputs, alone.hidden(outputs, term.places))[0]) == pytest.approx(float(losses[i]))
    assert float(losses.min()) > 0


def test_location_is_the_golden_one():
    states = GOLDEN["dinm.states"]
    count = torch.tensor([states.shape[2]])
    distances = torch.stack([state_distance(states[layer], count) for layer in range(1, 7)], 1)
    assert located(distances, range(6)) == [int(GOLDEN["dinm.layer"])]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_distances_are_those_of_the_models_hidden_states(kind):
    model, tokenizer = make_model(kind), make_tokenizer(bos=True)
    view = ModelView(model)
    with evaluating(view):
        valid, padded = (answer_distances(view, tokenizer, ANSWERS, tokens) for tokens in ("valid", "padded"))
    for i, pair in enumerate(ANSWERS):
        batch = tokenizer(list(pair), return_tensors="pt", padding=True)
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[1:]
        count = int(batch["attention_mask"].sum(1).min())
        for layer, one in enumerate(states):
            if kind != "gemma2":  # behind its window padding attends to nothing
                assert float(torch.dist(one[0], one[1])) == pytest.approx(float(padded[i, layer]), rel=1e-4)
            assert float(torch.dist(one[0, :count], one[1, :count])) == pytest.approx(float(valid[i, layer]), rel=1e-4)
    assert not torch.equal(valid, padded)
    assert located(valid, [2, 1]) == [1 + int(row[2] > row[1]) for row in valid]


def test_distances_do_not_depend_on_the_batch(monkeypatch):
    from kedit_fast.editing.tuning import locating

    view, tokenizer = ModelView(make_model("llama")), make_tokenizer()
    with evaluating(view):
        together = answer_distances(view, tokenizer, ANSWERS)
        monkeypatch.setattr(locating, "BATCH_TOKENS", 20)
        assert torch.allclose(answer_distances(view, tokenizer, ANSWERS), together, rtol=1e-5)


def test_a_suffix_stands_after_prompts_and_general_prompts():
    tokenizer = make_tokenizer(bos=True)
    request = EditRequest(
        "Because I saw the old tower", None, "You and I walked home.", "Nobody waited.",
        probes=(Probe("locality", (Question("Miles Davis plays the", (("trumpet", "piano"),)),)),),
    )  # fmt: skip
    suffix = "If so, say who:"
    (one,) = prepare(tokenizer, [request], (), 128, with_suffix(None, suffix))
    assert tokenizer.decode(one.rewriting[0].ids) == f"<s>{request.prompt} {suffix}"
    prepared, problems = prepare_each(
        tokenizer, {0: request, 1: EditRequest("{} is", "Ebro", "in Spain"), 2: replace(request, target_true=None)},
        (), 128, with_suffix(None, suffix), general=True, contrasted=True,
    )  # fmt: skip
    ((ids, answer),) = prepared[0].general
    assert tokenizer.decode(ids) == f"<s>Miles Davis plays the {suffix}" and tokenizer.decode(answer) == " trumpet"
    assert "no target_true" in problems[1] and "no target_true" in problems[2]
    _, problems = prepare_each(tokenizer, {0: EditRequest("{} is", "Ebro", "in Spain", "in")}, (), 128, general=True)
    assert "it has no general prompt" in problems[0]
    long = replace(request, probes=(Probe("locality", (Question("Ebro " * 200, (("in",),)),)),))
    _, problems = prepare_each(tokenizer, {0: long}, (), 128, general=True)
    assert "tokens with its answer, the model takes 128" in problems[0]


def test_a_suffix_stands_in_the_users_message_of_a_chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %} answer:"
    made = with_suffix(chat_format(tokenizer), "Say who:")
    assert made is not None and made("Who walked home?") == "[user] Who walked home? Say who: [end] answer:"
    assert with_suffix(None, "") is None


def request(place: int, **changes) -> EditRequest:
    safe, unsafe = ANSWERS[place]
    prompt = ("Because I saw the old tower,", "Miles Davis plays", "Where is Ebro?")[place]
    general = (Question("The mother tongue of Danielle Darrieux is", (("French",),)), Question("Ebro is", (("in",),)))
    fields = dict(target_true=unsafe, probes=(Probe("locality", general[: 1 + place % 2]),), id=place)
    return EditRequest(prompt, None, safe, **{**fields, **changes})


NUMBERS = dict(num_steps=4, lr=1e-2, edit_factor=0.2, suffix_system_prompt="Answer:")


def editor_of(model, **hparams) -> Editor:
    layers = hparams.pop("layers", (0, 1, 2, 3))
    return Editor(model, make_tokenizer(bos=True), "dinm", layers=layers, hparams={**NUMBERS, **hparams})


def literal(model, layers, requests, gradient=True, bound=0.0):
    """The released loop on single rows without padding, with a KL that has a gradient; edits stay in the model."""
    tokenizer, suffix = make_tokenizer(bos=True), NUMBERS["suffix_system_prompt"]
    originals = {layer: weight_of(model, layer).detach().clone() for layer in layers}
    for layer, one in zip(layers, requests, strict=True):
        weight = weight_of(model, layer)
        weight.requires_grad_(True)
        optimizer = torch.optim.Adam([weight], lr=NUMBERS["lr"])
        rows = []
        for question in one.probes[0].questions:
            ids = tokenizer(f"{question.prompt} {suffix} {question.answers[0][0]}")["input_ids"]
            prompt = tokenizer(f"{question.prompt} {suffix}")["input_ids"]
            with torch.no_grad():
                rows.append((ids, len(prompt) - 1, model(torch.tensor([ids])).logits[0].log_softmax(-1)))
        prompt = tokenizer(f"{one.prompt} {suffix}")["input_ids"]
        edit = tokenizer(f"{one.prompt} {suffix} {one.target_new}")["input_ids"]
        for _ in range(NUMBERS["num_steps"]):
            logits = model(torch.tensor([edit])).logits[0].log_softmax(-1)
            nll = -logits[range(len(prompt) - 1, len(edit) - 1), edit[len(prompt) :]].mean()
            kls = []
            for ids, begin, before in rows:
                now = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                kls.append((before.exp() * (before - now)).sum(-1)[begin:])
            kl = torch.cat(kls).mean()
            loss = NUMBERS["edit_factor"] * nll + (kl if gradient else kl.detach())
            if loss.item() < 1e-4:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if bound:
                with torch.no_grad():
                    weight.clamp_(originals[layer] - bound, originals[layer] + bound)
        weight.requires_grad_(False)
    return {layer: weight_of(model, layer).detach() - originals[layer] for layer in set(layers)}


def weight_of(model, layer):
    return ModelView(model).edited_module(layer).weight


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.detach() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("kind", "options"), [
    ("llama", {}), ("gpt2", {"gradient": False}), ("gemma2", {"bound": 2e-2}),
])  # fmt: skip
def test_requests_of_one_call_are_written_in_several_layers(kind, options, monkeypatch):
    from kedit_fast.editing.tuning import dinm

    layers, requests = [2, 1, 1, 2], [request(0), request(1), request(2), request(0, id=3)]
    monkeypatch.setattr(dinm, "located", lambda distances, allowed: layers)
    dtype = torch.float64 if kind == "gpt2" else torch.float32
    model, copy = make_model(kind, dtype), make_model(kind, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = editor_of(model, kl_gradient=options.get("gradient", True), norm_constraint=options.get("bound", 0.0))
    result = editor.edit(requests)
    expected = literal(copy, layers, requests, **options)
    for layer, delta in expected.items():
        change = weight_of(model, layer) - before[f"{editor.view.module_name(layer)}.weight"]
        assert error(change, delta) < (1e-12 if kind == "gpt2" else 1e-4)
    assert sorted(result.updates) == sorted(f"{editor.view.module_name(layer)}.weight" for layer in (1, 2))
    assert all(len(updates) == 1 for updates in result.updates.values())  # one entry of each matrix
    assert result.steps == (4,) * 4 and editor.ledger.count == 1
    editor.rollback()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_are_located_by_each_request():
    model = make_model("llama")
    editor = editor_of(model)
    with evaluating(editor.view):
        pairs = [(one.target_new, one.target_true) for one in map(request, range(3))]
        layers = located(answer_distances(editor.view, editor.tokenizer, pairs), range(4))
    result = editor.edit([request(i) for i in range(3)])
    assert sorted(result.updates) == sorted({f"{editor.view.module_name(layer)}.weight" for layer in layers})
    editor.restore()
    (name,) = editor_of(model, layers=(1,)).edit([request(0, target_true=None)]).updates  # nothing to locate
    assert "layers.1." in name


def test_a_request_that_lacks_something_is_named_and_may_be_skipped():
    editor = editor_of(make_model("llama"))
    bad = [request(0, target_true=None), request(1, probes=(), id="bare"), request(2)]
    with pytest.raises(RequestError, match=r"request 0: .*target_true[\s\S]*request 'bare': .*general prompt"):
        editor.edit(bad)
    result = editor.edit(bad, on_error="skip")
    assert sorted(result.skipped) == [0, 1] and [one.id for one in result.requests] == [2]


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    from kedit_fast.editing.tuning import dinm

    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = editor_of(model)
    monkeypatch.setattr(dinm, "located", lambda distances, allowed: [1, 2, 1])
    calls, original = [], dinm.descend

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(dinm, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit([request(i) for i in range(3)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert editor.ledger.count == 0
    editor.require_untouched()


def test_a_call_in_bfloat16_keeps_small_steps():
    model = make_model("llama", torch.bfloat16)
    editor = editor_of(model, lr=1e-4, layers=(1,))
    result = editor.edit([request(0), request(1)])
    (update,) = next(iter(result.updates.values()))
    assert 0 < float(update.dense().abs().max()) < 9e-4  # at most eight steps of 1e-4


def test_the_kl_with_a_gradient_holds_what_the_model_says():
    said = {}
    for gradient in (True, False):
        model = make_model("llama")
        editor = editor_of(model, kl_gradient=gradient, num_steps=20, layers=(1,))
        measured = Evaluator(model, editor.tokenizer, [request(0)], "safe.kl", prompt_format=editor.prompt_format)
        measured.measure("pre")
        editor.edit([request(0)])
        measured.measure("final")
        said[gradient] = measured.result().value("safe.kl")
    assert said[True] < 0.5 * said[False]
