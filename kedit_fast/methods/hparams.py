"""Hyper-parameters by the field's names, from presets, our toml, EasyEdit's yaml or memit's json."""

from __future__ import annotations

import difflib
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from kedit_fast.errors import MethodError
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.support.textfiles import Repeated, parse_json, read_text, suffix_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_log = logging.getLogger("kedit_fast")
PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Hparams:
    """All numbers of a method. Names are those of the memit repository's files."""

    method: str
    layers: tuple[int, ...]  # edited, zero-based; the value is optimised at the last one
    v_num_grad_steps: int = 0  # iterations; the last one only measures the loss
    v_lr: float = 0.0  # of Adam
    v_weight_decay: float = 0.0  # of |delta| / |h0|^2
    clamp_norm_factor: float = 0.0  # |delta| <= factor * |h0|
    kl_factor: float = 0.0  # of KL at "{subject} is a"
    mom2_adjustment: bool = True  # S = C, or I when false
    mom2_update_weight: float = 0.0  # lambda, the weight of C; not used by rank-one methods, AlphaEdit and UltraEdit
    mom2_ridge: float = 0.0  # added to C, relative to its mean diagonal
    update_norm_lambda: float = 0.0  # ENCORE's lambda_n: S = lambda C + lambda_n I
    emmet_lambda: float = 0.1  # EMMET: softness of its equality constraints; 0 makes them exact
    L2: float = 10.0  # AlphaEdit: ridge of the solve
    nullspace_threshold: float = 2e-2  # AlphaEdit: eigenvalues of C below it are null space
    nullspace_rule: str = "absolute"  # what the threshold is of: absolute, relative (to the largest), energy (share)
    factor_dtype: str = "float64"  # in which the factor of C is kept and used: float64, or float32 with a bounded error
    memory_form: str = "auto"  # of methods that keep keys: auto, dual (n x n) or primal (d x d); the same update
    rect_keep: float = 0.4  # RECT: share of the entries that are written
    frobenius_limit: float = 0.0  # |Delta| <= limit * |W| for each write, by scaling; 0: none
    spectral_limit: float = 0.0  # the same of the largest singular values, by clipping; 0: none
    inner_params: tuple[
        str, ...
    ] = ()  # UltraEdit: paths of the modules to edit; empty for the edited one of each layer
    lr: float = 0.0  # UltraEdit
    token: str = "mask"  # UltraEdit: rows of all tokens of prompt and answer ("mask") or of the answer alone ("ans")
    v_stop_loss: float = 0.05  # a request whose loss is below stops before its next step
    context_template_length_params: tuple[tuple[int, int], ...] = ()  # (tokens, count) of generated prefixes
    on_bad_pivot: str = "raise"  # rank-one methods: raise, skip or allow
    on_predicted: str = "error"  # a target the model says already: error, or allow, as published: a value without delta
    values_batch: int = 0  # requests optimised together, 0: what memory takes, up to 64 on a CPU; the same result
    check_every: int = 0  # iterations between looks at who has stopped, 0: 1 on a CPU, 4 on a GPU; the same result
    values_graph: bool = False  # on CUDA, replay iterations as a graph; not yet run on a GPU; the same result
    most_probable_steps: int = 0  # ENCORE: stop this many steps after targets are the argmax with prefixes; 0: off
    v_loss_layer: int = -1  # of the published files; only the last layer, -1, is implemented

    def __post_init__(self):
        recipe = find_recipe(self.method)
        optimised = recipe.optimizes_values
        weighs = recipe.is_batched and recipe.uses_covariance
        check = {
            "layers": len(self.layers) > 0 or len(self.inner_params) > 0,
            "inner_params": optimised is False or not self.inner_params,
            "v_num_grad_steps": self.v_num_grad_steps >= 1 or not optimised,
            "v_lr": self.v_lr > 0 or not optimised,
            "v_weight_decay": self.v_weight_decay >= 0,
            "clamp_norm_factor": self.clamp_norm_factor > 0 or not optimised,
            "kl_factor": self.kl_factor >= 0,
            "mom2_adjustment": self.mom2_adjustment or not recipe.uses_null_space,
            "mom2_update_weight": self.mom2_update_weight > 0 or not weighs,
            "mom2_ridge": self.mom2_ridge >= 0,
            "update_norm_lambda": self.update_norm_lambda >= 0,
            "emmet_lambda": self.emmet_lambda >= 0,
            "L2": self.L2 > 0,
            "nullspace_threshold": self.nullspace_threshold > 0,
            "nullspace_rule": self.nullspace_rule in ("absolute", "relative", "energy"),
            "factor_dtype": self.factor_dtype in ("float64", "float32"),
            "memory_form": self.memory_form in ("auto", "dual", "primal"),
            "rect_keep": 0 < self.rect_keep <= 1,
            "frobenius_limit": self.frobenius_limit >= 0,
            "spectral_limit": self.spectral_limit >= 0,
            "lr": self.lr > 0 or optimised,
            "token": self.token in ("mask", "ans"),
            "values_batch": self.values_batch >= 0,
            "check_every": self.check_every >= 0,
            "most_probable_steps": self.most_probable_steps >= 0,
            "on_predicted": self.on_predicted in ("error", "allow"),
            "on_bad_pivot": self.on_bad_pivot in ("raise", "skip", "allow"),
        }
        for name, ok in check.items():
            if not ok:
                raise MethodError(f"hyper-parameter {name} = {getattr(self, name)!r} is out of range for {self.method}")
        if recipe.edits_one_layer and len(self.layers) != 1:
            raise MethodError(f"{self.method} edits one layer; got layers {', '.join(map(str, self.layers))}")

    @property
    def uses_statistics(self) -> bool:
        """Whether second moments of the edited layers are needed."""
        return self.mom2_adjustment and find_recipe(self.method).uses_statistics


def unused(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Of hyper-parameters, those that a method does not read."""
    optimised, mass = recipe.optimizes_values, recipe.is_batched
    covariance = recipe.uses_covariance
    reads = {
        "v_num_grad_steps": optimised, "v_lr": optimised, "v_weight_decay": optimised, "clamp_norm_factor": optimised,
        "kl_factor": optimised, "v_stop_loss": optimised, "most_probable_steps": optimised, "values_batch": optimised,
        "check_every": optimised, "values_graph": optimised, "on_predicted": optimised,
        "mom2_update_weight": covariance and mass, "mom2_ridge": covariance, "factor_dtype": covariance,
        "update_norm_lambda": covariance, "mom2_adjustment": recipe.uses_statistics,
        "emmet_lambda": recipe.softens_equality, "L2": recipe.uses_null_space,
        "nullspace_threshold": recipe.uses_null_space,
        "nullspace_rule": recipe.uses_null_space, "memory_form": recipe.memory,
        "rect_keep": recipe.masks_updates, "inner_params": not optimised, "lr": not optimised,
        "token": not optimised, "on_bad_pivot": not mass,
    }  # fmt: skip
    return sorted(name for name in names if not reads.get(name, True))


# What a method's published files carry although it does not read it.
_CARRIED = {"alphaedit": ("mom2_update_weight",)}


def worth_a_warning(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Of hyper-parameters, those that a method does not read and that its own published files do not carry either."""
    return [name for name in unused(recipe, names) if name not in _CARRIED.get(recipe.name, ())]


# Names of the frameworks' files for places, devices, data and output: the package takes those elsewhere, or they change
# nothing that is written to a model.
_ELSEWHERE = {
    "alg_name", "model_name", "stats_dir", "device", "mom2_dataset", "mom2_n_samples", "mom2_dtype",
    "rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module",
    "model_parallel", "fp16", "batch_size", "max_length", "P_loc", "rewrite_module_tmps", "model_class", "class_name",
    "tokenizer_class", "tokenizer_name", "no_grad_layers", "batch_size_once", "editor_batch_size", "silent", "half",
    "results_dir", "name", "calculate_objective_value", "evaluation_type", "api_key", "verbose", "description",
}  # fmt: skip
# Names that change what is written, with the values at which they do not: at others they are not implemented.
_FIXED = {
    "layer_selection": ("all",), "fact_token": ("subject_last",), "nll_loss_factor": (1,), "dropout": (0,),
    "enable_prompt_keys": (False,), "enable_random_prefix_keys": (True,), "original_implementation": (False,),
    "bias_update": (False, None), "norm_control": (0, None), "blue": (False, None), "use_chat_template": (False, None),
}  # fmt: skip
# Of the names above those that may change a result where they are chosen: values that do not, and where that is.
_CHOSEN_ELSEWHERE = {
    "fp16": ((False, None), "a model's dtype is chosen where it is loaded (--dtype)"),
    "half": ((False, None), "a model's dtype is chosen where it is loaded (--dtype)"),
    "batch_size": ((1, None), "the edits of a batch are chosen where they are made (--batch-size)"),
}
_BY_METHOD = ("add_prev_edits", "prob_cutoff")  # see _translated


def read_hparams(path: str | Path, method: str | None = None, *, warn_of_loading: bool = True) -> dict[str, Any]:
    """Values of a .toml (ours), .yaml (EasyEdit) or .json (memit, AlphaEdit) file that this package knows.

    Names that other repositories' files hold beside and that change nothing at the value given are named at INFO.

    Args:
        path: the file.
        method: what the values are for; only `add_prev_edits` is looked at with it.
        warn_of_loading: warn of `half`, `fp16` and `batch_size`, which are chosen where a model is loaded and edited;
            False for callers that compare them with what they chose.

    Raises:
        MethodError: the file cannot be read, or asks for something that is not implemented.
    """
    raw = read_raw(path)
    found = parse_values(raw, str(path), foreign=True, method=method)
    beside = [str(name) for name in raw if name in _ELSEWHERE or name in _FIXED]
    for name, (neutral, where) in _CHOSEN_ELSEWHERE.items() if warn_of_loading else ():
        if not any(_same(raw.get(name), value) for value in neutral):
            _log.warning("%s: %s = %r is not taken from a file: %s", path, name, raw[name], where)
            beside.remove(name)
    if beside:
        _log.info("%s: not used, it changes no edit here: %s", path, ", ".join(beside))
    return found


def read_raw(path: str | Path) -> Mapping[str, Any]:
    """All names and values of such a file, as they stand there.

    Raises:
        MethodError: the file cannot be read, or gives a name twice.
    """
    suffix = suffix_of(path)
    if suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise MethodError(f"{path}: hyper-parameters come as .toml, .yaml, .yml or .json")
    text = read_text(path, MethodError)
    try:
        if suffix == ".toml":
            raw = tomllib.loads(text)
        elif suffix == ".json":
            raw = parse_json(text, str(path), MethodError)
            if isinstance(raw, Repeated):
                raise MethodError(f"{path} gives {raw.names[0]!r} twice: keep one")
        else:
            raw = yaml.load(text, _Strict)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, MethodError):
            raise
        raise MethodError(f"{path} is malformed: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(raw, Mapping):
        raise MethodError(f"{path} must hold names and values; got {type(raw).__name__}")
    return raw


class _Strict(yaml.SafeLoader):
    """A yaml mapping that gives a name twice is malformed, instead of the last one standing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [self.construct_object(key, deep=True) for key in keys]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_values(
    raw: Mapping[str, Any], origin: str, foreign: bool = False, method: str | None = None
) -> dict[str, Any]:
    """Convert values to the types of Hparams; with `foreign`, names that the frameworks' files hold beside are let be
    where they change nothing.

    Raises:
        MethodError: by name, for what is unknown, of the wrong type or not implemented.
    """
    types = {f.name: f.type for f in fields(Hparams)}
    found: dict[str, Any] = {}
    for name, value in raw.items():
        if name in _FIXED and not any(_same(value, allowed) for allowed in _FIXED[name]):
            shown = " or ".join(str(allowed) for allowed in _FIXED[name] if allowed is not None)
            raise MethodError(f"{origin}: {name} = {value!r} is not implemented, only {shown}")
        if name in types:
            try:
                found[name] = _convert(types[name], value)
            except (TypeError, ValueError, OverflowError):
                raise MethodError(f"{origin}: {name} = {value!r} is not a {types[name]}") from None
        elif foreign and name in _BY_METHOD:
            for ours, number in _translated(name, value, origin, method).items():
                if found.setdefault(ours, raw.get(ours, number)) != number:
                    raise MethodError(f"{origin}: {name} = {value!r} and {ours} = {raw[ours]!r} say different things")
        elif not foreign or name not in (*_ELSEWHERE, *_FIXED):
            known = ", ".join(sorted(types))
            raise MethodError(f"{origin}: unknown hyper-parameter {name!r}{_near(name)}; known are {known}")
    return found


def _near(name: Any) -> str:
    near = difflib.get_close_matches(str(name), [f.name for f in fields(Hparams)], 1, 0.8)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _translated(name: str, value: Any, origin: str, method: str | None) -> dict[str, Any]:
    """Our hyper-parameters for one of the repositories of EMMET and ENCORE that is spelled otherwise."""
    if name == "add_prev_edits":  # keys of earlier batches in the system
        keeps = None if method is None else find_recipe(method).memory
        if not isinstance(value, bool) or (keeps is None and value) or (keeps is not None and value != keeps):
            raise MethodError(
                f"{origin}: add_prev_edits = {value!r} is chosen by the method here: true for encore, memit-sequential "
                "and alphaedit, false for memit and emmet"
            )
        return {}
    try:  # it counts the first iteration with all targets most probable too
        steps = -_convert("int", value)
    except (TypeError, ValueError, OverflowError):
        steps = -1
    if steps == 0:
        return {"most_probable_steps": 0}
    if steps < 2:
        raise MethodError(f"{origin}: prob_cutoff = {value!r} is not implemented, only 0, -2, -3, ...")
    return {"most_probable_steps": steps - 1}


def _same(value: Any, allowed: Any) -> bool:
    """Whether two values mean the same in a file: false and "false", 0 and 0.0, but not 0 and false of a text."""
    if isinstance(allowed, bool) and isinstance(value, str):
        return value.lower() == str(allowed).lower()
    return value == allowed


def _convert(kind: str, value: Any) -> Any:
    if kind == "tuple[int, ...]":
        return parse_layers(value)
    if kind == "tuple[str, ...]":
        return (value,) if isinstance(value, str) else tuple(str(v) for v in value)
    if kind == "tuple[tuple[int, int], ...]":
        value = json.loads(value) if isinstance(value, str) else value
        return tuple((int(length), int(count)) for length, count in value)
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if str(value).lower() not in ("true", "false"):
            raise ValueError(value)
        return str(value).lower() == "true"
    if kind in ("int", "float") and isinstance(value, bool):
        raise ValueError(value)
    if kind == "int":
        if isinstance(value, float) and value != int(value):
            raise ValueError(value)
        return int(value)
    if kind == "float":
        if math.isnan(number := float(value)):  # yaml reads 5e-1 as a string
            raise ValueError(value)
        return number
    return str(value)


def parse_layers(value: Any) -> tuple[int, ...]:
    """Zero-based layers from "4-8" (both ends count), "3,5,7", an integer or a list; raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        if any(isinstance(v, bool) or int(v) != float(v) for v in value):
            raise ValueError(f"{value!r} is no list of layers")
        return tuple(sorted({int(v) for v in value}))
    layers: set[int] = set()
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        begin, end = int(first), int(last) if dash else int(first)
        if end < begin:
            raise ValueError(f"{part} runs backwards")
        layers.update(range(begin, end + 1))
    return tuple(sorted(layers))


def preset_hparams(recipe: Recipe, config: Any) -> tuple[dict[str, Any], str]:
    """Published values for a model, and where they are from; a guess by relative depth when there is no preset.

    A model for which another method's preset is there, but none of this one, gets that with this method's own numbers
    of its family.
    """
    table = load_presets(recipe.preset)
    families = table["family"]
    kind = getattr(config, "model_type", None)
    family = next((e for e in families if kind in e["model_types"]), families[-1])
    for entry in table["preset"]:
        if not all(getattr(config, name, None) == value for name, value in entry["match"].items()):
            continue
        values, origin = dict(entry["values"]), f"preset {entry['name']} ({entry['source']}"
        if entry["inherited"]:
            origin += f", as for {entry['inherited']}"
            if family["own"]:
                values |= family["own"]
                origin += f", with values of {family['source']}"
            if family["own_depth"]:
                values["layers"] = _by_depth(recipe, family, config.num_hidden_layers)
        return parse_values(values, entry["source"]), origin + ")"
    layers = _by_depth(recipe, family, config.num_hidden_layers)
    values = parse_values(family["values"], family["source"])
    return {**values, "layers": layers}, f"guess: layers by relative depth, values of {family['source']}"


def _by_depth(recipe: Recipe, family: Mapping[str, Any], count: int) -> tuple[int, ...]:
    first, last = (min(count - 1, round(depth * (count - 1))) for depth in family["depth"])
    return (last,) if recipe.edits_one_layer else tuple(range(first, last + 1))


def load_presets(name: str) -> dict[str, list[dict[str, Any]]]:
    """The entries of a preset file, each with what its base's entry of the same name says beside.

    `inherited` is the base's name where the file has no such entry, else ""; of families `own` are the values and
    `own_depth` whether the depth stands in this file.
    """
    table = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    base = load_presets(table["base"]) if "base" in table else {}
    merged = {}
    for kind in ("preset", "family"):
        entries = {
            e["name"]: {**e, "inherited": e["inherited"] or table["base"], "own": {}, "own_depth": False}
            for e in base.get(kind, [])
        }
        for entry in table.get(kind, []):
            below = entries.get(entry["name"], {})
            own = entry.get("values", {})
            entries[entry["name"]] = {**below, **entry, "values": {**below.get("values", {}), **own}, "inherited": "",
                                      "own": own, "own_depth": "depth" in entry}  # fmt: skip
        merged[kind] = list(entries.values())
    return merged


def make_hparams(method: str, config: Any, *overrides: Mapping[str, Any]) -> tuple[Hparams, str]:
    """Hyper-parameters of a method for a model: its preset, then each of `overrides` in order; and their origin."""
    recipe = find_recipe(method)
    values, origin = preset_hparams(recipe, config)
    origin = _origin(recipe, origin, set(values), {name for override in overrides for name in override})
    values.setdefault("context_template_length_params", recipe.contexts)
    known = {f.name for f in fields(Hparams)}
    for override in overrides:
        if unknown := [str(name) for name in override if name not in known]:
            raise MethodError(f"unknown hyper-parameter {unknown[0]!r}{_near(unknown[0])}: read_hparams reads files of "
                              "other repositories; known are " + ", ".join(sorted(known)))  # fmt: skip
        if "layers" in override and "inner_params" not in override:
            values.pop("inner_params", None)  # a preset's modules are not of other layers
        values.update(override)
    if not recipe.optimizes_values and "layers" not in values:
        values["layers"] = ()
    values["method"] = recipe.name
    return Hparams(**values), origin


def _origin(recipe: Recipe, origin: str, values: set[str], given: set[str]) -> str:
    """Where the numbers that the method reads are from, when some of them are given."""
    idle = set(unused(recipe, values | given))
    values, given = values - idle, given - idle
    if not given:
        return origin
    if values <= given:
        return "given"
    if "layers" in given:
        origin = origin.replace("layers by relative depth, ", "")
    return f"{origin}; given: {', '.join(sorted(given))}"
