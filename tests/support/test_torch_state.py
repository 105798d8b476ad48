"""What other code sets for the whole process or thread changes no bit of a result, and is as it was afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEXT, make_model, make_tokenizer
from torch_states import STATES, default_device, default_dtype, newer, older, on_cpu, on_cuda, whole

import kedit_fast
from kedit_fast.editing.editor import Editor
from kedit_fast.editing.gradients import answer_gradients
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.editing.values.store import open_values
from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.evaluation.metrics import evaluate_each, mean_nll
from kedit_fast.kernels.native import cpu as native_cpu
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models.forward import Site
from kedit_fast.models.loading import load_model
from kedit_fast.models.saving import save_model
from kedit_fast.models.view import ModelView
from kedit_fast.patches.checkpoint import Checkpoint
from kedit_fast.patches.lora import export_lora
from kedit_fast.patches.patch import Patch, merge
from kedit_fast.reports.convergence import convergence
from kedit_fast.reports.spectra import spectra
from kedit_fast.reports.suggest import suggest
from kedit_fast.requests.prompts import prepare
from kedit_fast.requests.request import EditRequest
from kedit_fast.solver.alphaedit_projector import load_projector, save_projector
from kedit_fast.solver.low_rank import LowRankUpdate, MaskedUpdate
from kedit_fast.solver.shaping import compact, prune, rect, spectral_norm
from kedit_fast.statistics.collect import collect_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.resumable import collect_into
from kedit_fast.statistics.store import load_statistics, save_statistics
from kedit_fast.support.torch_state import plain_torch
from kedit_fast.workflow import complete

REQUESTS = [
    EditRequest("{} plays the", "Miles Davis", "violin", target_true="trumpet", paraphrase_prompts=("The old",)),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
]
NUMBERS = dict(layers=(0, 1), v_num_grad_steps=4, v_lr=0.1, mom2_ridge=1e-3, nullspace_rule="energy",
               nullspace_threshold=0.1, v_stop_loss=-1.0, on_predicted="allow",
               context_template_length_params=((3, 2),))  # fmt: skip
METHODS = ("memit", "alphaedit", "rome", "rect", "ultraedit", "memit-merge")


def numbers_of(method: str) -> dict:
    numbers = dict(NUMBERS)
    if method == "rome":
        numbers["layers"] = (1,)
    if method == "ultraedit":
        numbers = dict(inner_params=("model.layers.1.mlp.down_proj.weight",), lr=1e-3)
    return numbers


@cache
def parts():
    """A model, its tokenizer and statistics, made before anything is set."""
    model, tokenizer = make_model("llama", layers=3), make_tokenizer()
    return model, tokenizer, collect_statistics(model, tokenizer, TEXT * 4, (0, 1), progress=False)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def ops(backend: str):
    def run():
        found = []
        rows, tokens = (5, 9) if backend == "triton" else (37, 70)  # its interpreter is slow
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = normal(rows, 24, dtype=dtype), normal(20, 24, dtype=dtype, seed=1)
            acc = torch.zeros(24, 24, dtype=torch.float64, device="cpu")
            kedit_fast.symmetric_rank_k_update_(acc, x, alpha=0.3, backend=backend)
            left, right = normal(20, 5, seed=2), normal(24, 5, seed=3)
            found += [acc, kedit_fast.rank_k_update_(weight, left, right, 0.3, backend=backend)]
            if backend != "triton":
                found += [
                    kedit_fast.rms_norm(x, weight[0], 1e-6, backend=backend),
                    kedit_fast.gated_silu(x, x.flip(0), backend=backend),
                ]
            if backend != "cpu":
                head, bias = normal(tokens, 24, dtype=dtype, seed=4), normal(tokens, seed=5)
                targets = torch.arange(rows, dtype=torch.int64, device="cpu")
                log_probs = kedit_fast.target_log_probs(x, head, targets, bias, 3.0, True, backend=backend)
                found += [*log_probs, kedit_fast.distribution_kl(x, x.flip(0), head, bias, 3.0, backend=backend)]
            if backend == "torch":
                gram = acc + 10 * torch.eye(24, dtype=torch.float64, device="cpu")
                found += [kedit_fast.spd_solve(gram.float(), x.float().T.contiguous(), 0.5), kedit_fast.mirror_(acc)]
        return found

    return run


def solves():
    moment = kedit_fast.second_moment(normal(60, 24))
    keys, residuals = normal(24, 7, seed=1), normal(12, 7, seed=2)
    found = [moment]
    for preconditioner in (
        kedit_fast.Covariance.from_moment(moment, weight=3.0),
        kedit_fast.Covariance.from_moment(moment, weight=3.0, dtype=torch.float32),
        kedit_fast.NullSpace.from_covariance(moment, 0.3, "energy"),
        kedit_fast.Identity(24),
    ):
        for form in ("dual", "primal"):
            found.append(kedit_fast.solve_update(keys, residuals, preconditioner, form=form).dense())
            memory = kedit_fast.KeyMemory(preconditioner, form)
            for part in (keys[:, :4], keys[:, 4:]):
                update, appended = memory.solve(part, residuals[:, : part.shape[1]])
                memory.commit(appended)
                found.append(update.right)
            memory.rollback()
            found += [*memory.tensors().values(), preconditioner.probe()]
    update = LowRankUpdate(residuals, keys)
    few = LowRankUpdate(*(torch.cat([t] * 3, 1) for t in (residuals, keys)))
    masked = rect(update, normal(12, 24, seed=3))
    weight = normal(12, 24, dtype=torch.bfloat16, seed=3)
    found += [
        update.dense(), few.compacted().left, few.compacted().right, masked.dense(), masked.bits,
        masked.apply_(weight.clone()), update.apply_(weight.clone()), compact(masked).left, compact(few).left,
        prune(update, 0.1).left, update.norm(), masked.norm(), spectral_norm(weight),
    ]  # fmt: skip
    return found


def descent():
    h0, target = normal(5, 16), normal(5, 16, seed=1)
    values = kedit_fast.optimize_values(
        lambda delta: ((h0 + delta - target) ** 2).sum(1), h0, v_num_grad_steps=9, v_lr=0.1, v_stop_loss=0.0
    )
    return [values.deltas, values.targets, values.losses, values.steps]


def edit(method: str):
    def run():
        model, tokenizer, statistics = parts()
        needed = None if method == "ultraedit" else statistics
        editor = Editor(model, tokenizer, method, statistics=needed, hparams=numbers_of(method))
        try:
            found = [*editor.prefixes]
            for requests in (REQUESTS, REQUESTS[:1]):
                result = editor.edit(requests)
                found += [*result.losses, *result.relative_norms.values(), result.residual]
                found += [part for updates in result.updates.values() for u in updates for part in (u.left, u.right)]
            found += [weight.clone() for weight in editor.modules.values()]
            found.append(editor.patch().digest)
            editor.rollback()
            found += [weight.clone() for weight in editor.modules.values()]
        finally:
            editor.restore()
        return found

    return run


def passes():
    model, tokenizer, _ = parts()
    view = ModelView(model)
    prepared = prepare(tokenizer, REQUESTS, ("The old tower. ", "Because. "), 128)
    hparams, _ = make_hparams("pmet", model.config, dict(NUMBERS, clamp_norm_factor=0.75))
    found = []
    for site, rule in (("block", "below_loss"), ("mlp", "below_loss"), ("attention and mlp", "pmet")):
        values = find_values(view, prepared, 1, site, replace(hparams, most_probable_steps=2), stop_rule=rule)
        found += [values.all_targets, values.all_deltas, values.losses, values.steps]
    for weights in ("mean", "bare_half"):
        keys = KeyPass(view, prepared, Site(1, "mlp"), weights)
        for layer in (0, 1):
            seen = keys.at(layer)
            found += [seen.keys, seen.bare_keys, seen.outputs]
        found.append(keys.outputs())
    gradients = answer_gradients(view, prepared, ["model.layers.1.mlp.down_proj"], "all")
    rows = gradients.modules["model.layers.1.mlp.down_proj"]
    return [*found, gradients.losses, rows.keys, rows.gradients]


def measures():
    model, tokenizer, _ = parts()
    seen = evaluate_each(model, tokenizer, REQUESTS)
    found = [c.log_prob for s in seen for c in (s.new, s.true, *s.paraphrases) if c is not None]
    return [*found, mean_nll(model, tokenizer, TEXT), complete(model, tokenizer, "The old tower")]


def statistics_of(folder):
    def run():
        model, tokenizer, _ = parts()
        found = collect_statistics(
            model, tokenizer, TEXT, (0, 1), token_weights=lambda ids: [1 + i % 2 for i in ids], progress=False
        )
        saved, collected = folder / "saved", folder / "collected"
        save_statistics(found, saved)
        collect_into(collected, model, tokenizer, Corpus(TEXT), (0, 1), overwrite=True, progress=False)
        spectrum = spectra(saved)
        spaces = {layer: kedit_fast.NullSpace.from_covariance(found.moment(layer).moment, 0.1, "energy")
                  for layer in (0, 1)}  # fmt: skip
        save_projector(folder / "P.pt", spaces)
        loaded = load_projector(folder / "P.pt", (0, 1), trust=True)
        tensors = [found.moment(layer).moment for layer in (0, 1)]
        for where in (saved, collected):
            tensors += [load_statistics(where, model, tokenizer, (layer,)).moment(layer).moment for layer in (0, 1)]
        tensors += [s.eigenvalues for s in spectrum] + [loaded[layer].project(normal(64, 3)) for layer in (0, 1)]
        return [*tensors, *[str(s.null_dimensions) + repr(s.effective_rank) for s in spectrum]]

    return run


def files(folder):
    def run():
        model, tokenizer, statistics = parts()
        path = folder / "values.safetensors"
        path.unlink(missing_ok=True)
        numbers = numbers_of("memit-sequential")
        editor = Editor(model, tokenizer, "memit-sequential", statistics=statistics, hparams=numbers, values=path)
        patch = None
        try:
            editor.edit(REQUESTS)
            editor.save_state(folder / "state.safetensors")
            editor.patch().save(folder / "patch.safetensors")
            again = Editor(model, tokenizer, "memit-sequential", statistics=statistics, hparams=numbers)
            again.load_state(folder / "state.safetensors")
            found = [t for memory in again.solver_state.memories.values() for t in memory.tensors().values()]
            patch = Patch.load(folder / "patch.safetensors")
        finally:
            editor.restore()
        applied = patch.apply_(model)
        found += [weight.clone() for weight in editor.modules.values()]
        applied.revert_()
        found += [entry[n] for entry in open_values(path).entries.values() for n in ("targets", "deltas", "losses")]
        whole = merge([patch.compacted(), patch.compacted()], force=True)
        return [*found, whole.digest, *[u.left for u in whole.updates.values()]]

    return run


@cache
def on_disk():
    """The model as files, and a patch for it, made before anything is set."""
    folder = Path(tempfile.mkdtemp())
    model, tokenizer, statistics = parts()
    save_model(model, tokenizer, folder / "model")
    editor = Editor(model, tokenizer, "rect", statistics=statistics, hparams=numbers_of("rect"))
    editor.edit(REQUESTS)
    editor.patch().save(folder / "patch.safetensors")
    editor.restore()
    return folder


def checkpoint(folder):
    def run():
        shutil.copytree(on_disk() / "model", folder / "model", dirs_exist_ok=True)
        patch = Patch.load(on_disk() / "patch.safetensors")
        place = Checkpoint(folder / "model")
        place.apply(patch, "patch")
        model, _ = load_model(folder / "model")
        found = [parameter.detach() for parameter in model.parameters()]
        place.revert()
        found += [parameter.detach() for parameter in load_model(folder / "model")[0].parameters()]
        if importlib.util.find_spec("peft") is not None:
            export_lora(patch, folder / "lora", tolerance=0.1)
            found.append((folder / "lora" / "adapter_model.safetensors").read_bytes())
        return found

    return run


def searches():
    model, tokenizer, statistics = parts()
    numbers = dict(v_num_grad_steps=30, v_lr=0.5, mom2_adjustment=False, clamp_norm_factor=50.0, v_weight_decay=0.0,
                   kl_factor=0.0, context_template_length_params=((3, 2),))  # fmt: skip
    request = EditRequest("The mother tongue of {}", "Danielle Darrieux", " is")
    found = suggest(
        model, tokenizer, [request], "rome", statistics=statistics, texts=TEXT, last_layers=[1], hparams=numbers
    )
    rows = convergence(model, tokenizer, Corpus(TEXT), REQUESTS, counts=(40, 80), hparams=NUMBERS)
    return [repr(found.trials), repr(rows)]


def framework():
    from kedit_fast.integrations.alphaedit import apply_AlphaEdit_to_model
    from kedit_fast.integrations.sessions import detach_session

    model, tokenizer, statistics = parts()
    names = {p: w.clone() for p, w in model.state_dict().items()}
    numbers = {**numbers_of("alphaedit"), "nullspace_threshold": 0.1}
    records = [{"prompt": r.prompt, "subject": r.subject, "target_new": {"str": r.target_new}} for r in REQUESTS]
    try:
        _, cache_c = apply_AlphaEdit_to_model(model, tokenizer, records, numbers, statistics=statistics)
        return [cache_c, *[w.clone() for p, w in model.state_dict().items() if "down_proj" in p]]
    finally:
        with torch.no_grad():
            model.load_state_dict(names)
        detach_session(model)


BACKENDS = ("torch", *(("cpu",) if not native_cpu.probe().reason else ()), "triton")
PATHS = {
    **{f"ops on {backend}": ops(backend) for backend in BACKENDS}, "solves": solves, "optimize_values": descent,
    **{method: edit(method) for method in METHODS}, "passes": passes, "measures": measures,
    "statistics": statistics_of, "files": files, "checkpoint": checkpoint, "searches": searches, "framework": framework,
}  # fmt: skip
NEED_FOLDER = ("statistics", "files", "checkpoint")


# One of each kind, for the slower paths.
FEW = ("bfloat16 by default", "float64 by default", "meta by default", "autocast bfloat16", "inference mode",
       "deterministic", "allow_tf32", "fp32_precision bf16")  # fmt: skip
UNDER_ALL = ("ops on torch", "ops on cpu", "solves", "optimize_values", "passes", "memit")
REFUSED = {
    "optimize_values": EditError,
    "framework": EditError,
    **dict.fromkeys(METHODS, EditError),
    "files": EditError,
}


def settings() -> list:
    """Everything that can be read of what STATES set."""
    found = [torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled(),
             torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]  # fmt: skip
    found += [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    if hasattr(torch.backends, "fp32_precision"):
        found += [place().fp32_precision for place in (whole, on_cuda, on_cpu)]
    try:
        found += [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32]
    except RuntimeError as error:
        found.append(type(error))
    return found


def run(path: str, folder) -> list:
    return PATHS[path](folder)() if path in NEED_FOLDER else PATHS[path]()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The results of each path where nothing is set, once a module."""
    folder = tmp_path_factory.mktemp("plain")
    return cache(lambda path: run(path, folder))


def assert_same_bits(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_set_elsewhere_changes_no_bit(path, state, plain, tmp_path):
    if path not in UNDER_ALL and state not in FEW:
        pytest.skip("others run under one state of a kind")
    expected = plain(path)
    with STATES[state]():
        before = settings()
        if state == "inference mode" and path in REFUSED:
            with pytest.raises(REFUSED[path], match="inference_mode"):
                run(path, tmp_path)
            found = None
        else:
            found = run(path, tmp_path)
        assert settings() == before
    if found is not None:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("path", PATHS)
def test_no_global_generator_is_read_or_moved(path, plain, tmp_path):
    expected = plain(path)
    torch.manual_seed(987)
    random.seed(987)
    np.random.seed(987)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert_same_bits(run(path, tmp_path), expected)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2][1]) and np.random.get_state()[2] == before[2][2]


def test_an_error_inside_leaves_everything_set():
    with default_dtype(torch.bfloat16), default_device("meta"), torch.autocast("cpu"), older(precision="medium"):
        before = settings()
        with pytest.raises(ZeroDivisionError), plain_torch():
            assert settings() != before
            raise ZeroDivisionError
        assert settings() == before


def test_an_editor_edits_under_what_it_was_not_made_under():
    model, tokenizer, statistics = parts()
    expected = None
    for made, used in ((contextlib.nullcontext, contextlib.nullcontext), *((s, contextlib.nullcontext) for s in (
        STATES["bfloat16 by default"], STATES["meta by default"], torch.inference_mode,
        STATES["autocast bfloat16"])), (STATES["autocast bfloat16"], STATES["float64 by default"])):  # fmt: skip
        with made():
            editor = Editor(model, tokenizer, "memit", statistics=statistics, hparams=NUMBERS)
        with used():
            editor.edit(REQUESTS)
        found = [weight.clone() for weight in editor.modules.values()]
        editor.restore()
        expected = expected or found
        assert_same_bits(found, expected)


def test_weights_that_autocast_remembers_are_not_those_from_before_an_edit():
    model, tokenizer, statistics = parts()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            unedited = model(ids).logits
        editor = Editor(model, tokenizer, "memit", statistics=statistics, hparams={**NUMBERS, "v_lr": 1.0})
        editor.edit(REQUESTS)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(ids).logits
        editor.restore()
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert torch.equal(model(ids).logits, unedited)  # autocast keeps its copies of weights that require grad
        editor.edit(REQUESTS)
        try:
            assert torch.equal(model(ids).logits, expected) and not torch.equal(expected, unedited)
        finally:
            editor.restore()


@pytest.mark.parametrize("inside", (True, False))
def test_what_is_made_in_inference_mode_can_be_used_outside(inside):
    with torch.inference_mode() if inside else contextlib.nullcontext():
        accumulator = kedit_fast.statistics.moments.SecondMomentAccumulator("rows", 24)
        accumulator.update(normal(60, 24))
        memory = kedit_fast.KeyMemory(kedit_fast.Covariance.from_moment(accumulator.result().moment))
        memory.commit(memory.solve(normal(24, 3), normal(12, 3))[1])
    accumulator.update(normal(60, 24))
    memory.commit(memory.solve(normal(24, 2, seed=1), normal(12, 2))[1])
    assert not accumulator.finish().moment.is_inference()
    assert memory.count == 5 and not any(t.is_inference() for t in memory.tensors().values())


def test_a_cache_that_cannot_be_added_to_is_refused_before_the_edit():
    from kedit_fast.integrations.alphaedit import apply_AlphaEdit_to_model

    model, tokenizer, statistics = parts()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.inference_mode():
        cache_c = torch.zeros(2, 64, 64)
    with pytest.raises(InvalidArgumentError, match=r"cache_c was made in torch\.inference_mode"):
        apply_AlphaEdit_to_model(model, tokenizer, [], numbers_of("alphaedit"), cache_c=cache_c, statistics=statistics)
    assert_same_bits([parameter.detach() for parameter in model.parameters()], before)


def test_edits_are_taken_back_and_patches_applied_in_inference_mode():
    model, tokenizer, statistics = parts()
    editor = Editor(model, tokenizer, "memit", statistics=statistics, hparams=NUMBERS)
    before = [weight.clone() for weight in editor.modules.values()]
    editor.edit(REQUESTS)
    edited = [weight.clone() for weight in editor.modules.values()]
    with torch.inference_mode():
        patch = editor.patch()
        editor.rollback()
        assert_same_bits(list(editor.modules.values()), before)
        applied = patch.apply_(model)
        assert_same_bits(list(editor.modules.values()), edited)
    applied.revert_()
    assert_same_bits(list(editor.modules.values()), before)
    assert not any(u.left.is_inference() for u in patch.updates.values())
    editor.edit(REQUESTS)
    editor.restore()


def test_a_tensor_of_inference_mode_is_written_there():
    with torch.inference_mode():
        weight = torch.zeros(4, 6)
        LowRankUpdate(torch.ones(4, 1), torch.ones(6, 1)).apply_(weight)
        update = MaskedUpdate.from_mask(LowRankUpdate(torch.ones(4, 1), torch.ones(6, 1)), weight > 0)
        assert float(update.apply_(weight).sum()) == 48.0


@pytest.mark.parametrize("second", ("high", "medium"))
def test_both_interfaces_of_fp32_products_are_put_back(second):
    """Also where both were used, after which torch's own getter raises."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9")
    for places in ((), (whole,), (on_cuda,), (on_cpu,), (on_cuda, on_cpu)):
        with older(precision=second), newer("tf32", *places):
            before = settings()
            with plain_torch():
                assert torch.get_float32_matmul_precision() == "highest"
                assert not {on_cuda().fp32_precision, on_cpu().fp32_precision} & {"tf32", "bf16"}
            assert settings() == before


def test_sums_of_16_bit_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    products = torch.backends.cuda.matmul
    names = [name for name in ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction",
                               "allow_bf16_reduced_precision_reduction") if hasattr(products, name)]  # fmt: skip
    own = {name: getattr(products, name) for name in names}
    for name in names:
        setattr(products, name, not own[name])
    try:
        with plain_torch():
            assert {name: getattr(products, name) for name in names} == own
        assert {name: getattr(products, name) for name in names} == {name: not v for name, v in own.items()}
    finally:
        for name, value in own.items():
            setattr(products, name, value)
