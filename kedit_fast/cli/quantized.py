"""`--dequantize-edited`: what commands that edit do with a quantized model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kedit_fast.cli.console import notices
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.quantized import Dequantized, dequantize_edited
from kedit_fast.models.weight_names import module_path_of
from kedit_fast.support.process_group import world

DequantizeEdited = Annotated[
    bool,
    typer.Option(
        "--dequantize-edited",
        help="of a quantized model (bitsandbytes, fp8): the edited matrices alone become 16-bit",
    ),
]


def dequantize_for(model: Any, hparams: Any, any_layer: bool = False, spec: ArchSpec | None = None) -> Dequantized:
    """Make plain what hyper-parameters edit in a model, and say on stderr where nothing is quantized.

    Args:
        model: the model; changed in place.
        hparams: name the layers or the modules.
        any_layer: trials will choose the layers, so all of them are made plain.
        spec: that of --spec.
    """
    modules = () if any_layer else tuple(map(module_path_of, hparams.inner_params))
    layers = None if any_layer else () if modules else hparams.layers
    done = dequantize_edited(model, layers, modules, spec)
    if not done.modules and world()[0] == 0:
        notices.print("kedit-fast: --dequantize-edited: no edited matrix of this model is quantized", markup=False)
    return done
