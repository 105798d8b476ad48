"""Memories of WISE as one matrix in the weights: always on, without a route."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_fast.errors import SideMemoryError
from kedit_fast.memories.attach import matrix_identity
from kedit_fast.memories.memory import ActivationMemory, SideMemory
from kedit_fast.models.view import linear_weight
from kedit_fast.patches.patch import Patch, Target
from kedit_fast.solver.low_rank import DenseUpdate
from kedit_fast.solver.merging import merged
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.torch_state import plain_torch


@plain_torch()
def merge(
    memory: SideMemory,
    model: torch.nn.Module,
    rule: str = "ties",
    density: float = 0.53,
    coefficients: Sequence[float] | None = None,
) -> Patch:
    """A patch that writes the merge of a memory's matrices over W_0.

    With it the edits answer every prompt, and the locality that routing gives is lost: measure it. What it is good for
    is a model that has to run where nothing routes.

    Args:
        memory: an ActivationMemory; the other kinds depend on the prompt and are refused.
        model: has W_0; it is not changed, and the memory may be attached to it.
        rule: "ties", "sign", "magnitude", "magnitude_norm" or "mean"; see `kedit_fast.solver.merging.merged`.
        density: share of each memory's entries that the rules with a trim take.
        coefficients: of each memory; None for the same of all, 1 in sum.

    Raises:
        SideMemoryError: another kind, an empty memory, or a model with another matrix.
        MethodError: an unknown rule, or another number of coefficients.

    Cost: the sort of each matrix's entries; the patch holds a matrix.
    """
    if not isinstance(memory, ActivationMemory):
        raise SideMemoryError(
            f"a memory of the kind {memory.kind!r} puts out something else for each prompt, which no matrix does: only "
            "one of the kind 'activation' (WISE) can be merged into the weights"
        )
    if memory.empty:
        raise SideMemoryError("the memory is empty: there is nothing to merge")
    if matrix_identity(model, memory.module)["original"] != memory.original:
        raise SideMemoryError(f"{memory.module} is not the matrix that the memory was made beside")
    weight, _ = linear_weight(model, memory.module)
    shares = [1 / memory.entries] * memory.entries if coefficients is None else list(coefficients)
    matrices = [matrix.to(weight.device) for matrix in memory.weights]
    result = merged(weight, matrices, shares, density, rule)
    update = DenseUpdate(result - weight.to(result))
    left = sha256(update.apply_(weight.clone()))
    target = Target(memory.original, left, memory.dtype, memory.transposed)
    configuration = {**memory.configuration, "merge": {"rule": rule, "density": density, "coefficients": shares}}
    return Patch({memory.module: update}, {memory.module: target}, memory.method, configuration, memory.requests)
