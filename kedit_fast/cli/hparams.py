"""Hyper-parameters from the command line, and what a framework's file says beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedit_fast.cli.console import notices
from kedit_fast.cli.options import assignments, parsed_layers
from kedit_fast.integrations import framework_statistics
from kedit_fast.methods.hparams import unused, worth_a_warning
from kedit_fast.methods.hparams_files import read_hparams, read_raw
from kedit_fast.methods.registry import find_recipe


def overridden_hparams(hparams: Path | None, set_: list[str] | None, layers: str | None, method: str) -> dict[str, Any]:
    """Hyper-parameters that the command line gives: a file, then --set, then --layers."""
    overrides = read_hparams(hparams, method, warn_of_loading=False) if hparams is not None else {}
    recipe, set_here = find_recipe(method), assignments(set_)
    for name in set(unused(recipe, set_here)) - set(worth_a_warning(recipe, set_here)):  # the editor says the others
        notices.print(f"kedit-fast: {recipe.name} does not use {name}", markup=False)
    overrides.update(set_here)
    if layers is not None:
        overrides["layers"] = parsed_layers(layers)
    return overrides


def requested_sample(hparams: Path | None) -> dict[str, Any]:
    """Which of several npz files of a layer a framework's file asks for."""
    samples, precision = (
        framework_statistics.requested_sample(read_raw(hparams)) if hparams is not None else (None, None)
    )
    return {"samples": samples, "precision": precision}


def warn_of_ignored_settings(hparams: Path | None, dtype: str, one_batch: int | None = None) -> None:
    """Say which settings of a framework's file, about loading and batches, are options of the command line here.

    Args:
        hparams: the file.
        dtype: what --dtype says.
        one_batch: requests that are about to be written as one batch.
    """
    raw = read_raw(hparams) if hparams is not None else {}
    ignored = [
        f"{name}: true, and the model keeps the dtype of its files (--dtype float16 follows it)"
        for name in ("half", "fp16")
        if _is_true(raw.get(name)) and dtype == "auto"
    ]
    if _is_true(raw.get("model_parallel")):
        ignored.append("model_parallel: true, and the model is loaded on one device")
    size = str(raw.get("batch_size", ""))
    if one_batch is not None and size.isdigit() and 1 < int(size) < one_batch:
        ignored.append(
            f"batch_size: {size}, and all {one_batch} requests are one batch (--batch-size {size} follows it)"
        )
    for setting in ignored:
        notices.print(f"kedit-fast: {hparams} says {setting}", markup=False)


def _is_true(value: Any) -> bool:
    """Whether a file says true, as a word or as a text."""
    return str(value).lower() == "true"
