"""Models on several devices: what can be seen of that without a GPU, and what two GPUs show."""

from __future__ import annotations

import pytest
import torch
from places import DEVICES, Places, place, put, spread
from tiny_models import TEXT, make_model, make_tokenizer
from torch_states import STATES

from kedit_fast import Editor, collect_statistics
from kedit_fast.evaluation.metrics import evaluate_each, mean_nll
from kedit_fast.models.view import ModelView
from kedit_fast.requests.reading import parse_request
from kedit_fast.support.sums import add_by_owner_

REQUESTS = [
    {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin and cello"},
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "English"},
    {"prompt": "{} is located in", "subject": "Ebro", "target_new": "Sweden"},
    {"prompt": "Because you saw {}", "subject": "Ebro", "target_new": "Spain"},
]
NUMBERS = dict(v_num_grad_steps=6, v_lr=0.1, clamp_norm_factor=2.0, mom2_ridge=1e-3, mom2_update_weight=10.0,
               v_stop_loss=5.9, on_predicted="allow", nullspace_rule="energy", nullspace_threshold=0.1)  # fmt: skip
METHODS = ("memit", "memit-merge", "pmet", "rome", "r-rome", "rect", "alphaedit", "ultraedit")
PREFIXES = ("The old tower. ", "Because I saw. ")


def edited(model, tokenizer, statistics, method: str, **numbers) -> list[torch.Tensor]:
    """The edited weights; the model is what it was."""
    layers = (1,) if method in ("rome", "r-rome") else (1, 2)
    if method == "ultraedit":
        view = ModelView(model)
        own = dict(inner_params=tuple(view.weight_name(layer) for layer in layers), lr=1e-3)
        statistics = None
    else:
        own = {**NUMBERS, "layers": layers, "values_batch": 3, "check_every": 2, **numbers}
    editor = Editor(model, tokenizer, method, statistics=statistics, hparams=own, prefixes=PREFIXES)
    results = [editor.edit(REQUESTS), editor.edit(REQUESTS[:2])]
    if method not in ("ultraedit", "memit-merge"):
        assert len(set(results[0].steps)) > 1, "some should leave before others"
    for result in results:
        assert all(u.left.device.type == "cpu" for updates in result.updates.values() for u in updates)
    weights = [weight.clone() for weight in editor.modules.values()]
    editor.restore()
    return weights


def on_two_devices(model, kind: str) -> None:
    view = ModelView(model)
    if kind == "gpt2":  # its head is the embedding unless it is told otherwise
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    spread(model, view.blocks, 2, (model.get_submodule(view.spec.norm), model.get_output_embeddings()))


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("llama", name) for name in METHODS),
        *(("gpt2", name) for name in ("memit", "rome", "ultraedit")),  # transposed weights, learned positions
    ],
)
def test_a_model_on_two_devices_is_edited_as_on_one(kind, method):
    tokenizer, model = make_tokenizer(), make_model(kind)
    statistics = collect_statistics(model, tokenizer, TEXT * 4, (1, 2), progress=False)
    clamp = {"clamp_norm_factor": "auto"} if method == "rect" else {}  # tries four: once will do
    expected = edited(model, tokenizer, statistics, method, **clamp)
    on_two_devices(model, kind)
    with Places() as places:
        view = ModelView(model)
        assert (view.device, view.head.device) == DEVICES
        found = edited(model, tokenizer, statistics, method, **clamp)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not places.atomics, "a GPU would add these in any order"


@pytest.mark.parametrize("method", ("memit", "pmet", "rome", "rect", "alphaedit", "ultraedit"))
def test_matrices_on_the_host_of_a_model_that_runs_elsewhere_are_edited_as_there(method, monkeypatch):
    """As where accelerate offloads to the host: passes run on a device, and the matrices stay on the host."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    statistics = collect_statistics(model, tokenizer, TEXT * 4, (1, 2), progress=False)
    expected = edited(model, tokenizer, statistics, method)
    on_two_devices(model, "llama")
    weight, linear = ModelView.weight, ModelView.linear

    def on_host(self, layer):
        return put(weight(self, layer).view(32, 64), torch.device("cpu"))

    monkeypatch.setattr(ModelView, "weight", on_host)
    monkeypatch.setattr(ModelView, "linear", lambda self, path: (linear(self, path)[0], on_host(self, int(path[13]))))
    with Places():
        assert ModelView(model).weight(1).device.type == "cpu" != ModelView(model).row_device(1).type
        found = edited(model, tokenizer, statistics, method)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_a_model_on_two_devices_is_measured_patched_and_collected_from_as_on_one(kind):
    tokenizer, model = make_tokenizer(), make_model(kind)
    requests = [parse_request(request, "request") for request in REQUESTS]

    def results():
        statistics = collect_statistics(model, tokenizer, TEXT, (1, 2), progress=False)
        numbers = {**NUMBERS, "layers": (1, 2), "context_template_length_params": ((3, 2),)}
        editor = Editor(model, tokenizer, "memit", statistics=statistics, hparams=numbers)
        editor.edit(REQUESTS)
        patch = editor.patch()
        editor.restore()
        applied = patch.apply_(model)
        found = [c.log_prob for s in evaluate_each(model, tokenizer, requests) for c in (s.new,)]
        applied.revert_()
        moments = [statistics.moment(layer).moment.cpu() for layer in (1, 2)]
        return editor.prefixes, torch.tensor([*found, mean_nll(model, tokenizer, TEXT)]), moments

    expected = results()
    on_two_devices(model, kind)
    with Places():
        found = results()
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-3, atol=1e-4)


def test_two_devices_do_not_meet_unseen():
    """The mode raises where torch would on GPUs."""
    with Places():
        rows, index = put(torch.zeros(4, 3), DEVICES[0]), put(torch.tensor([1, 2]), DEVICES[1])
        with pytest.raises(RuntimeError, match="different devices"):
            rows[index]
        with pytest.raises(RuntimeError, match="different devices"):
            rows + torch.ones(4, 3, device=DEVICES[1])
        assert place(rows[index.to(rows.device)]) == DEVICES[0]
        assert rows[index.cpu()].shape == (2, 3)


@pytest.mark.parametrize("alpha", (1.0, 0.3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.int32))
def test_sums_by_owner_are_those_of_index_add(dtype, alpha):
    if dtype == torch.int32 and alpha != 1:
        pytest.skip("whole numbers are counted")
    owner = torch.randint(0, 5, (40,))
    rows = torch.randn(40, 7).mul(100).to(dtype)
    expected = torch.zeros(5, 7, dtype=dtype).index_add_(0, owner, rows, alpha=alpha)
    assert torch.equal(add_by_owner_(torch.zeros(5, 7, dtype=dtype), owner, rows, alpha), expected)
    with Places() as places:
        there = [put(t, DEVICES[0]) for t in (torch.zeros(5, 7, dtype=dtype), owner, rows)]
        found = add_by_owner_(*there, alpha)
    torch.testing.assert_close(found, expected)
    assert not places.atomics


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("method", ("memit", "alphaedit", "rome", "rect", "ultraedit"))
@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_a_model_on_two_gpus_is_edited_as_on_one(kind, method):
    from accelerate import dispatch_model

    tokenizer, model = make_tokenizer(), make_model(kind)
    statistics = collect_statistics(model, tokenizer, TEXT * 4, (1, 2), progress=False)
    view = ModelView(model)
    if kind == "gpt2":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    names = {module: name for name, module in model.named_modules()}
    later = [*view.blocks[2:], model.get_submodule(view.spec.norm), model.get_output_embeddings()]
    expected = edited(model.cuda(), tokenizer, statistics, method)
    places = {name: 0 for name, module in model.named_modules() if not list(module.children())}
    places = {name: 0 for name in places if not any(name.startswith(names[m]) for m in later)}
    model = dispatch_model(model, {**places, **{names[module]: 1 for module in later}})
    assert len({parameter.device for parameter in model.parameters()}) == 2
    found = edited(model, tokenizer, statistics, method)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ("memit", "memit-merge"))
def test_edits_on_a_gpu_are_the_same_bits_at_every_run(method):
    tokenizer, model = make_tokenizer(), make_model("llama").cuda()
    statistics = collect_statistics(model, tokenizer, TEXT * 4, (1, 2), progress=False)
    first = edited(model, tokenizer, statistics, method)
    for _ in range(3):
        again = edited(model, tokenizer, statistics, method)
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_edits_on_a_gpu_do_not_depend_on_what_is_set_elsewhere(dtype):
    tokenizer, model = make_tokenizer(), make_model("llama").to("cuda", dtype)
    statistics = collect_statistics(model, tokenizer, TEXT * 4, (1, 2), progress=False)
    expected = edited(model, tokenizer, statistics, "memit")
    names = ("precision high", "allow_tf32", "fp32_precision tf32", "fp32_precision tf32 of cuda",
             "autocast for cuda", "bfloat16 by default", "meta by default")  # fmt: skip
    for name in names:
        if "fp32_precision" in name and not hasattr(torch.backends, "fp32_precision"):
            continue
        with STATES[name]():
            found = edited(model, tokenizer, statistics, "memit")
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), name
