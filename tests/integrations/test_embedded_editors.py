"""What users of EasyEdit, memit and AlphaEdit need beside the functions: statistics made on first use, EasyEdit's other
tables, its own UltraEdit rows, caches, and no words about what we set ourselves."""

from __future__ import annotations

import enum
import json
import logging
import sys
import types

import pytest
import torch
import yaml
from floors import relative_error
from framework_stand_ins import CLOSED_FORMS, OWN, alpha_hparams, asked, hparams_of, null_spaces, same, state
from support import REQUESTS
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, collect_statistics
from kedit_fast.editing.keys import KeyPass
from kedit_fast.errors import EditError, MethodError, StatisticsError
from kedit_fast.integrations import alphaedit, easyedit, memit, sessions
from kedit_fast.integrations import framework_statistics as kept
from kedit_fast.models.forward import Site
from kedit_fast.requests.prompts import prepare
from kedit_fast.statistics import memit_npz
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.resumable import collect_into

DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def statistics():
    return collect_statistics(make_model("llama"), make_tokenizer(), TEXT * 2, (0, 1))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXT * 2) + "\n", encoding="utf-8")
    return path


def records(requests=REQUESTS):
    return [{"case_id": n, "prompt": r.prompt, "subject": r.subject, "target_new": {"str": r.target_new}}
            for n, r in enumerate(requests)]  # fmt: skip


# Statistics


def call_easyedit(model, folder, **options):
    easyedit.apply_memit_to_model(
        model, make_tokenizer(), [asked(REQUESTS[0])], hparams_of("MEMIT", stats_dir=str(folder)), **options
    )


def call_memit(model, folder, **options):
    numbers = {k: v for k, v in vars(hparams_of("MEMIT")).items() if k not in ("device", "stats_dir", "alg_name")}
    memit.apply_memit_to_model(
        model, make_tokenizer(), records(REQUESTS[:1]), numbers, stats_dir=str(folder), **options
    )


def call_alphaedit(model, folder, **options):
    alphaedit.apply_AlphaEdit_to_model(
        model, make_tokenizer(), records(REQUESTS[:1]), alpha_hparams(), stats_dir=str(folder), **options
    )


CALLS = {
    call_easyedit: "tiny/wikipedia_stats", call_memit: "._hugging_cache_tiny/wikipedia_stats",
    call_alphaedit: "tiny/wikipedia_stats",
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_statistics_are_computed_once_from_the_configured_text_and_kept_where_the_framework_looks(
    call, text, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "stats"
    first, second = make_model("llama"), make_model("llama")
    for model in (first, second):
        torch.manual_seed(0)
        call(model, folder, statistics_text=text)
        monkeypatch.setattr(kept, "collect_statistics", None)  # found the second time
    assert same(state(first), state(second)) and not same(state(first), state(make_model("llama")))
    names = [f"model.layers.{layer}.mlp.down_proj_float32_mom2_100.npz" for layer in (0, 1)]
    assert sorted(path.name for path in (folder / CALLS[call]).iterdir()) == names
    found, metadata = memit_npz.read(folder / CALLS[call] / names[1], "model.layers.1.mlp.down_proj")
    expected = collect_statistics(make_model("llama"), make_tokenizer(), TEXT * 2, (1,)).moment(1)
    assert found.count == expected.count and relative_error(found.moment, expected.moment) < 1e-6
    assert metadata["statistics_text"] == "texts.txt"
    third = make_model("llama")
    call(third, folder)  # no text needed any more
    assert same(state(third), state(first))
    assert "tok/s" not in capsys.readouterr().err


def test_a_text_is_configured_by_keyword_hyper_parameter_install_or_environment(text, tmp_path, monkeypatch):
    table, tok = {}, make_tokenizer()

    def ran(place, table=easyedit.ALGORITHMS, **hparams):
        numbers = hparams_of("MEMIT", stats_dir=str(tmp_path / place), **hparams)
        table["MEMIT"](make_model("llama"), tok, [asked(REQUESTS[0])], numbers)
        return len(list((tmp_path / place).rglob("*.npz")))

    assert ran("hparams", statistics_text=str(text)) == 2
    assert ran("list", statistics_text=TEXT * 2) == 2
    easyedit.install(table, statistics_text=text)
    assert ran("install", table) == 2
    easyedit.uninstall(table)
    with pytest.raises(StatisticsError, match=r"statistics_text, or KEDIT_FAST_STATISTICS_TEXT"):
        ran("nothing")
    monkeypatch.setenv("KEDIT_FAST_STATISTICS_TEXT", str(text))
    assert ran("environment") == 2


def test_a_document_sample_is_the_size_that_mom2_n_samples_says(text, tmp_path):
    call = dict(stats_dir=str(tmp_path), mom2_n_samples=3, mom2_dtype="float64", statistics_text=text)
    easyedit.apply_memit_to_model(make_model("llama"), make_tokenizer(), [asked(REQUESTS[0])],
                                  hparams_of("MEMIT", **call))  # fmt: skip
    (path, _) = sorted(tmp_path.rglob("*.npz"))
    assert path.name.endswith("_float64_mom2_3.npz")
    assert memit_npz.metadata_in(path)["documents"] == "3"


def test_what_cannot_be_computed_is_named_and_nothing_is_written(text, tmp_path):
    def call(**more):
        call_easyedit(make_model("llama"), tmp_path / "stats", **more)

    with pytest.raises(StatisticsError, match=r"cannot read .*nowhere\.txt"):
        call(statistics_text=tmp_path / "nowhere.txt")
    numbers = hparams_of("MEMIT", stats_dir=str(tmp_path / "stats"), mom2_dtype="float16", statistics_text=text)
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1000)
    with pytest.raises(StatisticsError, match="beyond float16"):
        easyedit.apply_memit_to_model(model, make_tokenizer(), [asked(REQUESTS[0])], numbers)
    assert not list((tmp_path / "stats").rglob("*.npz"))
    with pytest.raises(StatisticsError, match=r"cannot keep statistics in .*texts\.txt is no folder"):
        call_easyedit(make_model("llama"), text, statistics_text=text)
    for wrong in ({"mom2_dtype": "bfloat16"}, {"mom2_n_samples": "many"}, {"mom2_n_samples": 0}):
        with pytest.raises(MethodError, match=next(iter(wrong))):
            easyedit.apply_memit_to_model(make_model("llama"), make_tokenizer(), [asked(REQUESTS[0])],
                                          hparams_of("MEMIT", **wrong))  # fmt: skip


def test_statistics_of_another_text_are_not_taken_for_the_configured_one(text, tmp_path, statistics):
    call_easyedit(make_model("llama"), tmp_path / "stats", statistics_text=text)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(TEXT), encoding="utf-8")
    with pytest.raises(StatisticsError, match=r"computed from texts\.txt, statistics_text is other\.txt"):
        call_easyedit(make_model("llama"), tmp_path / "stats", statistics_text=other)
    folder = tmp_path / "half" / "tiny" / "wikipedia_stats"
    folder.mkdir(parents=True)
    second = statistics.moment(0)
    memit_npz.write(folder / f"{second.module}_float32_mom2_100.npz", second, {}, 100)
    with pytest.raises(StatisticsError, match=r"layer 0 that were not made from texts\.txt, and none of 1"):
        call_easyedit(make_model("llama"), tmp_path / "half", statistics_text=text)
    assert len(list(folder.iterdir())) == 1


def test_layers_that_are_missing_are_added_from_the_same_text(text, tmp_path):
    one = hparams_of("MEMIT", stats_dir=str(tmp_path / "stats"), layers=[1], statistics_text=text)
    easyedit.apply_memit_to_model(make_model("llama"), make_tokenizer(), [asked(REQUESTS[0])], one)
    assert len(list((tmp_path / "stats").rglob("*.npz"))) == 1
    call_easyedit(make_model("llama"), tmp_path / "stats", statistics_text=text)
    assert len(list((tmp_path / "stats").rglob("*.npz"))) == 2


def test_the_frameworks_own_data_set_is_used_when_it_is_on_this_machine(tmp_path, monkeypatch):
    class Rows(list):
        column_names = ("title", "text")

        def __getitem__(self, index):
            return {"text": list.__getitem__(self, index)}

    library, asked_for = types.ModuleType("datasets"), []
    library.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)

    def load_dataset(path, config, split):
        asked_for.append((path, config, split, library.config.HF_HUB_OFFLINE))
        if path != "wikipedia":
            raise ConnectionError("offline, and not here")
        return Rows(TEXT * 2)

    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    call_easyedit(make_model("llama"), tmp_path)
    assert asked_for == [
        ("wikimedia/wikipedia", "20231101.en", "train", True),
        ("wikipedia", "20200501.en", "train", True),
    ]
    assert library.config.HF_HUB_OFFLINE is False
    (path, _) = sorted(tmp_path.rglob("*.npz"))
    assert memit_npz.metadata_in(path)["statistics_text"] == "datasets:wikipedia:20200501.en"
    with pytest.raises(StatisticsError, match="no statistics for layers 0, 1"):
        easyedit.apply_memit_to_model(make_model("llama"), make_tokenizer(), [asked(REQUESTS[0])],
                                      hparams_of("MEMIT", stats_dir=str(tmp_path), mom2_dataset="c4"))  # fmt: skip


@pytest.mark.parametrize("size, precision", ((100, "float32"), (1000, "float32"), (100, "float64")))
def test_of_several_sample_sizes_in_one_folder_the_hyper_parameters_choose(size, precision, tmp_path, statistics):
    folder = tmp_path / "tiny" / "wikipedia_stats"
    scales = {(100, "float32"): 1.0, (1000, "float32"): 4.0, (100, "float64"): 9.0}
    for (n, kind), scale in scales.items():
        for second in statistics.layers.values():
            scaled = type(second)(second.module, second.moment * scale, second.count)
            memit_npz.write(folder / f"{second.module}_{kind}_mom2_{n}.npz", scaled, {}, n, kind)
    numbers = hparams_of("MEMIT", stats_dir=str(tmp_path), mom2_n_samples=size, mom2_dtype=precision)
    model = make_model("llama")
    easyedit.apply_memit_to_model(model, make_tokenizer(), [asked(REQUESTS[0])], numbers)
    used = sessions.session_of(model).editor.statistics.moment(1).moment
    assert relative_error(used, statistics.moment(1).moment * scales[size, precision]) < 1e-6


def test_a_size_that_is_not_there_is_refused_among_several_and_said_with_one(tmp_path, statistics, caplog):
    folder = tmp_path / "tiny" / "wikipedia_stats"

    def call():
        numbers = hparams_of("MEMIT", stats_dir=str(tmp_path), mom2_n_samples=7)
        easyedit.apply_memit_to_model(make_model("llama"), make_tokenizer(), [asked(REQUESTS[0])], numbers)

    for second in statistics.layers.values():
        memit_npz.write(folder / f"{second.module}_float32_mom2_100.npz", second, {}, 100)
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        call()
    assert "no statistics of mom2_n_samples = 7 and mom2_dtype = float32" in caplog.text
    for second in statistics.layers.values():
        memit_npz.write(folder / f"{second.module}_float32_mom2_50.npz", second, {}, 50)
    with pytest.raises(StatisticsError, match=r"several statistics files.*mom2_n_samples = 7 .*names 0 of them"):
        call()


def test_library_calls_print_nothing_unless_asked(tmp_path, capfd):
    model, tok = make_model("llama"), make_tokenizer()
    collect_statistics(model, tok, TEXT * 2, (0, 1))
    collect_into(tmp_path / "into", model, tok, Corpus(TEXT * 2), (0, 1))
    editor = Editor(model, tok, "memit", layers=(0, 1), statistics=collect_statistics(model, tok, TEXT * 2, (0, 1)),
                    hparams={"v_num_grad_steps": 2, "clamp_norm_factor": 0.75, "mom2_update_weight": 10,
                             "mom2_ridge": 1e-3})  # fmt: skip
    editor.edit(REQUESTS[:1])
    assert capfd.readouterr() == ("", "")
    collect_statistics(model, tok, TEXT * 2, (0, 1), progress=True)
    assert "statistics" in capfd.readouterr().err


# EasyEdit's tables


@pytest.fixture
def framework(monkeypatch):
    """Modules with the parts of EasyEdit that `install` touches, written from their documented behavior."""

    class BatchEditor(enum.Enum):
        MEMIT = "MEMIT"
        PMET = "PMET"

        @staticmethod
        def is_batchable_method(alg_name):
            return alg_name in {member.value for member in BatchEditor}

    class HyperParams:
        def to_dict(self):
            return dict(vars(self))

    class MEMITHyperParams(HyperParams):
        @classmethod
        def from_hparams(cls, path):
            with open(path if ".yaml" in path else path + ".yaml") as file:
                values = yaml.safe_load(file)
            assert values["alg_name"] == "MEMIT"
            made = cls()
            vars(made).update(values)
            return made

    parts = {
        "util.alg_dict": {"ALG_DICT": {"MEMIT": len, "FT": abs}}, "editors.batch_editor": {"BatchEditor": BatchEditor},
        "util.hparams": {"HyperParams": HyperParams}, "models.memit": {"MEMITHyperParams": MEMITHyperParams},
    }  # fmt: skip
    for name in ("easyeditor", *(f"easyeditor.{n}" for n in ("util", "editors", "models"))):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, held in parts.items():
        module = types.ModuleType(f"easyeditor.{name}")
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield types.SimpleNamespace(
        table=parts["util.alg_dict"]["ALG_DICT"], BatchEditor=BatchEditor, HyperParams=HyperParams,
        MEMITHyperParams=MEMITHyperParams,
    )  # fmt: skip
    easyedit.uninstall()


def parts_of(framework):
    loading = [vars(kind).get("from_hparams") for kind in (framework.HyperParams, framework.MEMITHyperParams)]
    return dict(framework.table), vars(framework.BatchEditor)["is_batchable_method"], loading


def written(tmp_path, name, **more):
    values = {**vars(hparams_of(name)), "v_lr": "1e-1", **more}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", sorted(easyedit.ADDED))
def test_install_lets_an_added_method_be_batched_and_loaded_and_uninstall_takes_both_out(
    name, framework, tmp_path, statistics
):
    before, path = parts_of(framework), written(tmp_path, name)
    for _ in range(2):
        easyedit.install()
        easyedit.install()
        assert framework.BatchEditor.is_batchable_method(name) and framework.BatchEditor.is_batchable_method("PMET")
        assert not framework.BatchEditor.is_batchable_method("FT")
        for kind in (framework.HyperParams, framework.MEMITHyperParams):
            hparams = kind.from_hparams(str(path).removesuffix(".yaml"))
            assert isinstance(hparams, framework.HyperParams) and hparams.v_lr == 0.1
            assert (hparams.alg_name, hparams.batch_size, hparams.max_length) == (name, 1, 40)
        as_json = path.with_suffix(".json")
        as_json.write_text(json.dumps(yaml.safe_load(path.read_text())))
        assert framework.HyperParams.from_hparams(str(as_json)).to_dict() == hparams.to_dict()
        model = make_model("llama")
        untouched = state(model)
        _, copies = framework.table[hparams.alg_name](
            model, make_tokenizer(), [asked(r, n) for n, r in enumerate(REQUESTS)], hparams, return_orig_weights=True,
            statistics=statistics,
        )  # fmt: skip
        assert len(copies) == 2 and not same(state(model), untouched)
        easyedit.uninstall()
        easyedit.uninstall()
        assert parts_of(framework) == before
        assert not framework.BatchEditor.is_batchable_method(name)


def test_other_files_are_read_as_before(framework, tmp_path):
    easyedit.install()
    path = written(tmp_path, "MEMIT")
    hparams = framework.MEMITHyperParams.from_hparams(str(path))
    assert type(hparams) is framework.MEMITHyperParams and hparams.v_lr == "1e-1"
    with pytest.raises(FileNotFoundError):
        framework.MEMITHyperParams.from_hparams(str(tmp_path / "nowhere"))
    with pytest.raises(MethodError, match="alg_name = 'MEMIT' is not one of MEMIT-Seq"):
        framework.HyperParams.from_hparams(str(path))
    with pytest.raises(MethodError, match="unknown hyper-parameter 'v_momentum'"):
        framework.HyperParams.from_hparams(str(written(tmp_path, "RECT", v_momentum=1)))
    with pytest.raises(MethodError, match="no model_name"):
        framework.HyperParams.from_hparams(str(written(tmp_path, "PRUNE", model_name="")))


@pytest.mark.parametrize("lacking", ("BatchEditor", "HyperParams", "MEMITHyperParams"))
def test_an_install_that_fails_half_way_leaves_nothing(lacking, framework, monkeypatch):
    before = parts_of(framework)
    place = {"BatchEditor": "editors.batch_editor", "HyperParams": "util.hparams", "MEMITHyperParams": "models.memit"}
    with monkeypatch.context() as broken:
        broken.delattr(sys.modules[f"easyeditor.{place[lacking]}"], lacking)
        with pytest.raises(MethodError, match=lacking):
            easyedit.install()
        assert parts_of(framework) == before
    easyedit.install()
    assert framework.table["MEMIT"] is easyedit.apply_memit_to_model
    easyedit.uninstall()
    assert parts_of(framework) == before
    with pytest.raises(MethodError, match="ultraedit_rows = 'theirs'"):
        easyedit.install(ultraedit_rows="theirs")
    assert parts_of(framework) == before


# Caches


@pytest.mark.parametrize("name", sorted(CLOSED_FORMS))
def test_use_cache_is_served_or_left_out_and_never_an_error(name, tmp_path, statistics, caplog):
    template, tok = tmp_path / "kvs" / "layer_{}_clamp_{}_case_{}.npz", make_tokenizer()
    found = []
    for cache in (None, template, template):
        model = make_model("llama")
        with caplog.at_level(logging.WARNING, "kedit_fast"):
            easyedit.ALGORITHMS[name](model, tok, [asked(r, n) for n, r in enumerate(REQUESTS)], hparams_of(name),
                                      statistics=statistics, cache_template=cache)  # fmt: skip
        found.append(state(model))
    served = name not in ("ROME", "R-ROME", "PMET", "ULTRAEDIT")
    assert len(list(tmp_path.rglob("*.npz"))) == (3 if served else 0)
    assert ("cache_template names are not used" in caplog.text) is not served
    for key, tensor in found[0].items():
        assert relative_error(found[1][key], tensor) < 1e-6 and relative_error(found[2][key], tensor) < 1e-4


def test_rome_of_memits_repository_runs_with_use_cache(tmp_path, statistics):
    template = tmp_path / "layer_{}_clamp_{}_case_{}.npz"
    numbers = {k: v for k, v in vars(hparams_of("MEMIT", **OWN["ROME"])).items() if k not in ("device", "stats_dir")}
    found = []
    for cache in (None, template):
        model = make_model("llama")
        memit.apply_rome_to_model(model, make_tokenizer(), records()[:1], numbers, cache_template=cache)
        found.append(state(model))
    assert same(*found) and not list(tmp_path.iterdir()) and not same(found[0], state(make_model("llama")))


@pytest.mark.parametrize("method", ("alphaedit", "memit-sequential"))
def test_cache_c_is_summed_from_the_keys_of_the_batch_which_are_not_computed_again(method, statistics, monkeypatch):
    """To the bit what a second pass after the writes gives, and one pass only."""
    tok, model, made = make_tokenizer(), make_model("llama"), []
    home = "kedit_fast.editing.schedules.mass.KeyPass"
    monkeypatch.setattr(home, lambda *args, **kw: made.append(KeyPass(*args, **kw)) or made[-1])
    if method == "alphaedit":
        P = torch.stack([s.project(torch.eye(64, dtype=torch.float64)) for s in null_spaces(statistics).values()])
        _, cache_c = alphaedit.apply_AlphaEdit_to_model(model, tok, records(), alpha_hparams(), P=P.float())
    else:
        numbers = {k: v for k, v in alpha_hparams().items() if k not in OWN["AlphaEdit"]}
        _, cache_c = alphaedit.apply_memit_seq_to_model(model, tok, records(), numbers, statistics=statistics)
    assert len(made) == 1
    editor = sessions.session_of(model).editor
    assert editor.on_keys is None
    prepared = prepare(tok, REQUESTS, editor.prefixes, 128)
    with torch.no_grad():
        after = KeyPass(editor.view, prepared, Site(1, "block"), "bare_half")
        for i, layer in enumerate((0, 1)):
            keys = after.at(layer).keys
            assert torch.equal(cache_c[i], (keys @ keys.T).float())


# UltraEdit's rows


def easyedits_ultraedit(model, tok, requests, hparams, shift):
    """Transcribed from what EasyEdit's executor, cross entropy, tracer, normalizer and solve compute, in fp64."""
    names, groups = hparams.inner_params, []
    for begin in range(0, len(requests), hparams.batch_size_once):
        chunk = requests[begin : begin + hparams.batch_size_once]
        targets = [" " + request["target_new"] for request in chunk]
        prompts = [request["prompt"] + target for request, target in zip(chunk, targets, strict=True)]
        groups.append(
            (tok(prompts, padding=True, return_tensors="pt"), tok(targets, padding=True, return_tensors="pt"))
        )
    groups.sort(key=lambda group: -int(group[0]["attention_mask"].sum()))
    state, gathered = {}, {name: [] for name in names}
    for tokens, target in groups:
        labels, seen, handles = target["input_ids"], {}, []
        for name in names:

            def hook(_, args, out, name=name, seen=seen):
                seen[name] = (args[0], out)
                out.retain_grad()

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
        scored, wanted = [], []
        for row in range(len(labels)):
            for place in range(labels.shape[1]):
                at = logits.shape[1] - 1 - labels.shape[1] + place if shift else place
                scored.append(logits[row, at])
                wanted.append(labels[row, place])
        torch.nn.functional.cross_entropy(torch.stack(scored), torch.stack(wanted)).backward()
        for handle in handles:
            handle.remove()
        for name in names:
            keys, output = seen[name]
            mask = torch.ones_like(labels) if hparams.token == "ans" else tokens["attention_mask"]
            places = [(r, t) for r in range(len(mask)) for t in range(mask.shape[1]) if mask[r, t]]
            rows = torch.stack([torch.cat([keys[place], output.grad[place]]).detach() for place in places])
            gathered[name].append(rows.double())
            shape = tuple(model.get_parameter(f"{name}.weight").shape)
            n, mean, var = state.get(shape, (0, torch.zeros(()), torch.zeros(())))
            shift_of_mean = rows.double().mean(0) - mean
            var = var + len(rows) * rows.double().var(0) + n * len(rows) * shift_of_mean**2 / (n + len(rows))
            state[shape] = (n + len(rows), mean + len(rows) * shift_of_mean / (n + len(rows)), var)
    updates = {}
    for name in names:
        weight, rows = model.get_parameter(f"{name}.weight"), torch.cat(gathered[name])
        n, mean, var = state[tuple(weight.shape)]
        hat = (rows - mean) / (var / (n - 1)).sqrt()
        d = weight.shape[1]
        values = -hparams.lr * hat[:, :d].square().sum(1, keepdim=True) * hat[:, d:]
        H = rows[:, :d]
        updates[name] = torch.linalg.solve(H.T @ H + torch.eye(d, dtype=torch.float64), H.T @ values).T
    return updates


@pytest.mark.parametrize("token", ("mask", "ans"))
@pytest.mark.parametrize("bos, side, model_name", ((True, "left", "a-llama"), (False, "right", "a-llama"),
                                                   (True, "left", "a-baichuan")))  # fmt: skip
def test_ultraedits_rows_are_those_of_easyedit_when_asked(token, bos, side, model_name):
    tok = make_tokenizer(bos, side)
    hparams = hparams_of(
        "ULTRAEDIT", token=token, batch_size=4, batch_size_once=2, model_name=model_name,
        inner_params=["model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"],
    )  # fmt: skip
    requests = [asked(request, number) for number, request in enumerate(REQUESTS)]
    requests.append({"prompt": "Who was it? It was", "target_new": "the big piano and the trumpet"})  # no subject
    expected = easyedits_ultraedit(make_model("llama"), tok, requests, hparams, "llama" in model_name)
    found = {}
    for rows in ("easyedit", "own"):
        model = make_model("llama", torch.float32)
        before = state(model)
        easyedit.apply_ultraedit_to_model(model, tok, requests, hparams, ultraedit_rows=rows)
        found[rows] = {name: state(model)[f"{name}.weight"] - before[f"{name}.weight"] for name in expected}
    for name, update in expected.items():
        assert relative_error(found["easyedit"][name], update) < 1e-3  # the weights are fp32
        assert relative_error(found["own"][name], update) > 0.1


def test_easyedits_rows_are_chosen_by_hyper_parameter_or_install_and_need_padding(framework):
    requests, tok = [asked(request, number) for number, request in enumerate(REQUESTS)], make_tokenizer()
    models = [make_model("llama") for _ in range(4)]
    hparams = hparams_of("ULTRAEDIT", ultraedit_rows="easyedit")
    easyedit.apply_ultraedit_to_model(models[0], tok, requests, hparams)
    easyedit.install(ultraedit_rows="easyedit")
    framework.table["ULTRAEDIT"](models[1], tok, requests, hparams_of("ULTRAEDIT"))
    framework.table["ULTRAEDIT"](models[2], tok, requests, hparams_of("ULTRAEDIT", ultraedit_rows="own"))
    easyedit.apply_ultraedit_to_model(models[3], tok, requests, hparams_of("ULTRAEDIT"))
    one, two, own, plain = map(state, models)
    assert same(one, two) and same(own, plain) and not same(one, own)
    with pytest.raises(MethodError, match="ultraedit_rows = 'mine'"):
        easyedit.apply_ultraedit_to_model(models[0], tok, requests, hparams, ultraedit_rows="mine")
    with pytest.raises(MethodError, match="batch_size_once = 0"):
        easyedit.apply_ultraedit_to_model(
            models[0], tok, requests, hparams_of("ULTRAEDIT", batch_size_once=0, ultraedit_rows="easyedit")
        )
    tok.pad_token = None
    before = state(models[0])
    with pytest.raises(EditError, match="set tokenizer"):
        easyedit.apply_ultraedit_to_model(models[0], tok, requests, hparams)
    assert same(before, state(models[0]))


# Words


@pytest.mark.parametrize("name", sorted(CLOSED_FORMS))
def test_an_editor_says_nothing_of_what_was_not_the_users_choice(name, statistics, caplog):
    hparams = hparams_of(name)
    vars(hparams).pop("mom2_ridge", None)  # ours, which AlphaEdit does not use
    requests = [asked(request) for request in REQUESTS[:2]]
    more = {"mom2_ridge": 1e-3} if name not in ("AlphaEdit", "ULTRAEDIT") else {}
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        easyedit.ALGORITHMS[name](
            make_model("llama"), make_tokenizer(), requests, {**vars(hparams), **more}, statistics=statistics
        )
    assert not [record for record in caplog.records if "does not use" in record.getMessage()]


@pytest.mark.parametrize("name", ("half", "fp16"))
def test_a_wish_for_half_precision_is_named_where_the_model_has_another(name, caplog):
    hparams, tok = hparams_of("ULTRAEDIT", **{name: True}), make_tokenizer()
    requests = [asked(request, number) for number, request in enumerate(REQUESTS)]
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        model = make_model("llama")
        easyedit.apply_ultraedit_to_model(model, tok, requests, hparams)
        assert f"{name} = true: the model is float32" in caplog.text
        caplog.clear()
        easyedit.apply_ultraedit_to_model(model, tok, requests, hparams)  # once an editor
        easyedit.apply_ultraedit_to_model(make_model("llama", torch.bfloat16), tok, requests, hparams)
    assert f"{name} = true" not in caplog.text


def test_our_names_in_a_json_file_are_taken(text, tmp_path):
    path = tmp_path / "demo.json"
    values = {k: v for k, v in vars(hparams_of("MEMIT")).items() if k not in ("device", "stats_dir")}
    path.write_text(json.dumps({**values, "statistics_text": str(text)}))
    memit.apply_memit_to_model(
        make_model("llama"), make_tokenizer(), records()[:1], path, stats_dir=str(tmp_path / "s")
    )
    assert len(list((tmp_path / "s").rglob("*.npz"))) == 2
