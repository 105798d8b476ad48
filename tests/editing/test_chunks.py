"""Long targets: a value before each chunk, against the published loop and dense solves, one request at a time."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import PREFIXES
from tiny_models import POST_NORM, TEXT, make_model, make_tokenizer

from benchmarks.published import anyedit, serial_chunks
from kedit_fast import Editor, EditRequest, collect_statistics
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.chunks import Columns, find_chunk_values, spans_of
from kedit_fast.editing.values.loop import SITES, find_values
from kedit_fast.editing.values.result import Values
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import MethodError
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models import prompt_runner
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import chunk_spans, prepare
from kedit_fast.solver.value_descent import Status

LONG = [
    EditRequest("Who walked home?", None, "Because I saw the old tower, you and I walked home"),
    EditRequest("{} plays the", "Miles Davis", "piano and violin, which is located in Spain"),
    EditRequest("The tongue of", None, "French"),  # one chunk
    EditRequest("{} is a", "Ebro", "very old tower, because"),
]
NUMBERS = dict(v_num_grad_steps=4, v_lr=0.1, v_weight_decay=0.5, clamp_norm_factor=4.0, v_stop_loss=0.01)
VALUE_LIMITS = (1e-5, 1e-4)  # median and largest |value - serial value| / |delta|


def make_case(kind="llama", prefixes=(), method="anyedit", layer=1, **numbers):
    tokenizer, model = make_tokenizer(bos=True), make_model(kind)
    numbers = {"layers": (0, layer), "chunk_tokens": 6, "chunk_overlap": 0, **NUMBERS, **numbers}
    hparams, _ = make_hparams(method, model.config, numbers)
    return model, ModelView(model), prepare(tokenizer, LONG, prefixes, 128), replace(hparams, kl_factor=0.0)


def values_of(view, prepared, layer, site, hparams, **options):
    def find(requests, earlier=None):
        return find_values(view, requests, layer, site, hparams, earlier=earlier, on_problem="keep", **options)

    return find_chunk_values(find, prepared, spans_of(prepared, hparams))


def errors_beside_the_serial_loop(values, model, modules, prepared, hparams):
    alone = [value for request in prepared for value in serial_chunks(model, modules, request, hparams)]
    assert values.steps.tolist() == [value.steps for value in alone]
    errors = []
    for i, value in enumerate(alone):
        assert abs(float(values.losses[i]) - value.loss) < 1e-3 * max(1.0, value.loss)
        for s, target in enumerate(value.targets):
            errors.append(float((values.all_targets[s, :, i] - target).norm() / values.all_deltas[s, :, i].norm()))
    return errors


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden2.safetensors")


@pytest.mark.parametrize("tokens, window, overlap", ((40, 12, 0), (40, 12, 4), (7, 12, 0), (25, 10, 3)))
def test_chunks_are_the_golden_ones(golden, tokens, window, overlap):
    expected = golden[f"anyedit.spans_T{tokens}_w{window}_o{overlap}"].long().tolist()
    assert chunk_spans(tokens, window, overlap) == [tuple(span) for span in expected]


@pytest.mark.parametrize("kind, overlap", (("gpt2", 0), ("llama", 2), ("mistral", 0), ("gemma2", 0)))
def test_values_equal_the_serial_loop(kind, overlap):
    model, view, prepared, hparams = make_case(kind, chunk_overlap=overlap)
    site = "mlp" if kind in POST_NORM else "block"
    module = view.mlp(1) if kind in POST_NORM else view.block(1)
    values = values_of(view, prepared, 1, site, hparams)
    assert len(values.steps) > 2 * len(prepared)
    errors = errors_beside_the_serial_loop(values, model, [module], prepared, hparams)
    assert statistics.median(errors) < VALUE_LIMITS[0] and max(errors) < VALUE_LIMITS[1]


@pytest.mark.parametrize("site", ("block", "attention and mlp"))
def test_values_with_prefixes_two_sites_and_whole_prompts_equal_the_serial_loop(site, monkeypatch):
    method = "pmet" if " " in site else "memit"
    model, view, prepared, hparams = make_case("llama", PREFIXES[:1], method, kl_factor=0.0)
    prepared = prepared[1:3]
    modules = {"block": [view.block(1)], "attention and mlp": [view.attention(1), view.mlp(1)]}[site]
    tails = values_of(view, prepared, 1, site, hparams)
    monkeypatch.setattr(prompt_runner, "pass_kind", lambda view, sites: "whole prompts")
    whole = values_of(
        view,
        prepared,
        1,
        site,
        hparams,
    )
    for values in (tails, whole):
        errors = errors_beside_the_serial_loop(values, model, modules, prepared, hparams)
        assert statistics.median(errors) < VALUE_LIMITS[0] and max(errors) < VALUE_LIMITS[1]
    assert len(SITES[site]) == tails.all_deltas.shape[0]


def test_earlier_chunks_matter_and_a_batch_is_one_request_at_a_time():
    _, view, prepared, hparams = make_case("mistral")  # a sliding window shorter than the texts
    values = values_of(view, prepared, 1, "block", hparams)
    columns = Columns.of(prepared, spans_of(prepared, hparams))
    for i, request in enumerate(prepared):
        alone = values_of(view, [request], 1, "block", hparams)
        of_batch = values.select(columns.of_requests([i]))
        gap = (alone.targets - of_batch.targets).norm(dim=0) / of_batch.deltas.norm(dim=0)
        assert float(gap.max()) < VALUE_LIMITS[1]
    spans = spans_of(prepared, hparams)[0]
    second = find_values(view, [prepared[0].chunk(*spans[1])], 1, "block", hparams)
    gap = (second.targets[:, 0] - values.targets[:, 1]).norm() / values.deltas[:, 1].norm()
    assert float(gap) > 50 * VALUE_LIMITS[1], "without the first chunk's delta the second value is another one"


@pytest.mark.parametrize("kind", ("gpt2", "mistral", "olmo2"))
def test_keys_are_those_of_whole_unpadded_texts(kind):
    """Several lookup tokens a row, in rows of different lengths; the other tokens are all others, and no padding."""
    _, view, prepared, hparams = make_case(kind)
    spans, site = spans_of(prepared, hparams), Site(1, "mlp" if kind in POST_NORM else "block")
    passes = KeyPass(view, prepared, site, "bare_half", spans=spans, other_tokens=True)
    for layer in (0, 1):
        seen = passes.at(layer)
        keys, outputs, others = [], [], []
        for request, chunks in zip(prepared, spans, strict=True):
            ids = [*request.rewriting[0].ids, *request.target]
            states, sites = both(view, ids, layer, site)
            places = [len(request.rewriting[0].ids) - 1 + begin for begin, _ in chunks]
            keys.append(states[places])
            outputs.append(sites[places])
            others.append(states[[place for place in range(len(ids)) if place not in places]])
        torch.testing.assert_close(seen.keys.T, torch.cat(keys), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.outputs.T, torch.cat(outputs), rtol=1e-4, atol=1e-4)
        expected = torch.cat(others)
        assert (
            seen.other_keys.shape[1]
            == len(expected)
            == sum(len(r.rewriting[0].ids) + len(r.target) - len(s) for r, s in zip(prepared, spans, strict=True))
        )
        outer = seen.other_keys @ seen.other_keys.T  # whatever their order
        torch.testing.assert_close(outer, expected.T @ expected, rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            view.weight(layer).add_(torch.randn_like(view.weight(layer)) * 0.05)
    torch.testing.assert_close(passes.outputs(), passes.at(1).outputs, rtol=1e-4, atol=1e-4)


def test_a_token_that_one_edit_moves_is_held_by_no_other():
    """The second prompt goes on where the key of the first one is: its tokens up to there are not other tokens."""
    first = EditRequest("{} is located in", "Ebro", "Sweden")
    second = EditRequest("{} is located in the old tower, and", "Ebro", "nobody")
    _, view, _, hparams = make_case(prefixes=PREFIXES)
    prepared = prepare(make_tokenizer(bos=True), [first, second], PREFIXES, 128)
    spans = spans_of(prepared, hparams)
    passes = KeyPass(view, prepared, Site(1, "block"), "bare_half", spans=spans, other_tokens=True)
    seen = passes.at(0)
    everything = sum(len(one.rewriting[0].ids) + len(one.target) for one in prepared)
    assert seen.other_keys.shape[1] == everything - sum(map(len, spans)) - 1
    gaps = torch.cdist(seen.other_keys.T, seen.bare_keys.T) / seen.bare_keys.norm(dim=0)
    assert float(gaps.min()) > 1e-3


def both(view, ids, layer, site):
    """Inputs [T, d] of a layer and outputs [T, h] of a site in a pass over one text, fp64."""
    seen = {}
    module = view.block(site.layer) if site.kind == "block" else view.mlp(site.layer)
    hooks = [
        view.edited_module(layer).register_forward_pre_hook(lambda _, args: seen.__setitem__("key", args[0])),
        module.register_forward_hook(lambda _, __, out: seen.__setitem__("site", out)),
    ]
    with torch.no_grad():
        view.model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    states = seen["site"][0] if isinstance(seen["site"], tuple) else seen["site"]
    return seen["key"][0].double(), states[0].double()


def make_editor(method="anyedit", kind="llama", values=None, prompt_format=None, **numbers):
    tokenizer, model = make_tokenizer(bos=True), make_model(kind)
    moments = collect_statistics(model, tokenizer, TEXT * 2, (0, 1), progress=False)
    scale = {"L2": 2.0, "nullspace_rule": "energy", "nullspace_threshold": 0.1} if "alpha" in method else {}
    if "alpha" not in method:
        scale = {"mom2_update_weight": 10.0, "mom2_ridge": 1e-3}
    numbers = {"layers": (0, 1), "chunk_tokens": 6, **NUMBERS, **scale, **numbers}
    return Editor(
        model, tokenizer, method, statistics=moments, hparams=numbers, values=values, prompt_format=prompt_format
    )


@pytest.mark.parametrize("keeps", (True, False))
@pytest.mark.parametrize("method", ("anyedit", "anyedit-alphaedit"))
def test_an_edit_equals_the_published_pipeline(method, keeps):
    editor = make_editor(method, keep_other_tokens=keeps)
    view = editor.view
    prepared, _ = editor.check(LONG)
    projectors = moments = None
    if "alpha" in method:
        size = view.weight(0).shape[1]
        projectors = {layer: editor.preconditioner(layer).project(torch.eye(size)) for layer in (0, 1)}
    else:
        moments = {}
        for layer in (0, 1):
            moment = editor.statistics.moment(layer).moment.double()
            moments[layer] = moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment))
    result = editor.edit(prepared)
    assert len(result.losses) == len(result.steps) == len(LONG)
    columns = sum(len(chunk_spans(len(p.target), 6)) for p in prepared)
    assert all(update.rank == columns for updates in result.updates.values() for update in updates)
    edited = {layer: view.edited_module(layer) for layer in (0, 1)}
    weights = {layer: view.weight(layer) for layer in (0, 1)}
    ours = {layer: result.updates[f"{view.module_name(layer)}.weight"][0].dense() for layer in (0, 1)}
    editor.restore()
    blocks = [view.block(layer) for layer in range(view.num_layers)]
    expected = anyedit(
        view.model, blocks, edited, weights, prepared, editor.hparams, moments=moments, projectors=projectors
    )
    for layer in (0, 1):
        error = float((ours[layer] - expected[layer]).norm() / expected[layer].norm())
        assert error < 2e-4, (layer, error)


@pytest.mark.parametrize("method", ("memit-sequential", "alphaedit", "encore", "emmet", "rect", "prune", "pmet"))
def test_other_methods_take_chunks_too(method):
    numbers = {"context_template_length_params": (), "kl_factor": 0.0, "keep_other_tokens": True}
    editor = make_editor(method, **numbers)
    before = {name: tensor.clone() for name, tensor in editor.view.model.state_dict().items()}
    requests = [LONG[1], LONG[3]]
    for request in requests:
        result = editor.edit([request])
        assert result.steps[0] > 0 and result.residual < 1
    if editor.recipe.memory:
        chunks = sum(len(chunk_spans(len(p.target), 6)) for p in editor.check(requests)[0])
        assert {memory.count for memory in editor.solver_state.memories.values()} == {chunks}, "no other tokens' keys"
    editor.rollback(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.view.model.state_dict().items())


def test_weights_count_for_every_chunk_and_residuals_shrink():
    heavy = replace(LONG[1], weight=50.0)
    light = make_editor().edit([LONG[0], LONG[1]]).updates
    weighed = make_editor().edit([LONG[0], heavy]).updates
    assert any(not torch.allclose(light[name][0].dense(), weighed[name][0].dense()) for name in light)


def test_values_come_from_a_file_chunk_by_chunk(tmp_path):
    path = tmp_path / "values.safetensors"
    first = make_editor(values=path).edit(LONG)
    stored = ValueFile(path)
    again = make_editor(values=path)
    columns = sum(len(chunk_spans(len(p.target), 6)) for p in again.check(LONG)[0])
    assert len(stored.entries) == columns
    second = again.edit(LONG)
    for name, (update,) in first.updates.items():
        assert torch.equal(update.dense(), second.updates[name][0].dense())
    other = make_editor(values=path, chunk_tokens=4)
    other.edit(LONG)
    assert len(ValueFile(path).entries) > columns, "other chunks have other values"


def test_a_target_in_a_chat_starts_after_the_template(monkeypatch):
    editor = make_editor(prompt_format=lambda prompt: f"Q {prompt} A")
    prepared, _ = editor.check(LONG)
    assert editor.tokenizer.decode(prepared[0].rewriting[0].ids).endswith("A")
    result = editor.edit(prepared)
    hparams = replace(editor.hparams, kl_factor=0.0)
    editor.restore()
    alone = serial_chunks(editor.view.model, [editor.view.block(1)], prepared[0], hparams)
    assert result.steps[0] == sum(value.steps for value in alone)


def test_a_request_is_known_only_if_every_chunk_is():
    def values(*codes):
        n = len(codes)
        empty = torch.zeros(1, 2, n)
        return Values(
            ("block",), empty, empty, torch.arange(n) * 1.0, torch.ones(n), torch.tensor([int(c) for c in codes])
        )

    columns = Columns((0, 0, 1, 1), (6, 2, 6, 1))
    known, stopped, bad = Status.PREDICTED, Status.STOPPED, Status.BAD_LOSS
    assert columns.statuses(values(known, known, known, stopped)) == [known, stopped]
    assert columns.statuses(values(stopped, bad, Status.COMPLETED, stopped)) == [bad, Status.COMPLETED]
    assert columns.losses(values(known, known, known, known)) == [2 / 8, (2 * 6 + 3) / 7]
    assert columns.steps(values(known, known, known, known)) == [2, 2]
    assert columns.of_requests([1]) == [2, 3]


@pytest.mark.parametrize(
    "method, numbers, message",
    [
        ("rome", {"chunk_tokens": 5}, "rome cannot write a target in chunks.*one key and one value"),
        ("memit-merge", {"chunk_tokens": 5}, "memit-merge cannot write .* share one value"),
        ("ultraedit", {"chunk_tokens": 5}, "ultraedit cannot write .* every token"),
        ("rome", {"keep_other_tokens": True}, "rome cannot keep the outputs at other tokens"),
        ("anyedit", {"chunk_tokens": 0}, "chunk_tokens = 0 is out of range for anyedit: it must be at least 1"),
        ("anyedit", {"chunk_tokens": 5, "chunk_overlap": 5}, "chunk_overlap = 5 .* below chunk_tokens, 5"),
        ("memit", {"chunk_overlap": 1}, "chunk_overlap = 1 .* below chunk_tokens, 0"),
        ("memit", {"chunk_tokens": 5}, "kl_factor = 0.0625 .* 0 with chunk_tokens"),
    ],
)
def test_what_does_not_go_with_chunks_is_refused_by_name(method, numbers, message):
    with pytest.raises(MethodError, match=message):
        make_hparams(method, make_model("llama").config, numbers)


def test_memits_value_files_are_refused(tmp_path):
    with pytest.raises(MethodError, match="npz files hold one value a request"):
        make_editor(values=str(tmp_path / "layer_{}_clamp_{}_case_{}.npz"))


def test_anyedits_own_files_are_read(tmp_path):
    from kedit_fast.methods.hparams_files import read_hparams

    path = tmp_path / "Qwen.json"
    path.write_text('{"fact_token": "last", "window_size": 50, "overlap": 2, "v_lr": 5e-1, "kl_factor": 0.0625}')
    assert read_hparams(path, "anyedit") == {"chunk_tokens": 50, "chunk_overlap": 2, "v_lr": 0.5, "kl_factor": 0.0625}
    path.write_text('{"fact_token": "last"}')
    with pytest.raises(MethodError, match="fact_token = 'last' is not implemented"):
        read_hparams(path, "memit")


def test_identities_from_before_chunks_existed_still_hold():
    hparams, _ = make_hparams("memit", make_model("llama").config)
    assert not {"chunk_tokens", "chunk_overlap"} & set(hparams.identity("value"))
    chunked, _ = make_hparams("anyedit", make_model("llama").config)
    assert chunked.identity("value")["chunk_tokens"] == 40
