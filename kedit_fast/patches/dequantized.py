"""A patch on a quantized checkpoint: a copy of it in which the patched matrices, and they alone, are plain.

An fp8 checkpoint is copied file by file, and no model is loaded, so that needs no GPU. A checkpoint of bitsandbytes is
loaded and saved: only that package reads its format.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kedit_fast.errors import PatchError
from kedit_fast.models.loading import empty_model, load_config, load_model
from kedit_fast.models.multimodal import bare_name
from kedit_fast.models.quantized import dequantize_edited
from kedit_fast.models.saving import save_model
from kedit_fast.models.schemes import block_scaled
from kedit_fast.models.weight_names import is_experts_path, module_path_of
from kedit_fast.patches.checkpoint import INDEX, Checkpoint
from kedit_fast.patches.patch import Patch
from kedit_fast.support.files import new_folder, tensor_files
from kedit_fast.support.matrix_bits import same_bits
from kedit_fast.support.torch_state import plain_torch

_SCALES, _OTHERS = "weight_scale_inv", ("activation_scale", "input_scale")


@plain_torch()
def apply_dequantized(
    patch: Patch,
    source: str | os.PathLike,
    out: str | os.PathLike,
    name: str,
    force: bool = False,
    store_originals: bool = True,
) -> int:
    """Copy a quantized checkpoint, make the matrices of a patch plain in the copy, and apply the patch there.

    W = dequantize(W_q) in the dtype that the patch was made for. The copy's quantization config lists these modules
    among those that are not to be quantized; all other tensors are those of the source, bit for bit.

    Args:
        patch: what to apply.
        source: folder of a checkpoint that fp8 (`quant_method: "fp8"`) or bitsandbytes has quantized; not changed.
        out: the folder of the copy, which appears complete or not at all.
        name, force, store_originals: as in `Checkpoint.apply`.

    Returns:
        the patch's number in the copy, where `Checkpoint.revert` gives back the plain matrices from before.

    Raises:
        PatchError: the source is not quantized so, it is not the model that the patch was made for, or the patch is of
            experts.
        KeditError: `out` exists or cannot be written.
    """
    if stacked := [module for module in patch.updates if is_experts_path(module)]:
        raise PatchError(
            f"{stacked[0]} is of experts: of a quantized checkpoint, matrices of plain layers alone are made plain"
        )
    source = Path(source)
    quantization = getattr(load_config(source), "quantization_config", None)
    method = (quantization or {}).get("quant_method")
    number = 0

    def apply(folder: Path) -> None:
        nonlocal number
        number = Checkpoint(folder).apply(patch, name, force, store_originals)

    if method == "bitsandbytes":
        model, tokenizer = load_model(source)
        dequantize_edited(model, (), tuple(patch.updates))
        save_model(model, tokenizer, out, write_beside=apply)
    elif method == "fp8":
        with new_folder(out, False, PatchError) as work:
            _copy_fp8(patch, source, work)
            apply(work)
    else:
        state = "not quantized" if method is None else f"quantized by {method}"
        raise PatchError(f"{source} is {state}: only matrices of fp8 and bitsandbytes checkpoints can be made plain")
    return number


def _copy_fp8(patch: Patch, source: Path, work: Path) -> None:
    """Copy a checkpoint in fp8; the matrices that a patch names lose their scales and get the patch's dtype.

    Cost: the tensors of one changed shard in memory.
    """
    files = tensor_files(source, PatchError)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    block = config["quantization_config"].get("weight_block_size", [128, 128])
    checkpoint = Checkpoint(source)
    paths = {module_path_of(checkpoint.tensor_of(module)): module for module in patch.updates}
    quantized = {path: module for path, module in paths.items() if f"{path}.{_SCALES}" in files}
    dropped = {f"{path}.{part}" for path in quantized for part in (_SCALES, *_OTHERS)} & files.keys()
    changed = {files[f"{path}.weight"] for path in quantized} | {files[tensor] for tensor in dropped}
    for item in source.iterdir():
        if item.is_file() and item not in changed and item.name not in ("config.json", INDEX):
            shutil.copyfile(item, work / item.name)

    def read(tensor: str) -> torch.Tensor:
        with safe_open(files[tensor], framework="pt") as file:
            return file.get_tensor(tensor)

    def plain(path: str) -> torch.Tensor:
        dtype = getattr(torch, patch.targets[quantized[path]].dtype)
        return block_scaled(read(f"{path}.weight"), read(f"{path}.{_SCALES}"), block).to(dtype)

    for file in changed:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in set(opened.keys()) if name not in dropped}
        for path in quantized:
            if f"{path}.weight" in tensors:
                tensors[f"{path}.weight"] = plain(path)
        save_file(tensors, work / file.name, metadata)
        with safe_open(work / file.name, framework="pt") as again:
            for tensor, expected in tensors.items():
                if not same_bits(again.get_tensor(tensor), expected):
                    raise PatchError(f"cannot write {file.name}: {tensor} is read back as something else")
    if (source / INDEX).exists():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {t: name for t, name in index["weight_map"].items() if t not in dropped}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config["quantization_config"]["modules_to_not_convert"] = _exceptions(source, config, files, quantized.values())
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _exceptions(source: Path, config: dict[str, Any], files: Mapping[str, Path], modules: Collection[str]) -> list[str]:
    """What the copy's config excepts: what the source excepts by its list, or by having no scales; and `modules`."""
    listed = config["quantization_config"].get("modules_to_not_convert")
    if listed is None:
        with_scales = {bare_name(tensor) for tensor in files if tensor.endswith(_SCALES)}
        model = empty_model(load_config(source))
        listed = [
            path
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and not {bare_name(f"{path}.{_SCALES}"), f"{path.partition('.')[2]}.{_SCALES}"} & with_scales
        ]
    return [*listed, *(module for module in modules if module not in listed)]
