"""A fingerprint of the model that statistics belong to: its shape, its tokenizer, and samples of its weights.

Weights that editing changes are not sampled, and samples are compared with a tolerance. So the fingerprint depends
neither on edits nor on the dtype that the model is loaded in.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.offloaded import fetched
from kedit_fast.models.sharded import elements
from kedit_fast.models.view import ModelView
from kedit_fast.support.torch_state import plain_torch

_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SAMPLES = 8  # per tensor
_TOLERANCE = 2**-6  # relative, of a sample: above the rounding of bf16


@plain_torch()
def fingerprint(view: ModelView, tokenizer: Any) -> dict[str, str]:
    """The fingerprint as strings, for the metadata of a statistics file."""
    config = {field: getattr(view.config, field, None) for field in _FIELDS}
    return {
        "model_config": json.dumps(config, sort_keys=True),
        "model_samples": json.dumps(_samples(view)),
        "tokenizer": tokenizer_hash(tokenizer),
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256, 32 hex digits of it, of the vocabulary and of one encoded sentence, which shows added special tokens."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{index}\0".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(tokenizer("The quick brown fox, 123.")["input_ids"]).encode())
    return digest.hexdigest()[:32]


def difference(stored: dict[str, str], current: dict[str, str]) -> str:
    """What differs between two fingerprints; '' if they are of one model."""
    for field in ("model_config", "tokenizer"):
        if stored.get(field) != current.get(field):
            if field == "model_config" and stored.get(field):
                return f"{field} ({stored[field]} there, {current[field]} here)"
            return field
    there, here = json.loads(stored.get("model_samples", "{}")), json.loads(current["model_samples"])
    if other := sorted(there.keys() ^ here.keys()):
        return f"names of the weights that are not edited (first {other[0]})"
    for name, values in there.items():
        for a, b in zip(values, here[name], strict=True):
            if abs(a - b) > _TOLERANCE * max(abs(a), abs(b)) + 1e-6:
                return f"weights (first in {name})"
    return ""


def _samples(view: ModelView) -> dict[str, list[float]]:
    edited = {view.module_name(layer) for layer in view.editable}
    edited |= {shared.path for layer in view.editable if (shared := view.shared_experts(layer)) is not None}
    samples = {}
    for name, tensor in view.model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # a module's "extra state" may be anything
            continue
        if name in edited or (any(path in edited for path in _prefixes(name)) and not name.endswith(".bias")):
            continue  # the weight, or what a quantizer stores of it
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        tensor = with_values(view, name, tensor)
        count = min(_SAMPLES, tensor.numel())
        index = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).round().long()
        if tensor.ndim == 0:  # a scalar, which has no index
            tensor = tensor[None]
        where = torch.unravel_index(index, tensor.shape)
        values = elements(tensor, where)
        samples[name] = [float(f"{v:.6g}") for v in values.float().tolist()]
    return samples


def _prefixes(name: str) -> list[str]:
    """The paths of the modules that a tensor may belong to: "a.b" and "a" of "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def with_values(view: ModelView, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the state dict; if accelerate offloads it, its values on the host or on disk.

    Raises:
        UnsupportedModelError: it has no values anywhere.
    """
    if tensor.device.type != "meta":
        return tensor
    values = fetched(view.model, name)
    if values is None:
        raise UnsupportedModelError(f"{name} has no values: the model is not loaded")
    return values
