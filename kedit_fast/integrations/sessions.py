"""What the three integrations share: an editor that lives on the model between calls, and where files are found.

Frameworks call one function a batch, restore weights themselves or do not, and expect methods with a memory to go on.
So the editor of the last call stays with the model (and goes with it; a deep copy starts anew) together with hashes of
the edited matrices after each batch. A call that finds the matrices as the last one left them goes on; one that finds
them as they were some batches ago has those batches forgotten; anything else starts a new editor.
"""

from __future__ import annotations

import copy as copying
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from kedit_fast.editing.editor import Editor, EditResult
from kedit_fast.errors import MethodError, RequestError
from kedit_fast.integrations import easyedit_rows
from kedit_fast.integrations.framework_statistics import Text, framework_statistics
from kedit_fast.methods.hparams import Hparams, make_hparams, parse_values, read_raw, unused
from kedit_fast.methods.recipes import find_recipe
from kedit_fast.models.view import ModelView
from kedit_fast.requests.spacing import AUTO, check_separator
from kedit_fast.solver.alphaedit_projector import load_projector
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.matrix_bits import edit_fingerprint
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_PLACE = "_kedit_fast_run"  # attribute of a model
OURS = ("statistics_text", "ultraedit_rows", "target_separator")  # hyper-parameters that no framework has
_THEIRS = ("mom2_update_weight",)  # of the frameworks' files, also for methods that do not use it
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """What the frameworks' files have no name for: of a call; below it hyper-parameters; below them `defaults`."""

    statistics_text: Text | None = None  # computed from where no statistics are found; see framework_statistics
    ultraedit_rows: str | None = None  # "easyedit": the labels and tokens of EasyEdit's UltraEdit; None or "own": ours
    target_separator: str | None = None  # as of Editor; None or "auto": decided from the text
    whole_name: bool = False  # how the framework names a folder of statistics
    defaults: Options | None = None

    def key(self) -> tuple:
        """By which the same options are known again; texts that are no path by their object."""
        text = self.statistics_text
        named = text is None or isinstance(text, str | os.PathLike)
        separator = AUTO if self.target_separator is None else self.target_separator
        return str(text) if named else id(text), self.ultraedit_rows or "own", separator, self.whole_name

    def with_hparams(self, raw: Mapping[str, Any]) -> Options:
        """What holds, with what hyper-parameters say.

        Raises:
            MethodError: an unknown `ultraedit_rows` or `target_separator`.
        """
        found: dict[str, Any] = {}
        for name in OURS:
            choices = (getattr(self, name), raw.get(name), getattr(self.defaults, name, None))
            found[name] = next((choice for choice in choices if choice is not None), None)
        if found["ultraedit_rows"] not in (None, "own", "easyedit"):
            raise MethodError(f"ultraedit_rows = {found['ultraedit_rows']!r}: choose own or easyedit")
        try:
            check_separator(AUTO if found["target_separator"] is None else found["target_separator"])
        except RequestError as error:
            raise MethodError(str(error)) from None
        return Options(**found, whole_name=self.whole_name)


class _Kept:
    """What hangs on a model: not copied with it, and not pickled."""

    def __init__(self, run: Run | None = None):
        self.run = run

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple:
        return _Kept, ()


@dataclass
class Run:
    """An editor and the hashes of its matrices: before its first batch, and after each."""

    key: tuple
    editor: Editor
    states: list[tuple[str, int]]  # with the number of batches in the ledger
    state: tuple | None = None  # ids and versions of the tensors that the caller passes as state (AlphaEdit)
    held: tuple = ()  # those tensors

    def settled(self) -> bool:
        """Whether the matrices are in a state this run knows; what was put back by somebody else is forgotten."""
        if not self.editor.in_place():
            return False
        now = edit_fingerprint(list(self.editor.modules.values()))
        known = [place for place, (state, _) in enumerate(self.states) if state == now]
        if not known:
            return False
        if known[-1] < len(self.states) - 1:
            self.editor.rollback(len(self.editor.ledger.batches) - self.states[known[-1]][1], restored=True)
            del self.states[known[-1] + 1 :]
            self.state = None
        return True

    def mark(self) -> None:
        """Remember the matrices as they are."""
        self.states.append((edit_fingerprint(list(self.editor.modules.values())), len(self.editor.ledger.batches)))


def numbers_of(hparams: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A framework's hyper-parameters: the path of a file, a mapping, or an object of its class.

    Returns:
        those of `Hparams`, and all of them as they stand, those that are ours alone (`OURS`) included.

    Raises:
        MethodError: by name, for what is unknown, of a wrong type or not implemented.
    """
    if isinstance(hparams, str | Path):
        raw = dict(read_raw(hparams))
    elif isinstance(hparams, Mapping):
        raw = dict(hparams)
    elif is_dataclass(hparams):  # what scripts hang on such an object beside its fields is theirs, except our names
        raw = {f.name: getattr(hparams, f.name) for f in fields(hparams)}
        raw |= {name: getattr(hparams, name) for name in OURS if hasattr(hparams, name)}
    else:
        raw = dict(vars(hparams))
    origin = str(hparams) if isinstance(hparams, str | Path) else type(hparams).__name__
    theirs = {name: value for name, value in raw.items() if name not in OURS}
    return parse_values(theirs, origin, foreign=True), raw


def kept_by(model: torch.nn.Module) -> Run | None:
    """The run that a model carries."""
    kept = vars(model).get(_PLACE)
    return kept.run if isinstance(kept, _Kept) else None


@plain_torch(leave_inference_mode=False)
def apply(
    method: str,
    model: torch.nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    *,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | None = None,
    statistics: Statistics | None = None,
    stats_dir: str | None = None,
    reset: bool = False,
    options: Options | None = None,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], EditResult]:
    """One batch, as the frameworks' functions write it; the edited model, the parameters it had, and the result."""
    if copy:
        model = copying.deepcopy(model)
    run = run_of(method, model, tok, hparams, cache_template, statistics, stats_dir, reset=reset, options=options)
    before = {}
    if return_orig_weights:
        before = {
            f"{name}.weight": model.get_parameter(f"{name}.weight").detach().clone() for name in run.editor.modules
        }
    result = edit(run, requests)
    return model, before, result


def function(
    method: str, name: str, whole_name: bool = False
) -> Callable[..., tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """A function with the signature of the memit repository."""

    def apply_to_model(
        model: torch.nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        cache_template: str | None = None,
        *,
        statistics: Statistics | None = None,
        stats_dir: str = "data/stats",
        statistics_text: Text | None = None,
        target_separator: str | None = None,
    ) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        return apply(
            method, model, tok, requests, hparams, copy=copy, return_orig_weights=return_orig_weights,
            cache_template=cache_template, statistics=statistics, stats_dir=stats_dir,
            options=Options(statistics_text, target_separator=target_separator, whole_name=whole_name),
        )[:2]  # fmt: skip

    apply_to_model.__name__ = apply_to_model.__qualname__ = name
    apply_to_model.__doc__ = f"""Write a batch with {method}.

    Args:
        model: edited in place, unless `copy`.
        tok: its tokenizer.
        requests: with prompt (one {{}}), subject, target_new {{"str": text}}, and case_id where `cache_template` is.
        hparams: an object of the repository's class, a mapping, or the path of a json file.
        copy: edit a deep copy.
        return_orig_weights: return what the parameters were.
        cache_template: of its npz files of values, with three {{}}. Not read and not written for ROME, whose files do
            not say for which weights they hold.
        statistics: instead of those in `stats_dir`.
        stats_dir: its STATS_DIR.
        statistics_text: a file, a `datasets:` name or documents, from which statistics that are not there are computed.
        target_separator: between prompt and target: " " as there, "" or "auto" (None): decided from the text. Also a
            hyper-parameter.

    Returns:
        the model, and parameter name -> what it was before this call, as it is stored.

    Raises:
        KeditError: the model is as it was before the call.
    """
    return apply_to_model


@plain_torch(leave_inference_mode=False)
def edit(run: Run, requests: Sequence[Mapping[str, Any]]) -> EditResult:
    """Write a batch, and remember the state it leaves."""
    result = run.editor.edit([_record(request) for request in requests])
    try:
        run.editor.finish()  # PRUNE: after every call, since no call is known to be the last
    except BaseException:
        if result.batch:
            run.editor.rollback()
        raise
    if result.batch:
        run.mark()
    return result


def _record(request: Mapping[str, Any]) -> dict[str, Any]:
    """A framework's request as one of ours: its `case_id` names it."""
    found = {n: request[n] for n in ("prompt", "subject", "target_new", "target_separator") if n in request}
    return found | ({"id": request["case_id"]} if "case_id" in request else {})


@plain_torch(leave_inference_mode=False)
def run_of(
    method: str,
    model: torch.nn.Module,
    tok: Any,
    hparams: Any,
    cache_template: str | None,
    statistics: Statistics | None,
    stats_dir: str | None,
    null_spaces: Callable[[], Mapping[int, NullSpace]] | None = None,
    reset: bool = False,
    prefixes: Run | None = None,
    options: Options | None = None,
) -> Run:
    """The run that a model carries, if it is of the same method and numbers and fits its matrices; else a new one.

    A new one takes over the context prefixes of the one before (with `reset`, of `prefixes`): an edited model would
    write other ones.
    """
    numbers, raw = numbers_of(hparams)
    recipe, options = find_recipe(method), (options or Options()).with_hparams(raw)
    for name in unused(recipe, numbers):
        if name in _THEIRS:
            del numbers[name]
    if not unused(recipe, ("on_predicted",)):
        numbers.setdefault("on_predicted", "allow")  # as published
    theirs = {name: value for name, value in raw.items() if name not in OURS}
    key = (method, json.dumps(theirs, sort_keys=True, default=str), id(tok), str(cache_template), id(statistics),
           str(stats_dir), null_spaces is None, options.key())  # fmt: skip
    run = kept_by(model)
    if run is not None and not reset and run.key == key:
        if run.settled():
            return run
        _log.info("the matrices were changed by something else: %s starts anew", method)
    chosen, _ = make_hparams(method, model.config, numbers)
    check_modules(model, chosen, raw)
    easyedit_rows_wanted = options.ultraedit_rows == "easyedit" and recipe.values == "gradients"
    if easyedit_rows_wanted and options.target_separator == "":
        raise MethodError(
            'ultraedit_rows = "easyedit" puts a space before every target: target_separator = "" needs "own"'
        )
    one_value = recipe.schedule == "mass" and recipe.values == "block"
    if cache_template is not None and "{}" in str(cache_template) and not one_value:
        _log.warning("%s: the files of values that cache_template names are not used", recipe.name)
        cache_template = None
    _say_half(model, raw)
    projector, spaces = raw.get("P_loc"), None if null_spaces is None else null_spaces()
    if method == "alphaedit" and spaces is None and statistics is None and projector and Path(projector).exists():
        spaces = load_projector(projector, chosen.layers, chosen.L2, trust=True)
    if chosen.uses_statistics and spaces is None and statistics is None:
        statistics = framework_statistics(
            model, tok, chosen.layers, raw, stats_dir, options.statistics_text, options.whole_name
        )
    earlier = prefixes if reset else run
    editor = Editor(
        model, tok, method, statistics=statistics, null_spaces=spaces, hparams=numbers, values=cache_template,
        prefixes=None if earlier is None or earlier.key[2] != id(tok) else earlier.editor.prefixes,
        target_separator=AUTO if options.target_separator is None else options.target_separator,
    )  # fmt: skip
    if easyedit_rows_wanted:
        editor.gradients = easyedit_rows.gatherer(tok, raw)
    run = Run(key, editor, [])
    run.mark()
    object.__setattr__(model, _PLACE, _Kept(run))
    return run


def _say_half(model: torch.nn.Module, raw: Mapping[str, Any]) -> None:
    """Name a file's wish for a 16-bit model where the model is not one: a function edits what it is given."""
    dtype = next(model.parameters()).dtype
    for name in ("half", "fp16"):
        if raw.get(name) and dtype not in _HALF:
            _log.warning("%s = true: the model is %s and is edited as it is; load it in float16 to follow", name,
                         str(dtype).removeprefix("torch."))  # fmt: skip


def check_modules(model: torch.nn.Module, chosen: Hparams, raw: Mapping[str, Any]) -> None:
    """Raise MethodError when a file's `rewrite_module_tmp` is another module than the one edited here."""
    template, view = raw.get("rewrite_module_tmp"), ModelView(model)
    for layer in chosen.layers:
        if template and template.format(layer) != view.module_name(layer):
            raise MethodError(
                f"rewrite_module_tmp names {template.format(layer)}, of {view.spec.name} models "
                f"{view.module_name(layer)} is edited: is this the file of another model?"
            )
