"""What the three integrations share: an editor that lives on the model between calls.

A framework calls one function per batch, may or may not restore weights itself, and expects a method with a memory to
continue. So the editor of the last call stays attached to the model, together with hashes of the edited matrices after
each batch. It goes when the model goes; a deep copy of the model starts without one.

The next call compares hashes. If the matrices are as the last batch left them, it continues. If they are as some
earlier batch left them, the batches after that one are forgotten first. Anything else starts a new editor.
"""

from __future__ import annotations

import copy as copying
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kedit_fast.editing.editor import Editor, EditResult
from kedit_fast.editing.tuning.wise import ActivationTuning
from kedit_fast.errors import MethodError
from kedit_fast.integrations import easyedit_rows
from kedit_fast.integrations.framework_statistics import framework_statistics
from kedit_fast.integrations.options import OUR_HPARAMS, Options
from kedit_fast.memories.attach import attached as attached_memory
from kedit_fast.memories.memory import SideMemory
from kedit_fast.methods.hparams import PUBLISHED_UNUSED, Hparams, unused
from kedit_fast.methods.hparams_files import parse_values, read_raw
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.methods.tuning_files import module_path
from kedit_fast.models.patching import attach, attached, detach
from kedit_fast.models.view import ModelView
from kedit_fast.models.weight_names import weight_name_of
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.spacing import AUTO
from kedit_fast.solver.alphaedit_projector import load_projector
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.matrix_bits import edit_fingerprint
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_ATTRIBUTE = "_kedit_fast_run"  # of a model
_HALF = (torch.float16, torch.bfloat16)
GENERAL = "general knowledge constraint"
"""What EasyEdit's requests of DINM call the prompt and answer that must stay."""
NullSpaces = Mapping[int, NullSpace]


@dataclass(frozen=True)
class Call:
    """The arguments that every framework's function has; what only some have is passed beside it."""

    method: str
    model: torch.nn.Module
    tokenizer: Any
    requests: Sequence[Mapping[str, Any]]
    hparams: Any
    """An object of the framework's class, a mapping, or the path of a file."""
    cache_template: str | None = None
    """Of npz files of values, with three {}: layer, clamp_norm_factor, case_id."""
    statistics: Statistics | None = None
    stats_dir: str | None = None
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class _KnownState:
    """The edited matrices at one time: as they were first, or after a batch."""

    fingerprint: str
    batches: int
    """Batches in the editor's ledger then."""


@dataclass
class Session:
    """An editor, and the states its matrices have had."""

    key: tuple
    """Equal for calls that can share an editor: same method, hyper-parameters, tokenizer, statistics and options."""
    editor: Editor
    states: list[_KnownState]
    caller_state: tuple | None = None
    """Identities and versions of the tensors that the caller passes as state (AlphaEdit's P and cache_c)."""
    caller_tensors: tuple = ()
    """Those tensors, referenced so that no other tensor gets their identity."""

    def reconcile(self) -> bool:
        """Forget batches that somebody else has undone; False when the matrices are in no state known here."""
        if not self.editor.in_place() or not self._answers():
            return False
        current = self._fingerprint()
        matching = [place for place, state in enumerate(self.states) if state.fingerprint == current]
        if not matching:
            return False
        last = matching[-1]
        if last < len(self.states) - 1:
            if self.editor.ledger.count - self.states[last].batches > self.editor.ledger.reach:
                return False  # older than the window: a new editor begins with these matrices
            self.editor.rollback(len(self.editor.ledger.batches) - self.states[last].batches, restored=True)
            del self.states[last + 1 :]
            self.caller_state = None
        return True

    @property
    def memory(self) -> SideMemory | None:
        """The edits of a method that keeps them beside the weights; None of others, and without edits."""
        editor = self.editor
        return editor.memory if editor.recipe.makes_memory and editor.ledger.count else None

    def _answers(self) -> bool:
        """Whether the model has this session's memory, and no other one."""
        memory, present = self.memory, attached_memory(self.editor.view.model)
        if memory is None or present is None:
            return memory is None and present is None
        return present.memory is memory or present.memory.digest == memory.digest

    def record_state(self) -> None:
        """Remember the matrices as they are."""
        self.states.append(_KnownState(self._fingerprint(), len(self.editor.ledger.batches)))

    def undo_batch(self) -> None:
        """Undo the last batch, and forget the state that it left."""
        self.undo(1)

    def undo(self, batches: int) -> None:
        """Undo the last batches, and forget the states that they left; raises where there are fewer."""
        self.editor.rollback(batches)
        del self.states[len(self.states) - batches :]

    def reset(self) -> None:
        """Undo every batch: the matrices as they were first, and no memory beside them."""
        self.editor.restore()
        del self.states[1:]

    @plain_torch(leave_inference_mode=False)
    def edit(self, requests: Sequence[Mapping[str, Any]]) -> EditResult:
        """Write a batch, and remember the state it leaves."""
        tunes = self.editor.tuning is not None
        beside = None if self.editor.tuning is None else self.editor.tuning.beside
        if isinstance(beside, ActivationTuning):  # this call's texts, not those of the call that made the editor
            beside.texts = unrelated_texts(requests) or beside.texts
        result = self.editor.edit([_whole_record(request) if tunes else _record(request) for request in requests])
        try:
            self.editor.finish()  # PRUNE: after every call, since no call is known to be the last
        except BaseException:
            if result.batch:
                self.editor.rollback()
            raise
        if result.batch:
            self.record_state()
        return result

    def _fingerprint(self) -> str:
        return edit_fingerprint(list(self.editor.modules.values()))


def parse_hparams(hparams: Any, method: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A framework's hyper-parameters: the path of a file, a mapping, or an object of its class.

    Args:
        hparams: these.
        method: the method that they are for, on which the meaning of some names depends.

    Returns:
        those that `Hparams` has, checked; and all as they are given, ours alone (`OUR_HPARAMS`) included.

    Raises:
        MethodError: a name that is unknown, or a value of a wrong type or not implemented; the message names it.
    """
    raw = raw_hparams(hparams)
    origin = str(hparams) if isinstance(hparams, str | Path) else type(hparams).__name__
    return parse_values(_without_ours(raw), origin, foreign=True, method=method), raw


def raw_hparams(hparams: Any) -> dict[str, Any]:
    """A framework's hyper-parameters as they are given; raises MethodError for a file that cannot be read."""
    if isinstance(hparams, str | Path):
        return dict(read_raw(hparams))
    if isinstance(hparams, Mapping):
        return dict(hparams)
    if not is_dataclass(hparams):
        return dict(vars(hparams))
    raw = {f.name: getattr(hparams, f.name) for f in fields(hparams)}  # not what scripts add, except our names
    return raw | {name: getattr(hparams, name) for name in OUR_HPARAMS if hasattr(hparams, name)}


def session_of(model: torch.nn.Module) -> Session | None:
    """The session that is attached to a model."""
    return attached(model, _ATTRIBUTE)


def detach_session(model: torch.nn.Module) -> None:
    """Forget a model's session; its weights stay as they are."""
    detach(model, _ATTRIBUTE)


@plain_torch(leave_inference_mode=False)
def apply_batch(
    call: Call, *, copy: bool = False, return_orig_weights: bool = False, reset: bool = False
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write one batch, as memit's and EasyEdit's functions do.

    Returns:
        the edited model, and parameter name -> what it was, where `return_orig_weights`.
    """
    if copy:
        call = replace(call, model=copying.deepcopy(call.model))
    session = get_or_create_session(call, reset=reset)
    originals = {}
    if return_orig_weights:
        names = [weight_name_of(module) for module in session.editor.modules]
        originals = {name: call.model.get_parameter(name).detach().clone() for name in names}
    session.edit(call.requests)
    return call.model, originals


@plain_torch(leave_inference_mode=False)
def get_or_create_session(
    call: Call,
    null_spaces: Callable[[], NullSpaces] | None = None,
    *,
    reset: bool = False,
    prefixes_from: Session | None = None,
) -> Session:
    """The model's session, if it is of the same method and hyper-parameters and fits the matrices; else a new one.

    A new session takes over the context prefixes of the one before (with `reset`, of `prefixes_from`): an edited model
    would generate different ones.
    """
    hparams, raw = parse_hparams(call.hparams, call.method)
    recipe, options = find_recipe(call.method), call.options.with_hparams(raw)
    for name in unused(recipe, hparams):
        if name in PUBLISHED_UNUSED:
            del hparams[name]
    if not unused(recipe, ("on_predicted",)):
        hparams.setdefault("on_predicted", "allow")  # as published
    key = _session_key(call, raw, null_spaces is None, options)
    session = session_of(call.model)
    if session is not None and not reset and session.key == key:
        if session.reconcile():
            return session
        _log.info("the matrices were changed by something else: %s starts anew", call.method)
    editor = _create_editor(call, recipe, hparams, raw, options, null_spaces, prefixes_from if reset else session)
    session = Session(key, editor, [])
    session.record_state()
    attach(call.model, _ATTRIBUTE, session)
    return session


def _session_key(call: Call, raw: Mapping[str, Any], from_statistics: bool, options: Options) -> tuple:
    values = json.dumps(_without_ours(raw), sort_keys=True, default=str)
    tokenizer, statistics = id(call.tokenizer), id(call.statistics)
    template, folder = str(call.cache_template), str(call.stats_dir)
    return call.method, values, tokenizer, template, statistics, folder, from_statistics, options.key()


def _create_editor(
    call: Call,
    recipe: Recipe,
    hparams: Mapping[str, Any],
    raw: Mapping[str, Any],
    options: Options,
    null_spaces: Callable[[], NullSpaces] | None,
    earlier: Session | None,
) -> Editor:
    """An editor with the statistics, null spaces and values that the hyper-parameters name."""
    model, tokenizer, spec = call.model, call.tokenizer, options.architecture
    view = ModelView(model, spec)
    resolved, _ = make_hparams(call.method, view.config, hparams)
    check_modules(view, resolved, raw)
    with_easyedit_rows = options.ultraedit_rows == "easyedit" and recipe.gathers_gradients
    if with_easyedit_rows and options.target_separator == "":
        raise MethodError(
            'ultraedit_rows = "easyedit" puts a space before every target: target_separator = "" needs "own"'
        )
    _warn_of_half(model, raw)
    spaces, statistics = None if null_spaces is None else null_spaces(), call.statistics
    reads_projector = recipe.uses_null_space and spaces is None and statistics is None
    if reads_projector and raw.get("P_loc") and Path(raw["P_loc"]).exists():
        spaces = load_projector(raw["P_loc"], resolved.layers, trust=True)
    if resolved.uses_statistics and spaces is None and statistics is None:
        statistics = framework_statistics(
            model, tokenizer, resolved.layers, raw, call.stats_dir, options.statistics_text, options.whole_name, spec
        )
    same_tokenizer = earlier is not None and earlier.editor.tokenizer is tokenizer
    editor = Editor(
        model,
        tokenizer,
        call.method,
        statistics=statistics,
        null_spaces=spaces,
        hparams=hparams,
        values=_usable_template(call.cache_template, recipe),
        prefixes=earlier.editor.prefixes if earlier is not None and same_tokenizer else None,
        prompt_format=chat_format(tokenizer) if recipe.tuning is not None and raw.get("use_chat_template") else None,
        irrelevant=unrelated_texts(call.requests) if recipe.tuning is not None else None,
        target_separator=AUTO if options.target_separator is None else options.target_separator,
        spec=spec,
    )
    if with_easyedit_rows:
        editor.gradients = easyedit_rows.gatherer(tokenizer, raw)
    return editor


def _usable_template(template: str | None, recipe: Recipe) -> str | None:
    """`cache_template`, if the method's values are of the kind that memit's files hold."""
    if template is not None and "{}" in str(template) and not recipe.fits_memit_values:
        _log.warning("%s: the files of values that cache_template names are not used", recipe.name)
        return None
    return template


def _without_ours(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in OUR_HPARAMS}


def _record(request: Mapping[str, Any]) -> dict[str, Any]:
    """A framework's request as one of ours: its `case_id` is the id."""
    names = ("prompt", "subject", "target_new", "target_separator")
    record = {name: request[name] for name in names if name in request}
    return record | ({"id": request["case_id"]} if "case_id" in request else {})


def _whole_record(request: Mapping[str, Any]) -> dict[str, Any]:
    """A framework's request as one of ours, for methods that work on whole prompts.

    SafeEdit's fields of EasyEdit's DINM become what its data set has: the unsafe answer, and the general prompt.
    """
    record = _record(request)
    if "{}" not in str(record.get("prompt")):
        record.pop("subject", None)
    if request.get("ground_truth") is not None:
        record["target_true"] = request["ground_truth"]
    general = (request.get("locality") or {}).get(GENERAL)
    if general:
        question = {"prompt": general["prompt"], "answers": [[general["ground_truth"]]]}
        record["probes"] = [{"kind": "locality", "name": "knowledge constrain", "questions": [question]}]
    return record


def unrelated_texts(requests: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The `loc_prompt` of requests of EasyEdit's WISE, each once; None where there is none.

    One that stands inside its request's prompt means the subject there, and is no unrelated text.
    """
    texts = [request["loc_prompt"] for request in requests if request.get("loc_prompt")]
    unrelated = [text for text in texts if not any(text in str(request.get("prompt")) for request in requests)]
    return tuple(dict.fromkeys(unrelated)) or None


def _warn_of_half(model: torch.nn.Module, raw: Mapping[str, Any]) -> None:
    """Warn where a file asks for a 16-bit model and this one is not: a function edits the model that it is given."""
    dtype = next(model.parameters()).dtype
    for name in ("half", "fp16"):
        if raw.get(name) and dtype not in _HALF:
            shown = dtype_name(dtype)
            _log.warning("%s = true: the model is %s and is edited as it is; load it in float16 to follow", name, shown)


def check_modules(view: ModelView, hparams: Hparams, raw: Mapping[str, Any]) -> None:
    """Raise MethodError when a file's `rewrite_module_tmp` is not the module that is edited here."""
    template, modules = raw.get("rewrite_module_tmp"), raw.get("inner_params") or ()
    tuned = () if find_recipe(hparams.method).tuning is None else (modules,) if isinstance(modules, str) else modules
    for layer in hparams.layers:
        named = [("inner_params", name) for name in tuned]
        named += [("rewrite_module_tmp", template.format(layer))] if template else []
        for source, name in named:
            if (module := module_path(name)) != view.module_name(layer):
                raise MethodError(
                    f"{source} names {module}, of {view.spec.name} models {view.module_name(layer)} is edited: is this "
                    "the file of another model?"
                )
