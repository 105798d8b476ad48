"""The torch.library that the ops are registered in, and how an implementation is run."""

from __future__ import annotations

from typing import Any

import torch

from kedit_fast.backends import requested, select
from kedit_fast.support.torch_state import plain_torch

LIBRARY = torch.library.Library("kedit_fast", "DEF")


def dispatch(op: str, backend: str, selecting: tuple[torch.Tensor | None, ...], *args: Any) -> Any:
    """Run the implementation of `op` that is chosen for the tensors `selecting`, on `args`.

    `backend` is "" where the caller named none. The implementation computes in the dtypes and on the devices that its
    code names, whatever the process has set as defaults.
    """
    implementation = select(op, requested(backend or None), *selecting)
    with plain_torch(leave_inference_mode=False):
        return implementation.run(*args)
