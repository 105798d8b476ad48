"""An import only ever points down (the order of LAYERS); tests read it from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kedit_fast

ROOT = Path(kedit_fast.__file__).parent
LAYERS = (
    {"errors", "_version", "_build_info", "serving"},
    {"backends", "distributed", "files", "textfiles", "torch_state"},
    {"pictures"},
    {"reference"},
    {"kernels"},
    {"ops"},
    {"models"},
    {"statistics"},
    {"solver"},
    {"methods", "patches"},
    {"editing"},
    {"editor"},
    {"evaluation"},
    {"pipeline", "planning", "suggestion", "spectra", "convergence"},
    {"integrations"},
    {"demo"},
    {"console"},
    {"stats_cli", "patch_cli"},
    {"cli"},
    {"__main__", "__init__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OWN = {"reference": {"torch", "__future__", "kedit_fast.reference"}}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "kedit_fast":
                yield from (f"kedit_fast.{alias.name}" for alias in node.names if alias.name in LEVEL)


def test_every_module_has_a_layer():
    assert {part_of(p) for p in ROOT.rglob("*.py")} <= set(LEVEL)


def test_imports_point_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = part_of(path)
        for name in imports(path):
            if name and name.startswith("kedit_fast."):
                target = name.split(".")[1]
                if target != part and LEVEL[target] >= LEVEL[part]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_reference_imports_torch_alone():
    for path in (ROOT / "reference").glob("*.py"):
        for name in imports(path):
            assert any(name == own or name.startswith(own + ".") for own in OWN["reference"]), (path.name, name)


def test_only_the_binding_includes_pybind11():
    csrc = Path(__file__).parent.parent / "csrc"
    if not csrc.is_dir():
        pytest.skip("no source tree beside the installed package")
    including = [p for p in csrc.rglob("*.*") if "#include <pybind11" in p.read_text(encoding="utf-8")]
    assert including and all(p.parent.name == "bind" for p in including)
