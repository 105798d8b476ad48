"""EasyEdit: functions with its signature, and `install()`, which puts them into its table of algorithms.

    from kedit_fast.integrations import easyedit
    easyedit.install()                      # before BaseEditor.from_hparams
    editor = BaseEditor.from_hparams(MEMITHyperParams.from_hparams("hparams/MEMIT/llama-7b"))

How these differ from EasyEdit's own:

- ROME and R-ROME write every request of a batch, one after another.
- UltraEdit takes the whole batch, whatever `batch_size`, with rows and labels of its own; `ultraedit_rows="easyedit"`
  takes EasyEdit's (see `easyedit_rows`).
- A space stands before targets where the text asks for one, also for PMET. `target_separator=" "` puts one before all,
  as EasyEdit does (except in its PMET on most models).
- PMET finds its positions whatever the padding.
- AlphaEdit's keys belong to the model instead of the process, and are forgotten when weights are restored.
- A failed batch leaves the model as it was.
- WISE, GRACE, FT and DINM: see `easyedit_tuning`.
- A model is edited in the dtype it has; a warning says so where the file has `half: true` and the model is not.

Statistics are read from `stats_dir` and AlphaEdit's projector from `P_loc`. Missing statistics are computed once, where
a text is configured (`framework_statistics`).

Five methods that EasyEdit does not have are added: MEMIT-Seq, MEMIT-Merge, ENCORE, RECT, and PRUNE, which restrains the
total after every call. `install()` makes EasyEdit's BatchEditor, `HyperParams.from_hparams` and
`MEMITHyperParams.from_hparams` accept them.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import MethodError
from kedit_fast.integrations.easyedit_tuning import dinm_function, fine_tuning_function, grace_function, wise_function
from kedit_fast.integrations.framework_statistics import Text
from kedit_fast.integrations.options import OUR_HPARAMS, Options, UltraEditRows
from kedit_fast.integrations.signatures import easyedit_function
from kedit_fast.methods.hparams_files import parse_values, read_raw
from kedit_fast.models.architectures import ArchSpec

ADDED = {
    "MEMIT-Seq": "memit-sequential",
    "MEMIT-Merge": "memit-merge",
    "ENCORE": "encore",
    "RECT": "rect",
    "PRUNE": "prune",
}
"""Methods that EasyEdit does not have, by their names in its table; with our names."""
_METHODS = {
    "ROME": "rome",
    "R-ROME": "r-rome",
    "MEMIT": "memit",
    "PMET": "pmet",
    "EMMET": "emmet",
    "AlphaEdit": "alphaedit",
    "ULTRAEDIT": "ultraedit",
    **ADDED,
}
SUFFIXES = (".yaml", ".yml", ".json")

apply_rome_to_model = easyedit_function("rome", "apply_rome_to_model")
apply_r_rome_to_model = easyedit_function("r-rome", "apply_r_rome_to_model")
apply_memit_to_model = easyedit_function("memit", "apply_memit_to_model")
apply_pmet_to_model = easyedit_function("pmet", "apply_pmet_to_model")
apply_emmet_to_model = easyedit_function("emmet", "apply_emmet_to_model")
apply_AlphaEdit_to_model = easyedit_function("alphaedit", "apply_AlphaEdit_to_model")
apply_ultraedit_to_model = easyedit_function("ultraedit", "apply_ultraedit_to_model")
apply_memit_seq_to_model = easyedit_function("memit-sequential", "apply_memit_seq_to_model")
apply_memit_merge_to_model = easyedit_function("memit-merge", "apply_memit_merge_to_model")
apply_encore_to_model = easyedit_function("encore", "apply_encore_to_model")
apply_rect_to_model = easyedit_function("rect", "apply_rect_to_model")
apply_prune_to_model = easyedit_function("prune", "apply_prune_to_model")
apply_wise_to_model = wise_function("apply_wise_to_model")
apply_grace_to_model = grace_function("apply_grace_to_model")
apply_ft_to_model = fine_tuning_function("apply_ft_to_model")
apply_dinm_to_model = dinm_function("apply_dinm_to_model")

ALGORITHMS: dict[str, Callable[..., Any]] = {
    "ROME": apply_rome_to_model,
    "R-ROME": apply_r_rome_to_model,
    "MEMIT": apply_memit_to_model,
    "PMET": apply_pmet_to_model,
    "EMMET": apply_emmet_to_model,
    "AlphaEdit": apply_AlphaEdit_to_model,
    "ULTRAEDIT": apply_ultraedit_to_model,
    "MEMIT-Seq": apply_memit_seq_to_model,
    "MEMIT-Merge": apply_memit_merge_to_model,
    "ENCORE": apply_encore_to_model,
    "RECT": apply_rect_to_model,
    "PRUNE": apply_prune_to_model,
    "WISE": apply_wise_to_model,
    "GRACE": apply_grace_to_model,
    "FT": apply_ft_to_model,
    "DINM": apply_dinm_to_model,
}
"""By the names of EasyEdit's table."""
_TUNING: dict[str, Callable[[str, Options], Callable[..., Any]]] = {
    "WISE": wise_function,
    "GRACE": grace_function,
    "FT": fine_tuning_function,
    "DINM": dinm_function,
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Installation:
    """A table that our functions were put into."""

    table: MutableMapping[str, Any]
    undo: list[Callable[[], None]]
    """Steps that restore the table, to be run from the last to the first."""
    defaults: Options
    """What it was installed with."""


_installations: list[_Installation] = []


def install(
    table: MutableMapping[str, Any] | None = None,
    *,
    statistics_text: Text | None = None,
    ultraedit_rows: UltraEditRows | None = None,
    target_separator: str | None = None,
    spec: ArchSpec | str | None = None,
) -> None:
    """Put our functions into EasyEdit's table; editors that are made afterwards use them.

    With EasyEdit's own table, BatchEditor accepts the five added methods, too, and `HyperParams.from_hparams` and
    `MEMITHyperParams.from_hparams` read a yaml whose alg_name is one of them. A second call with the same options does
    nothing.

    Args:
        table: None for `easyeditor.util.alg_dict.ALG_DICT`.
        statistics_text: a file, a `datasets:` name or documents. Statistics that `stats_dir` does not have are computed
            from it and stored there.
        ultraedit_rows: "easyedit" for the labels and tokens of EasyEdit's own UltraEdit (see `easyedit_rows`), "own"
            for ours.
        target_separator: between prompts and targets: " " as EasyEdit's code and metrics have it, "" for nothing, or
            "auto" (None): decided from the text.
        spec: an ArchSpec for an architecture that is not known, or the path of its JSON file.

    An argument of a call, or a hyper-parameter of the same name, overrides each of the last four.

    Raises:
        MethodError: an unknown `ultraedit_rows`, `target_separator` or `spec`, an EasyEdit whose parts have other
            names, or an earlier call with other options; nothing is changed.
    """
    defaults = Options(statistics_text, ultraedit_rows, target_separator, spec).with_hparams({})
    algorithms: MutableMapping[str, Any] = _part("util.alg_dict", "ALG_DICT") if table is None else table
    is_easyedits = algorithms is getattr(sys.modules.get("easyeditor.util.alg_dict"), "ALG_DICT", None)
    for installation in _installations:
        if installation.table is algorithms:
            current = installation.defaults
            if current.key() != defaults.key() and current != defaults:
                raise MethodError(
                    f"installed already with {_describe(current)}: uninstall() first, to install with "
                    f"{_describe(defaults)}"
                )
            return
    undo: list[Callable[[], None]] = []
    try:
        _replace_items(algorithms, _functions(defaults), undo)
        if is_easyedits:
            _accept_batches(_part("editors.batch_editor", "BatchEditor"), undo)
            for module, name in (("util.hparams", "HyperParams"), ("models.memit", "MEMITHyperParams")):
                _accept_files(_part(module, name), undo)
    except BaseException:
        _run_backwards(undo)
        raise
    _installations.append(_Installation(algorithms, undo, defaults))


def uninstall(table: MutableMapping[str, Any] | None = None) -> None:
    """Restore what `install` replaced; does nothing where nothing is installed."""
    table = _part("util.alg_dict", "ALG_DICT") if table is None else table
    for index, installation in enumerate(_installations):
        if installation.table is table:
            del _installations[index]
            _run_backwards(installation.undo)
            return


def load_hparams(path: str | Path) -> Any:
    """Read the hyper-parameters of one of the added methods from a yaml in EasyEdit's layout.

    Args:
        path: with or without ".yaml"; its alg_name is one of `ADDED`.

    Returns:
        an object that EasyEdit's editors take: of a class derived from its HyperParams and made for the file. Where the
        file has no max_length, batch_size, model_parallel or device, they have the defaults of EasyEdit's classes.

    Raises:
        MethodError: a file that cannot be read, an unknown or unusable name or value, another alg_name, no model_name.
    """
    path = Path(path) if str(path).endswith(SUFFIXES) else Path(f"{path}.yaml")
    raw = dict(read_raw(path))
    name = raw.get("alg_name")
    if name not in ADDED:
        raise MethodError(f"{path}: alg_name = {name!r} is not one of {', '.join(ADDED)}")
    if not raw.get("model_name"):
        raise MethodError(f"{path} has no model_name, which EasyEdit's editors load")
    theirs = {key: value for key, value in raw.items() if key not in OUR_HPARAMS}
    device = 0 if torch.cuda.is_available() else "cpu"
    defaults = {"max_length": 40, "batch_size": 1, "model_parallel": False, "device": device}
    values = {**defaults, **raw, **parse_values(theirs, str(path), foreign=True)}
    base = _part("util.hparams", "HyperParams")
    hparams_class = dataclasses.make_dataclass(f"{name.replace('-', '')}HyperParams", list(values), bases=(base,))
    return hparams_class(**values)


def _describe(options: Options) -> str:
    """The options that were given, for messages."""
    return ", ".join(f"{name} = {str(value)[:60]!r}" for name, value in options.given().items()) or "no options"


def _functions(defaults: Options) -> dict[str, Callable[..., Any]]:
    if defaults == Options():
        return ALGORITHMS
    return {
        name: _TUNING[name](function.__name__, defaults)
        if name in _TUNING
        else easyedit_function(_METHODS[name], function.__name__, defaults)
        for name, function in ALGORITHMS.items()
    }


def _replace_items(table: MutableMapping[str, Any], items: Mapping[str, Any], undo: list[Callable[[], None]]) -> None:
    replaced = {name: table[name] for name in items if name in table}

    def restore() -> None:
        for name in items:
            table.pop(name, None)
        table.update(replaced)

    undo.append(restore)
    table.update(items)


def _accept_batches(editor: Any, undo: list[Callable[[], None]]) -> None:
    """Make BatchEditor take the added methods for methods that edit in batches."""
    known = editor.is_batchable_method

    def is_batchable_method(alg_name: str) -> bool:
        return alg_name in ADDED or known(alg_name)

    _replace_attribute(editor, "is_batchable_method", staticmethod(is_batchable_method), undo)


def _accept_files(hparams_class: Any, undo: list[Callable[[], None]]) -> None:
    """Make `from_hparams` of a class read the yaml of an added method; other files are read as before."""
    before = vars(hparams_class).get("from_hparams")

    def from_hparams(cls: Any, hparams_name_or_path: str) -> Any:
        path = str(hparams_name_or_path)
        path = path if path.endswith(SUFFIXES) else f"{path}.yaml"
        if before is None or (Path(path).exists() and read_raw(path).get("alg_name") in ADDED):
            return load_hparams(path)
        return before.__get__(None, cls)(hparams_name_or_path)

    _replace_attribute(hparams_class, "from_hparams", classmethod(from_hparams), undo)


def _replace_attribute(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    missing = object()
    replaced = vars(owner).get(name, missing)
    undo.append(lambda: delattr(owner, name) if replaced is missing else setattr(owner, name, replaced))
    setattr(owner, name, value)


def _run_backwards(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def _part(module: str, name: str) -> Any:
    """An object of EasyEdit; raises MethodError where this EasyEdit does not have it."""
    try:
        return getattr(importlib.import_module(f"easyeditor.{module}"), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise MethodError(f"this EasyEdit has no easyeditor.{module}.{name}: {error}") from error
