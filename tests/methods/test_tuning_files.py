"""Files of EasyEdit's WISE, GRACE, FT and DINM, and of MEMOIR: names, values, and what is refused by name."""

from __future__ import annotations

import logging

import pytest
import yaml

from kedit_fast.errors import MethodError
from kedit_fast.methods.hparams_files import parse_values, read_hparams

MODULE = "model.layers[27].mlp.down_proj.weight"
WISE = dict(
    alg_name="WISE", model_name="./hugging_cache/llama-2-7b", device=1, mask_ratio=0.2, edit_lr=1.0, n_iter=70,
    norm_constraint=1.0, act_margin=[5.0, 20.0, 10.0], act_ratio=0.88, save_freq=500, merge_freq=1000, merge_alg="ties",
    objective_optimization="only_label", inner_params=[MODULE], densities=0.53, weights=1.0, retrieve=True,
    replay=False, model_parallel=False, use_chat_template=False,
)  # fmt: skip
GRACE = dict(
    alg_name="GRACE", model_name="x", device=1, inner_params=[MODULE], edit_lr=1.0, n_iter=50, eps=1.0, dist_fn="euc",
    val_init="cold", val_train="sgd", val_reg="None", reg="early_stop", replacement="replace_last",
    eps_expand="coverage", num_pert=8, dropout=0.0,
)  # fmt: skip
FT = dict(
    alg_name="FT", model_name="x", device=0, layers=[21], num_steps=25, batch_size=1, max_length=40, lr="5e-4",
    weight_decay=0, kl_factor=0, norm_constraint=False, objective_optimization="prompt_last",
    rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight",
)  # fmt: skip
DINM = dict(
    alg_name="DINM", model_name="x", model_class="LlamaForCausalLM", tokenizer_class="LlamaTokenizer", device=3,
    suffix_system_prompt="Be kind:", layers=[], num_steps=10, batch_size=1, max_length=2048, max_output_length=600,
    lr="5e-4", weight_decay=0, kl_factor=0.1, norm_constraint=False,
)  # fmt: skip
FILES = {"wise": WISE, "grace": GRACE, "ft-l": FT, "dinm": DINM}


def read(tmp_path, method, values, **options):
    path = tmp_path / "hparams.yaml"
    path.write_text(yaml.safe_dump(values))
    return read_hparams(path, method, **options)


@pytest.mark.parametrize("named", (True, False))
def test_every_name_of_the_files_has_its_meaning(named, tmp_path):
    """With the method given, or found by the file's own alg_name."""
    found = {method: read(tmp_path, method if named else None, values) for method, values in FILES.items()}
    assert found["wise"] == dict(
        mask_ratio=0.2, lr=1.0, num_steps=70, norm_constraint=1.0, act_margin=(5.0, 20.0, 10.0), act_ratio=0.88,
        save_freq=500, merge_freq=1000, merge_alg="ties", layers=(27,), merge_density=0.53, retrieve=True,
        units="published",
    )  # fmt: skip
    assert found["grace"] == dict(
        layers=(27,), lr=1.0, num_steps=50, eps=1.0, val_init="cold", replacement="replace_last", eps_expand="coverage",
        units="published",
    )  # fmt: skip
    assert found["ft-l"] == dict(layers=(21,), num_steps=25, lr=5e-4, norm_constraint=0.0)
    assert found["dinm"] == dict(
        suffix_system_prompt="Be kind:", num_steps=10, lr=5e-4, edit_factor=0.1, norm_constraint=0.0
    )
    memoir = read(tmp_path, "memoir", {"alg_name": "MEMOIR", "edit_lr": 1.0, "n_iter": 30, "inner_params": [MODULE],
                                       "top_k": 4096, "irr_threshold": 0.4})  # fmt: skip
    assert memoir == dict(lr=1.0, num_steps=30, layers=(27,), top_k=4096, irr_threshold=0.4)


def test_values_as_easyedits_classes_hold_them(tmp_path):
    """WISEHyperParams has alpha, beta and gamma in place of act_margin; an integer is a bound like any number."""
    split = {name: value for name, value in WISE.items() if name != "act_margin"}
    values = parse_values({**split, "alpha": 2, "beta": 20.0, "gamma": 10.0, "norm_constraint": 1}, "x", foreign=True)
    assert values["act_margin"] == (2.0, 20.0, 10.0) and values["norm_constraint"] == 1.0
    assert parse_values({**DINM, "layers": [3]}, "x", foreign=True)["layers"] == (3,)
    for none in (False, None, "false", "None"):
        assert parse_values({**FT, "norm_constraint": none}, "x", foreign=True)["norm_constraint"] == 0
    assert parse_values({"layers": [3], "norm_constraint": 1}, "x", foreign=True, method="ft-m")["norm_constraint"] == 1
    with pytest.raises(MethodError, match="alpha, beta and gamma go together; got alpha alone"):
        parse_values({**split, "alpha": 2}, "x", foreign=True)


@pytest.mark.parametrize(
    "method, values, message",
    (
        ("wise", {"replay": True}, "replay = True is not implemented, only False: past edits are not replayed"),
        ("wise", {"weights": 0.5}, "weights = 0.5 is not implemented, only 1"),
        ("wise", {"objective_optimization": "all"}, "objective_optimization = 'all' is not implemented"),
        ("wise", {"inner_params": [MODULE, MODULE]}, "one matrix is tuned"),
        ("wise", {"inner_params": ["transformer.h[8].mlp.c_fc.weight"]}, r"begins an MLP.*give layers: \[8\]"),
        ("wise", {"inner_params": ["lm_head.weight"]}, "no number of a layer"),
        ("grace", {"dist_fn": "cos"}, "dist_fn = 'cos' is not implemented, only euc"),
        ("grace", {"val_train": "adv"}, "val_train = 'adv' is not implemented, only sgd"),
        ("grace", {"dropout": 0.1}, "dropout = 0.1 is not implemented, only 0"),
        ("ft-l", {"weight_decay": 0.1}, "weight_decay = 0.1 is not implemented, only 0"),
        ("ft-m", {}, "objective_optimization = 'prompt_last' is the method ft-l, not ft-m"),
        ("ft-l", {"objective_optimization": "both"}, r"choose prompt_last \(ft-l.*or target_new \(ft-m"),
        ("dinm", {"num_step": 3}, "unknown hyper-parameter 'num_step'.*did you mean 'num_steps'"),
    ),
)
def test_what_is_not_implemented_is_refused_by_name(method, values, message, tmp_path):
    with pytest.raises(MethodError, match=message):
        read(tmp_path, method, {**FILES.get(method, FT), **values})


def test_what_is_chosen_elsewhere_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        read(tmp_path, "wise", {**WISE, "use_chat_template": True})
        read(tmp_path, "wise", {**WISE, "use_chat_template": True}, warn_of_loading=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'hparams.yaml'}: use_chat_template = True is not taken from a file: prompts in a chat template "
        "are chosen where they are made (--chat)"
    ]
