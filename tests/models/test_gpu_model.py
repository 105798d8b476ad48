"""What only a GPU can show of whole models: no waiting inside a step, streams, devices, memory. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error
from support import prepared_and_hparams
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, collect_statistics
from kedit_fast.editing.values.loop import ValueOptimizer, find_values
from kedit_fast.models.view import ModelView

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def expected():
    return collect_statistics(make_model("llama"), make_tokenizer(), TEXT * 20, LAYERS, progress=False)


def close(found, expected, limit=1e-4):
    for layer in LAYERS:
        assert found.moment(layer).count == expected.moment(layer).count
        assert relative_error(found.moment(layer).moment.cpu(), expected.moment(layer).moment) < limit


@pytest.mark.parametrize("masters", ("device", "cpu"))
def test_statistics_beside_the_next_forward_pass(expected, masters):
    model = make_model("llama").cuda()
    found = collect_statistics(
        model, make_tokenizer(), TEXT * 20, LAYERS, masters=masters, batch_tokens=128, progress=False
    )
    assert found.moment(0).moment.device.type == ("cpu" if masters == "cpu" else "cuda")
    close(found, expected)


def test_statistics_and_edits_on_a_stream_of_the_callers(expected):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the weights come late: what does not wait for this stream reads zeros
        model = make_model("llama").cuda()
        found = collect_statistics(model, make_tokenizer(), TEXT * 20, LAYERS, progress=False)
        editor = Editor(
            model, make_tokenizer(), "memit", statistics=found, layers=(0, 1), prefixes=("The old tower. ",),
            hparams=dict(v_num_grad_steps=6, v_lr=0.1, mom2_ridge=1e-3, mom2_update_weight=10.0),
        )  # fmt: skip
        result = editor.edit([{"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"}])
    stream.synchronize()
    close(found, expected)
    assert result.residual < 1 and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_step_of_values_waits_for_nothing(monkeypatch):
    """Forward pass, loss, backward pass, Adam and clamp: torch raises at whatever makes the host wait."""
    tokenizer, model = make_tokenizer(), make_model("llama").cuda()
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1, check_every=4)
    expected = find_values(view, prepared, 1, "block", hparams)  # libraries load
    calls = []

    def strict(real):
        def call(*args, **kwargs):
            calls.append(real)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return real(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    for owner, name in (
        (ValueOptimizer, "_losses"),
        (ValueOptimizer, "_adam_step"),
        (torch.autograd, "grad"),
    ):
        monkeypatch.setattr(owner, name, strict(getattr(owner, name)))
    found = find_values(view, prepared, 1, "block", hparams)
    assert len(calls) > 9 and relative_error(found.targets.cpu(), expected.targets.cpu()) < 1e-6


def test_memory_of_statistics_is_the_sums_and_two_batches():
    model = make_model("llama").to("cuda", torch.bfloat16)
    tokenizer = make_tokenizer()
    collect_statistics(model, tokenizer, TEXT, LAYERS, batch_tokens=256, progress=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    collect_statistics(model, tokenizer, TEXT * 200, LAYERS, batch_tokens=256, progress=False)
    sums, rows = 8 * 64 * 64 * len(LAYERS), 256 * 64 * 2
    assert torch.cuda.max_memory_allocated() - before < sums + 2 * len(LAYERS) * rows + (16 << 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_on_another_device_than_the_current_one(expected):
    model = make_model("llama").to("cuda:1")
    found = collect_statistics(model, make_tokenizer(), TEXT * 20, LAYERS, progress=False)
    close(found, expected)
    assert torch.cuda.current_device() == 0
