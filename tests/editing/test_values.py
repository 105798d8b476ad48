"""Values against the serial loop of the published method, request by request."""

from __future__ import annotations

import copy
import statistics
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from support import prepared_and_hparams, serial_errors
from tiny_models import KINDS, POST_NORM, make_model, make_tokenizer

from benchmarks.published import serial_value
from kedit_fast.editing.values import batch_size
from kedit_fast.editing.values.active_set import ActiveSet
from kedit_fast.editing.values.cuda_graph import GraphedStep, graph_obstacle
from kedit_fast.editing.values.loop import ValueOptimizer, find_values
from kedit_fast.editing.values.objective import Drift, Objective
from kedit_fast.editing.values.stop_rules import STOP_RULES
from kedit_fast.errors import EditError
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.recipe import StopRule
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models import tail_attention
from kedit_fast.models.forward import Site
from kedit_fast.models.head import Head
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare
from kedit_fast.requests.request import EditRequest
from kedit_fast.solver.value_descent import Status


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "site, layer, bos", (("block", 0, False), ("block", 2, True), ("mlp", 0, True), ("mlp", 1, False))
)
def test_values_equal_the_published_serial_loop(kind, site, layer, bos):
    tokenizer, model = make_tokenizer(bos), make_model(kind)
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, site, layer)
    if site == "block" and kind in POST_NORM:
        with pytest.raises(EditError, match='use the site "mlp"'):
            find_values(view, prepared, layer, site, hparams)
        return
    values = find_values(view, prepared, layer, site, hparams)
    module = view.block(layer) if site == "block" else view.mlp(layer)
    errors = serial_errors(values, prepared, model, module, hparams)
    assert statistics.median(errors) < 3e-5 and max(errors) < 1e-4


DRIFTS = (
    dict(kl_direction="original"),
    dict(kl_temperature=3.0),
    dict(kl_temperature=0.5, kl_direction="original"),
)


@pytest.mark.parametrize("kind, drift", zip(("gpt2", "gptj", "gemma2"), DRIFTS, strict=True))  # a bias, a cap
def test_temperature_and_direction_of_the_drift_equal_the_serial_loop(kind, drift):
    tokenizer, model = make_tokenizer(), make_model(kind)
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1, kl_factor=1.0, **drift)
    values = find_values(view, prepared, 1, "mlp", hparams)
    check(values, prepared, model, [view.mlp(1)], hparams)
    published = find_values(view, prepared, 1, "mlp", replace(hparams, kl_temperature=1.0, kl_direction="edited"))
    gap = (values.targets - published.targets).norm(dim=0) / published.deltas.norm(dim=0)
    assert float(gap.min()) > 1e-3, "the term does nothing"


@pytest.mark.parametrize("drift", DRIFTS, ids=str)
def test_heads_of_all_kinds_measure_the_drift(drift):
    """A scale, a bias and a cap by the op; logits as they are by plain torch; gradients against autograd's."""
    states, other, matrix = (torch.randn(*s, dtype=torch.float64) for s in ((4, 8), (4, 8), (30, 8)))
    bias, temperature = torch.randn(30, dtype=torch.float64), drift.get("kl_temperature", 1.0)
    of = Drift(temperature, drift.get("kl_direction") == "original")
    for head in (
        Head(states.device, matrix, bias, scale=0.7, softcap=2.0),
        Head(states.device, matrix, None, scale=3.0),
        Head(states.device, None),
    ):
        given = other if head.matrix is not None else other @ matrix.T
        x = (states if head.matrix is not None else states @ matrix.T).clone().requires_grad_()
        logs = [torch.log_softmax(head.logits(part) / temperature, -1) for part in (x, given)]
        pair = logs if of.reverse else logs[::-1]
        expected = temperature**2 * torch.nn.functional.kl_div(*pair, log_target=True, reduction="none").sum(-1)
        result = of.of(head, x, given)
        torch.testing.assert_close(result, expected)
        gradients = [torch.autograd.grad(value.sum(), x)[0] for value in (result, expected)]
        torch.testing.assert_close(*gradients)


def test_requests_that_stop_early_stop_where_the_serial_loop_does(demo_model, demo_statistics):
    from kedit_fast import demo

    model, tokenizer = demo_model
    view = ModelView(model)
    hparams, _ = make_hparams("memit", model.config, {"v_num_grad_steps": 12, "v_stop_loss": 0.4})
    prepared = prepare(tokenizer, demo.requests(4), ("The old man. ",), 256)
    values = find_values(view, prepared, 1, "block", hparams)
    stops = []
    for i, request in enumerate(prepared):
        alone = serial_value(model, [view.block(1)], request, hparams)
        stops.append(alone.steps)
        assert int(values.steps[i]) == alone.steps
        assert float((values.targets[:, i] - alone.targets[0]).norm() / values.deltas[:, i].norm()) < 1e-4
    assert len(set(stops)) > 1, "the requests should not all stop at the same step"


def check(values, prepared, model, modules, hparams, most=1e-4, **rule):
    """Values equal the serial loop's, request by request; returns the steps it took."""
    steps = []
    for i, request in enumerate(prepared):
        alone = serial_value(model, modules, request, hparams, side=None, **rule)
        assert int(values.steps[i]) == alone.steps
        for s, target in enumerate(alone.targets):
            gap = (values.all_targets[s, :, i] - target).norm()
            assert float(gap) <= most * float(values.all_deltas[s, :, i].norm()) + 1e-7
        steps.append(alone.steps)
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_pmets_two_deltas_equal_the_serial_loop(kind):
    """The attention's delta reaches the block's own MLP where blocks are sequential, not where they are parallel."""
    tokenizer, model = make_tokenizer(), make_model(kind)
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1)
    values = find_values(view, prepared, 1, "attention and mlp", hparams, stop_rule="pmet")
    assert values.sites == ("attention", "mlp") and values.all_deltas.shape[0] == 2
    check(values, prepared, model, [view.attention(1), view.mlp(1)], hparams, pmet=True)
    start = values.all_targets - values.all_deltas
    limits = 0.5 * start.norm(dim=1) * (1 + 1e-5)
    assert bool((values.all_deltas.norm(dim=1) <= limits).all()), "each delta has a clamp of its own"


def demo_case(demo_model, count=6, **numbers):
    from kedit_fast import demo

    model, tokenizer = demo_model
    hparams, _ = make_hparams("memit", model.config, {"v_num_grad_steps": 14, **numbers})
    return model, ModelView(model), prepare(tokenizer, demo.requests(count), ("The old man. ",), 256), hparams


def test_pmet_eases_and_stops_where_the_serial_loop_does(demo_model):
    model, view, prepared, hparams = demo_case(demo_model, kl_factor=0.001, clamp_norm_factor=3.0, v_stop_loss=1e-3)
    values = find_values(view, prepared, 1, "attention and mlp", hparams, stop_rule="pmet")
    steps = check(values, prepared, model, [view.attention(1), view.mlp(1)], hparams, pmet=True)
    assert len(set(steps)) > 1, "some should stop by the rule"
    assert Status.STOPPED in values.status.tolist()


def test_most_probable_early_stopping_is_the_serial_loops(demo_model):
    model, view, prepared, hparams = demo_case(demo_model, 4, most_probable_steps=2, v_stop_loss=1e-3)
    values = find_values(view, prepared, 1, "block", hparams)
    early = check(values, prepared, model, [view.block(1)], hparams, most_probable_steps=2)
    full = find_values(view, prepared, 1, "block", replace(hparams, most_probable_steps=0))
    assert sum(early) < int(full.steps.sum())


def test_romes_twenty_one_contexts(demo_model):
    from kedit_fast import demo

    model, tokenizer = demo_model
    contexts = find_recipe("rome").contexts
    assert contexts == ((5, 10), (10, 10))
    prefixes = [f"The {word} old man said so. " for word in "abcdefghijklmnopqrst"]
    prepared = prepare(tokenizer, demo.requests(2), prefixes, 256)
    assert len(prepared[0].rewriting) == 21 == 1 + sum(count for _, count in contexts)
    hparams, _ = make_hparams("rome", model.config, {"v_num_grad_steps": 4})
    values = find_values(ModelView(model), prepared, 0, "mlp", hparams)
    check(values, prepared, model, [ModelView(model).mlp(0)], hparams)


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("kind", ("gpt2", "llama", "mistral", "gpt_neox"))
def test_the_tokenizers_padding_side_does_not_matter(kind, side):
    tokenizer, model = make_tokenizer(side=side), make_model(kind)
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1)
    values = find_values(view, prepared, 1, "mlp", hparams)
    if kind == "mistral":  # a window counts slots, and those of the left padding too: alone is the oracle
        check(values, prepared, model, [view.mlp(1)], hparams)
        return
    for i, request in enumerate(prepared):
        batched = serial_value(model, [view.mlp(1)], request, hparams, side=side)
        assert int(values.steps[i]) == batched.steps
        assert float((values.targets[:, i] - batched.targets[0]).norm() / values.deltas[:, i].norm()) < 1e-4


@pytest.fixture(scope="module")
def alone(demo_model):
    """Requests that stop at several steps, and the values of each in a call of its own."""
    _, view, prepared, hparams = demo_case(demo_model, v_stop_loss=0.4)
    return view, prepared, hparams, [find_values(view, [request], 1, "block", hparams) for request in prepared]


@pytest.mark.parametrize("numbers", (dict(values_batch=1), dict(values_batch=2), dict(values_batch=4, check_every=3),
                                     dict(values_batch=5, check_every=100), dict(check_every=4)), ids=str)  # fmt: skip
def test_neither_the_batch_nor_the_looks_change_a_value(alone, numbers):
    """Requests enter as others leave, at every size; who has stopped is frozen until the next look."""
    view, prepared, hparams, single = alone
    together = find_values(view, prepared, 1, "block", replace(hparams, **numbers))
    assert together.steps.tolist() == [int(one.steps) for one in single]
    assert len(set(together.steps.tolist())) > 1
    for i, one in enumerate(single):
        assert float((one.targets[:, 0] - together.targets[:, i]).norm() / one.deltas.norm()) < 1e-4


@pytest.mark.parametrize("kind", ("gpt2", "gpt_neox", "mistral", "gemma2", "gemma3_text"))
def test_the_attention_over_kept_prefixes_is_the_models_own(kind, monkeypatch):
    tokenizer, model = make_tokenizer(), make_model(kind)
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1)
    before = model.config._attn_implementation
    fast = find_values(view, prepared, 1, "mlp", hparams)
    assert model.config._attn_implementation == before
    monkeypatch.setattr(tail_attention, "usable", lambda view: False)
    plain = find_values(view, prepared, 1, "mlp", hparams)
    torch.testing.assert_close(fast.targets, plain.targets, rtol=1e-4, atol=1e-5)


def watch_waits(monkeypatch) -> tuple[list, list]:
    """Calls of a step's parts from now on, and what in them makes the host wait for a device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
                waited.append(function)
            return function(*args, **(kwargs or {}))

    waited, watched = [], []

    def watching(name):
        original = getattr(ValueOptimizer, name)

        def call(self, *args):
            with Waits():
                watched.append(name)
                return original(self, *args)

        monkeypatch.setattr(ValueOptimizer, name, call)

    watching("_losses")
    watching("_adam_step")
    return watched, waited


def test_nothing_is_read_back_between_looks(demo_model, monkeypatch):
    """A step of the loop's own arithmetic does not wait for the device."""
    if not tail_attention.usable(ModelView(demo_model[0])):
        pytest.skip("this transformers' own mask of the padded rows reads back")
    watched, waited = watch_waits(monkeypatch)
    drift = dict(kl_temperature=2.0, kl_direction="original")
    _, view, prepared, hparams = demo_case(demo_model, 3, most_probable_steps=3, check_every=4, **drift)
    find_values(view, prepared, 1, "block", hparams)
    assert watched.count("_losses") > 4 and not waited


def test_a_gpt2_that_has_a_padding_token_is_not_read_back(monkeypatch):
    """transformers looks for that token where it gets no mask."""
    tokenizer, model = make_tokenizer(), make_model("gpt2")
    assert model.config.pad_token_id is not None
    view = ModelView(model)
    if not tail_attention.usable(view):
        pytest.skip("this transformers' own mask of the padded rows reads back")
    watched, waited = watch_waits(monkeypatch)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1, check_every=4)
    find_values(view, prepared, 1, "block", hparams)
    assert watched.count("_losses") > 4 and not waited
    assert "warn_if_padding_and_no_attention_mask" not in vars(view.base)


@pytest.mark.parametrize("size", (0, 2, 4))
@pytest.mark.parametrize("every", (1, 4, 100))
def test_no_pass_is_run_for_requests_that_have_ended(demo_model, monkeypatch, every, size):
    """The last iteration of a group is looked at: 9 iterations are 9 forward passes and 8 backward ones."""
    _, view, prepared, hparams = demo_case(
        demo_model, 4, v_num_grad_steps=9, v_stop_loss=-1.0, check_every=every, values_batch=size
    )
    passes = []
    for name in ("_losses", "_adam_step"):
        original = getattr(ValueOptimizer, name)

        def counted(self, *args, name=name, original=original):
            passes.append(name)
            return original(self, *args)

        monkeypatch.setattr(ValueOptimizer, name, counted)
    found = find_values(view, prepared, 1, "block", hparams)
    rounds = 2 if size == 2 else 1
    assert passes.count("_losses") == 9 * rounds and passes.count("_adam_step") == 8 * rounds
    assert found.steps.tolist() == [8] * 4 and set(found.status.tolist()) == {Status.COMPLETED}


def test_a_step_that_can_be_replayed_is_the_step(demo_model, monkeypatch):
    """What a CUDA graph records: it reads and writes the same tensors, and gives what the loop gives."""
    drift = dict(kl_temperature=2.0, kl_direction="original")
    _, view, prepared, hparams = demo_case(demo_model, 4, v_stop_loss=0.4, check_every=3, **drift)
    plain = find_values(view, prepared, 1, "block", hparams)
    elsewhere = []

    def run(graphed):
        (active,) = graphed.step.args
        before = addresses(active)
        graphed.step()
        elsewhere.extend(name for name, address in addresses(active).items() if address != before[name])

    def addresses(active):
        tensors = {field.name: getattr(active, field.name) for field in fields(ActiveSet)}
        return {name: tensor.data_ptr() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}

    original = ValueOptimizer.__init__

    def with_graph(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.uses_graph = True

    monkeypatch.setattr(ValueOptimizer, "__init__", with_graph)
    monkeypatch.setattr(GraphedStep, "run", run)
    replayed = find_values(view, prepared, 1, "block", hparams)
    assert not elsewhere
    assert torch.equal(replayed.steps, plain.steps)
    torch.testing.assert_close(replayed.deltas, plain.deltas, rtol=1e-4, atol=1e-5)


def test_a_graph_needs_a_gpu():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1, values_graph=True)
    with pytest.raises(EditError, match="values_graph needs a CUDA device"):
        find_values(ModelView(model), prepared, 1, "block", hparams)


def test_a_graph_needs_a_model_that_stays_on_one_device():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1, values_graph=True)
    model.model.layers[2].mlp._hf_hook = object()
    with pytest.raises(EditError, match=r"dispatched by accelerate.*model\.layers\.2\.mlp"):
        find_values(ModelView(model), prepared, 1, "block", hparams)
    model.model.embed_tokens.to("meta")
    with pytest.raises(EditError, match="values_graph needs the whole model on one CUDA device; it is on cpu, meta"):
        ValueOptimizer(
            ModelView(model), prepared, [Site(1, "block")], hparams, size=1, stopping=STOP_RULES["below_loss"]
        )


def test_a_graph_needs_a_rotary_embedding_that_does_not_look_at_lengths(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(ModelView, "head", SimpleNamespace(device=torch.device("cuda")), raising=False)
    monkeypatch.setattr(ModelView, "is_sharded", False)
    view = ModelView.__new__(ModelView)
    view.model, view.config = model, SimpleNamespace(rope_scaling={"type": "dynamic"})
    assert "dynamic" in graph_obstacle(view)
    view.config = SimpleNamespace(rope_scaling=None)
    assert graph_obstacle(view) == ""


def test_an_interrupt_leaves_the_model_as_it_was(demo_model, monkeypatch):
    model, view, prepared, hparams = demo_case(demo_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    calls = []
    original = Objective.terms

    def interrupted(self, *args):
        calls.append(1)
        result = original(self, *args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Objective, "terms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_values(view, prepared, 1, "block", hparams)
    assert model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_request_that_is_not_finite_does_not_touch_the_others():
    tokenizer, model = make_tokenizer(), make_model("llama")
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1)
    clean = find_values(view, prepared, 1, "block", hparams)
    used = [set(sum((p.ids for p in (*r.rewriting, r.kl)), ()) + r.target) for r in prepared]
    (token, *_) = used[0] - set.union(*used[1:])
    with torch.no_grad():
        view.model.get_input_embeddings().weight[token] = float("nan")
    values = find_values(view, prepared, 1, "block", hparams, on_problem="keep")
    assert values.status.tolist() == [Status.BAD_LOSS, *clean.status.tolist()[1:]]
    torch.testing.assert_close(values.targets[:, 1:], clean.targets[:, 1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(EditError, match=r"Miles Davis.*not finite"):
        find_values(view, prepared, 1, "block", hparams)


def test_what_is_said_already_is_told(demo_model):
    from kedit_fast import demo

    model, tokenizer = demo_model
    known = [replace(r, target_new=r.target_true) for r in demo.requests(2)]
    prepared = prepare(tokenizer, [*known, *demo.requests(3)[2:]], (), 256)
    assert all(isinstance(r.request, EditRequest) for r in prepared)
    hparams, _ = make_hparams("memit", model.config, {"v_stop_loss": 0.2, "v_num_grad_steps": 3})
    values = find_values(ModelView(model), prepared, 1, "block", hparams)
    assert values.status.tolist() == [Status.PREDICTED, Status.PREDICTED, Status.COMPLETED]
    assert not values.deltas[:, :2].any()


def test_the_batch_is_what_memory_takes(demo_model, monkeypatch):
    from kedit_fast import demo

    model, tokenizer = demo_model
    view, sites = ModelView(model), [Site(1, "block")]
    prepared = prepare(tokenizer, demo.requests(40), ("The old man. ",), 256)
    each = batch_size.request_bytes(view, prepared, sites)
    assert 1e5 < each < 1e8
    long = prepare(tokenizer, demo.requests(40), ("The old man went there. " * 8,), 256)
    assert batch_size.request_bytes(view, long, sites) > each
    for free, most in ((1, 1), (10 * each, 10), (1 << 40, 40)):
        monkeypatch.setattr(batch_size, "free_bytes", lambda device, free=free: int(free / batch_size.SHARE) + 9)
        assert batch_size.fitting_batch(view, prepared, sites).requests == most


def test_the_norm_of_delta_is_clamped():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1, v_weight_decay=0.0)
    values = find_values(ModelView(model), prepared, 1, "block", hparams)
    start = values.targets - values.deltas
    assert bool((values.deltas.norm(dim=0) <= 0.5 * start.norm(dim=0) * (1 + 1e-5)).all())


def test_the_model_is_left_as_it_was():
    tokenizer, model = make_tokenizer(), make_model("gpt2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1)
    find_values(ModelView(model), prepared, 1, "block", hparams)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_says_nan_is_refused_by_request():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, hparams = prepared_and_hparams(model, tokenizer, "block", 1)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EditError, match="not finite"):
        find_values(ModelView(model), prepared, 1, "block", hparams)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graph", (False, True), ids=("eager", "graph"))
@pytest.mark.parametrize("kind", ("gpt2", "llama", "gemma2"))
@pytest.mark.parametrize("drift", ({}, dict(kl_temperature=2.0, kl_direction="original")), ids=str)
def test_values_on_a_gpu_equal_the_serial_loop(kind, graph, drift):
    tokenizer, model = make_tokenizer(), make_model(kind).cuda()
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1, values_graph=graph, check_every=4, **drift)
    values = find_values(view, prepared, 1, "mlp", hparams)
    check(values, prepared, model, [view.mlp(1)], hparams, most=1e-3)


def test_every_stopping_rule_of_a_recipe_is_there():
    assert set(STOP_RULES) == set(get_args(StopRule))


def test_an_active_set_selects_and_appends_every_field():
    tokenizer, model = make_tokenizer(), make_model("llama")
    prepared, _ = prepared_and_hparams(model, tokenizer, "block", 1)
    sites = [Site(1, "block")]

    def active(requests, leaders):
        objective = Objective.build(ModelView(model), [prepared[i] for i in requests], sites)
        return ActiveSet.start(objective, requests, leaders, 0.5)

    first, second = active([0, 2], [0, 0]), active([4, 1, 3], [0, 1, 1])
    both = first.append(second)
    assert len(both) == 5 and both.group.tolist() == [0, 0, 2, 1, 1] and both.group_size.tolist() == [2, 2, 1, 1, 1]
    mean = both.group_mean(torch.tensor([1.0, 3.0, 5.0, 2.0, 4.0]))
    assert mean.tolist() == [2.0, 2.0, 5.0, 3.0, 3.0]
    assert both.all_in_group(torch.tensor([True, False, True, True, True])).tolist() == [False, False, True, True, True]
    back = both.select(torch.tensor([2, 3, 4]))
    for name, part in vars(second).items():
        if isinstance(part, torch.Tensor):
            assert torch.equal(part, getattr(back, name)), name
    delta = torch.randn(3, 1, model.config.hidden_size) * 0.1
    for one, other in zip(back.objective.terms(delta), second.objective.terms(delta), strict=True):
        assert one is other is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    address, changed = back.delta.data_ptr(), copy.copy(back)
    changed.delta = delta
    back.copy_(changed)
    assert torch.equal(back.delta, delta) and back.delta.data_ptr() == address
