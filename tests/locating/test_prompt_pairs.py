"""Prompt pairs: as many tokens, the subject alone differs, and the model says the answers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, make_tokenizer
from torch_states import STATES

from kedit_fast import EditRequest, demo
from kedit_fast.errors import InvalidArgumentError, RequestError
from kedit_fast.locating.prompt_pairs import PromptPair, PromptPairList, pairs_from_texts, prompt_pairs
from kedit_fast.models.view import ModelView


def next_token(model, ids):
    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


@pytest.fixture(scope="module")
def pairs(demo_model):
    return prompt_pairs(*demo_model, demo.requests(40), on_error="skip")


def test_pairs_have_as_many_tokens_and_differ_in_the_subject_alone(demo_model, pairs):
    _, tokenizer = demo_model
    requests = demo.requests(40)
    assert isinstance(pairs, PromptPairList) and len(pairs) > 10
    assert sorted([*pairs.places, *pairs.skipped]) == list(range(40))
    subjects = {(r.relation, r.subject) for r in requests}
    for place, pair in zip(pairs.places, pairs, strict=True):
        request = requests[place]
        assert tokenizer.decode(pair.clean, skip_special_tokens=True) == request.text
        before, _, after = request.prompt.partition("{}")
        text = tokenizer.decode(pair.corrupted, skip_special_tokens=True)
        other = text[len(before) : len(text) - len(after)]
        assert text == before + other + after and (request.relation, other) in subjects and other != request.subject
        assert tokenizer.decode(pair.clean[: pair.subject_end + 1]).endswith(request.subject)
        assert tokenizer.decode(pair.corrupted[: pair.subject_end + 1]).endswith(other)


def test_answers_are_what_the_model_says(demo_model, pairs):
    for pair in pairs[:8]:
        assert pair.answer == next_token(demo_model[0], pair.clean) != pair.wrong
        assert pair.wrong == next_token(demo_model[0], pair.corrupted)


def test_true_answers_are_compared_with_the_new_target(demo_model):
    model, tokenizer = demo_model
    requests = demo.requests(8)
    pairs = prompt_pairs(model, tokenizer, requests, answers="true", on_error="skip")
    assert pairs
    for place, pair in zip(pairs.places, pairs, strict=True):
        request = requests[place]
        assert request.target_true.startswith(tokenizer.decode([pair.answer]).strip())
        assert request.target_new.startswith(tokenizer.decode([pair.wrong]).strip())


def test_an_answer_that_the_model_does_not_give_is_named(demo_model):
    with pytest.raises(RequestError, match=r"request 0: the model says ' c' to 'Fogodor is famous for its', not ' gr'"):
        prompt_pairs(*demo_model, demo.requests(2), answers="new")


def test_the_same_seed_gives_the_same_pairs_and_others_other_ones(demo_model):
    requests = demo.requests(60)
    first, again, other = (prompt_pairs(*demo_model, requests, seed=s, on_error="skip") for s in (0, 0, 1))
    assert list(first) == list(again)
    assert list(first) != list(other) and first.places == other.places


def test_a_relation_without_a_fitting_subject_is_named_and_others_help(demo_model):
    model, tokenizer = demo_model
    request = demo.requests(1)[0]
    with pytest.raises(
        RequestError, match=r"request 0: the relation 'export' has no other subject with as many tokens"
    ):
        prompt_pairs(model, tokenizer, [request])
    [pair] = prompt_pairs(model, tokenizer, [request], others={"export": ["Soceton"]})
    assert "Soceton" in tokenizer.decode(pair.corrupted)
    skipped = prompt_pairs(
        model, tokenizer, [request, demo.requests(3)[2]], others={"export": ["Soceton"]}, on_error="skip"
    )
    assert skipped.places == (0,) and list(skipped.skipped) == [1]


def test_a_subject_with_more_tokens_does_not_fit():
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    subjects = ("Miles Davis", "Danielle Darrieux")
    counts = [len(tokenizer(f"{subject} plays the")["input_ids"]) for subject in subjects]
    assert counts[0] != counts[1]
    requests = [EditRequest("{} plays the", subject, "violin", relation="r") for subject in subjects]
    with pytest.raises(RequestError, match="relation 'r' has no other subject with as many tokens as 'Miles Davis'"):
        prompt_pairs(model, tokenizer, requests)


def test_other_subjects_with_the_same_answer_are_named():
    model, tokenizer = make_model("llama"), make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as probable as any other: the first is the answer
    requests = [EditRequest("{} plays the", subject, "violin") for subject in ("Miles Davis", "Miles Darri")]
    with pytest.raises(RequestError, match=r"request 1: .* with every other subject of as many tokens, too \(1 tried"):
        prompt_pairs(model, tokenizer, requests)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (EditRequest("The sun is", None, "red"), "no subject that another could stand for"),
        (EditRequest("{} is famous for its", "Fogodor", "granite", relation="export"), "it has no target_true"),
        (
            EditRequest("{} is famous for its", "Fogodor", "cork", "cork", relation="export"),
            "begin with the same token",
        ),
    ],
)
def test_requests_without_a_pair_are_named(demo_model, request_, message):
    with pytest.raises(RequestError, match=message):
        prompt_pairs(*demo_model, [request_], answers="true", others={"export": ["Soceton"]})


def test_wrong_arguments_are_named(demo_model):
    model, tokenizer = demo_model
    with pytest.raises(InvalidArgumentError, match="answers = 'right': choose model, true, new"):
        prompt_pairs(model, tokenizer, demo.requests(2), answers="right")
    with pytest.raises(RequestError, match="on_error = 'stop'"):
        prompt_pairs(model, tokenizer, demo.requests(2), on_error="stop")
    with pytest.raises(RequestError, match="no requests given"):
        prompt_pairs(model, tokenizer, [])
    with pytest.raises(RequestError, match="must be a list of subjects"):
        prompt_pairs(model, tokenizer, demo.requests(2), others={"export": "Soceton"})


def test_output_that_is_not_finite_is_named(demo_model):
    _, tokenizer = demo_model
    model = demo.load()[0]
    view = ModelView(model)
    _ = view.head
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(" is")["input_ids"][-1]] = float("nan")
    with pytest.raises(RequestError, match=r"request 0: the model's output on its prompt is not finite"):
        prompt_pairs(view, tokenizer, demo.requests(2))


@pytest.mark.parametrize("state", ["bfloat16 by default", "meta by default", "autocast bfloat16", "inference mode"])
def test_global_settings_change_nothing(demo_model, state):
    requests = demo.requests(6)
    expected = prompt_pairs(*demo_model, requests, on_error="skip")
    with STATES[state]():
        assert list(prompt_pairs(*demo_model, requests, on_error="skip")) == list(expected)


def test_a_pair_of_unequal_lengths_is_refused():
    with pytest.raises(RequestError, match=r"Ada: the clean prompt has 2 tokens and the corrupted one 3"):
        PromptPair((1, 2), (1, 2, 3), 4, 5, "Ada")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((), (), 1, 2, "Ada"), "have no tokens"),
        (((1, 2), (1, 2), 3, 4, "Ada"), "are the same"),
        (((1, 2), (1, 3), 4, 4, "Ada"), "both answers are token 4"),
        (((1, -2), (1, 3), 4, 5, "Ada"), "negative"),
        (((1, 2), (1, 3), 4, 5, "Ada", 2), "last token is 2 of 2"),
    ],
)
def test_a_pair_that_is_none_is_refused(fields, message):
    with pytest.raises(RequestError, match=f"Ada: .*{message}"):
        PromptPair(*fields)


def test_where_the_subject_is_not_known_it_ends_where_prompts_differ_last():
    assert PromptPair((1, 2, 3, 4), (1, 5, 6, 4), 7, 8, "Ada").subject_end == 2


def test_pairs_from_texts_have_the_first_tokens_of_answers(demo_model):
    model, tokenizer = demo_model
    clean, corrupted = "Fogodor is famous for its", "Soceton is famous for its"
    [pair] = pairs_from_texts(tokenizer, [clean], [corrupted], ["cork"], ["olives"])
    assert [tokenizer.decode([t]) for t in (pair.answer, pair.wrong)] == [" c", " oliv"]
    assert pair.answer == next_token(model, pair.clean) and pair.wrong == next_token(model, pair.corrupted)
    assert pairs_from_texts(tokenizer, [clean], [corrupted], [pair.answer], [pair.wrong]) == [pair]


def test_texts_of_unequal_length_are_named(demo_model):
    _, tokenizer = demo_model
    with pytest.raises(RequestError, match=r"pair 1: 'The sun is' has \d+ tokens and 'The sun is hot and' \d+"):
        pairs_from_texts(tokenizer, ["The sun is"], ["The sun is hot and"], ["a"], ["b"])
    with pytest.raises(RequestError, match="as many of each are needed; got 1 clean, 2 corrupted, 1 answers, 1 wrongs"):
        pairs_from_texts(tokenizer, ["The sun is"], ["The car is", "A car is"], ["a"], ["b"])
    with pytest.raises(RequestError, match="clean must be a list"):
        pairs_from_texts(tokenizer, "The sun is", ["The car is"], ["a"], ["b"])
