"""What other code may set for the whole process or thread: name -> a context that sets it and takes it back."""

from __future__ import annotations

import contextlib

import pytest
import torch


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def cuda_autocast():
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@contextlib.contextmanager
def older(**settings):
    """TF32 or bf16 by the older interface."""
    try:
        if "precision" in settings:
            torch.set_float32_matmul_precision(settings["precision"])
        else:
            torch.backends.cuda.matmul.allow_tf32 = settings["allow_tf32"]
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        clear_newer()


def clear_newer() -> None:
    if hasattr(torch.backends, "fp32_precision"):
        for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            place.fp32_precision = "none"


@contextlib.contextmanager
def newer(precision, *places):
    """The same by the interface of torch 2.9 and later."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9")
    try:
        for place in places:
            place().fp32_precision = precision
        yield
    finally:
        clear_newer()


def whole():
    return torch.backends


def on_cuda():
    return torch.backends.cuda.matmul


def on_cpu():
    return torch.backends.mkldnn.matmul


STATES = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: default_device("meta"),
    "inside torch.device(meta)": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast for cuda": cuda_autocast,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "precision medium": lambda: older(precision="medium"),
    "precision high": lambda: older(precision="high"),
    "allow_tf32": lambda: older(allow_tf32=True),
    "fp32_precision tf32": lambda: newer("tf32", whole),
    "fp32_precision bf16": lambda: newer("bf16", whole),
    "fp32_precision tf32 of cuda": lambda: newer("tf32", on_cuda),
    "fp32_precision bf16 of the CPU": lambda: newer("bf16", on_cpu),
}
