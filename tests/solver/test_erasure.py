"""Erasure against the formula of concept erasure, written densely in float64."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error

from kedit_fast.errors import InvalidArgumentError, SolveError
from kedit_fast.solver.erasure import difference_directions, erasing_update, label_directions, shrunk_covariance
from kedit_fast.solver.preconditioner import Covariance, Identity

D, OUT, N = 10, 7, 300


@pytest.fixture(scope="module", params=(2, 4))
def data(request):
    """Inputs [D, N] whose mean depends on their label, labels [N], W."""
    classes = request.param
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (N,), generator=generator)
    means = torch.randn(D, classes, generator=generator, dtype=torch.float64)
    noise = torch.randn(D, N, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, D)[:, None]
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return mixing @ (noise + means[:, labels]) + 3, labels, torch.randn(OUT, D, generator=generator).double()


def probe(outputs, labels):
    """Share of labels that the best least-squares classifier with an intercept tells from outputs [out, n]."""
    design = torch.cat([outputs.T, torch.ones(outputs.shape[1], 1, dtype=outputs.dtype)], 1)
    wanted = torch.nn.functional.one_hot(labels).double()
    fitted = design @ torch.linalg.lstsq(design, wanted, driver="gelsd").solution
    return float((fitted.argmax(1) == labels).double().mean()), fitted


@pytest.mark.parametrize("shrunk", (False, True))
def test_it_is_the_formula_of_concept_erasure(data, shrunk):
    """x -> x - S^1/2 P S^-1/2 (x - mean), P the projection on the span of S^-1/2 Sigma_xz, folded into W."""
    inputs, labels, weight = data
    covariance = shrunk_covariance(inputs) if shrunk else torch.cov(inputs, correction=0)
    one_hot = torch.nn.functional.one_hot(labels).double()
    cross = (inputs - inputs.mean(1, keepdim=True)) @ (one_hot - one_hot.mean(0)) / N
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.sqrt()) @ vectors.T
    white = torch.linalg.inv(root)
    u, s, _ = torch.linalg.svd(white @ cross, full_matrices=False)
    u = u[:, s > 1e-9 * s[0]]
    expected = -weight @ root @ u @ u.T @ white
    directions = label_directions(inputs, labels)
    assert relative_error(directions, cross) < 1e-12
    update = erasing_update(weight, directions, Covariance.from_moment(covariance))
    assert relative_error(update.dense(), expected) < 1e-9
    assert update.rank == u.shape[1] == len(one_hot.T) - 1


@pytest.mark.parametrize("space", ("texts", "none"))
@pytest.mark.parametrize("keep_mean", (False, True))
def test_a_linear_probe_is_at_chance_afterwards(data, space, keep_mean):
    inputs, labels, weight = data
    covariance = Covariance.from_moment(shrunk_covariance(inputs))
    mean = inputs.mean(1)
    update = erasing_update(
        weight,
        label_directions(inputs, labels),
        covariance if space == "texts" else Identity(D),
        mean if keep_mean else None,
    )
    chance = float(labels.bincount().max()) / N
    assert probe(weight @ inputs, labels)[0] > chance + 0.2
    share, fitted = probe((weight + update.dense()) @ inputs, labels)
    assert share <= chance + 0.01  # every output is called by the most frequent label, or one as frequent
    assert float((fitted - fitted.mean(0)).abs().max()) < 1e-6
    gap = relative_error((weight + update.dense()) @ mean, weight @ mean)
    assert gap < 1e-9 if keep_mean else gap > 1e-3


def test_pairs_give_the_directions_of_their_differences():
    others, weight = torch.randn(D, 30, dtype=torch.float64), torch.randn(OUT, D, dtype=torch.float64)
    concept = torch.linalg.qr(torch.randn(D, 2, dtype=torch.float64)).Q
    keys = others + concept @ torch.randn(2, 30, dtype=torch.float64) * 5 + 1e-3 * torch.randn(D, 30).double()
    directions = difference_directions(keys, others, 2)
    assert relative_error(directions @ directions.T, concept @ concept.T) < 1e-2
    update = erasing_update(weight, directions, Identity(D))
    projected = weight @ (torch.eye(D, dtype=torch.float64) - directions @ directions.T)
    assert relative_error(weight + update.dense(), projected) < 1e-12


def test_shrinkage_is_the_closed_form_and_makes_few_inputs_enough():
    inputs = torch.randn(40, 12, dtype=torch.float64)
    covariance = torch.cov(inputs, correction=0)
    trace = covariance.trace()
    share = 1 - trace**2 / (12 * (covariance.square().sum() - trace**2 / 40))
    expected = share * covariance + (1 - share) * trace / 40 * torch.eye(40, dtype=torch.float64)
    shrunk = shrunk_covariance(inputs)
    assert 0 < share < 1 or torch.allclose(shrunk, trace / 40 * torch.eye(40, dtype=torch.float64))
    assert share <= 0 or relative_error(shrunk, expected) < 1e-12
    assert float(torch.linalg.eigvalsh(shrunk)[0]) > 0
    many = torch.randn(4, 100_000, dtype=torch.float64) * torch.tensor([[1.0], [2], [3], [4]])
    assert relative_error(shrunk_covariance(many), torch.cov(many)) < 1e-3


def test_what_gives_no_directions_is_refused():
    inputs, weight = torch.randn(D, 8), torch.randn(OUT, D)
    with pytest.raises(InvalidArgumentError, match="two labels or more; got 1"):
        label_directions(inputs, torch.zeros(8, dtype=torch.int64))
    for labels in (torch.zeros(7, dtype=torch.int64), torch.zeros(8)):
        with pytest.raises(InvalidArgumentError, match="labels"):
            label_directions(inputs, labels)
    with pytest.raises(SolveError, match="not finite"):
        label_directions(inputs * float("nan"), torch.arange(8) % 2)
    with pytest.raises(InvalidArgumentError, match="rank must be 1 to 8"):
        difference_directions(inputs, inputs, 9)
    with pytest.raises(SolveError, match="the inputs do not depend on the concept"):
        erasing_update(weight, torch.zeros(D, 2), Identity(D))
    with pytest.raises(SolveError, match="in the span of"):
        erasing_update(weight, inputs[:, :2], Identity(D), inputs[:, 0])
    with pytest.raises(SolveError, match="no covariance"):
        shrunk_covariance(torch.ones(D, 5))
