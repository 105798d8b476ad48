"""spd_solve against torch.linalg."""

from __future__ import annotations

import pytest
import torch

from kedit_fast import spd_solve
from kedit_fast.errors import GradientError, SolveError


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_spd_solve_solves_batches_with_a_ridge(dtype):
    factor = torch.randn(5, 7, 7, dtype=dtype)
    gram, rhs = factor @ factor.mT, torch.randn(5, 7, 3, dtype=dtype)
    expected = torch.linalg.solve(gram.double() + 0.5 * torch.eye(7, dtype=torch.float64), rhs.double())
    found = spd_solve(gram, rhs, 0.5)
    assert float((found.double() - expected).norm() / expected.norm()) < (1e-4 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(spd_solve(gram[0], rhs[0], 0.5), found[0])


def test_spd_solve_names_the_minor_that_failed():
    gram = torch.diag(torch.tensor([1.0, 2.0, -3.0, 4.0]))
    with pytest.raises(SolveError, match="order 3 of 4"):
        spd_solve(gram, torch.eye(4))
    with pytest.raises(SolveError, match="system 1"):
        spd_solve(torch.stack([torch.eye(4), gram]), torch.eye(4).expand(2, 4, 4))
    with pytest.raises(SolveError, match="rhs has values that are not finite"):
        spd_solve(torch.eye(2), torch.tensor([[float("nan")], [1.0]]))


def test_a_system_that_requires_grad_is_refused():
    with pytest.raises(GradientError, match="gram"):
        spd_solve(torch.eye(3, requires_grad=True), torch.eye(3))
