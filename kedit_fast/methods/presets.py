"""Published hyper-parameters of known models, and guesses for others."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kedit_fast.errors import MethodError
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.hparams import Hparams, unused
from kedit_fast.methods.hparams_files import nearest_name, parse_values
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
GUESS = "guess"
"""What the origin of hyper-parameters begins with where no preset has them."""


def text_config(config: Any) -> Any:
    """The part of a model's configuration that describes its text decoder; of a text-only model the whole of it."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def preset_hparams(recipe: Recipe, config: Any) -> tuple[dict[str, Any], str]:
    """Published hyper-parameters for a model, and where they are from. Without a preset, a guess by relative depth.

    A model that has a preset of the method's base alone gets that one, with this method's values for its family. A
    multimodal model is one of the family and sizes that its text part has.
    """
    config = text_config(config)
    table = load_presets(recipe.preset)
    family = _family_of(table["family"], config)
    for entry in table["preset"]:
        if not _matches(entry["match"], config):
            continue
        values, origin = dict(entry["values"]), f"preset {entry['name']} ({entry['source']}"
        if entry["inherited"]:
            origin += f", as for {entry['inherited']}"
            if family["override"]:
                values |= family["override"]
                origin += f", with values of {family['source']}"
            if family["overrides_depth"]:
                values["layers"] = _by_depth(recipe, family, config.num_hidden_layers)
        return parse_values(values, entry["source"]), origin + ")"
    layers = _by_depth(recipe, family, config.num_hidden_layers)
    values = parse_values({**family["values"], **family["guess"]}, family["source"])
    scales = AUTO in values.values() or values.get("units") == "relative"
    scaled = "numbers scaled to the model, the rest of " if scales else "values of "
    return {**values, "layers": layers}, f"{GUESS}: layers by relative depth, {scaled}{family['source']}"


def guessed_numbers(recipe: Recipe, config: Any) -> dict[str, Any]:
    """What replaces the published numbers that have a scale, for a model without a preset: most are "auto"."""
    family = _family_of(load_presets(recipe.preset)["family"], text_config(config))
    return parse_values(family["guess"], family["source"])


def is_guess(origin: str) -> bool:
    """Whether an origin, as `make_hparams` tells it, is that of a model without a preset."""
    return origin.startswith(GUESS)


def published_values(method: str, config: Any) -> dict[str, Any]:
    """Hyper-parameters from the published file of a model's family, for a model without a preset: nothing is "auto".

    Such numbers have the scale of another model. Comparisons with released code need them, which knows no others.
    """
    recipe, config = find_recipe(method), text_config(config)
    family = _family_of(load_presets(recipe.preset)["family"], config)
    layers = _by_depth(recipe, family, config.num_hidden_layers)
    return {**parse_values(family["values"], family["source"]), "layers": layers}


def _matches(match: Mapping[str, Any], config: Any) -> bool:
    """Whether a configuration has each value of a preset's `match`; of a list, any."""
    accepted = {name: value if isinstance(value, list) else [value] for name, value in match.items()}
    return all(getattr(config, name, None) in values for name, values in accepted.items())


def _family_of(families: Sequence[dict[str, Any]], config: Any) -> dict[str, Any]:
    """The family of a model; the last one serves all that are in none."""
    kind = getattr(config, "model_type", None)
    return next((entry for entry in families if kind in entry["model_types"]), families[-1])


def _by_depth(recipe: Recipe, family: Mapping[str, Any], count: int) -> tuple[int, ...]:
    first, last = (min(count - 1, round(depth * (count - 1))) for depth in family["depth"])
    return (last,) if recipe.edits_one_layer else tuple(range(first, last + 1))


def load_presets(name: str) -> dict[str, list[dict[str, Any]]]:
    """The entries of a preset file, each merged over the entry of the same name in the file's base.

    In each entry, `inherited` is the base's name where this file has no such entry, else "". Of families, `override`
    holds the values of this file alone, and `overrides_depth` says whether the depth stands in this file. `guess` holds
    what replaces the values for a model without a preset.
    """
    table = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    base = load_presets(table["base"]) if "base" in table else {}
    merged = {}
    for kind in ("preset", "family"):
        entries = {
            e["name"]: {**e, "inherited": e["inherited"] or table["base"], "override": {}, "overrides_depth": False}
            for e in base.get(kind, [])
        }
        for entry in table.get(kind, []):
            below = entries.get(entry["name"], {})
            override = entry.get("values", {})
            entries[entry["name"]] = {
                **below,
                **entry,
                "values": {**below.get("values", {}), **override},
                "guess": {**below.get("guess", {}), **entry.get("guess", {})},
                "inherited": "",
                "override": override,
                "overrides_depth": "depth" in entry,
            }
        merged[kind] = list(entries.values())
    return merged


def make_hparams(method: str, config: Any, *overrides: Mapping[str, Any]) -> tuple[Hparams, str]:
    """The hyper-parameters of a method for a model, and where they are from.

    Args:
        method: its name.
        config: the configuration of the model.
        overrides: name -> value, in the order in which they replace the values of the preset and of each other.
    """
    recipe = find_recipe(method)
    values, origin = preset_hparams(recipe, config)
    origin = _origin(recipe, origin, set(values), {name for override in overrides for name in override})
    values.setdefault("context_template_length_params", recipe.contexts)
    known = {f.name for f in fields(Hparams)}
    for override in overrides:
        if unknown := [str(name) for name in override if name not in known]:
            raise MethodError(
                f"unknown hyper-parameter {unknown[0]!r}{nearest_name(unknown[0])}: read_hparams reads files of "
                "other repositories; known are " + ", ".join(sorted(known))
            )
        if "layers" in override and "inner_params" not in override:
            values.pop("inner_params", None)  # a preset's modules are not of other layers
        values.update(parse_values(override, "hyper-parameters"))
    if recipe.gathers_gradients and "layers" not in values:
        values["layers"] = ()
    values["method"] = recipe.name
    return Hparams(**values), origin


def _origin(recipe: Recipe, origin: str, values: set[str], overridden: set[str]) -> str:
    """Where the hyper-parameters that the method reads are from, when some of the preset's are overridden."""
    idle = set(unused(recipe, values | overridden))
    values, overridden = values - idle, overridden - idle
    if not overridden:
        return origin
    if values <= overridden:
        return "given"
    if "layers" in overridden:
        origin = origin.replace("layers by relative depth, ", "")
    return f"{origin}; given: {', '.join(sorted(overridden))}"
