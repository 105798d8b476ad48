"""Rows that begin alike: what they share runs once, and everything is that of whole rows."""

from __future__ import annotations

import random

import pytest
import torch
from support import VARIED_REQUESTS, prepared_and_hparams, serial_errors
from tiny_models import KINDS, make_model, make_tokenizer, needs_experts
from torch_states import STATES

from benchmarks.tiny_decoders import tiny_decoder
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.models import shared_prefixes
from kedit_fast.models.fixed_deltas import FixedDeltas
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.models.prompt_runner import pass_kind, record_prompts, shared_rows, shares_prefixes
from kedit_fast.models.shared_prefixes import SharedRows, split_rows
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import prepare

PREFIXES = ("The old tower. ", "Because I saw. ", "Nobody waited, therefore you and I walked home. ")
NEVER = 1 << 40


@pytest.fixture
def sharing(monkeypatch):
    """Call it with True to share whatever saves a token, with False to run whole rows."""

    def switch(is_on):
        monkeypatch.setattr(shared_prefixes, "LEAST_TOKENS", 1 if is_on else NEVER)
        monkeypatch.setattr(shared_prefixes, "LEAST_SHARE", 0.0)

    return switch


def best_saving(begins):
    """The most tokens that nested groups of rows with one beginning can save, tried one by one."""
    if len(begins) < 2:
        return 0
    length = len(max(begins, key=len))
    shared = next(
        (n for n in range(length, 0, -1) if len({b[:n] for b in begins}) == 1 and min(map(len, begins)) >= n), 0
    )
    parts = {}
    for begin in begins:
        parts.setdefault(begin[shared : shared + 1], []).append(begin)
    inside = [some for first, some in parts.items() if first]
    return max((len(begins) - 1) * shared, sum(best_saving(some) for some in inside))


@pytest.mark.parametrize("seed", range(30))
def test_the_split_saves_the_most_and_its_prefixes_are_those_of_the_rows(seed):
    draw = random.Random(seed)
    rows = [tuple(draw.choices((1, 2), k=draw.randint(1, 9))) for _ in range(draw.randint(1, 12))]
    limits = [draw.randint(0, len(row) - 1) for row in rows]
    split = split_rows(rows, limits, least_tokens=1, least_share=0.0)
    begins = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
    if split is None:
        assert best_saving(begins) == 0
        return
    assert split.saved == best_saving(begins)
    lengths = split.lengths
    for row, limit, length, i in zip(rows, limits, lengths, split.of_row, strict=True):
        assert length <= limit < len(row) and row[:length] == (split.prefixes[i] if i >= 0 else ())
    computed = sum(map(len, split.prefixes)) + sum(len(row) - n for row, n in zip(rows, lengths, strict=True))
    assert computed == sum(map(len, rows)) - split.saved
    assert len(set(split.of_row) - {-1}) == len(split.prefixes)


def test_little_is_not_worth_it():
    rows = [(1, 2, 3, 4), (1, 2, 3, 5)]
    assert split_rows(rows, (3, 3)) is None, "three tokens are fewer than LEAST_TOKENS"
    assert split_rows(rows, (3, 3), least_tokens=3).saved == 3
    assert split_rows(rows, (3, 3), least_tokens=3, least_share=0.5) is None
    assert split_rows([(1, 2)], (1,), least_tokens=1) is None, "one row shares nothing"
    assert split_rows([(1, 2), (3, 4)], (1, 1), least_tokens=1, least_share=0.0) is None
    many = [(*range(9), i) for i in range(8)]
    assert split_rows(many, [9] * 8).saved == 63
    nested = [tuple(range(n + 2)) for n in range(1200)]  # deeper than Python's recursion
    assert split_rows(nested, [len(row) - 1 for row in nested]) is not None


def rows_of(tokenizer):
    """The rows of a batch as `Objective` makes them, with rows that have nothing in common with others."""
    prepared = prepare(tokenizer, VARIED_REQUESTS, PREFIXES, 128)
    rows, lookups = [], []
    for request in prepared:
        for prompt in request.rewriting:
            rows.append((*prompt.ids, *request.target[:-1]))
            lookups.append(prompt.lookup)
        rows.append(request.kl.cut().ids)
        lookups.append(request.kl.lookup)
    context = rows[1][: lookups[1]]
    extra = [(399, 398, 397), (396,), context, (*context, 11)]  # alone; one token; a shared prefix as a whole prompt
    return [*rows, *extra], [*lookups, 1, 0, len(context) - 1, len(context)]


def close(one, other, most):
    assert float((one - other).norm()) <= most * float(other.norm()) + 1e-12


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_is_that_of_whole_prompts(kind, dtype, sharing):
    model = make_model(kind, dtype)
    view = ModelView(model)
    rows, lookups = rows_of(make_tokenizer(bos=kind != "gpt2"))
    most = {torch.float32: 2e-5, torch.float64: 1e-6, torch.bfloat16: 4e-2}[dtype]  # transformers' softmax is fp32
    for sites in ((Site(2, "mlp"),), (Site(1, "attention"), Site(1, "mlp"))):
        recorded = []
        with evaluating(view):
            assert shares_prefixes(view) == (pass_kind(view, sites) == "packed tails") == (kind != "gptj")
            if kind == "gptj":  # it does not take its attention from transformers' registry
                return
            for is_on in (False, True):
                sharing(is_on)
                shared = shared_rows(view, rows, lookups)
                assert (shared is not None) == is_on
                recorded.append(record_prompts(view, rows, lookups, sites, [0, 4, len(rows) - 1]))
            assert shared.input_ids.numel() < 0.8 * sum(map(len, rows)), "tokens that are shared run once"
            whole, once = recorded
            close(once.site_outputs, whole.site_outputs, most)
            close(once.reference, whole.reference, most)
            delta = torch.randn_like(whole.site_outputs) * whole.site_outputs.float().square().mean().sqrt()
            wanted = whole.runner.inside.flatten().nonzero()[:, 0]
            close(once.runner.run(delta, wanted), whole.runner.run(delta, wanted), most)
        assert torch.equal(once.runner.mask, whole.runner.mask) and torch.equal(once.runner.ids, whole.runner.ids)
        for layer, states in whole.runner.caches.items():
            inside = whole.runner.mask[:, : whole.runner.prefix].bool()
            for part in ("keys", "values"):
                one, other = (getattr(s, part).transpose(1, 2)[inside] for s in (once.runner.caches[layer], states))
                close(one, other, most)


@pytest.mark.parametrize("kind, side", (("gpt2", "left"), ("llama", "right"), ("mistral", "left"), ("gemma2", "right")))
def test_values_are_those_of_the_serial_loop(kind, side, sharing):
    sharing(True)
    tokenizer, model = make_tokenizer(bos=True, side=side), make_model(kind)
    view = ModelView(model)
    prepared, hparams = prepared_and_hparams(model, tokenizer, "mlp", 1, v_num_grad_steps=3)
    assert shares_prefixes(view)
    values = find_values(view, prepared, 1, "mlp", hparams)
    assert max(serial_errors(values, prepared, model, view.mlp(1), hparams)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_outputs_are_those_of_whole_prompts(kind, sharing):
    """With writes between the layers, and with the keys of other tokens of bare prompts."""
    model = make_model(kind)
    view, site = ModelView(model), Site(3, "mlp")
    prepared = prepare(make_tokenizer(bos=True), VARIED_REQUESTS, PREFIXES, 128)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen, stored = [], []
    for is_on in (False, True):
        sharing(is_on)
        if is_on and not shares_prefixes(view):
            assert kind == "gptj"
            return
        model.load_state_dict(before)
        torch.manual_seed(0)
        passes = KeyPass(view, prepared, site, "bare_half", other_tokens=True)
        assert any(isinstance(part.batch, SharedRows) for part in passes.passes) == is_on
        results = []
        for layer in (0, 1, 3):
            results.append(passes.at(layer))
            with torch.no_grad():
                view.weight(layer).add_(torch.randn_like(view.weight(layer)) * 0.05)
        results.append(passes.outputs())
        seen.append(results)
        stored.append(passes.stored_bytes["device"])
    assert stored[1] < 0.9 * stored[0], "what enters a block is stored once, too"
    for whole, once in zip(*seen, strict=True):
        if isinstance(whole, torch.Tensor):
            close(once, whole, 2e-5)
            continue
        for part in ("keys", "bare_keys", "outputs", "other_keys"):
            close(getattr(once, part), getattr(whole, part), 2e-5)


@needs_experts
def test_mixtures_run_whole_prompts(sharing, caplog):
    caplog.set_level("INFO", logger="kedit_fast")
    sharing(True)
    view = ModelView(make_model("qwen3_moe"))
    rows, lookups = rows_of(make_tokenizer())
    assert shared_rows(view, rows, lookups) is None
    assert "run whole, also where many begin alike: it is a mixture of experts" in caplog.text


@pytest.mark.parametrize("kind", ("falcon", "bloom"))
def test_models_that_do_not_run_packed_run_whole_prompts(kind, sharing):
    model, tokenizer = tiny_decoder(kind), make_tokenizer()
    view = ModelView(model)
    sharing(True)
    rows, lookups = rows_of(tokenizer)
    assert not shares_prefixes(view) and shared_rows(view, rows, lookups) is None
    sites = (Site(1, "mlp"),)
    with evaluating(view):
        recorded = record_prompts(view, rows, lookups, sites)
        alone = record_prompts(view, [rows[1]], [lookups[1]], sites)
    torch.testing.assert_close(recorded.site_outputs[1], alone.site_outputs[0], rtol=1e-4, atol=1e-5)


def test_a_model_that_gives_other_states_in_one_row_runs_whole_prompts(sharing, monkeypatch, caplog):
    caplog.set_level("INFO", logger="kedit_fast")
    sharing(True)
    laid_out = SharedRows.laid_out
    monkeypatch.setattr(SharedRows, "laid_out", lambda self, states: 1.1 * laid_out(self, states))
    view = ModelView(make_model("llama"))
    assert not shares_prefixes(view) and "their states differ by" in caplog.text


def test_a_row_whose_states_are_not_finite_spoils_no_other(sharing):
    sharing(True)
    model = make_model("llama")
    view = ModelView(model)
    rows = [(5, 6, 7, 8, 9, 20 + i, 30) for i in range(4)]
    assert shares_prefixes(view)
    _ = view.head, pass_kind(view, (Site(1, "mlp"),))
    with torch.no_grad():
        model.get_input_embeddings().weight[21] = float("nan")
    with evaluating(view):
        recorded = record_prompts(view, rows, [5] * 4, (Site(1, "mlp"),), [0, 1, 2, 3])
    finite = torch.isfinite(recorded.site_outputs).all(2)[:, 0]
    assert finite.tolist() == [True, False, True, True] == torch.isfinite(recorded.reference).all(1).tolist()


def test_earlier_deltas_leave_prompts_whole(sharing):
    """Deltas of earlier chunks stand in the rows, so rows that begin alike do not have the same states there."""
    sharing(True)
    view = ModelView(make_model("llama"))
    rows = [(5, 6, 7, 8, 9, 20 + i) for i in range(3)]
    deltas = torch.randn(3, 1, 1, 32)
    fixed = FixedDeltas(torch.full((3, 1), 2), deltas)
    with evaluating(view):
        together = record_prompts(view, rows, [4] * 3, (Site(1, "mlp"),), [0], fixed)
        for i, row in enumerate(rows):
            alone = FixedDeltas(torch.tensor([[2]]), deltas[i : i + 1])
            recorded = record_prompts(view, [row], [4], (Site(1, "mlp"),), [0], alone)
            close(together.site_outputs[i], recorded.site_outputs[0], 2e-5)


@pytest.mark.parametrize("state", ("bfloat16 by default", "meta by default", "inference mode", "autocast bfloat16"))
def test_global_states_of_torch_change_nothing(state, sharing):
    sharing(True)
    view = ModelView(make_model("llama"))
    rows, lookups = rows_of(make_tokenizer())
    expected = record_prompts(view, rows, lookups, (Site(1, "mlp"),))
    other = ModelView(view.model)
    with STATES[state]():
        recorded = record_prompts(other, rows, lookups, (Site(1, "mlp"),))
    assert shares_prefixes(other) and torch.equal(recorded.site_outputs, expected.site_outputs)
