"""Models to disk: saved all or nothing, and read back before the folder appears."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors import safe_open

from kedit_fast.errors import KeditError
from kedit_fast.models.editable import plain_model
from kedit_fast.models.multimodal import bare_name, copy_processor_files, is_multimodal, source_of
from kedit_fast.models.offloaded import on_host
from kedit_fast.models.quantized import require_same_modules, saved_as_quantized
from kedit_fast.models.schemes import scheme_of
from kedit_fast.models.sharded import is_sharded, whole_state, with_state
from kedit_fast.support.files import new_folder, tensor_files
from kedit_fast.support.matrix_bits import same_bits
from kedit_fast.support.messages import first_line
from kedit_fast.support.process_group import from_all
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


@plain_torch()
def save_model(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike,
    overwrite: bool = False,
    write_beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model and its tokenizer so that from_pretrained loads them; all or nothing.

    Every tensor is read back and compared with the model's, bit for bit, before the folder appears. The
    processor's files of a multimodal model are copied from where it was loaded; a warning says if they are not there.

    Of a tensor-parallel model (`models.sharded`) all processes call this with the same arguments. The first one gets
    the whole model on its host and writes it.

    Args:
        model: what is written, of any dtype.
        tokenizer: its tokenizer.
        path: the folder.
        overwrite: replace a folder that exists.
        write_beside: called with the folder before it appears, for other files that belong to the model; by the process
            that writes.

    Raises:
        KeditError: the folder exists, or cannot be written; or it would not load as this model (adapters, modules that
            the model's class does not have, weights that save_pretrained drops or changes), by the tensor's name.
    """
    model = plain_model(model)
    if not is_sharded(model):
        _save(model, tokenizer, path, overwrite, write_beside)
        return
    tensors = whole_state(model)

    def save_whole() -> None:
        if tensors:
            _save(with_state(model, tensors), tokenizer, path, overwrite, write_beside)

    from_all(save_whole)


def _save(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike,
    overwrite: bool,
    write_beside: Callable[[Path], None] | None,
) -> None:
    _require_loadable(model)
    with new_folder(path, overwrite, KeditError) as work:
        try:
            with saved_as_quantized(model):
                on_host = _state_on_host(model)
                model.save_pretrained(work, **({} if on_host is None else {"state_dict": on_host}))
            tokenizer.save_pretrained(work)
            _read_back(model, work)
            if lost := _left_out(model, work):
                _log.warning(
                    "%s is in %s and will not be in %s: a %s has no place for it (%d such tensors)",
                    lost[0], source_of(model), path, type(model).__name__, len(lost),
                )  # fmt: skip
            if is_multimodal(model.config) and (problem := copy_processor_files(model, work)):
                _log.warning(
                    "the files of the processor are not in %s, so AutoProcessor may not load there: %s", path, problem
                )
            if write_beside is not None:
                write_beside(work)
        except (OSError, KeditError):
            raise
        except Exception as error:  # safetensors reports a full disk by an error type of its own
            raise KeditError(f"cannot write {path}: {first_line(error)}") from error


def _require_loadable(model: Any) -> None:
    """Raise KeditError if a saved model would lack tensors that its class has."""
    kind = type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False):
        raise KeditError(f"what is saved would be an adapter, not this {kind}: merge it first (merge_and_unload())")
    if getattr(model, "hf_quantizer", None) is not None:
        require_same_modules(model)
        return  # the names of its tensors depend on the files
    try:
        with torch.device("meta"):
            fresh = set(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception:  # a class that cannot be created without memory; `_read_back` still compares what was written
        return
    stored = set(_stored(model))
    if lost := fresh - stored:
        raise KeditError(
            f"what is saved would not load as this {kind}: it has no {min(lost)}. Merge adapters, make pruned or "
            "parametrized weights plain, take wrappers out, and save that"
        )
    if extra := stored - fresh:
        _log.warning("%s is saved, but from_pretrained will leave it out: a new %s has none", min(extra), kind)


def _stored(model: Any) -> dict[str, torch.Tensor]:
    """Parameters, persistent buffers and what quantizers store beside them, by name, past hooks on state_dict."""
    persistent = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    buffers = {name: t for name, t in model.named_buffers(remove_duplicate=False) if name in persistent}
    quantized = {
        f"{path}.{name}": tensor
        for path, module in model.named_modules(remove_duplicate=False)
        if (scheme := scheme_of(module))
        for name, tensor in scheme.companions(module).items()
    }
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers, **quantized}


def _state_on_host(model: Any) -> dict[str, torch.Tensor] | None:
    """The state dict with what accelerate offloads to the host; None where nothing is, or other parts are on disk."""
    state = model.state_dict()
    offloaded = [
        name for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"
    ]
    held = {name: tensor for name in offloaded if (tensor := on_host(model, name)) is not None}
    return {**state, **held} if offloaded and len(held) == len(offloaded) else None


def _read_back(model: Any, folder: Path) -> None:
    """Raise KeditError unless the files of a folder hold what the model has, tensor by tensor.

    Cost: one pass over the model and one over the files, a tensor at a time. A model whose experts transformers writes
    one by one is loaded once more, on the host.
    """
    files = tensor_files(folder, KeditError)
    in_memory = _stored(model)
    held = {
        name: on_host(model, name) if tensor.device.type == "meta" else tensor.detach()
        for name, tensor in in_memory.items()
    }
    tensors = {name: tensor for name, tensor in held.items() if tensor is not None}

    def equals(name_in_file: str, tensor: torch.Tensor) -> bool:
        with safe_open(files[name_in_file], framework="pt") as file:
            if file.get_slice(name_in_file).get_shape() != list(tensor.shape):
                return False
            return same_bits(file.get_tensor(name_in_file), tensor)

    def fail(name: str, problem: str) -> NoReturn:
        raise KeditError(
            f"{name} {problem} in the files that {type(model).__name__}.save_pretrained wrote: the folder would load "
            "as another model, so it was not kept"
        )

    written: set[tuple[int, int]] = set()  # addresses and sizes: of tied weights, save_pretrained writes one
    for name in tensors.keys() & files.keys():
        if not equals(name, tensors[name]):
            fail(name, "is not what the model has")
        written.add((tensors[name].data_ptr(), tensors[name].numel()))
    renamed_names = files.keys() - in_memory.keys()  # transformers renames tensors of some architectures
    likely: dict[str, list[str]] = {}
    for other in renamed_names:
        likely.setdefault(bare_name(other), []).append(other)
    has_renamed = False
    converted: list[str] = []  # of which the files have parts, or which are parts of theirs
    for name in sorted(tensors.keys() - files.keys(), key=lambda name: (bare_name(name) not in likely, name)):
        tensor = tensors[name]
        if (tensor.data_ptr(), tensor.numel()) in written or _made_on_loading(model, name):
            continue
        first = likely.get(bare_name(name), [])
        if not any(equals(other, tensor) for other in (*first, *sorted(renamed_names.difference(first)))):
            converted.append(name)
        written.add((tensor.data_ptr(), tensor.numel()))
        has_renamed = True
    if has_renamed:  # whether loading finds them by those names, only transformers knows
        without_memory = not converted and int(transformers.__version__.split(".")[0]) >= 5  # older ones cannot
        nowhere = {"": "meta"} if without_memory and importlib.util.find_spec("accelerate") else None
        loaded, loading = type(model).from_pretrained(folder, device_map=nowhere, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            fail(missing[0], "is missing")
        values = _stored(loaded) if converted else {}
        for name in converted:
            if name not in values or not same_bits(values[name].to(tensors[name].dtype), tensors[name].cpu()):
                fail(name, "is not what the model has")


def _left_out(model: Any, folder: Path) -> list[str]:
    """Weights in the folder that the model was loaded from which are not in `folder`, as those of heads for drafts.

    They are told from renamed ones by what is left of a name without the modules that only wrap others.
    """
    source = Path(source_of(model) or os.devnull)
    try:
        names = tensor_files(source, KeditError).keys()
    except KeditError:  # on the hub, or not in safetensors files
        return []
    prefix = f"{model.base_model_prefix}."
    present = {*tensor_files(folder, KeditError), *_stored(model)}
    bare = {bare_name(part) for name in present for part in (name, name.removeprefix(prefix))}
    return sorted(name for name in names if name.endswith(".weight") and bare_name(name) not in bare)


def _made_on_loading(model: Any, name: str) -> bool:
    """Whether a tensor is a buffer that the model's class does not save and computes itself."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    buffers = {buffer for buffer, _ in model.named_buffers(remove_duplicate=False)}
    return name in buffers and any(re.search(pattern, name) for pattern in ignored)
