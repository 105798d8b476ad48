"""Edits of a mixture of experts, end to end: against plain hooks and one dense stacked system, in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from floors import relative_error
from support import PREFIXES, REQUESTS, same, weights
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, EditRequest, collect_statistics
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import KeditError
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare

LAYERS = (1, 2)
NUMBERS = dict(v_num_grad_steps=6, v_lr=0.1, clamp_norm_factor=0.5, v_weight_decay=0.5, mom2_update_weight=10.0)
NULL_SPACE = {"nullspace_rule": "energy", "nullspace_threshold": 0.3, "L2": 2.0}
METHODS = {"memit": {}, "memit-sequential": {}, "alphaedit": NULL_SPACE}


@pytest.fixture(scope="module")
def original():
    """The model, as nobody may change it, and its statistics."""
    model = make_model("qwen3_moe", torch.float64)
    return model, collect_statistics(model, make_tokenizer(), TEXT * 2, LAYERS, progress=False)


def editor_of(original, method="memit", layers=LAYERS, prefixes=PREFIXES, **hparams):
    model, statistics = original
    numbers = {**NUMBERS, **METHODS.get(method, {}), **hparams}
    return Editor(
        copy.deepcopy(model), make_tokenizer(), method, statistics=statistics, layers=layers, hparams=numbers,
        prefixes=prefixes,
    )  # fmt: skip


def activations(experts, expert, states):
    """What enters one expert's last matrix, written out."""
    gate, up = (states @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@torch.no_grad()
def seen(model, layer, ids):
    """Stacked keys [T, E m] of a layer and outputs [T, h] of its block, of one row of tokens, by plain hooks."""
    block, captured = model.model.layers[layer], {}

    def entering(module, args, kwargs):
        captured["experts"] = [*args, *kwargs.values()]

    def leaving(module, args, output):
        captured["block"] = output[0] if isinstance(output, tuple) else output

    handles = [
        block.mlp.experts.register_forward_pre_hook(entering, with_kwargs=True),
        block.register_forward_hook(leaving),
    ]
    model(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    states, index, gates = captured["experts"]
    count, _, size = block.mlp.experts.down_proj.shape
    keys = torch.zeros(len(states), count, size, dtype=states.dtype)
    for token in range(len(states)):
        for expert, gate in zip(index[token].tolist(), gates[token], strict=True):
            keys[token, expert] = gate * activations(block.mlp.experts, expert, states[token])
    return keys.flatten(1), captured["block"].reshape(len(states), -1)


def keys_and_outputs(model, layer, prepared, last):
    """K [E m, u], half of each bare prompt and half of the mean of the prefixed; and outputs [h, u] of block `last`."""
    keys, outputs = [], []
    for request in prepared:
        bare, *others = (seen(model, layer, p.ids)[0][p.lookup] for p in request.rewriting)
        keys.append((bare + torch.stack(others).mean(0)) / 2 if others else bare)
        first = request.rewriting[0]
        outputs.append(seen(model, last, first.ids)[1][first.lookup])
    return torch.stack(keys, 1), torch.stack(outputs, 1)


def stacked(model, layer):
    """[h, E m] of the model's experts."""
    weight = model.model.layers[layer].mlp.experts.down_proj.detach()
    return weight.transpose(0, 1).flatten(1)


def dense_system(method, numbers, moment, cache, keys):
    """X of Delta = R X^T, of one dense [E m, E m] system."""
    eye = torch.eye(len(keys), dtype=torch.float64)
    if method == "alphaedit":
        spaces = []
        for block in moment:
            values, vectors = torch.linalg.eigh(block)
            free = vectors[:, : int((values.cumsum(0) <= numbers.nullspace_threshold * values.sum()).sum())]
            spaces.append(free @ free.T)
        p = torch.block_diag(*spaces)
        return torch.linalg.solve(p @ (keys @ keys.T + cache) + numbers.L2 * eye, p @ keys)
    ridge = 1e-4 * moment.diagonal(dim1=1, dim2=2).mean()
    system = numbers.mom2_update_weight * (torch.block_diag(*moment) + ridge * eye) + cache
    return torch.linalg.solve(system + keys @ keys.T, keys)


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_the_dense_stacked_solve_layer_by_layer(original, method):
    editor = editor_of(original, method)
    other, numbers = copy.deepcopy(original[0]), editor.hparams
    caches = dict.fromkeys(LAYERS, 0.0)
    for batch in (REQUESTS[:2], REQUESTS[2:], [EditRequest("{} is in", "Ebro", "Sweden")]):
        prepared = prepare(editor.tokenizer, batch, PREFIXES, 128)
        editor.values = store = _Fixed()
        editor.edit(batch)
        targets = torch.cat([store.load(request).targets for request in prepared], 1)
        own = find_values(ModelView(other), prepared, LAYERS[-1], "block", numbers).targets
        assert relative_error(targets, own) < 1e-5
        for i, layer in enumerate(LAYERS):
            measured = KeyPass(ModelView(other), prepared, Site(LAYERS[-1], "block"), "bare_half").at(layer)
            keys, outputs = measured.keys, measured.outputs
            # Norms and routers of this model compute in fp32, so prompts alone are those of a batch to fp32.
            for mine, plain in zip((keys, outputs), keys_and_outputs(other, layer, prepared, LAYERS[-1]), strict=True):
                assert relative_error(mine, plain) < 1e-6
            moment = original[1].moment(layer).moment.double()
            delta = (targets - outputs) / (len(LAYERS) - i)
            delta = delta @ dense_system(method, numbers, moment, caches[layer], keys).T
            if editor.recipe.memory:
                caches[layer] = caches[layer] + keys @ keys.T
            experts = other.model.layers[layer].mlp.experts
            count, _, size = experts.down_proj.shape
            with torch.no_grad():
                experts.down_proj.add_(delta.unflatten(1, (count, size)).transpose(0, 1))
            assert delta.norm() > 1e-3 * stacked(other, layer).norm()
            assert relative_error(stacked(editor.view.model, layer), stacked(other, layer)) < 1e-9


def test_an_edit_of_one_layer_makes_the_block_put_out_the_value(original):
    """rho towards 0, and no prefixes: the router of an edited layer sees what it saw before."""
    editor = editor_of(original, layers=(1,), prefixes=(), mom2_update_weight=1e-9)
    prepared = prepare(editor.tokenizer, REQUESTS, (), 128)
    targets = find_values(editor.view, prepared, 1, "block", editor.hparams).targets
    _, before = keys_and_outputs(editor.view.model, 1, prepared, 1)
    result = editor.edit(REQUESTS)
    _, after = keys_and_outputs(editor.view.model, 1, prepared, 1)
    assert relative_error(before, targets) > 1e-2
    assert relative_error(after, targets) < 1e-6 and result.residual < 1e-6


def test_r_rome_sets_the_output_of_the_stack_at_the_mean_key(original):
    editor = editor_of(original, "r-rome", layers=(1,), mom2_adjustment=True)
    prepared, view = prepare(editor.tokenizer, REQUESTS[:1], PREFIXES, 128), editor.view
    rule = editor.recipe.stop_rule
    target = find_values(view, prepared, 1, editor.value_sites, editor.hparams, stop_rule=rule).targets[:, 0]
    keys = torch.stack([seen(view.model, 1, prompt.ids)[0][prompt.lookup] for prompt in prepared[0].rewriting])
    before, mean = stacked(view.model, 1).clone(), keys.mean(0)
    assert editor.edit(REQUESTS[:1]).residual < 1e-9
    after = stacked(view.model, 1)
    assert editor.value_sites == "mlp" and relative_error(before @ keys[0], target) > 1e-2
    assert relative_error(after @ mean, target) < 1e-6  # the experts are the whole MLP, and have no biases
    moment = original[1].moment(1).moment.double()
    ridge = 1e-4 * moment.diagonal(dim1=1, dim2=2).mean()
    direction = torch.linalg.solve(torch.block_diag(*moment) + ridge * torch.eye(len(mean), dtype=mean.dtype), mean)
    expected = torch.outer(target - before @ mean, direction) / (direction @ mean)
    assert relative_error(after - before, expected) < 1e-6


@pytest.mark.parametrize("method", ("ultraedit", "stableedit"))
def test_gradient_methods_name_the_stack_that_they_cannot_change(original, method):
    with pytest.raises(KeditError, match=r"mlp\.experts\.down_proj.*stacked matrix of experts.*inner_params"):
        editor_of(original, method, layers=(1,)).edit(REQUESTS)


def test_a_sequence_with_a_memory_is_the_batch_of_all(original):
    """One layer, the same values and no prefixes, so that residuals are those of the keys: recursive least squares."""
    together, apart = (editor_of(original, "memit-sequential", layers=(1,), prefixes=()) for _ in range(2))
    store = _Fixed()
    together.values = apart.values = store
    together.edit(REQUESTS)
    for request in REQUESTS:
        apart.edit([request])
    moved = stacked(together.view.model, 1) - stacked(original[0], 1)
    assert moved.norm() > 1e-3 * stacked(original[0], 1).norm()
    assert relative_error(stacked(apart.view.model, 1) - stacked(original[0], 1), moved) < 1e-8
    assert len(store.values) == len(REQUESTS)


class _Fixed:
    """A store of values that takes each request's first value for all models."""

    def __init__(self):
        self.values = {}

    def begin(self, run):
        pass

    def load(self, request):
        return self.values.get(request.request)

    def store(self, requests, values):
        for i, request in enumerate(requests):
            self.values[request.request] = values.select([i])

    def flush(self):
        pass


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_undone_to_the_bit(original, method):
    editor = editor_of(original, method)
    before = weights(editor)
    editor.edit(REQUESTS[:2])
    once = weights(editor)
    changed = {name for name in before if not torch.equal(before[name], once[name])}
    assert changed == {f"model.layers.{layer}.mlp.experts.down_proj" for layer in LAYERS}
    editor.edit(REQUESTS[2:])
    editor.rollback()
    assert same(editor, once)
    first = editor.edit(REQUESTS[2:])  # of the same state as before: the same update
    editor.rollback()
    second = editor.edit(REQUESTS[2:])
    for name in first.updates:
        assert all(torch.equal(a.dense(), b.dense()) for a, b in zip(first.updates[name], second.updates[name]))  # noqa: B905
    editor.restore()
    assert same(editor, before)


def test_experts_that_no_key_reaches_are_left_alone(original):
    editor = editor_of(original, layers=(1,))
    prepared = prepare(editor.tokenizer, REQUESTS[:1], PREFIXES, 128)
    keys, _ = keys_and_outputs(editor.view.model, 1, prepared, 1)
    count, _, size = editor.view.weight(1).shape
    reached = keys.view(count, size).abs().sum(1) > 0
    assert 0 < int(reached.sum()) < count
    before = editor.view.weight(1).clone()
    editor.edit(REQUESTS[:1])
    changed = (editor.view.weight(1) != before).flatten(1).any(1)
    assert torch.equal(changed, reached)


def test_values_are_stored_for_a_mixture_too(original, tmp_path):
    path = tmp_path / "values.safetensors"
    first, second = (editor_of(original) for _ in range(2))
    first.values, second.values = ValueFile(path), None
    first.edit(REQUESTS)
    first.values.flush()
    second.values = ValueFile(path)
    assert len(second.values.entries) == len(REQUESTS)
    second.edit(REQUESTS)
    assert all(torch.equal(first.view.weight(layer), second.view.weight(layer)) for layer in LAYERS)
