"""Gradients of a loss with respect to what edited layers put out, for all layers in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kedit_fast.errors import UnsupportedModelError
from kedit_fast.models.forward import Site, TokenBatch, as_rows, did_not_run, last_states
from kedit_fast.models.patching import output_hooks
from kedit_fast.models.view import ModelView
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch


@plain_torch()
def output_gradients(
    view: ModelView, batch: TokenBatch, layers: Sequence[int], loss: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    """The gradients of a loss with respect to the outputs of edited linear layers.

    In models with a norm after the MLP they are those at the linear layer itself, before the norm. Gradients of
    parameters are not computed. To be called inside of `evaluating(view)`.

    Args:
        view: the model, whole in this process.
        batch: R rows of tokens.
        layers: zero-based.
        loss: from the last states [R, T, h] (logits [R, T, V] where the model runs whole) to a number.

    Returns:
        by layer [R, T, out], in the dtype of the layer's output.

    Raises:
        UnsupportedModelError: a layer that does not run once, or not on all tokens; or a model that has no gradients
            there, because it is quantized in such a way, or is compiled without them.

    Cost: a forward pass to the last states, and a backward pass down to the lowest of the layers, about as long as the
        forward pass of these blocks; what the blocks above that layer need for it stays in memory meanwhile.
    """
    _ = view.head  # checked before anything is put into the model
    outputs: dict[int, torch.Tensor] = {}
    gradients: dict[int, torch.Tensor | None] = {}

    def watched(layer: int) -> Callable[..., torch.Tensor]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> torch.Tensor:
            _check_output(view, layer, batch, output, layer in outputs)
            outputs[layer] = output + output.new_zeros(()).requires_grad_()
            return outputs[layer].clone()  # what comes next may change it in place

        return hook

    with torch.enable_grad(), output_hooks([(view.adding_module(layer), watched(layer)) for layer in layers]):
        value = loss(last_states(view, batch))
        try:
            if value.requires_grad:
                at_outputs = torch.autograd.grad(value, list(outputs.values()), allow_unused=True)
                gradients = dict(zip(outputs, at_outputs, strict=True))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it may be any code
            raise _no_gradients(view, f"{type(error).__name__}: {first_line(error)}") from error
    rows = {}
    for layer in layers:
        if layer not in outputs:
            raise did_not_run(view, Site(layer, "key"))
        if (gradient := gradients.get(layer)) is None:
            raise _no_gradients(view, f"its logits do not depend on {view.module_name(layer)}")
        rows[layer] = as_rows(gradient, batch.input_ids.shape)
    return rows


def _check_output(view: ModelView, layer: int, batch: TokenBatch, output: Any, again: bool) -> None:
    name, shape = view.module_name(layer), batch.input_ids.shape
    if again:
        raise UnsupportedModelError(f"{name} runs more than once in a pass: its outputs have no single gradient")
    if not isinstance(output, torch.Tensor) or as_rows(output, shape).shape[:2] != shape:
        size = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UnsupportedModelError(f"{name} puts out {size}, not one row for all {list(shape)} tokens of a batch")


def _no_gradients(view: ModelView, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(view.model).__name__} has no gradients at the outputs of its edited layers ({reason}): load it in "
        "float32, bfloat16 or float16, not quantized, and without compiled code"
    )
