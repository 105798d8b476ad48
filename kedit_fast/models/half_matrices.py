"""bfloat16 copies of blocks' matrices, for passes with deltas whose rounding may be larger than fp32's.

Inside `installed()` the linear layers of the chosen blocks multiply in bfloat16: their inputs and gradients are rounded
to it, and what they put out goes back to the dtype that it came in. All else stays as it is: residual sums, norms,
softmax, gates, deltas, the head. The model's own weights are not touched, and no gradient of them is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.experts import is_mixture
from kedit_fast.models.patching import replaced_forwards
from kedit_fast.models.view import ModelView


def half_bytes(view: ModelView, first: int) -> int:
    """Bytes of the copies of blocks from `first` on; 0 where their matrices are bfloat16 already."""
    return sum(2 * weight.numel() for _, weight in _matrices(view, first).values() if weight.dtype != torch.bfloat16)


def require_matrices(view: ModelView, first: int) -> list[torch.device]:
    """The devices of the matrices of blocks from `first` on, each once.

    Raises:
        UnsupportedModelError: a model that is quantized, a mixture or split over processes, or an offloaded matrix.
    """
    if view.is_sharded:
        raise UnsupportedModelError("processes hold the model together, and its matrices are in parts")
    if getattr(view.model.config, "quantization_config", None):
        raise UnsupportedModelError("it is quantized, and its matrices are small already")
    if is_mixture(view.base):
        raise UnsupportedModelError("it is a mixture of experts, whose matrices are no linear layers")
    devices: dict[torch.device, str] = {}
    for path, weight in _matrices(view, first).values():
        if weight.device.type == "meta":
            raise UnsupportedModelError(f"{path} is offloaded: load the model with this layer on a device")
        devices.setdefault(weight.device, path)
    return list(devices)


class HalfMatrices:
    """Copies of the matrices of blocks from `first` on. They take `half_bytes` as long as this object lives.

    Args:
        view: the model.
        first: the first block whose matrices are copied; none are past the last block.

    Cost: a copy of these matrices; those that are bfloat16 already are used as they are.
    """

    def __init__(self, view: ModelView, first: int):
        self._forwards = {
            module: _forward(weight.to(torch.bfloat16), type(module).__name__ != "Conv1D", module)
            for module, (_, weight) in _matrices(view, first).items()
        }

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the block the copies multiply. Backward passes need not be inside."""
        with replaced_forwards(self._forwards):
            yield


def _matrices(view: ModelView, first: int) -> dict[Any, tuple[str, torch.Tensor]]:
    """Linear modules of blocks from `first` on -> their path, and their weight as it is stored."""
    matrices = {}
    for layer in range(first, view.num_layers):
        block: torch.nn.Module = view.block(layer)
        for path, module in block.named_modules():
            if type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D":
                weight: Any = module.weight
                matrices[module] = f"{view.spec.blocks}.{layer}.{path}", weight.detach()
    return matrices


def _forward(matrix: torch.Tensor, is_out_first: bool, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward function of a linear layer with a copy of its matrix in bfloat16."""
    across = matrix.T if is_out_first else matrix  # [in, out]

    def forward(states: torch.Tensor) -> torch.Tensor:
        output = _Product.apply(states.to(across.device), across)
        return output if module.bias is None else output + module.bias.to(output.dtype)

    return forward


class _Product(torch.autograd.Function):
    """x M with x rounded to M's dtype, differentiable in x alone; result and gradient are in the dtype of x."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        ctx.matrix = matrix  # not saved as a tensor of the pass: all passes share it
        return (states.to(matrix.dtype) @ matrix).to(states.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return (gradient.to(ctx.matrix.dtype) @ ctx.matrix.T).to(gradient.dtype), None
