"""Hyper-parameters from files: our toml, EasyEdit's yaml, and json of the memit and AlphaEdit repositories."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from kedit_fast.errors import MethodError
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.methods.tuning_files import algorithm_of, our_names
from kedit_fast.support.textfiles import Repeated, parse_json, parse_toml, read_text, suffix_of

_log = logging.getLogger("kedit_fast")

# Names in the files of other frameworks for places, devices, data and output. They change nothing that is written to a
# model, or their place is elsewhere in this package.
_ELSEWHERE = {
    "alg_name", "model_name", "stats_dir", "device", "mom2_dataset", "mom2_n_samples", "mom2_dtype",
    "rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module",
    "model_parallel", "fp16", "batch_size", "max_length", "P_loc", "rewrite_module_tmps", "model_class", "class_name",
    "tokenizer_class", "tokenizer_name", "no_grad_layers", "batch_size_once", "editor_batch_size", "silent", "half",
    "weight_reg", "solve_method",
    "results_dir", "name", "calculate_objective_value", "evaluation_type", "api_key", "verbose", "description",
}  # fmt: skip
# Names that change what is written, with the values at which they do not. Other values are not implemented.
_FIXED = {
    "layer_selection": ("all",),
    "fact_token": ("subject_last",),
    "nll_loss_factor": (1,),
    "dropout": (0,),
    "enable_prompt_keys": (False,),
    "enable_random_prefix_keys": (True,),
    "original_implementation": (False,),
    "bias_update": (False, None),
    "norm_control": (0, None),
    "blue": (False, None),
    "use_chat_template": (False, None),
    "mu_reg": (1,),
}
# Those of _ELSEWHERE that may change a result: the values that do not, and where this package takes them from.
_CHOSEN_ELSEWHERE = {
    "fp16": ((False, None), "a model's dtype is chosen where it is loaded (--dtype)"),
    "half": ((False, None), "a model's dtype is chosen where it is loaded (--dtype)"),
    "batch_size": ((1, None), "the edits of a batch are chosen where they are made (--batch-size)"),
    "use_chat_template": ((False, None), "prompts in a chat template are chosen where they are made (--chat)"),
}
# Names of EasyEdit's files of SPHERE, one of which has a space, and of AnyEdit's files; with ours. AnyEdit's also name
# a `fact_token`, which its code does not read.
_RENAMED = {
    "cumulative_ratio": "sphere_energy", "suppression_strength": "sphere_strength",
    "suppression strength": "sphere_strength", "window_size": "chunk_tokens", "overlap": "chunk_overlap",
}  # fmt: skip
# Names of the repositories of EMMET, ENCORE and RLSEdit, and renamed ones, that `_translated` reads.
_TRANSLATED = ("add_prev_edits", "prob_cutoff", "lambda_reg", *_RENAMED)


def read_hparams(path: str | Path, method: str | None = None, *, warn_of_loading: bool = True) -> dict[str, Any]:
    """Hyper-parameters from a .toml (ours), .yaml (EasyEdit) or .json (memit, AlphaEdit) file.

    Other names of the frameworks' files that change nothing at their value are ignored and logged at INFO.

    Args:
        path: the file.
        method: the method that the values are for: names of a file of WISE, GRACE, FT or DINM depend on it, and
            `add_prev_edits`.
        warn_of_loading: warn of `half`, `fp16` and `batch_size`, which are chosen where a model is loaded and edited;
            False for callers that compare them with their own choice.

    Raises:
        MethodError: the file cannot be read, or asks for something that is not implemented.
    """
    raw = read_raw(path)
    values = parse_values(raw, str(path), foreign=True, method=method)
    if algorithm := algorithm_of(raw, method):
        raw = our_names(raw, algorithm, str(path), method)
    ignored = [str(name) for name in raw if name in _ELSEWHERE or name in _FIXED]
    for name, (neutral, where) in _CHOSEN_ELSEWHERE.items() if warn_of_loading else ():
        if not any(_same(raw.get(name), value) for value in neutral):
            _log.warning("%s: %s = %r is not taken from a file: %s", path, name, raw[name], where)
            ignored.remove(name)
    if ignored:
        _log.info("%s: not used, it changes no edit here: %s", path, ", ".join(ignored))
    return values


def read_raw(path: str | Path) -> Mapping[str, Any]:
    """All names and values of a file of hyper-parameters, as they stand there.

    Raises:
        MethodError: the file cannot be read, or gives a name twice.
    """
    suffix = suffix_of(path)
    if suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise MethodError(f"{path}: hyper-parameters come as .toml, .yaml, .yml or .json")
    text = read_text(path, MethodError)
    try:
        if suffix == ".toml":
            raw = parse_toml(text, str(path), MethodError)
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
    """Refuses a mapping that gives a name twice, of which yaml would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [self.construct_object(key, deep=True) for key in keys]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_values(
    raw: Mapping[str, Any], origin: str, foreign: bool = False, method: str | None = None
) -> dict[str, Any]:
    """Convert values to the types of Hparams.

    Args:
        raw: name -> value as a file or a command line gives it.
        origin: where the values are from, for messages.
        foreign: accept other names of the frameworks' files where they change nothing, and drop them.
        method: the method that the values are for.

    Raises:
        MethodError: a name that is unknown, or a value of the wrong type or not implemented.
    """
    types = {f.name: str(f.type) for f in fields(Hparams)}
    values: dict[str, Any] = {}
    if foreign and (algorithm := algorithm_of(raw, method)):
        raw = our_names(raw, algorithm, origin, method)
        raw.pop("use_chat_template", None)
    for name, value in raw.items():
        is_read = not (foreign and name == "fact_token" and "window_size" in raw)
        if name in _FIXED and is_read and not any(_same(value, allowed) for allowed in _FIXED[name]):
            accepted = " or ".join(str(allowed) for allowed in _FIXED[name] if allowed is not None)
            raise MethodError(f"{origin}: {name} = {value!r} is not implemented, only {accepted}")
        if name in types:
            try:
                values[name] = _CONVERTERS.get(types[name], str)(value)
            except (TypeError, ValueError, OverflowError):
                kind = types[name].replace("Auto", f'"{AUTO}"')
                raise MethodError(f"{origin}: {name} = {value!r} is not a {kind}") from None
        elif foreign and name in _TRANSLATED:
            for ours, translated in _translated(name, value, origin, method).items():
                if values.setdefault(ours, raw.get(ours, translated)) != translated:
                    raise MethodError(f"{origin}: {name} = {value!r} and {ours} = {raw[ours]!r} say different things")
        elif not foreign or name not in (*_ELSEWHERE, *_FIXED):
            known = ", ".join(sorted(types))
            raise MethodError(f"{origin}: unknown hyper-parameter {name!r}{nearest_name(name)}; known are {known}")
    return values


def nearest_name(name: Any) -> str:
    """A suggestion for a misspelled hyper-parameter, to be appended to a message, or ""."""
    near = difflib.get_close_matches(str(name), [f.name for f in fields(Hparams)], 1, 0.8)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _translated(name: str, value: Any, origin: str, method: str | None) -> dict[str, Any]:
    """Our hyper-parameters for a name of the repositories of EMMET, ENCORE, EasyEdit, AnyEdit and RLSEdit."""
    if name == "lambda_reg":  # its square is the weight of I in RLSEdit's system
        try:
            return {"update_norm_lambda": _number(value) ** 2}
        except (TypeError, ValueError, OverflowError):
            raise MethodError(f"{origin}: lambda_reg = {value!r} is not a number") from None
    if name in _RENAMED:
        return parse_values({_RENAMED[name]: value}, origin)
    if name == "add_prev_edits":  # keys of earlier batches stay in the system
        memory = None if method is None else find_recipe(method).memory
        if not isinstance(value, bool) or (memory is None and value) or (memory is not None and value != memory):
            raise MethodError(
                f"{origin}: add_prev_edits = {value!r} is chosen by the method here: true for encore, memit-sequential "
                "and alphaedit, false for memit and emmet"
            )
        return {}
    try:  # prob_cutoff also counts the first iteration in which all targets are the most probable tokens
        steps = -_integer(value)
    except (TypeError, ValueError, OverflowError):
        steps = -1
    if steps == 0:
        return {"most_probable_steps": 0}
    if steps < 2:
        raise MethodError(f"{origin}: prob_cutoff = {value!r} is not implemented, only 0, -2, -3, ...")
    return {"most_probable_steps": steps - 1}


def _same(value: Any, allowed: Any) -> bool:
    """Whether two values mean the same in a file: false and "false", or 0 and 0.0, but not 0 and "false"."""
    if isinstance(allowed, bool) and isinstance(value, str):
        return value.lower() == str(allowed).lower()
    return value == allowed


def _pairs(value: Any) -> tuple[tuple[int, int], ...]:
    value = json.loads(value) if isinstance(value, str) else value
    return tuple((int(length), int(count)) for length, count in value)


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(map(_number, json.loads(value) if isinstance(value, str) else value))


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(v) for v in value)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise ValueError(value)
    return str(value).lower() == "true"


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or math.isnan(number := float(value)):  # yaml reads 5e-1 as a string
        raise ValueError(value)
    return number


def _number_or_auto(value: Any) -> float | str:
    return AUTO if isinstance(value, str) and value.strip().lower() == AUTO else _number(value)


def parse_layers(value: Any) -> tuple[int, ...]:
    """Zero-based layers from "4-8" (both ends count), "3,5,7", an integer or a list; raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is no list of layers")
    if isinstance(value, int):
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


# The annotation of a field of Hparams -> what converts to it; all others are texts.
_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "tuple[int, ...]": parse_layers,
    "tuple[str, ...]": _texts,
    "tuple[tuple[int, int], ...]": _pairs,
    "tuple[float, ...]": _floats,
    "bool": _boolean,
    "int": _integer,
    "float": _number,
    "float | Auto": _number_or_auto,
}
