"""Examples in docstrings of circuits and prompt pairs run on the demo model."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from kedit_fast import demo

MODULES = ("circuit", "circuits", "faithfulness", "graph", "logit_lens", "prompt_pairs", "pruning")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name, demo_model):
    module = importlib.import_module(f"kedit_fast.locating.{name}")
    model, tokenizer = demo_model
    given = {"torch": torch, "model": model, "tokenizer": tokenizer, "requests": demo.requests(16)}
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=options)
    for test in doctest.DocTestFinder().find(module, name, globs={**vars(module), **given}):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
