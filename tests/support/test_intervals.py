"""Intervals of the means of columns: the same samples for all, and records without a value do not count."""

from __future__ import annotations

import torch

from kedit_fast.support.intervals import bootstrap, bootstrap_columns


def test_a_column_has_the_interval_of_a_list():
    values = torch.rand(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_columns(values, seed=5)
    for k in range(3):
        expected = bootstrap(values[:, k].tolist(), seed=5)
        assert torch.allclose(torch.stack([low[k], high[k]]), torch.tensor(expected, dtype=torch.float64))


def test_a_record_without_a_value_does_not_count():
    values = torch.tensor([[1.0, 1.0], [3.0, float("nan")], [5.0, 5.0], [7.0, float("nan")]])
    low, high = bootstrap_columns(values)
    assert 1 <= low[1] <= high[1] <= 5 and high[0] > 5
    low, high = bootstrap_columns(torch.full((4, 2, 2), float("nan")))
    assert low.shape == (2, 2) and bool(low.isnan().all()) and bool(high.isnan().all())


def test_one_number_a_record():
    low, high = bootstrap_columns(torch.arange(20.0))
    assert low.ndim == 0 and low < 9.5 < high
