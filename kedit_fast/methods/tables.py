"""The tables of this room's page, made from the recipes, the hyper-parameters and the presets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kedit_fast.methods.declaration import Declaration
from kedit_fast.methods.hparams import DECLARATIONS
from kedit_fast.methods.presets import load_presets
from kedit_fast.methods.registry import RECIPES

_S = {"covariance": "lambda C + lambda_n I", "null_space": "S^-1 = P / L2", "identity": "I"}
_TUNING_COLUMNS = (
    "where", "trains", "order", "likelihood", "eos", "extra_rows", "extra_term", "optimizer", "mask", "stop",
    "placement", "router",
)  # fmt: skip
_CONSTRAINTS = {"ridge": "rho = 1", "soft_equality": "rho = `emmet_lambda`", "equality": "exact"}


def methods_table() -> str:
    """A row per closed form: its paper, its strategies, and what it keeps between batches."""
    rows = []
    for recipe in RECIPES.values():
        if recipe.tuning is not None:
            continue
        if recipe.optimizes_values:
            values = {"block": "block's output", "mlp": "MLP's output"}.get(recipe.values, f"{recipe.values} outputs")
        else:
            values = "gradients"
        rest = {
            "one value per subject": recipe.merge,
            "residual over sqrt(n)": recipe.spread == "sqrt",
            "mean key in both places": recipe.value_key == "mean",
            "largest changes alone": recipe.masks_updates,
            "spectrum restrained at the end": recipe.shaping == "prune",
            "a column before each chunk of the target": recipe.needs_chunks,
        }
        rows.append(
            (
                f"`{recipe.name}`",
                f"{recipe.title} ({_link(recipe.source)})",
                "a batch" if recipe.is_batched else "one request",
                values,
                _S[recipe.preconditioner],
                _CONSTRAINTS[recipe.constraint],
                "yes" if recipe.memory else "",
                ", ".join(words for words, true in rest.items() if true),
            )
        )
    header = ("method", "what it is", "writes at once", "values", "S", "softness", "earlier keys", "also")
    return _table(header, rows)


def tuning_table() -> str:
    """A row per method that tunes a matrix: its paper, and the fields of its record."""
    rows = [
        (
            f"`{recipe.name}`",
            f"{recipe.title} ({_link(recipe.source)})",
            *(_field(tuning[name]) for name in _TUNING_COLUMNS),
        )
        for recipe in RECIPES.values()
        if recipe.tuning is not None
        for tuning in [recipe.tuning.as_dict()]
    ]
    return _table(("method", "what it is", *(name.replace("_", " ") for name in _TUNING_COLUMNS)), rows)


def hparams_table() -> str:
    """A row per hyper-parameter: its default, the values it takes, who reads it, and what it identifies."""
    rows = [
        (
            f"`{name}`",
            "from the preset" if known.is_required else f"`{_value(known.default)}`",
            known.accepted.description,
            known.meaning.replace("|", "\\|"),
            _readers(known),
            ", ".join(known.identifies),
        )
        for name, known in DECLARATIONS.items()
    ]
    return _table(("name", "default", "values", "meaning", "read by", "identifies a stored"), rows)


def presets_table() -> str:
    """A row per preset file: the models it has published hyper-parameters for."""
    names = dict.fromkeys(recipe.preset for recipe in RECIPES.values())
    rows = []
    for name in names:
        entries = load_presets(name)
        methods = ", ".join(f"`{recipe.name}`" for recipe in RECIPES.values() if recipe.preset == name)
        models = ", ".join(
            entry["name"] + (f" (of {entry['inherited']})" if entry["inherited"] else "") for entry in entries["preset"]
        )
        rows.append((f"`{name}.toml`", methods, models))
    return _table(("file", "methods", "models"), rows)


def _link(source: str) -> str:
    """A source with links to arXiv."""
    return re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _field(value: object) -> str:
    """A field of a record as a cell; nothing for what is not there."""
    return "" if value in ("none", False) else "yes" if value is True else str(value)


def _readers(known: Declaration) -> str:
    readers = [name for name, recipe in RECIPES.items() if known.read_by(recipe)]
    others = [name for name in RECIPES if name not in readers]
    if not others:
        return "all"
    if len(others) < len(readers):
        return "all but " + ", ".join(others)
    return ", ".join(readers)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
