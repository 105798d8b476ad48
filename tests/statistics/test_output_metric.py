"""Second moments of output gradients: against autograd one document at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error
from tiny_models import KINDS, TEXT, make_model, make_tokenizer

from kedit_fast.models.view import ModelView
from kedit_fast.statistics.collect import collect_statistics
from kedit_fast.statistics.labels import OutputGradients, row_seeds

TEXTS = [*TEXT * 2, "One.", "The"]
LAYERS = (0, 2)


def collect(model, tokenizer, labels="sampled", texts=TEXTS, layers=LAYERS, seed=0, tokens=10**6, **options):
    gradients = OutputGradients(labels, seed, tokens)
    return collect_statistics(model, tokenizer, texts, layers, output_metric=gradients, **options)


def drawn(logits, seed, document):
    """The label of every token of a document, by the definition of Gumbel noise."""
    labels = []
    for row, of_row in zip(logits, row_seeds(seed, document, len(logits)), strict=True):
        uniform = torch.rand(len(row), dtype=torch.float64, generator=torch.Generator().manual_seed(of_row))
        labels.append(int((row.double() - torch.log(-torch.log(uniform))).argmax()))
    return torch.tensor(labels)


def one_at_a_time(model, tokenizer, layer, labels, seed=0, texts=TEXTS):
    """The mean of g g^T by plain autograd, with one hook, one document at a time; and how many tokens have a label."""
    module, rows = ModelView(model).edited_module(layer), []
    for number, text in enumerate(texts):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        outputs = []

        def hook(module, args, output, outputs=outputs):
            outputs.append(output.detach().requires_grad_())
            return outputs[0]

        handle = module.register_forward_hook(hook)
        logits = model(ids[None]).logits[0]
        handle.remove()
        targets = drawn(logits.detach(), seed, number) if labels == "sampled" else ids[1:]
        if not len(targets):
            continue
        log_probs = torch.log_softmax(logits[: len(targets)], -1)
        (-log_probs.gather(1, targets[:, None]).sum()).backward()
        gradient = outputs[0].grad[0]
        assert labels == "sampled" or not gradient[len(targets) :].any()
        rows.append(gradient[: len(targets)])
    rows = torch.cat(rows).double()
    return rows.T @ rows / len(rows), len(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", ("sampled", "text"))
def test_moments_are_those_of_autograd_one_document_at_a_time(kind, labels):
    """Padding, batches and post-norm models included: gradients are those at the linear layer itself."""
    tokenizer, model = make_tokenizer(bos=True, side="left"), make_model(kind, torch.float64)
    found = collect(model, tokenizer, labels, seed=3, batch_tokens=400)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for layer in LAYERS:
        expected, count = one_at_a_time(model, tokenizer, layer, labels, seed=3)
        assert found.outputs[layer].count == count
        assert relative_error(found.output_metric(layer), expected) < 1e-6  # parts of these models are fp32
        assert found.outputs[layer].module == ModelView(model).module_name(layer)
