from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, make_model, make_tokenizer

from kedit_fast import EditRequest, demo
from kedit_fast.evaluation.metrics import score, shares
from kedit_fast.models.view import ModelView


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ("left", "right"))
def test_scores_are_those_of_one_unpadded_prompt(kind, side):
    tokenizer, model = make_tokenizer(bos=True, side=side), make_model(kind)
    pairs = [("Miles Davis plays the", "violin and cello"), ("Ebro", "is"), ("The mother tongue of you is", "French")]
    for (prompt, target), found in zip(pairs, score(ModelView(model), tokenizer, pairs), strict=True):
        base = tokenizer(prompt)["input_ids"]
        full = tokenizer(f"{prompt} {target}")["input_ids"]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([full])).logits[0], -1)
        rows = range(len(base) - 1, len(full) - 1)
        expected = [float(log_probs[r, full[r + 1]]) for r in rows]
        assert found.log_prob == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert found.argmax == all(int(log_probs[r].argmax()) == full[r + 1] for r in rows)


def test_metrics_count_what_they_say(demo_model):
    """The demo model says target_true: a request for that is met, one for target_new is not."""
    model, tokenizer = demo_model
    (request,) = demo.requests(1)
    true, new, text = request.target_true, request.target_new, request.text
    said = EditRequest(request.prompt, request.subject, true, new, (text,), (text,))
    not_said = EditRequest(request.prompt, request.subject, new, true)
    found = shares(model, tokenizer, [said, not_said])
    assert found.efficacy == 0.5 and found.efficacy_success == 0.5
    assert found.paraphrase == 1.0 and found.neighborhood == 0.0
    turned = EditRequest(request.prompt, request.subject, new, true, (text,), (text,))
    found = shares(model, tokenizer, [turned])
    assert found.paraphrase == 0.0 and found.neighborhood == 1.0
    assert shares(model, tokenizer, [EditRequest("{} is", "Ebro", "in")]).neighborhood is None
