"""`kedit-fast backends`, and what `python -m kedit_fast` prints for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import kedit_fast
from kedit_fast.cli.console import command, output, print_json
from kedit_fast.cli.options import JsonOption
from kedit_fast.kernels.native import cpu as native_cpu
from kedit_fast.kernels.native.loader import build_reason


@command
def backends(as_json: JsonOption = False) -> None:
    """Show which backends can run here, and why the others cannot."""
    rows = kedit_fast.backends()
    if as_json:
        print_json({row.name: {"available": row.available, "detail": row.detail} for row in rows})
        return
    for row in rows:
        output.print(str(row), markup=False)


def print_environment() -> None:
    """Backends, processor features, versions and build information: what a bug report needs."""

    print(f"kedit_fast {kedit_fast.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\nBackends")
    for row in kedit_fast.backends():
        print(f"  {row}")
    print("\nNative modules")
    for module in ("_cpu", "_cuda"):
        print(f"  {module}: {build_reason(module) or 'built'}")
    if not native_cpu.probe().reason:
        cpu = native_cpu.module()
        print(f"  compiler {cpu.compiler()}, threads of {cpu.thread_source()}")
        print(f"  processor features: {' '.join(cpu.cpu_features()) or 'none of those used'}")
        for name, reason in cpu.isas().items():
            print(f"  isa {name}: {reason or ('in use' if name == cpu.isa() else 'usable')}")
    print("\nVersions")
    for package in ("torch", "triton", "numpy", "transformers", "safetensors", "pybind11"):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    print("\nEnvironment")
    for name in sorted(n for n in os.environ if n.startswith(("KEDIT_FAST_", "OMP_NUM_THREADS", "TRITON_INTERPRET"))):
        print(f"  {name}={os.environ[name]}")
