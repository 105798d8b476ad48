"""Models from disk and to disk: load, an empty one of the same shape, save and read back."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kedit_fast.errors import KeditError, UnsupportedModelError
from kedit_fast.models.architectures import find_architecture
from kedit_fast.models.editable import plain_model
from kedit_fast.support.files import new_folder, tensor_files
from kedit_fast.support.matrix_bits import same_bits
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
ADAPTER = "adapter_config.json"  # in a folder: of a peft adapter


def load_config(path: str | os.PathLike, merge_adapter: bool = False) -> Any:
    """A model's configuration, refused by name when its architecture is not supported.

    With `merge_adapter`, of an adapter's folder that of the model which it is for.
    """
    from transformers import AutoConfig

    if merge_adapter and (Path(path) / ADAPTER).exists():
        with _base_of(Path(path)) as base:
            return load_config(base)
    _require_no_adapter(path)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot load a model from {path}: {first_line(error)}") from error
    find_architecture(config)
    return config


@plain_torch()
def load_model(
    path: str | os.PathLike,
    dtype: Any = "auto",
    device: str = "cpu",
    device_map: Any = None,
    merge_adapter: bool = False,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder or a hub name.

    `device_map` spreads a model over several devices, as from_pretrained does ("auto", or modules by device); it needs
    the accelerate package, and `device` is not looked at.

    With `merge_adapter`, the path may be a local folder of a peft adapter: its update is added to the weights of the
    model that its configuration names (or that lies in the same folder), rounded to their dtype; it needs peft.

    Raises:
        UnsupportedModelError: no model there, one that cannot be read, or an architecture that is not supported; or an
            adapter that is not to be merged, or cannot be.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    if merge_adapter and (Path(path) / ADAPTER).exists():
        return _merged(Path(path), dtype, device, device_map)
    load_config(path)
    name = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(path), trust_remote_code=False, output_loading_info=True, device_map=device_map, **{name: dtype}
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the loaders raise
        raise UnsupportedModelError(f"cannot load a model from {path}: {first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UnsupportedModelError(f"{path} has no weights for {missing[0]} ({len(missing)} tensors are missing)")
    if getattr(model, "_hf_peft_config_loaded", False):  # from the hub
        raise _is_an_adapter(path)
    return (model if device_map is not None else model.to(device)).eval(), tokenizer


def _merged(path: Path, dtype: Any, device: str, device_map: Any) -> tuple[Any, Any]:
    """The model of an adapter's folder with the adapter in its weights, and the folder's tokenizer or the model's."""
    from transformers import AutoTokenizer

    try:
        from peft import PeftModel
    except ImportError as error:
        raise UnsupportedModelError(
            f"merging {path} needs the peft package (pip install 'kedit-fast[peft]'): {error}"
        ) from error
    with _base_of(path) as base:
        model, tokenizer = load_model(base, dtype, device, device_map)
        try:
            model = PeftModel.from_pretrained(model, str(path)).merge_and_unload(safe_merge=True)
        except Exception as error:  # whatever a damaged adapter, or one of another model, makes peft raise
            raise UnsupportedModelError(f"cannot merge the adapter {path}: {first_line(error)}") from error
        if (path / "tokenizer_config.json").exists():
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
            except Exception as error:
                raise UnsupportedModelError(f"cannot load a tokenizer from {path}: {first_line(error)}") from error
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        raise UnsupportedModelError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, the merged model embeddings of "
            f"{len(model.get_input_embeddings().weight)}"
        )
    model.config._name_or_path = str(path)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _base_of(path: Path) -> Iterator[str]:
    """Where the model of an adapter's folder is: what its configuration names, or the folder's own without adapter."""
    if (path / "config.json").exists():
        with tempfile.TemporaryDirectory() as plain:
            for file in path.iterdir():
                if not file.name.startswith("adapter_"):
                    os.symlink(file.absolute(), Path(plain) / file.name)
            yield plain
        return
    try:
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"cannot read {path / ADAPTER}: {first_line(error)}") from error
    if not base:
        raise UnsupportedModelError(
            f"{path / ADAPTER} does not name the model that the adapter is for: set base_model_name_or_path in it"
        )
    yield base


def _require_no_adapter(path: str | os.PathLike) -> None:
    if (Path(path) / ADAPTER).exists():
        raise _is_an_adapter(path)


def _is_an_adapter(path: str | os.PathLike) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} holds an adapter ({ADAPTER}): saved, it would be the adapter alone, without the edits. Merge it into "
        "its model first: --merge-adapter, load_model(..., merge_adapter=True), or peft's merge_and_unload()"
    )


@plain_torch()
def empty_model(config: Any, dtype: Any = "auto") -> torch.nn.Module:
    """A model without memory, on torch's "meta" device: for what can be told from shapes alone."""
    from transformers import AutoModelForCausalLM

    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).to(dtype)


@plain_torch()
def save_model(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike,
    overwrite: bool = False,
    write_beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model and its tokenizer so that from_pretrained loads them; all or nothing.

    Every tensor is read back and compared with the model's, bit for bit, before the folder appears.
    `write_beside` is called with the folder before it appears, for files of others that belong to the model.

    Raises:
        KeditError: the folder exists, or cannot be written; or it would not load as this model (adapters, modules that
            are not of the model's class, weights that save_pretrained drops or changes), by the tensor's name.
    """
    model = plain_model(model)
    _require_loadable(model)
    with new_folder(path, overwrite, KeditError) as work:
        try:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            _read_back(model, work)
            if write_beside is not None:
                write_beside(work)
        except (OSError, KeditError):
            raise
        except Exception as error:  # safetensors reports a full disk with an error of its own
            raise KeditError(f"cannot write {path}: {first_line(error)}") from error


def _require_loadable(model: Any) -> None:
    """Raise KeditError when from_pretrained would make a model that lacks tensors of this one's class."""
    kind = type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False):
        raise KeditError(f"what is saved would be an adapter, not this {kind}: merge it first (merge_and_unload())")
    if getattr(model, "hf_quantizer", None) is not None:
        return  # its modules are made from the files
    try:
        with torch.device("meta"):
            fresh = set(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception:  # a class that cannot be made without memory: what was written is compared all the same
        return
    own = set(_stored(model))
    if lost := fresh - own:
        raise KeditError(
            f"what is saved would not load as this {kind}: it has no {min(lost)}. Merge adapters, make pruned or "
            "parametrized weights plain, take wrappers out, and save that"
        )
    if extra := own - fresh:
        _log.warning("%s is saved, but from_pretrained will leave it out: a new %s has none", min(extra), kind)


def _stored(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, as they are in memory: hooks of state_dict do not reach them."""
    persistent = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    buffers = {name: t for name, t in model.named_buffers(remove_duplicate=False) if name in persistent}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def _read_back(model: Any, folder: Path) -> None:
    """Raise KeditError unless the files of a folder hold what the model has, tensor by tensor.

    Cost: one pass over the model and one over the files, a tensor at a time.
    """
    places = tensor_files(folder, KeditError)
    stored = {name: tensor.detach() for name, tensor in _stored(model).items() if tensor.device.type != "meta"}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    renamed = places.keys() - _stored(model).keys()  # by transformers, for some architectures

    def holds(place: str, tensor: torch.Tensor) -> bool:
        with safe_open(places[place], framework="pt") as file:
            return same_bits(file.get_tensor(place), tensor)

    def fail(name: str, what: str) -> KeditError:
        return KeditError(
            f"{name} {what} in the files that {type(model).__name__}.save_pretrained wrote: the folder would load as "
            "another model, so it was not kept"
        )

    tied: set[tuple[int, int]] = set()  # addresses of what is written: of weights that are one, one is
    for name in stored.keys() & places.keys():
        if not holds(name, stored[name]):
            raise fail(name, "is not what the model has")
        tied.add((stored[name].data_ptr(), stored[name].numel()))
    found = False
    for name in sorted(stored.keys() - places.keys()):
        tensor = stored[name]
        if (tensor.data_ptr(), tensor.numel()) in tied:
            continue
        if name in buffers and any(re.search(pattern, name) for pattern in ignored):
            continue  # the model's class makes it anew
        if not any(holds(place, tensor) for place in renamed):
            raise fail(name, "is missing")
        found = True
    if found:  # transformers knows its own names
        nowhere = {"": "meta"} if importlib.util.find_spec("accelerate") else None
        _, loading = type(model).from_pretrained(folder, device_map=nowhere, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise fail(missing[0], "is missing")


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
