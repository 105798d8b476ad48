"""AlphaEdit's repository: functions with its signatures, whose state `cache_c` and `P` the caller passes and gets back.

`cache_c` [layers, d, d] holds the sum of k k^T of all earlier batches and is added to in place, as there; `P` [layers,
d, d] holds the null-space projections. If the tensors are as the last call on this model left them, the exact key
memory continues. Otherwise it is made from `cache_c` alone, to the precision of that sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.integrations.framework_statistics import Text
from kedit_fast.integrations.options import Options
from kedit_fast.integrations.sessions import (
    Call,
    NullSpaces,
    Session,
    get_or_create_session,
    parse_hparams,
    session_of,
)
from kedit_fast.integrations.signatures import documented, memit_function
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.view import ModelView
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.messages import comma_list
from kedit_fast.support.torch_state import plain_torch


@documented(
    model="edited in place.",
    hparams="an AlphaEditHyperParams, a mapping, or the path of a json file.",
    statistics="second moments, where P is None.",
    stats_dir="where they are found, if `statistics` is None.",
)
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
    spec: ArchSpec | str | None = None,
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Write a batch with AlphaEdit.

    Returns:
        the model and `cache_c`.

    Raises:
        KeditError: the model and `cache_c` are as they were before the call.
    """
    options = Options(statistics_text, target_separator=target_separator, spec=spec)
    call = Call("alphaedit", model, tok, requests, hparams, cache_template, statistics, stats_dir, options)
    return _apply_with_cache(call, cache_c, P)


@documented(
    model="edited in place.",
    copy="must be False: a sequence edits one model. Copy the model before the first batch.",
    return_orig_weights="ignored: as there, only the model and `cache_c` are returned.",
)
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
    spec: ArchSpec | str | None = None,
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Write a batch with MEMIT whose system holds the keys of earlier batches.

    Returns:
        the model and `cache_c`.

    Raises:
        InvalidArgumentError: `copy` is set.
        KeditError: the model and `cache_c` are as they were before the call.
    """
    if copy:
        raise InvalidArgumentError(
            "copy=True is not implemented for sequential editing: copy the model before the first"
        )
    options = Options(statistics_text, target_separator=target_separator, spec=spec)
    call = Call("memit-sequential", model, tok, requests, hparams, cache_template, statistics, stats_dir, options)
    return _apply_with_cache(call, cache_c, None)


apply_memit_rect_to_model = memit_function("rect", "apply_memit_rect_to_model")


@plain_torch(leave_inference_mode=False)
def _apply_with_cache(
    call: Call, cache_c: torch.Tensor | None, P: torch.Tensor | None
) -> tuple[torch.nn.Module, torch.Tensor]:
    parsed, raw = parse_hparams(call.hparams)
    view = ModelView(call.model, call.options.with_hparams(raw).architecture)
    hparams, _ = make_hparams(call.method, view.config, parsed)
    cache_c = _checked_cache(view, hparams, cache_c, P)
    session = _session(call, hparams, cache_c, P)
    layers = hparams.layers
    keys: dict[int, torch.Tensor] = {}  # of the batch, [d, u]; writing a layer changes no keys at it or below
    session.editor.on_keys = keys.__setitem__
    try:
        result = session.edit(call.requests)
    finally:
        session.editor.on_keys = None
    if result.batch:
        try:
            sums = _key_sums([keys[layer] for layer in layers], cache_c)
        except BaseException:  # else the model would have keys that cache_c lacks
            session.undo_batch()
            raise
        for total, batch_sum in zip(cache_c, sums, strict=True):
            total.add_(batch_sum)
    session.caller_state, session.caller_tensors = _tensor_states(P, cache_c), (P, cache_c)
    return call.model, cache_c


def _checked_cache(
    view: ModelView, hparams: Hparams, cache_c: torch.Tensor | None, P: torch.Tensor | None
) -> torch.Tensor:
    """`cache_c`, or one of zeros; raises InvalidArgumentError where it or `P` cannot be used."""
    layers = hparams.layers
    size = view.weight(layers[-1]).shape[1]
    for name, tensor in (("cache_c", cache_c), ("P", P)):
        if tensor is not None and tuple(tensor.shape) != (len(layers), size, size):
            raise InvalidArgumentError(
                f"{name} must be [{len(layers)}, {size}, {size}], a matrix for each of layers {comma_list(layers)}; "
                f"got {list(tensor.shape)}"
            )
    if cache_c is None:
        return torch.zeros(len(layers), size, size, dtype=torch.float32, device="cpu")
    if cache_c.is_inference():
        raise InvalidArgumentError(
            "cache_c was made in torch.inference_mode() and cannot be added to outside of it: pass cache_c.clone()"
        )
    return cache_c


def _session(call: Call, hparams: Hparams, cache_c: torch.Tensor, P: torch.Tensor | None) -> Session:
    """The model's session, with the key memory that belongs to `cache_c` and `P`."""
    tensor_states, layers = _tensor_states(P, cache_c), hparams.layers
    null_spaces = None if P is None else partial(_null_spaces, P, hparams)
    earlier = session_of(call.model)
    continues = earlier is not None and earlier.reconcile() and earlier.caller_state == tensor_states
    session = get_or_create_session(call, null_spaces, reset=not continues, prefixes_from=earlier)
    if session.caller_state != tensor_states:  # a new editor: earlier batches are in cache_c alone
        session.editor.set_key_memories(
            {
                layer: KeyMemory.from_sum(
                    session.editor.preconditioner(layer), cache_c[i], hparams.memory_form, hparams.undo_window
                )
                for i, layer in enumerate(layers)
                if bool(cache_c[i].any())
            }
        )
    return session


def _null_spaces(P: torch.Tensor, hparams: Hparams) -> NullSpaces:
    return {layer: NullSpace.from_projection(P[i]) for i, layer in enumerate(hparams.layers)}


def _tensor_states(*tensors: torch.Tensor | None) -> tuple:
    """Whether tensors are the same and unchanged: their identities, versions, and sums for writes that torch misses."""
    return tuple(
        None if t is None else (id(t), 0 if t.is_inference() else t._version, float(t.sum(dtype=torch.float64)))
        for t in tensors
    )


def _key_sums(keys: Sequence[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    """K K^T [d, d] per layer, summed in fp64, with the dtype and device of `cache_c`."""
    wide = [layer_keys.to(like.device, torch.float64) for layer_keys in keys]
    return [(K @ K.T).to(like.dtype) for K in wide]
