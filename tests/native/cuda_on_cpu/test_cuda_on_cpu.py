"""The CUDA kernel's indexing where there is no GPU: its source compiled for a processor on stand-ins for CUDA's names.

What only hardware has is not tested: warps that run together, memory that is visible late, the launch itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CUDA = HERE.parents[2] / "csrc" / "cuda"
LAUNCH = re.compile(r"(rank_k_update_kernel<[^<>]*>)\s*<<<([^,]+), ([^,]+), 0, stream>>>\(([^;]*)\);")
pytestmark = [
    pytest.mark.skipif(not CUDA.is_dir(), reason="no source tree"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


def run(folder, kernel):
    """Compile the kernel's source with its launches as calls, under the sanitizer of undefined behavior, and run it."""
    source, launches = LAUNCH.subn(r"cuda_on_cpu::launch(\2, \3, [&] { \1(\4); });", kernel)
    assert launches == 2, "a launch is not written as the pattern has it"
    (folder / "kernel.cpp").write_text(source, encoding="utf-8")
    includes = [f"-I{HERE}", f"-I{CUDA}"]
    sanitizer = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    command = ["g++", "-std=c++17", "-O1", "-Wno-unknown-pragmas", *sanitizer, *includes, str(folder / "kernel.cpp")]
    command += [str(HERE / "check_cuda_kernel.cpp"), "-o", str(folder / "check")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return subprocess.run([str(folder / "check")], capture_output=True, text=True)


@pytest.fixture(scope="module")
def kernel():
    return (CUDA / "rank_k_update.cu").read_text(encoding="utf-8")


def test_the_kernel_agrees_with_plain_loops_in_any_order_of_threads(kernel, tmp_path):
    done = run(tmp_path, kernel)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "776 passed, 0 failed"


@pytest.mark.parametrize(
    ("right", "wrong"),
    (
        ("p < depth && row0 + r < rows", "p < depth"),  # reads past the rows of left
        ("column + LANE_COLUMNS <= columns", "column < columns"),  # writes past the end of a row
        ("if (first_row + r < rows) before", "before"),  # reads past the rows of weight
        ("column % 8 / 4 * HALF +", "column % 8 / 4 * (HALF - 16) / 2 +"),  # two columns in one place
        ("    __syncthreads();\n    for (int p = 0", "    for (int p = 0"),  # reads what others have not written yet
    ),
)
def test_a_mistake_is_noticed(kernel, right, wrong, tmp_path):
    assert kernel.count(right) == 1
    assert run(tmp_path, kernel.replace(right, wrong)).returncode != 0
