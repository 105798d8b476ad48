"""Weights that accelerate brings to a device for a pass alone, where they are between passes: on the host, or on disk.

A hook on the module, or on one around it, has a mapping of their names. Of a weight on the host it holds the tensor
that every pass copies and that save_pretrained writes, so what is written into that one lasts. One on disk is read anew
for every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def hooks_on(model: torch.nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """accelerate's hooks on the modules that contain a tensor, from the model down, each with the tensor's name there.

    Args:
        model: the model.
        name: of the tensor in its state dict.
    """
    module: Any = model
    parts = name.split(".")
    for depth, part in enumerate(("", *parts[:-1])):
        module = getattr(module, part) if part else module
        for hook in _own_hooks(module):
            yield ".".join(parts[depth:]), hook


def _own_hooks(module: Any) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", () if hook is None else (hook,)))


def device_of(module: Any, name: str = "weight") -> torch.device:
    """The device that a module with a weight runs on: the weight's, or where accelerate brings an offloaded one.

    Args:
        module: the module.
        name: the name of its weight.
    """
    weight = getattr(module, name)
    if weight.device.type != "meta":
        return weight.device
    devices = [getattr(hook, "execution_device", None) for hook in _own_hooks(module)]
    device = next((device for device in devices if device is not None), weight.device)  # meta: without values
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def offloads(hook: Any) -> bool:
    """Whether a hook loads weights for a pass and drops them after it."""
    return getattr(hook, "weights_map", None) is not None


def fetched(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The values of an offloaded tensor, from the host or read from disk; None where no hook has them."""
    for inner, hook in reversed(list(hooks_on(model, name))):
        if offloads(hook):
            return hook.weights_map[inner]
    return None


def on_host(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The tensor on the host that passes take an offloaded weight from; None for one on disk. Nothing is read."""
    for inner, hook in reversed(list(hooks_on(model, name))):
        if offloads(hook):
            return _held(hook.weights_map, inner)
    return None


def _held(weights: Any, name: str) -> torch.Tensor | None:
    """A tensor that a mapping of accelerate holds in memory: below prefixes, and beside what it reads from files."""
    while hasattr(weights, "prefix"):
        weights, name = weights.dataset, weights.prefix + name
    weights = getattr(weights, "state_dict", weights)
    tensor = weights.get(name) if isinstance(weights, Mapping) else None
    return tensor.detach() if isinstance(tensor, torch.Tensor) else None
