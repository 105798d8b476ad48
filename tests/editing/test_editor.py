from __future__ import annotations

import json

import pytest
import torch
import transformers
from floors import relative_error
from support import PREFIXES, REQUESTS, make_editor, same, weights
from tiny_models import KINDS, POST_NORM, make_model, make_tokenizer

from kedit_fast import Editor, EditRequest, demo, load_requests
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import EditError, KeditError, MethodError, RequestError, StatisticsError
from kedit_fast.evaluation.metrics import evaluate_each, shares
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.reports.plan import plan
from kedit_fast.reports.suggest import suggest
from kedit_fast.requests.prompts import prepare


@pytest.mark.parametrize("kind", KINDS)
def test_memit_is_the_published_dense_update_layer_by_layer(kind):
    """Transcribed from the published loop: R / layers left, (lambda C + K K^T)^-1 K, in fp64, on an fp64 model."""
    if kind == "gpt2" and tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56):
        pytest.skip("GPT-2 in float64 overflows in this transformers' own attention mask")
    editor = make_editor(kind, dtype=torch.float64)
    expected, other = editor.view, ModelView(make_model(kind, torch.float64))
    prepared = prepare(editor.tokenizer, REQUESTS, PREFIXES, 128)
    site = Site(1, "mlp" if kind in POST_NORM else "block")
    assert editor.value_sites == site.kind
    targets = find_values(other, prepared, 1, site.kind, editor.hparams).targets
    result = editor.edit(REQUESTS)
    for i, layer in enumerate((0, 1)):
        seen = KeyPass(other, prepared, site, "bare_half").at(layer)
        keys, residual = seen.keys, (targets - seen.outputs) / (2 - i)
        moment = editor.statistics.moment(layer).moment
        moment = moment + 1e-3 * moment.diagonal().mean() * torch.eye(64, dtype=torch.float64)
        delta = residual @ torch.linalg.solve(10.0 * moment + keys @ keys.T, keys).T
        other.weight(layer).add_(delta)
        assert relative_error(expected.weight(layer), other.weight(layer)) < 1e-9
        assert (
            abs(
                result.relative_norms[expected.weight_name(layer)]
                - float(delta.norm() / (other.weight(layer) - delta).norm())
            )
            < 1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_edited_model_has_the_loss_that_the_optimiser_predicts(kind):
    """One layer, rho towards 0, a prompt that is one token: then the write and nothing else moves the output."""
    tokenizer, model = make_tokenizer(), make_model(kind)
    numbers = dict(v_num_grad_steps=8, v_lr=0.1, clamp_norm_factor=0.6, kl_factor=0.0, v_weight_decay=0.0,
                   mom2_adjustment=False, mom2_update_weight=1e-7)  # fmt: skip
    editor = Editor(model, tokenizer, "memit", layers=[1], hparams=numbers, prefixes=())
    request = EditRequest("{}", "I", "is")
    (prepared,), _ = editor.check([request])
    (prompt,), (target,) = prepared.rewriting[0].ids, prepared.target

    def loss():
        return -float(torch.log_softmax(model(torch.tensor([[prompt]]), use_cache=False).logits[0, 0], -1)[target])

    with torch.no_grad():
        before = loss()
        predicted = editor.edit([request]).losses[0]
        assert predicted < before - 0.05
        assert abs(loss() - predicted) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_half_the_bare_prompt_and_half_the_mean_of_the_prefixed(kind):
    tokenizer, model = make_tokenizer(bos=True), make_model(kind)
    view = ModelView(model)
    (prepared,) = prepare(tokenizer, REQUESTS[:1], PREFIXES, 128)
    keys = []
    for prompt in prepared.rewriting:
        hook = view.edited_module(1).register_forward_pre_hook(
            lambda m, a, prompt=prompt: keys.append(a[0][0, prompt.lookup].double())
        )
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
        hook.remove()
    half = KeyPass(view, [prepared], Site(1, "block"), "bare_half").at(1)
    mean = KeyPass(view, [prepared], Site(1, "mlp"), "mean").at(1)
    torch.testing.assert_close(half.keys[:, 0], (keys[0] + (keys[1] + keys[2]) / 2) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean.keys[:, 0], torch.stack(keys).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean.bare_keys[:, 0], keys[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rome_makes_the_bare_prompt_say_the_value(kind):
    editor = make_editor(kind, "rome")
    prepared = prepare(editor.tokenizer, REQUESTS[:1], PREFIXES, 128)
    value = find_values(editor.view, prepared, 1, "mlp", editor.hparams).targets
    result = editor.edit(REQUESTS[:1])
    seen = KeyPass(editor.view, prepared, Site(1, "mlp"), "mean").at(1)
    assert relative_error(seen.outputs, value) < 1e-4
    assert result.residual < 1e-6 and result.updates[editor.view.weight_name(1)][0].rank == 1


@pytest.mark.parametrize("method", ("memit", "rome"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_sequential_edits_roll_back_to_the_bit(method, dtype):
    editor = make_editor("gpt2", method, dtype)
    snapshots = [weights(editor)]
    for request in REQUESTS:
        editor.edit([request])
        snapshots.append(weights(editor))
        assert not same(editor, snapshots[-2])
    editor.rollback()
    assert same(editor, snapshots[2])
    editor.rollback(2)
    assert same(editor, snapshots[0])
    editor.edit(REQUESTS)
    editor.restore()
    assert same(editor, snapshots[0])


@pytest.mark.parametrize("layer", (0, 1))
@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_a_failure_at_any_layer_leaves_the_model_as_it_was(monkeypatch, layer, error):
    editor = make_editor()
    editor.edit(REQUESTS[:1])
    before = weights(editor)
    real = editor.ledger.write

    def failing(name, weight, update):
        real(name, weight, update)
        if name == editor.view.weight_name(layer):
            raise error("injected")

    monkeypatch.setattr(editor.ledger, "write", failing)
    with pytest.raises(error):
        editor.edit(REQUESTS[1:])
    assert same(editor, before) and len(editor.ledger.batches) == 1
    monkeypatch.setattr(editor.ledger, "write", real)
    editor.edit(REQUESTS[1:])
    editor.restore()


def test_two_editors_share_nothing():
    first, second = make_editor(), make_editor()
    first.edit(REQUESTS)
    assert second.ledger.batches == [] and not same(second, weights(first))


def test_bad_input_is_named_and_changes_nothing():
    editor = make_editor()
    before = weights(editor)
    with pytest.raises(EditError, match="no requests"):
        editor.edit([])
    with pytest.raises(RequestError, match="request 2 has no 'subject'"):
        editor.edit([{"prompt": "{} is", "subject": "x", "target_new": "y"}, {"prompt": "{} is", "target_new": "y"}])
    model, tokenizer = editor.view.model, editor.tokenizer
    with pytest.raises(StatisticsError, match="needs statistics for layers 0, 1"):
        Editor(model, tokenizer, "memit", layers=(0, 1))
    with pytest.raises(StatisticsError, match="no statistics for layer 2"):
        Editor(model, tokenizer, "memit", layers=(2,), statistics=editor.statistics)
    with pytest.raises(MethodError, match="v_loss_layer"):
        Editor(model, tokenizer, "rome", layers=(0,), hparams={"v_loss_layer": 1, "mom2_adjustment": False})
    with pytest.raises(KeditError, match="layer 7"):
        Editor(model, tokenizer, "rome", layers=(7,), hparams={"mom2_adjustment": False})
    assert same(editor, before)


def test_a_nan_in_the_model_stops_the_edit_before_any_write():
    editor = make_editor()
    with torch.no_grad():
        editor.view.model.lm_head.weight[3] = float("nan")
    before = editor.view.weight(0).clone()
    with pytest.raises(KeditError, match="not finite"):
        editor.edit(REQUESTS)
    assert torch.equal(editor.view.weight(0), before) and not editor.ledger.batches


LONG = EditRequest("{} " + "is " * 200, "Ebro", "Spain", id="long")
SPECIAL = EditRequest("{} is", "Ebro", "</s>", id="special")


def nothing_of_the_subject(editor):
    """A tokenizer that drops a character, and a request whose subject is that character."""
    from tokenizers import normalizers

    editor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u00a7", "")
    return EditRequest("{} is in", "\u00a7", "Spain", id="empty")


@pytest.mark.parametrize("method", ("memit", "rome"))
def test_requests_that_cannot_be_written_are_all_named_before_any_write(method):
    editor = make_editor(method=method)
    before = weights(editor)
    empty = nothing_of_the_subject(editor)
    with pytest.raises(RequestError) as caught:
        editor.edit([REQUESTS[0], LONG, SPECIAL, empty, {"prompt": "{} is", "subject": "Ebro", "target_new": ""}])
    for said in ("request 'long'", "the model takes 128", "'special'", "special token", "'empty'", "no tokens",
                 "request 5", "target_new must be a non-empty text"):  # fmt: skip
        assert said in str(caught.value)
    assert same(editor, before) and not editor.ledger.batches


@pytest.mark.parametrize("method", ("memit", "rome"))
def test_skipped_requests_leave_the_update_of_the_others(method):
    editor, other = make_editor(method=method), make_editor(method=method)
    empty = nothing_of_the_subject(editor)
    mixed = [LONG, REQUESTS[0], empty, REQUESTS[1], REQUESTS[2], SPECIAL]
    result = editor.edit(mixed, on_error="skip")
    other.edit(REQUESTS)
    assert same(editor, weights(other))
    assert list(result.skipped) == [0, 2, 5] and "'long'" in result.skipped[0]
    assert result.requests == tuple(REQUESTS) and len(result.losses) == 3
    nothing = editor.edit([LONG], on_error="skip")
    assert nothing.requests == () and nothing.batch == 0 and list(nothing.skipped) == [0] and not nothing.updates
    assert len(editor.ledger.batches) == 1, "nothing written is no batch"
    with pytest.raises(MethodError, match="raise or skip"):
        editor.edit(REQUESTS, on_error="ignore")


@pytest.mark.parametrize("method", ("memit", "rome"))
def test_a_target_that_is_said_already_is_named_skipped_or_allowed(method):
    from dataclasses import replace

    editor = make_editor(method=method, v_stop_loss=1e9)  # every loss is below
    before = weights(editor)
    with pytest.raises(RequestError, match=r"Miles Davis.*says the target already"):
        editor.edit(REQUESTS)
    assert same(editor, before)
    nothing = editor.edit(REQUESTS, on_error="skip")
    assert list(nothing.skipped) == [0, 1, 2] and nothing.losses == ()
    assert same(editor, before) and not editor.ledger.batches
    editor.hparams = replace(editor.hparams, on_predicted="allow")
    result = editor.edit(REQUESTS)  # as published: a value without a delta
    assert result.steps == (0, 0, 0) and not result.skipped


def test_a_nan_for_one_request_is_skipped_and_named():
    editor, other = make_editor(), make_editor()
    ids = [set(sum((p.ids for p in (*r.rewriting, r.kl)), ()) + r.target) for r in editor.check(REQUESTS)[0]]
    (token, *_) = ids[0] - ids[1] - ids[2]
    with torch.no_grad():
        for one in (editor, other):
            one.view.model.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(RequestError, match=r"Miles Davis.*not finite"):
        editor.edit(REQUESTS)
    result = editor.edit(REQUESTS, on_error="skip")
    other.edit(REQUESTS[1:])
    assert list(result.skipped) == [0] and result.requests == tuple(REQUESTS[1:])
    for layer in (0, 1):  # the skipped one's place in the batches changes roundings on some processors
        torch.testing.assert_close(editor.view.weight(layer), other.view.weight(layer), rtol=1e-4, atol=1e-6)


def test_a_generator_is_used_once_and_a_single_record_or_a_path_is_refused():
    editor, other = make_editor(), make_editor()
    records = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in REQUESTS]
    assert editor.edit(record for record in records).requests == tuple(REQUESTS)
    other.edit(REQUESTS)
    assert same(editor, weights(other))
    with pytest.raises(EditError, match="no requests"):
        editor.edit(iter(()))
    for wrong, message in ((records[0], "put one record in a list"), (REQUESTS[0], "put it in a list"),
                           ("r.json", "load_requests"), (3, "got int")):  # fmt: skip
        for call in (editor.edit, editor.check, lambda r: shares(editor.view.model, editor.tokenizer, r)):
            with pytest.raises(RequestError, match=message):
                call(wrong)
    assert same(editor, weights(other))


def test_plan_and_suggest_take_a_generator_of_mappings_and_refuse_what_is_none():
    editor = make_editor()
    model, tokenizer = editor.view.model, editor.tokenizer
    records = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in REQUESTS]
    common = dict(
        hparams={"layers": (0, 1), "mom2_adjustment": False, "v_num_grad_steps": 2, "clamp_norm_factor": 0.75}
    )
    found = plan(
        model, tokenizer, 3, requests=(record for record in [*records, {"prompt": "{}"}]), on_error="skip", **common
    )
    assert found.seconds is not None and list(found.skipped) == [3] and found.as_dict()["skipped"][0]["record"] == 4
    no_subject = [{"prompt": "It is", "target_new": "x"}]
    for wrong, message in (
        (records[0], "put one record in a list"),
        ("r.json", "load_requests"),
        (no_subject, "no 'subj"),
    ):
        with pytest.raises(RequestError, match=message):
            plan(model, tokenizer, 3, requests=wrong, **common)
        with pytest.raises(RequestError, match=message):
            suggest(model, tokenizer, wrong, last_layers=(1,), **common)
    known = [
        {**record, "id": "known", "target_new": "\u00a7" if i else record["target_new"]}
        for i, record in enumerate(records)
    ]
    nothing_of_the_subject(editor)  # the tokenizer drops that character now
    with pytest.raises(MethodError, match="none of"):  # a random model learns nothing, but all of it was tried
        suggest(model, tokenizer, iter(known), last_layers=(1,), on_error="skip", **common)


def test_what_a_file_had_to_leave_out_is_in_the_result_by_its_number(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"prompt": "{} is"}\n'
        + "\n".join(
            json.dumps({"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new}) for r in REQUESTS
        )
        + '\n{"prompt": "{} is", "subject": "Ebro", "target_new": "</s>"}\n'
    )
    records = load_requests(path, "skip")
    editor = make_editor()
    result = editor.edit(records, "skip")
    assert list(result.skipped) == [0, 4] and result.requests == tuple(REQUESTS)
    assert "record 1 has no" in result.skipped[0] and "request 5: the target" in result.skipped[4]
    with pytest.raises(RequestError) as caught:
        editor.edit(records)
    assert "request 5" in str(caught.value) and "record 1" not in str(caught.value)


def test_a_request_keeps_its_number_when_one_before_it_is_malformed():
    editor = make_editor()
    with pytest.raises(RequestError) as caught:
        editor.edit([{"prompt": "{} is", "subject": "Ebro"}, EditRequest("{} is", "Ebro", "</s>")])
    assert "request 1" in str(caught.value) and "request 2: the target '</s>' holds a special" in str(caught.value)


def test_run_edits_takes_a_generator_and_numbers_what_it_skips(demo_model):
    from kedit_fast.workflow import run_edits

    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = demo.requests(2)
    long = EditRequest("{} " + "is " * 400, "Ebro", "Spain", id="long")
    records = [{"prompt": "{} is"}, first, long, {"prompt": second.prompt, "subject": second.subject,
               "target_new": second.target_new, "rephrase_prompt": second.paraphrase_prompts[0]}]  # fmt: skip
    common = dict(statistics=None, hparams={"v_num_grad_steps": 2, "clamp_norm_factor": 0.75, "mom2_adjustment": False})
    with pytest.raises(RequestError, match=r"request 1 has no(.*\n)*request 'long'"):
        run_edits(model, tokenizer, iter(records), "memit", **common)
    try:
        report = run_edits(model, tokenizer, iter(records), "memit", on_error="skip", **common)
    finally:
        model.load_state_dict(before)
    assert report.edits == 2 and list(report.skipped) == [0, 2] and report.after.paraphrase is not None
    assert [skipped["record"] for skipped in report.as_dict()["skipped"]] == [1, 3]


def test_a_batch_of_which_nothing_is_left_does_not_stop_the_next(demo_model):
    from dataclasses import replace

    from kedit_fast.workflow import run_edits

    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second, third = demo.requests(3)
    known = replace(second, target_new=second.target_true, target_true=None)
    numbers = {"v_num_grad_steps": 4, "clamp_norm_factor": 0.75, "mom2_adjustment": False}
    common = dict(statistics=None, hparams=numbers, batch_size=1)
    try:
        report = run_edits(model, tokenizer, [first, known, third], "memit", on_error="skip", **common)
        assert list(report.skipped) == [1] and report.edits == 2 and len(report.results) == 3
    finally:
        model.load_state_dict(before)
    with pytest.raises(RequestError, match="says the target already"):
        run_edits(model, tokenizer, [first, known, third], "memit", **common)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "all or nothing"
    unasked = replace(third, paraphrase_prompts=("word " * 400,))
    report = run_edits(model, tokenizer, [first, unasked], "memit", on_error="skip", **common)
    model.load_state_dict(before)
    assert list(report.skipped) == [1] and "the model takes" in report.skipped[1]


def test_metrics_that_compare_with_the_state_between_batches_are_measured_there(demo_model):
    from dataclasses import replace

    from kedit_fast.workflow import run_edits

    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    there = replace(demo.requests(1)[0], group="round", id="there")
    back = replace(there, target_new=there.target_true, target_true=there.target_new, id="back")
    numbers = {"v_num_grad_steps": 12, "clamp_norm_factor": 0.75, "mom2_adjustment": False, "on_predicted": "allow"}
    try:
        report = run_edits(
            model, tokenizer, [there, back], "memit", statistics=None, hparams=numbers, batch_size=1, metrics="pit.CM"
        )
    finally:
        model.load_state_dict(before)
    measured = report.evaluation.metrics["pit.CM"].states["final"]
    assert measured.records == 1 and measured.value > 0.5  # the second edit undid the first one


def test_an_interrupt_in_the_values_leaves_everything_as_it_was(monkeypatch):
    from kedit_fast.editing.values import loop

    editor = make_editor()
    before = weights(editor)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.ValueOptimizer, "_adam_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(REQUESTS)
    assert same(editor, before) and not editor.ledger.batches
    assert all(p.requires_grad for p in editor.view.model.parameters())


CHAT = "{% for m in messages %}<s>user: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"


def make_bos_editor(tokenizer, editor):
    """The editor with a tokenizer that puts BOS before every text, of the same chat template."""
    from kedit_fast.requests.chat import chat_format

    other = make_tokenizer(bos=True)
    other.chat_template = tokenizer.chat_template
    made = Editor(editor.view.model, other, "memit", layers=[1], prefixes=(), hparams={"mom2_adjustment": False},
                  prompt_format=chat_format(other))  # fmt: skip
    return made


def test_a_chat_is_edited_where_its_subject_stands():
    from kedit_fast.requests.chat import chat_format

    editor = make_editor()
    tokenizer = editor.tokenizer
    with pytest.raises(RequestError, match="no chat template"):
        chat_format(tokenizer)
    tokenizer.chat_template = CHAT
    editor.prompt_format = chat_format(tokenizer)
    prepared, _ = editor.check(REQUESTS)
    for request, record in zip(prepared, REQUESTS, strict=True):
        bare, prefixed = request.rewriting[0], request.rewriting[1]
        assert tokenizer.decode(bare.ids) == f"<s>user: {record.text}</s>bot:"
        assert tokenizer.decode(prefixed.ids) == f"<s>user: {PREFIXES[0]}{record.text}</s>bot:"
        assert bare.ids.count(tokenizer.bos_token_id) == 1  # not once more by the tokenizer
        upto = tokenizer.decode(bare.ids[: bare.lookup + 1])
        assert upto.endswith(record.subject) or record.subject in upto
        assert tokenizer.decode(request.target) == " " + record.target_new
    measured = []
    for _ in range(2):
        seen = evaluate_each(editor.view.model, tokenizer, REQUESTS, prompt_format=editor.prompt_format)
        measured.append([s.new.log_prob for s in seen])
        editor.edit(REQUESTS)
    assert sum(measured[1]) > sum(measured[0]), "the answers to the chat should be more probable"
    tokenizer.chat_template = "\n" + CHAT  # what stands before the first special token does not hide it
    (request, *_), _ = make_bos_editor(tokenizer, editor).check(REQUESTS)
    assert request.rewriting[0].ids.count(tokenizer.bos_token_id) == 1
    editor.prompt_format = lambda prompt: "no place"
    with pytest.raises(RequestError, match=r"must keep the \{\}"):
        editor.edit(REQUESTS)


def test_same_subjects_are_reported():
    editor = make_editor()
    twice = [REQUESTS[0], EditRequest("{} plays the", "Miles Davis", "piano"), REQUESTS[1]]
    assert (0, 1) in editor.edit(twice).collisions


def test_memit_teaches_the_demo_model(demo_model, demo_statistics):
    """20 facts in one batch, then 5 more on top: new answers, old neighbours, and the way back."""
    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requests = demo.requests(25)
    editor = Editor(model, tokenizer, "memit", statistics=demo_statistics)
    try:
        start = shares(model, tokenizer, requests)
        assert start.efficacy <= 0.05 and start.neighborhood >= 0.95
        editor.edit(requests[:20])
        editor.edit(requests[20:])
        after = shares(model, tokenizer, requests)
        assert after.efficacy >= 0.9 and after.efficacy_success >= 0.95 and after.paraphrase >= 0.75
        assert after.neighborhood >= 0.85 * start.neighborhood
    finally:
        editor.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
