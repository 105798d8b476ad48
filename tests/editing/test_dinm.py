"""DINM: the located layer, its loss with general prompts, and edits in several layers of one call. Invented texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import make_model, make_tokenizer
from toy_rows import GOLDEN, toy_rows

from kedit_fast import EditRequest
from kedit_fast.editing.tuning.captured import TuningRow
from kedit_fast.editing.tuning.general_kl import GeneralKL
from kedit_fast.editing.tuning.locating import answer_distances, located, state_distance
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.editing.tuning.objective import Likelihood, Objective
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
