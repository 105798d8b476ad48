from __future__ import annotations

import pytest
import torch
from golden_memories import golden

from kedit_fast import nearest_key

SHAPES = [(1, 1, 1), (5, 3, 7), (17, 40, 33), (3, 300, 64), (70, 65, 100), (0, 4, 8), (4, 5, 0)]


def expected(queries, keys):
    distances = torch.linalg.vector_norm(queries.double()[:, None] - keys.double(), dim=-1)
    return distances.min(1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_nearest_key_is_returned(every_backend, dtype):
    for n, k, d in SHAPES:
        queries, keys, radii = torch.randn(n, d).to(dtype), torch.randn(k, 2 * d).to(dtype)[:, d:], torch.rand(k) * d
        result = nearest_key(queries, keys, radii, backend=every_backend)
        right = expected(queries, keys)
        torch.testing.assert_close(result.distance.double(), right.values, rtol=1e-5, atol=1e-6)
        assert result.distance.dtype == torch.float32 and result.index.dtype == torch.int64
        if d:
            assert torch.equal(result.index, right.indices)
        assert torch.equal(result.inside, result.distance <= radii[result.index])


def test_keys_that_nearly_coincide_are_told_apart(every_backend):
    """|q|^2 + |k|^2 - 2 q k in fp32 has an error of about 1 here."""
    base = 50 * torch.randn(400)
    keys = base + 1e-3 * torch.randn(600, 400)
    queries = keys[::7] + 1e-5 * torch.randn(86, 400)
    result = nearest_key(queries, keys, torch.full((600,), 0.01), backend=every_backend)
    assert torch.equal(result.index, torch.arange(0, 600, 7)) and bool(result.inside.all())
    product = (queries.square().sum(1, keepdim=True) + keys.square().sum(1) - 2 * queries @ keys.T).argmin(1)
    assert not torch.equal(result.index, product)  # the test can fail


def test_ties_go_to_the_lowest_index(every_backend):
    keys = torch.randn(9, 50)[torch.arange(900) % 9]
    result = nearest_key(keys[450:700].flip(0), keys, torch.zeros(900), backend=every_backend)
    assert torch.equal(result.index, (torch.arange(450, 700) % 9).flip(0))
    assert bool((result.distance == 0).all()) and bool(result.inside.all())


def test_no_key_and_a_radius_below_zero(every_backend):
    result = nearest_key(torch.randn(3, 4), torch.empty(0, 4), torch.empty(0), backend=every_backend)
    assert result.index.tolist() == [-1] * 3 and result.distance.tolist() == [torch.inf] * 3
    assert not bool(result.inside.any())
    keys = torch.randn(2, 4)
    assert not bool(nearest_key(keys, keys, torch.tensor([-1e-5, -1.0]), backend=every_backend).inside.any())


def test_not_a_number_is_passed_on_and_is_inside_nothing(every_backend):
    queries, keys, radii = torch.randn(40, 70), torch.randn(80, 70), torch.full((80,), torch.inf)
    queries[3, 69], queries[5, 0] = torch.nan, torch.inf
    result = nearest_key(queries, keys, radii, backend=every_backend)
    assert result.distance.isnan().nonzero()[:, 0].tolist() == [3] and not bool(result.inside[3])
    assert int(result.index[3]) == 0  # all distances of the query are NaN: the lowest
    assert float(result.distance[5]) == torch.inf and int(result.index[5]) == 0
    sound = torch.tensor([i for i in range(40) if i not in (3, 5)])
    assert torch.equal(result.index[sound], expected(queries[sound], keys).indices)
    keys[17, 2] = torch.nan
    result = nearest_key(queries, keys, radii, backend=every_backend)
    assert result.index[sound].tolist() == [17] * 38 and bool(result.distance.isnan()[sound].all())
    assert not bool(result.inside[sound].any())


def test_a_memory_of_grace_answers_as_published(every_backend):
    keys, radii = golden("grace.published.keys"), golden("grace.published.radii")
    result = nearest_key(keys, keys, radii, backend=every_backend if every_backend != "triton" else "torch")
    assert torch.equal(result.index, torch.arange(len(keys))) and bool(result.inside.all())


def test_float64_is_computed_in_float64():
    keys = torch.randn(5, 8, dtype=torch.float64)
    queries = keys[[3]] + 1e-12
    result = nearest_key(queries.float(), keys, torch.ones(5))
    assert result.distance.dtype == torch.float64
    assert abs(float(nearest_key(queries, keys, torch.ones(5)).distance) - 8**0.5 * 1e-12) < 1e-15
