"""Which room may import what: the tables, and a test that reads every source and holds it to them.

`MAY_IMPORT` and `THIRD_PARTY` are the rules. A room is a folder of the package, or a file at its top. The test follows
absolute and relative imports, names that the package re-exports at its top, attributes of the package, and module
paths in strings. `test_a_violation_is_caught` plants one violation of each kind.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kedit_fast

PACKAGE = Path(kedit_fast.__file__).parent
CSRC = Path(__file__).parent.parent / "csrc"

_LOW = {"errors", "support"}
_MODELS = {*_LOW, "ops", "models"}
_EDITING = {*_MODELS, "backends", "reference", "kernels", "methods", "solver", "requests", "statistics", "patches"}
_ALL = {*_EDITING, "editing", "evaluation"}
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "_build_info": set(),
    "errors": set(),
    "support": {"errors"},
    "backends": {"errors"},
    "reference": {"support.dtypes"},
    "kernels": {*_LOW, "backends", "_build_info"},
    "ops": {*_LOW, "backends", "reference", "kernels"},
    "models": {*_LOW, "backends", "reference", "ops"},
    "methods": {"errors", "support.textfiles"},
    "solver": {*_LOW, "ops"},
    "requests": {*_LOW, "models"},
    "statistics": _MODELS,
    "patches": {*_MODELS, "solver"},
    "evaluation": {*_MODELS, "requests", "patches"},
    "editing": _EDITING,
    "workflow": _ALL,
    "reports": {*_ALL, "workflow"},
    "integrations": {*_ALL, "workflow", "reports"},
    "demo": {*_ALL, "workflow", "reports", "integrations"},
    "cli": {*_ALL, "workflow", "reports", "integrations", "demo"},
    "__init__": {*_ALL, "_version"},
    "__main__": {"cli"},
}
EVERYWHERE = {"_version"}

_ARRAYS = {"torch", "numpy"}
_HUB = {*_ARRAYS, "transformers", "safetensors", "tqdm"}
THIRD_PARTY: dict[str, set[str]] = {
    "support": {*_ARRAYS, "safetensors", "matplotlib"},
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "ops": {"torch"},
    "models": {*_HUB, "accelerate", "peft"},
    "methods": {"yaml", "tomllib", "tomli"},
    "solver": {"torch", "numpy"},
    "requests": _HUB,
    "statistics": {*_HUB, "datasets", "huggingface_hub"},
    "patches": {*_HUB, "peft"},
    "evaluation": _HUB,
    "editing": _HUB,
    "workflow": _HUB,
    "reports": _HUB,
    "integrations": {*_HUB, "easyeditor"},
    "demo": {*_HUB, "tokenizers", "typer"},
    "cli": {"typer", "click", "rich", "torch"},
}
LIBRARY_HOMES = {"matplotlib": {"support/figures.py"}}
"""Libraries that one file of their room may import."""

DYNAMIC = {
    "cli/lazy.py",
    "cli/reference.py",
    "kernels/native/loader.py",
    "kernels/triton/__init__.py",
    "integrations/easyedit.py",
    "__init__.py",
}
"""Files that import a module whose path is put together when it is needed, of their own room or of a framework."""


def room_of(path: str) -> str:
    """The room of a source, from its path below the package."""
    return path.split("/")[0].removesuffix(".py")


def public_homes() -> dict[str, str]:
    """Name that the package re-exports -> module path below the package that defines it."""
    homes = {"__version__": "_version"}
    for name in kedit_fast.__all__:
        module = getattr(getattr(kedit_fast, name), "__module__", None) or ""
        if module.startswith("kedit_fast."):
            homes[name] = module.removeprefix("kedit_fast.")
    return homes


HOMES = public_homes()
ROOMS = {room_of(p.relative_to(PACKAGE).as_posix()) for p in PACKAGE.rglob("*.py")}


def below_package(module: str, name: str = "") -> str:
    """A module path below the package, of `kedit_fast.x.y` or of what `from kedit_fast import name` gives."""
    rest = module.removeprefix("kedit_fast").lstrip(".")
    if rest:
        return rest
    return HOMES.get(name, name if name in ROOMS else "__init__")


def imported(source: str, path: str) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of all that a source imports, in whatever way; name is "" where a module is taken."""
    tree = ast.parse(source)
    package = ["kedit_fast", *path.split("/")[:-1]]
    roots = {"kedit_fast"} if re.search(r"^\s*import kedit_fast\b(?! as)", source, re.MULTILINE) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
                if alias.name == "kedit_fast" and alias.asname:
                    roots.add(alias.asname)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parent = package[: len(package) - node.level + 1]
                module = ".".join([*parent, *([module] if module else [])])
            for alias in node.names:
                yield node.lineno, module, alias.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"kedit_fast(\.\w+)+", node.value):
                yield node.lineno, node.value, ""
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and not isinstance(node.args[0], ast.Constant):
                yield node.lineno, "a module by a computed path", ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in roots:
            yield node.lineno, "kedit_fast", node.attr


def private_attributes(source: str) -> set[str]:
    """Names with one underscore that a source gives to modules, classes and objects of its own."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if re.match(r"_[^_]", name)}


SOURCES = {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}
PRIVATE: dict[str, set[str]] = {}
TORCHS = {name for name in (*dir(torch.Tensor), *vars(torch.nn.Module())) if name.startswith("_")}
for _path, _source in SOURCES.items():
    PRIVATE.setdefault(room_of(_path), set()).update(private_attributes(_source))


def violations(source: str, path: str) -> list[str]:
    """What a source at `path` below the package does that the tables do not allow."""
    room = room_of(path)
    allowed, wrong = MAY_IMPORT[room] | EVERYWHERE, []
    for line, module, name in imported(source, path):
        if module == "a module by a computed path":
            if path not in DYNAMIC:
                wrong.append(f"{path}:{line} imports {module}")
            continue
        top = module.split(".")[0]
        if top != "kedit_fast":
            known = top in sys.stdlib_module_names or top in THIRD_PARTY.get(room, set())
            if not known or path not in LIBRARY_HOMES.get(top, {path}):
                wrong.append(f"{path}:{line} imports the package {top}")
            continue
        target = below_package(module, name)
        other = target.split(".")[0]
        if other == "__init__" and name == "":
            continue  # `import kedit_fast`: what is taken from it is seen at its uses
        full = f"{target}.{name}" if name else target
        if other != room and not any(full == entry or full.startswith(entry + ".") for entry in allowed):
            wrong.append(f"{path}:{line} imports {other} ({module} {name})")
        if other != room and re.match(r"_[^_]", name) and other not in EVERYWHERE:
            wrong.append(f"{path}:{line} imports the private name {name} of {other}")
    others = set().union(*(names for owner, names in PRIVATE.items() if owner != room))
    others -= PRIVATE.get(room, set()) | private_attributes(source) | TORCHS
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in others:
            wrong.append(f"{path}:{node.lineno} uses the private name {node.attr} of another room")
    return wrong


def test_every_room_has_a_row():
    assert set(MAY_IMPORT) >= ROOMS
    assert set(THIRD_PARTY) <= set(MAY_IMPORT)


def test_the_tables_name_files_that_exist():
    assert set(SOURCES) >= DYNAMIC | set().union(*LIBRARY_HOMES.values())


def test_the_table_of_the_contributing_page_says_the_same():
    page = Path(__file__).parent.parent / ".github" / "CONTRIBUTING.md"
    if not page.exists():
        pytest.skip("no source tree beside the installed package")
    section = page.read_text(encoding="utf-8").partition("| room | may import |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([a-z, ]+) \| (.+) \|$", section, re.MULTILINE)
    table = {room: text for rooms, text in rows for room in rooms.split(", ") if room in MAY_IMPORT}
    above = set()
    for room, text in table.items():
        names = set(re.findall(r"[a-z_.]+", text.split(";")[0]))
        if "all" in names and "above" in names:
            expected = above - ({"evaluation"} if "but" in names else set())
        elif "everything" in names:
            expected = above
        else:
            expected = names & ({*MAY_IMPORT} | {"support.dtypes", "support.textfiles"})
        assert MAY_IMPORT[room] >= expected - {room}, room
        assert "above" in names or "everything" in names or MAY_IMPORT[room] - {"_build_info"} == expected, room
        above.add(room)
    assert set(table) >= ROOMS - {"_version", "_build_info", "errors", "__init__", "__main__"}


def test_the_table_has_no_cycle():
    done: set[str] = set()

    def visit(room: str, above: tuple[str, ...]) -> None:
        assert room not in above, (*above, room)
        if room not in done:
            for other in sorted(entry.split(".")[0] for entry in MAY_IMPORT[room]):
                visit(other, (*above, room))
            done.add(room)

    for room in MAY_IMPORT:
        visit(room, ())


@pytest.mark.parametrize("path", SOURCES)
def test_imports_are_allowed(path):
    assert not violations(SOURCES[path], path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("solver/x.py", "from kedit_fast.editing.editor import Editor"),
        ("solver/x.py", "from kedit_fast.models import view"),
        ("solver/x.py", "import kedit_fast.editing.editor"),
        ("solver/x.py", "from ..editing.editor import Editor"),
        ("solver/x.py", "from ..editing import editor"),
        ("solver/x.py", "from .. import editing"),
        ("editing/values/x.py", "from ...evaluation import metrics"),
        ("solver/x.py", "from kedit_fast import Editor"),
        ("solver/x.py", "from kedit_fast import editing"),
        ("solver/x.py", "import kedit_fast\nkedit_fast.Editor"),
        ("solver/x.py", "import kedit_fast as k\nk.Editor"),
        ("solver/x.py", "def f():\n    import kedit_fast\n    return kedit_fast.evaluate"),
        ("solver/x.py", "import importlib\nimportlib.import_module('kedit_fast.editing.editor')"),
        ("solver/x.py", "__import__('kedit_fast.editing')"),
        ("solver/x.py", "TABLE = {'Editor': 'kedit_fast.editing.editor'}"),
        ("solver/x.py", "import importlib\nimportlib.import_module('kedit_fast.' + name)"),
        ("solver/x.py", "def f():\n    from kedit_fast.statistics import collect"),
        ("methods/x.py", "import torch"),
        ("methods/x.py", "from kedit_fast.support import files"),
        ("methods/x.py", "from kedit_fast.support.files import write_file"),
        ("reference/x.py", "from kedit_fast.ops import rms_norm"),
        ("reference/x.py", "import numpy"),
        ("statistics/x.py", "import typer"),
        ("reports/x.py", "from rich.table import Table"),
        ("reports/x.py", "import matplotlib"),
        ("support/files.py", "from matplotlib import pyplot"),
        ("ops/x.py", "import transformers"),
        ("editing/x.py", "from kedit_fast.evaluation.metrics import evaluate"),
        ("editing/x.py", "from kedit_fast.ops.target_log_probs import _check"),
        ("editing/x.py", "def f(view):\n    return view._head_module_that_is_private"),
    ],
)
def test_a_violation_is_caught(path, source, monkeypatch):
    monkeypatch.setitem(PRIVATE, "models", {*PRIVATE["models"], "_head_module_that_is_private"})
    assert violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("solver/x.py", "from kedit_fast.ops import spd_solve\nfrom kedit_fast import rank_k_update_\nimport torch"),
        ("solver/x.py", "from . import low_rank\nfrom .low_rank import LowRankUpdate\nfrom ..support import files"),
        ("methods/x.py", "from kedit_fast.support.textfiles import read_text\nimport yaml, json"),
        ("support/figures.py", "import matplotlib"),
        ("cli/x.py", "import kedit_fast\nkedit_fast.Editor"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert not violations(source, path)


MAY_INCLUDE = {"common": {"common"}, "cpu": {"common", "cpu"}, "cuda": {"common", "cuda"},
               "bind": {"common", "cpu", "cuda", "bind"}}  # fmt: skip
LIBRARIES = {r"pybind11|Python\.h": {"bind"}, r"cuda|cub/|thrust/": {"cuda", "bind"}, r"torch|ATen|c10": set()}


def wrong_includes(source: str, path: str) -> list[str]:
    """What a C++ source at `path` below csrc includes that it may not."""
    folder, wrong = path.split("/")[0], []
    for form, target in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', source, re.MULTILINE):
        if form == '"':
            beside = Path(path).parent if "/" not in target or target.startswith(".") else Path()
            other = Path(os.path.normpath(beside / target)).parts[0]
            if other not in MAY_INCLUDE[folder]:
                wrong.append(f"{path} includes {target}")
        for library, folders in LIBRARIES.items():
            if form == "<" and re.match(library, target) and folder not in folders:
                wrong.append(f"{path} includes {target}")
    return wrong


def test_includes_are_allowed():
    if not CSRC.is_dir():
        pytest.skip("no source tree beside the installed package")
    files = [p for p in CSRC.rglob("*.*") if p.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh")]
    assert len(files) > 20
    wrong = [w for p in files for w in wrong_includes(p.read_text(encoding="utf-8"), p.relative_to(CSRC).as_posix())]
    assert not wrong


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("common/x.h", '#include "cpu/kernel_table.h"'),
        ("common/x.h", '#include "../cpu/kernel_table.h"'),
        ("cpu/x.cpp", '#include "bind/tensor.h"'),
        ("cpu/x.cpp", "#include <pybind11/pybind11.h>"),
        ("cuda/x.cu", '#include "cpu/by_rows.h"'),
        ("common/x.h", "#  include <cuda_runtime.h>"),
        ("bind/x.cpp", "#include <torch/extension.h>"),
    ],
)
def test_a_wrong_include_is_caught(path, source):
    assert wrong_includes(source, path)
