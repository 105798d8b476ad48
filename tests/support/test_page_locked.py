"""Copies through page-locked memory, on stand-ins for a GPU: a copy happens when somebody waits for it, not before."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from kedit_fast.editing import keys
from kedit_fast.editing.keys import KeyPass, StateBudget
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare
from kedit_fast.requests.request import EditRequest
from kedit_fast.statistics.moments import SecondMomentAccumulator
from kedit_fast.support import page_locked
from kedit_fast.support.page_locked import HostStage, PageLocked

HOST = 60_000  # bytes


class Late:
    """A copy that is under way; what it writes to is unknown until then."""

    def __init__(self, to, source):
        assert to.is_contiguous() and source.is_contiguous()
        self.to, self.source, self.waits = to, source.clone(), 0
        to.fill_(float("nan"))

    def synchronize(self):
        self.waits += 1
        self.to.copy_(self.source)


@pytest.fixture
def copies(monkeypatch):
    """The copies that were begun; tensors here count as those of a GPU."""
    begun = []

    def copy_out(to, source):
        begun.append(Late(to, source))
        return begun[-1]

    for module in (page_locked, keys):
        monkeypatch.setattr(module, "crosses", lambda device, other: True)
        monkeypatch.setattr(module, "copy_out", copy_out)
    monkeypatch.setattr(page_locked, "allocate", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    return begun


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("block", (33 * 8, 1000, 5000, 1 << 20))
@pytest.mark.parametrize("shape", ((33, 33), (3, 7, 7), (1, 1)), ids=str)
def test_lower_triangles_arrive_block_by_block(dtype, block, shape, copies):
    total, part = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=dtype)
    expected = (total + part).tril()
    stage = HostStage(block)
    for _ in range(2):  # buffers are used again
        again = total.clone()
        stage.add_lower_(again, part)
        assert torch.equal(again.tril(), expected)
    assert copies and all(copy.waits == 1 and copy.to.nbytes <= block for copy in copies)
    assert len({copy.to.untyped_storage().data_ptr() for copy in copies}) <= 2
    if shape == (33, 33) and block < 5000:
        assert len(copies) > 4  # a part at a time


def test_a_row_that_no_buffer_holds_is_copied_in_the_ordinary_way(copies):
    total, part = torch.zeros(9, 9, dtype=torch.float64), torch.randn(9, 9)
    HostStage(16).add_lower_(total, part)
    assert torch.equal(total, part.double()) and not copies


def test_memory_that_the_system_refuses_is_said_once_and_done_without(copies, monkeypatch, caplog):
    def refuse(shape, dtype):
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(page_locked, "allocate", refuse)
    stage, part = HostStage(1000), torch.randn(9, 9)
    total = torch.zeros(9, 9, dtype=torch.float64)
    for _ in range(2):
        stage.add_lower_(total, part)
    assert torch.equal(total, 2 * part.double()) and not copies
    assert caplog.text.count("no page-locked memory for 1000 bytes: CUDA error: out of memory;") == 1
    assert "and more" not in caplog.text


def test_page_locked_memory_is_bounded(copies):
    memory = PageLocked(1000)
    assert memory.empty((20, 10), torch.float32).shape == (20, 10) and memory.left == 200
    assert memory.empty((51,), torch.float32) is None and memory.left == 200
    assert memory.empty((100,), torch.bfloat16) is not None and memory.left == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_without_a_gpu_there_is_none(caplog):
    memory = PageLocked(1000)
    assert memory.empty((10,), torch.float32) is None and memory.empty((10,), torch.float32) is None
    assert caplog.text.count("no page-locked memory") == 1 and memory.left == 1000


def test_sums_on_the_host_get_the_products_of_a_device(copies, monkeypatch):
    """Two layers that share the buffers, in turns."""
    stage = HostStage(500)
    rows = [torch.randint(-3, 4, (40, 24)).float() for _ in range(4)]
    staged = [SecondMomentAccumulator("m", 24, stage=stage) for _ in range(2)]
    plain = [SecondMomentAccumulator("m", 24) for _ in range(2)]
    for total in staged:
        monkeypatch.setattr(total, "_staged", True)
    for turn, part in enumerate(rows):
        for totals in (staged, plain):
            totals[turn % 2].update(part)
    assert len(copies) > 8
    for ours, theirs in zip(staged, plain, strict=True):
        assert torch.equal(ours.result().moment, theirs.result().moment)


@pytest.mark.parametrize("share", (1.0, 0.3, 0.0))
def test_states_on_the_host_are_those_that_were_left_there(share, copies, monkeypatch):
    """In page-locked memory as far as it reaches, in ordinary memory beyond."""
    monkeypatch.setattr(keys, "ROWS", 4)
    view, site = ModelView(make_model("llama")), Site(3, "block")
    requests = [EditRequest("{} plays the", name, "violin") for name in ("Miles Davis", "Ebro", "Danielle Darrieux")]
    prepared = prepare(make_tokenizer(), requests, ("The old tower. ", "Because I saw. "), 128)

    def measured(budget):
        torch.manual_seed(0)
        passes, seen = KeyPass(view, prepared, site, "bare_half", budget), []
        passes.free["host"], passes.locked = HOST, PageLocked(int(share * HOST))  # a model on a CPU would have none
        for layer in (0, 1, 2, 3):
            seen.append(passes.at(layer))
        return passes, seen

    _, expected = measured(StateBudget(device=1 << 30))
    passes, seen = measured(StateBudget(device=0))
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.outputs, theirs.outputs)
    assert passes.stored_bytes["host"] > 0
    locked = [part.locked for part in passes.passes if part.locked is not None]
    assert sum(part.nbytes for part in locked) <= share * HOST
    assert bool(copies) == bool(locked) == (share > 0)
    if share == 1.0:
        assert len(copies) > 2 * len(locked)  # one memory, layer after layer
