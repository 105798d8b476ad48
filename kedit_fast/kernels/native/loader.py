"""The only importer of the compiled modules `kedit_fast._cpu` and `kedit_fast._cuda`.

Tensors cross as DLPack capsules, so the modules link no libtorch and one build serves every torch version.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch  # before the native modules: they borrow the OpenMP runtime that torch brings
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] - its documented home

from kedit_fast.errors import InvalidArgumentError

ISA_VARIABLE = "KEDIT_FAST_ISA"


def build_reason(module: str) -> str:
    """Why `module` ('_cpu' or '_cuda') was not built, or '' when the build information names no reason."""
    try:
        info = importlib.import_module("kedit_fast._build_info")
    except ModuleNotFoundError:
        return "not built (a source tree without build information)"
    return info.MODULES.get(module, "") or ""


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module '_cpu' or '_cuda' and ''; or None and the reason why it cannot be used.

    The outcome is remembered. KEDIT_FAST_ISA is applied to '_cpu' here, once.
    """
    reason = build_reason(name)
    if reason:
        return None, f"not built: {reason}"
    try:
        module = importlib.import_module(f"kedit_fast.{name}")
    except ModuleNotFoundError:
        return None, "not built"
    except ImportError as error:
        return None, f"built but cannot be loaded: {error}"
    if name == "_cpu" and (isa := os.environ.get(ISA_VARIABLE)):
        try:
            module.select_isa(isa)
        except ValueError as error:
            return None, f"{ISA_VARIABLE}={isa}: {error}"
    return module, ""


def capsule(tensor: torch.Tensor | None) -> Any:
    """A DLPack capsule of the tensor's own memory, or None for None."""
    return None if tensor is None else to_dlpack(tensor)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a compiled function; what it refuses becomes an InvalidArgumentError."""
    try:
        return function(*args)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None
