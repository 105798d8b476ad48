"""Edits with shared experts in the stack, and of these alone: against plain hooks and dense systems in fp64."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from floors import relative_error
from support import PREFIXES, REQUESTS, run, same, weights
from test_expert_editing import seen as seen_experts
from tiny_models import TEXT, make_model, make_tokenizer, needs_experts
from transformers import AutoModelForCausalLM

from kedit_fast import Editor, collect_statistics
from kedit_fast.editing.gradients import answer_gradients
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import MethodError, StatisticsError
from kedit_fast.models.forward import Site
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.view import ModelView
from kedit_fast.patches.checkpoint import Checkpoint
from kedit_fast.patches.patch import Patch
from kedit_fast.reports.convergence import convergence
from kedit_fast.reports.harm import patch_harm
from kedit_fast.requests.prompts import prepare
from kedit_fast.statistics import checkpoint
from kedit_fast.statistics.collect import Job
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.store import load_statistics, save_statistics
from kedit_fast.workflow import predicted_harm, run_edits

pytestmark = needs_experts
LAYERS = (1, 2)
SHARED = {"deepseek_v3": "shared_experts", "qwen2_moe": "shared_expert"}
NUMBERS = dict(v_num_grad_steps=6, v_lr=0.1, clamp_norm_factor=0.5, v_weight_decay=0.5, mom2_update_weight=10.0)
NULL_SPACE = {"nullspace_rule": "energy", "nullspace_threshold": 0.3, "L2": 2.0}
METHODS = {"memit": {}, "memit-sequential": {}, "alphaedit": NULL_SPACE}
CASES = [(kind, how) for kind in SHARED for how in ("stack", "alone")]


@functools.cache
def made(kind, how, dtype=torch.float64):
    """A model that nobody may change, its spec, and its statistics, with output metrics."""
    model = make_model(kind, dtype)
    spec = find_spec(model, how)
    return model, spec, collect_statistics(model, make_tokenizer(), TEXT * 2, LAYERS, output_metric=True, spec=spec)


def editor_of(kind, how, method="memit", layers=LAYERS, prefixes=PREFIXES, dtype=torch.float64, **hparams):
    model, spec, statistics = made(kind, how, dtype)
    numbers = {**NUMBERS, **METHODS.get(method, {}), **hparams}
    return Editor(
        copy.deepcopy(model), make_tokenizer(), method, statistics=statistics, layers=layers, hparams=numbers,
        prefixes=prefixes, spec=spec,
    )  # fmt: skip


@torch.no_grad()
def plain(model, kind, how, layer, ids):
    """Keys [T, d] of a layer and outputs [T, h] of its block, of one row of tokens, by plain hooks."""
    block, parts = model.model.layers[layer], {}
    mlp = block.mlp
    handles = [getattr(mlp, SHARED[kind]).down_proj.register_forward_pre_hook(
        lambda module, args: parts.setdefault("inputs", args[0]))]  # fmt: skip
    if kind == "qwen2_moe":
        handles.append(
            mlp.shared_expert_gate.register_forward_hook(lambda module, args, out: parts.setdefault("g", out))
        )
    routed, outputs = seen_experts(model, layer, ids)
    for handle in handles:
        handle.remove()
    shared = parts["inputs"].flatten(0, -2) * (torch.sigmoid(parts["g"].flatten(0, -2)) if "g" in parts else 1.0)
    return (shared if how == "alone" else torch.cat([routed, shared], 1)), outputs


def keys_and_outputs(model, kind, how, layer, prepared, last):
    keys, outputs = [], []
    for request in prepared:
        bare, *others = (plain(model, kind, how, layer, p.ids)[0][p.lookup] for p in request.rewriting)
        keys.append((bare + torch.stack(others).mean(0)) / 2 if others else bare)
        first = request.rewriting[0]
        outputs.append(plain(model, kind, how, last, first.ids)[1][first.lookup])
    return torch.stack(keys, 1), torch.stack(outputs, 1)


def matrix(model, kind, how, layer):
    """The edited matrix [h, d], from the parameters."""
    mlp = model.model.layers[layer].mlp
    shared = getattr(mlp, SHARED[kind]).down_proj.weight.detach()
    return (
        shared if how == "alone" else torch.cat([mlp.experts.down_proj.detach().transpose(0, 1).flatten(1), shared], 1)
    )


@torch.no_grad()
def add(model, kind, how, layer, delta):
    """Add a matrix [h, d] to the parameters."""
    mlp = model.model.layers[layer].mlp
    shared = getattr(mlp, SHARED[kind]).down_proj.weight
    shared.add_(delta[:, -shared.shape[1] :])
    if how == "stack":
        count, _, size = mlp.experts.down_proj.shape
        mlp.experts.down_proj.add_(delta[:, : count * size].unflatten(1, (count, size)).transpose(0, 1))


def blocks_of(kind, how, layer):
    second = made(kind, how)[2].moment(layer)
    return [second.moment] if how == "alone" else [*second.moment, second.shared]


def dense_system(method, numbers, blocks, how, cache, keys):
    """X of Delta = R X^T, of one dense [d, d] system."""
    eye = torch.eye(len(keys), dtype=torch.float64)
    if method == "alphaedit":
        spaces = []
        for block in blocks:
            values, vectors = torch.linalg.eigh(block)
            free = vectors[:, : int((values.cumsum(0) <= numbers.nullspace_threshold * values.sum()).sum())]
            spaces.append(free @ free.T)
        p = torch.block_diag(*spaces)
        return torch.linalg.solve(p @ (keys @ keys.T + cache) + numbers.L2 * eye, p @ keys)
    ridge = 0.0 if how == "alone" else 1e-4 * torch.cat([block.diagonal() for block in blocks]).mean()
    ridge = ridge or numbers.mom2_ridge * blocks[0].diagonal().mean()
    system = numbers.mom2_update_weight * (torch.block_diag(*blocks) + ridge * eye) + cache
    return torch.linalg.solve(system + keys @ keys.T, keys)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("how", ("stack", "alone"))
def test_statistics_are_the_moments_of_plain_keys(kind, how):
    model, _, statistics = made(kind, how)
    for layer in LAYERS:
        keys = torch.cat([plain(model, kind, how, layer, make_tokenizer()(text)["input_ids"])[0] for text in TEXT])
        dense, first = keys.T @ keys / len(keys), 0
        for block in blocks_of(kind, how, layer):
            last = first + len(block)
            assert relative_error(block, dense[first:last, first:last]) < 1e-5  # routers of these models are fp32
            first = last
        assert first == len(dense)
        if how == "alone":  # the key has the gate, so the metric is of what the MLP puts out, as that of the stack is
            assert relative_error(statistics.output_metric(layer), made(kind, "stack")[2].output_metric(layer)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "how", "method"),
    (
        ("deepseek_v3", "stack", "memit-sequential"),
        ("qwen2_moe", "stack", "alphaedit"),
        ("qwen2_moe", "alone", "memit-sequential"),
    ),
)
def test_batches_are_the_dense_solve_layer_by_layer(kind, how, method):
    editor = editor_of(kind, how, method)
    other, numbers, spec = copy.deepcopy(made(kind, how)[0]), editor.hparams, made(kind, how)[1]
    caches = dict.fromkeys(LAYERS, 0.0)
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        prepared = prepare(editor.tokenizer, batch, PREFIXES, 128)
        targets = find_values(ModelView(other, spec), prepared, LAYERS[-1], "block", numbers).targets
        editor.edit(batch)
        for i, layer in enumerate(LAYERS):
            measured = KeyPass(ModelView(other, spec), prepared, Site(LAYERS[-1], "block"), "bare_half").at(layer)
            expected = keys_and_outputs(other, kind, how, layer, prepared, LAYERS[-1])
            for mine, by_hooks in zip((measured.keys, measured.outputs), expected, strict=True):
                assert relative_error(mine, by_hooks) < 1e-6
            delta = (targets - measured.outputs) / (len(LAYERS) - i)
            blocks = blocks_of(kind, how, layer)
            delta = delta @ dense_system(method, numbers, blocks, how, caches[layer], measured.keys).T
            if editor.recipe.memory:
                caches[layer] = caches[layer] + measured.keys @ measured.keys.T
            before = matrix(other, kind, how, layer).clone()
            add(other, kind, how, layer, delta)
            assert delta.norm() > 1e-3 * before.norm()
            gap = matrix(editor.view.model, kind, how, layer) - matrix(other, kind, how, layer)
            assert gap.norm() < 1e-5 * delta.norm()  # the values, whose sums are in another order, agree so far


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "how"), CASES[:2] + CASES[3:])
def test_a_system_with_shared_experts_is_one_dense_system(kind, how, method):
    state = editor_of(kind, how, method).solver_state
    torch.manual_seed(0)
    size, blocks = state.view.edited_shape(1)[1], blocks_of(kind, how, 1)
    keys, residuals = torch.randn(size, 4, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    if how == "stack":
        keys[: 2 * len(blocks[0]), 1:3] = 0.0  # experts that these tokens do not choose
    update = state.solve_batch(1, keys, residuals)
    expected = residuals @ dense_system(method, state.hparams, blocks, how, 0.0, keys).T
    assert relative_error(update.dense(), expected) < 1e-9


@torch.no_grad()
def outputs_of(model, module, prepared):
    """What a module puts out at the lookup tokens of the bare prompts, [h, u]."""
    outputs = []
    handle = module.register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    for request in prepared:
        model(torch.tensor([list(request.rewriting[0].ids)]))
        outputs[-1] = outputs[-1].flatten(0, -2)[request.rewriting[0].lookup]
    handle.remove()
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("kind", "how", "method"), [(*case, "memit") for case in CASES] + [(*CASES[2], "rome")])
def test_an_edit_of_one_layer_makes_the_block_put_out_the_value(kind, how, method):
    """rho towards 0, and no prefixes: the router of an edited layer sees what it saw before."""
    numbers = {"mom2_update_weight": 1e-9} if method == "memit" else {}
    editor = editor_of(kind, how, method, layers=(1,), prefixes=(), **numbers)
    requests = REQUESTS if method == "memit" else REQUESTS[:1]
    prepared, rule = prepare(editor.tokenizer, requests, (), 128), editor.recipe.stop_rule
    targets = find_values(editor.view, prepared, 1, editor.value_sites, editor.hparams, stop_rule=rule).targets
    block = editor.view.model.model.layers[1]
    where = block if editor.value_sites == "block" else block.mlp
    before = outputs_of(editor.view.model, where, prepared)
    assert editor.edit(requests).residual < 1e-6
    after = outputs_of(editor.view.model, where, prepared)
    assert relative_error(before, targets) > 1e-2 and relative_error(after, targets) < 1e-6


@pytest.mark.parametrize(
    ("kind", "how", "method"),
    (("deepseek_v3", "stack", "memit-sequential"), ("qwen2_moe", "stack", "rect"), ("qwen2_moe", "alone", "memit")),
)
def test_batches_are_undone_to_the_bit(kind, how, method):
    editor = editor_of(kind, how, method)
    before = weights(editor)
    first = editor.edit(REQUESTS[:2])
    once = weights(editor)
    changed = {name for name in before if not torch.equal(before[name], once[name])}
    expected = {f"model.layers.{layer}.mlp.{SHARED[kind]}.down_proj.weight" for layer in LAYERS}
    if how == "stack":
        expected |= {f"model.layers.{layer}.mlp.experts.down_proj" for layer in LAYERS}
    assert changed == expected == set(first.updates) == set(first.relative_norms)
    editor.edit(REQUESTS[2:])
    twice = weights(editor)
    editor.rollback()
    assert same(editor, once)
    editor.edit(REQUESTS[2:])
    assert same(editor, twice)
    editor.restore()
    assert same(editor, before)


@pytest.mark.parametrize(("kind", "how"), [("deepseek_v3", "stack"), ("qwen2_moe", "stack"), ("qwen2_moe", "alone")])
def test_a_patch_goes_through_a_file_into_a_copy_and_into_a_checkpoint(kind, how, tmp_path):
    folder = tmp_path / "model"
    make_model(kind).save_pretrained(folder)
    editor = editor_of(kind, how, dtype=torch.float32)
    editor.edit(REQUESTS)
    editor.patch().save(tmp_path / "facts.safetensors")
    patch, copied = Patch.load(tmp_path / "facts.safetensors"), make_model(kind)
    before = {name: tensor.clone() for name, tensor in copied.state_dict().items()}
    applied = patch.apply_(copied)
    assert same(editor, dict(copied.state_dict()))
    applied.revert_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    on_disk = Checkpoint(folder)
    on_disk.apply(patch, "facts")
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(stored.state_dict()[name], tensor) for name, tensor in weights(editor).items())
    on_disk.revert()
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.state_dict().items())


def test_statistics_say_whether_shared_experts_are_in_the_stack(tmp_path):
    kind = "qwen2_moe"
    model, spec, statistics = made(kind, "stack")
    save_statistics(statistics, tmp_path)
    loaded = load_statistics(tmp_path, model, make_tokenizer(), LAYERS, spec=spec)
    for layer in LAYERS:
        assert torch.equal(loaded.moment(layer).shared, statistics.moment(layer).shared)
    with pytest.raises(StatisticsError, match="leaves shared experts as they are"):
        load_statistics(tmp_path, model, make_tokenizer(), LAYERS)
    left = collect_statistics(model, make_tokenizer(), TEXT, LAYERS)
    for other, how, says in ((left, spec, "no second moment of shared experts"), (statistics, None, "leaves shared")):
        with pytest.raises(StatisticsError, match=says):
            Editor(model, make_tokenizer(), "memit", statistics=other, layers=LAYERS, spec=how)
    with pytest.raises(StatisticsError, match="no statistics file"):
        load_statistics(tmp_path, model, make_tokenizer(), LAYERS, spec=find_spec(model, "alone"))
    editor = editor_of(kind, "stack")
    editor.edit(REQUESTS[:1])
    harm = predicted_harm(editor, statistics)
    expected = 0.0
    for layer in LAYERS:
        delta = matrix(editor.view.model, kind, "stack", layer) - matrix(model, kind, "stack", layer)
        total = torch.block_diag(*blocks_of(kind, "stack", layer))
        expected += 0.5 * float((delta @ total @ delta.T * statistics.output_metric(layer)).sum())
    assert harm.predicted_kl == pytest.approx(expected, rel=1e-6)
    assert patch_harm(editor.patch(), tmp_path).predicted_kl == pytest.approx(expected, rel=1e-6)


def test_limits_and_shapings_are_of_the_whole_stacked_matrix():
    kind = "qwen2_moe"
    before = matrix(made(kind, "stack")[0], kind, "stack", 1)
    free = editor_of(kind, "stack", layers=(1,))
    free.edit(REQUESTS)
    whole = matrix(free.view.model, kind, "stack", 1) - before

    def change(method="memit", **hparams):
        editor = editor_of(kind, "stack", method, layers=(1,), **hparams)
        editor.edit(REQUESTS)
        return editor, matrix(editor.view.model, kind, "stack", 1) - before

    _, small = change(frobenius_limit=1e-3)
    assert relative_error(small, whole * (1e-3 * before.norm() / whole.norm())) < 1e-9
    _, clipped = change(spectral_limit=1e-3)
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    assert relative_error(clipped, (u * s.clamp(max=1e-3 * torch.linalg.svdvals(before)[0])) @ vh) < 1e-8
    editor, masked = change("rect")
    relative = (whole / (before + 1e-8)).abs()
    written = masked != 0
    assert int(written.sum()) == pytest.approx(editor.hparams.rect_keep * whole.numel(), abs=2)
    assert float(relative[written].min()) >= float(relative[~written].max())
    assert torch.allclose(masked[written], whole[written], atol=1e-12)
    editor, _ = change("prune", mom2_update_weight=1e-6, clamp_norm_factor=8.0, v_lr=4.0)
    total = matrix(editor.view.model, kind, "stack", 1) - before
    largest = torch.linalg.svdvals(before)[0]
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    assert s[0] > largest
    restrained = editor.finish()
    assert len(restrained) == 2 and all(restrained.values())
    expected = (u * torch.where(s > largest, (s / largest).log() + largest, s)) @ vh
    assert relative_error(matrix(editor.view.model, kind, "stack", 1) - before, expected) < 1e-9
    editor.rollback()
    assert relative_error(matrix(editor.view.model, kind, "stack", 1) - before, total) < 1e-12


@pytest.mark.parametrize("how", ("stack", "alone"))
def test_a_report_has_the_routing_above_the_edited_layer(how):
    model, spec, statistics = made("deepseek_v3", how)
    report = run_edits(
        copy.deepcopy(model), make_tokenizer(), REQUESTS, "memit", statistics=statistics, spec=spec,
        hparams={**NUMBERS, "layers": (1,)}, irrelevant=TEXT,
    )  # fmt: skip
    assert [set(shift.changed) for shift in report.routing] == [{2, 3}]  # the layers above, all of which have experts


@pytest.mark.parametrize("kind", SHARED)
def test_gradient_methods_take_shared_experts_alone(kind):
    """Also where a mixture gives them the tokens of all rows as one list: keys and gradients against torch's own."""
    model, spec, _ = made(kind, "alone")
    editor = Editor(copy.deepcopy(model), make_tokenizer(), "ultraedit", layers=(1,), spec=spec)
    (path,) = editor.modules
    prepared = prepare(editor.tokenizer, REQUESTS[:1], (), 128)
    gathered = answer_gradients(editor.view, prepared, [path], "all")
    other, ids = copy.deepcopy(model), [*prepared[0].rewriting[0].ids, *prepared[0].target[:-1]]
    logits = other(torch.tensor([ids])).logits[0, len(prepared[0].rewriting[0].ids) - 1 :].log_softmax(1)
    loss = -sum(logits[i, token] for i, token in enumerate(prepared[0].target)) / len(prepared[0].target)
    (expected,) = torch.autograd.grad(loss, other.get_submodule(path).weight)
    rows = gathered.modules[path]
    assert relative_error(rows.gradients.double().T @ rows.keys.double(), expected) < 1e-4
    before = weights(editor)
    assert set(editor.edit(REQUESTS).updates) == {f"{path}.weight"} and not same(editor, before)


def test_a_checkpoint_of_a_collection_has_the_shared_block(tmp_path):
    model, spec, statistics = made("qwen2_moe", "stack")
    job = Job(model, make_tokenizer(), Corpus(TEXT * 2), LAYERS, spec=spec)
    (group,) = job.plan(LAYERS, "device")
    first, second = job.accumulators(group), job.accumulators(group)
    end = job.run(first)
    checkpoint.save(tmp_path, checkpoint.Progress(LAYERS, end, {}), first)
    checkpoint.restore(tmp_path, second)
    for layer, moment in job.finish(second):
        assert torch.equal(moment.shared, statistics.moment(layer).shared)
    on_host = collect_statistics(model, make_tokenizer(), TEXT * 2, LAYERS, masters="cpu", spec=spec)
    assert torch.equal(on_host.moment(1).shared, statistics.moment(1).shared)


def test_convergence_names_what_it_does_not_take():
    model, spec, _ = made("qwen2_moe", "stack")
    with pytest.raises(MethodError, match="leave out `shared`"):
        convergence(model, make_tokenizer(), Corpus(TEXT), REQUESTS, "memit", layers=LAYERS, spec=spec)


def test_commands_take_the_same_spec(tmp_path):
    kind, folder, stats = "deepseek_v3", tmp_path / "model", tmp_path / "stats"
    make_model(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (tmp_path / "texts.txt").write_text("\n".join(TEXT))
    (tmp_path / "requests.jsonl").write_text(
        json.dumps({"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"})
    )
    printed = run("spec", folder, "--shared-experts", "stack")
    assert printed.returncode == 0 and "mlp.experts and mlp.shared_experts.down_proj [32 x 216]" in printed.stderr
    (tmp_path / "spec.json").write_text(printed.stdout)
    same_spec = ("--spec", tmp_path / "spec.json")
    alone = run("spec", folder, "--shared-experts", "alone")
    assert json.loads(alone.stdout)["edit"] == "mlp.shared_experts.down_proj"
    both = run("spec", folder, "--shared-experts", "alone", "--spec", tmp_path / "spec.json")
    assert both.returncode != 0 and "give one of them" in both.stderr
    collected = run("stats", folder, "--text", tmp_path / "texts.txt", "--layers", "1", "--out", stats, *same_spec)
    assert collected.returncode == 0, collected.stderr
    edit = ("edit", folder, "--requests", tmp_path / "requests.jsonl", "--stats", stats, "--layers", "1",
            "--set", "v_num_grad_steps=2")  # fmt: skip
    edited = run(*edit, "--patch", tmp_path / "facts.safetensors", *same_spec)
    assert edited.returncode == 0, edited.stderr
    patch = Patch.load(tmp_path / "facts.safetensors")
    assert set(patch.updates) == {f"model.layers.1.mlp.{name}.down_proj" for name in ("experts", "shared_experts")}
    other = run(*edit, "--patch", tmp_path / "other.safetensors")
    assert other.returncode != 0 and "leaves shared experts as they are" in other.stderr
    resumed = run("stats", folder, "--text", tmp_path / "texts.txt", "--layers", "1", "--out", stats, "--resume")
    assert resumed.returncode != 0 and "shared experts" in resumed.stderr
