"""WISE's margin against tests/data/golden_memories.safetensors: losses and gradients over valid tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kedit_fast.editing.tuning.margin import activation_change, margin_loss, positive_mean, row_means

SILU = torch.nn.functional.silu


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden_memories.safetensors")


def packed(golden):
    """x [N, d] of the valid tokens, and the row of each."""
    valid = golden["wise.mask"].bool()
    rows = torch.arange(valid.shape[0])[:, None].expand(valid.shape)
    return golden["wise.x"][valid], rows[valid], golden["wise.subject"][valid]


def test_the_change_of_every_token_meets_its_golden_row(golden):
    x = golden["wise.x"]
    change = activation_change(x @ golden["wise.W1"].T, x @ golden["toy.W0"].T, SILU)
    torch.testing.assert_close(change, golden["wise.distance"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ("general", "subject"))
def test_the_margin_over_valid_tokens_meets_its_golden_row(golden, kind):
    x, rows, subject = packed(golden)
    weight = golden["wise.W1"].clone().requires_grad_(True)
    change = activation_change(x @ weight.T, x @ golden["toy.W0"].T, SILU)
    if kind == "general":
        means = row_means(change, rows, 4)
        inside, outside = means[:3], means[3:]
    else:  # the unrelated text is the subject: its tokens against the others of the same rows
        edited = rows < 3
        change, rows, subject = change[edited], rows[edited], subject[edited]
        inside, outside = row_means(change, rows, 3, subject), row_means(change, rows, 3, 1 - subject)
    loss = margin_loss(inside, outside, golden["wise.margins"].tolist())
    torch.testing.assert_close(loss, golden[f"wise.margin.{kind}.valid"], rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, golden[f"wise.margin.{kind}.valid.grad"], rtol=0, atol=1e-12)


def test_satisfied_rows_do_not_dilute_the_mean():
    values = torch.tensor([2.0, -5.0, 4.0], requires_grad=True)
    loss = positive_mean(values)
    loss.backward()
    assert loss.item() == 3.0 and values.grad is not None and values.grad.tolist() == [0.5, 0.0, 0.5]
    assert positive_mean(torch.tensor([-1.0])).item() == 0.0
