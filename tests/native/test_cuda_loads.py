"""What nvcc makes of the CUDA kernel: every load of a weight is on its way before anything waits, and none spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def disassembler():
    """cuobjdump of CUDA, or the one that Triton brings."""
    beside = [] if NVCC is None else [Path(NVCC).parent / "cuobjdump"]
    try:
        import triton
    except ImportError:
        pass
    else:
        beside.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in beside if path.exists()), shutil.which("cuobjdump"))


pytestmark = [
    pytest.mark.skipif(not CUDA.is_dir(), reason="no source tree"),
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
    pytest.mark.skipif(disassembler() is None, reason="no cuobjdump"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The kernel for sm_90, and what ptxas says of it."""
    cubin = tmp_path_factory.mktemp("cuda") / "kernel.cubin"
    source = str(CUDA / "rank_k_update.cu")
    command = [NVCC, "-cubin", "-arch=sm_90", "-std=c++17", "-O3", "-Xptxas", "-v", source, "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return cubin, done.stderr


def test_no_kernel_spills(compiled):
    said = compiled[1]
    assert len(re.findall(r"Compiling entry function", said)) == 8
    assert set(re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)) == {("0", "0")}


def test_a_weight_is_loaded_before_the_first_barrier_and_the_first_store(compiled):
    listing = subprocess.run([disassembler(), "-sass", str(compiled[0])], capture_output=True, text=True).stdout
    kernels = re.split(r"Function : ", listing)[1:]
    aligned = [part for part in kernels if "Lb1E" in part.splitlines()[0]]
    assert len(kernels) == 8 and len(aligned) == 4
    for kernel in aligned:
        name = kernel.splitlines()[0]
        packs = 16 if "IfN" not in name and re.search(r"kernelIf", name) else 8  # of 4 or of 8 numbers
        order = re.findall(r"\b(LDG\.E\.128|STG\.E\.128|BAR\.SYNC)", kernel)
        first = next(i for i, instruction in enumerate(order) if not instruction.startswith("LDG"))
        assert first == packs, (name, order[: packs + 4])
        assert order.count("LDG.E.128") == packs and "STG.E.128" in order, name
