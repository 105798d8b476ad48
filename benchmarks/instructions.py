"""Instructions of the CPU kernels, counted by callgrind: what a change costs, on a machine of any speed and load.

    python -m benchmarks.instructions            # counts now, beside the committed ones
    python -m benchmarks.instructions --write    # replaces the committed ones

Valgrind knows no AVX-512, so only the instruction sets `generic` and `avx2` are counted. Counts are of one compiler:
the committed file names it, and tests/native skips the comparison where another one is installed.
"""

from __future__ import annotations

import ast
import json
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "native"
COUNTS = PROGRAMS / "instruction_counts.json"
ISAS = ("generic", "avx2")
TOLERANCE = 0.03
"""Share of a committed count by which one may differ: more than other data on the stack or another libc change."""
COMPILER = "g++"


def build_setting(name: str) -> list[str]:
    """A list of flags of setup.py, which cannot be imported without building."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no list {name}")


def compiler_version(compiler: str = COMPILER) -> str:
    """The first line of `compiler --version`; empty where there is no such compiler."""
    if shutil.which(compiler) is None:
        return ""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def compile_programs(
    names: Sequence[str], folder: Path, compiler: str = COMPILER, isas: Sequence[str] = ISAS, link: Sequence[str] = ()
) -> dict[str, Path]:
    """Programs of tests/native linked with the kernels of the given instruction sets, compiled as setup.py does.

    Raises:
        RuntimeError: the compiler refuses one; with what it prints.
    """
    flags = [*build_setting("STANDARD"), "-pthread", *(f"-DKF_ISA_{isa.upper()}=1" for isa in isas if isa != "generic")]
    special = {"isa_avx2": build_setting("AVX2")}
    sources = [path for room in ("common", "cpu") for path in sorted((ROOT / "csrc" / room).glob("*.cpp"))]
    sources = [path for path in sources if not path.stem.startswith("isa_") or path.stem.removeprefix("isa_") in isas]
    sources.sort(key=lambda path: not path.stem.startswith("isa_"))  # the longest first

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run([compiler, *flags, *special.get(source.stem, []), "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, *(PROGRAMS / f"{name}.cpp" for name in names)]))
    common = objects[: len(sources)]
    for name, main in zip(names, objects[len(sources) :], strict=True):
        run([compiler, main, *common, *link, "-pthread", "-ldl", "-o", str(folder / name)])
    return {name: folder / name for name in names}


def refusal() -> str:
    """Why nothing can be counted here, or ''."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"counts are of x86-64, this is {platform.machine()}"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if not compiler_version():
        return f"{COMPILER} is not installed"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return "" if re.search(r"\bavx2\b", flags) else "this processor has no AVX2"


def count(program: Path, isas: Sequence[str] = ISAS) -> dict[str, dict[str, int]]:
    """Instruction set -> kernel -> instructions of one call.

    Raises:
        RuntimeError: the program fails under valgrind, or callgrind wrote another number of counts than it made calls.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--toggle-collect=counted", "--dump-after=counted", f"--callgrind-out-file={folder}/out"]
        command = ["valgrind", "--tool=callgrind", "-q", *options, str(program), *isas]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
        calls = done.stdout.splitlines()
        files = [path for path in Path(folder).glob("out.*") if path.suffix[1:].isdigit()]
        totals = []
        for path in sorted(files, key=lambda path: int(path.suffix[1:])):
            text = path.read_text(encoding="utf-8")
            if "Trigger: --dump-after=counted" in text:
                totals.append(int(re.findall(r"^(?:summary|totals): (\d+)", text, flags=re.MULTILINE)[0]))
    if len(totals) != len(calls) or not totals:
        raise RuntimeError(f"{len(calls)} calls were made and {len(totals)} counted")
    counts: dict[str, dict[str, int]] = {isa: {} for isa in isas}
    for call, total in zip(calls, totals, strict=True):
        isa, kernel = call.split(" ", 1)
        counts[isa][kernel] = total
    return counts


def changes(counts: Mapping[str, Mapping[str, int]], committed: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What differs from the committed counts by more than the tolerance, or is on one side alone."""
    lines = []
    names = {(isa, kernel) for side in (counts, committed) for isa, kernels in side.items() for kernel in kernels}
    for isa, kernel in sorted(names):
        now, before = (side.get(isa, {}).get(kernel) for side in (counts, committed))
        if now is None or before is None or abs(now - before) > TOLERANCE * before:
            lines.append(f"{isa} {kernel}: {now} instructions, {before} committed")
    return lines


def main(
    write: Annotated[bool, typer.Option("--write", help="replace the committed counts")] = False,
) -> None:
    """Count the instructions of every CPU kernel, and show or replace the committed counts."""
    if reason := refusal():
        raise typer.BadParameter(reason)
    with tempfile.TemporaryDirectory() as folder:
        counts = count(compile_programs(["count_kernels"], Path(folder))["count_kernels"])
    before = json.loads(COUNTS.read_text(encoding="utf-8"))["counts"] if COUNTS.exists() else {}
    for isa, kernels in counts.items():
        for kernel, number in kernels.items():
            old = before.get(isa, {}).get(kernel)
            print(f"{isa:8} {kernel:45} {number:>12,}  {'new' if old is None else f'{number / old - 1:+.2%}'}")
    if write:
        content = {"compiler": compiler_version(), "flags": build_setting("STANDARD"), "counts": counts}
        COUNTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
