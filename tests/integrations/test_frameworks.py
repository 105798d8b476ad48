"""Under EasyEdit, memit and AlphaEdit: stand-ins of their calling code, written from their documented behaviour."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref

import pytest
import torch
from floors import relative_error
from framework_stand_ins import (
    CLOSED_FORMS,
    OWN,
    BaseEditor,
    alpha_hparams,
    asked,
    easyedit_name,
    hparams_of,
    same,
    state,
)
from support import NUMBERS, REQUESTS
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, NullSpace, collect_statistics
from kedit_fast.errors import EditError, InvalidArgumentError, MethodError, RequestError, StatisticsError
from kedit_fast.integrations import alphaedit, easyedit, memit, sessions
from kedit_fast.models.view import ModelView
from kedit_fast.solver.alphaedit_projector import save_projector
from kedit_fast.statistics import memit_npz


@pytest.fixture(scope="module")
def statistics():
    return collect_statistics(make_model("llama"), make_tokenizer(), TEXT * 2, (0, 1), progress=False)


@pytest.mark.parametrize("name", sorted({*CLOSED_FORMS, "FT"}))
def test_easyedits_editor_gets_each_edit_on_the_unedited_model(name, statistics):
    """Restored between requests: each one is what a new editor writes, to the bit; nothing of the others is left."""
    table, model, tok = {"FT": len}, make_model("llama"), make_tokenizer()
    before = state(model)
    easyedit.install(table)
    hparams = hparams_of(name)
    requests = [asked(request, number) for number, request in enumerate(REQUESTS)]
    seen = BaseEditor(table, hparams, model, tok).edit(requests, statistics=statistics)
    assert same(state(model), before)
    prefixes = sessions.session_of(model).editor.prefixes
    numbers, _ = sessions.parse_hparams(hparams)
    for request, found in zip(REQUESTS, seen, strict=True):
        other = make_model("llama")
        editor = Editor(
            other, tok, easyedit_name(name), statistics=statistics, hparams={**numbers, "on_predicted": "allow"},
            prefixes=prefixes,
        )  # fmt: skip
        editor.edit([request])
        editor.finish()
        assert found and all(torch.equal(tensor, other.get_parameter(key)) for key, tensor in found.items())
    easyedit.uninstall(table)
    assert table == {"FT": len}


def test_sequential_editing_goes_on_from_the_keys_of_earlier_batches(statistics):
    model, tok, hparams = make_model("llama"), make_tokenizer(), hparams_of("AlphaEdit")
    requests = [asked(request, number) for number, request in enumerate(REQUESTS)]
    BaseEditor(easyedit.ALGORITHMS, hparams, model, tok).edit(requests, sequential_edit=True, statistics=statistics)
    run = sessions.session_of(model)
    assert all(memory.count == 3 for memory in run.editor.solver_state.memories.values())
    other, (numbers, _) = make_model("llama"), sessions.parse_hparams(hparams)
    editor = Editor(
        other, tok, "alphaedit", statistics=statistics, hparams={**numbers, "on_predicted": "allow"},
        prefixes=run.editor.prefixes,
    )  # fmt: skip
    for request in REQUESTS:
        editor.edit([request])
    assert same(state(model), state(other))


def test_a_change_by_somebody_else_starts_anew_and_reset_cache_too(statistics):
    model, tok, hparams = make_model("llama"), make_tokenizer(), hparams_of("AlphaEdit")

    def call(number, **kwargs):
        easyedit.apply_AlphaEdit_to_model(
            model, tok, [asked(REQUESTS[number])], hparams, statistics=statistics, **kwargs
        )
        return sessions.session_of(model)

    first = call(0)
    assert call(1) is first and len(first.editor.ledger.batches) == 2
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] += 1
    second = call(2)
    assert second is not first and len(second.editor.ledger.batches) == 1
    third = call(0, reset_cache=True)
    assert third is not second
    hparams.L2 = 5
    assert call(1) is not third


def test_a_copy_is_edited_and_neither_it_nor_a_file_carries_the_run(statistics):
    model, tok, hparams = make_model("llama"), make_tokenizer(), hparams_of("MEMIT")
    before = state(model)
    edited, copies = easyedit.apply_memit_to_model(
        model, tok, [asked(REQUESTS[0])], hparams, copy=True, statistics=statistics
    )
    assert same(state(model), before) and not same(state(edited), before) and copies == {}
    assert sessions.session_of(model) is None and sessions.session_of(edited) is not None
    assert sessions.session_of(copy.deepcopy(edited)) is None
    buffer = io.BytesIO()
    torch.save(edited, buffer)
    buffer.seek(0)
    assert sessions.session_of(torch.load(buffer, weights_only=False)) is None


def test_a_model_that_is_gone_takes_its_run_along(statistics):
    model, tok = make_model("llama"), make_tokenizer()
    easyedit.apply_memit_to_model(model, tok, [asked(REQUESTS[0])], hparams_of("MEMIT"), statistics=statistics)
    editor = weakref.ref(sessions.session_of(model).editor)
    del model
    gc.collect()
    assert editor() is None


def test_a_failed_batch_leaves_the_model_and_the_run(statistics, monkeypatch):
    model, tok, hparams = make_model("llama"), make_tokenizer(), hparams_of("MEMIT")
    easyedit.apply_memit_to_model(model, tok, [asked(REQUESTS[0])], hparams, statistics=statistics)
    before, run = state(model), sessions.session_of(model)
    with pytest.raises(RequestError, match="stands 0 times"):
        easyedit.apply_memit_to_model(
            model, tok, [{**asked(REQUESTS[1]), "subject": "Nobody"}], hparams, statistics=statistics
        )
    assert same(state(model), before) and sessions.session_of(model) is run and run.reconcile()


def test_what_cannot_be_done_is_named(statistics, tmp_path):
    model, tok = make_model("llama"), make_tokenizer()

    def call(**more):
        hparams = hparams_of("MEMIT", **more)
        easyedit.apply_memit_to_model(model, tok, [asked(REQUESTS[0])], hparams)

    with pytest.raises(MethodError, match="unknown hyper-parameter 'v_momentum'"):
        call(v_momentum=1)
    with pytest.raises(MethodError, match=r"transformer\.h\.0\.mlp\.c_proj.*file of another model"):
        call(rewrite_module_tmp="transformer.h.{}.mlp.c_proj")
    with pytest.raises(MethodError, match="fact_token = 'last'"):
        call(fact_token="last")
    with pytest.raises(
        StatisticsError, match=r"no statistics for layers 0, 1 in nowhere/tiny/wikipedia_stats.*kedit-fast stats"
    ):
        call()
    with pytest.raises(RequestError):
        easyedit.apply_memit_to_model(model, tok, [{"prompt": "x"}], hparams_of("MEMIT"), statistics=statistics)


def test_files_of_easyedit_are_read_where_it_keeps_them(statistics, tmp_path):
    """A yaml by its path, target_new as CounterFact has it, npz statistics, and the projector that P_loc names."""
    import yaml

    folder = tmp_path / "stats" / "tiny" / "wikipedia_stats"
    folder.mkdir(parents=True)
    for second in statistics.layers.values():
        memit_npz.write(folder / f"{second.module}_float32_mom2_100.npz", second, {}, 100)
    spaces = {
        n: NullSpace.from_covariance(second.moment, 0.2, "energy", 1.0) for n, second in statistics.layers.items()
    }
    save_projector(tmp_path / "P.pt", spaces)
    values = {**vars(hparams_of("AlphaEdit")), "stats_dir": str(tmp_path / "stats")}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump({**values, "P_loc": str(tmp_path / "P.pt"), "stats_dir": "nowhere"})
    )
    record = {**asked(REQUESTS[0]), "target_new": {"str": REQUESTS[0].target_new, "id": "Q1"}}
    found = []
    for file in ("a.yaml", "p.yaml"):
        model = make_model("llama")
        torch.manual_seed(0)
        easyedit.apply_AlphaEdit_to_model(model, make_tokenizer(), [record], tmp_path / file)
        found.append(model.get_parameter("model.layers.1.mlp.down_proj.weight").detach())
    assert relative_error(found[1], found[0]) < 1e-6
    assert relative_error(found[0], make_model("llama").get_parameter("model.layers.1.mlp.down_proj.weight")) > 1e-4


# memit's repository


def test_a_run_of_the_memit_repository_goes_on(statistics, tmp_path, monkeypatch):
    """Its json, its statistics, and the values its first half kept: they are taken, not optimised again."""
    folder = tmp_path / "stats" / "tiny" / "wikipedia_stats"
    folder.mkdir(parents=True)
    for second in statistics.layers.values():
        memit_npz.write(folder / f"{second.module}_float32_mom2_100.npz", second, {}, 100)
    hparams = {k: v for k, v in vars(hparams_of("MEMIT")).items() if k not in ("alg_name", "device", "stats_dir")}
    template = str(tmp_path / "kvs" / "layer_{}_clamp_{}_case_{}.npz")
    (tmp_path / "kvs").mkdir()
    requests = [
        {"case_id": n, "prompt": r.prompt, "subject": r.subject, "target_new": {"str": r.target_new}}
        for n, r in enumerate(REQUESTS)
    ]

    def call(model):
        return memit.apply_memit_to_model(
            model, make_tokenizer(), requests, hparams, return_orig_weights=True, cache_template=template,
            stats_dir=str(tmp_path / "stats"),
        )  # fmt: skip

    model = make_model("llama")
    before = state(model)
    edited, copies = call(model)
    assert edited is model and len(list((tmp_path / "kvs").glob("*.npz"))) == 3
    assert all(torch.equal(value, before[name]) for name, value in copies.items()) and len(copies) == 2
    again = make_model("llama")
    monkeypatch.setattr("kedit_fast.editing.values.shared.find_values", None)  # nothing is optimised again
    call(again)
    monkeypatch.undo()
    for name in copies:
        assert relative_error(again.get_parameter(name), model.get_parameter(name)) < 1e-5
    assert all("_clamp_0.5_" in path.name for path in (tmp_path / "kvs").glob("*.npz"))


# AlphaEdit's repository


def test_alphaedits_state_is_the_callers(statistics, monkeypatch):
    tok, model, other = make_tokenizer(), make_model("llama"), make_model("llama")
    spaces = {
        n: NullSpace.from_covariance(second.moment, 0.2, "energy", 1.0) for n, second in statistics.layers.items()
    }
    P = torch.stack([space.project(torch.eye(space.size, dtype=torch.float64)) for space in spaces.values()]).float()
    records = [{"case_id": n, "prompt": r.prompt, "subject": r.subject, "target_new": {"str": r.target_new}}
               for n, r in enumerate(REQUESTS)]  # fmt: skip
    cache_c = torch.zeros_like(P)
    first, returned = alphaedit.apply_AlphaEdit_to_model(model, tok, records[:2], alpha_hparams(), cache_c=cache_c, P=P)
    assert first is model and returned is cache_c and bool((cache_c != 0).any())
    between, kept, prefixes = state(model), cache_c.clone(), sessions.session_of(model).editor.prefixes
    alphaedit.apply_AlphaEdit_to_model(model, tok, records[2:], alpha_hparams(), cache_c=cache_c, P=P)
    memories = sessions.session_of(model).editor.solver_state.memories
    assert all(memory.count == 3 for memory in memories.values())  # the exact memory went on

    # Another process: weights, cache_c and P are all there is.
    other.load_state_dict(between)
    monkeypatch.setattr("kedit_fast.editing.editor.generate_prefixes", lambda *args: prefixes)
    alphaedit.apply_AlphaEdit_to_model(other, tok, records[2:], alpha_hparams(), cache_c=kept, P=P)
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        moved, expected = other.get_parameter(name) - between[name], model.get_parameter(name) - between[name]
        assert relative_error(moved, expected) < 2e-3  # cache_c is float32
    assert relative_error(kept, cache_c) < 1e-5
    view = ModelView(model)
    numbers, _ = sessions.parse_hparams(alpha_hparams())
    plain = Editor(make_model("llama"), tok, "alphaedit", null_spaces=spaces, hparams=numbers, prefixes=prefixes)
    plain.edit([*REQUESTS[:2]])
    for layer in (0, 1):
        assert relative_error(between[view.weight_name(layer)], plain.view.weight(layer)) < 1e-5


def test_alphaedits_state_wins_over_what_the_model_carries(statistics, monkeypatch):
    """Weights put back, cache_c not; P with other numbers: what the caller passes is what counts."""
    tok, model = make_tokenizer(), make_model("llama")
    spaces = {
        n: NullSpace.from_covariance(second.moment, 0.2, "energy", 1.0) for n, second in statistics.layers.items()
    }
    P = torch.stack([space.project(torch.eye(space.size, dtype=torch.float64)) for space in spaces.values()]).float()
    before, cache_c = state(model), torch.zeros_like(P)
    records = [asked(request, number) for number, request in enumerate(REQUESTS)]
    alphaedit.apply_AlphaEdit_to_model(model, tok, records[:2], alpha_hparams(), cache_c=cache_c, P=P)
    model.load_state_dict(before)
    alphaedit.apply_AlphaEdit_to_model(model, tok, records[2:], alpha_hparams(), cache_c=cache_c, P=P)
    memory = sessions.session_of(model).editor.solver_state.memories[0]
    assert memory.sizes == (0, 1)  # from the sum, which still has two
    before, kept = state(model), cache_c.clone()
    with monkeypatch.context() as patched:
        patched.setattr(alphaedit, "_key_sums", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            alphaedit.apply_AlphaEdit_to_model(model, tok, records[:1], alpha_hparams(), cache_c=cache_c, P=P)
    assert same(state(model), before) and torch.equal(cache_c, kept)
    cache_c.numpy()[:] = 0  # torch sees nothing of it
    alphaedit.apply_AlphaEdit_to_model(model, tok, records[:1], alpha_hparams(), cache_c=cache_c, P=P)
    assert sessions.session_of(model).editor.solver_state.memories[0].sizes == (1,)
    alphaedit.apply_AlphaEdit_to_model(model, tok, records[:1], alpha_hparams(v_lr=0.2), cache_c=cache_c, P=P)
    space = sessions.session_of(model).editor.preconditioner(0)
    assert space.rule == "projection"


def test_scripts_may_hang_things_on_hyper_parameters_and_ultraedit_needs_no_subject(statistics):
    import dataclasses

    values = vars(hparams_of("ULTRAEDIT"))
    made = dataclasses.make_dataclass("UltraEditHyperParams", list(values))
    hparams = made(**values)
    hparams.api_key = "secret"
    records = [{"prompt": "What does Miles Davis, or just Davis play?", "target_new": "violin"},
               {"prompt": "Who is Davis? Davis", "subject": "Davis", "target_new": "a player"}]  # fmt: skip
    model = make_model("llama")
    before = state(model)
    easyedit.apply_ultraedit_to_model(model, make_tokenizer(), records, hparams)
    assert not same(state(model), before) and "secret" not in str(sessions.session_of(model).key)
    with pytest.raises(RequestError, match="no 'subject'"):
        easyedit.apply_memit_to_model(model, make_tokenizer(), records, hparams_of("MEMIT"), statistics=statistics)


def test_prompts_without_a_subject_are_edited_as_they_stand(statistics):
    """No word of them becomes a subject, and no {} is lost: one that is text is refused, or stands in a subject."""
    model, tok, code = make_model("llama"), make_tokenizer(), 'print("{}".format(x)) prints'
    before = state(model)
    with pytest.raises(RequestError, match=r"no 'subject'.*for the \{\} of its prompt.*where \{\} is text, write"):
        easyedit.apply_ultraedit_to_model(model, tok, [{"prompt": code, "target_new": "x"}], hparams_of("ULTRAEDIT"))
    assert same(state(model), before)
    records = [{"prompt": "What does Davis play?", "target_new": "violin"},
               {"prompt": code, "subject": "{}", "target_new": "violin"},
               {"prompt": "Davis and Davis play", "subject": "Davis", "target_new": "violin"}]  # fmt: skip
    easyedit.apply_ultraedit_to_model(model, tok, records, hparams_of("ULTRAEDIT"))
    written = sessions.session_of(model).editor._written[1]
    assert [request.text for request in written] == [record["prompt"] for record in records]
    assert [request.subject for request in written] == [None, "{}", None]


CODE = {"prompt": "Davis (", "subject": "Davis", "target_new": "violin", "case_id": 0}  # no space before the target


@pytest.mark.parametrize("module", ("memit", "alphaedit", "alphaedit, sequential", "easyedit"))
def test_what_stands_before_targets_is_chosen_by_hyper_parameter_attribute_or_argument(module, statistics):
    call, name = {
        "memit": (memit.apply_memit_to_model, "MEMIT"),
        "alphaedit": (alphaedit.apply_AlphaEdit_to_model, "AlphaEdit"),
        "alphaedit, sequential": (alphaedit.apply_memit_seq_to_model, "MEMIT-Seq"),
        "easyedit": (easyedit.apply_memit_to_model, "MEMIT"),
    }[module]
    tok, written = make_tokenizer(), {}
    for way in ("auto", "file", "attribute", "argument", "argument over file"):
        model, hparams = make_model("llama"), hparams_of(name, v_num_grad_steps=1)
        if way == "attribute":
            hparams.target_separator = " "
        elif way != "auto":
            hparams = {**vars(hparams), **({} if way == "argument" else {"target_separator": " "})}
        wanted = {"argument": " ", "argument over file": ""}.get(way)
        more = {} if wanted is None else {"target_separator": wanted}
        call(model, tok, [CODE], hparams, statistics=statistics, **more)
        editor = sessions.session_of(model).editor
        written[way] = (editor.target_separator, editor.check([{k: CODE[k] for k in list(CODE)[:3]}])[0][0].separator)
    space = (" ", " ")
    assert written == {"auto": ("auto", ""), "file": space, "attribute": space, "argument": space,
                       "argument over file": ("", "")}  # fmt: skip


def test_install_chooses_what_stands_before_targets_and_wrong_choices_are_named(statistics):
    table, model, tok, hparams = {}, make_model("llama"), make_tokenizer(), hparams_of("MEMIT", v_num_grad_steps=1)
    easyedit.install(table, target_separator=" ")
    table["MEMIT"](model, tok, [CODE], hparams, statistics=statistics)
    assert sessions.session_of(model).editor.target_separator == " "
    table["MEMIT"](model, tok, [CODE], hparams, statistics=statistics, target_separator="auto")
    assert (
        sessions.session_of(model).editor.target_separator == "auto"
    )  # another editor: what was asked for is part of a run
    easyedit.uninstall(table)
    with pytest.raises(MethodError, match='target_separator must be "auto", " " or ""; got'):
        easyedit.install(table, target_separator="  ")
    with pytest.raises(MethodError, match='target_separator must be "auto", " " or ""; got'):
        memit.apply_memit_to_model(model, tok, [CODE], {**vars(hparams), "target_separator": 1}, statistics=statistics)
    with pytest.raises(MethodError, match="puts a space before every target"):
        easyedit.apply_ultraedit_to_model(
            model, tok, [CODE], hparams_of("ULTRAEDIT"), ultraedit_rows="easyedit", target_separator=""
        )
    assert table == {}


@pytest.mark.parametrize(
    "first, then",
    (
        ({}, {"ultraedit_rows": "easyedit"}),
        ({"statistics_text": "a.txt"}, {}),
        ({"target_separator": " "}, {"target_separator": ""}),
        ({"statistics_text": ["One."]}, {"statistics_text": ["Two."]}),
    ),
)
def test_a_second_install_with_other_options_says_to_uninstall_first(first, then):
    table = {"FT": len}
    easyedit.install(table, **first)
    held = dict(table)
    easyedit.install(table, **copy.deepcopy(first))  # the same is nothing
    with pytest.raises(MethodError, match=r"installed already with .*uninstall\(\) first"):
        easyedit.install(table, **then)
    assert table == held
    easyedit.uninstall(table)
    easyedit.install(table, **then)
    easyedit.uninstall(table)
    assert table == {"FT": len}


def test_a_model_that_was_cast_starts_anew(statistics):
    model, tok, hparams = make_model("llama"), make_tokenizer(), hparams_of("MEMIT")
    easyedit.apply_memit_to_model(model, tok, [asked(REQUESTS[0])], hparams, statistics=statistics)
    model.to(torch.bfloat16)
    before = state(model)
    easyedit.apply_memit_to_model(model, tok, [asked(REQUESTS[1])], hparams, statistics=statistics)
    assert not same(state(model), before)


def test_memit_seq_and_rect(statistics):
    tok, model = make_tokenizer(), make_model("llama")
    numbers = {k: v for k, v in alpha_hparams().items() if k not in OWN["AlphaEdit"]}
    records = [asked(request, number) for number, request in enumerate(REQUESTS)]
    _, cache_c = alphaedit.apply_memit_seq_to_model(model, tok, records[:2], numbers, statistics=statistics)
    assert cache_c.shape == (2, 64, 64) and cache_c.dtype == torch.float32
    before = cache_c.clone()
    alphaedit.apply_memit_seq_to_model(model, tok, records[2:], numbers, cache_c=cache_c, statistics=statistics)
    assert not torch.equal(before, cache_c)
    with pytest.raises(InvalidArgumentError, match="copy=True"):
        alphaedit.apply_memit_seq_to_model(model, tok, records, numbers, copy=True, statistics=statistics)
    with pytest.raises(InvalidArgumentError, match=r"cache_c must be \[2, 64, 64\]"):
        alphaedit.apply_memit_seq_to_model(model, tok, records, numbers, cache_c=before[:1], statistics=statistics)
    rect, copies = alphaedit.apply_memit_rect_to_model(
        make_model("llama"), tok, records, numbers, return_orig_weights=True, statistics=statistics
    )
    for name, value in copies.items():
        changed = float((rect.get_parameter(name) != value).float().mean())
        assert 0.3 < changed < 0.5


# What they stand on


def test_an_editor_names_unused_fields_once_and_not_at_each_edit(statistics, caplog):
    editor = Editor(make_model("llama"), make_tokenizer(), "memit", statistics=statistics, layers=(0, 1),
                    hparams={**NUMBERS, "v_num_grad_steps": 1}, prefixes=("The old tower. ",))  # fmt: skip
    logger = logging.getLogger("kedit_fast")
    propagates, logger.propagate = logger.propagate, True
    try:
        for number, request in enumerate(REQUESTS):
            beside = {"comment": "x"} | ({"n": 1} if number else {})
            editor.edit([asked(request, number) | beside])
    finally:
        logger.propagate = propagates
    lines = [r.getMessage() for r in caplog.records if "unknown fields" in r.message]
    assert len(lines) == 2 and "'comment'" in lines[0] and "'n'" in lines[1] and "'comment'" not in lines[1]


def test_rollback_of_what_was_restored_by_somebody_else_is_checked(statistics):
    model = make_model("llama")
    editor = Editor(model, make_tokenizer(), "memit", statistics=statistics, layers=(0, 1), hparams=NUMBERS,
                    prefixes=("The old tower. ",))  # fmt: skip
    before = state(model)
    editor.edit(REQUESTS[:1])
    between = state(model)
    editor.edit(REQUESTS[1:])
    after = state(model)
    model.load_state_dict(before)
    with pytest.raises(EditError, match="not what it was before the batches"):
        editor.rollback(1, restored=True)
    assert same(state(model), before) and len(editor.ledger.batches) == 2
    model.load_state_dict(between)
    editor.rollback(1, restored=True)
    assert same(state(model), between) and len(editor.ledger.batches) == 1
    editor.edit(REQUESTS[1:])
    for name, tensor in after.items():
        assert relative_error(state(model)[name], tensor) < 1e-6
    editor.restore()
    assert same(state(model), before)
