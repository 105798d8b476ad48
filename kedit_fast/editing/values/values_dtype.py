"""`values_dtype`: whether iterations of the value loop multiply in bfloat16, where that is allowed.

The full pass that records states, h0, the reference of the drift, deltas, Adam's moments, norms, softmax, the head and
the loss stay as they are. In iterations alone, the blocks that run again do so with bfloat16 copies of their matrices.
So a value is found on a slightly rounded model; what is stored, solved for and written from it is exact. It is an
approximation: efficacy is nearly that of "model", bits are not.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import torch

from kedit_fast.errors import EditError, UnsupportedModelError
from kedit_fast.kernels.native.loader import load
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.forward import Site
from kedit_fast.models.half_matrices import HalfMatrices, half_bytes, require_matrices
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype, has_units
from kedit_fast.support.dtypes import dtype_name

_log = logging.getLogger("kedit_fast")
ANYWHERE = "KEDIT_FAST_BF16_VALUES"
"""Environment variable: "anywhere" takes processors without matrix units for bfloat16, for tests; it is slow there."""


def copied_bytes(view: ModelView, sites: Sequence[Site], hparams: Hparams) -> int:
    """Bytes of the copies that the value loop makes; 0 with values_dtype = "model"."""
    return half_bytes(view, first_block(sites)) if _copies(view, hparams) else 0


def value_matrices(view: ModelView, sites: Sequence[Site], hparams: Hparams) -> HalfMatrices | None:
    """The matrices that iterations multiply with; None for the model's own.

    Args:
        view: the model.
        sites: where deltas are added.
        hparams: the loop's.

    Raises:
        EditError: values_dtype is not allowed here; the message says why, and what to do.

    Cost: 2 bytes for each entry of the matrices from the first block that runs in each iteration on.
    """
    if not _copies(view, hparams):
        return None
    first, named, cure = first_block(sites), f'values_dtype = "{hparams.values_dtype}"', 'use values_dtype = "model"'
    try:
        devices = require_matrices(view, first)
    except UnsupportedModelError as error:
        raise EditError(f"{named} does not go with this model: {error}; {cure}") from None
    obstacle = next((reason for device in devices if (reason := _obstacle(device))), "")
    if obstacle:
        raise EditError(f"{named} needs a CUDA device, or a processor with AMX that torch uses: {obstacle}; {cure}")
    if (dtype := computing_dtype(view.entry)) not in (torch.float32, torch.bfloat16):
        raise EditError(
            f"{named} is for models that compute in float32; this one computes in {dtype_name(dtype)}: {cure}"
        )
    return HalfMatrices(view, first)


def multiplying(matrices: HalfMatrices | None) -> contextlib.AbstractContextManager[None]:
    """Inside the block, passes multiply with these matrices; with None, with the model's own."""
    return contextlib.nullcontext() if matrices is None else matrices.installed()


def first_block(sites: Sequence[Site]) -> int:
    """The first block that every iteration runs: the one above a site at a block's output, else the site's own."""
    return sites[0].layer + (1 if sites[0].kind == "block" else 0)


def _copies(view: ModelView, hparams: Hparams) -> bool:
    """Whether iterations are to multiply with copies."""
    if hparams.values_dtype == "model":
        return False
    if computing_dtype(view.entry, meta_is_cpu=True) == torch.bfloat16:
        _log.info('values_dtype = "%s" changes nothing: the model computes in it', hparams.values_dtype)
        return False
    return True


def _obstacle(device: torch.device) -> str:
    """Why products of bfloat16 are no faster on a device, as far as it is known; "" if they are."""
    if device.type == "cuda":
        return ""
    if device.type != "cpu":
        return f"the model is on {device}"
    choice = os.environ.get(ANYWHERE, "")
    if choice not in ("", "anywhere"):
        return f"{ANYWHERE} must be anywhere or unset; got {choice!r}"
    if choice:
        return ""
    module, reason = load("_cpu")
    if module is None:
        return f"the C++ module, which knows the processor, is missing ({reason})"
    if missing := {"amx_tile", "amx_bf16"} - set(module.cpu_features()):
        return f"this processor has no {min(missing)}"
    return "" if has_units(torch.bfloat16) else "torch does not use this processor's bfloat16 units"
