"""Shared experts: the MLP of a mixture that every token passes, beside the experts that a router chooses.

Its output is s(x) (W a + b) with activations a, and a gate s(x) = sigmoid(v . x) in some families (Qwen2-MoE), else 1.
So its last matrix is a linear layer whose key is s a. It can be a block of the stack of experts, or be edited alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.patching import replaced_forwards

_NAME = re.compile(r"shared_(experts?|mlp)")


@dataclass(frozen=True)
class SharedExpert:
    """The shared experts of one layer, which are one MLP."""

    path: str
    """Of the last linear layer in the model."""
    module: Any
    """The MLP."""
    last: Any
    """Its last linear layer, whose weight is edited."""
    gate: Any
    """The linear layer whose sigmoid multiplies what the MLP puts out; None for none."""

    @property
    def inputs(self) -> int:
        """m_s, the size of the activation that enters the last layer."""
        return self.last.in_features

    @property
    def weight(self) -> torch.Tensor:
        """[h, m_s], a view on the model's memory."""
        return self.last.weight.detach()

    def activations(self, states: torch.Tensor) -> torch.Tensor:
        """What enters the last layer, [n, m_s], of states [n, h] that enter the MLP.

        Raises:
            UnsupportedModelError: the MLP puts out something else than its last layer.
        """
        with replaced_forwards({self.last: _unchanged}):
            rows = self.module(states)
        if not isinstance(rows, torch.Tensor) or rows.shape != (len(states), self.inputs):
            raise UnsupportedModelError(
                f"the MLP around {self.path} puts out something else than its last layer: it cannot be a block of the "
                "stack of experts"
            )
        return rows

    def gates(self, states: torch.Tensor) -> torch.Tensor | None:
        """s [n] of states [n, h], in float32 (float64 of float64); None where all are 1."""
        return None if self.gate is None else gate_values(self.gate(states))[:, 0]


def gate_values(scores: torch.Tensor) -> torch.Tensor:
    """The sigmoid of what a gate's linear layer puts out, in float32 (float64 of float64)."""
    return (scores if scores.dtype == torch.float64 else scores.float()).sigmoid()


def _unchanged(states: torch.Tensor) -> torch.Tensor:
    return states


def with_shared_experts(spec: ArchSpec, block: torch.nn.Module, alone: bool) -> ArchSpec | None:
    """The spec of a mixture in which the shared experts of a block are edited, too, or alone.

    Args:
        spec: in which they are left as they are.
        block: a block with experts.
        alone: whether the experts that a router chooses are not edited.

    Returns:
        the spec; None where no linear layer ends a shared expert beside the others.
    """
    parent = spec.edit.rpartition(".")[0]
    if spec.mlp != parent or not parent:
        return None
    container = block.get_submodule(parent)
    for name, child in container.named_children():
        if not _NAME.fullmatch(name):
            continue
        last = _last_linear(child)
        if not last:
            continue
        path = f"{parent}.{name}.{last}"
        gate = getattr(container, f"{name}_gate", None)
        gated = f"{parent}.{name}_gate" if isinstance(gate, torch.nn.Linear) else ""
        if alone:
            return replace(spec, edit=path, transposed=False, shared_gate=gated)
        return replace(spec, shared=path, shared_gate=gated)
    return None


def is_shared_path(path: str) -> bool:
    """Whether a path leads into shared experts, by the name of a part.

    Example:
        >>> is_shared_path("mlp.shared_experts.down_proj"), is_shared_path("mlp.experts")
        (True, False)
    """
    return any(_NAME.fullmatch(part) for part in path.split("."))


def _last_linear(mlp: torch.nn.Module) -> str:
    """Path of the linear layer, inside an MLP, that takes what the others put out; "" if there is none."""
    linears = [(path, module) for path, module in mlp.named_modules() if isinstance(module, torch.nn.Linear)]
    widened = {module.out_features for _, module in linears}
    last = [
        path
        for path, module in linears
        if any(width in (module.in_features, 2 * module.in_features) for width in widened)
        and module.out_features in {other.in_features for _, other in linears if other is not module}
    ]
    return last[-1] if last else ""
