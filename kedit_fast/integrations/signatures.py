"""The published signatures of the frameworks' functions, and what their arguments mean.

memit and EasyEdit have one signature for all methods, so their functions are made here; AlphaEdit's two stand in
`alphaedit`. `documented` writes the "Args" of each from one table.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from kedit_fast.integrations.framework_statistics import Text
from kedit_fast.integrations.options import OUR_HPARAMS, Options
from kedit_fast.integrations.sessions import Call, apply_batch
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.statistics.collect import Statistics

Function = TypeVar("Function", bound=Callable[..., Any])
Applied = tuple[torch.nn.Module, dict[str, torch.Tensor]]
ARGUMENTS = {
    "model": "edited in place, unless `copy`.",
    "tok": "its tokenizer.",
    "requests": 'mappings with prompt (one {}), subject, target_new {"str": text}, and case_id where `cache_template` '
    "is given.",
    "hparams": "an object of the repository's class, a mapping, or the path of a json file.",
    "copy": "edit a deep copy.",
    "return_orig_weights": "return what the parameters were.",
    "cache_template": "path of the repository's npz files of values, with three {}. Ignored for methods whose values "
    "these files do not hold, and for ROME, whose files do not say which weights they belong to.",
    "cache_c": "[layers, d, d] sum of k k^T of earlier batches; added to in place. None: no earlier batches, and a "
    "float32 one is made.",
    "P": "[layers, d, d] projections onto the null spaces. None: from the statistics and `nullspace_threshold`.",
    "statistics": "second moments, instead of those in `stats_dir`.",
    "stats_dir": "the repository's STATS_DIR.",
    "statistics_text": "a file, a `datasets:` name or documents; missing statistics are computed from it.",
    "target_separator": 'between prompt and target: " " as there, "" for nothing, or "auto" (None): decided from the '
    "text. Also a hyper-parameter.",
    "spec": "an ArchSpec for an architecture that is not known, or the path of its JSON file. Also a hyper-parameter.",
}


def documented(summary: str = "", **descriptions: str) -> Callable[[Function], Function]:
    """A decorator that puts an "Args" section before the "Returns" of a docstring.

    Args:
        summary: the docstring's first line, where one function is made for several methods.
        **descriptions: of arguments for which those of `ARGUMENTS` do not hold.
    """

    def document(function: Function) -> Function:
        if function.__doc__ is None:  # python -OO
            return function
        entries = {name: descriptions.get(name) or ARGUMENTS[name] for name in inspect.signature(function).parameters}
        lines = [
            textwrap.fill(f"{name}: {text}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8)
            for name, text in entries.items()
        ]
        text = inspect.cleandoc(function.__doc__)
        first, _, rest = text.partition("\n")
        head, returns, tail = rest.partition("Returns:\n")
        function.__doc__ = f"{summary or first}\n{head}Args:\n" + "\n".join(lines) + f"\n\n{returns}{tail}"
        return function

    return document


def memit_function(method: str, name: str, whole_name: bool = False) -> Callable[..., Applied]:
    """A function with the signature of the memit repository.

    Args:
        method: the method of this package that the function runs.
        name: the name of the function.
        whole_name: see `Options`.
    """

    @documented(f"Write a batch with {method}.")
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
        spec: ArchSpec | str | None = None,
    ) -> Applied:
        """Write a batch.

        Returns:
            the model, and parameter name -> what it was before this call, as it is stored.

        Raises:
            KeditError: the model is as it was before the call.
        """
        options = Options(statistics_text, target_separator=target_separator, spec=spec, whole_name=whole_name)
        call = Call(method, model, tok, requests, hparams, cache_template, statistics, stats_dir, options)
        return apply_batch(call, copy=copy, return_orig_weights=return_orig_weights)

    apply_to_model.__name__ = apply_to_model.__qualname__ = name
    return apply_to_model


TUNING_ARGUMENTS = {
    "requests": "mappings with prompt (with {} or the subject in it, or a whole text) and target_new (a text or "
    '{"str": text}). WISE also reads loc_prompt, an unrelated text; DINM ground_truth, the unsafe answer, and '
    "locality.",
    "hparams": "an object of EasyEdit's class, a mapping, or the path of one of its yaml files.",
    "keep_original_weight": "has no effect here.",
    "kwargs": "`statistics` of kedit_fast; `target_separator` and `spec`, see `install`; `reset_cache`, to forget "
    "earlier calls. Anything else that EasyEdit passes is ignored.",
}
"""What the arguments of functions of methods that tune mean, where `ARGUMENTS` do not hold."""


def easyedit_function(method: str, name: str, defaults: Options | None = None) -> Callable[..., Applied]:
    """A function with EasyEdit's signature.

    Args:
        method: the method of this package that the function runs.
        name: the name of the function.
        defaults: options for calls and files that have none.
    """

    @documented(
        f"Write a batch with {method}; as EasyEdit's function of this name.",
        requests='mappings with prompt (with {} or the subject in it), subject, target_new (a text or {"str": text}).',
        hparams="an object of EasyEdit's class, a mapping, or the path of one of its yaml files.",
        cache_template="path of memit's npz files of values, with three {}; requests then need a case_id.",
        keep_original_weight="has no effect here: `return_orig_weights` asks for copies.",
        kwargs="`statistics` of kedit_fast, instead of those in `stats_dir`; `statistics_text`, `ultraedit_rows`, "
        "`target_separator` and `spec`, see `install`; `reset_cache`, to forget earlier batches. Anything else that "
        "EasyEdit passes is ignored.",
    )
    def apply_to_model(
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
        """Write a batch.

        Returns:
            the model, and parameter name -> what it was before this call, as it is stored.

        Raises:
            KeditError: the model is as it was before the call.
        """
        given: dict[str, Any] = {name: kwargs.get(name) for name in OUR_HPARAMS}
        options = Options(**given, defaults=defaults)
        statistics = kwargs.get("statistics")
        call = Call(method, model, tok, requests, hparams, cache_template, statistics, options=options)
        reset = bool(kwargs.get("reset_cache"))
        return apply_batch(call, copy=copy, return_orig_weights=return_orig_weights, reset=reset)

    apply_to_model.__name__ = apply_to_model.__qualname__ = name
    return apply_to_model
