"""Metrics of a model with a memory: routes are decided on prompts, in a batch as alone, and counted."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from kedit_fast import EditRequest
from kedit_fast.evaluation.asks import Distributions, Forced, Generated, RouteOf
from kedit_fast.evaluation.engine import answer
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.evaluation.stored import model_hash
from kedit_fast.memories.attach import attach, attached, detach, matrix_identity
from kedit_fast.memories.memory import ActivationMemory, KeyValueMemory
from kedit_fast.models import cached
from kedit_fast.models.forward import evaluating, last_states, pad
from kedit_fast.models.routes import recorded_routes
from kedit_fast.models.view import ModelView
from kedit_fast.workflow import complete

PATH = "model.layers.1.mlp.down_proj"
PROMPTS = (
    "Miles Davis plays the",
    "Ebro, which is located in",
    "The mother tongue of Danielle Darrieux is",
    "You and I walked",
    "Nobody waited; therefore the old tower",
)
TARGETS = (" trumpet", " Spain and Sweden", " French. Marcel Maupoint speaks English very well", " piano")


def distances(model, memory, rows):
    """Activation distances [R] of rows of token ids."""
    with attach(model, memory), torch.no_grad():
        found = []
        original = ActivationMemory.distances
        try:
            ActivationMemory.distances = lambda self, *args: found.append(original(self, *args)) or found[-1]
            for row in rows:
                model(torch.tensor([row]))
        finally:
            ActivationMemory.distances = original
    return torch.cat([one[0] for one in found])


@pytest.fixture(scope="module")
def case():
    """A model, and a memory that answers for some prompts, and would for others if their targets counted."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    weight = model.get_submodule(PATH).weight.detach()
    changed = weight + 2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    memory = ActivationMemory(
        weights=changed[None], thresholds=torch.tensor([0.0]), activation="silu", **matrix_identity(model, PATH)
    )
    of_prompts = distances(model, memory, [tokenizer(p)["input_ids"] for p in PROMPTS])
    of_rows = distances(model, memory, [tokenizer(p + t)["input_ids"] for p in PROMPTS for t in TARGETS])
    of_rows = of_rows.view(len(PROMPTS), -1)
    threshold = float(of_prompts.sort().values[2:4].mean())
    flipped = (of_rows >= threshold) != (of_prompts >= threshold)[:, None]
    assert flipped.any(), "the test would see nothing"
    return (
        model,
        tokenizer,
        ActivationMemory(**{**vars(memory), "thresholds": torch.tensor([threshold])}),
        (of_prompts >= threshold),
    )


def alone(model, tokenizer, prompt, target):
    """log probabilities of a target, fed behind the keys and values of its prompt."""
    ids = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(prompt + target)["input_ids"][len(ids) :]
    with torch.no_grad():
        first = model(torch.tensor([ids]), use_cache=True)
        logits = [first.logits[0, -1:]]
        if tokens[1:]:
            logits.append(model(torch.tensor([tokens[:-1]]), past_key_values=first.past_key_values).logits[0])
    return torch.cat(logits).log_softmax(-1)[range(len(tokens)), tokens]


@pytest.mark.parametrize("parts", [True, False])
def test_targets_decide_nothing_and_batches_are_as_one_at_a_time(case, parts, monkeypatch):
    model, tokenizer, memory, taken = case
    if not parts:
        monkeypatch.setattr(cached, "_tried", lambda view: (0, 0))
    asks = [Forced(p, t) for p in PROMPTS for t in (TARGETS if parts else TARGETS[1:3])]
    with attach(model, memory):
        view = ModelView(model)
        answers = answer(view, tokenizer, asks)
        assert bool(cached.cache_limit(view)) == parts
        for ask in asks:
            expected = alone(model, tokenizer, ask.prompt, ask.target)
            assert answers[ask].log_probs == pytest.approx(expected.tolist(), abs=2e-4), ask
        one = {ask: answer(view, tokenizer, [ask])[ask] for ask in asks[:5]}
        assert all(one[ask].log_probs == pytest.approx(answers[ask].log_probs, abs=2e-4) for ask in one)
    plain = answer(ModelView(model), tokenizer, asks)
    for place, prompt in enumerate(PROMPTS):
        same = [answers[a].log_probs == pytest.approx(plain[a].log_probs, abs=1e-5) for a in asks if a.prompt == prompt]
        assert all(same) if not taken[place] else not any(same)


@pytest.mark.parametrize("parts", [True, False])
def test_texts_are_those_of_generate_for_each_prompt_alone(case, parts, monkeypatch):
    model, tokenizer, memory, _ = case
    if not parts:
        monkeypatch.setattr(cached, "_tried", lambda view: (0, 0))
    with attach(model, memory):
        answers = answer(ModelView(model), tokenizer, [Generated(prompt, 9) for prompt in PROMPTS])
        for ask, said in answers.items():
            ids = tokenizer(ask.prompt, return_tensors="pt")["input_ids"]
            made = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
            assert list(said.tokens) == [token for token in made if token != 1]
        text = complete(model, tokenizer, PROMPTS[2], 4)
        said = answer(ModelView(model), tokenizer, [Generated(PROMPTS[2], 4)])
        (one,) = said.values()
        assert text == tokenizer.decode(one.tokens, skip_special_tokens=True).strip().split(".")[0].strip()


def test_distributions_at_answers_are_routed_by_their_prompt(case):
    model, tokenizer, memory, _ = case
    ask = Distributions(PROMPTS[3], 0, answer=TARGETS[2].strip())
    with attach(model, memory):
        (read,) = answer(ModelView(model), tokenizer, [ask]).values()
        logits = read.head.logits(read.states).log_softmax(-1)
        tokens = tokenizer(PROMPTS[3] + TARGETS[2])["input_ids"][-len(logits) :]
        expected = alone(model, tokenizer, PROMPTS[3], TARGETS[2])
    assert logits[range(len(tokens)), tokens].tolist() == pytest.approx(expected.tolist(), abs=2e-4)


def test_values_of_keys_stand_where_they_do_alone():
    """GRACE's values replace the output at the prompt's last token: shared keys and values hold it."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    view = ModelView(model)
    seen = []
    handle = model.get_submodule(PATH).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(torch.tensor([tokenizer(PROMPTS[0])["input_ids"]]))
    handle.remove()
    keys, values = seen[0][0][0, -1:], seen[0][1][0, -1:] * 3 + 1
    memory = KeyValueMemory(keys=keys, values=values, radii=torch.tensor([0.1]), **matrix_identity(model, PATH))
    asks = [Forced(p, t) for p in PROMPTS[:3] for t in TARGETS]
    with attach(model, memory):
        answers = answer(view, tokenizer, asks)
        for ask in asks:
            expected = alone(model, tokenizer, ask.prompt, ask.target).tolist()
            assert answers[ask].log_probs == pytest.approx(expected, abs=2e-4)
    plain = answer(view, tokenizer, asks)
    assert [answers[a].log_probs == pytest.approx(plain[a].log_probs, abs=1e-5) for a in asks] == [False] * 4 + [
        True
    ] * 8


def test_routes_are_counted_where_a_memory_is_attached(case):
    model, tokenizer, memory, taken = case
    view = ModelView(model)
    requests = [
        EditRequest("{} plays the", "Miles Davis", "piano", "trumpet", PROMPTS[1:3], PROMPTS[3:]),
        EditRequest("{}, which is located in", "Ebro", "Sweden", "Spain"),
    ]
    evaluator = Evaluator(model, tokenizer, requests, "memory,cf.accuracy", texts=PROMPTS[:4])
    evaluator.measure("pre")
    result = evaluator.result()
    assert result.value("memory.missed_route/rewrite", "pre") is None
    assert "a memory that is attached" in result.metrics["memory.false_route/text"].reason
    with attach(model, memory):
        evaluator.measure("final")
    assert attached(model) is None
    result = evaluator.result()

    def share(flags):
        return pytest.approx(100 * float(flags.float().mean()))

    assert result.value("memory.missed_route/rewrite") == share(~taken[:2])
    assert result.value("memory.missed_route/paraphrase") == share(~taken[1:3])
    assert result.value("memory.false_route/neighborhood") == share(taken[3:])
    assert result.value("memory.false_route/text") == share(taken[:4])
    assert not result.metrics["memory.false_route/text"].reason
    (route,) = answer(view, tokenizer, [RouteOf(PROMPTS[0])]).values()
    assert route.route is None
    before = model_hash(view)
    with attach(model, memory):
        assert model_hash(view) != before  # answers on disk are of the model with this memory
    assert model_hash(view) == before


def test_what_a_view_tries_once_is_without_the_memory(case):
    model, _, memory, _ = case
    with attach(model, memory):
        view = ModelView(model)
        with recorded_routes(model) as routes, evaluating(view), torch.no_grad():
            assert view.head and cached.cache_limit(view) and not routes
            last_states(view, pad([[5, 6, 7]], view.device))
        assert len(routes) == 1
    assert detach(model) is None
