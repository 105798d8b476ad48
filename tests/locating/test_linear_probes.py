"""Linear probes: the ridge solve, held-out subjects, controls, and what the demo model's layers hold."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tiny_models import make_model, make_tokenizer
from torch_states import default_dtype

from kedit_fast import EditRequest, demo
from kedit_fast.demo import world
from kedit_fast.errors import InvalidArgumentError, RequestError, StatisticsError
from kedit_fast.locating import linear_probes as probing
from kedit_fast.locating.linear_probes import linear_probes, ridge_probe

SUBJECTS = (
    "Madrid",
    "Sweden",
    "Ebro",
    "Miles Davis",
    "Thelonious Monk",
    "Marcel Maupoint",
    "Danielle Darrieux",
    "Spain",
)


def facts(relation: str = "color", objects: tuple[str, ...] = ("red", "blue")) -> list[EditRequest]:
    return [
        EditRequest("{} is", subject, "x", objects[i % len(objects)], relation=relation)
        for i, subject in enumerate(SUBJECTS)
    ]


@pytest.fixture(scope="module")
def tiny():
    return make_model("llama", layers=3), make_tokenizer()


@pytest.mark.parametrize("shape", [(60, 8), (9, 8), (8, 8), (7, 30)])
def test_the_map_is_that_of_least_squares_with_a_ridge(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 100
    y = torch.randn(shape[0], 3, generator=generator, dtype=torch.float64)
    rows = torch.randn(5, shape[1], generator=generator, dtype=torch.float64) + 100
    centered = x - x.mean(0)
    add = (shape[0] * 0.2 * centered.square().mean()).sqrt() * torch.eye(shape[1], dtype=torch.float64)
    mapping = torch.linalg.lstsq(
        torch.cat([centered, add]), torch.cat([y - y.mean(0), y.new_zeros(shape[1], 3)])
    ).solution
    expected = (rows - x.mean(0)) @ mapping + y.mean(0)
    assert torch.allclose(ridge_probe(x, y, 0.2)(rows), expected, atol=1e-10)


def test_states_that_do_not_vary_are_refused():
    with pytest.raises(StatisticsError, match="nothing to read"):
        ridge_probe(torch.ones(5, 3), torch.eye(5))


def test_the_demo_model_gathers_the_object_at_the_last_token_and_shuffled_objects_stay_at_chance(demo_model):
    relation = next(one for one in world.world().relations if one.name == "language")
    chosen = [fact for fact in world.world().facts if fact.relation is relation][:200]
    requests = [EditRequest(relation.phrasings[0], f.subject, "x", f.object, relation=relation.name) for f in chosen]
    probes = linear_probes(*demo_model, requests, layers=[0, 5], position="last", controls=4)
    assert probes.accuracy[1] > 0.8 > 0.2 > probes.accuracy[0]
    assert probes.from_layer == 5
    assert probes.low[1] > probes.control_high[1] > probes.control[1]
    assert max(probes.control) < 0.12
    (alone,) = probes.relations
    assert alone.accuracy == probes.accuracy and alone.control_high == probes.control_high
    assert (alone.relation, alone.classes, alone.subjects) == ("language", 30, alone.count)
    shuffled = linear_probes(
        *demo_model, requests, labels=[request.target_true for request in reversed(requests)], layers=[5],
        position="last", controls=2,
    )  # fmt: skip
    assert shuffled.from_layer is None and shuffled.accuracy[0] < 0.12


def test_no_part_holds_a_subject_that_another_trains_on():
    of = [probing._Fact(i, f"s{i // 3}", "ab"[i // 3 % 2]) for i in range(30)]
    parts = probing._folds(of, 5, random.Random(0))
    assert sorted(set(parts)) == [0, 1, 2, 3, 4]
    for i in range(0, 30, 3):
        assert len(set(parts[i : i + 3])) == 1
    for part in range(5):
        assert {of[i].object for i in range(30) if parts[i] == part} == {"a", "b"}


def test_a_subject_that_would_give_itself_away_does_not(tiny):
    """Two phrasings of a subject have one state at its last token: trained on one, a probe would name the other."""
    twice = [dataclasses.replace(r, prompt="{} was") for r in facts()] + facts()
    probes = linear_probes(*tiny, twice, labels=["a", "b"] * 8, folds=2, controls=1)
    assert probes.count == 16 and probes.subjects == 8
    assert max(probes.accuracy) < 1


def test_averages_are_over_the_facts_of_all_relations(tiny):
    requests = facts() + facts("size", ("big", "small", "tiny"))[:6]
    probes = linear_probes(*tiny, requests, controls=3, seed=4)
    assert [relation.count for relation in probes.relations] == [8, 6]
    for i in range(3):
        mean = sum(relation.count * relation.accuracy[i] for relation in probes.relations) / 14
        assert probes.accuracy[i] == pytest.approx(mean)
        assert probes.low[i] <= probes.accuracy[i] <= probes.high[i]
        assert probes.control_low[i] <= probes.control[i] <= probes.control_high[i]
    assert probes.classes == 5 and probes.majority == pytest.approx((4 + 2) / 14)
    assert probes == linear_probes(*tiny, requests, controls=3, seed=4)


@pytest.mark.parametrize("site", ["mlp", "attention", "block"])
def test_states_are_those_of_the_site_at_the_subject(tiny, site):
    model, tokenizer = tiny
    view = probing.ModelView(model)
    prompts, _ = probing._facts(view, tokenizer, facts(), None, "subject-last", None)
    (rows,) = probing._states(view, prompts, [probing.Site(1, site)], False)
    module = {"mlp": view.mlp, "attention": view.attention, "block": view.block}[site](1)
    seen: list = []
    for prompt, row in zip(prompts, rows, strict=True):
        seen.clear()
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
        handle.remove()
        output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        assert torch.allclose(output[0, prompt.lookup], row, atol=1e-5)


def test_the_first_layer_is_that_from_which_on_all_are_above():
    lows = (0.6, 0.2, 0.5, 0.7)
    probes = probing.RelationProbes(
        (0, 2, 4, 6), (0.9,) * 4, lows, (1.0,) * 4, (0.1,) * 4, (0.0,) * 4, (0.3,) * 4, 2, 0.4, 9, 9, "r", 0
    )
    assert probes.from_layer == 4
    assert dataclasses.replace(probes, majority=0.65).from_layer == 6
    assert dataclasses.replace(probes, control_high=(0.1, 0.1, 0.1, 0.8)).from_layer is None


def test_a_16_bit_model_and_another_default_dtype(tiny):
    expected = linear_probes(*tiny, facts(), controls=1)
    with default_dtype(torch.float64):
        assert linear_probes(*tiny, facts(), controls=1) == expected
    assert linear_probes(make_model("llama", torch.bfloat16, layers=3), tiny[1], facts(), controls=1).count == 8


@pytest.mark.parametrize(
    ("requests", "options", "error", "message"),
    [
        (facts(objects=("red",)), {}, RequestError, "color: one class: all 8 facts have the object 'red'"),
        (facts(objects=SUBJECTS), {}, RequestError, "too few subjects: of 8 facts with 8 objects, 0 objects have two"),
        ([], {}, RequestError, "no requests"),
        ([dataclasses.replace(facts()[0], target_true=None)], {}, RequestError, "request 1 has no target_true"),
        ([*facts(), dataclasses.replace(facts()[0], relation=None)], {}, RequestError, "request 9 has no relation"),
        ([EditRequest("Madrid is", None, "x", "red", id=7)], {}, RequestError, "request 7 has no subject"),
        (facts(), {"labels": ["a"]}, InvalidArgumentError, "one for each of 8 requests; got 1"),
        (facts(), {"folds": 1}, InvalidArgumentError, "folds must be a whole number of at least 2"),
        (facts(), {"controls": 0}, InvalidArgumentError, "controls must be"),
        (facts(), {"ridge": 0.0}, InvalidArgumentError, "ridge must be positive"),
        (facts(), {"layers": [3]}, InvalidArgumentError, "layers must be some of 0 to 2; got"),
        (facts(), {"site": "key"}, InvalidArgumentError, "site must be block, mlp, attention; got 'key'"),
        (facts(), {"position": "first"}, InvalidArgumentError, "position must be subject-last, last"),
    ],
)
def test_what_cannot_be_probed_is_named(tiny, requests, options, error, message):
    with pytest.raises(error, match=message):
        linear_probes(*tiny, requests, **options)


def test_a_relation_too_small_is_skipped_with_its_reason(tiny):
    probes = linear_probes(*tiny, [*facts(), *facts("size", ("big",))], controls=1)
    assert [relation.relation for relation in probes.relations] == ["color"]
    assert probes.skipped == {"size": "one class: all 8 facts have the object 'big'"}


def test_states_that_are_not_finite_are_named(tiny):
    model = make_model("llama", layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(StatisticsError, match="layer 1: states"):
        linear_probes(model, tiny[1], facts())


def test_requests_of_the_demo_are_probed(demo_model):
    probes = linear_probes(*demo_model, demo.requests(60), layers=[0], controls=2)
    assert probes.count + sum(r.left_out for r in probes.relations) <= 60
    assert set(probes.skipped) | {r.relation for r in probes.relations} == {r.relation for r in demo.requests(60)}
