"""What editing must know about an architecture, as data; and the refusal of models that are no plain decoders.

An architecture that is not listed is read from the model's own modules (`models.introspection`). One that this does not
read right needs one ArchSpec in ARCHITECTURES.
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from kedit_fast.errors import InvalidArgumentError, UnsupportedModelError
from kedit_fast.support.textfiles import Repeated, parse_json, read_text


@dataclass(frozen=True)
class ArchSpec:
    """Names of the modules of one family of decoders. Paths are relative to the causal language model."""

    name: str
    """How tables and messages call the family."""
    model_types: tuple[str, ...]
    """The values of `config.model_type` that it covers."""
    blocks: str
    """Path of the list of decoder blocks."""
    attention: str
    """Path of the attention inside a block; "" where not every block has one."""
    mlp: str
    """Path of the MLP inside a block: a function of each position, whose output is added to the residual stream. It may
    be the edited layer itself, where no module of its own computes the MLP (OPT)."""
    edit: str
    """Path, inside a block, of the linear layer whose weight is edited; or of the experts whose stack is."""
    transposed: bool
    """Whether that weight is stored [in, out] (transformers' Conv1D)."""
    norm: str = ""
    """Path of the norm before the head; "" where there is none."""
    post_norm: bool = False
    """Whether a norm or a multiplier stands between the MLP and the residual sum: values are then optimized before it,
    at the MLP."""
    shared: str = ""
    """Path, inside a block with experts, of the last linear layer of those that every token passes, where it is one
    more block of the edited stack; "" where they are not edited with the others."""
    shared_gate: str = ""
    """Path, inside a block, of the linear layer whose sigmoid multiplies what the shared experts put out: of those in
    `shared`, or of the one in `edit`; "" where there is none."""


SharedExperts = Literal["leave", "stack", "alone"]
"""What an edit of a mixture does to the experts that every token passes: nothing; they are one more block of the stack;
or they alone are edited."""


def _llama_like(name: str, *model_types: str, post_norm: bool = False) -> ArchSpec:
    return ArchSpec(
        name, model_types, "model.layers", "self_attn", "mlp", "mlp.down_proj", False, "model.norm", post_norm
    )


ARCHITECTURES = (
    ArchSpec("GPT-2", ("gpt2",), "transformer.h", "attn", "mlp", "mlp.c_proj", True, "transformer.ln_f"),
    ArchSpec("GPT-J", ("gptj",), "transformer.h", "attn", "mlp", "mlp.fc_out", False, "transformer.ln_f"),
    ArchSpec("GPT-NeoX", ("gpt_neox",), "gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h",
             False, "gpt_neox.final_layer_norm"),
    _llama_like("Llama", "llama"),
    _llama_like("Mistral", "mistral"),
    _llama_like("Qwen2", "qwen2"),
    _llama_like("Qwen3", "qwen3"),
    _llama_like("Phi-3", "phi3"),
    _llama_like("Gemma 2", "gemma2", post_norm=True),
    _llama_like("Gemma 3", "gemma3_text", post_norm=True),
    _llama_like("OLMo 2", "olmo2", post_norm=True),
)  # fmt: skip

_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def text_config(config: Any) -> Any:
    """The part of a model's configuration that is about its text decoder: of a model of text alone, the whole."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def known_architecture(config: Any) -> ArchSpec | None:
    """The ArchSpec in ARCHITECTURES for a model configuration, or None."""
    kind = getattr(config, "model_type", None)
    return next((spec for spec in ARCHITECTURES if kind in spec.model_types), None)


def names_experts(config: Any) -> bool:
    """Whether a configuration has more than one expert; not all such models have any (`find_spec` sees the modules)."""
    text = text_config(config)
    return any((getattr(text, field, None) or 0) > 1 for field in _EXPERT_FIELDS)


def require_decoder(config: Any) -> None:
    """Raise UnsupportedModelError, by name, for the configuration of an encoder-decoder, or one without layers."""
    text = text_config(config)
    kind = getattr(text, "model_type", None) or type(text).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind!r} is an encoder-decoder model: closed-form editing needs a decoder.")
    if not (getattr(text, "num_hidden_layers", None) or getattr(text, "n_layer", None)):
        raise UnsupportedModelError(
            f"the configuration of {kind!r} has no num_hidden_layers: it is of no decoder of transformers"
        )


_JSON_KINDS = {"str": "a text", "bool": "true or false", "tuple[str, ...]": "a list of texts"}
_MAY_BE_EMPTY = ("attention", "norm", "shared", "shared_gate")


def spec_as_json(spec: ArchSpec) -> str:
    """The text that `spec_from_json` reads: one JSON object with the fields of an ArchSpec."""
    return json.dumps(asdict(spec), indent=2)


def spec_from_json(path: str | os.PathLike) -> ArchSpec:
    """An ArchSpec from a file with one JSON object, whose names are the fields; those with a default may be left out.

    Args:
        path: the file, as text or compressed by gzip; `-` for the standard input.

    Raises:
        InvalidArgumentError: the file cannot be read or is no JSON object; or a field is missing, unknown, given
            twice, of another type, or no path. The message names the file and the field.
    """
    values = parse_json(read_text(path, InvalidArgumentError), str(path), InvalidArgumentError)
    if not isinstance(values, dict):
        raise InvalidArgumentError(
            f"{path} must hold one JSON object with the fields of an ArchSpec; got {type(values).__name__}"
        )
    if isinstance(values, Repeated):
        raise InvalidArgumentError(f"{path} gives {values.names[0]!r} twice")
    kinds = {field.name: str(field.type) for field in fields(ArchSpec)}
    if unknown := [name for name in values if name not in kinds]:
        raise InvalidArgumentError(f"{path}: unknown field {unknown[0]!r}; an ArchSpec has {', '.join(kinds)}")
    required = [field.name for field in fields(ArchSpec) if field.default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise InvalidArgumentError(f"{path} lacks the field {missing[0]!r}; an ArchSpec needs {', '.join(required)}")
    for name, value in values.items():
        _check_field(path, name, kinds[name], value)
    checked: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return ArchSpec(**checked)


def _check_field(path: str | os.PathLike, name: str, kind: str, value: Any) -> None:
    """Raise InvalidArgumentError unless the value of a file's field is what the field takes."""
    if kind == "bool":
        right = isinstance(value, bool)
    elif kind == "str":
        right = isinstance(value, str)
    else:
        right = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    if not right:
        raise InvalidArgumentError(f"{path}: {name!r} must be {_JSON_KINDS[kind]}; got {json.dumps(value)}")
    if kind != "str" or name == "name" or (not value and name in _MAY_BE_EMPTY):
        return
    if not value:
        raise InvalidArgumentError(f"{path}: {name!r} is empty; it is the path of a module, as in model.layers")
    if not all(str(value).split(".")) or value != "".join(str(value).split()):
        raise InvalidArgumentError(f"{path}: {name!r} is no path of a module, as model.layers is one; got {value!r}")
