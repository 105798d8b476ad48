"""How the benchmark against released code imports a checkout: from files written here, none of the released ones."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import typer
from floors import relative_error
from tiny_models import make_model

from benchmarks import released

NETHOOK = """
class Trace:
    def __init__(self, module, layer=None, retain_output=True, retain_input=False, edit_output=None):
        retainer = self
        def hook(m, inputs, output):
            if edit_output:
                output = edit_output(output=output, layer=layer)
            if retain_output:
                retainer.output = output
            return output
        self.handle = module.get_submodule(layer).register_forward_hook(hook)
"""
MAIN = """
from datasets import load_dataset
from util import nethook
from util.settings import PLACE
from .other import moved
"""
OTHER = """
import torch
def moved(x):
    return [x.to('cuda'), x.cuda(), torch.zeros(1, device="cuda")]
"""
FILES = {
    "util/nethook.py": NETHOOK, "util/settings.py": "PLACE = open('globals.yml').read()", "rome/__init__.py": "",
    "rome/rome_main.py": MAIN, "rome/other.py": OTHER, "globals.yml": "here",
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    for name, source in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return tmp_path


def test_a_checkout_is_imported_for_another_device_and_nothing_of_it_stays(checkout):
    before, place, finders = set(sys.modules), os.getcwd(), list(sys.meta_path)
    there = released.Released(checkout, ("rome.rome_main",), "cpu", {"model.layers.0"})
    module = there["rome.rome_main"]
    assert module.PLACE == "here"
    assert all(tensor.device.type == "cpu" for tensor in module.moved(torch.ones(1)))
    assert os.getcwd() == place and sys.meta_path == finders
    assert not {
        name for name in set(sys.modules) - before if name.partition(".")[0] in (*released.PACKAGES, "datasets")
    }
    assert sorted(p.name for p in checkout.rglob("*") if p.is_file()) == sorted(name.split("/")[-1] for name in FILES)
    assert there.commit == released.commit_of(checkout) and there.commit.startswith("sources ")
    (checkout / "rome" / "other.py").write_text("moved = 1")
    assert released.commit_of(checkout) != there.commit


def test_traces_of_blocks_see_the_tuple_that_blocks_returned_and_the_model_the_tensor(checkout):
    there = released.Released(checkout, ("rome.rome_main",), "cpu", {"model.layers.0"})
    model, ids = make_model("llama"), torch.arange(6)[None]
    with torch.no_grad():
        plain = model(ids).logits
        seen = {}

        def edit(output, layer):
            seen[layer] = output
            if layer == "model.layers.0":
                output[0][0, 2] += 1
            return output

        names = ("model.layers.0", "model.layers.1.mlp")
        traces = [there["rome.rome_main"].nethook.Trace(model, name, edit_output=edit) for name in names]
        edited = model(ids).logits
        for trace in traces:
            trace.handle.remove()
    assert isinstance(seen["model.layers.0"], tuple) and isinstance(seen["model.layers.1.mlp"], torch.Tensor)
    assert isinstance(traces[0].output, tuple) and isinstance(traces[1].output, torch.Tensor)
    assert relative_error(edited[:, 2:], plain[:, 2:]) > 1e-3 and torch.equal(edited[:, :2], plain[:, :2])


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(typer.BadParameter, match="is no checkout"):
        released.Released(tmp_path, (), "cpu", set())


def test_results_that_differ_have_no_ratio():
    one = {"x": torch.ones(3)}
    assert released.gap(one, one) == 0
    assert released.gap({"x": torch.full((3,), float("nan"))}, one) == float("inf")
    on = type("On", (), {"device": "cpu"})()
    row = released.part_row(on, "keys", "case", "base", lambda: {"x": torch.zeros(3)}, lambda: one, 2, 1e-3)
    assert row["ratio"] is None and row["error"] == 1.0
    row = released.part_row(on, "keys", "case", "base", lambda: one, lambda: one, 2, 1e-3)
    assert row["ratio"] > 0 and row["error_limit"] == 1e-3
