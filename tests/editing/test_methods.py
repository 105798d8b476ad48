"""Every recipe through the editor against the published formulas, transcribed densely; states, limits, bad input."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from floors import relative_error
from support import PREFIXES, REQUESTS, make_editor, same, weights
from tiny_models import POST_NORM, TEXT, make_model, make_tokenizer

from benchmarks.published import serial_gradients
from kedit_fast import Editor, EditRequest, collect_statistics
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import EditError, KeditError, MethodError, SolveError, StatisticsError
from kedit_fast.evaluation.metrics import mean_nll, shares
from kedit_fast.methods.hparams import unused
from kedit_fast.methods.presets import load_presets, make_hparams
from kedit_fast.methods.registry import RECIPES, find_recipe
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare
from kedit_fast.solver.low_rank import LowRankUpdate, MaskedUpdate

SEQUENCES = ("memit-sequential", "encore", "alphaedit")
NULL_SPACE = {"nullspace_rule": "energy", "nullspace_threshold": 0.3, "L2": 2.0}
NUMBERS = {
    "memit": {}, "memit-merge": {}, "rect": {}, "prune": {}, "memit-sequential": {},
    "encore": {"update_norm_lambda": 3.0, "most_probable_steps": 2}, "emmet": {"emmet_lambda": 0.3},
    "alphaedit": NULL_SPACE, "pmet": {}, "rlsedit": {"update_norm_lambda": 3.0},
    "nas": {**NULL_SPACE, "norm_anchor": 4.0},
    "sphere": {"nullspace_rule": "energy", "nullspace_threshold": 0.3, "L2": 2.0, "sphere_energy": 0.3},
    "anyedit": {"chunk_tokens": 2, "mom2_ridge": 1e-3}, "anyedit-alphaedit": {"nullspace_threshold": 0.3, "L2": 2.0},
    "r-rome": {}, "rome": {}, "ultraedit": {"lr": 1e-2, "token": "ans"}, "stableedit": {"lr": 1e-2, "token": "ans"},
}  # fmt: skip
MASS = tuple(name for name, recipe in RECIPES.items() if recipe.schedule == "mass" and not recipe.needs_chunks)


def editor_of(method, kind="llama", dtype=torch.float32, **numbers):
    recipe = find_recipe(method)
    numbers = {**({"mom2_update_weight": 10.0} if recipe.is_batched else {}), **NUMBERS[method], **numbers}
    numbers = {"layers": (0, 1) if recipe.is_batched else (1,), **numbers}
    return make_editor(kind, method, dtype, **numbers)


def dense_system(recipe, numbers, moment, cache, keys):
    """What the published code solves for a layer: X with Delta = R X^T."""
    d = moment.shape[0]
    eye = torch.eye(d, dtype=torch.float64)
    moment = moment.double() + numbers.mom2_ridge * moment.diagonal().mean() * eye
    if recipe.uses_null_space:
        values, vectors = torch.linalg.eigh(moment - numbers.mom2_ridge * 0)
        count = int((values.cumsum(0) <= numbers.nullspace_threshold * values.sum()).sum())
        p = vectors[:, :count] @ vectors[:, :count].T
        return torch.linalg.solve(p @ (keys @ keys.T + cache) + numbers.L2 * eye, p @ keys)
    if recipe.softens_equality:
        inverse = torch.linalg.inv(numbers.mom2_update_weight * moment)
        small = keys.T @ inverse @ keys + numbers.emmet_lambda * torch.eye(keys.shape[1], dtype=torch.float64)
        return (torch.linalg.inv(small) @ keys.T @ inverse).T
    system = numbers.mom2_update_weight * moment + numbers.update_norm_lambda * eye + cache
    return torch.linalg.solve(system + keys @ keys.T, keys)


def attenuation(weight, numbers):
    """I - alpha U U^T of SPHERE, from the d x d Gram matrix."""
    rows = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    rank = int((values.flip(0).cumsum(0) / values.sum() <= numbers.sphere_energy).sum()) + 1
    main = vectors[:, -rank:]
    assert 1 < rank < 20
    return torch.eye(len(main), dtype=main.dtype) - numbers.sphere_strength * main @ main.T


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((m, "llama") for m in MASS if m != "prune"),
        ("sphere", "gpt2"),  # weights stored transposed
        *((m, "gpt_neox") for m in ("memit-sequential", "pmet", "alphaedit")),  # attention and MLP side by side
        *((m, "gemma2") for m in ("memit-sequential", "pmet", "alphaedit")),  # a norm after the MLP: another site
    ],
)
def test_mass_methods_are_the_published_ones_batch_after_batch(method, kind):
    """Three batches on an fp64 model, layer by layer, against dense solves with a cache of earlier keys."""
    numbers = {"mom2_ridge": 0.0} if method in ("alphaedit", "nas") else {}
    editor = editor_of(method, kind, torch.float64, **numbers)
    recipe, numbers = editor.recipe, editor.hparams
    other = ModelView(make_model(kind, torch.float64))
    caches = {layer: torch.zeros(64, 64, dtype=torch.float64) for layer in numbers.layers}
    sites = "mlp" if kind in POST_NORM and recipe.values == "block" else recipe.values
    site = Site(1, "mlp" if sites != "block" else "block")
    for batch in (REQUESTS[:2], REQUESTS[2:], [EditRequest("{} is in", "Ebro", "Sweden")]):
        prepared = prepare(editor.tokenizer, batch, PREFIXES, 128)
        targets = find_values(other, prepared, 1, sites, numbers).targets
        if method == "nas":
            block, mlp = (KeyPass(other, prepared, Site(1, kind), "mean").outputs() for kind in ("block", "mlp"))
            asked = targets - block + mlp
            targets = block - mlp + numbers.norm_anchor * asked / asked.norm(dim=0)
        result = editor.edit(batch)
        before = {layer: other.weight(layer).clone() for layer in numbers.layers}
        for i, layer in enumerate(numbers.layers):
            seen = KeyPass(other, prepared, site, "bare_half").at(layer)
            left = len(numbers.layers) - i
            residual = (targets - seen.outputs) / (left**0.5 if method == "pmet" else left)
            x = dense_system(recipe, numbers, editor.statistics.moment(layer).moment, caches[layer], seen.keys)
            delta = residual @ x.T
            if numbers.sphere_strength:
                delta = delta @ attenuation(other.weight(layer), numbers)
            if recipe.memory:
                caches[layer] += seen.keys @ seen.keys.T
            other.weight(layer).add_(delta)
        for layer, weight in before.items():
            if method == "rect":  # after all layers were solved with whole updates written
                delta = other.weight(layer) - weight
                change = (delta / (weight + 1e-8)).abs()
                bound = change.flatten().sort().values[int(change.numel() * 0.6) - 1]
                other.weight(layer).copy_(weight + torch.where(change >= bound, delta, 0.0))
                assert isinstance(result.updates[editor.view.weight_name(layer)][0], MaskedUpdate)
            # of the same values after rounding to fp32 the last bits differ; an anchor scales that up batch by batch
            assert relative_error(editor.view.weight(layer), other.weight(layer)) < (1e-6 if method == "nas" else 1e-8)
        outputs = KeyPass(other, prepared, site, "bare_half").at(1).outputs
        assert outputs.shape == targets.shape and 0 < result.residual < 1.5


@pytest.mark.parametrize("method", SEQUENCES)
def test_memories_matter_and_both_forms_agree(method):
    auto, dual, primal, forgetful = (editor_of(method, memory_form=form) for form in ("auto", "dual", "primal", "auto"))
    for batch in (REQUESTS[:1], REQUESTS[1:2], REQUESTS[2:]):
        for editor in (auto, dual, primal, forgetful):
            forgetful.solver_state.memories.clear()
            editor.edit(batch)
    for layer in (0, 1):
        moved = dual.view.weight(layer) - ModelView(make_model("llama")).weight(layer)
        scale = float(moved.norm())
        for editor in (auto, primal):
            assert float((editor.view.weight(layer) - dual.view.weight(layer)).norm()) < 1e-4 * scale
        assert float((forgetful.view.weight(layer) - dual.view.weight(layer)).norm()) > 1e-3 * scale


def test_r_rome_makes_the_mean_key_put_out_the_value():
    editor = editor_of("r-rome", dtype=torch.float64)
    prepared = prepare(editor.tokenizer, REQUESTS[:1], PREFIXES, 128)
    site = Site(1, "mlp")
    value = find_values(editor.view, prepared, 1, "mlp", editor.hparams).targets[:, 0]
    key = KeyPass(editor.view, prepared, site, "mean").at(1).keys[:, 0]
    weight, d = editor.view.weight(1).clone(), 64
    moment = editor.statistics.moment(1).moment
    g = torch.linalg.solve(moment + 1e-3 * moment.diagonal().mean() * torch.eye(d, dtype=torch.float64), key)
    result = editor.edit(REQUESTS[:1])
    assert relative_error(editor.view.weight(1) @ key, value) < 1e-9 and result.residual < 1e-9
    expected = torch.outer(value - weight @ key, g) / (key @ g)
    assert relative_error(editor.view.weight(1) - weight, expected) < 1e-6


@pytest.mark.parametrize("token", ("ans", "mask"))
@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_ultraedit_is_the_published_turn(kind, token):
    """Two turns: gradients one request at a time, a normalizer for all modules of one shape, a dense d x d solve."""
    names = {"llama": ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"),
             "gpt2": ("transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj")}[kind]  # fmt: skip
    editor = editor_of("ultraedit", kind, inner_params=names, layers=(), token=token)
    model = make_model(kind)
    other = ModelView(model)
    seen: dict[tuple, tuple] = {}
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        prepared = prepare(editor.tokenizer, batch, (), 128)
        modules = [other.linear(name)[0] for name in names]
        found = [serial_gradients(model, modules, request, every_token=token == "mask") for request in prepared]
        rows = {}
        for m, name in enumerate(names):
            keys = torch.cat([keys[m] for keys, _ in found]).double()
            rows[name] = keys, torch.cat([gradients[m] for _, gradients in found]).double()
            both = torch.cat(rows[name], 1)
            shape = (rows[name][0].shape[1], rows[name][1].shape[1])
            n, mean, var = seen.get(
                shape, (0, torch.zeros(both.shape[1]).double(), torch.zeros(both.shape[1]).double())
            )
            total, gap = n + len(both), both.mean(0) - mean
            var = var + len(both) * both.var(0) + n * len(both) * gap**2 / total
            seen[shape] = total, mean + len(both) * gap / total, var
        editor.edit(batch)
        for name in names:
            keys, gradients = rows[name]
            n, mean, var = seen[keys.shape[1], gradients.shape[1]]
            z = (torch.cat([keys, gradients], 1) - mean) / (var / (n - 1)).sqrt()
            h, g = z[:, : keys.shape[1]], z[:, keys.shape[1] :]
            values = -1e-2 * h.square().sum(1, keepdim=True) * g
            eye = torch.eye(keys.shape[1], dtype=torch.float64)
            delta = torch.linalg.solve(keys.T @ keys + eye, keys.T @ values).T
            mine, theirs = editor.modules[name], other.linear(name)[1]
            before = theirs.clone()
            theirs += delta.float()
            assert relative_error(mine - before, delta) < 1e-3
        if token == "mask":
            return  # one turn: the second starts from weights that differ by the rounding of the first


def test_prune_restrains_the_total_and_can_be_taken_back():
    editor = editor_of("prune", clamp_norm_factor=20.0, v_lr=2.0, mom2_update_weight=1e-3)
    originals = {layer: editor.view.weight(layer).clone() for layer in (0, 1)}
    assert editor.finish() == {}
    editor.edit(REQUESTS[:2])
    editor.edit(REQUESTS[2:])
    before = weights(editor)
    totals = {layer: (editor.view.weight(layer) - originals[layer]).double() for layer in (0, 1)}
    restrained = editor.finish()
    assert any(restrained.values()) and len(editor.ledger.batches) == 3
    for layer in (0, 1):
        u, s, vh = torch.linalg.svd(totals[layer], full_matrices=False)
        largest = float(torch.linalg.matrix_norm(originals[layer].double(), 2))
        s = torch.where(s > largest, s.log() - torch.tensor(largest).log() + largest, s)
        expected = originals[layer].double() + (u * s) @ vh
        assert relative_error(editor.view.weight(layer), expected) < 1e-5
    once = weights(editor)
    assert editor.finish() == {} and same(editor, once)  # it is done
    editor.rollback()
    assert same(editor, before)
    editor.finish()
    editor.edit([EditRequest("{} is in", "Ebro", "Sweden")])
    editor.finish()  # of all edits, not of what was restrained before
    for layer in (0, 1):
        edits = editor.ledger.total(editor.view.weight_name(layer), without={3, 5}).dense().double()
        u, s, vh = torch.linalg.svd(edits, full_matrices=False)
        largest = float(torch.linalg.matrix_norm(originals[layer].double(), 2))
        s = torch.where(s > largest, s.log() - torch.tensor(largest).log() + largest, s)
        expected = originals[layer].double() + (u * s) @ vh
        assert relative_error(editor.view.weight(layer), expected) < 1e-5
    assert editor.solver_state.batches == len(editor.ledger.batches) == 5
    editor.rollback(2)
    assert same(editor, once)
    editor.restore()
    assert all(torch.equal(editor.view.weight(layer), originals[layer]) for layer in (0, 1))


def merged_value(model, block, requests, numbers):
    """MEMIT-Merge's loop, transcribed: one delta for all requests on a subject, every prompt alone, plain autograd."""
    delta, h0, reference = None, None, None
    optimizer, history = None, []
    for iteration in range(numbers.v_num_grad_steps):
        nll, kl = [], None
        for r, request in enumerate(requests):
            for c, prompt in enumerate([*request.rewriting, request.kl]):
                scored = c < len(request.rewriting)
                ids = torch.tensor([[*prompt.ids, *(request.target[:-1] if scored else ())]])

                def hook(module, args, output, at=prompt.lookup, first=r == 0 and c == 0):
                    nonlocal delta, h0, optimizer
                    hidden = (output[0] if isinstance(output, tuple) else output).clone()
                    if h0 is None:
                        h0 = hidden[0, at].detach().clone()
                        delta = torch.zeros_like(h0, requires_grad=True)
                        optimizer = torch.optim.Adam([delta], lr=numbers.v_lr)
                    hidden[0, at] = hidden[0, at] + delta
                    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

                handle = block.register_forward_hook(hook)
                logits = model(ids, use_cache=False).logits[0]
                handle.remove()
                if scored:
                    begin = len(prompt.ids) - 1
                    found = torch.log_softmax(logits[begin : begin + len(request.target)], -1)
                    nll.append(-found.gather(1, torch.tensor(request.target)[:, None]).mean())
                elif kl is None:
                    current = torch.log_softmax(logits[prompt.lookup], -1)
                    reference = current.detach() if reference is None else reference
                    kl = torch.nn.functional.kl_div(reference, current, log_target=True, reduction="sum")
        decay = numbers.v_weight_decay * delta.norm() / h0.norm() ** 2
        loss = torch.stack(nll).mean() + numbers.kl_factor * kl + decay
        history.append(float(loss.detach()))
        if loss < numbers.v_stop_loss or iteration == numbers.v_num_grad_steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            limit = numbers.clamp_norm_factor * h0.norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    return delta.detach(), history[-1]


SHARED = [
    EditRequest("{} plays the", "Miles Davis", "violin"),
    EditRequest("{} is located in", "Ebro", "Sweden"),
    EditRequest("{} speaks", "Miles Davis", "English very well"),
    EditRequest("{} saw", "Miles Davis", "you"),
]


@pytest.mark.parametrize("size", (1, 2, 0))
@pytest.mark.parametrize("every", (1, 3))
def test_requests_on_one_subject_share_the_published_joint_value(size, every):
    tokenizer, model = make_tokenizer(), make_model("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    view = ModelView(model)
    numbers, _ = make_hparams("memit-merge", model.config, {
        "layers": (1,), "v_num_grad_steps": 8, "v_lr": 0.1, "clamp_norm_factor": 0.6, "values_batch": size,
        "check_every": every, "kl_factor": 0.1, "v_weight_decay": 0.5,
    })  # fmt: skip
    prepared = prepare(tokenizer, SHARED, PREFIXES, 128)
    groups = [request.subject for request in SHARED]
    found = find_values(view, prepared, 1, "block", numbers, groups=groups)
    members = [i for i, name in enumerate(groups) if name == "Miles Davis"]
    delta, loss = merged_value(model, view.block(1), [prepared[i] for i in members], numbers)
    for i in members:
        assert relative_error(found.deltas[:, i], delta) < 1e-4
        assert torch.equal(found.deltas[:, i], found.deltas[:, members[0]])
        assert abs(float(found.losses[i]) - loss) < 1e-4
    alone = find_values(view, [prepared[1]], 1, "block", numbers)
    assert relative_error(found.deltas[:, 1], alone.deltas[:, 0]) < 1e-4


def test_memit_merge_writes_one_column_a_subject():
    editor, plain = editor_of("memit-merge"), editor_of("memit")
    result = editor.edit(SHARED)
    assert all(update.rank == 2 for updates in result.updates.values() for update in updates)
    assert {(0, 2), (0, 3), (2, 3)} <= set(result.collisions)  # reported all the same
    assert plain.edit(SHARED).updates[plain.view.weight_name(0)][0].rank == 4


def test_a_heavier_request_is_written_more_closely():
    light, heavy = editor_of("memit"), editor_of("memit")
    gaps = []
    for editor, weight in ((light, 1.0), (heavy, 100.0)):
        batch = [replace(REQUESTS[0], weight=weight), *REQUESTS[1:]]
        (prepared, *_), _ = editor.check(batch)
        value = find_values(editor.view, [prepared], 1, "block", editor.hparams).targets
        editor.edit(batch)
        gaps.append(
            float((KeyPass(editor.view, [prepared], Site(1, "block"), "bare_half").at(1).outputs - value).norm())
        )
    assert gaps[1] < 0.9 * gaps[0]
    with pytest.raises(MethodError, match="gives requests no weights"):
        editor_of("rome").edit([replace(REQUESTS[0], weight=2.0)])


@pytest.mark.parametrize("limit", ("frobenius_limit", "spectral_limit"))
def test_limits_hold_and_leave_small_updates_alone(limit):
    free, loose, tight = editor_of("memit"), editor_of("memit", **{limit: 1e6}), editor_of("memit", **{limit: 1e-3})
    results = [editor.edit(REQUESTS) for editor in (free, loose, tight)]
    assert same(free, weights(loose))
    for name, (update,) in results[2].updates.items():
        before = make_model("llama").state_dict()[name].double()
        order = "fro" if limit == "frobenius_limit" else 2
        size = float(torch.linalg.matrix_norm(update.dense(), order) / torch.linalg.matrix_norm(before, order))
        assert abs(size - 1e-3) < 1e-9


@pytest.mark.parametrize("method", [*SEQUENCES, "ultraedit"])
def test_a_saved_state_gives_the_same_next_updates(tmp_path, method):
    """Another editor, on a copy of the edited model, goes on where the first one stopped."""
    editor = editor_of(method)
    editor.edit(REQUESTS[:2])
    editor.save_state(tmp_path / "state.safetensors")
    other = editor_of(method)
    other.view.model.load_state_dict(editor.view.model.state_dict())
    other.load_state(tmp_path / "state.safetensors")
    before = weights(editor)
    for one in (editor, other):
        one.edit(REQUESTS[2:])
    assert same(editor, weights(other)) and not same(editor, before)
    other.rollback()
    assert same(other, before)
    fresh = editor_of(method)
    fresh.view.model.load_state_dict(before)
    fresh.edit(REQUESTS[2:])
    assert not same(fresh, weights(editor)), "the state should matter"


def test_states_of_other_runs_are_refused_by_what_differs(tmp_path):
    path = tmp_path / "state.safetensors"
    editor = editor_of("alphaedit")
    editor.edit(REQUESTS[:1])
    editor.save_state(path)

    def refused(match, other, error=StatisticsError):
        other.view.model.load_state_dict(editor.view.model.state_dict())
        before = weights(other)
        with pytest.raises(error, match=match):
            other.load_state(path)
        assert same(other, before) and not other.solver_state.memories

    refused("different method: alphaedit there, encore here", editor_of("encore"))
    refused(r"different L2: 2\.0 there, 3\.0 here", editor_of("alphaedit", L2=3.0))
    refused("different layers", editor_of("alphaedit", layers=(0,)))
    unedited = editor_of("alphaedit")
    with pytest.raises(StatisticsError, match="different edited matrices"):
        unedited.load_state(path)
    edited = editor_of("alphaedit")
    edited.edit(REQUESTS[1:2])
    with pytest.raises(EditError, match="before the first edit"):
        edited.load_state(path)
    stranger = editor_of("alphaedit", "qwen2")
    with pytest.raises(StatisticsError, match="different model"):
        stranger.load_state(path)
    statistics = collect_statistics(editor.view.model, editor.tokenizer, TEXT[:2] * 9, (0, 1), progress=False)
    texts = Editor(editor_of("alphaedit").view.model, editor.tokenizer, "alphaedit", statistics=statistics,
                   hparams={**editor.hparams.__dict__}, prefixes=PREFIXES)  # fmt: skip
    refused("other statistics|dimension", texts)
    path.write_bytes(b"nothing of ours")
    with pytest.raises(StatisticsError, match="cannot read"):
        editor_of("alphaedit").load_state(path)
    with pytest.raises(StatisticsError, match="cannot write"):
        editor.save_state(tmp_path / "nowhere" / "state.safetensors")


@pytest.mark.parametrize("method", [*SEQUENCES, "ultraedit"])
def test_rollback_takes_the_memory_back_too(method):
    editor, fresh = editor_of(method), editor_of(method)
    for batch in (REQUESTS[:1], REQUESTS[1:2], REQUESTS[2:]):
        editor.edit(batch)
    editor.rollback(2)
    fresh.edit(REQUESTS[:1])
    for one in (editor, fresh):
        one.edit(REQUESTS[2:])
    assert same(editor, weights(fresh))
    editor.restore()
    assert (
        all(memory.count == 0 for memory in editor.solver_state.memories.values())
        and not editor.solver_state.normalizers
    )
    editor.edit(REQUESTS[:1])


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize("method", [*SEQUENCES, "ultraedit"])
def test_a_failure_leaves_model_ledger_and_memory_as_they_were(monkeypatch, method, error):
    editor, other = editor_of(method), editor_of(method)
    editor.edit(REQUESTS[:1])
    before, real = weights(editor), editor.ledger.write
    last = f"{list(editor.modules)[-1]}.weight"

    def failing(name, weight, update):
        real(name, weight, update)
        if name == last:
            raise error("injected")

    monkeypatch.setattr(editor.ledger, "write", failing)
    with pytest.raises(error):
        editor.edit(REQUESTS[1:2])
    monkeypatch.setattr(editor.ledger, "write", real)
    assert same(editor, before) and len(editor.ledger.batches) == 1
    for batch in (REQUESTS[:1], REQUESTS[2:]):
        other.edit(batch)
    editor.edit(REQUESTS[2:])
    assert same(editor, weights(other))


def test_a_failure_while_the_memory_is_kept_takes_everything_back(monkeypatch):
    editor = editor_of("alphaedit")
    editor.edit(REQUESTS[:1])
    before, count = weights(editor), editor.solver_state.memories[0].count
    second = editor.solver_state.memories[1]

    def failing(appended):
        raise MemoryError

    monkeypatch.setattr(second, "commit", failing)
    with pytest.raises(MemoryError):
        editor.edit(REQUESTS[1:2])
    assert same(editor, before) and editor.solver_state.memories[0].count == count and len(editor.ledger.batches) == 1


@pytest.mark.parametrize("method", ("alphaedit", "ultraedit"))
def test_an_interrupt_around_the_commit_leaves_ledger_and_engine_in_step(monkeypatch, method):
    editor, other = editor_of(method), editor_of(method)
    editor.edit(REQUESTS[:1])
    before, real = weights(editor), editor.solver_state.commit

    def interrupted():
        real()
        raise KeyboardInterrupt

    monkeypatch.setattr(editor.solver_state, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(REQUESTS[1:2])
    monkeypatch.setattr(editor.solver_state, "commit", real)
    assert same(editor, before) and editor.solver_state.batches == len(editor.ledger.batches) == 1
    monkeypatch.setattr(editor.ledger, "rollback", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        editor.rollback()
    monkeypatch.undo()
    assert same(editor, before) and editor.solver_state.batches == len(editor.ledger.batches) == 1
    for batch in (REQUESTS[:1], REQUESTS[2:]):
        other.edit(batch)
    editor.edit(REQUESTS[2:])
    assert same(editor, weights(other))


def test_a_state_can_be_loaded_after_a_failed_or_restored_edit(tmp_path, monkeypatch):
    first = editor_of("encore")
    first.edit(REQUESTS[:1])
    first.save_state(tmp_path / "state.safetensors")
    for spoil in ("failed", "restored"):
        editor = editor_of("encore")
        if spoil == "failed":
            with monkeypatch.context() as patched, pytest.raises(RuntimeError):
                patched.setattr(editor.ledger, "write", lambda *a: (_ for _ in ()).throw(RuntimeError("injected")))
                editor.edit(REQUESTS[:1])
        else:
            editor.edit(REQUESTS[:1])
            editor.restore()
        editor.view.model.load_state_dict(first.view.model.state_dict())
        editor.load_state(tmp_path / "state.safetensors")
        assert editor.solver_state.memories[1].count == 1


def test_a_state_belongs_to_its_prompts_and_tokens(tmp_path):
    path = tmp_path / "state.safetensors"
    editor = editor_of("encore")
    editor.edit(REQUESTS[:1])
    editor.save_state(path)
    model, tokenizer = editor.view.model, editor.tokenizer
    about = dict(statistics=editor.statistics, hparams=editor.hparams.__dict__)

    def load(**more):
        other = Editor(model, tokenizer, "encore", **{**about, **more})
        other.load_state(path)
        return other

    assert load().prefixes == PREFIXES == load(prefixes=PREFIXES).prefixes
    with pytest.raises(StatisticsError, match="different prefixes"):
        load(prefixes=("Another. ",))
    with pytest.raises(StatisticsError, match="different prompt format"):
        load(prompt_format=lambda prompt: f"Q: {prompt}")
    ultra = editor_of("ultraedit")
    ultra.edit(REQUESTS[:2])
    ultra.save_state(path)
    other = editor_of("ultraedit", token="mask")
    other.view.model.load_state_dict(ultra.view.model.state_dict())
    with pytest.raises(StatisticsError, match="different token: ans there, mask here"):
        other.load_state(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("normaliser.64x32.mean"), "a part of the normalizer is missing"),
        (lambda t: t.update({"normaliser.64x32.squares": torch.full((96,), float("nan")).double()}), "not finite"),
        (lambda t: t.update({"normaliser.64x32.squares": torch.ones(1).double()}), r"not \[96\]"),
    ],
)
def test_a_damaged_normalizer_is_refused(tmp_path, change, message):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "state.safetensors"
    editor = editor_of("ultraedit")
    editor.edit(REQUESTS[:2])
    editor.save_state(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    other = editor_of("ultraedit")
    other.view.model.load_state_dict(editor.view.model.state_dict())
    with pytest.raises(StatisticsError, match=message):
        other.load_state(path)
    assert not other.solver_state.normalizers


def test_numbers_that_a_method_does_not_read_are_named(caplog):
    editor_of("memit", L2=3.0, on_bad_pivot="skip")
    assert "memit does not use L2, on_bad_pivot" in caplog.text
    for method, numbers in NUMBERS.items():
        assert unused(find_recipe(method), numbers) == []
    assert unused(find_recipe("alphaedit"), ["L2", "mom2_update_weight"]) == ["mom2_update_weight"]


def test_only_linear_modules_below_the_head_can_be_edited():
    for path, message in (
        ("model.embed_tokens", "is a Embedding, not a linear module"), ("lm_head", "is the model's head"),
        ("model.layers.0", "not a linear module"),
    ):  # fmt: skip
        with pytest.raises(KeditError, match=message):
            editor_of("ultraedit", inner_params=(path,))


def broken(statistics, change):
    """Statistics whose layer 1 has another moment."""
    second = statistics.layers[1]
    return replace(statistics, layers={**statistics.layers, 1: replace(second, moment=change(second.moment))})


BAD_STATISTICS = {
    "missing": (lambda s: replace(s, layers={0: s.layers[0]}), "no statistics for layer 1"),
    "shape": (lambda s: broken(s, lambda m: m[:-1, :-1]), "layer 1: statistics are"),
    "not positive definite": (lambda s: broken(s, lambda m: -m), "layer 1: the second moment"),
    "nan": (lambda s: broken(s, lambda m: m * float("nan")), "layer 1: .*not finite"),
    "rank deficient": (lambda s: broken(s, lambda m: torch.ones_like(m)), "layer 1: .*(not positive|deficient)"),
}


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in ("memit", "encore", "alphaedit", "rome", "pmet") for name in BAD_STATISTICS
     if (method, name) != ("alphaedit", "rank deficient")],  # which needs no full rank
)  # fmt: skip
def test_bad_statistics_name_the_layer_and_leave_the_model(method, name):
    change, message = BAD_STATISTICS[name]
    good = editor_of(method, mom2_ridge=0.0)
    before = weights(good)
    with pytest.raises(StatisticsError, match=message):
        bad = Editor(good.view.model, good.tokenizer, method, statistics=change(good.statistics),
                     hparams={**good.hparams.__dict__, "update_norm_lambda": 0.0}, prefixes=PREFIXES)  # fmt: skip
        bad.edit(REQUESTS[:1])
    assert same(good, before)


def test_no_null_space_says_what_to_set():
    editor = editor_of("alphaedit", nullspace_rule="absolute", nullspace_threshold=1e-9)
    before = weights(editor)
    with pytest.raises(StatisticsError, match=r"layer 0: no null space: none of 64 .* nullspace_rule"):
        editor.edit(REQUESTS)
    assert same(editor, before)


@pytest.mark.parametrize("method", ("memit", "alphaedit", "emmet", "rome", "r-rome"))
@pytest.mark.parametrize("where", ("keys", "outputs"))
def test_nan_in_keys_or_residuals_stops_before_any_write(monkeypatch, method, where):
    editor = editor_of(method)
    before = weights(editor)
    real = KeyPass.at

    def poisoned(self, layer):
        seen = real(self, layer)
        getattr(seen, where)[0, 0] = float("nan")
        return seen

    monkeypatch.setattr(KeyPass, "at", poisoned)
    with pytest.raises(SolveError, match="not finite"):
        editor.edit(REQUESTS[:1])
    assert same(editor, before) and not editor.ledger.batches
    assert all(memory.count == 0 for memory in editor.solver_state.memories.values())


WHOLE = [{"prompt": request.text, "target_new": request.target_new} for request in REQUESTS]


@pytest.mark.parametrize("token", ("ans", "mask"))
def test_ultraedit_writes_the_same_bits_without_subjects(token):
    editor, other = editor_of("ultraedit", token=token), editor_of("ultraedit", token=token)
    editor.edit(REQUESTS)
    result = other.edit(record for record in WHOLE)
    assert same(editor, weights(other)) and [request.subject for request in result.requests] == [None] * 3
    with_format, without = (editor_of("ultraedit", token=token) for _ in range(2))
    for one in (with_format, without):
        one.prompt_format = lambda prompt: f"Now : {prompt} ?"
    with_format.edit(REQUESTS)
    without.edit(WHOLE)
    assert same(with_format, weights(without)) and not same(with_format, weights(editor))


def test_a_prompt_in_which_the_subject_cannot_be_placed_is_whole_for_ultraedit():
    records = [{**WHOLE[0], "subject": "nobody"}, WHOLE[1], {**WHOLE[2], "subject": REQUESTS[2].subject}]
    editor, other = editor_of("ultraedit"), editor_of("ultraedit")
    editor.edit(records)
    other.edit(REQUESTS)
    assert same(editor, weights(other))


@pytest.mark.parametrize("method", [name for name, recipe in RECIPES.items() if recipe.needs_subject])
def test_all_other_methods_name_a_missing_subject(method):
    editor = editor_of(method)
    before = weights(editor)
    for requests in (WHOLE, [EditRequest(record["prompt"], None, record["target_new"]) for record in WHOLE]):
        with pytest.raises(KeditError, match=r"request 1 .*no 'subject'(.*\n)*request 3 "):
            editor.edit(requests)
    assert same(editor, before)
    result = editor.edit([WHOLE[0], REQUESTS[1]], "skip")
    assert list(result.skipped) == [0] and result.requests == (REQUESTS[1],)


def test_requests_without_a_subject_are_measured_kept_in_patches_and_named():
    editor = editor_of("ultraedit")
    records = [{**WHOLE[0], "target_true": "trumpet", "paraphrase_prompts": ["He plays the"]}]
    seen = shares(editor.view.model, editor.tokenizer, records)
    assert seen == shares(editor.view.model, editor.tokenizer, [
        EditRequest(REQUESTS[0].prompt, REQUESTS[0].subject, WHOLE[0]["target_new"], "trumpet", ("He plays the",))
    ])  # fmt: skip
    editor.edit(records)
    (about,) = editor.patch().about()["requests"]
    assert about == {**WHOLE[0], "subject": None}
    with pytest.raises(KeditError, match="special token"):
        editor.edit([{"prompt": "It is", "target_new": "</s>"}])
    with pytest.raises(KeditError, match="the model takes 128"):
        editor.edit([{"prompt": "is " * 200, "target_new": "Spain"}])


def test_ultraedit_skips_or_names_requests_whose_gradients_are_not_finite():
    editor = editor_of("ultraedit")
    (prepared, other, third), _ = editor.check(REQUESTS)
    only = set(other.rewriting[0].ids) - set(prepared.rewriting[0].ids) - set(third.rewriting[0].ids)
    with torch.no_grad():
        editor.view.model.get_input_embeddings().weight[only.pop()] = float("inf")
    before = weights(editor)
    with pytest.raises(KeditError, match="Danielle Darrieux"):
        editor.edit(REQUESTS)
    assert not editor.ledger.batches and not editor.solver_state.normalizers
    result = editor.edit(REQUESTS, "skip")
    assert list(result.skipped) == [1] and len(result.losses) == 2 and result.batch == 1
    editor.restore()
    changed = [name for name, tensor in editor.view.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not [name for name in changed if not torch.isnan(before[name]).any()]
    with pytest.raises(MethodError, match="token"):
        editor_of("ultraedit", token="some")
    with pytest.raises(KeditError, match="no module"):
        editor_of("ultraedit", inner_params=("model.layers.9.mlp.up_proj",))


@pytest.mark.parametrize("method", [name for name, recipe in RECIPES.items() if recipe.tuning is None])
def test_every_method_edits_every_dtype_and_goes_back_to_the_bit(method):
    for dtype in (torch.float32, torch.bfloat16):
        editor = editor_of(method, dtype=dtype)
        before = weights(editor)
        editor.edit(REQUESTS[:2])
        editor.edit(REQUESTS[2:])
        editor.finish()
        assert not same(editor, before)
        editor.restore()
        assert same(editor, before)


def test_an_fp32_factor_changes_an_edit_by_little():
    exact, rounded = editor_of("memit"), editor_of("memit", factor_dtype="float32")
    exact.edit(REQUESTS)
    rounded.edit(REQUESTS)
    name = exact.view.weight_name(1)
    one, other = (editor.ledger.total(name).dense() for editor in (exact, rounded))
    assert 0 < relative_error(other, one) < 1e-3


@pytest.mark.parametrize("name", sorted({recipe.preset for recipe in RECIPES.values()}))
def test_presets_are_complete_and_say_where_they_are_from(name):
    tables = load_presets(name)
    assert tables["preset"] and tables["family"]
    for entry in [*tables["preset"], *tables["family"]]:
        assert entry["source"] and entry["values"]
    methods = [recipe.name for recipe in RECIPES.values() if recipe.preset == name]
    for entry in tables["preset"]:
        lists = [value if isinstance(value, list) else [value] for value in entry["match"].values()]
        for values in itertools.product(*lists):
            config = SimpleNamespace(**{"num_hidden_layers": 48, **dict(zip(entry["match"], values, strict=True))})
            for method in methods:
                _, origin = make_hparams(method, config)
                assert origin.startswith(f"preset {entry['name']} ")
    for method in methods:
        _, origin = make_hparams(method, SimpleNamespace(model_type="qwen3", num_hidden_layers=36))
        assert origin.startswith("guess")


def test_the_published_numbers_of_the_new_methods():
    llama = SimpleNamespace(model_type="llama", num_hidden_layers=32, hidden_size=4096, intermediate_size=14336)
    alpha, origin = make_hparams("alphaedit", llama)
    assert alpha.L2 == 10 and alpha.nullspace_threshold == 0.02 and alpha.v_lr == 0.1 and "AlphaEdit" in origin
    encore, _ = make_hparams("encore", llama)
    assert (encore.v_lr, encore.update_norm_lambda, encore.most_probable_steps) == (0.5, 20, 1)
    ultra, _ = make_hparams("ultraedit", llama)
    assert len(ultra.inner_params) == 12 and ultra.lr == 1e-6 and ultra.token == "mask"
    emmet, _ = make_hparams("emmet", llama)
    assert emmet.layers == (5,) and emmet.emmet_lambda == 0.1 and emmet.mom2_update_weight == 100000
    gpt2 = SimpleNamespace(model_type="gpt2", n_layer=48, n_embd=1600, num_hidden_layers=48)
    numbers, origin = make_hparams("pmet", gpt2)  # no file of PMET's for it: MEMIT's, with PMET's own numbers
    assert (
        "as for memit, with values of" in origin and numbers.layers == (13, 14, 15, 16, 17) and numbers.kl_factor == 1
    )
    mistral = SimpleNamespace(model_type="mistral", num_hidden_layers=32, hidden_size=4096)
    numbers, origin = make_hparams("encore", mistral)
    assert (numbers.update_norm_lambda, numbers.most_probable_steps) == (20, 1) and "ENCORE" in origin
    assert len(make_hparams("emmet", mistral)[0].layers) == 1
    assert make_hparams("ultraedit", llama, {"layers": (3, 4)})[0].inner_params == ()
    assert make_hparams("memit-sequential", gpt2)[0].mom2_update_weight == 20000


def test_recipes_are_data_that_can_be_printed():
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.title and "arXiv" in recipe.source and recipe.keeps
        assert json.loads(json.dumps(recipe.as_dict()))["name"] == name
        assert (recipe.keeps == "nothing") == (not recipe.keeps_state and not recipe.makes_memory)


def test_mean_nll_is_the_mean_over_tokens_of_each_text_alone():
    tokenizer, model = make_tokenizer(bos=True), make_model("llama")
    total, count = 0.0, 0
    with torch.no_grad():
        for text in TEXT:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            log_probs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
            total -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    assert abs(mean_nll(model, tokenizer, TEXT) - total / count) < 1e-5
    with pytest.raises(KeditError, match="no text"):
        mean_nll(model, tokenizer, ["", "  "][:1])


def test_a_masked_update_is_its_factors_behind_a_mask():
    left, right = torch.randn(7, 3), torch.randn(13, 3)
    mask = torch.rand(7, 13) > 0.5
    update = MaskedUpdate.from_mask(LowRankUpdate(left, right), mask)
    assert torch.equal(update.mask, mask) and update.bits.numel() == 14
    weight, master = torch.randn(7, 13), torch.randn(7, 13)
    copy = master.bfloat16()
    expected = weight + (left @ right.T) * mask
    assert relative_error(update.apply_(weight), expected) < 1e-6
    update.apply_(master, copy=copy)
    assert torch.equal(copy, master.bfloat16())
    with pytest.raises(KeditError, match="mask"):
        MaskedUpdate.from_mask(LowRankUpdate(left, right), mask.float())
