"""E[x y^T]: against float64, in parts, with masks and weights, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch_states import default_dtype

from kedit_fast import Covariance, cross_moment, second_moment
from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.statistics.moments import CHUNK, CrossMomentAccumulator


def pair(n: int, dtype: torch.dtype = torch.float32, others: torch.dtype | None = None):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, size, generator=generator, dtype=torch.float64) for size in (7, 3))
    return x.to(dtype), y.to(others or dtype)


def exact(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    return (x.double() * w[:, None]).T @ y.double() / w.sum()


@pytest.mark.parametrize("n", [1, CHUNK, 2 * CHUNK + 17])
@pytest.mark.parametrize(
    ("dtype", "others", "bound"),
    [
        (torch.float32, torch.float32, 2e-7),
        (torch.float64, torch.float64, 1e-15),
        (torch.bfloat16, torch.float32, 2e-7),
        (torch.float32, torch.float64, 1e-15),
    ],
)
def test_it_is_the_mean_of_products_in_float64(n, dtype, others, bound):
    x, y = pair(n, dtype, others)
    moment = cross_moment(x, y)
    assert moment.dtype == torch.float64
    assert float((moment - exact(x, y)).abs().max()) <= bound * max(1.0, float(exact(x.abs(), y.abs()).max()))


def test_chunks_are_added_in_float64():
    """One fp32 sum over all rows would lose the ones beside 2^24."""
    x, y = torch.ones(2 * CHUNK, 1), torch.ones(2 * CHUNK, 1)
    x[0] = 2.0**24
    assert float(cross_moment(x, y) * len(x)) == pytest.approx(2.0**24 + 2 * CHUNK - 1, abs=CHUNK)
    assert float(cross_moment(x, y) * len(x)) >= 2.0**24 + CHUNK


def test_parts_masks_and_weights():
    x, y = pair(100)
    weights = torch.rand(100, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(100) % 3 > 0
    assert torch.equal(
        cross_moment([(x[:60], y[:60]), (x[60:], y[60:])]), cross_moment(iter([(x[:60], y[:60]), (x[60:], y[60:])]))
    )
    assert torch.allclose(cross_moment([(x[:60], y[:60]), (x[60:], y[60:])]), exact(x, y), atol=1e-7)
    assert torch.allclose(cross_moment(x, y, weights), exact(x, y, weights), atol=1e-7)
    x[~mask] = torch.nan
    weights[1] = 0.0
    y[1] = torch.inf
    counted = mask & (weights != 0)
    assert torch.allclose(cross_moment(x, y, weights, mask), exact(x[counted], y[counted], weights[counted]), atol=1e-7)


def test_the_ridge_map_is_that_of_stacked_least_squares():
    x, y = pair(50, torch.float64)
    moment, ridge = second_moment(x), 0.03
    mapping = Covariance.from_moment(moment, ridge).apply(cross_moment(x, y))
    add = (50 * ridge * moment.diagonal().mean()).sqrt() * torch.eye(7, dtype=torch.float64)
    padded = torch.linalg.lstsq(torch.cat([x, add]), torch.cat([y, y.new_zeros(7, 3)])).solution
    assert torch.allclose(mapping, padded, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    x, y = pair(40)
    expected = cross_moment(x, y)
    with default_dtype(dtype):
        assert torch.equal(cross_moment(x, y), expected)


def test_a_result_may_be_taken_on_the_way():
    x, y = pair(30)
    total = CrossMomentAccumulator("rows", (7, 3))
    total.update(x[:10], y[:10])
    first = total.result()
    total.update(x[10:], y[10:])
    assert torch.allclose(first, exact(x[:10], y[:10]), atol=1e-7)
    assert torch.allclose(total.result(), exact(x, y), atol=1e-7)
    assert total.count == 30


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: cross_moment(x), InvalidArgumentError, "others is None"),
        (lambda x, y: cross_moment(x, y[:-1]), InvalidArgumentError, "others must have an entry for each of 20 rows"),
        (lambda x, y: cross_moment(x[0], y), InvalidArgumentError, "rows must be a matrix of rows"),
        (lambda x, y: cross_moment(x, y.long()), InvalidArgumentError, "others must be .* of floats"),
        (lambda x, y: cross_moment([(x, y)], y), InvalidArgumentError, "single pair of matrices"),
        (lambda x, y: cross_moment(x, y, x), InvalidArgumentError, "weights must have an entry"),
        (lambda x, y: cross_moment(x, y, None, torch.ones(20)), InvalidArgumentError, "mask must be bool"),
        (lambda x, y: cross_moment([]), StatisticsError, "no rows were given"),
        (lambda x, y: cross_moment(x[:0], y[:0]), StatisticsError, "no rows were counted"),
        (lambda x, y: cross_moment(x, y, torch.zeros(20)), StatisticsError, "no rows were counted"),
        (lambda x, y: cross_moment(x / 0, y), StatisticsError, "not finite"),
    ],
)
def test_what_cannot_be_summed_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*pair(20))
