"""A patch as a LoRA adapter that peft loads: Delta = B A with B = left, A = right^T and a scale of 1."""

from __future__ import annotations

import json
import os

import torch

from kedit_fast.errors import PatchError
from kedit_fast.patches.patch import Patch
from kedit_fast.support.files import new_folder, write_file, write_text
from kedit_fast.support.torch_state import plain_torch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@plain_torch()
def export_lora(
    patch: Patch,
    folder: str | os.PathLike,
    *,
    base_model: str | None = None,
    tolerance: float = 0.0,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a folder that `peft.PeftModel.from_pretrained(model, folder)` loads, whole or not at all.

    The model then computes W x + B (A x) where the edited one computes round(W + B A) x, so the two differ by rounding.
    The patch is compacted first; A and B share the norm of each direction equally.

    Args:
        patch: the edits.
        folder: the adapter's, which must not exist yet.
        base_model: name or path of the model, for the adapter's configuration.
        tolerance, rank: see `Patch.compacted`.
        dtype: of the adapter's weights.
        overwrite: replace an existing folder.

    Returns:
        module -> rank.

    Raises:
        PatchError: peft is not installed, weights overflow `dtype`, the patch mixes orientations, or the folder cannot
            be written.
    """
    try:
        from peft import LoraConfig, TaskType
    except ImportError as error:
        raise PatchError(f"a LoRA adapter needs the peft package (pip install 'kedit-fast[peft]'): {error}") from error
    orientations = {target.transposed for target in patch.targets.values()}
    if len(orientations) > 1:
        raise PatchError(
            "the patch has matrices stored [in, out] and [out, in]: an adapter has one orientation for all"
        )
    compacted = patch.compacted(tolerance, rank)
    tensors, ranks = {}, {}
    for name, update in compacted.updates.items():
        if update.rank == 0:
            continue  # an update of zeros
        right, left = update.right.T.to(dtype).contiguous(), update.left.to(dtype).contiguous()
        if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise PatchError(f"the update of {name} overflows {dtype}")
        tensors[f"base_model.model.{name}.lora_A.weight"] = right
        tensors[f"base_model.model.{name}.lora_B.weight"] = left
        ranks[name] = update.rank
    if not ranks:
        raise PatchError("the patch changes nothing: there is no adapter to write")
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=orientations.pop(),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base_model,
    )
    with new_folder(folder, overwrite, PatchError) as work:
        config.save_pretrained(str(work))
        settings = json.loads((work / CONFIG).read_text(encoding="utf-8"))
        settings["target_modules"].sort()  # peft writes a set, in any order
        write_text(work / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n", PatchError)
        write_file(work / WEIGHTS, tensors, {"format": "pt"}, PatchError)
    return ranks
