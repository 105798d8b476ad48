"""Overlaps, floors and changes of scores of edges, by their definitions and on made-up scores."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from edge_parts import GRAPH, parts, signal

from kedit_fast.errors import EvaluationError
from kedit_fast.reports.circuit_statistics import (
    chance_jaccard,
    changes_of,
    faithfulness_of,
    halves,
    jaccard,
    overlaps_of,
    sampled_faithfulness,
    spearman,
)


def test_scores_are_normalized_before_edges_are_compared():
    before = parts(signal(0), 0.1, 1)
    doubled = replace(before, values=2 * before.values, clean=5.0)  # the gap doubles, too
    ways = halves(before.sizes, 50, random.Random(0))
    assert all(abs(c.after - c.before) < 1e-6 for c in changes_of(before, doubled, None, ways))


def test_overlaps_are_those_of_the_definitions():
    one, other = torch.tensor([5.0, -4.0, 3.0, 0.1, 0.2]), torch.tensor([-5.0, 0.1, 3.0, 4.0, 0.2])
    assert jaccard(one, other, 3) == 2 / 4
    assert jaccard(one, one, 3) == 1 == pytest.approx(spearman(one, -one))
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(3**0.5 / 2)
    assert spearman(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == 0
    generator = torch.Generator().manual_seed(0)
    drawn = [jaccard(*torch.randn(2, 400, generator=generator), 60) for _ in range(300)]
    assert sum(drawn) / 300 == pytest.approx(chance_jaccard(60, 400), abs=0.004)
    assert chance_jaccard(50, 1108) == pytest.approx(0.0231, abs=1e-4)  # the judged comparison


@pytest.mark.parametrize(
    ("count", "splits", "expected"), [(4, 50, 3), (5, 50, 10), (8, 50, 35), (16, 60, 60), (1, 9, 0)]
)
def test_halvings_are_different_and_halve(count, splits, expected):
    ways = halves([1] * count, splits, random.Random(1))
    assert len(ways) == expected == len({frozenset((one, other)) for one, other in ways})
    for one, other in ways:
        assert sorted((*one, *other)) == list(range(count)) and abs(len(one) - len(other)) == count % 2


def test_a_mean_of_parts_counts_their_pairs():
    scores = replace(parts(signal(0), 1.0, 0, groups=2), sizes=(3, 1))
    assert torch.allclose(scores.mean(), 0.75 * scores.values[0].double() + 0.25 * scores.values[1].double())
    assert torch.equal(scores.mean([1]), scores.values[1].double())


def test_faithfulness_is_sampled_in_pairs():
    clean, corrupted = torch.tensor([4.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double()
    circuit = corrupted + 0.5 * (clean - corrupted)
    assert faithfulness_of(circuit, clean, corrupted) == pytest.approx(0.5)
    samples = sampled_faithfulness(circuit, clean, corrupted, 0, 50)
    assert torch.allclose(samples, torch.full((50,), 0.5).double())


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="not finite"):
        parts(signal(0) / 0, 0.1, 0)


def test_overlaps_and_their_ranges_are_those_of_the_halves():
    """Against a plain loop over halvings, measures and halves."""
    models = parts(signal(0), 1.0, 1), parts(signal(9), 1.0, 2)
    controls = parts(signal(5), 2.0, 3), parts(signal(6), 2.0, 4, groups=16)
    ways = halves(models[0].sizes, 12, random.Random(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    measures = {f"top {k}": lambda x, y, k=k: jaccard(x, y, k) for k in (10, 40)} | {"spearman": spearman}
    result = overlaps_of(*models, controls, (10, 40), ways, ways[:5])
    assert [overlap.name for overlap in result] == list(measures)
    for overlap, measure in zip(result, measures.values(), strict=True):
        for estimate, (one, other), some in ((overlap.edited, models, ways), (overlap.control, controls, ways[:5])):
            samples = torch.tensor([measure(one.mean(h), other.mean(h)) for way in some for h in way]).double()
            assert estimate.value == pytest.approx(measure(one.mean(), other.mean()))
            assert [estimate.low, estimate.high] == pytest.approx(samples.quantile(ends).tolist(), abs=1e-6)
        for floor, model in ((overlap.floor_before, models[0]), (overlap.floor_after, models[1])):
            samples = torch.tensor([measure(model.mean(x), model.mean(y)) for x, y in ways]).double()
            assert floor.value == pytest.approx(float(samples.mean()), abs=1e-6)
            assert [floor.low, floor.high] == pytest.approx(samples.quantile(ends).tolist(), abs=1e-6)
        others = [overlap.floor_before.low, overlap.floor_after.low, overlap.control.low]
        assert overlap.is_beyond is (overlap.edited.value < min(others))
    assert overlaps_of(*models, None, (10,), ways)[0].control is None
    assert GRAPH.edge_count == len(signal(0))
