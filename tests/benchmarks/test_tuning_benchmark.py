"""The gate of the benchmark of tuning: our call of `edit` ends where the published loop does, on a tiny model."""

from __future__ import annotations

import pytest
from tiny_models import make_model, make_tokenizer

from benchmarks import tuning
from kedit_fast import EditRequest

FACTS = [
    ("{} plays the", "Miles Davis", "violin"),
    ("{} is", "Ebro", "located in Spain"),
    ("{} speaks", "Marcel", "French"),
]


@pytest.fixture(scope="module")
def tiny():
    requests = [
        EditRequest(prompt, subject, target, "mild", neighborhood_prompts=("The tower is",))
        for prompt, subject, target in FACTS
    ]
    return tuning.Subject("tiny", make_model("llama"), make_tokenizer(), requests, ("You and I walked home. ",))


GRACE = {"num_steps": 3}
NUMBERS = {**GRACE, "lr": 1e-2, "stop_loss": -1.0}


@pytest.mark.parametrize(
    ("method", "hparams", "loop"),
    [
        ("wise", {"lr": 0.1, "weight_decay": 1e-5, "decay_entries": "weight", "norm_constraint": 1.0,
                  "units": "published", "act_margin": (1.0, 4.0, 2.0)}, tuning.published_wise),
        ("dinm", {"edit_factor": 0.1}, tuning.published_dinm),
        ("grace", {"lr": 0.5, "eps": 1e-3, "val_init": "warm", "units": "published"}, tuning.published_grace),
        ("locft-bf", {"minibatch": 2}, tuning.published_breadth),
        ("ft-l", {}, tuning.published_depth),
    ],
)  # fmt: skip
def test_our_edit_ends_where_the_published_loop_does(tiny, method, hparams, loop):
    settings = {
        name: value for name, value in {**NUMBERS, **hparams}.items() if (method, name) != ("grace", "stop_loss")
    }
    case = tuning.Case(method, tiny, 1, settings, 1.0, None, loop)
    assert case.error() < tuning.ERROR_LIMIT
