"""The torch.library that the ops are registered in, and how an implementation is run."""

from __future__ import annotations

from typing import Any

import torch

from kedit_fast.backends import requested, select
from kedit_fast.support.torch_state import is_plain, plain_torch

LIBRARY = torch.library.Library("kedit_fast", "DEF")


def dispatch(op: str, backend: str, selecting: tuple[torch.Tensor | None, ...], *args: Any) -> Any:
    """Run the implementation of `op` that is chosen for the tensors `selecting`, on `args`.

    `backend` is "" where the caller named none. The implementation computes in the dtypes and on the devices that its
    code names, whatever the process has set as defaults.
    """
    implementation = select(op, requested(backend or None), *selecting)
    if is_plain():
        return implementation.run(*args)
    with plain_torch(leave_inference_mode=False):
        return implementation.run(*args)


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def runs_at_once(*tensors: torch.Tensor) -> bool:
    """Whether a call on these tensors can be run without torch's dispatcher, which takes most of a small call's time.

    It cannot where something listens to the dispatcher or replaces what it calls: torch.compile, tracing, a mode, a
    function transform, fake and other special tensors, or a device without memory.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in _PLAIN_TYPES and t.device.type in ("cpu", "cuda") for t in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )
