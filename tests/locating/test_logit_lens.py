"""The logit lens: states after each block, through the model's own norm and head."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_models import make_model
from torch_states import STATES

from kedit_fast import demo
from kedit_fast.errors import EvaluationError, InvalidArgumentError, RequestError, UnsupportedModelError
from kedit_fast.locating.logit_lens import logit_lens
from kedit_fast.locating.prompt_pairs import PromptPair, prompt_pairs
from kedit_fast.models.patching import patches_on
from kedit_fast.models.view import ModelView

KINDS = ("gpt2", "gptj", "gpt_neox", "llama", "phi3", "gemma2")


@dataclass(frozen=True)
class Traced:
    """A prompt with the place of its subject."""

    ids: tuple[int, ...]
    subject: tuple[int, int]
    answer: int | None
    label: str


def tiny_prompts():
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (7, 4, 6)]
    return [Traced(tuple(row), (1, 3), 5 + i, f"prompt {i}") for i, row in enumerate(rows)]


def norm_and_head(model, kind, states):
    """What the model's own code does behind its last block."""
    if kind in ("gpt2", "gptj"):
        return model.lm_head(model.transformer.ln_f(states))
    if kind == "gpt_neox":
        return model.get_output_embeddings()(model.gpt_neox.final_layer_norm(states))
    logits = model.lm_head(model.model.norm(states))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def expected(model, kind, prompts, place):
    """Ranks and probabilities [n, L + 1] by transformers' own hidden states, one prompt at a time."""
    view = ModelView(model)
    ranks, probabilities = [], []
    for prompt in prompts:
        seen = []
        handles = [
            view.block(0).register_forward_pre_hook(
                lambda m, a, k, s=seen: s.append((*a, *k.values())[0]), with_kwargs=True
            )
        ]
        for layer in range(view.num_layers):
            handles.append(
                view.block(layer).register_forward_hook(
                    lambda m, a, o, s=seen: s.append(o[0] if isinstance(o, tuple) else o)
                )
            )
        own = model(torch.tensor([prompt.ids])).logits[0]
        for handle in handles:
            handle.remove()
        at = place(prompt)
        answer = int(own[-1].argmax()) if prompt.answer is None else prompt.answer
        logits = torch.stack([norm_and_head(model, kind, states[0, at]) for states in seen])
        torch.testing.assert_close(logits[-1], own[at])
        p = logits.float().softmax(1) if logits.dtype != torch.float64 else logits.softmax(1)
        ranks.append((p > p[:, answer, None]).sum(1) + 1)
        probabilities.append(p[:, answer])
    return torch.stack(ranks), torch.stack(probabilities)


@pytest.mark.parametrize("position", ["subject", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_probabilities_are_those_of_the_models_own_norm_and_head(kind, position):
    model, prompts = make_model(kind, layers=3), tiny_prompts()
    lens = logit_lens(model, prompts, position)
    place = (lambda p: 2) if position == "subject" else (lambda p: len(p.ids) - 1)
    rank, probability = expected(model, kind, prompts, place)
    assert lens.rank.shape == (3, 4)
    torch.testing.assert_close(lens.probability, probability, rtol=1e-3, atol=1e-7)
    same = (lens.rank == rank).float().mean()
    assert float(same) > 0.9 and int((lens.rank - rank).abs().max()) <= 1  # neighbors in rank may be a rounding apart
    assert lens.places == ((2,) * 3 if position == "subject" else (6, 3, 5))
    assert lens.answers == (5, 6, 7) and lens.labels == ("prompt 0", "prompt 1", "prompt 2")
    assert not patches_on(model)


def test_fp64_models_give_exact_ranks():
    model, prompts = make_model("llama", torch.float64, layers=3), tiny_prompts()
    lens = logit_lens(model, prompts)
    rank, probability = expected(model, "llama", prompts, lambda p: len(p.ids) - 1)
    assert lens.probability.dtype == torch.float64 and torch.equal(lens.rank, rank)
    torch.testing.assert_close(lens.probability, probability)


def test_without_an_answer_the_models_own_is_read():
    model = make_model("gpt2", layers=2)
    prompts = [Traced(p.ids, p.subject, None, p.label) for p in tiny_prompts()]
    for position in ("last", "subject"):
        lens = logit_lens(model, prompts, position)
        for prompt, answer in zip(prompts, lens.answers, strict=True):
            with torch.no_grad():
                assert answer == int(model(torch.tensor([prompt.ids])).logits[0, -1].argmax())
    assert logit_lens(model, prompts, "last").rank[:, -1].tolist() == [1, 1, 1]


def test_pairs_are_read_at_the_end_of_their_clean_prompts(demo_model):
    model, tokenizer = demo_model
    pairs = prompt_pairs(model, tokenizer, demo.requests(12), on_error="skip")
    last, subject = (logit_lens(model, pairs, position) for position in ("last", "subject"))
    assert last.rank[:, -1].tolist() == [1] * len(pairs)
    assert last.places == tuple(len(pair.clean) - 1 for pair in pairs)
    assert subject.places == tuple(pair.subject for pair in pairs)
    assert last.answers == tuple(pair.answer for pair in pairs)


def test_an_answer_that_is_no_argmax_has_the_rank_of_its_logit():
    model = make_model("llama", layers=2)
    with torch.no_grad():
        order = model(torch.tensor([[5, 6, 7]])).logits[0, -1].argsort(descending=True).tolist()
    prompts = [Traced((5, 6, 7), (0, 1), order[place], f"rank {place + 1}") for place in (0, 1, 17, 399)]
    assert logit_lens(model, prompts).rank[:, -1].tolist() == [1, 2, 18, 400]


def test_large_vocabularies_are_read_in_parts(monkeypatch):
    from kedit_fast.locating import logit_lens as module

    model, prompts = make_model("gpt2", torch.float64, layers=2), tiny_prompts()
    whole = logit_lens(model, prompts)
    monkeypatch.setattr(module, "_LOGITS", 400)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 1)
    parts = logit_lens(model, prompts)
    assert torch.equal(whole.rank, parts.rank)
    torch.testing.assert_close(whole.probability, parts.probability)


def test_a_head_that_is_no_matrix_is_run_as_it_is():
    class Doubled(torch.nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    model = make_model("llama", layers=2)
    plain = logit_lens(model, tiny_prompts())
    head = Doubled(32, 400, bias=False)
    head.weight = torch.nn.Parameter(model.lm_head.weight.detach() / 2)
    model.lm_head = head
    view = ModelView(model)
    assert view.head.matrix is None
    torch.testing.assert_close(logit_lens(view, tiny_prompts()).probability, plain.probability)


def test_16_bit_models_are_read():
    model = make_model("llama", torch.bfloat16, layers=2)
    lens, wide = logit_lens(model, tiny_prompts()), logit_lens(model.float(), tiny_prompts())
    torch.testing.assert_close(lens.probability, wide.probability, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("state", ["float64 by default", "meta by default", "autocast bfloat16", "inference mode"])
def test_global_settings_change_nothing(state):
    model, prompts = make_model("gpt2", layers=2), tiny_prompts()
    plain = logit_lens(model, prompts)
    with STATES[state]():
        lens = logit_lens(model, prompts)
    assert torch.equal(lens.probability, plain.probability) and torch.equal(lens.rank, plain.rank)


def test_wrong_arguments_are_named():
    model, prompts = make_model("gpt2", layers=2), tiny_prompts()
    with pytest.raises(InvalidArgumentError, match="position = 'first': choose subject or last"):
        logit_lens(model, prompts, "first")
    with pytest.raises(RequestError, match="no prompts given"):
        logit_lens(model, [])
    with pytest.raises(RequestError, match="Ada: token 400 is past the model's 400 tokens"):
        logit_lens(model, [Traced((1, 2), (0, 1), 400, "Ada")])
    with pytest.raises(RequestError, match="Ada: the subject's last token 2 is none of its 2 tokens"):
        logit_lens(model, [Traced((1, 2), (0, 3), 4, "Ada")])
    with pytest.raises(RequestError, match="Ada: its prompt has 129 tokens, the model takes 128"):
        logit_lens(model, [PromptPair((1,) * 129, (2,) * 129, 4, 5, "Ada")])


def test_output_that_is_not_finite_is_named():
    model, prompts = make_model("gpt2", layers=2), tiny_prompts()
    view = ModelView(model)
    _ = view.head
    with torch.no_grad():
        model.transformer.wpe.weight[5] = float("nan")  # the second prompt has four tokens
    with pytest.raises(EvaluationError, match="prompt 0: the model's output is not finite on its prompt"):
        logit_lens(view, prompts)
    assert logit_lens(view, prompts[1:2]).rank.shape == (1, 3)


def test_a_model_with_something_beside_its_blocks_is_named():
    model = make_model("gpt2", layers=2)
    view = ModelView(model)
    _ = view.head
    handle = model.transformer.ln_f.register_forward_pre_hook(
        lambda m, args: (args[0] + (5.0 if args[0].shape[1] > 1 else 0.0) * torch.arange(32),)
    )
    try:
        with pytest.raises(UnsupportedModelError, match="do not give its own probabilities"):
            logit_lens(view, tiny_prompts())
    finally:
        handle.remove()
