"""Checkpoints of models that take more than text: the class that loads all of one, and the files of its processor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.architectures import text_config

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What AutoProcessor reads in a model's folder beside the tokenizer's files."""
_NEEDED = PROCESSOR_FILES[:2]  # any of them is enough for images
_PARTS = ("vision_config", "audio_config")
_WRAPPERS = {"model", "language_model", "text_model"}


def is_multimodal(config: Any) -> bool:
    """Whether a configuration has other parts than that of a text decoder."""
    return text_config(config) is not config or any(getattr(config, part, None) is not None for part in _PARTS)


def model_class(config: Any) -> Any:
    """The class of transformers, or its auto class, that loads a whole checkpoint: a multimodal one with all its parts.

    Raises:
        UnsupportedModelError: transformers has no class that generates text and has all parts of the model.
    """
    import transformers

    kind: Any
    if not is_multimodal(config):
        return transformers.AutoModelForCausalLM
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if getattr(kind, "config_class", None) is type(config) and kind.can_generate():
            return kind
    for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM"):
        classes = getattr(transformers, f"MODEL_FOR_{task}_MAPPING", {})  # older transformers have fewer
        kind = classes.get(type(config), None)
        if getattr(kind, "config_class", None) is type(config):  # not one of the text part alone
            return kind
    raise UnsupportedModelError(
        f"{config.model_type!r} has other parts than text, and transformers {transformers.__version__} has no class "
        "that generates text and has them all: as its text part alone it would be saved without them"
    )


def source_of(model: Any) -> str:
    """The folder, or the name on the hub, that a model was loaded from; "" where it does not say."""
    return str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or "")


def copy_processor_files(model: Any, folder: Path) -> str:
    """Copy into a saved model's folder what AutoProcessor needs of the folder that the model was loaded from.

    Files that are in `folder` already stay. The source may be a model on the hub: of its files, those that are not in
    the hub's cache are downloaded, unless the hub is offline or not there.

    Returns:
        why images may not run from the folder, since no file that describes them could be copied; "" if one was.
    """
    from transformers.utils.hub import cached_file

    source = source_of(model)
    if not source:
        return "the model does not say where it was loaded from"
    for name in PROCESSOR_FILES:
        if (folder / name).exists():
            continue
        if os.path.isdir(source):
            path = Path(source) / name
        else:
            try:
                path = Path(
                    cached_file(
                        source,
                        name,
                        _raise_exceptions_for_gated_repo=False,
                        _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False,
                    )
                    or ""
                )
            except (OSError, ValueError):  # no name of a model
                return f"{source} is no folder and no model on the hub"
        if path.is_file():
            shutil.copyfile(path, folder / name)
    return "" if any((folder / name).exists() for name in _NEEDED) else f"{source} has none of {' and '.join(_NEEDED)}"


def bare_name(tensor: str) -> str:
    """A tensor's name without the modules that only wrap others.

    Such names are the same in a file and in memory, where versions of transformers put the parts of a multimodal model
    in other modules: `model.layers.0.mlp.down_proj.weight` in the file of a Qwen2.5-VL is
    `model.language_model.layers.0.mlp.down_proj.weight` in memory.
    """
    return ".".join(part for part in tensor.split(".") if part not in _WRAPPERS)
