"""AlphaEdit's repository: functions with its signatures, whose state `cache_c` and `P` the caller passes and gets back.

`cache_c` [layers, d, d] holds the sum of k k^T of all earlier batches and is added to in place, as there; `P` [layers,
d, d] holds the null-space projections. Where the tensors are those that the last call on this model left, the exact key
memory goes on; otherwise it is made from `cache_c` alone, to its precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.integrations import sessions
from kedit_fast.integrations.framework_statistics import Text
from kedit_fast.methods.hparams import make_hparams
from kedit_fast.models.view import ModelView
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.torch_state import plain_torch


def apply_AlphaEdit_to_model(
    model: torch.nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    cache_template: str | None = None,
    cache_c: torch.Tensor | None = None,
    P: torch.Tensor | None = None,
    *,
    statistics: Statistics | None = None,
    stats_dir: str = "data/stats",
    statistics_text: Text | None = None,
    target_separator: str | None = None,
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Write a batch with AlphaEdit.

    Args:
        model: edited in place.
        tok: its tokenizer.
        requests: with prompt (one {}), subject, target_new {"str": text}, and case_id where `cache_template` is given.
        hparams: an AlphaEditHyperParams, a mapping, or the path of a json file.
        cache_template: of its npz files of values, with three {}.
        cache_c: [layers, d, d] of earlier batches; added to in place. None: none, and a float32 one is made.
        P: [layers, d, d] projections on the null spaces; None: from the statistics and `nullspace_threshold`.
        statistics, stats_dir: second moments, where P is None.
        statistics_text: a file, a `datasets:` name or documents, from which moments that are not there are computed.
        target_separator: between prompt and target: " " as there, "" or "auto" (None): decided from the text. Also a
            hyper-parameter.

    Returns:
        the model and `cache_c`.

    Raises:
        KeditError: the model and `cache_c` are as they were before the call.
    """
    return _sequential(
        "alphaedit", model, tok, requests, hparams, cache_template, cache_c, P, statistics, stats_dir,
        sessions.Options(statistics_text, target_separator=target_separator),
    )  # fmt: skip


def apply_memit_seq_to_model(
    model: torch.nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | None = None,
    cache_c: torch.Tensor | None = None,
    *,
    statistics: Statistics | None = None,
    stats_dir: str = "data/stats",
    statistics_text: Text | None = None,
    target_separator: str | None = None,
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Write a batch with MEMIT whose system holds the keys of earlier ones; see `apply_AlphaEdit_to_model`.

    `copy` and `return_orig_weights` are taken for the signature's sake: as there, only the model and `cache_c` come
    back, and a copy is refused.
    """
    if copy:
        raise InvalidArgumentError(
            "copy=True is not implemented for sequential editing: copy the model before the first"
        )
    return _sequential(
        "memit-sequential", model, tok, requests, hparams, cache_template, cache_c, None, statistics, stats_dir,
        sessions.Options(statistics_text, target_separator=target_separator),
    )  # fmt: skip


apply_memit_rect_to_model = sessions.function("rect", "apply_memit_rect_to_model")


@plain_torch(leave_inference_mode=False)
def _sequential(
    method: str,
    model: torch.nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    cache_template: str | None,
    cache_c: torch.Tensor | None,
    P: torch.Tensor | None,
    statistics: Statistics | None,
    stats_dir: str,
    options: sessions.Options,
) -> tuple[torch.nn.Module, torch.Tensor]:
    numbers, _ = sessions.numbers_of(hparams)
    chosen, _ = make_hparams(method, model.config, numbers)
    view, layers = ModelView(model), chosen.layers
    size = view.weight(layers[-1]).shape[1]
    for name, tensor in (("cache_c", cache_c), ("P", P)):
        if tensor is not None and tuple(tensor.shape) != (len(layers), size, size):
            raise InvalidArgumentError(
                f"{name} must be [{len(layers)}, {size}, {size}], a matrix for each of layers "
                f"{', '.join(map(str, layers))}; got {list(tensor.shape)}"
            )
    if cache_c is not None and cache_c.is_inference():
        raise InvalidArgumentError(
            "cache_c was made in torch.inference_mode() and cannot be added to outside of it: pass cache_c.clone()"
        )
    if cache_c is None:
        cache_c = torch.zeros(len(layers), size, size, dtype=torch.float32, device="cpu")
    run = sessions.kept_by(model)
    marks = _marks(P, cache_c)
    spaces = None if P is None else lambda: {
        layer: NullSpace.from_projection(P[i], chosen.L2) for i, layer in enumerate(layers)
    }  # fmt: skip
    known = run is not None and run.settled() and run.state == marks
    run = sessions.run_of(
        method, model, tok, hparams, cache_template, statistics, stats_dir, spaces, reset=not known, prefixes=run,
        options=options,
    )  # fmt: skip
    if run.state != marks:  # a new editor: what was before is in cache_c alone
        run.editor.solver_state.memories = {
            layer: KeyMemory.from_sum(run.editor.preconditioner(layer), cache_c[i], chosen.memory_form)
            for i, layer in enumerate(layers)
            if bool(cache_c[i].any())
        }
    keys: dict[int, torch.Tensor] = {}  # of the batch, [d, u]: what is written above a layer, or in it, moves none
    run.editor.on_keys = keys.__setitem__
    try:
        result = sessions.edit(run, requests)
    finally:
        run.editor.on_keys = None
    if result.batch:
        try:
            sums = _sums([keys[layer] for layer in layers], cache_c)
        except BaseException:  # cache_c would lack keys that the model has
            run.editor.rollback()
            run.states.pop()
            raise
        for total, own in zip(cache_c, sums, strict=True):
            total.add_(own)
    run.state, run.held = _marks(P, cache_c), (P, cache_c)  # held, so that their ids stay theirs
    return model, cache_c


def _marks(*tensors: torch.Tensor | None) -> tuple:
    """By which tensors are known again: the objects, their versions, and a sum, for writes past torch."""
    return tuple(
        None if t is None else (id(t), 0 if t.is_inference() else t._version, float(t.sum(dtype=torch.float64)))
        for t in tensors
    )


def _sums(keys: Sequence[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    """K K^T [d, d] of every layer, summed in fp64, as `cache_c` holds it."""
    wide = [own.to(like.device, torch.float64) for own in keys]
    return [(own @ own.T).to(like.dtype) for own in wide]
