"""AlphaEdit's projector file: one float32 tensor P [layers, d, d] saved by torch, in the order of the layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.support.files import replacing
from kedit_fast.support.matrix_bits import same_bits
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

FILE = "null_space_project.pt"


@plain_torch()
def load_projector(
    path: str | os.PathLike, layers: Sequence[int], l2: float = 10.0, trust: bool = False
) -> dict[int, NullSpace]:
    """Null spaces of `layers` from a projector file of AlphaEdit or EasyEdit.

    Args:
        path: the file; it is read with `weights_only=True`, so that no code in it is run.
        layers: the layers in the file, in its order, counted from 0.
        l2: ridge of the solve, the published `L2`.
        trust: the file does not record its model; True asserts that it is the one to be edited.

    Raises:
        StatisticsError: `trust` is not set; or the file is damaged, has another number of layers, or holds a matrix
            that is not a projection.

    Cost: one symmetric eigendecomposition per layer, about 9 d^3 flops in fp64.
    Source: the file that AlphaEdit's `evaluate.py` and EasyEdit's `AlphaEdit_main.py` write.
    """
    if not trust:
        raise StatisticsError(
            f"{path} does not say which model it was made from: pass --trust (trust=True) if it is this one"
        )
    try:
        stack = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StatisticsError(f"there is no projector file {path}") from None
    except Exception as error:  # whatever a damaged or foreign pickle makes the reader raise
        raise StatisticsError(f"{path} is damaged or holds more than tensors: {first_line(error)}") from error
    layers = list(layers)
    if not isinstance(stack, torch.Tensor) or stack.ndim != 3 or stack.dtype not in (torch.float32, torch.float64):
        content = type(stack).__name__
        if isinstance(stack, torch.Tensor):
            content = f"{list(stack.shape)} {stack.dtype}"
        raise StatisticsError(f"{path} must hold one float32 tensor [layers, d, d]; it holds {content}")
    if len(stack) != len(layers):
        raise StatisticsError(f"{path} has {len(stack)} layers, the edit has {len(layers)}: {layers}")
    spaces = {}
    for layer, matrix in zip(layers, stack, strict=True):
        try:
            spaces[layer] = NullSpace.from_projection(matrix, l2)
        except (StatisticsError, InvalidArgumentError) as error:
            raise StatisticsError(f"{path}, layer {layer}: {error}") from None
    return spaces


@plain_torch()
def save_projector(path: str | os.PathLike, spaces: Mapping[int, NullSpace]) -> None:
    """Write null spaces of one size in the order of their layers, as AlphaEdit reads them.

    Raises:
        StatisticsError: the file cannot be written; an older file stays.
    """
    sizes = {space.size for space in spaces.values()}
    if len(sizes) != 1:
        raise InvalidArgumentError(f"the layers have different sizes: {sorted(sizes)}")
    (size,) = sizes
    stack = torch.empty(len(spaces), size, size, dtype=torch.float32, device="cpu")
    for matrix, layer in zip(stack, sorted(spaces), strict=True):
        space = spaces[layer]
        matrix.copy_(space.project(torch.eye(size, dtype=torch.float64, device=space.device)))
    with replacing(path, StatisticsError) as part:
        with part.open("wb") as file:  # given a path, torch would store its (temporary) name in the file
            torch.save(stack, file)
        if not same_bits(torch.load(part, weights_only=True), stack):
            raise StatisticsError(f"cannot write {path}: it is read back as something else")
