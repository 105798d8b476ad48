"""Models from disk: a configuration, a model with its tokenizer, a model without memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.architectures import names_experts, require_decoder, text_config
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.multimodal import is_multimodal, model_class
from kedit_fast.models.sharded import is_sharded
from kedit_fast.support import process_group
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
_COMPUTED = (".position_ids", ".inv_freq", ".masked_bias")  # buffers that older versions of transformers stored
ADAPTER = "adapter_config.json"  # a folder with it holds a peft adapter


def load_config(path: str | os.PathLike, merge_adapter: bool = False) -> Any:
    """A model's configuration.

    With `merge_adapter`, the path may be an adapter's folder; the result is then the configuration of its model.

    Raises:
        UnsupportedModelError: no model there, an adapter without `merge_adapter`, or an architecture that is not
            supported, by name.
    """
    from transformers import AutoConfig

    if merge_adapter and (Path(path) / ADAPTER).exists():
        with _base_of(Path(path)) as base:
            return load_config(base)
    _require_no_adapter(path)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{path} brings code of its own, which is not run: load the model yourself, with "
                "trust_remote_code=True, if you trust it, and pass it to Editor or run_edits"
            ) from error
        raise UnsupportedModelError(f"cannot load a model from {path}: {first_line(error)}") from error
    require_decoder(config)
    if names_experts(config):  # refused before weights are loaded, if the modules are experts
        find_spec(empty_model(config))
    return config


@plain_torch()
def load_model(
    path: str | os.PathLike,
    dtype: Any = "auto",
    device: str = "cpu",
    device_map: Any = None,
    merge_adapter: bool = False,
    tp_plan: Any = None,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder or a hub name; a multimodal one with all its parts.

    Args:
        path: a local folder, or the name of a model on the hub.
        dtype: of the weights, as from_pretrained takes it; "auto" for that of the files.
        device: where the model goes.
        device_map: spreads the model over several devices, as from_pretrained does ("auto", or modules by device).
            `device` is then ignored. It needs the accelerate package.
        merge_adapter: accept a local folder of a peft adapter as the path. Its update is added to the weights of the
            model that its configuration names, or that is in the same folder, and rounded to their dtype. It needs
            peft.
        tp_plan: "auto" splits the model over the processes of torchrun, each on a device of its own, by the plan of its
            architecture (`models.sharded`); or a plan of your own. `device` is then ignored.

    Raises:
        UnsupportedModelError: there is no model, it cannot be read, or its architecture is not supported; or the class
            that loads it has no place for some weights of a multimodal model; or there is an adapter, and it may not
            or cannot be merged; or the model cannot be split over the processes.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    split = {} if tp_plan is None else _split_over_processes(path, tp_plan, device_map)
    if merge_adapter and (Path(path) / ADAPTER).exists():
        if split:
            raise UnsupportedModelError(f"{path} holds an adapter: merge and save it in one process, and split that")
        return _merged(Path(path), dtype, device, device_map)
    config = load_config(path)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and device_map is None:
        device_map = {"": device}  # some quantized models cannot be moved
    name = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    try:
        model, loading = model_class(config).from_pretrained(
            str(path),
            trust_remote_code=False,
            output_loading_info=True,
            device_map=device_map,
            **{name: dtype},
            **split,
        )
    except Exception as error:  # damaged files make the loaders raise errors of many types
        raise UnsupportedModelError(f"cannot load a model from {path}: {first_line(error)}") from error
    tokenizer = load_tokenizer(path)
    if missing := sorted(loading["missing_keys"]):
        raise UnsupportedModelError(f"{path} has no weights for {missing[0]} ({len(missing)} tensors are missing)")
    if getattr(model, "_hf_peft_config_loaded", False):  # from the hub
        raise _is_an_adapter(path)
    if extra := sorted(key for key in loading["unexpected_keys"] if not key.endswith(_COMPUTED)):
        lost = f"{path} has weights that {type(model).__name__} has no place for: {extra[0]} ({len(extra)} tensors)"
        if is_multimodal(config):
            raise UnsupportedModelError(f"{lost}. A saved model would be without them")
        _log.warning("%s: a saved model will be without them", lost)
    if quantization is not None and getattr(model, "hf_quantizer", None) is None:
        _log.warning(
            "%s is quantized, and transformers has no way to compute in that format here: it has made all matrices %s, "
            "and a saved model will have them so. `kedit-fast edit --patch` and then `kedit-fast patch apply "
            "--dequantize-into` leave all but the edited ones quantized",
            path,
            dtype_name(model.dtype),
        )
    if split and not is_sharded(model):
        raise UnsupportedModelError(
            f"transformers has not split {path} ({type(model).__name__}): it has no tensor-parallel plan, or this "
            "version of transformers does not give DTensors (4.51 to 5.0 and 5.23 do)"
        )
    return (model if device_map is not None or split else model.to(device)).eval(), tokenizer


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a model's folder or hub name; raises UnsupportedModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # damaged files make the loaders raise errors of many types
        raise UnsupportedModelError(f"cannot load a tokenizer from {path}: {first_line(error)}") from error


def _split_over_processes(path: str | os.PathLike, plan: Any, device_map: Any) -> dict[str, Any]:
    """The arguments of from_pretrained that split a model over the processes of torchrun, which are joined here."""
    import transformers

    process_group.start()
    size = process_group.world()[1]
    if size < 2:
        raise UnsupportedModelError(
            f"{path} cannot be split: there is one process. Start several: torchrun --nproc-per-node 2 SCRIPT"
        )
    if device_map is not None:
        raise UnsupportedModelError("tp_plan splits a model over processes, device_map over devices: give one of them")
    config = getattr(getattr(transformers, "distributed", None), "DistributedConfig", None)
    if config is None or "tp_plan" not in {field.name for field in dataclasses.fields(config)}:
        return {"tp_plan": plan}
    return {"distributed_config": config(tp_plan=plan, tp_size=size)}


def _merged(path: Path, dtype: Any, device: str, device_map: Any) -> tuple[Any, Any]:
    """The model of an adapter's folder, with the adapter merged into it, and the folder's tokenizer or the model's."""
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
        except Exception as error:  # a damaged adapter, or one of another model, makes peft raise errors of many types
            raise UnsupportedModelError(f"cannot merge the adapter {path}: {first_line(error)}") from error
        if (path / "tokenizer_config.json").exists():
            tokenizer = load_tokenizer(path)
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        raise UnsupportedModelError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, the merged model embeddings of "
            f"{len(model.get_input_embeddings().weight)}"
        )
    model.config._name_or_path = str(path)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _base_of(path: Path) -> Iterator[str]:
    """Where the model of an adapter's folder is: the one in the folder, without the adapter, or the one it names."""
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
    """A model without memory, on torch's "meta" device: for what follows from shapes alone."""
    if dtype == "auto":
        stated = (
            getattr(part, name, None) for part in (config, text_config(config)) for name in ("dtype", "torch_dtype")
        )
        dtype = next((dtype for dtype in stated if dtype), torch.float32)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    kind = model_class(config)
    with torch.device("meta"):
        return (kind.from_config(config) if hasattr(kind, "from_config") else kind(config)).to(dtype)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
