"""Norms and activations in one pass: what is recognised, what is not, and that states stay what they were."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error
from tiny_models import KINDS, make_model

from kedit_fast.backends import use_backend
from kedit_fast.models import fused
from kedit_fast.models.forward import fused_forwards, last_states, pad
from kedit_fast.models.view import ModelView

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [20] * 7]
RECOGNISED = {  # of 4 blocks and the norm before the head
    "gpt2": 4, "gptj": 4, "gpt_neox": 0, "llama": 13, "mistral": 13, "qwen2": 13, "qwen3": 21, "phi3": 13,
    "gemma2": 17, "gemma3_text": 25, "olmo2": 21,
}  # fmt: skip


@pytest.fixture(autouse=True)
def native(cpu_module):
    return cpu_module


@torch.no_grad()
def states(model):
    return last_states(ModelView(model), pad(ROWS, torch.device("cpu")))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_the_same_states(kind):
    model = make_model(kind)
    assert len(fused_forwards(ModelView(model))) == RECOGNISED[kind]
    before = {name: module.forward for name, module in model.named_modules()}
    found = states(model)
    with use_backend("torch"):
        plain = states(model)
    assert relative_error(found, plain) < 1e-5
    assert {name: module.forward for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma2", "olmo2"))
def test_in_bf16_states_differ_by_rounding(kind):
    exact = states(make_model(kind))
    model = make_model(kind, torch.bfloat16)
    found = states(model)
    with use_backend("torch"):
        plain = states(model)
    assert relative_error(found, exact) < 1.2 * relative_error(plain, exact)


class OtherRMSNorm(torch.nn.Module):
    """A norm by that name that computes something else."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class OtherMLP(torch.nn.Module):
    """The modules of a gated MLP, used otherwise."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))
        self.act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + 1)


class Broken(OtherMLP):
    def forward(self, x):
        raise KeyError("not with this input")


@pytest.mark.parametrize("module", (OtherRMSNorm(8), OtherMLP(), Broken()), ids=lambda m: type(m).__name__)
def test_modules_that_compute_something_else_are_left_alone(module):
    assert fused.forwards(torch.nn.Sequential(module)) == {}


def test_a_subclass_is_asked_itself():
    model = make_model("llama")
    norm = model.model.layers[0].input_layernorm

    class Louder(type(norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    norm.__class__ = Louder
    found = fused_forwards(ModelView(model))
    assert norm not in found and model.model.layers[1].input_layernorm in found


def test_gradients_take_the_modules_own_code():
    model = make_model("llama")
    loss = last_states(ModelView(model), pad(ROWS, torch.device("cpu"))).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


def test_hooks_see_what_they_saw():
    """Recognition calls no hook, and hooks on modules that are replaced, or inside them, are called."""
    model, calls = make_model("llama"), []
    mlp = model.model.layers[1].mlp
    for module in (mlp, mlp.act_fn, mlp.up_proj, model.model.layers[1].input_layernorm):
        module.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    assert len(fused_forwards(ModelView(model))) == RECOGNISED["llama"] and not calls
    found = states(model)
    # transformers shares one activation among all blocks: a hook on it is called by each
    assert sorted(set(calls)) == ["Linear", "LlamaMLP", "LlamaRMSNorm", type(mlp.act_fn).__name__]
    with use_backend("torch"):
        assert relative_error(found, states(model)) < 1e-5


def test_an_instance_that_was_changed_runs_its_own_code():
    """An activation put in later, a hook on every module, and one norm of many with a parameter more."""
    model = make_model("llama")
    view = ModelView(model)
    assert len(fused_forwards(view)) == RECOGNISED["llama"]
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with torch.no_grad():
        found = last_states(view, pad(ROWS, torch.device("cpu")))
        with use_backend("torch"):
            plain = last_states(view, pad(ROWS, torch.device("cpu")))
    assert relative_error(found, plain) < 1e-5
    calls = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: calls.append(type(m).__name__))
    try:
        states(model)
    finally:
        handle.remove()
    assert "SiLUActivation" in calls or "SiLU" in calls
    model = make_model("llama")
    norm = model.model.layers[2].input_layernorm
    norm.bias = torch.nn.Parameter(torch.ones(32))
    assert (
        norm not in fused_forwards(ModelView(model))
        and len(fused_forwards(ModelView(model))) == RECOGNISED["llama"] - 1
    )


def test_wrapped_modules_keep_their_wrapper():
    model, seen = make_model("llama"), []
    norm = model.model.norm
    own = norm.forward
    norm.forward = lambda x: seen.append(1) or own(x)
    assert norm not in fused_forwards(ModelView(model))
    states(model)
    assert seen and vars(norm)["forward"] is not own
