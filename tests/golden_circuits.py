"""What EAP-IG's released code gives for two small models: scores, circuits and metrics. See tests/data/README.md."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

FILE = Path(__file__).parent / "data" / "golden_circuits.safetensors"
GOLDEN_KINDS = ("gpt2", "llama")
_CLASSES = {"gpt2": (GPT2Config, GPT2LMHeadModel), "llama": (LlamaConfig, LlamaForCausalLM)}


@functools.cache
def golden() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and the metadata as JSON."""
    with safe_open(FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["json"])  # noqa: SIM118


def golden_model(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model that was scored."""
    tensors, about = golden()
    config_class, model_class = _CLASSES[kind]
    settings = dict(about[f"{kind}.config"])
    for name in ("transformers_version", "model_type"):
        settings.pop(name, None)
    model = model_class(config_class(**settings))
    prefix = f"{kind}.weights."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.to(dtype).eval()


def golden_rows() -> list[list[dict[str, Any]]]:
    """Two batches of prompt pairs: the fields of `PromptPair`, without a subject."""
    return [
        [
            dict(clean=tuple(c), corrupted=tuple(d), answer=labels[0], wrong=labels[1], label=f"pair {batch}.{place}")
            for place, (c, d, labels) in enumerate(zip(rows["clean"], rows["corrupted"], rows["labels"], strict=True))
        ]
        for batch, rows in enumerate(golden()[1]["data"])
    ]
