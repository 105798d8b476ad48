from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, make_model, make_tokenizer

from kedit_fast.errors import RequestError
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import fill, fill_span, prepare, target_tokens
from kedit_fast.requests.request import EditRequest


@pytest.mark.parametrize("bos", (False, True))
@pytest.mark.parametrize("prefix", ("", "The old tower. "))
@pytest.mark.parametrize(
    "template, subject",
    (
        ("{} plays the", "Miles Davis"),
        ("The mother tongue of {} is", "Danielle Darrieux"),
        ("Because you saw {}", "Ebro"),
        ("Ebro, and {} too, is", "Ebro"),  # the subject occurs twice: the placeholder counts
    ),
)
def test_the_lookup_token_is_the_subjects_last(bos, prefix, template, subject):
    tokenizer = make_tokenizer(bos)
    prompt = fill(tokenizer, template, subject, prefix)
    upto = tokenizer.decode(prompt.ids[: prompt.lookup + 1], skip_special_tokens=True)
    before = tokenizer.decode(prompt.ids[: prompt.lookup], skip_special_tokens=True)
    text = prefix + template.replace("{}", subject)
    end = len(prefix) + template.index("{}") + len(subject)
    assert len(before) < end <= len(upto) and text.startswith(before)


@pytest.mark.parametrize("offsets", (True, False))
@pytest.mark.parametrize("subject", ("Miles Davis", " Miles Davis "))
def test_a_format_strips_the_subject_and_its_tokens_are_still_its_alone(subject, offsets, monkeypatch):
    tokenizer = make_tokenizer()
    if not offsets:
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    ids, first, last = fill_span(tokenizer, "I say: {}s", subject, "", lambda text: f"Q: {text}")
    whole = fill_span(tokenizer, "I say: {} plays", subject, "", lambda text: f"Q: {text}")
    assert tokenizer.decode(whole[0][whole[1] : whole[2] + 1]).strip() == "Miles Davis"
    assert tokenizer.decode(ids[:first]).strip() == "Q: I say:" and "Davis" in tokenizer.decode(ids[first : last + 1])


@pytest.mark.parametrize("bos", (False, True))
def test_targets_continue_the_prompt_without_special_tokens(bos):
    tokenizer = make_tokenizer(bos)
    for target in ("violin and cello", " violin and cello"):
        ids = target_tokens(tokenizer, "Miles Davis plays the", target)
        assert tokenizer.decode(ids) == " violin and cello"
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_bad_requests_are_named():
    tokenizer = make_tokenizer()
    long = EditRequest("{} " + "is " * 200, "Ebro", "Spain", id="long")
    with pytest.raises(RequestError, match=r"request 'long'.*the model takes 64"):
        prepare(tokenizer, [long], (), 64)
    with pytest.raises(RequestError, match="target_new must be a non-empty text"):
        EditRequest("{} is", "Ebro", " ")
    with pytest.raises(RequestError, match=r"contain \{\} once"):
        EditRequest("{} and {} are", "Ebro", "Spain")


def test_tokens_added_as_special_are_special():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("[/INST]", special=True)])
    with pytest.raises(RequestError, match="special token"):
        target_tokens(tokenizer, "Ebro is", "in<|end|>")
    ids = target_tokens(tokenizer, "[INST] Ebro is[/INST]", "in")
    assert tokenizer.decode(ids) == "in"  # no space behind a special token


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_are_seeded_free_of_special_tokens_and_counted(kind):
    tokenizer, view = make_tokenizer(bos=True), ModelView(make_model(kind))
    first = generate_prefixes(view, tokenizer, ((3, 10), (6, 5)), seed=1)
    assert len(first) == 15 and all(p.endswith(". ") for p in first)
    assert not any(token in p for p in first for token in tokenizer.all_special_tokens)
    assert first == generate_prefixes(view, tokenizer, ((3, 10), (6, 5)), seed=1)
    assert first != generate_prefixes(view, tokenizer, ((3, 10), (6, 5)), seed=2)


@pytest.mark.parametrize("count", (1, 5, 7, 10))
def test_prefixes_of_any_count_grow_from_the_five_published_starts(count):
    found = generate_prefixes(ModelView(make_model("llama")), make_tokenizer(), ((4, count),), seed=3)
    starts = ("The", "Therefore", "Because", "I", "You")
    assert len(found) == count
    for i, prefix in enumerate(found):
        assert prefix.startswith(starts[i % 5])
    greedy = generate_prefixes(ModelView(make_model("llama")), make_tokenizer(), ((4, 20),), seed=3, top_k=1)
    assert len(set(greedy)) == 5  # nothing but the start tells them apart


def test_greedy_prefixes_are_what_the_model_says_without_a_cache():
    """With top_k = 1 a prefix is the argmax continuation (a sliced attention mask would change it)."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    (prefix,) = generate_prefixes(ModelView(model), tokenizer, ((6, 1),), seed=0, top_k=1)
    ids = tokenizer("The")["input_ids"]
    special = torch.tensor(tokenizer.all_special_ids)
    for _ in range(5):  # six tokens with the start
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logits[special] = -torch.inf
        ids.append(int(logits.argmax()))
    text = "The" + tokenizer.decode(ids[len(tokenizer("The")["input_ids"]) :])
    assert prefix == " ".join(text.split()).rstrip(". ") + ". "


def test_greedy_prefixes_are_the_models_own_continuations_of_the_published_starts():
    view, tokenizer = ModelView(make_model("llama")), make_tokenizer()
    prefixes = generate_prefixes(view, tokenizer, ((2, 5), (4, 5)), seed=0, style="greedy")
    assert prefixes == generate_prefixes(view, tokenizer, ((2, 5), (4, 5)), seed=9, style="greedy")
    for start, short, long in zip(("I", "You", "Because", "Yes", "Q:"), prefixes[:5], prefixes[5:], strict=True):
        assert short.startswith(start) and long.startswith(start)
        assert short.endswith(" ") and not short.endswith(". ")
    assert prefixes[:5] != prefixes[5:]
