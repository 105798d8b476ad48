from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from kedit_fast.errors import MethodError
from kedit_fast.methods.hparams import Hparams, unused, worth_a_warning
from kedit_fast.methods.hparams_files import parse_layers, read_hparams
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import RECIPES, find_recipe

LLAMA3 = SimpleNamespace(model_type="llama", num_hidden_layers=32, hidden_size=4096, intermediate_size=14336)
MEMIT_GPTJ = {
    "layers": [3, 4, 5, 6, 7, 8], "clamp_norm_factor": 0.75, "layer_selection": "all", "fact_token": "subject_last",
    "v_num_grad_steps": 25, "v_lr": 5e-1, "v_loss_layer": 27, "v_weight_decay": 0.5, "kl_factor": 0.0625,
    "mom2_adjustment": True, "mom2_update_weight": 15000, "rewrite_module_tmp": "transformer.h.{}.mlp.fc_out",
    "mom2_dataset": "wikipedia", "mom2_n_samples": 100000, "mom2_dtype": "float32",
}  # fmt: skip


def test_presets_hold_the_published_values():
    hparams, origin = make_hparams("memit", LLAMA3)
    assert hparams.layers == (4, 5, 6, 7, 8) and hparams.v_lr == 0.1 and hparams.mom2_update_weight == 15000
    assert "AlphaEdit" in origin and hparams.context_template_length_params == ((10, 5),)
    rome, _ = make_hparams("rome", SimpleNamespace(model_type="gpt2", n_layer=48, n_embd=1600, num_hidden_layers=48))
    assert rome.layers == (17,) and rome.context_template_length_params == ((5, 10), (10, 10))


@pytest.mark.parametrize("method", sorted(RECIPES))
@pytest.mark.parametrize("kind", ("gpt2", "gptj", "llama"))
@pytest.mark.parametrize("layers", (1, 2, 7, 80))
def test_models_without_a_preset_get_a_guess_that_fits_them(method, kind, layers):
    config = SimpleNamespace(model_type=kind, num_hidden_layers=layers, hidden_size=64, vocab_size=100)
    hparams, origin = make_hparams(method, config)
    assert origin.startswith("guess") and all(0 <= layer < layers for layer in hparams.layers)


def test_files_of_the_frameworks_and_ours_are_read(tmp_path):
    (tmp_path / "memit.json").write_text(json.dumps(MEMIT_GPTJ))
    (tmp_path / "easy.yaml").write_text('alg_name: "MEMIT"\nlayers: [4, 5]\nv_lr: 5e-1\nmodel_parallel: false\n')
    (tmp_path / "ours.toml").write_text('layers = "4-8"\nv_lr = 0.25\n')
    assert read_hparams(tmp_path / "memit.json")["layers"] == (3, 4, 5, 6, 7, 8)
    assert read_hparams(tmp_path / "easy.yaml") == {"layers": (4, 5), "v_lr": 0.5}
    assert read_hparams(tmp_path / "ours.toml") == {"layers": (4, 5, 6, 7, 8), "v_lr": 0.25}


@pytest.mark.parametrize(
    "name, content, message",
    (
        ("a.json", "{", "malformed"),
        ("a.yaml", "a: [", "malformed"),
        ("a.toml", "x = ", "malformed"),
        ("a.txt", "", "come as"),
        ("a.json", '{"v_lrr": 1}', "unknown hyper-parameter 'v_lrr'"),
        ("a.json", '{"v_lr": "fast"}', "is not a float"),
        ("a.json", '{"fact_token": "last"}', "not implemented"),
    ),
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(MethodError, match=message):
        read_hparams(tmp_path / name)


# A file of the repository of EMMET and ENCORE
UNIFIED = {**MEMIT_GPTJ, "calculate_objective_value": False, "update_norm_lambda": 0, "emmet_lambda": 0.1,
           "prob_cutoff": 0, "norm_control": 0, "bias_update": False, "name": "gpt-j"}  # fmt: skip


@pytest.fixture
def said(caplog):
    """What was logged by the package, by level."""
    logger = logging.getLogger("kedit_fast")
    propagates, logger.propagate = logger.propagate, True  # a command line that ran before turned it off
    caplog.set_level(logging.INFO, "kedit_fast")
    yield lambda level: [record.getMessage() for record in caplog.records if record.levelname == level]
    logger.propagate = propagates


def test_names_that_change_nothing_are_let_be_and_said(tmp_path, said):
    (tmp_path / "a.json").write_text(json.dumps(UNIFIED))
    (tmp_path / "plain.json").write_text(json.dumps(MEMIT_GPTJ))
    found = read_hparams(tmp_path / "a.json")
    (line,) = said("INFO")
    assert not said("WARNING")
    for name in ("calculate_objective_value", "norm_control", "bias_update", "name", "mom2_dataset"):
        assert name in line and name not in found
    expected = {**read_hparams(tmp_path / "plain.json"), "update_norm_lambda": 0.0, "emmet_lambda": 0.1,
                "most_probable_steps": 0}  # fmt: skip
    assert found == expected
    assert make_hparams("memit", LLAMA3, found)[0] == make_hparams("memit", LLAMA3, expected)[0]


def test_what_is_chosen_elsewhere_is_not_ignored_without_a_word(tmp_path, said):
    (tmp_path / "a.yaml").write_text("half: true\nfp16: false\nbatch_size: 100\nlr: 1e-6\n")
    assert read_hparams(tmp_path / "a.yaml") == {"lr": 1e-6}
    half, batch = said("WARNING")
    assert "half = True" in half and "--dtype" in half and "batch_size = 100" in batch and "--batch-size" in batch
    assert "fp16" in said("INFO")[0] and "half" not in said("INFO")[0]


@pytest.mark.parametrize(
    "name, value, message",
    (
        ("bias_update", True, "bias_update = True is not implemented, only False"),
        ("bias_update", "yes", "bias_update = 'yes'"),
        ("norm_control", 0.1, "norm_control = 0.1"),
        ("blue", True, "blue = True"),
        ("use_chat_template", True, "use_chat_template"),
        ("prob_cutoff", 0.9, "prob_cutoff = 0.9 is not implemented, only 0, -2"),
        ("prob_cutoff", -1, "prob_cutoff = -1"),
        ("add_prev_edits", True, "add_prev_edits = True is chosen by the method"),
        ("layer_selection", "random", "layer_selection"),
        ("enable_random_prefix_keys", False, "enable_random_prefix_keys"),
        ("norm_controll", 0, "unknown hyper-parameter 'norm_controll'"),
        ("kl_facto", 0, "did you mean 'kl_factor'"),
        ("v_lr", float("nan"), "v_lr = nan is not a float"),
        ("v_lr", True, "v_lr = True is not a float"),
        ("v_num_grad_steps", True, "v_num_grad_steps = True"),
        ("layers", [1.5], "layers"),
        ("layers", True, "layers = True"),
        ("layers", None, "layers = None"),
    ),
)
@pytest.mark.parametrize("kind", ("json", "yaml"))
def test_names_that_would_change_the_result_are_refused_with_their_value(tmp_path, kind, name, value, message):
    path = tmp_path / f"a.{kind}"
    path.write_text(json.dumps({**UNIFIED, name: value}).replace("NaN", "NaN" if kind == "json" else ".nan"))
    with pytest.raises(MethodError, match=message):
        read_hparams(path)


def test_early_stopping_and_earlier_keys_of_other_files_are_ours(tmp_path):
    path = tmp_path / "encore.json"
    path.write_text(json.dumps({**UNIFIED, "add_prev_edits": True, "prob_cutoff": -2}))
    for method in ("encore", "memit-sequential"):
        assert read_hparams(path, method)["most_probable_steps"] == 1  # theirs counts the first such iteration too
    with pytest.raises(MethodError, match="add_prev_edits = True"):
        read_hparams(path, "memit")
    path.write_text(json.dumps({**UNIFIED, "add_prev_edits": False}))
    assert "add_prev_edits" not in read_hparams(path, "memit")
    with pytest.raises(MethodError, match="add_prev_edits = False"):
        read_hparams(path, "encore")
    path.write_text(json.dumps({**UNIFIED, "prob_cutoff": -3, "most_probable_steps": 1}))
    with pytest.raises(MethodError, match="say different things"):
        read_hparams(path)


@pytest.mark.parametrize(
    "name, content",
    (
        ("a.JSON", '{"v_lr": 0.5}'),
        ("a.json", '\ufeff{"v_lr": 0.5}'),
        ("a.yml", "\ufeffv_lr: 5e-1\n"),
        ("a.YAML", "v_lr: 0.5\r\n"),
        ("a.toml", "\ufeffv_lr = 0.5\n"),
        ("a.yaml", "base: &b {v_lr: 0.5}\n<<: *b\nname: x\n".replace("base: &b", "description: &b")),
    ),
)
def test_files_with_byte_order_marks_and_other_spellings_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read_hparams(tmp_path / name) == {"v_lr": 0.5}


@pytest.mark.parametrize(
    "name, content, message",
    (
        ("a.json", '{"v_lr": 0.5, "v_lr": 0.1}', "'v_lr' twice"),
        ("a.yaml", "v_lr: 0.5\nv_lr: 0.1\n", "'v_lr' is given twice"),
        ("a.toml", "v_lr = 0.5\nv_lr = 0.1\n", "malformed"),
        ("a.json", '{"v_lr": 0.5}'.encode("utf-16"), "UTF-16"),
        ("a.json", b'["v_lr"]', "must hold names and values; got list"),
        ("a.yaml", b"", "got NoneType"),
        ("a.ini", b"", "come as .toml, .yaml, .yml or .json"),
    ),
)
def test_files_that_contradict_themselves_or_are_no_text_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(MethodError, match=message) as caught:
        read_hparams(tmp_path / name)
    assert name in str(caught.value)


def test_layers_are_inclusive_ranges_or_lists():
    assert parse_layers("4-8") == (4, 5, 6, 7, 8) and parse_layers("3,5,7") == (3, 5, 7) and parse_layers("2") == (2,)
    for bad in ("", "8-4", "x", "1,,2", "-1"):
        with pytest.raises(ValueError):
            parse_layers(bad)


def test_a_mapping_with_an_unknown_name_is_refused_and_says_what_reads_files():
    for names in ({"v_lrr": 0.1}, MEMIT_GPTJ):
        with pytest.raises(
            MethodError, match=r"unknown hyper-parameter '(v_lrr' \(did you mean 'v_lr'|layer_sel).*read_h"
        ):
            make_hparams("memit", LLAMA3, names)


def test_values_out_of_range_and_unknown_methods_are_named():
    with pytest.raises(MethodError, match="clamp_norm_factor"):
        make_hparams("memit", LLAMA3, {"clamp_norm_factor": 0})
    with pytest.raises(MethodError, match="edits one layer"):
        make_hparams("rome", LLAMA3, {"layers": (1, 2)})
    with pytest.raises(MethodError, match="unknown method 'mend': choose from alphaedit, anyedit"):
        find_recipe("mend")
    for name, value, message in (
        ("rounds", 1.5, "is not a int"),
        ("output_metric", "perhaps", "is not a bool"),
        ("norm_anchor", float("inf"), "it must be finite"),
        ("kl_temperature", float("inf"), "it must be finite"),
    ):
        with pytest.raises(MethodError, match=f"{name} = .*{message}"):
            make_hparams("memit", LLAMA3, {name: value})
    with pytest.raises(MethodError, match=r"round_least = 5.0 .* below round_most, 2"):
        make_hparams("memit", LLAMA3, {"round_least": 5.0, "round_most": 2.0})
    hparams, _ = make_hparams("memit", LLAMA3, {"sphere_energy": 0.3, "round_share": 0.2})
    assert hparams.lacks("sphere_energy") == "sphere_strength" and hparams.lacks("round_share") == "rounds"
    assert not make_hparams("memit", LLAMA3, {"rounds": 2, "round_share": 0.2})[0].lacks("round_share")
    assert set(Hparams.__dataclass_fields__) >= {"v_lr", "kl_factor", "mom2_update_weight"}


SMALL = SimpleNamespace(model_type="llama", num_hidden_layers=6, hidden_size=64)


@pytest.mark.parametrize("method", sorted(RECIPES))
@pytest.mark.parametrize("config", (LLAMA3, SMALL))
def test_an_origin_says_which_numbers_are_given(method, config):
    whole, origin = make_hparams(method, config)
    assert "given" not in origin
    own = {name: value for name, value in vars(whole).items() if name != "method"}
    assert make_hparams(method, config, own)[1] == "given"
    some, said = make_hparams(method, config, {"layers": whole.layers or (1,), "v_stop_loss": 0.1})
    assert some.layers and said.startswith(origin.split(":")[0]) and "relative depth" not in said
    assert said.endswith(
        "; given: layers" if not find_recipe(method).optimizes_values else "; given: layers, v_stop_loss"
    )


def test_numbers_that_a_method_does_not_read_give_nothing():
    whole, origin = make_hparams("alphaedit", SMALL)
    assert make_hparams("alphaedit", SMALL, {"mom2_update_weight": 3.0})[1] == origin
    read = {name: value for name, value in vars(whole).items() if name not in ("method", "mom2_update_weight")}
    assert make_hparams("alphaedit", SMALL, read)[1] == "given"


def test_what_a_published_file_carries_idle_is_no_warning_and_the_rest_is():
    alphaedit, memit = find_recipe("alphaedit"), find_recipe("memit")
    names = ("mom2_update_weight", "emmet_lambda", "L2")
    assert unused(alphaedit, names) == ["emmet_lambda", "mom2_update_weight"]
    assert worth_a_warning(alphaedit, names) == ["emmet_lambda"]
    assert worth_a_warning(memit, names) == ["L2", "emmet_lambda"]
    assert worth_a_warning(find_recipe("rome"), names) == ["L2", "emmet_lambda", "mom2_update_weight"]


def test_the_command_line_warns_of_idle_numbers_set_by_hand_alone(tmp_path, capsys):
    from kedit_fast.cli.hparams import overridden_hparams

    file = tmp_path / "alphaedit.json"
    file.write_text(json.dumps({**MEMIT_GPTJ, "nullspace_threshold": 2e-2, "L2": 1}))
    assert overridden_hparams(file, None, None, "alphaedit")["mom2_update_weight"] == 15000
    assert "does not use" not in capsys.readouterr().err
    assert overridden_hparams(file, ["mom2_update_weight=3"], None, "alphaedit")["mom2_update_weight"] == 3.0
    assert "alphaedit does not use mom2_update_weight" in capsys.readouterr().err


def test_an_editor_warns_of_idle_numbers_that_no_published_file_of_its_method_carries(demo_model, caplog):
    from kedit_fast import Editor

    spaces = {0: SimpleNamespace(size=1)}
    numbers = {"mom2_update_weight": 15000.0, "layers": (0,)}
    Editor(*demo_model, "alphaedit", null_spaces=spaces, hparams=numbers)
    assert "does not use" not in caplog.text
    Editor(*demo_model, "alphaedit", null_spaces=spaces, hparams={**numbers, "emmet_lambda": 0.2})
    assert "alphaedit does not use emmet_lambda" in caplog.text


def test_files_of_rlsedit_are_read(tmp_path):
    file = tmp_path / "rlsedit.json"
    shipped = {"mom2_update_weight": 15000, "lambda_reg": 0.5, "mu_reg": 1.0, "weight_reg": 1, "solve_method": "qr"}
    file.write_text(json.dumps(shipped), encoding="utf-8")
    assert read_hparams(file, "rlsedit") == {"mom2_update_weight": 15000.0, "update_norm_lambda": 0.25}
    for name, value in (("mu_reg", 0.5), ("lambda_reg", "much")):
        file.write_text(json.dumps({name: value}), encoding="utf-8")
        with pytest.raises(MethodError, match=name):
            read_hparams(file, "rlsedit")
    gpt2 = SimpleNamespace(model_type="gpt2", n_layer=48, n_embd=1600, num_hidden_layers=48)
    numbers, origin = make_hparams("rlsedit", gpt2)
    assert "hparams/RLSEdit/gpt2-xl.json" in origin and numbers.mom2_update_weight == 20000
    numbers, origin = make_hparams("nas", gpt2)
    assert "hparams/NAS/gpt2-xl.json" in origin and (numbers.norm_anchor, numbers.L2) == ("auto", 10)
