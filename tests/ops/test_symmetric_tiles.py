"""The edges of the C++ tiles of second moments: sizes around a tile, and memory that must stay as it is."""

from __future__ import annotations

import pytest
import torch
from floors import SYMMETRIC, relative_error

from kedit_fast import symmetric_rank_k_update_

SIDES = (1, 7, 8, 9, 17, 18, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 130, 300)
CANARY = 7.0


@pytest.mark.parametrize("wide", (False, True), ids=("same", "float64 acc"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rows", (1, 7, 23, 24, 65))
def test_the_lower_triangle_alone_is_written(isa, dtype, rows, wide):
    for d in SIDES:
        sums = torch.float64 if wide or dtype == torch.float64 else torch.float32
        whole = torch.full((d + 5, d + 35), CANARY, dtype=sums)
        acc = whole[2 : d + 2, 3 : d + 3]
        lower = torch.ones(d, d, dtype=torch.bool).tril()
        acc[lower] = torch.randn(d, d, dtype=sums)[lower]
        x = torch.randn(rows, d).to(dtype)
        expected = (acc.double() - 0.3 * x.double().T @ x.double())[lower]
        plain = (acc.double().to(sums) - 0.3 * (x.to(sums).T @ x.to(sums)))[lower]
        symmetric_rank_k_update_(acc, x, alpha=-0.3, backend="cpu")
        limit = max(SYMMETRIC[dtype], 2 * relative_error(plain, expected))
        assert relative_error(acc[lower], expected) <= limit, d
        outside = torch.ones(whole.shape, dtype=torch.bool)
        outside[2 : d + 2, 3 : d + 3] = ~lower
        assert bool((whole[outside] == CANARY).all()), d
