"""Circuits before and after an edit: what is claimed of made-up scores; the whole on a tiny model."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edge_parts import GRAPH, parts, signal
from tiny_models import make_model

from kedit_fast import Patch, demo
from kedit_fast.demo import world
from kedit_fast.errors import InvalidArgumentError, RequestError
from kedit_fast.locating.circuits import edge_scores
from kedit_fast.locating.faithfulness import faithfulness
from kedit_fast.locating.prompt_pairs import PromptPair
from kedit_fast.models.view import ModelView
from kedit_fast.reports import circuit_comparison as comparing
from kedit_fast.reports.circuit_comparison import NOTHING, compare_circuits, pairs_to_compare
from kedit_fast.reports.circuit_statistics import changes_of, halves, overlaps_of, shares_of

TOP = (10, 40)


def compared(before: torch.Tensor, after: torch.Tensor, noise: float, control: torch.Tensor | None = None):
    models = parts(before, noise, 1), parts(after, noise, 2)
    ways = halves(models[0].sizes, 50, random.Random(0))
    controls = None if control is None else (parts(control, noise, 3), parts(control, noise, 3))
    overlaps = overlaps_of(*models, controls, TOP, ways, ways if controls else ())
    shares = shares_of(*models, controls, ways, ["mlp1"])
    changes = changes_of(*models, controls, ways, 10)
    return overlaps, shares, changes, comparing.claims_of(overlaps, shares, changes, (), None)


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_nothing_is_claimed_where_only_noise_differs(noise):
    overlaps, shares, changes, claims = compared(signal(0), signal(0), noise, signal(5))
    assert claims == (NOTHING,)
    assert not any(part.is_beyond for part in (*overlaps, *shares, *changes))
    assert overlaps[-1].edited.value < 0.999  # they do differ


def test_other_scores_are_beyond_the_floor():
    overlaps, _, changes, claims = compared(signal(0), signal(9), 0.2, signal(5))
    assert all(overlap.is_beyond for overlap in overlaps)
    assert sum("Jaccard index" in claim for claim in claims) == len(TOP)
    assert changes[0].is_beyond and f"{changes[0].source} -> {changes[0].target}" in " ".join(claims)
    for overlap in overlaps:
        assert overlap.edited.value < overlap.floor_before.low <= overlap.floor_before.value
        assert overlap.control is not None and overlap.control.value > overlap.edited.value


def test_a_change_that_unedited_prompts_show_too_is_not_claimed():
    before, after = signal(0), signal(9)
    models = parts(before, 0.2, 1), parts(after, 0.2, 2)
    ways = halves(models[0].sizes, 50, random.Random(0))
    overlaps = overlaps_of(*models, models, TOP, ways, ways)
    shares = shares_of(*models, models, ways)
    changes = changes_of(*models, models, ways)
    assert comparing.claims_of(overlaps, shares, changes, (), None) == (NOTHING,)


def test_one_layer_that_gained_is_the_share_that_is_claimed():
    graph_sources = [GRAPH.sources[i] for i in torch.nonzero(GRAPH.mask)[:, 0].tolist()]
    before = signal(0).abs() + 1
    after = before * torch.tensor([4.0 if source == "m1" else 1.0 for source in graph_sources])
    _, shares, _, claims = compared(before, after, 0.3, signal(5).abs() + 1)
    gained = {share.name: share for share in shares}["mlp1"]
    assert gained.is_beyond and gained.is_edited and gained.after > 2 * gained.before
    assert any(claim.startswith("mlp1 (edited) has") for claim in claims)
    assert sum(share.before for share in shares) == pytest.approx(1) == sum(share.after for share in shares)
    assert [share.name for share in shares][:3] == ["input", "attn0", "mlp0"]


@pytest.fixture(scope="module")
def tiny():
    """A tiny model, a copy with other MLP weights in layer 1, and pairs of random tokens."""
    base = make_model("llama", layers=2)
    edited = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = edited.model.layers[1].mlp.down_proj.weight
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    draw = random.Random(0)
    pairs = []
    for i in range(9):
        clean = [draw.randrange(3, 90) for _ in range(5)]
        corrupted = [clean[0], draw.randrange(3, 90), *clean[2:]]
        pairs.append(PromptPair(tuple(clean), tuple(corrupted), 5 + i, 40 + i, f"pair {i}", 1))
    return base, edited, pairs, [replace(pair, answer=pair.wrong, wrong=pair.answer) for pair in pairs]


def test_a_comparison_of_two_models(tiny):
    base, edited, before, after = tiny
    result = compare_circuits(
        base, edited, before, after, before[:8], top=(20, 60), circuit_edges=60, steps=2, groups=9, splits=30,
        random_circuits=2,
    )  # fmt: skip
    assert result.edited == ("mlp1",)
    assert [share.name for share in result.shares if share.is_edited] == ["mlp1"]
    assert (result.pairs, result.control_pairs, result.steps, result.splits) == (9, 8, 2, 30)
    assert (result.before.sign, result.after.sign) == ("old target - new target", "new target - old target")
    whole = edge_scores(base, before, steps=2)
    assert torch.allclose(result.scores["before"].scores, whole.scores, atol=1e-6)
    assert result.before.clean == pytest.approx(whole.clean, abs=1e-5)
    runs = {(run.circuit, run.model): run for run in result.runs}
    assert len(runs) == 6
    for name, model, pairs in (("before", base, before), ("after", edited, after)):
        for circuit in ("before", "after"):
            expected = faithfulness(model, result.circuits[circuit], pairs)
            assert runs[circuit, name].value == pytest.approx(expected.value, abs=1e-4)
    record = json.loads(json.dumps(result.as_record(), allow_nan=False))
    assert set(record) >= {"overlaps", "runs", "shares", "edges", "claims", "before", "after"}
    assert record["overlaps"][0]["name"] == "top 20" and "is_beyond" in record["overlaps"][0]


def test_a_model_compared_with_itself_claims_nothing(tiny):
    base, _, before, _ = tiny
    result = compare_circuits(base, base, before, before, top=(20,), circuit_edges=60, scoring="eap", random_circuits=0)
    assert result.claims == (NOTHING,) and result.edited == ()
    assert [overlap.edited.value for overlap in result.overlaps] == pytest.approx([1, 1])
    assert result.lost is not None and result.lost[0] == 0


def test_right_answers_are_counted_on_both_sides(tiny):
    base, _, before, _ = tiny
    with torch.no_grad():
        said = [int(base(torch.tensor([pair.clean])).logits[0, -1].argmax()) for pair in before]
    right = [replace(p, answer=a, wrong=(a + 1) % 90) for p, a in zip(before, said, strict=True)]
    result = comparing._Answers.of(ModelView(base), right, "logit-difference")
    assert result.right == [True] * 9 and bool((result.clean > 0).all())
    assert sum(comparing._Answers.of(ModelView(base), before, "kl").right) < 9


def test_parts_that_an_edit_changed_are_named(tiny):
    base, _, _, _ = tiny
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
        other.model.layers[1].input_layernorm.weight[0] += 1
        other.model.embed_tokens.weight[0] += 1
    view = ModelView(base)
    assert comparing.edited_parts(view, ModelView(other)) == ("attn0", "layer 1", "model.embed_tokens.weight")
    patch = SimpleNamespace(updates={"model.layers.1.mlp.down_proj": None})
    assert comparing.edited_parts(view, view, patch) == ("mlp1",)
    with pytest.raises(InvalidArgumentError, match=r"float32 on cpu in one model and \[400, 32\] float64"):
        comparing.edited_parts(view, ModelView(make_model("llama", torch.float64, layers=2)))
    with pytest.raises(InvalidArgumentError, match="in one of them alone"):
        comparing.edited_parts(view, ModelView(make_model("llama", layers=3)))


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda b, a: (b[:3], a[:3]), {}, RequestError, "3 prompt pairs cannot be halved"),
        (lambda b, a: (b, a[:4]), {}, RequestError, "9 pairs before and 4 after"),
        (lambda b, a: (b, a[::-1]), {}, RequestError, "pair 0: the pair after has other prompts"),
        (lambda b, a: (b, a), {"top": (0,)}, InvalidArgumentError, "top must be a whole number"),
        (lambda b, a: (b, a), {"groups": 2}, InvalidArgumentError, "groups must be a whole number of at least 4"),
        (lambda b, a: (b, a), {"metric": "loss"}, InvalidArgumentError, "metric must be one of"),
    ],
)
def test_what_cannot_be_compared_is_named(tiny, change, options, error, message):
    base, edited, before, after = tiny
    with pytest.raises(error, match=message):
        compare_circuits(base, edited, *change(before, after), **options)


def test_the_demo_edited_by_memit_changes_as_was_recorded_with_the_published_code(demo_model):
    """Against `circuits_before_after.json`: of other corrupted prompts, so within what halves of the prompts differ."""
    recorded = json.loads((Path(__file__).parents[1] / "data" / "circuits_before_after.json").read_text())
    base, tokenizer = demo_model
    edited = copy.deepcopy(base)
    Patch.load(Path(__file__).parents[1] / "data" / "golden_memit_40.patch.safetensors").apply_(edited)
    named = {request.subject for request in demo.requests(40)}
    others: dict[str, list[str]] = {}
    for fact in world.world().facts:
        if fact.subject not in named:
            others.setdefault(fact.relation.name, []).append(fact.subject)
    pairs = pairs_to_compare(base, edited, tokenizer, demo.requests(40), others=others)
    assert len(pairs.before) == 38 and set(pairs.skipped) == {"request 22", "request 30"}  # 39 of 40 edits took
    result = compare_circuits(base, edited, pairs.before, pairs.after, random_circuits=1, splits=40)
    overlaps = {overlap.name: overlap for overlap in result.overlaps}
    for name, is_beyond in (("50", True), ("200", False)):
        overlap, expected = overlaps[f"top {name}"], recorded[name]
        assert overlap.is_beyond is is_beyond
        assert overlap.edited.value == pytest.approx(expected["edited: before vs after"], abs=0.1)
        assert overlap.floor_before.value == pytest.approx(
            expected["noise floor: halves of the prompts, before"], abs=0.1
        )
        assert overlap.chance == pytest.approx(expected["chance"], abs=1e-6)
    assert overlaps["spearman"].edited.value == pytest.approx(recorded["spearman"]["edited"], abs=0.05)
    shares = {share.name: share for share in result.shares}
    before, after = recorded["share of |score| leaving a layer, before"], recorded["after"]
    for name, share in shares.items():
        assert share.before == pytest.approx(before[name], abs=0.03)
        assert share.after == pytest.approx(after[name], abs=0.04)
    assert result.edited == ("mlp0", "mlp1") and shares["mlp1"].is_beyond
    runs = {(run.circuit, run.model): run.value for run in result.runs}
    assert runs["before", "before"] == pytest.approx(0.938, abs=0.05)
    assert runs["after", "after"] > 0.8 and abs(runs["random", "after"]) < 0.01
