"""Edge scores against published ones, and against their definition in float64 for each family of models."""

from __future__ import annotations

from types import SimpleNamespace

import golden_circuits
import pytest
import torch
from dense_edges import WHOLE, dense_scores
from golden_circuits import GOLDEN_KINDS
from tiny_models import KINDS, make_model
from torch_states import STATES

from kedit_fast.errors import EvaluationError, InvalidArgumentError, RequestError, UnsupportedModelError
from kedit_fast.locating.circuits import edge_scores
from kedit_fast.locating.graph import graph_of
from kedit_fast.models.patching import patches_on
from kedit_fast.models.view import ModelView

FP32_INSIDE = ("gptj", *WHOLE)  # their attention is computed in fp32 also in float64 models


def pair_of(clean, corrupted, answer=3, wrong=5, label="a pair"):
    return SimpleNamespace(clean=clean, corrupted=corrupted, answer=answer, wrong=wrong, label=label)


PAIRS = [
    pair_of([7, 20, 33, 46, 59, 72], [7, 20, 44, 48, 59, 72], 9, 17, "long"),
    pair_of([7, 21, 35, 90], [7, 22, 35, 90], 30, 4, "short"),
    pair_of([8, 120, 33, 46, 59, 71], [9, 120, 33, 46, 59, 71], 11, 12, "other beginning"),
]


@pytest.fixture(scope="module", params=GOLDEN_KINDS)
def golden(request):
    tensors, about = golden_circuits.golden()
    pairs = [pair_of(**row) for batch in golden_circuits.golden_rows() for row in batch]
    model = golden_circuits.golden_model(request.param)
    return SimpleNamespace(name=request.param, model=model, pairs=pairs, about=about, tensors=tensors)


def test_the_graph_is_the_published_one(golden):
    graph = graph_of(ModelView(golden.model))
    assert list(graph.sources) == golden.about[f"{golden.name}.nodes_forward"]
    assert list(graph.targets) == golden.about[f"{golden.name}.nodes_backward"]
    assert torch.equal(graph.mask, golden.tensors[f"{golden.name}.real_edge_mask"])
    assert graph.edge_count == golden.about[f"{golden.name}.edges"]


@pytest.mark.parametrize("max_tokens", (1024, 20))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eap", dict(scoring="eap", scale="published", batch_size=3)),
        ("eap_batches_of_one", dict(scoring="eap")),
        ("eap_ig_inputs_5", dict(scoring="eap-ig", steps=5, scale="published", batch_size=3)),
        ("eap_ig_inputs_5_knowledge_circuits", dict(scoring="eap-ig-right", steps=5, scale="published", batch_size=3)),
    ],
)
def test_scores_are_the_published_ones(golden, name, options, max_tokens):
    result = edge_scores(golden.model, golden.pairs, max_tokens=max_tokens, **options)
    expected = golden.tensors[f"{golden.name}.scores.{name}"]
    assert float(expected.abs().max()) > 0.3
    torch.testing.assert_close(result.scores, expected, rtol=0, atol=1e-5)
    for value, rows in ((result.clean, "baseline"), (result.corrupted, "corrupted")):
        assert value == pytest.approx(sum(golden.about[f"{golden.name}.{rows}"]) / 4, abs=1e-5)


def _difference(pair, probabilities=False):
    def loss(logits, clean):
        values = logits.softmax(-1) if probabilities else logits
        return values[pair.wrong] - values[pair.answer]

    return loss


def _kl(logits, clean):
    return torch.nn.functional.kl_div(logits.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="sum")


def _plain_rms(self, states):
    eps = getattr(self, "variance_epsilon", None) or self.eps
    return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_each_family_are_those_of_the_definition(kind, monkeypatch):
    model = make_model(kind, torch.float64, layers=2)
    if kind not in FP32_INSIDE:  # all in float64: transformers' RMS norm and softmax are in fp32
        model.set_attn_implementation("sdpa")
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                monkeypatch.setattr(type(module), "forward", _plain_rms)
    cases = [
        (dict(scoring="eap"), [1.0], _difference),
        (dict(scoring="eap-ig", steps=3, metric="kl"), [0, 1 / 3, 2 / 3], lambda pair: _kl),
        (dict(scoring="clean-corrupted", metric="probability-difference"), [0.0, 1.0], lambda p: _difference(p, True)),
    ]
    graph = graph_of(ModelView(model))
    assert graph.attention_whole == (kind in WHOLE) and graph.parallel == (kind in ("gptj", "gpt_neox"))
    for options, points, loss in cases:
        each = torch.stack([dense_scores(model, kind, pair, points, loss(pair)) for pair in PAIRS])
        expected = each.mean(0) * graph.mask
        size = float(expected.abs().max())
        assert size > 1e-4
        bound = (3e-6 if kind in FP32_INSIDE else 1e-9) * size
        for tokens in (1024, 9):
            result = edge_scores(model, PAIRS, max_tokens=tokens, **options)
            assert result.scores.dtype == torch.float64
            assert float((result.scores - expected).abs().max()) < bound, (kind, options, tokens)


@pytest.mark.parametrize("kind", ("gpt2", "llama"))
def test_16_bit_models_sum_in_fp32(kind):
    model = make_model(kind, torch.bfloat16, layers=2)
    expected = edge_scores(make_model(kind, torch.bfloat16, layers=2).float(), PAIRS, steps=3).scores
    result = edge_scores(model, PAIRS, steps=3)
    assert result.scores.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float((result.scores - expected).abs().max()) < 0.15 * float(expected.abs().max())


def test_the_model_is_left_as_it_was():
    model = make_model("llama", layers=2).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    edge_scores(model, PAIRS, steps=2)
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not patches_on(model) and all(p.grad is None for p in model.parameters())
    assert model.model.layers[0].self_attn.num_key_value_groups == 2


@pytest.mark.parametrize("when", ("forward", "backward"))
def test_an_interrupt_leaves_nothing_in_the_model(when, monkeypatch):
    model = make_model("llama", layers=2).train()
    flags = [p.requires_grad for p in model.parameters()]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    place = "losses" if when == "forward" else "edge_contraction"
    monkeypatch.setattr(f"kedit_fast.locating.circuits.{place}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edge_scores(model, PAIRS, steps=2)
    assert model.training and not patches_on(model) and flags == [p.requires_grad for p in model.parameters()]
    assert model.model.layers[0].self_attn.num_key_value_groups == 2


@pytest.mark.parametrize("state", STATES)
def test_settings_of_the_process_change_nothing(state):
    model = make_model("gpt2", layers=2)
    expected = edge_scores(model, PAIRS, steps=2).scores
    with STATES[state]():
        result = edge_scores(model, PAIRS, steps=2).scores
    assert torch.equal(result, expected)


def test_the_order_of_pairs_and_their_neighbors_change_only_rounding():
    model = make_model("qwen3", torch.float64, layers=2)
    together = edge_scores(model, PAIRS, steps=2)
    alone = sum(edge_scores(model, [pair], steps=2).scores for pair in PAIRS) / len(PAIRS)
    torch.testing.assert_close(together.scores, alone, rtol=1e-5, atol=1e-6)
    back = edge_scores(model, PAIRS[::-1], steps=2)
    torch.testing.assert_close(together.scores, back.scores, rtol=1e-5, atol=1e-6)
    assert together.pairs == 3 and together.steps == 2 and together.clean != together.corrupted


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([], {}, RequestError, "no prompt pairs"),
        ([pair_of([1, 2, 3], [1, 2], label="uneven")], {}, RequestError, "'uneven': its prompts have 3 and 2 tokens"),
        ([pair_of([1, 2], [1, 2], label="same")], {}, RequestError, "'same': its prompts are the same"),
        ([pair_of([], [], label="none")], {}, RequestError, "'none': its prompts are empty"),
        ([pair_of([1, 2], [1, 999], label="far")], {}, RequestError, "'far': token 999"),
        ([pair_of([1, 2], [1, 3], answer=-1, label="below")], {}, RequestError, "'below': token -1"),
        ([pair_of([1] * 200, [2] * 200, label="long")], {}, RequestError, "'long': its prompts have 200 tokens"),
        (PAIRS, dict(scoring="acdc"), InvalidArgumentError, "scoring must be one of eap, eap-ig"),
        (PAIRS, dict(steps=0), InvalidArgumentError, "steps must be"),
        (PAIRS, dict(metric="loss"), InvalidArgumentError, "metric must be one of logit-difference"),
        (PAIRS, dict(scale="sum"), InvalidArgumentError, "scale must be one of mean, published"),
        (PAIRS, dict(batch_size=0), InvalidArgumentError, "batch_size must be 1"),
        (PAIRS, dict(scoring="eap", metric="kl"), InvalidArgumentError, "no slope at the clean prompt"),
    ],
)
def test_bad_input_is_named(pairs, options, error, message):
    with pytest.raises(error, match=message):
        edge_scores(make_model("gpt2", layers=1), pairs, **options)


def test_a_model_that_gives_no_finite_logits_is_named_with_the_pair():
    model = make_model("gpt2", layers=1)
    with torch.no_grad():
        model.transformer.wte.weight[PAIRS[1].clean[1]] = torch.nan
    with pytest.raises((EvaluationError, UnsupportedModelError), match="short"):
        edge_scores(model, PAIRS)
