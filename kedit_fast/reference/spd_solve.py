"""Reference of `spd_solve`: Cholesky solutions of small symmetric positive definite systems."""

from __future__ import annotations

import torch


def spd_solve(gram: torch.Tensor, rhs: torch.Tensor, ridge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve (gram + ridge I) z = rhs for each system of the batch.

    Returns the solutions [b, u, m] and the order of the first leading minor that is not positive definite, [b] int32
    (0 where the factorisation succeeded, as in `torch.linalg.cholesky_ex`).
    """
    system = gram.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, info = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve(rhs, factor), info
