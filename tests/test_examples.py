"""Every public name has an example, and it runs."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import kedit_fast
from kedit_fast import demo

PUBLIC = [name for name in kedit_fast.__all__ if callable(getattr(kedit_fast, name))]


@pytest.fixture
def namespace(demo_model, demo_statistics, tmp_path, monkeypatch):
    """What examples take for granted: the demo model, statistics of its first two layers, requests and texts."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "requests.jsonl").write_bytes((demo.DATA / "requests.jsonl").read_bytes())
    yield {
        "torch": torch,
        "kedit_fast": kedit_fast,
        "model": model,
        "tokenizer": tokenizer,
        "statistics": demo_statistics,
        "texts": demo.corpus(100),
        "requests": demo.requests()[:4],
        **{name: getattr(kedit_fast, name) for name in kedit_fast.__all__},
    }
    kedit_fast.detach(model)
    model.load_state_dict(before)


def example_of(name: str) -> str:
    """The part of a docstring after "Example:", up to the next heading."""
    text = inspect.getdoc(getattr(kedit_fast, name)) or ""
    _, heading, rest = text.partition("Example:\n")
    lines = []
    for line in rest.splitlines() if heading else []:
        if line and not line.startswith(" "):
            break
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name, namespace):
    example = doctest.DocTestParser().get_doctest(example_of(name), namespace, name, None, 0)
    assert example.examples, f"{name} has no Example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(example, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)
