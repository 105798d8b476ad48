"""EasyEdit: functions with its signature, and `install()`, which puts them into its table of algorithms.

    from kedit_fast.integrations import easyedit
    easyedit.install()                      # before BaseEditor.from_hparams
    editor = BaseEditor.from_hparams(MEMITHyperParams.from_hparams("hparams/MEMIT/llama-7b"))

What is other than in EasyEdit: ROME and R-ROME write every request of a batch, one after another; UltraEdit takes the
whole batch, whatever `batch_size`; AlphaEdit's keys belong to the model (and go with it) instead of the process, and
are forgotten when weights are restored; a failed batch leaves the model as it was. Statistics are read from `stats_dir`
and AlphaEdit's projector from `P_loc`; neither is computed here: `kedit-fast stats` collects them. Five methods that
EasyEdit does not have come with it: MEMIT-Seq, MEMIT-Merge, ENCORE, RECT, and PRUNE, which restrains the total after
every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from kedit_fast.integrations import runs

Applied = tuple[torch.nn.Module, dict[str, torch.Tensor]]


def _function(method: str, name: str) -> Callable[..., Applied]:
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
        model, before, _ = runs.apply(
            method, model, tok, requests, hparams, copy=copy, return_orig_weights=return_orig_weights,
            cache_template=cache_template, statistics=kwargs.get("statistics"), reset=bool(kwargs.get("reset_cache")),
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
        **kwargs: `statistics` of kedit_fast, instead of those in `stats_dir`; `reset_cache`, to forget earlier batches;
            anything else that EasyEdit passes is not looked at.

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
_installed: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = []  # tables, and what they held


def install(table: MutableMapping[str, Any] | None = None) -> None:
    """Put our functions into EasyEdit's table; editors made from then on use them. Again is nothing.

    Args:
        table: None for `easyeditor.util.alg_dict.ALG_DICT`.
    """
    table = _table() if table is None else table
    if not any(known is table for known, _ in _installed):
        _installed.append((table, {name: table[name] for name in ALGORITHMS if name in table}))
        table.update(ALGORITHMS)


def uninstall(table: MutableMapping[str, Any] | None = None) -> None:
    """Put back what `install` replaced."""
    table = _table() if table is None else table
    for place, (known, held) in enumerate(_installed):
        if known is table:
            for name in ALGORITHMS:
                table.pop(name, None)
            table.update(held)
            del _installed[place]
            return


def _table() -> MutableMapping[str, Any]:
    from easyeditor.util.alg_dict import ALG_DICT

    return ALG_DICT
