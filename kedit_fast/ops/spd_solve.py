"""Small symmetric positive definite systems: the u x u solve of every closed-form edit."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register, requested, select
from kedit_fast.errors import SolveError
from kedit_fast.ops.arguments import (
    LIBRARY,
    describe,
    require,
    require_dtype,
    require_finite,
    require_no_grad,
    require_same_device,
    run_stated,
)
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
        SolveError: a system that is not positive definite, with the order of its first failing minor; or input or
            solution that is not finite.
        InvalidArgumentError: a wrong shape, dtype or device, or a ridge that is not finite.
        GradientError: an argument requires grad.

    Cost: u^3 / 3 + 2 u^2 m flops a system; on a GPU one synchronisation to read the outcome.
    """
    require_finite("ridge", ridge)
    require_no_grad(OP, gram=gram, rhs=rhs)
    return torch.ops.kedit_fast.spd_solve(gram, rhs, float(ridge), backend or "")


def _check(gram, rhs) -> None:
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
def _run(gram, rhs, ridge, backend):
    _check(gram, rhs)
    chosen = select(OP, requested(backend or None), gram, rhs)
    batched = gram.ndim == 3
    solution, info = run_stated(chosen, gram if batched else gram[None], rhs if batched else rhs[None], ridge)
    if gram.numel() and rhs.numel() and not bool(torch.isfinite(solution.sum()) & (info == 0).all()):
        _explain_failure(gram, rhs, solution, info, batched)
    return solution if batched else solution[0]


def _explain_failure(gram, rhs, solution, info, batched) -> None:
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
    if not bool(torch.isfinite(solution).all()):  # otherwise only its sum is too large for the dtype
        raise SolveError(f"{OP}: the solution is not finite")


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(gram, rhs, ridge, backend):
    _check(gram, rhs)
    return rhs.new_empty(*rhs.shape[:-2], rhs.shape[-1], rhs.shape[-2]).mT  # by columns, as LAPACK leaves it


register(Implementation(OP, "torch", reference.spd_solve))
