"""Concepts erased from the layers of a model: written through the ledger, undone, in the patch."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error
from support import REQUESTS, make_editor, same, weights

from kedit_fast import Patch
from kedit_fast.editing.erasure import inputs_at_texts, tokenized_texts
from kedit_fast.errors import InvalidArgumentError, MethodError, RequestError, SolveError
from kedit_fast.models.forward import Site, capture, pad
from kedit_fast.solver.erasure import erasing_update, label_directions, shrunk_covariance
from kedit_fast.solver.preconditioner import Covariance

WORDS = [
    "Miles Davis plays",
    "The old tower of Madrid is in",
    "Ebro and",
    "Danielle Darrieux",
    "Because I saw",
    "nobody",
]
TEXTS = [f"{start} {end}" for start in WORDS for end in ("violin", "Sweden", "the cello", "French")]
LABELS = [text.split()[-1] in ("violin", "cello") for text in TEXTS]


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def editor(request):
    made = make_editor(request.param, "memit", torch.float64)
    yield made
    made.restore()


def outputs_of(editor, layer, tokens="last"):
    """The outputs [out, n] of a layer's edited matrix at the texts, by the model itself, and the label of each."""
    module = editor.view.edited_module(layer)
    rows = tokenized_texts(editor.view, editor.tokenizer, TEXTS, None)
    outputs, labels = [], []
    for ids, label in zip(rows, LABELS, strict=True):
        seen = []
        handle = module.register_forward_hook(lambda m, args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            editor.view.model(torch.tensor([ids]), use_cache=False)
        handle.remove()
        outputs.append(seen[0][0] if tokens == "all" else seen[0][0, -1:])
        labels += [label] * len(outputs[-1])
    return torch.cat(outputs).T, torch.tensor(labels).long()


def told_apart(outputs, labels):
    """Largest covariance of an output with the label, over the deviations of both."""
    centered, label = outputs - outputs.mean(1, keepdim=True), labels.double() - labels.double().mean()
    return float((centered @ label).norm() / (centered.norm() * label.norm()))


@pytest.mark.parametrize("tokens", ("last", "all"))
@pytest.mark.parametrize("cost", ("texts", "statistics", "none"))
def test_no_linear_probe_of_an_erased_layer_tells_the_labels(editor, tokens, cost):
    before, original = {layer: outputs_of(editor, layer, tokens) for layer in (0, 1)}, weights(editor)
    done = editor.erase(TEXTS, LABELS, tokens=tokens, cost=cost)
    for layer in (0, 1):
        outputs, labels = outputs_of(editor, layer, tokens)
        assert told_apart(outputs, labels) < 1e-5 < 0.03 < told_apart(*before[layer])  # inputs are gathered in fp32
        name = editor.view.weight_name(layer)
        assert done.updates[name].rank == 1 and 0 < done.relative_norms[name] < 1
    assert relative_error(outputs_of(editor, 0, tokens)[0].mean(1), before[0][0].mean(1)) < 1e-5
    assert done.batch == len(editor.ledger.batches)
    editor.rollback()
    assert same(editor, original)


def test_what_is_written_is_the_formula_at_the_inputs_of_the_edited_model(editor):
    rows = tokenized_texts(editor.view, editor.tokenizer, TEXTS, None)
    labels, weight = torch.tensor(LABELS).long(), editor.view.weight(1).clone()
    done = editor.erase(TEXTS, LABELS, keep_mean=False)
    inputs, owner = inputs_at_texts(editor.view, rows, 1, "last")  # layer 0 is written, the inputs of layer 1 follow it
    assert owner.tolist() == list(range(len(TEXTS)))
    for place, ids in enumerate(rows):
        alone, _ = capture(editor.view, pad([ids], editor.view.device), [Site(1, "key")])
        assert relative_error(inputs[:, place], alone[Site(1, "key")][0, -1]) < 1e-6
    space = Covariance.from_moment(shrunk_covariance(inputs))
    expected = erasing_update(weight, label_directions(inputs, labels), space)
    assert relative_error(editor.view.weight(1) - weight, expected.dense()) < 1e-9
    assert relative_error(done.updates[editor.view.weight_name(1)].dense(), expected.dense()) < 1e-12
    editor.rollback()


def test_it_stands_between_edits_and_in_the_patch(editor, tmp_path):
    original = weights(editor)
    editor.edit(REQUESTS[:1])
    middle = weights(editor)
    editor.erase(TEXTS, LABELS, layers=[1])
    editor.edit(REQUESTS[1:])
    after = weights(editor)
    editor.patch().save(tmp_path / "patch")
    editor.rollback(2)
    assert same(editor, middle)
    editor.restore()
    assert same(editor, original)
    Patch.load(tmp_path / "patch").apply_(editor.view.model)
    for name, tensor in after.items():
        assert relative_error(editor.view.model.state_dict()[name], tensor) < 1e-12
    editor.view.model.load_state_dict(original)


def test_pairs_of_texts_give_directions(editor):
    original = weights(editor)
    texts = [*(f"{start} violin" for start in WORDS), *(f"{start} Sweden" for start in WORDS)]
    labels = ["music"] * len(WORDS) + ["place"] * len(WORDS)
    done = editor.erase(texts, labels, pairs=2, cost="none", layers=[0])
    assert [update.rank for update in done.updates.values()] == [2]
    editor.rollback()
    with pytest.raises(InvalidArgumentError, match="same shape"):
        editor.erase(texts[:-1], labels[:-1], pairs=2)
    with pytest.raises(InvalidArgumentError, match="pairs have two labels; got 3"):
        editor.erase([*texts, "one"], [*labels, "more"], pairs=1)
    assert same(editor, original)


def test_bad_calls_leave_the_model_as_it_was(editor):
    original, batches = weights(editor), len(editor.ledger.batches)
    for options, error, message in (
        ({"layers": [2]}, MethodError, "layers 2: choose from the editor's, 0, 1"),
        ({"layers": []}, MethodError, "choose from the editor's"),
        ({"cost": "free"}, InvalidArgumentError, "cost must be texts, statistics, none"),
        ({"tokens": "first"}, InvalidArgumentError, "tokens must be last or all"),
        ({"labels": LABELS[:-1]}, InvalidArgumentError, "24 texts and 23 labels"),
        ({"labels": [1] * 24}, InvalidArgumentError, "two labels or more; got 1"),
        ({"texts": ["", *TEXTS[1:]]}, RequestError, r"text 1 \(''\)"),
        ({"texts": [TEXTS[0]] * 24}, SolveError, "no covariance|do not depend"),
        ({"texts": ["nobody " * 300, *TEXTS[1:]]}, RequestError, "the model takes"),
    ):
        with pytest.raises(error, match=message):
            editor.erase(**{"texts": TEXTS, "labels": LABELS, **options})
    assert same(editor, original) and len(editor.ledger.batches) == batches
    with pytest.raises(MethodError, match="not of modules by path"):
        names = ("model.layers.1.mlp.up_proj",)
        make_editor("llama", "ultraedit", layers=(), inner_params=names, lr=1e-3).erase(TEXTS, LABELS)
