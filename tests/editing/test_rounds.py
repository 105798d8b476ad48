"""Rounds, norm anchors and neighbor columns through the editor, against dense solves."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from floors import relative_error
from support import PREFIXES, REQUESTS, make_editor, same, weights
from tiny_models import make_model

from kedit_fast import EditRequest
from kedit_fast.editing.keys import KeyPass, bare_outputs
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import EditError, MethodError, RequestError, StatisticsError
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import neighbor_prompts, prepare

SITE = Site(1, "block")
NEIGHBORS = [  # of the first one: with a subject; without, as the third one's; what is edited
    replace(REQUESTS[0], neighborhood_prompts=("Ebro plays the", "She is in Spain", "Miles Davis plays the")),
    REQUESTS[1],
    replace(REQUESTS[2], neighborhood_prompts=("She is in Spain",)),
]


def editor_of(method="memit-sequential", dtype=torch.float32, **numbers):
    recipe_numbers = {"mom2_update_weight": 10.0} if method != "rome" else {}
    layers = (1,) if method == "rome" else (0, 1)
    return make_editor("llama", method, dtype, **{"layers": layers, **recipe_numbers, **numbers})


def system_of(editor, layer):
    moment, numbers = editor.statistics.moment(layer).moment.double(), editor.hparams
    ridge = numbers.mom2_ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    return numbers.mom2_update_weight * (moment + ridge)


def test_rounds_repeat_keys_and_solves_for_those_not_reached():
    """Against NSE's loop: earlier batches' keys in every round's system, those of the batch added once, at the end."""
    editor = editor_of(dtype=torch.float64, rounds=3, round_share=0.05, round_least=0.1)
    hparams, other = editor.hparams, ModelView(make_model("llama", torch.float64))
    caches = {layer: torch.zeros(64, 64, dtype=torch.float64) for layer in (0, 1)}
    for batch in (REQUESTS, [EditRequest("{} is in", "Ebro", "Sweden")]):
        prepared = prepare(editor.tokenizer, batch, PREFIXES, 128)
        targets = find_values(other, prepared, 1, "block", hparams).targets
        result = editor.edit(batch)
        first, counts, remembered = None, [], {}
        for _ in range(3):
            norms = (targets - KeyPass(other, prepared, SITE, "bare_half").outputs()).norm(dim=0)
            eligible = norms > hparams.round_least if first is None else norms > hparams.round_share * first
            eligible = eligible & (norms > hparams.round_least)
            first = norms if first is None else first
            places = torch.nonzero(eligible)[:, 0].tolist()
            if not places:
                break
            counts.append(len(places))
            for i, layer in enumerate((0, 1)):
                seen = KeyPass(other, prepared, SITE, "bare_half").at(layer)
                remembered.setdefault(layer, seen.keys)
                keys, residual = seen.keys[:, places], (targets - seen.outputs)[:, places] / (2 - i)
                system = system_of(editor, layer) + caches[layer] + keys @ keys.T
                other.weight(layer).add_(residual @ torch.linalg.solve(system, keys).T)
        for layer, keys in remembered.items():
            caches[layer] += keys @ keys.T
            assert editor.solver_state.memories[layer].sizes[-1] == len(batch)
        assert result.rounds == tuple(counts) and len(counts) > 1
        after = (targets - KeyPass(other, prepared, SITE, "bare_half").outputs()).norm()
        assert result.residual == pytest.approx(float(after / first.norm()), rel=1e-5)
        for layer in (0, 1):
            assert relative_error(editor.view.weight(layer), other.weight(layer)) < 1e-7
        assert all(len(updates) == len(counts) for updates in result.updates.values())
    once = editor_of(rounds=1)
    assert once.edit(REQUESTS).residual > editor_of(rounds=3).edit(REQUESTS).residual


def test_a_batch_of_several_rounds_is_one_batch_and_goes_back_to_the_bit():
    editor = editor_of(rounds=3, round_share=0.0)
    before = weights(editor)
    assert editor.edit(REQUESTS).rounds == (3, 3, 3)
    editor.edit(REQUESTS[:1])
    assert len(editor.ledger.batches) == 2 and editor.solver_state.memories[1].sizes == (3, 1)
    patch = editor.patch()
    editor.rollback()
    editor.rollback()
    assert same(editor, before)
    assert all(update.is_finite() for update in patch.updates.values())


def test_requests_outside_of_the_bounds_are_named_and_their_keys_remembered():
    norms = _first_norms()
    order = sorted(range(3), key=norms.__getitem__)
    least, most = (sum(norms[i] for i in pair) / 2 for pair in (order[:2], order[1:]))
    editor = editor_of(rounds=1, round_least=least, round_most=most)
    result = editor.edit(REQUESTS)
    assert result.requests == (REQUESTS[order[1]],) and len(result.losses) == 1 and result.rounds == (1,)
    assert "reached before the write" in result.skipped[order[0]] and "round_least" in result.skipped[order[0]]
    assert "is not below round_most" in result.skipped[order[2]]
    assert editor.solver_state.memories[0].sizes == (3,)
    nothing = editor_of(round_least=1e6)
    before = weights(nothing)
    result = nothing.edit(REQUESTS)
    assert result.batch == 0 and len(result.skipped) == 3 and same(nothing, before) and not nothing.ledger.batches


def _first_norms():
    editor = editor_of()
    prepared = prepare(editor.tokenizer, REQUESTS, PREFIXES, 128)
    targets = find_values(editor.view, prepared, 1, "block", editor.hparams).targets
    (outputs,) = bare_outputs(editor.view, prepared, [SITE])
    return (targets - outputs).norm(dim=0).tolist()


def test_requests_on_one_subject_take_part_in_a_round_together():
    on_one = [REQUESTS[0], EditRequest("{} was born in", "Miles Davis", "Spain"), REQUESTS[1]]
    rounds = editor_of("memit-merge", rounds=4, round_share=0.4).edit(on_one).rounds
    assert rounds[0] == 3 and all(count in (1, 2, 3) for count in rounds)


@pytest.mark.parametrize("method", ("rect", "rome"))
def test_methods_that_cannot_repeat_say_so(method, caplog):
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        editor = editor_of(method, rounds=3)
    assert "does not use rounds" in caplog.text
    assert len(editor.edit(REQUESTS).rounds) == (method == "rect")


@pytest.mark.parametrize("method", ("memit-sequential", "memit"))
def test_neighbor_columns_stay_and_are_not_remembered(method):
    editor = editor_of(method, torch.float64, neighbor_columns=3)
    result = editor.edit(NEIGHBORS)
    other = ModelView(make_model("llama", torch.float64))
    prepared = prepare(editor.tokenizer, REQUESTS, PREFIXES, 128)
    targets = find_values(other, prepared, 1, "block", editor.hparams).targets
    ids = [editor.tokenizer(text)["input_ids"] for text in ("Ebro plays the", "She is in Spain")]
    ends = [len(editor.tokenizer("Ebro")["input_ids"]), len(ids[1])]
    for i, layer in enumerate((0, 1)):
        seen = KeyPass(other, prepared, SITE, "bare_half").at(layer)
        alone = [replace(prepared[0], rewriting=(replace(prepared[0].kl, ids=tuple(row[:end]), lookup=end - 1),))
                 for row, end in zip(ids, ends, strict=True)]  # fmt: skip
        unmoved = KeyPass(other, alone, SITE, "mean").at(layer).keys
        system = system_of(editor, layer) + seen.keys @ seen.keys.T + unmoved @ unmoved.T
        residual = (targets - seen.outputs) / (2 - i)
        other.weight(layer).add_(residual @ torch.linalg.solve(system, seen.keys).T)
        assert relative_error(editor.view.weight(layer), other.weight(layer)) < 1e-8
    assert all(updates[0].rank == 3 for updates in result.updates.values())
    if method == "memit-sequential":
        assert editor.solver_state.memories[0].sizes == (3,)
    editor.restore()
    assert same(editor, weights(editor_of(method, torch.float64)))


def test_neighbor_prompts_that_are_missing_or_do_not_fit(caplog):
    tokenizer = editor_of().tokenizer
    assert len(neighbor_prompts(tokenizer, NEIGHBORS[0], 1, 128)) == 1
    with pytest.raises(RequestError, match="neighborhood prompt"):
        neighbor_prompts(tokenizer, NEIGHBORS[0], 2, 2)
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        editor_of(neighbor_columns=2).edit(REQUESTS)
    assert "neighbor_columns has no effect" in caplog.text


def test_the_anchor_is_measured_on_the_unedited_model_and_forgotten_with_the_first_batch(caplog):
    editor = editor_of(norm_anchor="auto")
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        result = editor.edit(REQUESTS)
    assert "norm_anchor is measured on 3 requests; 200 or more" in caplog.text
    anchor = result.resolved["norm_anchor"]
    fresh = ModelView(make_model("llama"))
    prepared = prepare(editor.tokenizer, REQUESTS, PREFIXES, 128)
    targets = find_values(fresh, prepared, 1, "block", editor.hparams).targets
    block, mlp = bare_outputs(fresh, prepared, [SITE, Site(1, "mlp")])
    assert anchor == pytest.approx(float((targets - block + mlp).norm(dim=0).mean()), rel=1e-6)
    assert editor.patch().configuration["norm_anchor"] == anchor
    with pytest.raises(EditError, match="unedited model"):
        editor.measure_norm_anchor(REQUESTS)
    editor.edit(REQUESTS[:1])
    assert editor.resolved["norm_anchor"] == anchor
    editor.restore()
    assert editor.resolved == {}
    measured = editor.measure_norm_anchor(REQUESTS[:2])
    assert measured != anchor and not editor.ledger.batches
    editor.edit(REQUESTS)
    editor.restore()
    assert editor.resolved == {"norm_anchor": measured}
    given = editor_of(norm_anchor=measured)
    given.edit(REQUESTS)
    editor.edit(REQUESTS)
    assert same(editor, weights(given))
    with pytest.raises(MethodError, match="needs no measuring"):
        given.measure_norm_anchor(REQUESTS)
    cast = editor_of(norm_anchor="auto")
    cast.view.model.to(torch.bfloat16)
    with pytest.raises(EditError, match="moved or cast"):
        cast.measure_norm_anchor(REQUESTS)


def test_edits_beyond_twice_the_anchor_are_dropped_and_named(caplog):
    anchor = editor_of(norm_anchor="auto").measure_norm_anchor(REQUESTS)
    editor = editor_of(norm_anchor=anchor * 0.3)
    before = weights(editor)
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        result = editor.edit(REQUESTS)
    assert list(result.skipped) == [0, 1] and all("the edit is dropped" in why for why in result.skipped.values())
    assert result.requests == (REQUESTS[2],) and editor.solver_state.memories[0].sizes == (1,)
    assert "2 of 3 edits are dropped" in caplog.text
    editor.restore()
    everything = editor.edit(REQUESTS[:2])
    assert everything.batch == 0 and len(everything.skipped) == 2 and same(editor, before)


@pytest.mark.parametrize("method", ("rome", "pmet", "memit-merge"))
def test_every_method_with_values_takes_an_anchor(method):
    editor, plain = editor_of(method, norm_anchor="auto"), editor_of(method)
    assert editor.edit(REQUESTS).resolved["norm_anchor"] > 0
    plain.edit(REQUESTS)
    assert not same(editor, weights(plain))


def test_an_anchor_is_part_of_a_state(tmp_path):
    editor, path = editor_of(norm_anchor="auto"), tmp_path / "state.safetensors"
    editor.edit(REQUESTS[:2])
    editor.save_state(path)
    later = editor_of(norm_anchor="auto")
    later.view.model.load_state_dict(editor.view.model.state_dict())
    later.load_state(path)
    assert later.resolved == editor.resolved
    with pytest.raises(EditError, match="without a state"):
        later.measure_norm_anchor(REQUESTS)
    later.edit(REQUESTS[2:])
    editor.edit(REQUESTS[2:])
    assert same(later, weights(editor))
    for other in (editor_of(), editor_of(norm_anchor=3.0)):
        other.view.model.load_state_dict(weights(editor_of()))
        with pytest.raises(StatisticsError, match="different"):
            other.load_state(path)
