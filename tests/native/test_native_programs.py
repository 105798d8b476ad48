"""The C++ kernels without Python: against plain loops in double, on this processor and on 64-bit ARM under an emulator,
and the instructions that they take.

A test is skipped where a tool that only it needs is not there, by the tool's name: the package needs none of them. The
cross-compiler and the emulator stand for a processor that is not here; counts are of x86-64 with AVX2, under valgrind,
and of one version of the compiler, as another one writes other instructions. `.ci/run` installs what it can.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess

import pytest

pytest.importorskip("benchmarks.instructions", reason="no source tree")
from benchmarks import instructions

ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
X86 = platform.machine() in ("x86_64", "AMD64")
needs_compiler = pytest.mark.skipif(not instructions.compiler_version(), reason=f"no {instructions.COMPILER}")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Both programs for this processor, compiled once."""
    isas = ("generic", "avx2") if X86 else ("generic", "neon")
    folder = tmp_path_factory.mktemp("native")
    return instructions.compile_programs(["check_kernels", "count_kernels"], folder, isas=isas)


def check(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    lines = done.stdout.splitlines()
    passed, failed = (int(word) for word in lines[-1].replace(",", "").split()[::2])
    assert passed > 1000 and failed == 0
    return lines


@needs_compiler
def test_kernels_agree_with_plain_loops_in_double(programs):
    lines = check([str(programs["check_kernels"])])
    assert "generic checked" in lines


def test_kernels_for_64_bit_arm_agree_with_plain_loops_in_double(tmp_path):
    for tool in (ARM_COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    built = instructions.compile_programs(["check_kernels"], tmp_path, ARM_COMPILER, ("generic", "neon"), ["-static"])
    lines = check([EMULATOR, str(built["check_kernels"])])
    assert "generic checked" in lines and "neon checked" in lines


@needs_compiler
def test_kernels_take_the_instructions_that_were_committed(programs):
    if reason := instructions.refusal():
        pytest.skip(reason)
    committed = json.loads(instructions.COUNTS.read_text(encoding="utf-8"))
    if committed["compiler"] != (version := instructions.compiler_version()):
        pytest.skip(f"counts are of {committed['compiler']}, this is {version}")
    assert committed["flags"] == instructions.build_setting("STANDARD"), "count again: the build has other flags"
    changed = instructions.changes(instructions.count(programs["count_kernels"]), committed["counts"])
    assert not changed, "\n".join(
        [*changed, "if that is meant: python -m benchmarks.instructions --write, and say why"]
    )


def test_a_change_of_a_count_by_more_than_three_percent_is_noticed():
    committed = {"avx2": {"rms_norm": 10_000, "gated_silu": 20_000}}
    assert not instructions.changes({"avx2": {"rms_norm": 10_290, "gated_silu": 19_410}}, committed)
    assert len(instructions.changes({"avx2": {"rms_norm": 10_310, "gated_silu": 20_000}}, committed)) == 1
    assert len(instructions.changes({"avx2": {"rms_norm": 9_690, "gated_silu": 20_000}}, committed)) == 1
    assert len(instructions.changes({"avx2": {"rms_norm": 10_000}}, committed)) == 1  # a kernel that is counted no more
    assert len(instructions.changes({**committed, "generic": {"rms_norm": 1}}, committed)) == 1  # or not committed
