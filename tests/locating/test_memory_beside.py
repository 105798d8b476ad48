"""Models with a memory beside their weights: nothing is located in them, because weights are not all that answers."""

from __future__ import annotations

import pytest

import kedit_fast
from kedit_fast import demo
from kedit_fast.errors import UnsupportedModelError
from kedit_fast.locating.circuit import Circuit
from kedit_fast.locating.circuits import edge_scores
from kedit_fast.locating.faithfulness import exact_scores, faithfulness, run_circuit
from kedit_fast.locating.graph import graph_of
from kedit_fast.locating.linear_probes import linear_probes
from kedit_fast.locating.logit_lens import logit_lens
from kedit_fast.locating.prompt_pairs import prompt_pairs
from kedit_fast.locating.tracing import trace
from kedit_fast.models.components import open_components
from kedit_fast.models.routes import suspended
from kedit_fast.models.view import ModelView
from kedit_fast.reports.circuit_comparison import pairs_to_compare

WAYS = {
    "trace": lambda given: trace(given.model, given.tokenizer, given.requests[:1], kinds=("mlp",), window=1),
    "prompt_pairs": lambda given: prompt_pairs(given.model, given.tokenizer, given.requests, on_error="skip"),
    "edge_scores": lambda given: edge_scores(given.model, given.pairs, steps=1),
    "edge_scores of components": lambda given: edge_scores(given.components, given.pairs, steps=1),
    "run_circuit": lambda given: run_circuit(given.view, given.circuit, given.pairs),
    "faithfulness": lambda given: faithfulness(given.model, given.circuit, given.pairs),
    "exact_scores": lambda given: exact_scores(given.model, given.pairs),
    "logit_lens": lambda given: logit_lens(given.view, given.pairs),
    "linear_probes": lambda given: linear_probes(
        given.model, given.tokenizer, demo.requests(60), layers=[0], controls=1
    ),
    "pairs_to_compare": lambda given: pairs_to_compare(demo.load()[0], given.model, given.tokenizer, given.requests),
}


class Given:
    """A demo model with a memory of one edit, and what was made before it was attached."""

    def __init__(self):
        self.model, self.tokenizer = demo.load()
        self.requests = demo.requests(12)
        self.view = ModelView(self.model)
        self.components = open_components(self.view)
        self.pairs = prompt_pairs(self.view, self.tokenizer, self.requests, on_error="skip")[:1]
        graph = graph_of(self.components)
        self.circuit = Circuit(graph, graph.mask, graph.mask.float())
        editor = kedit_fast.Editor(self.model, self.tokenizer, "grace", hparams={"num_steps": 1})
        editor.edit(self.requests[:1])


@pytest.fixture(scope="module")
def given():
    return Given()


@pytest.mark.parametrize("way", WAYS)
def test_a_memory_is_refused(given, way):
    with pytest.raises(UnsupportedModelError, match=r"a memory is attached to .*detach it first"):
        WAYS[way](given)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("exact_scores", "pairs_to_compare")])
def test_a_memory_that_is_suspended_is_not(given, way):
    with suspended(given.model):
        WAYS[way](given)
