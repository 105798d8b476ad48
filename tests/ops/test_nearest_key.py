from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_memories import golden

from kedit_fast import nearest_key

SHAPES = [(1, 1, 1), (5, 3, 7), (17, 40, 33), (3, 130, 64), (20, 65, 70), (0, 4, 8), (4, 5, 0)]


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


def test_every_isa_and_number_of_threads_finds_the_same(isa):
    """Both ways: where the first columns decide, and where a product says which keys are far."""
    keys = torch.randn(300, 1100)
    for queries in (torch.randn(50, 1100), keys[::6] + 0.1 * torch.randn(50, 1100)):
        right, results, before = expected(queries, keys), [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(nearest_key(queries, keys, torch.ones(300), backend="cpu"))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0].index, right.indices)
        alone = torch.cat([nearest_key(q[None], keys, torch.ones(300), backend="cpu").distance for q in queries])
        for result in results:  # a batch of one never uses the product: it must not change a bit
            assert torch.equal(result.index, right.indices) and torch.equal(result.distance, alone)


def test_float64_on_every_isa(isa):
    keys = torch.randn(40, 530, dtype=torch.float64)
    queries = torch.cat([keys[::2] + 1e-13, torch.randn(9, 530, dtype=torch.float64)])
    result = nearest_key(queries, keys.float().double(), torch.ones(40), backend="cpu")
    right = expected(queries, keys.float().double())
    assert torch.equal(result.index, right.indices)
    torch.testing.assert_close(result.distance, right.values, rtol=1e-13, atol=0)


def test_keys_that_nearly_coincide_are_told_apart(every_backend):
    """|q|^2 + |k|^2 - 2 q k in fp32 has an error of about 1 here."""
    base = 50 * torch.randn(400)
    keys = base + 1e-3 * torch.randn(120, 400)
    queries = keys[::7] + 1e-5 * torch.randn(18, 400)
    result = nearest_key(queries, keys, torch.full((120,), 0.01), backend=every_backend)
    assert torch.equal(result.index, torch.arange(0, 120, 7)) and bool(result.inside.all())
    product = (queries.square().sum(1, keepdim=True) + keys.square().sum(1) - 2 * queries @ keys.T).argmin(1)
    assert not torch.equal(result.index, product)  # the test can fail


def test_ties_go_to_the_lowest_index(every_backend):
    keys = torch.randn(9, 50)[torch.arange(180) % 9]
    result = nearest_key(keys[90:140].flip(0), keys, torch.zeros(180), backend=every_backend)
    assert torch.equal(result.index, (torch.arange(90, 140) % 9).flip(0))
    assert bool((result.distance == 0).all()) and bool(result.inside.all())


def test_no_key_and_a_radius_below_zero(every_backend):
    result = nearest_key(torch.randn(3, 4), torch.empty(0, 4), torch.empty(0), backend=every_backend)
    assert result.index.tolist() == [-1] * 3 and result.distance.tolist() == [torch.inf] * 3
    assert not bool(result.inside.any())
    keys = torch.randn(2, 4)
    assert not bool(nearest_key(keys, keys, torch.tensor([-1e-5, -1.0]), backend=every_backend).inside.any())


def test_not_a_number_is_passed_on_and_is_inside_nothing(every_backend):
    queries, keys, radii = torch.randn(40, 1200), torch.randn(80, 1200), torch.full((80,), torch.inf)
    queries[3, 69], queries[5, 0] = torch.nan, torch.inf
    keys[17, 2], keys[18, 1190], keys[0, 0] = torch.nan, torch.nan, torch.nan
    result = nearest_key(queries, keys, radii, backend=every_backend)
    assert result.distance.isnan().nonzero()[:, 0].tolist() == [3, 5] and result.index[[3, 5]].tolist() == [0, 0]
    assert result.inside.tolist() == [i not in (3, 5) for i in range(40)]
    sound = torch.tensor([i for i in range(40) if i not in (3, 5)])
    distances = torch.cdist(queries[sound].double(), keys.double()).nan_to_num(nan=torch.inf)
    assert torch.equal(result.index[sound], distances.argmin(1))
    broken = nearest_key(queries[:1], keys[17:19], radii[:2], backend=every_backend)
    assert int(broken.index) == 0 and bool(broken.distance.isnan()) and not bool(broken.inside)


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


def test_the_native_module_checks_what_it_is_given(cpu_module):
    index, distance = np.empty(2, np.int64), np.empty(2, np.float32)
    queries, keys = np.zeros((2, 3), np.float32), np.ones((4, 3), np.float32)
    cpu_module.nearest_key(index, distance, queries, keys, None, 1)
    assert (index == 0).all() and np.allclose(distance, 3**0.5)
    for bad in (
        (index[:1], distance, queries, keys, None),
        (index, distance.astype(np.float64), queries, keys, None),
        (index, distance, queries, keys[:, :2], None),
        (index, distance, queries, keys[:0], None),
        (index, distance, queries, keys.astype(np.float64), None),
        (index, distance, queries, keys, np.zeros((2, 3), np.float32)),
    ):
        with pytest.raises(ValueError):
            cpu_module.nearest_key(*bad, 1)
