"""Edited matrices that are swapped into a model in memory, and out of it again."""

from __future__ import annotations

import torch

from kedit_fast.errors import InvalidArgumentError, PatchError, UnsupportedModelError
from kedit_fast.models.sharded import is_split
from kedit_fast.models.view import linear_weight
from kedit_fast.support.timing import synchronize
from kedit_fast.support.torch_state import plain_torch

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path -> W without and with the edits, both [out, in], or [E, out, in] of experts."""


class Prepared:
    """Matrices that are ready to be swapped into a model; `Patch.prepare` makes it."""

    def __init__(self, model: torch.nn.Module, matrices: Matrices):
        self._model, self._matrices = model, matrices

    @plain_torch(leave_inference_mode=False)
    def swap_(self) -> Applied:
        """Copy the edited matrices into the model, all or none.

        A model in use has to wait only for a comparison and a copy of these matrices.

        Returns:
            an object whose `revert_()` restores the model bit for bit.

        Raises:
            PatchError: a matrix has changed since `prepare`, or the model was moved or cast; nothing is written.
        """
        pairs = {
            name: (_unchanged_weight(self._model, name, original, "prepared"), edited)
            for name, (original, edited) in self._matrices.items()
        }
        applied = Applied(self._model, self._matrices)
        try:
            _copy(pairs)
        except BaseException:
            applied.revert_(force=True)
            raise
        return applied


class Applied:
    """Edits that are in a model, with the matrices it had before."""

    def __init__(self, model: torch.nn.Module, matrices: Matrices):
        self._model, self._matrices = model, matrices

    @plain_torch(leave_inference_mode=False)
    def revert_(self, force: bool = False) -> None:
        """Restore the matrices bit for bit; a second call does nothing.

        Args:
            force: restore also a matrix that something else has changed since; that change is lost.

        Raises:
            PatchError: something else has changed a matrix since, or the model was cast; nothing is written.
        """
        pairs = {}
        for name, (original, edited) in self._matrices.items():
            if force:
                weight, _ = edited_weight_of(self._model, name)
            else:
                weight = _unchanged_weight(self._model, name, edited, "applied")
            if weight.dtype != original.dtype:
                raise PatchError(f"{name} is {weight.dtype} now, the patch was applied to {original.dtype}")
            pairs[name] = (weight, original)
        _copy(pairs)
        self._matrices = {}


def edited_weight_of(model: torch.nn.Module, name: str) -> tuple[torch.Tensor, bool]:
    """A module's weight as [out, in], and whether it is stored transposed; raises PatchError where it has none.

    Of experts, the stack [E, out, in] of their weights, and whether each is stored so.
    """
    try:
        weight, transposed = linear_weight(model, name)
    except (InvalidArgumentError, UnsupportedModelError) as error:
        raise PatchError(str(error)) from None
    if is_split(weight):
        raise PatchError(
            f"{name} is split over processes: patches go into whole models. Apply it to the folder, and load that"
        )
    return weight, transposed


def _unchanged_weight(model: torch.nn.Module, name: str, expected: torch.Tensor, when: str) -> torch.Tensor:
    """The model's matrix; raises PatchError when it is not `expected`."""
    weight, _ = edited_weight_of(model, name)
    if weight.dtype != expected.dtype or not torch.equal(weight, expected.to(weight.device)):
        raise PatchError(f"{name} has changed since the patch was {when}: do that again, or take the change back first")
    return weight


@torch.no_grad()
def _copy(pairs: Matrices) -> None:
    """Copy the second of each pair into the first; on GPUs, no other work overlaps with it."""
    devices = {weight.device for weight, _ in pairs.values()}
    for device in devices:
        synchronize(device)
    for weight, value in pairs.values():
        weight.copy_(value)
    for device in devices:
        synchronize(device)
