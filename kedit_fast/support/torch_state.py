"""torch's own defaults during a call: settings that other code made for the process do not change our results.

`plain_torch()` wraps every entry point, because a model's own forward function may read any of these settings.
Autocast, the default device and inference mode belong to the calling thread. The default dtype and the precision of
products belong to the process: while they have torch's defaults here, other threads see these too, and the first thread
to leave restores the settings for those still inside. Our own code names its dtypes, so it is not affected; a model
that reads the default dtype in its forward function must be run by one thread at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")
_REDUCED = ("tf32", "bf16")
# Where the precision of fp32 products can be set. A level without a setting of its own inherits from an earlier one.
_LEVELS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul"))
_PRODUCTS = _LEVELS[-2:]
_precision_of: Any = getattr(torch._C, "_get_fp32_precision_getter", None)  # torch 2.9 and later
_set_precision: Any = getattr(torch._C, "_set_fp32_precision_setter", None)
# How CUDA sums 16-bit products; later versions of torch have a second setting for the last two.
_16_BIT_SUMS = {
    "allow_fp16_accumulation": False,
    "allow_fp16_reduced_precision_reduction": True,
    "allow_bf16_reduced_precision_reduction": True,
}


@contextlib.contextmanager
def plain_torch(leave_inference_mode: bool = True) -> Iterator[None]:
    """For as long as the block lasts, torch computes with its default settings.

    That is: fp32 and the CPU where no dtype and no device is named; no autocast; fp32 products in fp32, whichever
    interface requested TF32 or bf16; torch's own choice for sums of 16-bit products. Deterministic mode stays as it
    is. Afterwards, also after an error, all settings are restored. It can be used as a decorator too.

    Args:
        leave_inference_mode: where the caller is in inference mode, create normal tensors, without gradients. False
            where the caller's tensors are written, which may be inference tensors.
    """
    with contextlib.ExitStack() as stack:
        if leave_inference_mode and torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch._C._is_any_autocast_enabled():
            stack.callback(torch.clear_autocast_cache)  # it may contain weights from before an edit
            for kind in (kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)):
                stack.callback(torch.set_autocast_enabled, kind, True)
                torch.set_autocast_enabled(kind, False)
        if _reduced():
            _compute_in_fp32(stack)
        if torch.cuda.is_initialized():
            _sum_as_torch_does(stack)
        yield


def is_plain() -> bool:
    """Whether the settings that `plain_torch` would change are torch's defaults already, inference mode aside.

    A call that is over in microseconds asks this first: it takes a tenth of entering the context.
    """
    return (
        torch.get_default_dtype() == torch.float32
        and not torch._C._len_torch_function_stack()
        and not torch._C._is_any_autocast_enabled()
        and not torch.cuda.is_initialized()
        and not _reduced()
    )


def _reduced() -> bool:
    """Whether fp32 products may run in TF32 or bf16."""
    if _precision_of is None:
        return torch.get_float32_matmul_precision() != "highest"
    if any(_precision_of(*level) in _REDUCED for level in _PRODUCTS):
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the two interfaces disagree; the products are in fp32
        return False


def _compute_in_fp32(stack: contextlib.ExitStack) -> None:
    """Set fp32 products to fp32 by both interfaces; the stack restores the settings."""
    before = {} if _precision_of is None else {level: _precision_of(*level) for level in _LEVELS}
    for level in before:
        # A level that is still reduced was set itself: those that it could inherit from are in fp32 by now.
        precision = _precision_of(*level)  # pyright: ignore[reportOptionalCall] - without a getter there is no level
        if precision in _REDUCED:
            stack.callback(_set_precision, *level, precision)
            _set_precision(*level, "ieee")
    older = torch.get_float32_matmul_precision()  # raises where the two interfaces disagree: no longer
    if older != "highest":
        for level in _PRODUCTS if before else ():  # set_float32_matmul_precision changes these too
            inherited = before[level] == before[level[0], "all"]
            stack.callback(_set_precision, *level, "none" if inherited else before[level])
        stack.callback(torch.set_float32_matmul_precision, older)
        torch.set_float32_matmul_precision("highest")


def _sum_as_torch_does(stack: contextlib.ExitStack) -> None:
    """Set how 16-bit products are summed to torch's defaults; the stack restores the settings."""
    products = torch.backends.cuda.matmul
    for name, default in _16_BIT_SUMS.items():
        before = getattr(products, name, default)  # the first one exists from torch 2.7 on
        if isinstance(second := getattr(products, f"{name}_split_k", None), bool) and not second:
            before = (before, second)
        if before != default:
            stack.callback(setattr, products, name, before)
            setattr(products, name, default)
