"""What a model answers: equal to passes of one prompt at a time, whichever way the rows run."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import CONFIGS, make_model, make_tokenizer

from kedit_fast.errors import KeditError, RequestError
from kedit_fast.evaluation import engine, generation
from kedit_fast.evaluation.asks import Distributions, Forced, Generated, Likelihood
from kedit_fast.evaluation.engine import answer
from kedit_fast.models.cached import cache_limit
from kedit_fast.models.view import ModelView

PROMPTS = ("The mother tongue of Danielle Darrieux is", "Ebro", "Miles Davis plays the", "Miles Davis plays the piano")
TARGETS = ("French", "English", "trumpet and the piano", "Sweden", "trumpet and the tower")
FORCED = [Forced(prompt, target) for prompt in PROMPTS for target in TARGETS]
SAID = [Generated(prompt, 7) for prompt in PROMPTS]
DRAWN = [Generated(prompt, 7, top_k=5, seed=1) for prompt in PROMPTS]


def _wide(kind: str, monkeypatch) -> torch.nn.Module:
    """A tiny model whose sliding window, if it has one, is longer than the rows."""
    if "sliding_window" in CONFIGS[kind]:
        monkeypatch.setitem(CONFIGS, kind, {**CONFIGS[kind], "sliding_window": 48})
    return make_model(kind)


@pytest.mark.parametrize("kind", ("gpt2", "gpt_neox", "llama", "mistral", "gemma3_text"))
def test_answers_are_those_of_one_prompt_at_a_time(kind, monkeypatch):
    model, tokenizer = _wide(kind, monkeypatch), make_tokenizer(bos=True)
    view = ModelView(model)
    assert cache_limit(view) in (48, 128)
    texts = [Likelihood("Ebro is located in Sweden.", 64), Distributions("Ebro is located", 64, last=True)]
    answers = answer(view, tokenizer, [*FORCED, *FORCED, *SAID, *texts])
    assert len(answers) == len(FORCED) + len(SAID) + 2
    for ask in FORCED:
        ids = tokenizer(f"{ask.prompt} {ask.target}")["input_ids"]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        tokens = answers[ask].tokens
        rows = log_probs[len(ids) - 1 - len(tokens) : len(ids) - 1]
        assert tokens == tuple(ids[-len(tokens) :])
        assert answers[ask].log_probs == pytest.approx(
            rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), abs=1e-4
        )
        assert answers[ask].top == tuple(rows.argmax(1).tolist())
    for ask in SAID:
        ids = list(tokenizer(ask.prompt)["input_ids"])
        new = []
        for _ in range(ask.tokens):
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        assert answers[ask].tokens == tuple(new)
        assert answers[ask].text == tokenizer.decode(new, skip_special_tokens=True)
    likelihood, distribution = (answers[ask] for ask in texts)
    assert len(likelihood.log_probs) == len(tokenizer(texts[0].text)["input_ids"]) - 1
    assert distribution.states.shape == (1, 32)


@pytest.mark.parametrize("kind", ("llama", "mistral"))
def test_rows_in_parts_and_whole_rows_say_the_same(kind, monkeypatch, caplog):
    """A sliding window shorter than the prompts makes whole rows run; said once."""
    model, tokenizer = make_model(kind), make_tokenizer()
    with caplog.at_level(logging.INFO):
        answers = answer(ModelView(model), tokenizer, [*FORCED, *SAID, *DRAWN])
    assert ("its attention reaches 5 tokens" in caplog.text) == (kind == "mistral")
    for module in (engine, generation):
        monkeypatch.setattr(module, "cache_limit", lambda view: 0)
        monkeypatch.setattr(module, "BATCH_TOKENS", 40)  # a few rows at a time
    whole = answer(ModelView(model), tokenizer, [*FORCED, *SAID, *DRAWN])
    for ask in FORCED:
        assert answers[ask].log_probs == pytest.approx(whole[ask].log_probs, abs=1e-4)
    for ask in (*SAID, *DRAWN):
        assert answers[ask] == whole[ask]


def test_draws_depend_on_prompt_and_seed_alone():
    model, tokenizer = make_model("llama"), make_tokenizer()
    view = ModelView(model)
    together = answer(view, tokenizer, DRAWN)
    assert all(answer(view, tokenizer, [ask])[ask] == together[ask] for ask in DRAWN[:2])
    other = Generated(PROMPTS[0], 7, top_k=5, seed=2)
    assert answer(view, tokenizer, [other])[other].tokens != together[DRAWN[0]].tokens


def test_generation_ends():
    model, tokenizer = make_model("llama"), make_tokenizer()
    view, ask = ModelView(model), Generated(PROMPTS[0], 7)
    said = answer(view, tokenizer, [ask])[ask]
    assert len(said.tokens) == 7 and not said.ended
    stop = said.text[3:6]
    stopping, total = (
        Generated(PROMPTS[0], 7, stops=(stop,)),
        Generated(PROMPTS[0], len(said.prompt_tokens) + 2, total=True),
    )
    none = Generated(PROMPTS[0], 1, total=True)
    answers = answer(view, tokenizer, [stopping, total, none])
    assert answers[stopping].ended and answers[stopping].text == said.text[: said.text.index(stop)]
    assert answers[total].tokens == said.tokens[:2] and answers[none].tokens == ()
    model.generation_config.eos_token_id = [said.tokens[3]]
    ended = answer(view, tokenizer, [ask, Generated(PROMPTS[1], 7)])[ask]
    assert ended.ended and ended.tokens == said.tokens[: said.tokens.index(said.tokens[3])]


def test_targets_with_the_special_token_that_the_tokenizer_adds():
    """As published code scores them: BOS where the target's first token is, and so on."""
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    plain, special = Forced(PROMPTS[0], TARGETS[0]), Forced(PROMPTS[0], TARGETS[0], special=True)
    answers = answer(ModelView(model), tokenizer, [plain, special])
    ids = tokenizer(f"{PROMPTS[0]} {TARGETS[0]}")["input_ids"]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    tokens = (tokenizer.bos_token_id, *answers[plain].tokens)
    begin = len(ids) - len(tokens)
    expected = [float(log_probs[begin + i, token]) for i, token in enumerate(tokens)]
    assert answers[special].tokens == tokens
    assert answers[special].log_probs == pytest.approx(expected, abs=1e-4)
    bare = make_tokenizer()
    answers = answer(ModelView(model), bare, [plain, special])
    assert answers[plain] == answers[special]


def test_all_problems_are_named_before_anything_runs(monkeypatch):
    model, tokenizer = make_model("llama"), make_tokenizer()
    view = ModelView(model)
    monkeypatch.setattr(view.base, "forward", None)
    asks = [Forced("", "x"), Forced("Ebro", " "), Generated("Ebro " * 90, 5), Likelihood("E", 64), FORCED[0]]
    with pytest.raises(RequestError) as error:
        answer(view, tokenizer, asks)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for line, part in zip(lines, ("no tokens", "empty target", "the model takes 128", "2 are needed"), strict=True):
        assert part in line


def test_a_broken_model_is_named_by_its_prompt():
    model, tokenizer = make_model("llama"), make_tokenizer()
    view = ModelView(model)
    cache_limit(view)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    for ask in (FORCED[0], SAID[1], Likelihood("Ebro is", 64), Distributions("Ebro is", 64)):
        with pytest.raises(KeditError, match=r"no finite probabilities.*'(The mother|Ebro)"):
            answer(view, tokenizer, [ask])


def test_texts_that_fit_alone_run_in_parts(monkeypatch):
    """Prompts of different lengths, each with all the tokens that the model takes, do not fit one batch."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    view, asks = ModelView(model), [Generated(prompt, 200) for prompt in PROMPTS]
    with monkeypatch.context() as context:
        context.setattr(generation, "_continue_whole", None)
        answers = answer(view, tokenizer, asks)
    monkeypatch.setattr(generation, "cache_limit", lambda view: 0)
    assert answer(view, tokenizer, asks) == answers
