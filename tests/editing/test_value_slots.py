"""Slots and their recorded iteration, on a processor: a graph that plays back the operations it has seen."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support import PREFIXES, VARIED_REQUESTS, prepared_and_hparams
from tiny_models import make_model, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kedit_fast import Editor
from kedit_fast.backends import use_backend
from kedit_fast.editing.values import loop
from kedit_fast.editing.values.cuda_graph import GraphedStep
from kedit_fast.editing.values.loop import find_values
from kedit_fast.editing.values.objective import Objective
from kedit_fast.editing.values.slot_shape import SlotShape
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.solver.value_descent import Status


class Recording(TorchDispatchMode):
    """All operations with their tensors, and what was written before it was written."""

    def __init__(self):
        super().__init__()
        self.calls, self.written = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for the device"
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = [part for part in tree_leaves(given.get(argument.name)) if isinstance(part, torch.Tensor)]
                self.written += [(tensor, tensor.clone()) for tensor in tensors]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class PlayedBack:
    """As torch.cuda.CUDAGraph: the same operations on the same memory, whatever Python has done since."""

    made: list[PlayedBack] = []  # noqa: RUF012

    def __init__(self):
        self.calls, self.replays = [], 0
        PlayedBack.made.append(self)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape, f"the shape of {func} depends on numbers"
                    old.copy_(new)


@contextlib.contextmanager
def recorded(graph):
    """As torch.cuda.graph: nothing that is recorded has happened."""
    with Recording() as recording:
        yield
    with torch.no_grad():
        for tensor, before in reversed(recording.written):
            tensor.copy_(before)
    graph.calls = recording.calls


class Stream:
    made = 0

    def __init__(self):
        Stream.made += 1

    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made, on stand-ins for a GPU's names."""
    current = Stream()
    monkeypatch.setattr(PlayedBack, "made", [])
    monkeypatch.setattr(Stream, "made", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedBack)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(loop, "graph_obstacle", lambda view: "")
    with use_backend("torch"):
        yield PlayedBack.made


def case(kind, site, **numbers):
    model, tokenizer = make_model(kind), make_tokenizer()
    prepared, hparams = prepared_and_hparams(model, tokenizer, site, 1, **{"v_num_grad_steps": 9, **numbers})
    assert len({len(request.target) for request in prepared}) > 1, "targets of one length need no padding"
    return ModelView(model), prepared, hparams


def same(one, other, most=2e-4):
    assert torch.equal(one.steps, other.steps) and torch.equal(one.status, other.status)
    moved = other.deltas.norm(dim=0).double()
    moved = torch.where(moved > 0, moved, other.targets.norm(dim=0))  # a request that takes no step has its output
    gap = (one.targets - other.targets).norm(dim=0) / moved
    assert float(gap.max()) < most
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, site", (("gpt2", "block"), ("llama", "mlp"), ("gptj", "block"), ("gemma2", "mlp")))
def test_a_recorded_iteration_serves_requests_as_they_come_and_go(kind, site, graphs):
    view, prepared, hparams = case(kind, site, values_batch=2, check_every=4)
    plain = find_values(view, prepared, 1, site, hparams)
    done = []
    replayed = find_values(view, prepared, 1, site, make_graphed(hparams), finished=lambda i, _: done.extend(i))
    same(replayed, plain)
    assert sorted(done) == list(range(len(prepared))) and len(prepared) > 4
    (graph,) = graphs  # recorded once
    assert graph.replays > 9 and Stream.made == 1


def make_graphed(hparams):
    return type(hparams)(**{**vars(hparams), "values_graph": True})


@pytest.mark.parametrize("size", (1, 3))
def test_slots_of_requests_that_end_early_are_filled_again(size, graphs):
    view, prepared, hparams = case(
        "llama", "mlp", values_batch=size, check_every=2, v_stop_loss=6.2, clamp_norm_factor=3.0
    )
    plain = find_values(view, prepared, 1, "mlp", hparams)
    assert len(set(plain.steps.tolist())) > 1 and Status.STOPPED in plain.status.tolist()
    same(find_values(view, prepared, 1, "mlp", make_graphed(hparams)), plain)
    assert len(graphs) == 1


def test_requests_that_none_follows_are_not_padded_and_stay_masked(graphs, monkeypatch):
    view, prepared, hparams = case(
        "llama", "mlp", values_batch=8, check_every=2, v_stop_loss=6.2, clamp_norm_factor=3.0
    )
    plain, shapes, build = find_values(view, prepared, 1, "mlp", hparams), [], Objective.build
    monkeypatch.setattr(Objective, "build", lambda *args: shapes.append(args[-1]) or build(*args))
    same(find_values(view, prepared, 1, "mlp", make_graphed(hparams)), plain)
    assert shapes == [None] and len(graphs) == 1 and len(set(plain.steps.tolist())) > 2


def test_both_sites_of_pmet_and_the_most_probable_rule_run_in_slots(graphs):
    view, prepared, hparams = case("gpt2", "mlp", values_batch=2, check_every=1, v_lr=0.5, most_probable_steps=1)
    plain = find_values(view, prepared, 1, "attention and mlp", hparams, stop_rule="pmet")
    same(find_values(view, prepared, 1, "attention and mlp", make_graphed(hparams), stop_rule="pmet"), plain)
    assert len(graphs) == 1


def test_edits_one_by_one_share_a_recorded_iteration(graphs):
    """The weights change between them, in the memory that the graph reads."""
    numbers = dict(layers=(1,), v_num_grad_steps=9, v_lr=0.1, clamp_norm_factor=0.5, v_weight_decay=0.5, check_every=3)
    changes = []
    for graph in (False, True):
        editor = Editor(
            make_model("llama"), make_tokenizer(), "rome", prefixes=PREFIXES,
            hparams={**numbers, "values_graph": graph, "mom2_adjustment": False, "on_predicted": "allow"},
        )  # fmt: skip
        (weight,) = editor.modules.values()
        before = weight.clone()
        result = editor.edit(VARIED_REQUESTS)
        assert len(result.requests) > 3
        changes.append(weight - before)
        assert len(graphs) == graph
    assert float((changes[1] - changes[0]).norm()) < 1e-3 * float(changes[0].norm())


def test_an_objective_in_slots_has_the_terms_of_one_of_its_own():
    """Also after other requests were written into the slots of a first one."""
    view, prepared, _ = case("llama", "mlp")
    shape, sites = SlotShape.of(prepared, view.max_length), [Site(1, "mlp")]
    order = sorted(range(len(prepared)), key=lambda i: len(prepared[i].target))
    slots = Objective.build(view, [prepared[i] for i in order[:3]], sites, shape=shape)
    delta = 0.1 * torch.randn(3, 1, view.model.config.hidden_size)
    slots.terms(delta)  # masks are made
    memory = slots.runner.caches[1].keys.data_ptr(), slots.wanted.data_ptr()
    slots.write_(torch.tensor([2, 0]), Objective.build(view, [prepared[i] for i in order[-2:]], sites, shape=shape))
    assert memory == (slots.runner.caches[1].keys.data_ptr(), slots.wanted.data_ptr())
    own = Objective.build(view, [prepared[i] for i in (order[-1], order[1], order[-2])], sites)
    for name, one, other in zip(
        own.terms(delta, True)._fields, slots.terms(delta, True), own.terms(delta, True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_requests_that_do_not_fit_into_slots_say_so():
    view, prepared, _ = case("llama", "mlp")
    shape = SlotShape.of(prepared, view.max_length)
    assert SlotShape.of(prepared, shape.prefix + shape.tail) == shape
    assert SlotShape.of(prepared, shape.prefix + shape.tail - 1) is None  # a padded row would be too long
    fewer = type(prepared[0])(**{**vars(prepared[0]), "rewriting": prepared[0].rewriting[:1]})
    assert SlotShape.of([fewer, *prepared[1:]], view.max_length) is None


def test_all_warm_ups_run_on_one_stream(graphs):
    runs = []
    step = GraphedStep(lambda: runs.append(1))
    for _ in range(5):
        step.run()
    assert len(runs) == 3 and Stream.made == 1 and graphs[0].replays == 3  # two warm-ups, one recording
