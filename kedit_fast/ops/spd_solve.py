"""Small symmetric positive definite systems: the u x u solve of every closed-form edit."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.errors import SolveError
from kedit_fast.ops._checks import (
    describe,
    require,
    require_dtype,
    require_finite_number,
    require_no_grad,
    require_same_device,
)
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import spd_solve as reference

OP = "spd_solve"
LIBRARY.define(f"{OP}(Tensor gram, Tensor rhs, float ridge, str backend) -> Tensor")


def spd_solve(gram: torch.Tensor, rhs: torch.Tensor, ridge: float = 0.0, *, backend: str | None = None) -> torch.Tensor:
    """`(gram + ridge I)^-1 rhs` by Cholesky, for one system or a batch of them.

    Equivalent to `torch.linalg.solve(gram + ridge * torch.eye(u), rhs)`.

    Args:
        gram: [u, u] or [b, u, u] float32 or float64, symmetric; only its lower triangle is read.
        rhs: [u, m] or [b, u, m] of the same dtype.
        ridge: added to the diagonal.
        backend: "torch" or "auto".

    Returns:
        [u, m] or [b, u, m], stored by columns.

    Raises:
        SolveError: a system that is not positive definite, with the order of its first failing minor; or an input or a
            solution that is not finite.
        InvalidArgumentError: a wrong shape, dtype or device, or a ridge that is not finite.
        GradientError: an argument requires grad.

    Cost: u^3 / 3 + 2 u^2 m flops per system; on a GPU one synchronization, to read the outcome.

    Example:
        >>> keys, rhs = torch.randn(20, 5), torch.randn(5, 2)
        >>> gram = keys.T @ keys
        >>> solution = spd_solve(gram, rhs, ridge=0.1)
        >>> torch.allclose((gram + 0.1 * torch.eye(5)) @ solution, rhs, atol=1e-4)
        True
    """
    require_finite_number("ridge", ridge)
    require_no_grad(OP, gram=gram, rhs=rhs)
    return torch.ops.kedit_fast.spd_solve(gram, rhs, float(ridge), backend or "")


def _check(gram: torch.Tensor, rhs: torch.Tensor) -> None:
    require(
        gram.ndim in (2, 3) and gram.shape[-1] == gram.shape[-2],
        lambda: f"gram must be [u, u] or [b, u, u]; got {describe(gram)}",
    )
    fits = rhs.ndim == gram.ndim and rhs.shape[:-1] == gram.shape[:-1]
    require(fits, lambda: f"rhs must be {[*gram.shape[:-1], 'm']}; got {describe(rhs)}")
    require_dtype("gram", gram, (torch.float32, torch.float64))
    require_dtype("rhs", rhs, (gram.dtype,))
    require_same_device(gram=gram, rhs=rhs)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(gram: torch.Tensor, rhs: torch.Tensor, ridge: float, backend: str) -> torch.Tensor:
    _check(gram, rhs)
    batched = gram.ndim == 3
    systems, sides = (gram, rhs) if batched else (gram[None], rhs[None])
    solution, info = dispatch(OP, backend, (gram, rhs), systems, sides, ridge)
    if gram.numel() and rhs.numel() and not bool(torch.isfinite(solution.sum()) & (info == 0).all()):
        _explain_failure(gram, rhs, solution, info, batched)
    return solution if batched else solution[0]


def _explain_failure(
    gram: torch.Tensor, rhs: torch.Tensor, solution: torch.Tensor, info: torch.Tensor, batched: bool
) -> None:
    """Raise the SolveError that says what is wrong with a system, if anything is."""
    for name, tensor in (("gram", gram.tril()), ("rhs", rhs)):
        if not bool(torch.isfinite(tensor).all()):
            raise SolveError(f"{OP}: {name} has values that are not finite")
    failed = torch.nonzero(info)
    if failed.numel():
        which = int(failed[0])
        system = f"system {which}: " if batched else ""
        raise SolveError(
            f"{OP}: {system}not positive definite, the leading minor of order {int(info[which])} of "
            f"{gram.shape[-1]} failed; add a ridge or merge keys that are alike"
        )
    if not bool(torch.isfinite(solution).all()):  # otherwise only the sum overflowed
        raise SolveError(f"{OP}: the solution is not finite")


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(gram: torch.Tensor, rhs: torch.Tensor, ridge: float, backend: str) -> torch.Tensor:
    _check(gram, rhs)
    return rhs.new_empty(*rhs.shape[:-2], rhs.shape[-1], rhs.shape[-2]).mT  # by columns, as LAPACK leaves it


register(Implementation(OP, "torch", reference.spd_solve))
