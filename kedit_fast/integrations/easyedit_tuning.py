"""EasyEdit's functions of WISE, GRACE, FT and DINM, with its signatures.

FT and DINM write into the weights and return (model, copies of the parameters), as every function of `easyedit`. WISE
and GRACE return an object that answers with the edits (`EditedModel`), and a function that undoes them all.

How they differ from EasyEdit's own:

- All requests of a call are written (GRACE there writes the first one alone), and calls go on from each other until
  they are undone (WISE there forgets the calls before, unless `sequential_edit` is a hyper-parameter).
- The routes of a text are decided once, on its prompt, and hold while it is continued.
- FT's `objective_optimization` chooses between ft-l and ft-m; an integer `norm_constraint` is a bound, too.
- DINM trains with the KL divergence at general prompts (there it has no gradient), and prompts are taken as they are:
  EasyEdit's driver has put `suffix_system_prompt` behind them already.
- WISE's files are safetensors, not pickles. A `load_path` that exists is refused: attach it to answer with it.
"""

from __future__ import annotations

import copy as copying
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kedit_fast.errors import MethodError
from kedit_fast.integrations.edited_model import EditedModel
from kedit_fast.integrations.options import OUR_HPARAMS, Options
from kedit_fast.integrations.sessions import Call, apply_batch, get_or_create_session, raw_hparams
from kedit_fast.integrations.signatures import TUNING_ARGUMENTS, Applied, documented
from kedit_fast.methods.tuning_files import fine_tuning_method

Function = TypeVar("Function", bound=Callable[..., Any])
_BESIDE = {**TUNING_ARGUMENTS, "return_orig_weights": "has no effect here: no weight changes."}
AppliedBeside = tuple[EditedModel, Callable[[], None]]


def wise_function(name: str, defaults: Options | None = None) -> Callable[..., AppliedBeside]:
    """A function with the signature of EasyEdit's WISE.

    Args:
        name: the name of the function.
        defaults: options for calls and files that have none.
    """

    @documented("Write a batch with wise; as EasyEdit's function of this name.", **TUNING_ARGUMENTS)
    def apply_to_model(
        model: torch.nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        copy: bool = False,
        **kwargs: Any,
    ) -> AppliedBeside:
        """Write a batch.

        Returns:
            what answers with the edits, and a function that undoes them all.

        Raises:
            KeditError: the model is as it was before the call.
        """
        path = raw_hparams(hparams).get("load_path")
        if path and os.path.exists(path):
            raise MethodError(
                f"load_path = {path!r}: no run goes on from a file; kedit_fast.attach(model, path) answers with it"
            )
        return _beside(_call("wise", model, tok, requests, hparams, kwargs, defaults), copy, kwargs)

    return _named(apply_to_model, name)


def grace_function(name: str, defaults: Options | None = None) -> Callable[..., AppliedBeside]:
    """A function with the signature of EasyEdit's GRACE; see `wise_function`."""

    @documented("Write a batch with grace; as EasyEdit's function of this name.", **_BESIDE)
    def apply_to_model(
        model: torch.nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> AppliedBeside:
        """Write a batch.

        Returns:
            what answers with the edits, and a function that undoes them all.

        Raises:
            KeditError: the model is as it was before the call.
        """
        return _beside(_call("grace", model, tok, requests, hparams, kwargs, defaults), copy, kwargs)

    return _named(apply_to_model, name)


def fine_tuning_function(name: str, defaults: Options | None = None) -> Callable[..., Applied]:
    """A function with the signature of EasyEdit's FT; see `wise_function`."""

    @documented("Write a batch with ft-l or ft-m; as EasyEdit's function of this name.", **TUNING_ARGUMENTS)
    def apply_to_model(
        model: torch.nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> Applied:
        """Write a batch.

        Returns:
            the model, and parameter name -> what it was before this call, as it is stored.

        Raises:
            KeditError: the model is as it was before the call.
        """
        method = fine_tuning_method(raw_hparams(hparams), type(hparams).__name__)
        call = _call(method, model, tok, requests, hparams, kwargs, defaults)
        return apply_batch(
            call, copy=copy, return_orig_weights=return_orig_weights, reset=bool(kwargs.get("reset_cache"))
        )

    return _named(apply_to_model, name)


def dinm_function(name: str, defaults: Options | None = None) -> Callable[..., Applied]:
    """A function with the signature of EasyEdit's DINM; see `wise_function`."""

    @documented(
        "Write a batch with dinm; as EasyEdit's function of this name.",
        **{**TUNING_ARGUMENTS, "keep_original_weight": "return what the parameters were, with `return_orig_weights`."},
    )
    def apply_to_model(
        model: torch.nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> Applied:
        """Write a batch.

        Returns:
            the model, and parameter name -> what it was before this call, as it is stored.

        Raises:
            KeditError: the model is as it was before the call.
        """
        as_given = {**raw_hparams(hparams), "suffix_system_prompt": ""}  # it stands behind the prompts already
        call = _call("dinm", model, tok, requests, as_given, kwargs, defaults)
        copies = return_orig_weights and keep_original_weight
        return apply_batch(call, copy=copy, return_orig_weights=copies, reset=bool(kwargs.get("reset_cache")))

    return _named(apply_to_model, name)


def _call(
    method: str,
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    given: Mapping[str, Any],
    defaults: Options | None,
) -> Call:
    options: dict[str, Any] = {name: given.get(name) for name in OUR_HPARAMS}
    statistics = given.get("statistics")
    return Call(
        method,
        model,
        tokenizer,
        requests,
        hparams,
        statistics=statistics,
        options=Options(**options, defaults=defaults),
    )


def _beside(call: Call, copy: bool, given: Mapping[str, Any]) -> AppliedBeside:
    """Write a batch beside the weights."""
    if copy:
        call = replace(call, model=copying.deepcopy(call.model))
    session = get_or_create_session(call, reset=bool(given.get("reset_cache")))
    session.edit(call.requests)
    return EditedModel(session), session.reset


def _named(function: Function, name: str) -> Function:
    function.__name__ = function.__qualname__ = name
    return function
