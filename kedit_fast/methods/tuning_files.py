"""Names of EasyEdit's files of WISE, GRACE, FT, DINM and MEMOIR, as ours.

The same name means different things in files of different methods (`kl_factor`, `weight_decay`, `dropout`), so they
are read by the method that a file is for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kedit_fast.errors import MethodError

METHODS = {"WISE": ("wise",), "GRACE": ("grace",), "FT": ("ft-l", "ft-m"), "DINM": ("dinm",), "MEMOIR": ("memoir",)}
"""`alg_name` of such a file -> our methods."""
OBJECTIVES = {"prompt_last": "ft-l", "target_new": "ft-m"}
"""FT's `objective_optimization` -> our method."""
_RENAMED = {"edit_lr": "lr", "n_iter": "num_steps", "densities": "merge_density"}
_RENAMED_BY = {"DINM": {"kl_factor": "edit_factor"}}
# Names that change what is written, with the values at which they do not; None stands for "no value", too.
_FIXED: dict[str, dict[str, tuple]] = {
    "WISE": {"replay": (False, None), "weights": (1, None), "objective_optimization": ("only_label", None)},
    "GRACE": {"dist_fn": ("euc",), "val_train": ("sgd",), "val_reg": ("None", None), "dropout": (0,)},
    "FT": {"weight_decay": (0,)},
    "DINM": {"weight_decay": (0,)},
    "MEMOIR": {"replay": (False, None), "weights": (1, None), "objective_optimization": ("only_label", None)},
}
_WHY = {
    "replay": "past edits are not replayed",
    "dropout": "the released code has no dropout either",
    "val_train": "the released code perturbs nothing either",
}
# Names that EasyEdit's code does not read, or that say where things are.
_NO_EFFECT = {
    "WISE": ("hidden_act", "sequential_edit", "save_path", "load_path"),
    "GRACE": ("reg", "num_pert"),
    "FT": ("kl_factor", "objective_optimization"),
    "DINM": ("max_output_length",),
    "MEMOIR": ("hidden_act", "sequential_edit", "save_path", "load_path"),
}
_FIRST_MATRICES = ("c_fc", "fc_in", "fc1", "up_proj", "gate_proj", "gate_up_proj", "dense_h_to_4h", "wi", "w1")


def algorithm_of(raw: Mapping[str, Any], method: str | None) -> str | None:
    """The `alg_name` whose names a file has: that of `method`, else the file's own; None for other methods' files."""
    if method is not None:
        return next((name for name, methods in METHODS.items() if method in methods), None)
    return raw.get("alg_name") if raw.get("alg_name") in METHODS else None


def fine_tuning_method(raw: Mapping[str, Any], origin: str) -> str:
    """Our method for a file of FT: `objective_optimization` says which loss is meant.

    Raises:
        MethodError: it says neither.
    """
    objective = raw.get("objective_optimization")
    if objective not in OBJECTIVES:
        raise MethodError(
            f"{origin}: objective_optimization = {objective!r}: choose prompt_last (ft-l: all tokens of a target from "
            "the prompt's last one) or target_new (ft-m: the target, token by token)"
        )
    return OBJECTIVES[objective]


def our_names(raw: Mapping[str, Any], algorithm: str, origin: str, method: str | None = None) -> dict[str, Any]:
    """The values of a file of one of `METHODS` by our names; names that have one meaning everywhere stay as they are.

    `inner_params` with one module ("model.layers[27].mlp.down_proj.weight") are the layer of that module;
    `norm_constraint: false` is 0, no bound, and an integer is a bound like any number (EasyEdit takes it for none);
    `layers: []` of DINM is left out: the layer is located. The numbers of WISE and GRACE have published units, whatever
    units a preset has.

    Raises:
        MethodError: a value that asks for something that is not implemented.
    """
    if method in OBJECTIVES.values() and raw.get("objective_optimization") is not None:
        meant = fine_tuning_method(raw, origin)
        if meant != method:
            raise MethodError(
                f"{origin}: objective_optimization = {raw['objective_optimization']!r} is the method {meant}, "
                f"not {method}"
            )
    values: dict[str, Any] = {"units": "published"} if algorithm in ("WISE", "GRACE") else {}
    margin = {name: raw[name] for name in ("alpha", "beta", "gamma") if name in raw}
    for name, value in raw.items():
        fixed = _FIXED[algorithm].get(name)
        if fixed is not None:
            if not any(_equal(value, allowed) for allowed in fixed):
                accepted = " or ".join(str(allowed) for allowed in fixed if allowed is not None)
                why = f": {_WHY[name]}" if name in _WHY else ""
                raise MethodError(f"{origin}: {name} = {value!r} is not implemented, only {accepted}{why}")
            continue
        if name in _NO_EFFECT[algorithm] or name in margin:
            continue
        if name == "inner_params":
            values.setdefault("layers", _layer_of(value, origin))
        elif name == "norm_constraint":
            values[name] = 0.0 if value in (None, False) or str(value).lower() in ("false", "none") else value
        elif name == "layers" and algorithm == "DINM" and not value:
            continue
        else:
            values[_RENAMED_BY.get(algorithm, {}).get(name, _RENAMED.get(name, name))] = value
    if margin:
        if len(margin) < 3:
            raise MethodError(f"{origin}: alpha, beta and gamma go together; got {', '.join(margin)} alone")
        values["act_margin"] = [margin["alpha"], margin["beta"], margin["gamma"]]
    return values


def module_path(name: str) -> str:
    """A module's path from one of `inner_params`: "model.layers[27].mlp.down_proj.weight" has dots for brackets."""
    return re.sub(r"\[(\d+)\]", r".\1", str(name)).removesuffix(".weight")


def _layer_of(value: Any, origin: str) -> list[int]:
    names = [value] if isinstance(value, str) else list(value or ())
    if len(names) != 1:
        raise MethodError(f"{origin}: inner_params = {value!r}: one matrix is tuned, give one")
    path = module_path(names[0])
    indices = [part for part in path.split(".") if part.isdigit()]
    if len(indices) != 1:
        raise MethodError(f"{origin}: inner_params = {names[0]!r} has no number of a layer, or several")
    if path.rpartition(".")[2] in _FIRST_MATRICES:
        raise MethodError(
            f"{origin}: inner_params = {names[0]!r} begins an MLP; the matrix that ends it is tuned here: leave "
            f"inner_params out, and give layers: [{indices[0]}]"
        )
    return [int(indices[0])]


def _equal(value: Any, allowed: Any) -> bool:
    """Whether a value of a file means an allowed one: false and "False" are the same, 0 and false are not."""
    if isinstance(allowed, str | bool) or allowed is None:
        return str(value).lower() == str(allowed).lower()
    try:
        return not isinstance(value, bool) and float(value) == allowed
    except (TypeError, ValueError):
        return False
