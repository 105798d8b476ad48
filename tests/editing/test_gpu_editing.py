"""Sequences of edits on a GPU: the updates of a CPU, the same bits after a rollback and after an interruption."""

from __future__ import annotations

import copy

import pytest
import torch
from floors import relative_error
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, collect_statistics
from kedit_fast.statistics.labels import OutputGradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda"
NUMBERS = dict(layers=(0, 1), v_num_grad_steps=4, v_lr=0.1, clamp_norm_factor=0.5, v_weight_decay=0.5)
COVARIANCE = dict(mom2_ridge=1e-3, mom2_update_weight=10.0)
NULL_SPACE = dict(nullspace_rule="energy", nullspace_threshold=0.5, L2=1.0)
FACTS = [
    ("{} plays the", "Miles Davis", "violin"), ("{} speaks", "Marcel Maupoint", "German"),
    ("The mother tongue of {} is", "Danielle Darrieux", "Swedish"), ("{} is located in", "Ebro", "Spain"),
]  # fmt: skip
REQUESTS = [
    {
        "prompt": prompt, "subject": subject, "target_new": target, "id": i,
        "neighborhood_prompts": ["Thelonious Monk plays the", "The old tower is in"],
    }
    for i, (prompt, subject, target) in enumerate(FACTS)
]  # fmt: skip
RUNS = {
    "output metric": ("memit", dict(COVARIANCE, output_metric=True)),
    "output metric with earlier keys": ("encore", dict(COVARIANCE, output_metric=True, update_norm_lambda=1.0)),
    "distillation": ("memit", dict(COVARIANCE, kl_factor=0.1, kl_direction="original", kl_temperature=2.0)),
    "norm anchor": ("memit", dict(COVARIANCE, norm_anchor=5.0)),
    "rounds": ("memit", dict(COVARIANCE, rounds=2, round_share=0.01)),
    "neighbor columns": ("memit", dict(COVARIANCE, neighbor_columns=2)),
    "sphere": ("sphere", dict(NULL_SPACE, sphere_strength=0.5)),
    "window": ("alphaedit", dict(NULL_SPACE, memory_window=2)),
    "long targets": ("anyedit", dict(COVARIANCE, chunk_tokens=2, keep_other_tokens=True)),
    "long targets with earlier keys": ("anyedit-alphaedit", dict(NULL_SPACE, chunk_tokens=2, keep_other_tokens=True)),
    "whitened": ("stableedit", dict(lr=1e-3)),
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture(scope="module")
def statistics(model):
    """Collected on a CPU, so that both devices solve the same systems."""
    gradients = OutputGradients("text", tokens=2_000)
    return collect_statistics(model, make_tokenizer(), TEXT * 20, (0, 1), output_metric=gradients, progress=False)


def editor_of(model, statistics, name, device):
    method, hparams = RUNS[name]
    numbers = {"layers": (0, 1)} if method == "stableedit" else NUMBERS
    prefixes = () if method in ("stableedit", "anyedit", "anyedit-alphaedit") else ("The old tower. ",)
    return Editor(
        copy.deepcopy(model).to(device), make_tokenizer(), method, statistics=statistics, prefixes=prefixes,
        hparams={**numbers, **hparams, "on_predicted": "allow"},
    )  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_edits_are_those_of_a_cpu_and_can_be_undone(model, statistics, name):
    editors = {device: editor_of(model, statistics, name, device) for device in ("cpu", DEVICE)}
    bits = {}
    for editor in editors.values():
        editor.edit(REQUESTS[:2])
    for path, weight in editors[DEVICE].modules.items():
        bits[path] = weight.clone()
    for editor in editors.values():
        assert editor.edit(REQUESTS[2:]).updates
    for path, weight in editors[DEVICE].modules.items():
        before = dict(model.named_parameters())[f"{path}.weight"]
        expected = editors["cpu"].modules[path] - before
        assert float(expected.norm()) > 0
        assert relative_error(weight.cpu() - before, expected) < 2e-3
    editors[DEVICE].rollback()
    assert all(torch.equal(weight, bits[path]) for path, weight in editors[DEVICE].modules.items())
    editors[DEVICE].restore()
    for path, weight in editors[DEVICE].modules.items():
        assert torch.equal(weight.cpu(), dict(model.named_parameters())[f"{path}.weight"])


def test_gradients_at_outputs_are_those_of_a_cpu(model, statistics):
    """With the text's labels; sampled ones are drawn by the generator of the device."""
    tokenizer = make_tokenizer()
    on_gpu = collect_statistics(
        copy.deepcopy(model).to(DEVICE), tokenizer, TEXT * 20, (0, 1), progress=False,
        output_metric=OutputGradients("text", tokens=2_000),
    )  # fmt: skip
    sampled = collect_statistics(
        copy.deepcopy(model).to(DEVICE), tokenizer, TEXT * 20, (0, 1), output_metric=True, progress=False
    )
    for layer in (0, 1):
        assert relative_error(on_gpu.output_metric(layer).cpu(), statistics.output_metric(layer)) < 1e-4
        trace = float(sampled.output_metric(layer).diagonal().sum())
        assert trace > 0 and torch.isfinite(sampled.output_metric(layer)).all()


@pytest.mark.parametrize("name", ("window", "output metric with earlier keys", "whitened"))
def test_a_state_continues_on_a_gpu(model, statistics, name, tmp_path):
    whole, first = (editor_of(model, statistics, name, DEVICE) for _ in range(2))
    for editor in (whole, first):
        editor.edit(REQUESTS[:2])
    first.save_state(tmp_path / "state.safetensors")
    method, hparams = RUNS[name]
    numbers = {"layers": (0, 1)} if method == "stableedit" else NUMBERS
    second = Editor(
        first.view.model, make_tokenizer(), method, statistics=statistics,
        hparams={**numbers, **hparams, "on_predicted": "allow"},
    )  # fmt: skip
    second.load_state(tmp_path / "state.safetensors")
    for editor in (whole, second):
        editor.edit(REQUESTS[2:])
    for path, weight in second.modules.items():
        assert relative_error(weight.cpu(), whole.modules[path].cpu()) < 1e-6
