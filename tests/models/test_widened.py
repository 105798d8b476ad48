"""16-bit models on processors without 16-bit matrix units are computed in fp32, and stay what they are."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import threading
import weakref

import pytest
import torch
from tiny_models import KINDS, POST_NORM, make_model, make_tokenizer

from kedit_fast import Editor, EditRequest, collect_statistics
from kedit_fast.editing.gradients import answer_gradients
from kedit_fast.editing.values import batch_size
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import InvalidArgumentError
from kedit_fast.evaluation.metrics import mean_nll, shares
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models import widened
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import prepare
from kedit_fast.workflow import complete

PREFIXES = ("The old tower. ", "Because I saw. ")
REQUESTS = [
    EditRequest("{} plays the", "Miles Davis", "violin and cello", target_true="trumpet"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", target_true="French"),
]
TEXTS = ["The mother tongue of Danielle Darrieux is French.", "Because I saw the old tower, you walked home."]


@pytest.fixture
def widening(monkeypatch):
    """A processor without units."""
    monkeypatch.setattr(widened, "has_units", lambda dtype: False)
    monkeypatch.delenv("KEDIT_FAST_16BIT", raising=False)


def pair(kind, dtype=torch.bfloat16):
    """A 16-bit model, and the same in fp32."""
    model = make_model(kind, dtype)
    return model, copy.deepcopy(model).float()


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", (1 << 30, 0), ids=("kept", "streamed"))
def test_values_keys_and_gradients_are_those_of_the_model_in_fp32(kind, budget, widening, monkeypatch):
    monkeypatch.setattr(widened, "COPIES_SHARE", budget / widened.free_bytes(torch.device("cpu")))
    tokenizer, what = make_tokenizer(), "mlp" if kind in POST_NORM else "block"
    found = []
    for model in pair(kind):
        view, own = ModelView(model), {name: t.clone() for name, t in model.state_dict().items()}
        prepared = prepare(tokenizer, REQUESTS, PREFIXES, 128)
        numbers = dict(layers=(1,), v_num_grad_steps=5, v_lr=0.1, clamp_norm_factor=0.5)
        hparams, _ = make_hparams("memit", model.config, numbers)
        values = find_values(view, prepared, 1, what, hparams)
        gradients = answer_gradients(view, prepared, [view.module_name(2)]).modules[view.module_name(2)]
        found.append((values.targets, values.deltas, values.losses, gradients.keys, gradients.gradients))
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == own[name].dtype and torch.equal(tensor, own[name])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        near(ours, expected)


@pytest.mark.parametrize("kind", ("gpt2", "llama", "gptj", "gemma3_text"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_statistics_evaluation_and_text_are_those_of_the_model_in_fp32(kind, dtype, widening):
    tokenizer, found = make_tokenizer(), []
    for model in pair(kind, dtype):
        moment = collect_statistics(model, tokenizer, TEXTS, (0, 2), progress=False)
        assert moment.dtype == "float32"
        view = ModelView(model)
        found.append((moment.moment(2).moment, torch.tensor(mean_nll(model, tokenizer, TEXTS)),
                      shares(model, tokenizer, REQUESTS), complete(model, tokenizer, "Miles Davis plays"),
                      generate_prefixes(view, tokenizer, [(4, 3)], 0)))  # fmt: skip
    near(found[0][0], found[1][0])
    near(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]


def test_an_edit_in_fp32_writes_the_models_own_dtype_and_can_be_taken_back(widening):
    model, wide = pair("llama")
    hparams = dict(v_num_grad_steps=5, v_lr=0.1, clamp_norm_factor=0.75, mom2_adjustment=False, mom2_update_weight=1.0)
    editors = [Editor(m, make_tokenizer(), "memit", layers=[1, 2], hparams=hparams, prefixes=PREFIXES)
               for m in (model, wide)]  # fmt: skip
    before = editors[0].view.weight(1).clone()
    updates = [editor.edit(REQUESTS).updates for editor in editors]
    weight = editors[0].view.weight(1)
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before)
    name = editors[0].view.weight_name(1)
    near(*(update[name][0].dense() for update in updates))
    editors[0].rollback()
    assert torch.equal(editors[0].view.weight(1), before)


def test_a_pass_that_fails_leaves_the_models_own_tensors(widening):
    model, _ = pair("llama")
    own = {id(parameter) for parameter in model.parameters()}

    def fail(*args):
        raise RuntimeError("on purpose")

    hook = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        collect_statistics(model, make_tokenizer(), TEXTS, (3,), progress=False)
    hook.remove()
    assert {id(parameter) for parameter in model.parameters()} == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_that_are_not_kept_are_not_held_between_forward_and_backward(widening, monkeypatch):
    monkeypatch.setattr(widened, "COPIES_SHARE", 0.0)
    made, copied = [], widened.Widening._copy

    def watched(self, module, own):
        copy = copied(self, module, own)
        made.append(weakref.ref(copy.untyped_storage()))
        return copy

    monkeypatch.setattr(widened.Widening, "_copy", watched)
    view = ModelView(make_model("llama", torch.bfloat16))
    module, _ = view.edited_module(1), view.head  # which is tried, and makes copies of its own
    made.clear()
    with evaluating(view), torch.enable_grad():
        states = torch.randn(3, 64, requires_grad=True)
        out = module(states)
        assert len(made) == 1 and made[0]() is None
        (gradient,) = torch.autograd.grad(out.sum(), states)
    near(gradient, torch.ones(3, 32) @ module.weight.float())


def test_weights_do_not_count_as_memory_of_a_request(widening, monkeypatch):
    sizes = []
    for share in (0.3, 0.0):
        monkeypatch.setattr(widened, "COPIES_SHARE", share)
        for model in pair("llama"):
            prepared = prepare(make_tokenizer(), REQUESTS, PREFIXES, 128)
            sizes.append(batch_size.request_bytes(ModelView(model), prepared, [Site(1, "block")]))
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)


@pytest.mark.parametrize("kind", ("llama", "gemma3_text"))
def test_an_embedding_with_a_padding_token_looks_up_the_batchs_rows_alone(kind, widening):
    model = make_model(kind, torch.bfloat16)
    table = model.get_input_embeddings()
    table.padding_idx = 399
    with evaluating(ModelView(model)):
        found = table(torch.tensor([[5, 3, 5]]))
    near(found, copy.deepcopy(table).float()(torch.tensor([[5, 3, 5]])))
    assert table.padding_idx == 399 and table.weight.dtype == torch.bfloat16


def test_an_embedding_that_takes_something_else_first_is_copied_whole(widening):
    class Shifted(torch.nn.Embedding):
        def forward(self, mask):  # as OPT's positions: ids made of a mask
            return super().forward(mask.long().cumsum(1) + 1)

    model = make_model("llama", torch.bfloat16)
    model.model.positions = Shifted(9, 32).bfloat16()
    with evaluating(ModelView(model)):
        found = model.model.positions(torch.ones(1, 3))
    near(found, copy.deepcopy(model.model.positions).float()(torch.ones(1, 3)))


def test_another_thread_that_runs_the_model_meanwhile_cannot_damage_it(widening):
    model = make_model("llama", torch.bfloat16)
    own = dict(model.named_parameters())
    ids, stop = torch.tensor([[5, 7, 9]]), threading.Event()

    def others():
        while not stop.is_set():
            with contextlib.suppress(Exception):  # it may see copies, which the class documents
                model(ids)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(30):
            with contextlib.suppress(Exception):
                mean_nll(model, make_tokenizer(), TEXTS)
    finally:
        stop.set()
        thread.join()
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("share", (0.3, 0.0))
def test_no_activation_outlives_its_pass(widening, share, monkeypatch):
    monkeypatch.setattr(widened, "COPIES_SHARE", share)
    model = make_model("llama", torch.bfloat16)
    prepared = prepare(make_tokenizer(), REQUESTS, PREFIXES, 128)
    hparams, _ = make_hparams("memit", model.config, dict(layers=(1,), v_num_grad_steps=2, clamp_norm_factor=0.75))

    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(4):
        find_values(ModelView(model), prepared, 1, "block", hparams)
        batch_size.request_bytes(ModelView(model), prepared, [Site(1, "block")])
        counts.append(alive())
    assert counts[-1] == counts[-2]


def test_easyedits_rows_are_those_of_the_model_in_fp32(widening):
    from kedit_fast.integrations.easyedit_rows import easyedit_gradients

    tokenizer, found = make_tokenizer(), []
    for model in pair("llama"):
        view, prepared = ModelView(model), prepare(tokenizer, REQUESTS, PREFIXES, 128)
        rows = easyedit_gradients(view, tokenizer, prepared, [view.module_name(2)], answer_rows=True, batch_size=2)
        found.append(rows.modules[view.module_name(2)])
    near(found[0].keys, found[1].keys)
    near(found[0].gradients, found[1].gradients)


def test_it_is_said_once_and_only_where_it_happens(monkeypatch, caplog):
    model = make_model("llama", torch.float16)
    monkeypatch.setattr(widened, "has_units", lambda dtype: dtype == torch.bfloat16)
    widened._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kedit_fast"):
        mean_nll(make_model("llama", torch.bfloat16), make_tokenizer(), TEXTS)
        monkeypatch.setenv("KEDIT_FAST_16BIT", "native")
        mean_nll(model, make_tokenizer(), TEXTS)
        assert not caplog.records
        monkeypatch.setenv("KEDIT_FAST_16BIT", "auto")
        for _ in range(2):
            mean_nll(model, make_tokenizer(), TEXTS)
    assert [record.getMessage() for record in caplog.records] == [
        "this processor has no matrix units for float16: models in it are computed in float32, and stay float16 "
        "(KEDIT_FAST_16BIT=native computes in float16, many times slower)"
    ]


@pytest.mark.parametrize(
    "choice, units, dtype", (("native", False, "bfloat16"), ("float32", True, "float32"), ("", True, "bfloat16"))
)
def test_the_switch_and_the_processor_decide(choice, units, dtype, monkeypatch):
    monkeypatch.setattr(widened, "has_units", lambda dtype: units)
    monkeypatch.setenv("KEDIT_FAST_16BIT", choice)
    model, _ = pair("llama")
    assert collect_statistics(model, make_tokenizer(), TEXTS, (0,), progress=False).dtype == dtype


def test_another_word_in_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", "fp32")
    with pytest.raises(InvalidArgumentError, match="must be auto, float32 or native; got 'fp32'"):
        mean_nll(make_model("llama", torch.bfloat16), make_tokenizer(), TEXTS)


@pytest.mark.parametrize(
    "flags, limit, expected",
    (
        ("avx2 fma", "", (False, False)),
        ("avx2 avx512f avx512bw", "", (False, False)),
        ("avx512f avx512_bf16", "", (True, False)),
        ("avx512_bf16 amx_bf16 avx512_fp16", "", (True, True)),
        ("avx512_bf16 amx_bf16 avx512_fp16", "AVX2", (False, False)),
        ("avx512_bf16 amx_bf16 avx512_fp16", "avx512_core_bf16", (True, False)),
    ),
)
def test_units_are_read_from_the_processor_and_onednns_limit(flags, limit, expected, monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(widened, "Path", lambda name: info)
    monkeypatch.setattr(widened.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: True)
    assert tuple(widened.has_units.__wrapped__(dtype) for dtype in widened.HALVES) == expected
