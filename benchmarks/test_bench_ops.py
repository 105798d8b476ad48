"""The cases under pytest-benchmark: `pytest benchmarks [--cases small] [--benchmark-json FILE]`.

`python -m benchmarks.run` measures the same cases interleaved with their baselines, which is what ratios are made of;
this face is for pytest-benchmark's statistics, histograms and comparisons.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import provenance, synchronize
from benchmarks.problems import build


@pytest.fixture
def problem(case, request):
    device = request.config.getoption("--device")
    built = build(case, device, compiled=False)
    yield built
    if device != "cpu":
        torch.cuda.empty_cache()


def test_op(benchmark, case, problem, request):
    device = request.config.getoption("--device")
    error = problem.error()
    assert error <= problem.limit, "a wrong result has no time"
    benchmark.group = str(case)
    benchmark.extra_info.update(
        backend=problem.backend, flops=problem.flops, bytes=problem.bytes, error=error, **provenance(device)
    )

    def call():
        problem.ours()
        synchronize(device)

    benchmark(call)


def test_baseline(benchmark, case, problem, request):
    device = request.config.getoption("--device")
    name, baseline = next(iter(problem.baselines.items()))
    benchmark.group = str(case)
    benchmark.extra_info.update(baseline=name, flops=problem.flops, bytes=problem.bytes, **provenance(device))

    def call():
        baseline()
        synchronize(device)

    benchmark(call)
