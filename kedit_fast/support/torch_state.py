"""torch as it starts: what other code has set for the whole process does not reach our results.

`plain_torch()` stands around every entry point, because a model's own forward function may read any of these settings;
code of our own names dtypes and devices besides. Autocast, the default device and inference mode belong to the calling
thread. The default dtype and the precision of products belong to the process: while they are put back here, other
threads see torch's own defaults too, and a thread that leaves gives its settings back to one that is still inside. Our
own code names its dtypes; a model that reads the default dtype in its forward function is to be run by one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")
_REDUCED = ("tf32", "bf16")
# Where the precision of fp32 products can be set, each level before those that follow it unless they have their own.
_LEVELS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul"))
_PRODUCTS = _LEVELS[-2:]
_precision_of = getattr(torch._C, "_get_fp32_precision_getter", None)  # torch 2.9 and later
_set_precision = getattr(torch._C, "_set_fp32_precision_setter", None)
_16_BIT_SUMS = {  # of CUDA products; a second setting, in later versions, belongs to the first
    "allow_fp16_accumulation": False,
    "allow_fp16_reduced_precision_reduction": True,
    "allow_bf16_reduced_precision_reduction": True,
}


@contextlib.contextmanager
def plain_torch(leave_inference_mode: bool = True) -> Iterator[None]:
    """As long as the block lasts, torch computes as if nobody had set anything.

    That is: fp32 and the CPU where no dtype and no device is named; no autocast; fp32 products in fp32, by whichever
    interface TF32 or bf16 was asked for; torch's own choice for sums of 16-bit products. Deterministic mode stays as
    it is. Afterwards, also after an error, everything is what it was. It is a decorator too.

    Args:
        leave_inference_mode: where the caller is in inference mode, make normal tensors, without gradients. False
            where tensors of the caller are written, which may be inference tensors.
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
            stack.callback(torch.clear_autocast_cache)  # it may hold weights as they were before an edit
            for kind in (kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)):
                stack.callback(torch.set_autocast_enabled, kind, True)
                torch.set_autocast_enabled(kind, False)
        if _reduced():
            _compute_in_fp32(stack)
        if torch.cuda.is_initialized():
            _sum_as_torch_does(stack)
        yield


def _reduced() -> bool:
    """Whether fp32 products may run in TF32 or bf16."""
    if _precision_of is None:
        return torch.get_float32_matmul_precision() != "highest"
    if any(_precision_of(*level) in _REDUCED for level in _PRODUCTS):
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the two interfaces disagree; what the products do is in fp32
        return False


def _compute_in_fp32(stack: contextlib.ExitStack) -> None:
    """Set fp32 products to fp32 by both interfaces, and let the stack set back what was."""
    before = {} if _precision_of is None else {level: _precision_of(*level) for level in _LEVELS}
    for level in before:
        if (own := _precision_of(*level)) in _REDUCED:  # not taken from a level above, which is in fp32 by now
            stack.callback(_set_precision, *level, own)
            _set_precision(*level, "ieee")
    older = torch.get_float32_matmul_precision()  # it raises where the two disagree, which they no longer do
    if older != "highest":
        for level in _PRODUCTS if before else ():  # what follows sets these as well
            inherited = before[level] == before[level[0], "all"]
            stack.callback(_set_precision, *level, "none" if inherited else before[level])
        stack.callback(torch.set_float32_matmul_precision, older)
        torch.set_float32_matmul_precision("highest")


def _sum_as_torch_does(stack: contextlib.ExitStack) -> None:
    """Set how 16-bit products are summed to torch's defaults, and let the stack set back what was."""
    products = torch.backends.cuda.matmul
    for name, default in _16_BIT_SUMS.items():
        before = getattr(products, name, default)  # the first is of torch 2.7 and later
        if isinstance(second := getattr(products, f"{name}_split_k", None), bool) and not second:
            before = (before, second)
        if before != default:
            stack.callback(setattr, products, name, before)
            setattr(products, name, default)
