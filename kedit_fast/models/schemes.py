"""Quantizers whose linear modules can be made plain ones, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scheme:
    """A quantizer whose linear modules can be made plain ones, each by itself."""

    name: str
    """How messages call it."""
    home: str
    """The package of its modules."""
    module: str
    """The class of its linear modules."""
    exceptions: str
    """Field of the quantization config that lists the modules which stay as they are."""
    matrix: Callable[[Any], torch.Tensor]
    """From a module to the matrix [out, in] that it stands for, in float32 or the dtype it was quantized from."""
    companions: Callable[[Any], Mapping[str, torch.Tensor]]
    """From a module to the tensors, by name in the module, that are saved with it but are no parameters of it."""


def _matrix_of_4_bits(module: Any) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight)


def _matrix_of_8_bits(module: Any) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight, state=module.state)


def block_scaled(matrix: torch.Tensor, scales: torch.Tensor, block: Sequence[int] | None) -> torch.Tensor:
    """A matrix [out, in] times its scales, one for each block or one in all, in float32.

    Args:
        matrix: [out, in] in any float dtype.
        scales: [ceil(out / block[0]), ceil(in / block[1])], or one number.
        block: rows and columns of a block; None for one scale in all.
    """
    wide = scales.float()
    if block is not None:
        wide = wide.repeat_interleave(block[0], 0)[: matrix.shape[0]]
        wide = wide.repeat_interleave(block[1], 1)[:, : matrix.shape[1]]
    return matrix.float() * wide


def _companions_of_8_bits(module: Any) -> dict[str, torch.Tensor]:
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return {"SCB": scales}


SCHEMES = (
    Scheme(
        "bitsandbytes, 4 bits",
        "bitsandbytes",
        "Linear4bit",
        "llm_int8_skip_modules",
        _matrix_of_4_bits,
        lambda module: {f"weight.{name}": t for name, t in module.weight.quant_state.as_dict(packed=True).items()},
    ),
    Scheme(
        "bitsandbytes, 8 bits",
        "bitsandbytes",
        "Linear8bitLt",
        "llm_int8_skip_modules",
        _matrix_of_8_bits,
        _companions_of_8_bits,
    ),
    Scheme(
        "fp8",
        "transformers",
        "FP8Linear",
        "modules_to_not_convert",
        lambda module: block_scaled(module.weight.detach(), module.weight_scale_inv.detach(), module.block_size),
        lambda module: {},
    ),
)


def scheme_of(module: torch.nn.Module) -> Scheme | None:
    """The scheme whose linear module this is; None for any other module."""
    kind = type(module)
    home = kind.__module__.partition(".")[0]
    return next((s for s in SCHEMES if (s.home, s.module) == (home, kind.__name__)), None)
