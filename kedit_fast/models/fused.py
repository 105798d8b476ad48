"""Norms and activations of decoder blocks, each in one pass over memory, and in one more for its gradient.

Plain torch makes a pass over memory for each operation in them. A module's forward function is replaced only if its
class, run on a sample, gives the same bits as the replacement (or, for the composed GELU, agrees with it in fp64), and
the same gradient as the replacement's in fp64. So models with code of their own are safe: what is not recognized runs
as it is, and so does a norm whose weight requires grad, because the ops have no gradient for it.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import gelu, silu

from kedit_fast.backends import AUTO, probe, requested, select
from kedit_fast.models.patching import Forward, has_replaced_forward
from kedit_fast.ops import unregistered
from kedit_fast.ops.unregistered import GatedOp
from kedit_fast.reference.gated_silu import gated_silu_backward
from kedit_fast.reference.rms_norm import rms_norm as plain_norm
from kedit_fast.reference.rms_norm import rms_norm_backward, rms_norm_with_rstd
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_SAMPLE_ROWS = 4
SMALLEST_GATED = 131072
"""Entries of a gate from which one pass is worth its call: for fewer, torch's two operations take less time."""
_GRADIENT_ERROR = 1e-5
"""Of a class's gradient in fp32, relative to that of the replacement in fp64."""


def can_run() -> bool:
    """Whether kernels for some device can run, and no other backend was requested."""
    return any(map(_runs_on, ("cpu", "cuda")))


def _runs_on(device: str) -> bool:
    """Whether a kernel takes tensors of this kind of device: C++ on a CPU, Triton on a GPU or interpreted."""
    backend, triton = requested(None), probe("triton")
    if device == "cpu":
        interpreted = backend == "triton" and triton.explicit_only
        return interpreted or (backend in (AUTO, "cpu") and not probe("cpu").reason)
    return device == "cuda" and backend in (AUTO, "triton") and not triton.reason and not triton.explicit_only


@torch.no_grad()
@plain_torch()
def forwards(base: torch.nn.Module) -> dict[torch.nn.Module, Forward]:
    """Forward functions for the modules of a decoder that are recognized and whose tensors are on a CPU or a GPU."""
    replacements: dict[torch.nn.Module, Forward] = {}
    results: dict[Any, Any] = {}  # of recognizing a class

    def once(recognize: Callable[[torch.nn.Module], Any], module: torch.nn.Module) -> Any:
        key = recognize, type(module)
        if key not in results:
            results[key] = recognize(module)
        return results[key]

    for module in base.modules():
        if has_replaced_forward(module) or any(
            parameter.device.type not in ("cpu", "cuda") for parameter in module.parameters(recurse=False)
        ):
            continue  # wrapped by somebody (accelerate's hooks), or not here
        name = type(module).__name__
        if "RMSNorm" in name:
            parameters = [parameter for parameter, _ in module.named_parameters()]
            if parameters != ["weight"] or not isinstance(_eps(module), float):
                continue
            rule = once(_norm_rule, module)
            if rule is not None:
                replacements[module] = _norm(module, *rule)
        elif name == "NewGELUActivation":
            if once(_is_tanh_gelu, module):
                replacements[module] = _tanh_gelu(module)
        elif _parts(module) in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}):
            act = _activation(module)
            gated = None if act is None else once(_gated_op, act)
            if act is not None and gated is not None and once(_is_gated_mlp, module):
                replacements[module] = _gated_mlp(module, act, gated)
    return replacements


def _class_forward(module: torch.nn.Module) -> Forward:
    return functools.partial(type(module).forward, module)


def _sample(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(dtype)


def _eps(module: torch.nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm_weight(weight: torch.Tensor, plus_one: bool) -> torch.Tensor:
    return 1.0 + weight.float() if plus_one else weight


def _norm_rule(module: Any) -> tuple[bool, bool] | None:
    """How a norm's class computes: (by 1 + weight, in fp32?; is the quotient rounded first?). None if otherwise."""
    size, eps = module.weight.numel(), _eps(module)
    x, weight = _sample(_SAMPLE_ROWS, size, dtype=torch.bfloat16), _sample(size, dtype=torch.bfloat16)
    stand_in = copy.copy(module)
    vars(stand_in)["_parameters"] = {"weight": weight}
    result = _run(module, stand_in, x)
    for rule in ((False, True), (False, False), (True, False)):  # Llama; OLMo 2; Gemma
        if result is not None and torch.equal(result, plain_norm(x, _norm_weight(weight, rule[0]), eps, rule[1])):
            vars(stand_in)["_parameters"] = {"weight": weight.float()}
            gain = _norm_weight(weight, rule[0]).double()

            def slope(grad: torch.Tensor, wide: torch.Tensor, gain: torch.Tensor = gain) -> torch.Tensor:
                return rms_norm_backward(grad, wide, gain, rms_norm_with_rstd(wide, gain, eps, False)[1])

            return rule if _has_gradient(module, stand_in, x.float(), slope) else None
    return None


def _has_gradient(module: torch.nn.Module, stand_in: Any, x: torch.Tensor, slope: Callable[..., torch.Tensor]) -> bool:
    """Whether a class's gradient at fp32 x is `slope(grad, x)` in fp64."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        result = _run(module, stand_in, x)
    if result is None or not result.requires_grad:
        return False
    grad = _sample(*result.shape, dtype=torch.float32).flip(0)  # unlike the sample that x is
    try:
        (gradient,) = torch.autograd.grad(result, x, grad)
    except Exception as error:  # it may be any code
        _log.debug("%s is not replaced: its gradient: %s", type(module).__name__, error)
        return False
    expected = slope(grad.double(), x.detach().double())
    return bool((gradient.double() - expected).norm() <= _GRADIENT_ERROR * expected.norm())


def _run(module: torch.nn.Module, stand_in: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The result of a class's forward function on a stand-in for the module, without hooks; None if it fails."""
    try:
        return type(module).forward(stand_in, x)
    except Exception as error:  # it may be any code; what fails on a sample is not replaced
        _log.debug("%s is not replaced: %s", type(module).__name__, error)
        return None


def _norm(module: Any, plus_one: bool, round_first: bool) -> Forward:
    def forward(hidden_states: torch.Tensor, *gate: Any, **gates: Any) -> torch.Tensor:
        weight = module.weight
        trained = torch.is_grad_enabled() and weight.requires_grad
        if gate or gates or trained or hidden_states.dtype != weight.dtype or not _takes(hidden_states, "rms_norm"):
            return _class_forward(module)(hidden_states, *gate, **gates)  # Mamba 2's norm may get a gate as well
        return unregistered.norm(hidden_states, _norm_weight(weight, plus_one), _eps(module), round_first)

    return forward


def _takes(states: torch.Tensor, op: str = "gated_silu") -> bool:
    """Whether states are replaced: a kernel, not the reference of the op, runs on them."""
    device = states.device.type
    if states.dtype == torch.float64 or not _runs_on(device):
        return False
    return device == "cpu" or select(op, requested(None), states).backend != "torch"


def _is_tanh_gelu(module: torch.nn.Module) -> bool:
    x = 3 * _sample(256, dtype=torch.float64)
    result = _run(module, module, x)
    if result is None or not torch.allclose(result, gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-14):
        return False
    return _has_gradient(module, module, x.float(), _gelu_slope)


def _gelu_slope(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def _tanh_gelu(module: torch.nn.Module) -> Forward:
    def forward(input: torch.Tensor) -> torch.Tensor:
        return gelu(input, approximate="tanh") if _takes(input) else _class_forward(module)(input)

    return forward


def _activation(module: torch.nn.Module) -> torch.nn.Module | None:
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    return act if isinstance(act, torch.nn.Module) else None


def _watched(module: torch.nn.Module) -> bool:
    """Whether somebody wants to see or change what this module computes, so that it must be called."""
    of_all = torch.nn.modules.module  # hooks on all modules of the process
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        of_all._global_forward_hooks,
        of_all._global_forward_pre_hooks,
    )
    return any(hooks) or has_replaced_forward(module)


def _gated_op(module: torch.nn.Module) -> GatedOp | None:
    """The op of MLPs with this activation; None where there is none."""
    x = _sample(256, dtype=torch.float32)
    result = _run(module, module, x)
    if result is None:
        return None
    if torch.equal(result, silu(x)) and _has_gradient(module, module, x, torch.ops.aten.silu_backward):
        return "gated_silu"
    if torch.equal(result, gelu(x, approximate="tanh")) and _has_gradient(module, module, x, _gelu_slope):
        return "gated_gelu"
    return None


def _gate_and_up(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(module, "gate_up_proj"):  # Phi-3
        gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return gate, up
    return module.gate_proj(hidden_states), module.up_proj(hidden_states)


def _parts(module: torch.nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()} - {"act_fn", "activation_fn"}


def _is_gated_mlp(module: torch.nn.Module) -> bool:
    """Whether the class computes down(silu(gate(x)) * up(x)): its forward function is run with small matrices."""
    names = _parts(module)
    wide, down = _sample(16, 64, dtype=torch.float32), _sample(32, 16, dtype=torch.float32)
    if "gate_up_proj" in names:
        parts = {"gate_up_proj": lambda x: x @ wide}
    else:
        parts = {"gate_proj": lambda x: x @ wide[:, :32], "up_proj": lambda x: x @ wide[:, 32:]}
    stand_in = SimpleNamespace(
        **parts, down_proj=lambda x: x @ down, act_fn=silu, activation_fn=silu, config=getattr(module, "config", None)
    )
    x = _sample(_SAMPLE_ROWS, 16, dtype=torch.float32)
    result, (gate, up) = _run(module, stand_in, x), _gate_and_up(stand_in, x)
    if result is None or not torch.equal(result, (silu(gate) * up) @ down):
        return False

    def slope(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        matrix = wide.double()
        gate, up = (x @ matrix).chunk(2, dim=-1)
        return torch.cat(gated_silu_backward(grad @ down.double().T, gate, up), -1) @ matrix.T

    return _has_gradient(module, stand_in, x, slope)


def _gated_mlp(module: Any, act: torch.nn.Module, op: GatedOp) -> Forward:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if not _takes(hidden_states) or _activation(module) is not act or _watched(act):
            return _class_forward(module)(hidden_states)
        gate, up = _gate_and_up(module, hidden_states)
        gated = act(gate) * up if gate.numel() < SMALLEST_GATED else unregistered.gated(op, gate, up)
        return module.down_proj(gated)

    return forward
