"""A patch as a LoRA adapter that peft loads: Delta = B A with B = left, A = right^T and a scale of 1."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch

from kedit_fast.errors import PatchError
from kedit_fast.patches.patch import Patch, is_stacked
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, Update
from kedit_fast.support.files import new_folder, write_file, write_text
from kedit_fast.support.torch_state import plain_torch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterModule:
    """What an adapter has of one module's update."""

    rank: int
    """Of B A."""
    error: float
    """|Delta - B A| / |Delta| (Frobenius): what the adapter leaves out, and the rounding to its dtype."""


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
) -> dict[str, AdapterModule]:
    """Write a folder that `peft.PeftModel.from_pretrained(model, folder)` loads, whole or not at all.

    The model then computes W x + B (A x) where the edited one computes round(W + B A) x, so the two differ by rounding.
    The patch is compacted first; A and B share the norm of each direction equally. A tuned matrix (a dense update) has
    full rank unless a tolerance or a rank says otherwise; the returned errors say what is left out.

    Args:
        patch: the edits.
        folder: the adapter's, which must not exist yet.
        base_model: name or path of the model, for the adapter's configuration.
        tolerance, rank: see `Patch.compacted`.
        dtype: of the adapter's weights.
        overwrite: replace an existing folder.

    Returns:
        module -> the rank of its part of the adapter, and how far that is from the patch.

    Raises:
        PatchError: peft is not installed, weights overflow `dtype`, the patch mixes orientations or is of experts, or
            the folder cannot be written.
    """
    try:
        from peft import LoraConfig, TaskType
    except ImportError as error:
        raise PatchError(f"a LoRA adapter needs the peft package (pip install 'kedit-fast[peft]'): {error}") from error
    if stacked := [name for name, update in patch.updates.items() if is_stacked(update)]:
        raise PatchError(
            f"{stacked[0]} is the stack of a layer's experts, for which an adapter has no module: apply the patch "
            "(`patch apply`), or save the edited model"
        )
    orientations = {target.transposed for target in patch.targets.values()}
    if len(orientations) > 1:
        raise PatchError(
            "the patch has matrices stored [in, out] and [out, in]: an adapter has one orientation for all"
        )
    compacted = patch.compacted(tolerance, rank)
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, AdapterModule] = {}
    for name, update in compacted.updates.items():
        assert isinstance(update, LowRankUpdate)  # compacted
        if update.rank == 0:
            continue  # an update of zeros
        right, left = update.right.T.to(dtype).contiguous(), update.left.to(dtype).contiguous()
        if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise PatchError(f"the update of {name} overflows {dtype}")
        tensors[f"base_model.model.{name}.lora_A.weight"] = right
        tensors[f"base_model.model.{name}.lora_B.weight"] = left
        modules[name] = AdapterModule(update.rank, _error(patch.updates[name], LowRankUpdate(left, right.T)))
    if not modules:
        raise PatchError("the patch changes nothing: there is no adapter to write")
    ranks = {name: module.rank for name, module in modules.items()}
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
    return modules


def _error(update: Update, adapter: LowRankUpdate) -> float:
    """|Delta - B A| / |Delta|."""
    if isinstance(update, LowRankUpdate):
        pairs = ((update.left, -adapter.left), (update.right, adapter.right))
        gap = LowRankUpdate(*(torch.cat([one.double(), two.double()], 1) for one, two in pairs)).norm()
    else:
        gap = DenseUpdate(update.dense() - adapter.to(torch.float32).dense()).norm()
    return gap / max(update.norm(), 1e-30)
