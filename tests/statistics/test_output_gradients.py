"""Second moments of output gradients: against autograd one document at a time, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from floors import relative_error
from tiny_models import KINDS, TEXT, make_model, make_tokenizer

from kedit_fast.errors import InvalidArgumentError, StatisticsError, UnsupportedModelError
from kedit_fast.models.head import Head
from kedit_fast.models.patching import patches_on
from kedit_fast.models.view import ModelView
from kedit_fast.statistics import collect as collecting
from kedit_fast.statistics import labels as labeling
from kedit_fast.statistics.collect import collect_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.labels import LABELS, OutputGradients, row_seeds, sampled_labels

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


@pytest.mark.parametrize("kind, labels", [(kind, LABELS[i % 2]) for i, kind in enumerate(KINDS)])
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


def test_one_token_documents_in_every_label_are_the_expectation(monkeypatch):
    """Over all labels y of a document of one token: E g g^T = sum_y p_y g_y g_y^T."""
    tokenizer, model = make_tokenizer(), make_model("llama", torch.float64)
    (token,) = tokenizer("The")["input_ids"]
    view = ModelView(model)
    module, outputs = view.edited_module(2), []
    handle = module.register_forward_hook(lambda m, a, o: outputs.append(o.detach().requires_grad_()) or outputs[0])
    log_probs = torch.log_softmax(model(torch.tensor([[token]])).logits[0, 0], -1)
    handle.remove()
    by_label = -torch.eye(len(log_probs), dtype=torch.float64)
    gradients = torch.autograd.grad(log_probs, outputs[0], by_label, is_grads_batched=True)[0][:, 0, 0]  # [V, out]
    p = log_probs.detach().exp()
    expected = gradients.T @ (p[:, None] * gradients)
    assert float((p @ gradients).abs().max()) < 1e-7  # the model's own gradient vanishes

    seen, before = [], collecting.output_gradients
    monkeypatch.setattr(collecting, "sampled_labels", lambda head, states, seeds: torch.arange(len(seeds)))
    monkeypatch.setattr(collecting, "output_gradients", lambda *args: seen.append(before(*args)) or seen[0])
    found = collect(model, tokenizer, texts=["The"] * len(p), layers=(2,), batch_tokens=10**5)
    assert relative_error(found.output_metric(2), gradients.T @ gradients / len(p)) < 1e-6
    ours = seen[0][2][:, 0]
    assert relative_error(ours.T @ (p[:, None] * ours), expected) < 1e-6


def test_labels_come_as_often_as_the_model_says():
    torch.manual_seed(0)
    head = Head(torch.device("cpu"), torch.randn(50, 4), softcap=3.0)
    states, n = torch.randn(1, 4), 4000
    seeds = [seed for document in range(40) for seed in row_seeds(7, document, 100)]
    labels = sampled_labels(head, states.expand(n, -1), seeds)
    p = torch.softmax(head.logits(states)[0].double(), -1)
    counts = torch.bincount(labels, minlength=50).double()
    chi_square = float(((counts - n * p) ** 2 / (n * p)).sum())
    assert chi_square < 49 + 4 * (2 * 49) ** 0.5
    assert len(set(row_seeds(0, 1, 1000)) | set(row_seeds(0, 2, 1000)) | set(row_seeds(1, 1, 1000))) == 3000


@pytest.mark.parametrize("labels", LABELS)
def test_moments_depend_on_the_text_not_on_batches_or_chunks(labels, monkeypatch):
    """Labels belong to a document's place: batches, chunks of logits and what else is read change rounding alone."""
    tokenizer, model = make_tokenizer(), make_model("qwen2")
    whole = collect(model, tokenizer, labels)
    monkeypatch.setattr(labeling, "_CHUNK_BYTES", 0)  # a row at a time
    small = collect(model, tokenizer, labels, batch_tokens=1)
    for layer in LAYERS:
        assert small.outputs[layer].count == whole.outputs[layer].count
        assert relative_error(small.output_metric(layer), whole.output_metric(layer)) < 1e-5
    one = collect(model, tokenizer, labels, layers=(2,))
    assert relative_error(one.output_metric(2), whole.output_metric(2)) < 1e-5
    other = collect(model, tokenizer, labels, seed=1)
    same = relative_error(other.output_metric(2), whole.output_metric(2)) < 1e-5
    assert same == (labels == "text")


def test_tokens_are_a_budget_of_their_own_and_weights_do_not_count():
    tokenizer, model = make_tokenizer(), make_model("llama")
    found = collect(model, tokenizer, tokens=60, max_tokens=100, token_weights=lambda ids: [2.0] * len(ids))
    assert found.moment(0).count == 100 and found.outputs[0].count == 60 and found.outputs_from["tokens"] == "60"
    assert found.outputs_from["token_weights"] == "" and found.outputs_from["labels"] == "sampled"
    plain = collect(model, tokenizer, tokens=60)
    assert torch.equal(found.output_metric(0), plain.output_metric(0))
    by_default = collect_statistics(model, tokenizer, TEXT * 30, (0,), output_metric=True)
    assert by_default.outputs[0].count == 10 * 32 < by_default.moment(0).count
    assert collect_statistics(model, tokenizer, TEXTS, (0,), output_metric=True, max_tokens=50).outputs[0].count == 50


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bit_models_give_about_the_same(dtype):
    """In fp32 where the processor has no units for them; labels of the text, which rounding does not change."""
    tokenizer = make_tokenizer()
    model = make_model("llama").to(dtype)
    found, expected = (collect(m, tokenizer, "text", layers=(2,)) for m in (model, copy.deepcopy(model).float()))
    assert relative_error(found.output_metric(2), expected.output_metric(2)) < 0.05
    assert next(model.parameters()).dtype == dtype and not patches_on(model)


def test_offloaded_weights_give_the_same(tmp_path):
    import accelerate

    tokenizer, cpu = make_tokenizer(), torch.device("cpu")
    expected = collect(make_model("llama"), tokenizer)
    model = make_model("llama")
    accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    found = collect(model, tokenizer)
    for layer in LAYERS:
        assert relative_error(found.output_metric(layer), expected.output_metric(layer)) < 1e-5


def test_models_that_run_whole_give_the_same():
    """A hook on the head makes passes take the model's own logits, which drawing labels must not change."""
    tokenizer, model = make_tokenizer(), make_model("llama", torch.float64)
    expected = collect(model, tokenizer)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1)
    found = collect(model, tokenizer)
    assert ModelView(model).head.matrix is None
    assert relative_error(found.output_metric(0), expected.output_metric(0)) < 1e-9


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("int8 products have no derivative")


def test_models_without_gradients_are_named_and_left_as_they_were():
    tokenizer, model = make_tokenizer(), make_model("llama")
    hook = model.model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: ((NoGradient.apply(args[0]), *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no gradients at .* int8 products"):
        collect(model, tokenizer)
    hook.remove()
    hook = model.model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0].detach(), *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match=r"its logits do not depend on model.layers.0.mlp.down_proj"):
        collect(model, tokenizer)
    hook.remove()
    assert not patches_on(model) and all(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        inside = collect(model, tokenizer)
    assert torch.equal(inside.output_metric(0), collect(model, tokenizer).output_metric(0))


def test_bad_arguments_and_missing_metrics_are_named():
    tokenizer, model = make_tokenizer(), make_model("llama")
    for bad in (dict(labels="drawn"), dict(seed=-1), dict(tokens=0), dict(tokens=True)):
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(bad))} must be"):
            OutputGradients(**bad)
    plain = collect_statistics(model, tokenizer, TEXTS, (0,))
    with pytest.raises(StatisticsError, match=r"no output metric for layer 0: there is one of no layer.*--out"):
        plain.output_metric(0)
    with pytest.raises(StatisticsError, match="reads the text once more"):
        collect(model, tokenizer, texts=iter(TEXTS))
    with pytest.raises(StatisticsError, match=r"no tokens were counted.* a label"):
        collect(model, tokenizer, "text", tokens=1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(StatisticsError, match="not finite"):
        collect(model, tokenizer)


def test_confidence_weights_are_the_largest_probabilities():
    tokenizer, model = make_tokenizer(), make_model("gpt2", torch.float64)
    found = collect_statistics(model, tokenizer, TEXTS, LAYERS, token_weights="teacher-confidence", batch_tokens=100)
    for layer in LAYERS:
        keys, weights = [], []
        module = ModelView(model).edited_module(layer)
        hook = module.register_forward_pre_hook(lambda m, a, keys=keys: keys.append(a[0][0]))
        with torch.no_grad():
            for text in TEXTS:
                logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
                weights.append(torch.softmax(logits, -1).max(-1).values)
        hook.remove()
        k, w = torch.cat(keys), torch.cat(weights)
        assert relative_error(found.moment(layer).moment, k.T @ (w[:, None] * k) / w.sum()) < 1e-6
        assert found.moment(layer).count == len(w)
    assert found.settings["token_weights"] == "teacher-confidence"
    uniform, plain = (
        collect_statistics(model, tokenizer, TEXTS, (0,), token_weights=weights) for weights in ("uniform", None)
    )
    assert torch.equal(uniform.moment(0).moment, plain.moment(0).moment) and uniform.settings == plain.settings
    with pytest.raises(InvalidArgumentError, match="token_weights must be uniform, teacher-confidence"):
        Corpus(TEXTS, token_weights="confidence")  # pyright: ignore[reportArgumentType]
