"""Dtypes: which ones are accepted, which one is computed in, and how messages name them."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The floating dtypes that weights, keys and states may have."""


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a tensor's entries are summed: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as messages and files name it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe_tensor(tensor: torch.Tensor) -> str:
    """Shape, dtype and device as messages show them: "[2, 3] float32 on cpu"."""
    return f"{list(tensor.shape)} {dtype_name(tensor.dtype)} on {tensor.device}"
