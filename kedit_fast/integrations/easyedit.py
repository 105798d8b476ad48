"""EasyEdit: functions with its signature, and `install()`, which puts them into its table of algorithms.

    from kedit_fast.integrations import easyedit
    easyedit.install()                      # before BaseEditor.from_hparams
    editor = BaseEditor.from_hparams(MEMITHyperParams.from_hparams("hparams/MEMIT/llama-7b"))

What is other than in EasyEdit: ROME and R-ROME write every request of a batch, one after another; UltraEdit takes the
whole batch, whatever `batch_size`, and other rows and labels (`ultraedit_rows="easyedit"` takes EasyEdit's, see
`easyedit_rows`); a space stands before targets where the text asks for one, also for PMET (`target_separator=" "` puts
one before all, as EasyEdit does, but for its PMET on most models); PMET finds its positions whatever the padding;
AlphaEdit's keys belong to the model (and go with it) instead of the process, and are forgotten when weights are
restored; a failed batch leaves the model as it was; a model is edited in the dtype it has, and `half: true` is named
where it is another. Statistics are read from `stats_dir` and AlphaEdit's projector from `P_loc`; statistics that are
not there are computed where a text is configured (`framework_statistics`), once. Five methods that EasyEdit does not
have come with it: MEMIT-Seq, MEMIT-Merge, ENCORE, RECT, and PRUNE, which restrains the total after every call.
`install()` also lets its BatchEditor and its `HyperParams.from_hparams` (and that of MEMITHyperParams) take those five.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import MethodError
from kedit_fast.integrations import sessions
from kedit_fast.integrations.framework_statistics import Text
from kedit_fast.methods.hparams import parse_values, read_raw

Applied = tuple[torch.nn.Module, dict[str, torch.Tensor]]


def _function(method: str, name: str, defaults: sessions.Options | None = None) -> Callable[..., Applied]:
    def apply(
        model: torch.nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        cache_template: str | None = None,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> Applied:
        options = sessions.Options(**{name: kwargs.get(name) for name in sessions.OURS}, defaults=defaults)
        model, before, _ = sessions.apply(
            method, model, tok, requests, hparams, copy=copy, return_orig_weights=return_orig_weights,
            cache_template=cache_template, statistics=kwargs.get("statistics"), reset=bool(kwargs.get("reset_cache")),
            options=options,
        )  # fmt: skip
        return model, before

    apply.__name__ = apply.__qualname__ = name
    apply.__doc__ = f"""Write a batch with {method}; as EasyEdit's function of this name.

    Args:
        model: edited in place, unless `copy`.
        tok: its tokenizer.
        requests: with prompt (with {{}} or the subject in it), subject, target_new (a text or {{"str": text}}).
        hparams: an object of EasyEdit's class, a mapping, or the path of one of its yaml files.
        copy: edit a deep copy.
        return_orig_weights: return what the parameters were.
        cache_template: of memit's npz files of values, with three {{}}; requests then need a case_id.
        keep_original_weight: has no meaning here; copies come back where `return_orig_weights` asks for them.
        **kwargs: `statistics` of kedit_fast, instead of those in `stats_dir`; `statistics_text`, `ultraedit_rows` and
            `target_separator`, see `install`; `reset_cache`, to forget earlier batches; anything else that EasyEdit
            passes is not looked at.

    Returns:
        the model, and parameter name -> what it was before this call, as it is stored.

    Raises:
        KeditError: the model is as it was before the call.
    """
    return apply


apply_rome_to_model = _function("rome", "apply_rome_to_model")
apply_r_rome_to_model = _function("r-rome", "apply_r_rome_to_model")
apply_memit_to_model = _function("memit", "apply_memit_to_model")
apply_pmet_to_model = _function("pmet", "apply_pmet_to_model")
apply_emmet_to_model = _function("emmet", "apply_emmet_to_model")
apply_AlphaEdit_to_model = _function("alphaedit", "apply_AlphaEdit_to_model")
apply_ultraedit_to_model = _function("ultraedit", "apply_ultraedit_to_model")
# Methods that EasyEdit does not have.
apply_memit_seq_to_model = _function("memit-sequential", "apply_memit_seq_to_model")
apply_memit_merge_to_model = _function("memit-merge", "apply_memit_merge_to_model")
apply_encore_to_model = _function("encore", "apply_encore_to_model")
apply_rect_to_model = _function("rect", "apply_rect_to_model")
apply_prune_to_model = _function("prune", "apply_prune_to_model")

ALGORITHMS: dict[str, Callable[..., Applied]] = {  # by the names of EasyEdit's table
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
}
ADDED = {  # what EasyEdit does not have -> our name of it
    "MEMIT-Seq": "memit-sequential", "MEMIT-Merge": "memit-merge", "ENCORE": "encore", "RECT": "rect", "PRUNE": "prune",
}  # fmt: skip
SUFFIXES = (".yaml", ".yml", ".json")
_METHODS = {
    "ROME": "rome", "R-ROME": "r-rome", "MEMIT": "memit", "PMET": "pmet", "EMMET": "emmet", "AlphaEdit": "alphaedit",
    "ULTRAEDIT": "ultraedit", **ADDED,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class _Installed:
    """A table that ours were put into, how it is put back, and what was asked for."""

    table: MutableMapping[str, Any]
    undo: list[Callable[[], None]]
    defaults: sessions.Options


_installed: list[_Installed] = []


def install(
    table: MutableMapping[str, Any] | None = None,
    *,
    statistics_text: Text | None = None,
    ultraedit_rows: str | None = None,
    target_separator: str | None = None,
) -> None:
    """Put our functions into EasyEdit's table; editors made from then on use them. Again with the same is nothing.

    With EasyEdit's own table the five added methods are made known beside it: BatchEditor takes them, and
    `HyperParams.from_hparams` and `MEMITHyperParams.from_hparams` read a yaml whose alg_name is one of them.

    Args:
        table: None for `easyeditor.util.alg_dict.ALG_DICT`.
        statistics_text: a file, a `datasets:` name or documents, from which statistics are computed that `stats_dir`
            does not have; they are kept there.
        ultraedit_rows: "easyedit" for the labels and tokens of EasyEdit's own UltraEdit (see `easyedit_rows`), "own"
            for ours.
        target_separator: between prompts and targets: " " as EasyEdit's code and metrics have it, "" or "auto" (None):
            decided from the text. Hyper-parameters of these three names, and arguments of a call, come before.

    Raises:
        MethodError: an unknown `ultraedit_rows` or `target_separator`, an EasyEdit whose parts have other names, or
            other options than those that are installed; nothing is changed.
    """
    defaults = sessions.Options(statistics_text, ultraedit_rows, target_separator).with_hparams({})
    table = _part("util.alg_dict", "ALG_DICT") if table is None else table
    whole = table is getattr(sys.modules.get("easyeditor.util.alg_dict"), "ALG_DICT", None)
    for place in _installed:
        if place.table is table:
            if place.defaults.key() != defaults.key() and place.defaults != defaults:
                now, then = _said(place.defaults), _said(defaults)
                raise MethodError(f"installed already with {now}: uninstall() first, to install with {then}")
            return
    undo: list[Callable[[], None]] = []
    try:
        _replace_items(table, _functions(defaults), undo)
        if whole:
            _let_batch(_part("editors.batch_editor", "BatchEditor"), undo)
            for module, name in (("util.hparams", "HyperParams"), ("models.memit", "MEMITHyperParams")):
                _let_load(_part(module, name), undo)
    except BaseException:
        _put_back(undo)
        raise
    _installed.append(_Installed(table, undo, defaults))


def uninstall(table: MutableMapping[str, Any] | None = None) -> None:
    """Put back what `install` replaced. Again is nothing."""
    table = _part("util.alg_dict", "ALG_DICT") if table is None else table
    for number, place in enumerate(_installed):
        if place.table is table:
            del _installed[number]
            _put_back(place.undo)
            return


def load_hparams(path: str | Path) -> Any:
    """The hyper-parameters of one of the added methods from a yaml in EasyEdit's layout, as its editors take them.

    Args:
        path: with or without ".yaml"; its alg_name is one of ADDED.

    Returns:
        an object of a class made for the file, below EasyEdit's HyperParams; max_length, batch_size, model_parallel and
        device are filled in where the file has none, as EasyEdit's classes do.

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
    theirs = {key: value for key, value in raw.items() if key not in sessions.OURS}
    filled = {"max_length": 40, "batch_size": 1, "model_parallel": False,
              "device": 0 if torch.cuda.is_available() else "cpu"}  # fmt: skip
    values = {**filled, **raw, **parse_values(theirs, str(path), foreign=True)}
    base = _part("util.hparams", "HyperParams")
    kind = dataclasses.make_dataclass(f"{name.replace('-', '')}HyperParams", list(values), bases=(base,))
    return kind(**values)


def _said(options: sessions.Options) -> str:
    """The options that were given, for messages."""
    given = {name: getattr(options, name) for name in sessions.OURS if getattr(options, name) is not None}
    return ", ".join(f"{name} = {str(value)[:60]!r}" for name, value in given.items()) or "no options"


def _functions(defaults: sessions.Options) -> dict[str, Callable[..., Applied]]:
    if defaults == sessions.Options():
        return ALGORITHMS
    return {name: _function(_METHODS[name], apply.__name__, defaults) for name, apply in ALGORITHMS.items()}


def _replace_items(table: MutableMapping[str, Any], items: Mapping[str, Any], undo: list[Callable[[], None]]) -> None:
    held = {name: table[name] for name in items if name in table}

    def back() -> None:
        for name in items:
            table.pop(name, None)
        table.update(held)

    undo.append(back)
    table.update(items)


def _let_batch(editor: Any, undo: list[Callable[[], None]]) -> None:
    """BatchEditor says of the added methods, too, that they can be batch-edited."""
    known = editor.is_batchable_method

    def is_batchable_method(alg_name: str) -> bool:
        return alg_name in ADDED or known(alg_name)

    _replace_attribute(editor, "is_batchable_method", staticmethod(is_batchable_method), undo)


def _let_load(kind: Any, undo: list[Callable[[], None]]) -> None:
    """`from_hparams` of a class reads the yaml of an added method; other files as before, where it could."""
    before = vars(kind).get("from_hparams")

    def from_hparams(cls: Any, hparams_name_or_path: str) -> Any:
        path = str(hparams_name_or_path)
        path = path if path.endswith(SUFFIXES) else f"{path}.yaml"
        if before is None or (Path(path).exists() and read_raw(path).get("alg_name") in ADDED):
            return load_hparams(path)
        return before.__get__(None, cls)(hparams_name_or_path)

    _replace_attribute(kind, "from_hparams", classmethod(from_hparams), undo)


def _replace_attribute(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    missing = object()
    held = vars(owner).get(name, missing)
    undo.append(lambda: delattr(owner, name) if held is missing else setattr(owner, name, held))
    setattr(owner, name, value)


def _put_back(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def _part(module: str, name: str) -> Any:
    """A part of EasyEdit; raises MethodError where this EasyEdit has it not."""
    try:
        return getattr(importlib.import_module(f"easyeditor.{module}"), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise MethodError(f"this EasyEdit has no easyeditor.{module}.{name}: {error}") from error
