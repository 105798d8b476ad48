"""Norms and activations in one pass: what is recognised, what is not, and that states stay what they were."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error
from tiny_models import KINDS, make_model

from kedit_fast.backends import probe, use_backend
from kedit_fast.errors import GradientError
from kedit_fast.models import fused
from kedit_fast.models.forward import Site, evaluating, fused_forwards, hidden_of, last_states, pad, with_hidden
from kedit_fast.models.patching import output_hooks
from kedit_fast.models.prompt_runner import record_prompts
from kedit_fast.models.row_runner import RowRunner, record_rows, row_pass
from kedit_fast.models.view import ModelView
from kedit_fast.ops.unregistered import gated

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [20] * 7]
RECOGNISED = {  # of 4 blocks and the norm before the head
    "gpt2": 4, "gptj": 4, "gpt_neox": 0, "llama": 13, "mistral": 13, "qwen2": 13, "qwen3": 21, "phi3": 13,
    "gemma2": 21, "gemma3_text": 29, "olmo2": 21,
}  # fmt: skip


@pytest.fixture(autouse=True)
def native(cpu_module, monkeypatch):
    monkeypatch.setattr(fused, "SMALLEST_GATED", 0)
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


def slope(view, rows=ROWS):
    """The gradient of a weighed sum of last states in what is added to the first block's output."""
    batch = pad(rows, torch.device("cpu"))
    with evaluating(view), torch.enable_grad():
        delta = torch.zeros(view.model.config.hidden_size, requires_grad=True)

        def add(module, args, output):
            return with_hidden(output, hidden_of(output) + delta.to(hidden_of(output).dtype))

        with output_hooks([(view.block(0), add)]):
            result = last_states(view, batch)
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((result.float() * weights).sum(), delta)
    return gradient


@pytest.fixture
def calls(monkeypatch):
    """The class of each module whose forward function is replaced, whenever the class's own runs."""
    names = []

    def watch(view):
        _ = view.head  # the first time, it runs the model
        for kind in {type(module) for module in view.once(fused_forwards)}:

            def forward(self, *args, original=kind.forward, **kwargs):
                names.append(type(self).__name__)
                return original(self, *args, **kwargs)

            monkeypatch.setattr(kind, "forward", forward)
        return names

    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_has_the_same_gradients(kind, calls):
    view = ModelView(make_model(kind))
    names = calls(view)
    replaced = slope(view)
    assert not names
    with use_backend("torch"):
        plain = slope(view)
    assert len(names) == RECOGNISED[kind] and relative_error(replaced, plain) < 1e-5


@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma2", "olmo2"))
def test_gradients_in_bf16_differ_by_rounding(kind, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", "native")
    exact = slope(ModelView(make_model(kind)))
    view = ModelView(make_model(kind, torch.bfloat16))
    replaced = slope(view)
    with use_backend("torch"):
        plain = slope(view)
    assert relative_error(replaced, exact) < 1.2 * relative_error(plain, exact)


def test_interpreted_triton_kernels_take_a_models_norms_and_activations():
    if not probe("triton").explicit_only:
        pytest.skip("the interpreter is not in use: Triton takes no tensors of the CPU")
    for kind in ("llama", "gemma2"):
        view, rows = ModelView(make_model(kind)), [[5, 6, 7]]
        with use_backend("torch"):
            plain = slope(view, rows)
        with use_backend("triton"):
            assert fused.can_run() and relative_error(slope(view, rows), plain) < 1e-5


@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_passes_over_tails_and_rows_replace_modules(kind, calls):
    """Passes of value and tuning loops, with gradients: no class's own forward function runs."""
    view = ModelView(make_model(kind))
    names, how = calls(view), row_pass(view, 1)
    site = Site(1, "mlp")
    with evaluating(view):
        weight = view.weight(1).clone()
        recorded = record_rows(view, ROWS, 1, weight, how)
        rows = RowRunner(view, 1, how, pad(ROWS, view.device), recorded.beside)
        prompts = record_prompts(view, ROWS, [1, 1, 2], [site])
        delta = torch.zeros(3, 1, 32, requires_grad=True)
        outputs = recorded.outputs.clone().requires_grad_()
        wanted = torch.tensor([0, 2])

        def slopes():
            results = prompts.runner.run(delta, wanted), rows.run(outputs, wanted)
            return torch.autograd.grad([result.square().sum() for result in results], (delta, outputs))

        names.clear()
        replaced = slopes()
        assert not names
        with use_backend("torch"):
            plain = slopes()
    assert names and all(relative_error(a, b) < 1e-5 for a, b in zip(replaced, plain, strict=True))


def test_a_few_rows_are_gated_by_torchs_own_operations(monkeypatch):
    view = ModelView(make_model("llama"))
    with use_backend("torch"):
        plain = slope(view)
    for smallest in (0, 10**9):
        monkeypatch.setattr(fused, "SMALLEST_GATED", smallest)
        ops = []
        monkeypatch.setattr(fused.unregistered, "gated", lambda *args, ops=ops: ops.append(args[0]) or gated(*args))
        assert relative_error(slope(view), plain) < 1e-5
        assert bool(ops) == (smallest == 0)


def test_a_second_derivative_through_a_model_is_refused():
    view, batch = ModelView(make_model("llama")), pad(ROWS, torch.device("cpu"))
    delta = torch.zeros(32, requires_grad=True)
    with evaluating(view), output_hooks([(view.mlp(1), lambda module, args, output: output + delta)]):
        result = last_states(view, batch)
        with pytest.raises(GradientError, match="no second derivative"):
            torch.autograd.grad(result.square().sum(), delta, create_graph=True)


def test_norms_whose_weights_are_trained_take_their_own_code(calls):
    model = make_model("llama")
    view = ModelView(model)
    names = calls(view)
    last_states(view, pad(ROWS, torch.device("cpu"))).square().mean().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())
    assert names == ["LlamaRMSNorm"] * 9
    trained = model.model.norm.weight.grad.clone()
    model.zero_grad()
    with use_backend("torch"):
        last_states(view, pad(ROWS, torch.device("cpu"))).square().mean().backward()
    assert relative_error(trained, model.model.norm.weight.grad) < 1e-5


def test_a_class_with_another_gradient_is_left_alone():
    """Its results are those of the norm, bit for bit; what it sends back is not."""
    norm = make_model("llama").model.norm

    class DetachedRMSNorm(type(norm)):
        def forward(self, hidden_states):
            wide = hidden_states.float()
            rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
            return self.weight * (wide * rstd).to(hidden_states.dtype)

    assert norm in fused.forwards(torch.nn.Sequential(norm))
    norm.__class__ = DetachedRMSNorm
    assert fused.forwards(torch.nn.Sequential(norm)) == {}


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
