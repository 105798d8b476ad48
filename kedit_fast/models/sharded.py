"""Tensor-parallel models: every process holds a part of each large matrix, and all run every pass together.

transformers makes them with `tp_plan="auto"` under torchrun. The matrices are DTensors; an edited one, W [out, in], is
split over its inputs: a process holds W[:, begin:end], and sees in a pass its share k[begin:end] of each key. What
edits need whole is gathered, and is the same in every process: keys, the head's matrix once per view, a matrix whose
norm is wanted. What is written is the process's own columns of the update. Every function here that gathers must be
called in all processes, with the same arguments.
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.support import process_group

DTensor: Any
Shard: Any
try:
    from torch.distributed.tensor import DTensor, Shard
except ImportError:  # a torch without torch.distributed has no such tensors
    DTensor = Shard = None


def is_split(tensor: Any) -> TypeGuard[Any]:
    """Whether a tensor is one process's part of a tensor that several hold together."""
    return DTensor is not None and isinstance(tensor, DTensor)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes hold a model together, so that each pass needs all of them."""
    return any(map(is_split, model.parameters()))


def work_share(model: torch.nn.Module) -> tuple[int, int]:
    """Which part of the work on many prompts or texts this process takes, of how many parts.

    That is its rank and the number of processes; (0, 1), all of the work, where they hold the model together.
    """
    return (0, 1) if is_sharded(model) else process_group.world()


def agreed_minimum(model: torch.nn.Module, number: int) -> int:
    """The smallest of the processes' numbers (bytes that are free), where they hold the model together.

    What follows from it decides how many passes are run, so it must be the same in all of them.
    """
    return min(process_group.gather(number)) if is_sharded(model) else number


def require_whole_world(model: torch.nn.Module) -> None:
    """Raise UnsupportedModelError unless a model is whole, or split over the inputs of layers by all processes alone.

    Cost: a look at every parameter.
    """
    for name, parameter in model.named_parameters():
        if not is_split(parameter):
            continue
        mesh = parameter.device_mesh
        if mesh.ndim != 1 or mesh.size() != process_group.world()[1]:
            raise UnsupportedModelError(
                f"{name} is split over {mesh.size()} processes in {mesh.ndim} dimensions, and "
                f"{process_group.world()[1]} are running: a tensor-parallel model is edited by exactly the processes "
                "that hold it (no copies for other data, no stages of a pipeline beside them)"
            )
    if (getattr(model, "_tp_size", None) or 1) > 1 and not is_sharded(model):
        raise UnsupportedModelError(
            f"the model is split over {getattr(model, '_tp_size', None)} processes, but this version of transformers "
            "gives its parts as plain tensors, which do not say what they are parts of: use a version that gives "
            "DTensors (4.51 to 5.0, or 5.23)"
        )


def splits_inputs(weight: torch.Tensor) -> bool:
    """Whether a matrix that is stored [out, in] is split over its inputs, and in no other way."""
    return (
        is_split(weight)
        and weight.ndim == 2
        and len(weight.placements) == 1
        and type(weight.placements[0]) is Shard  # its subclasses interleave
        and weight.placements[0].dim % 2 == 1
    )


def columns(weight: torch.Tensor) -> slice | None:
    """The inputs whose weights this process holds, of a matrix [out, in]; None for a whole matrix."""
    if not is_split(weight):
        return None
    mesh, size = weight.device_mesh, weight.shape[1]
    part = -(-size // mesh.size())  # as torch.chunk: the last parts may be shorter
    begin = min(size, part * mesh.get_local_rank())
    return slice(begin, min(size, begin + part))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, a view on its memory; a whole tensor as it is."""
    return tensor.to_local() if is_split(tensor) else tensor


def like(weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A tensor split as `weight` is, from this process's part of it; where `weight` is whole, the part as it is."""
    if not is_split(weight):
        return part
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all processes, in memory of its own; a whole tensor as it is.

    Cost: the other parts are received; the bytes of the whole.
    """
    return tensor.detach().full_tensor() if is_split(tensor) else tensor


def whole_inputs(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Inputs [..., in] of a layer from this process's share of them [..., end - begin]; where it has all, as they are.

    Args:
        states: the layer's input, as a hook sees it.
        weight: the layer's matrix [out, in].

    Cost: the shares of the other processes are received.
    """
    if is_split(states):  # older versions of transformers
        return states.full_tensor()
    held = columns(weight)
    if not is_split(weight) or held is None or states.shape[-1] != held.stop - held.start:
        return states
    shape = (*states.shape[:-1], weight.shape[1])
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(
        states.contiguous(), weight.device_mesh, [Shard(len(shape) - 1)], run_check=False, shape=shape, stride=stride
    )
    return parts.full_tensor()


def elements(tensor: torch.Tensor, where: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Some elements [n] of a tensor, by their index [n] in each of its dimensions.

    Cost: where processes hold the tensor together, each sends n numbers, or all of its part where it interleaves.
    """
    if not is_split(tensor) or [type(placement) for placement in tensor.placements] != [Shard]:
        return whole(tensor)[tuple(index.to(tensor.device) for index in where)]
    part, dim = tensor.to_local(), tensor.placements[0].dim % tensor.ndim
    length = -(-tensor.shape[dim] // tensor.device_mesh.size())
    index = list(where)
    index[dim] = where[dim] - length * tensor.device_mesh.get_local_rank()
    here = (index[dim] >= 0) & (index[dim] < part.shape[dim])
    values = torch.zeros(len(here), dtype=torch.float64)
    values[here] = part[tuple(i[here].to(part.device) for i in index)].double().cpu()
    process_group.sum_(values)
    return values.to(tensor.dtype)


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors, on the host; empty in all processes but the first.

    Cost: the first process needs memory for the whole model, the others for one of its tensors at a time.
    """
    is_first = process_group.world()[0] == 0
    tensors = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if is_first:
            tensors[name] = gathered.detach().cpu()
    return tensors


def with_state(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A model of this process alone, of the class and configuration of `model`, with these tensors as its own."""
    config = copy.deepcopy(model.config)
    vars(config).pop("distributed_config", None)  # it would ask for processes when the model is loaded
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(tensors, assign=True)
    plain.tie_weights()
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:  # by which names it is saved
        plain._weight_conversions = conversions
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()
