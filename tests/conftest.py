from __future__ import annotations

import logging
import os
import platform
import sys
from pathlib import Path

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # before torch: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
os.environ.pop("COLUMNS", None)  # rich keeps the width it is imported with, and workers of xdist have one

import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.append(str(Path(__file__).parent))  # support, floors, tiny_models and the like
sys.path.append(str(Path(__file__).parent.parent))  # benchmarks; the installed package comes first

from kedit_fast.backends import probe
from kedit_fast.kernels.native import cpu as native_cpu

ISAS = ("generic", "neon") if platform.machine() in ("aarch64", "arm64") else ("generic", "avx2", "avx512", "amx")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logger_as_imported():
    """A command or benchmark that ran in this process sets the package's logger up for itself: here nobody has."""
    log = logging.getLogger("kedit_fast")
    log.propagate, log.handlers = True, []
    log.setLevel(logging.NOTSET)


@pytest.fixture
def cpu_module():
    """The C++ module; a pure-Python install has none, which is a supported one (.ci/run requires it)."""
    if reason := native_cpu.probe().reason:
        pytest.skip(f"no C++ module: {reason}")
    return native_cpu.module()


@pytest.fixture(params=ISAS)
def isa(request, cpu_module):
    """Every instruction set this machine has, one after another."""
    cpu = cpu_module
    if reason := cpu.isas()[request.param]:
        pytest.skip(reason)
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


@pytest.fixture(params=("torch", "cpu"))
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("cpu_module")
    return request.param


@pytest.fixture(params=("torch", "cpu", "triton"))
def every_backend(request):
    """The torch, C++ and Triton forms of an op; Triton's where its interpreter runs it on the CPU."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_module")
    if request.param == "triton" and not probe("triton").explicit_only:
        pytest.skip("the interpreter is not in use: Triton takes no tensors of the CPU")
    return request.param


@pytest.fixture(scope="session")
def demo_model():
    """The bundled model and tokenizer. Tests that edit it must restore it."""
    from kedit_fast import demo

    return demo.load()


@pytest.fixture(scope="session")
def demo_statistics(demo_model):
    from kedit_fast import demo
    from kedit_fast.statistics.collect import collect_statistics

    return collect_statistics(*demo_model, demo.corpus(800), (0, 1), progress=False)
