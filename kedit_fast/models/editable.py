"""What can be edited: a plain causal language model whose edited matrices have lasting memory of their own.

Everything else is refused before anything is computed, by an error that names it and says what to do. What shows only
in a forward pass (a module that does not run, or not on all tokens) is checked by `models.forward.require_passes`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.offloaded import hooks_on, offloads, on_host
from kedit_fast.models.routes import require_no_memory
from kedit_fast.models.sharded import local
from kedit_fast.models.weight_names import is_experts_path, weight_name_of

if TYPE_CHECKING:
    from kedit_fast.models.view import ModelView

_MAPS = Path("/proc/self/maps")  # Linux: the memory of this process
_ADAPTERS = ("peft.", "loralib.", "adapters.methods.")  # packages whose modules replace modules of a model
_MERGE = (
    "merge it first: peft's merge_and_unload() gives the model with the adapter in its weights, and so does loading an "
    "adapter's folder with load_model(..., merge_adapter=True) or --merge-adapter"
)
_INFERENCE = (
    "was made in torch.inference_mode() and can never be written outside it: load the model outside "
    "torch.inference_mode()"
)
# (attribute that torch.nn.utils leaves beside a weight which it recomputes in every pass, what makes it permanent).
_RECOMPUTED = (
    ("parametrizations", "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"),
    ("weight_mask", "torch.nn.utils.prune.remove(module, 'weight')"),
    ("weight_g", "torch.nn.utils.remove_weight_norm(module)"),
    ("weight_u", "torch.nn.utils.remove_spectral_norm(module)"),
)


def plain_model(model: Any) -> torch.nn.Module:
    """The causal language model itself; of a model that torch.compile wrapped, the one inside, with the same weights.

    Raises:
        UnsupportedModelError: it is no model of transformers but, for example, a path, a pipeline, None, a wrapper of
            torch or a PeftModel; the message says which.
    """
    model = _uncompiled(model)
    kind = type(model).__name__
    if isinstance(model, str | os.PathLike):
        raise UnsupportedModelError(
            f"the model is the path {str(model)!r}: load it first, with kedit_fast.models.loading.load_model or with "
            "AutoModelForCausalLM.from_pretrained"
        )
    if not isinstance(model, torch.nn.Module):
        hint = "load one with AutoModelForCausalLM.from_pretrained"
        if isinstance(getattr(model, "model", None), torch.nn.Module):
            hint = "pass its .model, and its .tokenizer"
        elif isinstance(model, tuple | list):
            hint = "pass its parts, the model and the tokenizer, one by one"
        elif isinstance(model, type):
            kind, hint = f"class {model.__name__}", "pass a model of it"
        raise UnsupportedModelError(f"a {kind} is no causal language model: {hint}")
    if is_adapter(model):
        raise UnsupportedModelError(f"the model is wrapped in an adapter ({kind}): {_MERGE}")
    if model._modules.get("module") is not None and not hasattr(type(model), "get_output_embeddings"):
        raise UnsupportedModelError(f"the model is wrapped in a {kind}: pass the model inside, model.module")
    if "_fsdp_wrapped_module" in model._modules:
        raise UnsupportedModelError(f"the model is sharded ({kind}): edit it whole, before it is wrapped")
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(
            f"a {kind} has no config and output embeddings as models of transformers do: load it with "
            "AutoModelForCausalLM"
        )
    return model


def require_editable(view: ModelView, paths: Iterable[str]) -> None:
    """Raise UnsupportedModelError unless what is written into the modules `paths` stays there and is used by passes.

    Refused by name: an attached memory, unless the caller has suspended it (`models.routes`); adapters; compiled
    modules; weights made in inference mode; weights without values, offloaded or sharded where they are needed; edited
    weights that a hook recomputes, that other modules share, that overlap themselves or lie in read-only memory.
    """
    model = view.model
    require_no_memory(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(f"the model has an adapter loaded: {_MERGE}")
    for name, module in model.named_modules(remove_duplicate=False):
        if is_adapter(module):
            raise UnsupportedModelError(f"{name} is an adapter's {type(module).__name__}: {_MERGE}")
        if module is not model and _is_compiled(module):
            raise UnsupportedModelError(
                f"{name} is compiled: what torch.compile made of it does not see what an edit looks at. Edit the model "
                "before its modules are compiled, or put each module's _orig_mod back"
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_inference():
            raise UnsupportedModelError(f"{name} {_INFERENCE}")
        if parameter.device.type == "meta" and not any(offloads(hook) for _, hook in hooks_on(model, name)):
            raise UnsupportedModelError(f"{name} has no values: the model is not loaded")
    require_own(model, paths)
    _ = view.head  # refuses by name


def require_own(model: torch.nn.Module, paths: Iterable[str]) -> None:
    """Raise UnsupportedModelError unless each module's weight is a tensor in writable memory of its own.

    The path of stacked experts (`models.weight_names`) stands for their stack.

    Memory that another tensor shares, or that a hook overwrites, is not its own.
    """
    model = _uncompiled(model)
    places = [(name, tensor.device, *_span(tensor)) for name, tensor in _tensors(model)]
    maps = _read_only()
    for path in paths:
        _require_own(model, path, places, maps)


def _require_own(
    model: torch.nn.Module,
    path: str,
    places: list[tuple[str, torch.device, int, int]],
    maps: list[tuple[int, int]],
) -> None:
    name = weight_name_of(path)
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    if is_adapter(module):
        raise UnsupportedModelError(f"{path} is an adapter's {type(module).__name__}: {_MERGE}")
    weight = module._parameters.get(attribute, module._buffers.get(attribute))
    if weight is None:
        beside = {*module._parameters, *module._buffers, *module._modules}
        cure = "make the weight a parameter of the module"
        if not is_experts_path(path):
            cure = next((cure for mark, cure in _RECOMPUTED if mark in beside), cure)
        raise UnsupportedModelError(
            f"{name} is computed again in every pass (from {', '.join(sorted(n for n in beside if n != 'bias'))}), so "
            f"what an edit writes would be lost: {cure} first"
        )
    if weight.device.type == "meta":
        weight = on_host(model, name)
        if weight is None:
            raise UnsupportedModelError(
                f"{name} is offloaded to disk, so what an edit writes would be lost: load the model with this layer on "
                'a device or the host (without device_map, or with more max_memory for it or for "cpu")'
            )
    weight = local(weight)
    if weight.is_inference():
        raise UnsupportedModelError(f"{name} {_INFERENCE}")
    if any(_moves(hook) for _, hook in hooks_on(model, name)):
        raise UnsupportedModelError(
            f"{name} is offloaded, and moves to another place in every pass, so what an edit writes would be lost: "
            "take the hook of cpu_offload_with_hook off (hook.remove()), or use cpu_offload"
        )
    cure = f"give the module a weight of its own, torch.nn.Parameter(module.{attribute}.clone())"
    if _overlaps_itself(weight):
        raise UnsupportedModelError(
            f"{name} has strides {tuple(weight.stride())}, so one number stands for several entries (expand?): {cure}"
        )
    begin, end = _span(weight)
    for other, device, first, last in places:
        if other != name and device == weight.device and first < end and begin < last:
            raise UnsupportedModelError(f"{name} and {other} share memory, so an edit of one changes the other: {cure}")
    if weight.device.type == "cpu" and any(first < end and begin < last for first, last in maps):
        raise UnsupportedModelError(
            f"{name} lies in read-only memory (a file mapped for reading?): copy it, torch.nn.Parameter(weight.clone())"
        )


def _overlaps_itself(weight: torch.Tensor) -> bool:
    """Whether one number in memory stands for several entries."""
    reach = 1  # of the dimensions with smaller strides
    for size, stride in sorted(zip(weight.shape, weight.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride < reach:
            return weight.numel() > 0
        reach = max(reach, size * stride)
    return False


def _uncompiled(model: Any) -> Any:
    while type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, in this process; of those that are offloaded to the host, the tensors there."""
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        held = on_host(model, name) if tensor.device.type == "meta" else None
        yield name, local(tensor if held is None else held)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's first byte and the one after its last; equal if it has no memory."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.numel() == 0:
        return 0, 0
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _read_only() -> list[tuple[int, int]]:
    """Ranges of this process's memory that cannot be written; none if the system does not say."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    ranges = []
    for line in lines:
        span, rights = line.split()[:2]
        if "w" not in rights:
            first, last = span.split("-")
            ranges.append((int(first, 16), int(last, 16)))
    return ranges


def is_adapter(module: torch.nn.Module) -> bool:
    """Whether a module is one that an adapter put in place of a model's own."""
    children = {*module._modules, *module._parameters}
    return "lora_A" in children or any(cls.__module__.startswith(_ADAPTERS) for cls in type(module).__mro__)


def _is_compiled(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    wrapped = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
    return type(module).__name__ == "OptimizedModule" or bool(getattr(module, "_compiled_call_impl", None) or wrapped)


def _moves(hook: Any) -> bool:
    """Whether a hook moves a whole model to another device for a pass, so that its weights are elsewhere after it."""
    return type(hook).__name__ == "CpuOffload" and torch.device(hook.execution_device).type != "cpu"
