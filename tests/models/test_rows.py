from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, POST_NORM, make_model

from kedit_fast.models.forward import evaluating, last_states, pad
from kedit_fast.models.row_runner import RowPass, RowRunner, product, record_rows, row_pass
from kedit_fast.models.view import ModelView

ROWS = [[5, 9, 33, 21, 8], [7, 77, 50], [3, 4, 5, 6, 7, 8, 99, 100], [11]]
WANTED = torch.tensor([2, 4, 7, 15, 16])


def suffix_pass(view: ModelView, layer: int, how: RowPass, weight: torch.Tensor, changed: torch.Tensor):
    """Last states and the gradient of their squares by the changed weight, from its inputs and what stands beside."""
    with evaluating(view):
        recorded = record_rows(view, ROWS, layer, weight, how)
        runner = RowRunner(view, layer, how, pad(ROWS, view.device), recorded.beside)
        outputs = product(recorded.inputs, changed).requires_grad_(True)
        with torch.enable_grad():
            hidden = runner.run(outputs, WANTED)
            (left,) = torch.autograd.grad(hidden.square().sum(), outputs)
    return hidden.detach(), left.T @ recorded.inputs.to(left)


def whole_model(view: ModelView, layer: int, changed: torch.Tensor):
    """The same, from the model with the changed weight written into it."""
    parameter, batch = view.edited_module(layer).weight, pad(ROWS, view.device)
    assert batch.attention_mask is not None
    with torch.no_grad():
        parameter.copy_(changed.T if view.spec.transposed else changed)
    hidden = last_states(view, batch)[batch.attention_mask.bool()][WANTED]
    (gradient,) = torch.autograd.grad(hidden.square().sum(), parameter)
    return hidden.detach(), gradient.T if view.spec.transposed else gradient


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_run_as_in_the_model_with_the_changed_weight(kind):
    view = ModelView(make_model(kind))
    for layer in (0, 1, 3):
        how = row_pass(view, layer)
        assert how.kind == ("padded rows" if kind == "gptj" else "packed rows")
        assert bool(how.norm) == (kind in POST_NORM)
        weight = view.weight(layer).clone()
        changed = weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer))
        hidden, gradient = suffix_pass(view, layer, how, weight, changed)
        expected, expected_gradient = whole_model(view, layer, changed)
        assert error(hidden, expected) < 2e-6 and error(gradient, expected_gradient) < 1e-5
        view.edited_module(layer).weight.data.copy_(weight.T if view.spec.transposed else weight)


@pytest.mark.parametrize("kind", ("gpt2", "gptj"))  # others compute parts in fp32
def test_in_double_precision_rows_run_to_its_rounding(kind):
    view = ModelView(make_model(kind, torch.float64))
    weight = view.weight(1).clone()
    changed = weight + 0.05
    hidden, gradient = suffix_pass(view, 1, row_pass(view, 1), weight, changed)
    expected, expected_gradient = whole_model(view, 1, changed)
    assert error(hidden, expected) < 1e-12 and error(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize("kind", ("gpt2", "gemma2"))
@pytest.mark.parametrize("midway", (True, False))
def test_the_edited_block_and_those_above_give_the_same(kind, midway):
    view = ModelView(make_model(kind))
    weight = view.weight(2).clone()
    changed = weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    hidden, gradient = suffix_pass(view, 2, RowPass("whole rows", midway=midway), weight, changed)
    expected, expected_gradient = whole_model(view, 2, changed)
    assert error(hidden, expected) < 2e-6 and error(gradient, expected_gradient) < 1e-5


def test_a_model_of_another_layout_falls_back(monkeypatch):
    import kedit_fast.models.row_runner as row_runner

    view = ModelView(make_model("llama"))
    broken = row_runner.TailRunner.run_states
    monkeypatch.setattr(row_runner.TailRunner, "run_states", lambda self, *args: 1.5 * broken(self, *args))
    assert row_pass(view, 1).kind == "whole rows"


@pytest.mark.parametrize("passes", ("float32", "native"))
def test_rows_of_a_bfloat16_model_run_in_its_dtype_of_passes(passes, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", passes)
    view = ModelView(make_model("llama", torch.bfloat16))
    how = row_pass(view, 1)
    with evaluating(view):
        weight = view.weight(1).float()
        recorded = record_rows(view, ROWS, 1, weight, how)
        runner = RowRunner(view, 1, how, pad(ROWS, view.device), recorded.beside)
        hidden = runner.run(recorded.outputs, WANTED)
        batch = pad(ROWS, view.device)
        assert batch.attention_mask is not None
        expected = last_states(view, batch)[batch.attention_mask.bool()][WANTED]
    assert recorded.outputs.dtype == torch.float32
    if passes == "float32":
        assert error(hidden.float(), expected.float()) < 1e-2
        return
    view.model.double()  # of the same weights: bfloat16 rows may be as far from it as the model's own
    exact = last_states(view, batch)[batch.attention_mask.bool()][WANTED].float()
    assert error(hidden.float(), exact) < 1.5 * error(expected.float(), exact)
