"""`values_dtype`: where iterations multiply in bfloat16, what they change, and what stays exact."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import prepared_and_hparams
from tiny_models import make_model, make_tokenizer, needs_experts

from kedit_fast import Editor, EditRequest, demo
from kedit_fast.editing.values import values_dtype
from kedit_fast.editing.values.loop import find_values
from kedit_fast.editing.values.objective import Objective
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.editing.values.values_dtype import ANYWHERE, copied_bytes, multiplying, value_matrices
from kedit_fast.errors import EditError, MethodError
from kedit_fast.evaluation.metrics import shares
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.models.half_matrices import HalfMatrices
from kedit_fast.models.patching import output_hooks, patches_on
from kedit_fast.models.view import ModelView
from kedit_fast.reports.plan import plan

HALF = {"values_dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setenv(ANYWHERE, "anywhere")


def case(kind="llama", dtype=torch.float32, **numbers):
    model, tokenizer = make_model(kind, dtype), make_tokenizer()
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1, **{"v_num_grad_steps": 4, **numbers})
    return ModelView(model), prepared, hparams


def test_the_demo_model_learns_as_much(demo_model, demo_statistics):
    """24 facts: efficacy within a point of fp32's; values differ a little; the model is restored bit for bit."""
    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requests = [EditRequest(r.prompt, r.subject, r.target_new) for r in demo.requests(24)]  # nothing else is measured
    efficacy, results = [], []
    for numbers in ({}, HALF):
        editor = Editor(
            model, tokenizer, "memit", statistics=demo_statistics, hparams=numbers, prefixes=("The old man. ",)
        )
        try:
            results.append(editor.edit(requests))
            efficacy.append(shares(model, tokenizer, requests).efficacy)
        finally:
            editor.restore()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not patches_on(model)
    assert abs(efficacy[1] - efficacy[0]) <= 0.01 and efficacy[0] > 0.9
    gaps = [
        float((half.left @ half.right.T - full.left @ full.right.T).norm() / (full.left @ full.right.T).norm())
        for (full,), (half,) in zip(*(result.updates.values() for result in results), strict=True)
    ]
    assert 1e-4 < max(gaps) < 0.2, "an approximation: neither the same bits nor another edit"


@pytest.mark.parametrize("kind", ("gpt2", "llama", "gemma2", "gptj"))
def test_values_are_near_those_of_the_models_dtype_and_what_is_recorded_is_exact(kind):
    view, prepared, hparams = case(kind)
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    exact = find_values(view, prepared, 1, "mlp", hparams)
    half = find_values(view, prepared, 1, "mlp", replace(hparams, **HALF))
    assert half.all_targets.dtype == torch.float64 and half.all_deltas.dtype == torch.float32
    torch.testing.assert_close(half.targets - half.deltas.double(), exact.targets - exact.deltas.double())  # h0
    gaps = (half.targets - exact.targets).norm(dim=0) / exact.deltas.norm(dim=0)
    assert 1e-5 < float(gaps.median()) < 0.1  # not of all: a first step goes by the signs of small gradients
    assert float((half.losses - exact.losses).abs().median()) < 0.05 * float(exact.losses.max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in view.model.state_dict().items())


def test_matrices_multiply_in_bfloat16_and_nothing_else_does():
    view, _, _ = case()
    block = view.block(2)
    layer, states = block.mlp.up_proj, torch.randn(3, 32, requires_grad=True)
    seen = {}
    hooks = [(m, lambda m, a, o, n=n: seen.__setitem__(n, o)) for n, m in block.named_modules() if "norm" in n]
    with HalfMatrices(view, 2).installed(), output_hooks(hooks):
        output = layer(states)
        assert view.block(1).mlp.up_proj(states).equal(states @ view.block(1).mlp.up_proj.weight.T), (
            "blocks below run as ever"
        )
        block.post_attention_layernorm(states)
    expected = (states.bfloat16() @ layer.weight.bfloat16().T).float()
    assert torch.equal(output, expected) and output.dtype == torch.float32
    (gradient,) = torch.autograd.grad(output.square().sum(), states)
    assert torch.equal(gradient, ((2 * expected).bfloat16() @ layer.weight.bfloat16()).float())
    assert all(part.dtype == torch.float32 for part in seen.values()) and seen
    assert layer.weight.grad is None and torch.equal(layer(states), states @ layer.weight.T)


@pytest.mark.parametrize("kind", ("gpt2", "llama", "gemma2"))
def test_gradients_are_those_of_the_model_to_the_rounding_of_bfloat16(kind):
    view, prepared, _ = case(kind)
    with evaluating(view):
        objective = Objective.build(view, prepared, [Site(1, "mlp")])
        gradients = []
        for matrices in (None, HalfMatrices(view, 1)):
            delta = torch.zeros_like(objective.h0).requires_grad_(True)
            with multiplying(matrices):
                loss = objective.terms(delta).nll.sum()
            gradients.append(torch.autograd.grad(loss, delta)[0])
    errors = (gradients[1] - gradients[0]).norm(dim=2) / gradients[0].norm(dim=2)
    assert 1e-4 < float(errors.max()) < 0.03


def test_biases_are_added_in_the_models_dtype():
    view, _, _ = case("gpt2")
    layer, states = view.block(2).mlp.c_fc, torch.randn(2, 3, 32)
    with HalfMatrices(view, 2).installed():
        output = layer(states)
    assert torch.equal(output, (states.bfloat16() @ layer.weight.bfloat16()).float() + layer.bias)


def test_iterations_alone_use_the_copies_and_they_are_freed(monkeypatch):
    view, prepared, hparams = case(**HALF)
    inside = []
    original = HalfMatrices.installed

    def installed(self):
        inside.append(weakref.ref(self))
        return original(self)

    monkeypatch.setattr(HalfMatrices, "installed", installed)
    find_values(view, prepared, 1, "mlp", hparams)
    assert len(inside) == hparams.v_num_grad_steps and inside[0]() is None


def test_stored_values_of_the_other_choice_are_not_used(tmp_path, demo_model):
    def edit(**numbers):
        numbers = {"v_num_grad_steps": 2, **numbers}
        editor = Editor(
            *demo_model, "rome", hparams={**numbers, "mom2_adjustment": False}, prefixes=(), values=tmp_path / "v"
        )
        try:
            editor.edit(demo.requests(1))
        finally:
            editor.restore()
        return len(ValueFile(tmp_path / "v").entries)

    assert [edit(), edit(), edit(**HALF), edit(**HALF)] == [1, 1, 2, 2]


def test_a_processor_without_amx_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.delenv(ANYWHERE)
    view, prepared, hparams = case(**HALF)
    for features, units, reason in (
        (["avx2"], True, "this processor has no amx_bf16"),
        (["amx_bf16", "amx_tile"], False, "torch does not use this processor's bfloat16 units"),
    ):
        module = SimpleNamespace(cpu_features=lambda features=features: features)
        monkeypatch.setattr(values_dtype, "load", lambda name, module=module: (module, ""))
        monkeypatch.setattr(values_dtype, "has_units", lambda dtype, units=units: units)
        with pytest.raises(
            EditError, match=f'needs a CUDA device, or a processor with AMX .* {reason}; use values_dtype = "model"'
        ):
            find_values(view, prepared, 1, "mlp", hparams)
    monkeypatch.setattr(values_dtype, "has_units", lambda dtype: True)
    assert value_matrices(view, [Site(1, "mlp")], hparams) is not None
    monkeypatch.setattr(values_dtype, "load", lambda name: (None, "not built"))
    with pytest.raises(EditError, match=r"the C\+\+ module, which knows the processor, is missing \(not built\)"):
        find_values(view, prepared, 1, "mlp", hparams)
    monkeypatch.setenv(ANYWHERE, "everywhere")
    with pytest.raises(EditError, match="KEDIT_FAST_BF16_VALUES must be anywhere or unset; got 'everywhere'"):
        find_values(view, prepared, 1, "mlp", hparams)


def test_models_that_it_is_not_for_are_refused_by_name(monkeypatch):
    view, prepared, hparams = case("llama", torch.float64, **HALF)
    with pytest.raises(EditError, match="is for models that compute in float32; this one computes in float64"):
        find_values(view, prepared, 1, "mlp", hparams)
    view, prepared, hparams = case(**HALF)
    view.model.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(EditError, match="does not go with this model: it is quantized"):
        find_values(view, prepared, 1, "mlp", hparams)
    with pytest.raises(
        MethodError, match="values_dtype = 'float16' is out of range for rome: it must be one of model, bfloat16"
    ):
        case(values_dtype="float16")


@needs_experts
def test_mixtures_are_refused():
    view, prepared, hparams = case("qwen3_moe", **HALF)
    with pytest.raises(EditError, match="it is a mixture of experts, whose matrices are no linear layers"):
        find_values(view, prepared, 1, "mlp", hparams)


def test_a_model_that_computes_in_bfloat16_is_not_changed_by_it(monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", "native")
    view, prepared, hparams = case("llama", torch.bfloat16, v_num_grad_steps=2)
    half = replace(hparams, **HALF)
    values = [find_values(view, prepared, 1, "mlp", numbers) for numbers in (hparams, half)]
    assert torch.equal(values[0].targets, values[1].targets) and copied_bytes(view, [Site(1, "mlp")], half) == 0


def test_a_widened_model_takes_its_own_matrices(monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", "float32")
    view, prepared, hparams = case("llama", torch.bfloat16, v_num_grad_steps=2, **HALF)
    assert copied_bytes(view, [Site(1, "mlp")], hparams) == 0, "they are bfloat16 already"
    values = find_values(view, prepared, 1, "mlp", hparams)
    exact = find_values(view, prepared, 1, "mlp", replace(hparams, values_dtype="model"))
    gaps = (values.targets - exact.targets).norm(dim=0) / exact.deltas.norm(dim=0)
    assert 1e-7 < float(gaps.median()) < 0.1


@pytest.mark.parametrize("numbers", ({}, dict(values_batch=2), dict(check_every=3)), ids=str)
def test_batches_and_polls_do_not_matter(numbers):
    view, prepared, hparams = case(**HALF)
    expected = [find_values(view, [request], 1, "mlp", hparams) for request in prepared]
    values = find_values(view, prepared, 1, "mlp", replace(hparams, **numbers))
    for i, alone in enumerate(expected):
        assert int(values.steps[i]) == int(alone.steps[0])
        assert float((values.targets[:, i] - alone.targets[:, 0]).norm() / alone.deltas.norm()) < 0.05


def test_a_graph_needs_what_it_always_does():
    view, prepared, hparams = case(values_graph=True, **HALF)
    with pytest.raises(EditError, match="values_graph needs a CUDA device"):
        find_values(view, prepared, 1, "mlp", hparams)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graph", (False, True))
def test_on_a_gpu_no_variable_is_needed(graph, monkeypatch):
    monkeypatch.delenv(ANYWHERE)
    view, prepared, hparams = case()
    view.model.cuda()
    exact = find_values(view, prepared, 1, "mlp", hparams)
    half = replace(hparams, values_graph=graph, **HALF)
    values = find_values(view, prepared, 1, "mlp", half)
    gaps = (values.targets - exact.targets).norm(dim=0) / exact.deltas.norm(dim=0)
    assert 1e-6 < float(gaps.max()) < 0.3


def test_the_plan_names_the_copies(demo_model):
    model, tokenizer = demo_model
    view = ModelView(model)
    hparams, _ = make_hparams("memit", model.config, HALF)
    copies = copied_bytes(view, [Site(hparams.layers[-1], "block")], hparams)
    last = view.block(view.num_layers - 1)
    each = sum(2 * m.weight.numel() for m in last.modules() if isinstance(m, torch.nn.Linear))
    assert copies == each * (view.num_layers - 1 - hparams.layers[-1]) > 0
    options = dict(requests=demo.requests(1), hparams={**HALF, "v_num_grad_steps": 2})
    planned = plan(model, tokenizer, 1, **options)
    assert planned.bytes["matrices in bfloat16, while values are optimized"] == copies
    options["hparams"] = {}
    assert not [name for name in plan(model, tokenizer, 1, **options).bytes if "bfloat16" in name]
