"""Tensors of a CPU that say they are on other devices, and are refused where tensors of two devices meet.

A model spread over several GPUs can be edited only where code brings indices and states to the device of what they
meet; this shows where it does not, without a GPU. Kernels see CPU tensors.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICES = (torch.device("xpu", 0), torch.device("xpu", 1))
_HOST = torch.device("cpu")
_BY_INDEX = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.index_put_, torch.Tensor.index_put)
_FACTORIES = (torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.arange, torch.empty, torch.eye,
              torch.linspace, torch.randn)  # fmt: skip


def place(tensor: torch.Tensor) -> torch.device | None:
    """Where a tensor says that it is; None for one that came past the mode, which may meet any."""
    return vars(tensor).get("_place")


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor, which says from now on that it is on `device`."""
    tensor._place = device
    return tensor


class Places(TorchFunctionMode):
    """Keeps track of devices and raises as torch does where they do not fit."""

    def __init__(self):
        super().__init__()
        self.atomics = 0  # additions by an index with repetitions, which a GPU makes in any order

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return place(args[0]) or _HOST
        if name == "to" and isinstance(args[0], torch.Tensor):
            return self._to(args[0], [*args[1:], *(kwargs.get(key) for key in ("device", "dtype", "other"))])
        if name == "cpu":
            return put(args[0].clone(), _HOST)
        if function is torch.autograd.grad:
            found, inputs = function(*args, **kwargs), kwargs.get("inputs", args[1])
            inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
            return tuple(g if g is None else put(g, place(t)) for g, t in zip(found, inputs, strict=True))
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = "cpu"
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if name != "copy_":
            self._require_one_place(function, tensors)
        if name in ("index_add", "index_add_") and args[2].unique().numel() < args[2].numel():
            self.atomics += place(args[0]) in DEVICES
        result = function(*args, **kwargs)
        if target is None:
            known = [place(t) for t in tensors if place(t) is not None]
            target = known[0] if known else _HOST if function in _FACTORIES else None
        known = {id(t) for t in tensors}
        if target is not None:
            tree_map(lambda t: put(t, torch.device(target)) if isinstance(t, torch.Tensor) and id(t) not in known
                     else t, result)  # fmt: skip
        return result

    @staticmethod
    def _to(tensor, wanted):
        target, rest = place(tensor), []
        for one in wanted:
            if isinstance(one, torch.device | str):
                target = torch.device(one)
            elif isinstance(one, torch.Tensor):
                target, rest = place(one) or target, [one.dtype]
            elif isinstance(one, torch.dtype):
                rest = [one]
        moved = tensor.to(*rest) if rest else tensor
        if moved is tensor:
            if target == place(tensor):
                return tensor
            moved = tensor.clone()
        return moved if target is None else put(moved, target)

    @staticmethod
    def _require_one_place(function, tensors):
        here = {place(t) for t in tensors if t.ndim > 0} - {None}
        if function in _BY_INDEX:
            here = {place(tensors[0])} | (here - {_HOST}) if place(tensors[0]) is not None else set()
        if len(here) > 1:
            raise RuntimeError(f"{function.__name__}: tensors on different devices, {sorted(map(str, here))}")


def spread(model: torch.nn.Module, blocks, first: int, head: tuple[torch.nn.Module, ...]) -> torch.nn.Module:
    """A model whose blocks from `first` on, and the modules `head`, are on the second device; hooks move the states."""
    for parameter in (*model.parameters(), *model.buffers()):
        put(parameter, DEVICES[0])
    for index, module in enumerate((*blocks, *head)):
        device = DEVICES[int(index >= first)]
        for parameter in (*module.parameters(), *module.buffers()):
            put(parameter, device)

        def move(module, args, kwargs, device=device):
            return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, (args, kwargs))

        module.register_forward_pre_hook(move, with_kwargs=True)
    return model
