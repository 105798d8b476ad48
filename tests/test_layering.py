"""Which room may import what: the tables, and a test that reads every source and holds it to them.

`MAY_IMPORT` and `THIRD_PARTY` are the rules. A room is a folder of the package, or a file at its top. The test follows
absolute and relative imports, names that the package re-exports at its top, attributes of modules under any alias,
module paths in strings, and functions that import. `test_a_violation_is_caught` plants one violation of each kind.
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
_EDITING = {
    *_MODELS,
    "backends",
    "reference",
    "kernels",
    "methods",
    "solver",
    "requests",
    "statistics",
    "patches",
    "memories",
}
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
    "memories": {*_MODELS, "solver", "methods", "patches"},
    "evaluation": {*_MODELS, "requests", "patches", "memories"},
    "locating": {*_MODELS, "backends", "reference", "requests", "solver", "statistics"},
    "editing": _EDITING,
    "workflow": _ALL,
    "reports": {*_ALL, "workflow", "locating"},
    "integrations": {*_ALL, "workflow", "locating", "reports"},
    "demo": {*_ALL, "workflow", "locating", "reports", "integrations"},
    "cli": {*_ALL, "workflow", "locating", "reports", "integrations", "demo"},
    "__init__": {*_ALL, "reports", "locating", "_version"},
    "__main__": {"cli"},
}
EVERYWHERE = {"_version"}

_ARRAYS = {"torch", "numpy"}
_HUB = {*_ARRAYS, "transformers", "safetensors", "tqdm"}
THIRD_PARTY: dict[str, set[str]] = {
    "support": {*_ARRAYS, "safetensors", "matplotlib", "tomllib", "tomli"},
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "ops": {"torch"},
    "models": {*_HUB, "accelerate", "peft"},
    "methods": {"yaml", "tomllib", "tomli"},
    "solver": {"torch", "numpy"},
    "requests": _HUB,
    "statistics": {*_HUB, "datasets", "huggingface_hub"},
    "patches": {*_HUB, "peft"},
    "memories": _HUB,
    "evaluation": {*_HUB, "nltk", "sklearn"},
    "locating": _HUB,
    "editing": _HUB,
    "workflow": _HUB,
    "reports": _HUB,
    "integrations": {*_HUB, "easyeditor"},
    "demo": {*_HUB, "tokenizers", "typer"},
    "cli": {"typer", "click", "rich", "torch"},
}
_WORDS = "evaluation/words.py"
LIBRARY_HOMES = {"matplotlib": {"support/figures.py"}, "nltk": {_WORDS}, "sklearn": {_WORDS}}
"""Libraries that one file of their room may import."""

DYNAMIC = {
    "__init__.py": "loads a public name from its home on first use",
    "cli/lazy.py": "imports a command's module when the command is called",
    "cli/reference.py": "imports every command's module to read its options",
    "integrations/easyedit.py": "finds the parts of an installed EasyEdit",
    "kernels/native/loader.py": "loads the built modules, which may be missing",
    "kernels/triton/__init__.py": "imports a kernel's module at its first launch",
}
"""Files that import a module whose path is put together when it is needed -> why."""
LOADERS = {"importlib.import_module", "importlib.util.find_spec"}
"""Functions that elsewhere take a constant absolute path, which is then held to the tables."""
NO_LOADERS = re.compile(r"importlib\.(metadata|resources)|sys\.(?!modules|meta_path|path)")
NEVER = {"builtins", "imp", "pkgutil", "runpy", "zipimport"}
HIDDEN = {"__builtins__", "__globals__", "__import__", "__loader__", "__spec__"}
"""Libraries and names that no file uses, like `eval` and `exec`: what they import cannot be read from the source."""


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


def below_package(module: str) -> str:
    """Where a dotted path of the package leads, below the package: a public name to its home, the package to ""."""
    first, _, rest = module.removeprefix("kedit_fast").lstrip(".").partition(".")
    home = HOMES.get(first, first) if not rest or first not in ROOMS else first
    return ".".join(part for part in (home, first if home != first else "", rest) if part)


class Imports:
    """What one source takes by any kind of import. Names are followed through the whole file, whatever their scope."""

    def __init__(self, source: str, path: str):
        self.nodes = list(ast.walk(ast.parse(source)))
        self.path = path
        self.names: dict[str, set[str]] = {}
        """Local name -> dotted paths of the modules, or names of modules, that it may stand for."""
        self.imports = [found for node in self.nodes for found in self._statement(node)]
        for node in [*self.nodes, *self.nodes]:  # twice: an alias of an alias
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        self.names.setdefault(target.id, set()).update(self.paths(node.value))

    def _statement(self, node: ast.AST) -> Iterator[tuple[int, str]]:
        parent = ""
        if isinstance(node, ast.ImportFrom):
            folders = ["kedit_fast", *self.path.split("/")[:-1]]
            above = folders[: max(0, len(folders) - node.level + 1)] if node.level else []
            parent = ".".join([*above, *filter(None, [node.module]), ""])
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            path = re.sub(r"\.__init__\b", "", parent + alias.name)
            bound = path if parent or alias.asname else path.split(".")[0]
            self.names.setdefault(alias.asname or (alias.name if parent else bound), set()).add(bound)
            yield getattr(node, "lineno", 0), path

    def paths(self, node: ast.AST) -> set[str]:
        """The dotted paths that an expression may stand for."""
        if isinstance(node, ast.Name):
            builtin = {f"builtins.{node.id}"} if node.id in {*HIDDEN, "eval", "exec"} else set()
            return self.names.get(node.id, set()) | builtin
        if isinstance(node, ast.Attribute):
            return {f"{path}.{node.attr}" for path in self.paths(node.value)}
        if isinstance(node, ast.Call) and "importlib.import_module" in self.paths(node.func):
            return {constant} if (constant := first_argument(node)) else set()
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
            return {f"{path}.{getattr(node.args[1], 'value', '')}" for path in self.paths(node.args[0])}
        return set()

    def taken(self) -> Iterator[tuple[int, str]]:
        """(line, dotted path) of all that the source takes; a path with a space says what is refused."""
        yield from self.imports
        inner = {id(node.value) for node in self.nodes if isinstance(node, ast.Attribute)}
        constants = {id(node.func): first_argument(node) for node in self.nodes if isinstance(node, ast.Call)}
        for node in self.nodes:
            line = getattr(node, "lineno", 0)
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.fullmatch(r"kedit_fast((\.\w+)+|(\.\w+)*:[\w.]+)", text):
                yield line, text.replace(":", ".")
            if isinstance(node, ast.Attribute) and node.attr in HIDDEN:
                yield line, f"modules by {node.attr}"
            if id(node) in inner or not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
                continue
            for path in self.paths(node):
                constant = constants.get(id(node), "")
                if path == "kedit_fast":
                    yield line, "the package as a value"
                elif path.startswith("builtins."):
                    yield line, f"modules by {path}"
                elif path in LOADERS and constant:
                    yield line, constant if constant[0] != "." else "a module by a relative string"
                elif path.split(".")[0] in ("importlib", "sys") and not NO_LOADERS.match(path):
                    if self.path not in DYNAMIC:
                        yield line, "a module by a computed path"
                elif path.startswith("kedit_fast.") and not isinstance(node, ast.Name):
                    yield line, path


def first_argument(call: ast.Call) -> str:
    """The first argument of a call, or the one named `name`, where it is a constant string; else ""."""
    arguments = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "name")]
    values = [node.value for node in arguments if isinstance(node, ast.Constant)]
    return values[0] if values and isinstance(values[0], str) else ""


def borrowed(source: str, path: str) -> dict[str, bool]:
    """Names of a module that it imports from another room or a library -> whether from a library."""
    room, found, imports = f"kedit_fast.{room_of(path)}.", {}, Imports(source, path)
    taken = {home for _, home in imports.imports}
    for name, homes in imports.names.items():
        foreign = {h for h in homes if (h in taken or "." not in h) and not f"{h}.".startswith(room)}
        if foreign:  # not a constant of its own such as `DTYPE = torch.float32`
            found[name] = any(h.split(".")[0] != "kedit_fast" for h in foreign)
    return found


def private_attributes(source: str, *, of_others: bool) -> set[str]:
    """Names with one underscore that a source gives to modules, classes and `self`, or to any object."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if of_others or getattr(node.value, "id", "") in ("self", "cls") else set()
    return {name for name in names if re.match(r"_[^_]", name)}


SOURCES = {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}
BORROWED = {
    re.sub(r"(/__init__)?\.py$", "", path).replace("/", "."): borrowed(source, path) for path, source in SOURCES.items()
}
"""Module path below the package -> what it borrows."""
LIBRARIES = set().union(*THIRD_PARTY.values())
PRIVATE: dict[str, set[str]] = {}
OWN: dict[str, set[str]] = {}
TORCHS = {name for name in (*dir(torch.Tensor), *vars(torch.nn.Module())) if name.startswith("_")}
for _path, _source in SOURCES.items():
    PRIVATE.setdefault(room_of(_path), set()).update(private_attributes(_source, of_others=True))
    OWN.setdefault(room_of(_path), set()).update(private_attributes(_source, of_others=False))


def wrong_import(dotted: str, path: str) -> str:
    """Why a source at `path` may not take this dotted path, or ""."""
    room, top = room_of(path), dotted.split(".")[0]
    if " " in dotted or top in NEVER or dotted.endswith("*"):
        return dotted
    if top != "kedit_fast":
        known = top in sys.stdlib_module_names or top in THIRD_PARTY.get(room, set())
        return "" if known and path in LIBRARY_HOMES.get(top, {path}) else f"the package {top}"
    full = below_package(dotted)
    other, *parts = full.split(".")
    for end, part in enumerate(parts):
        module = ".".join([other, *parts[:end]])
        names = BORROWED.get(module, {})
        foreign = part in LIBRARIES or names.get(part) or (part in names and other != room)
        if foreign and f"{module}.{part}" not in BORROWED:
            return f"{part} through {other}"
    if other in ("", room):
        return ""  # `import kedit_fast`: what is taken from it is seen at its uses
    if not any(f"{full}.".startswith(f"{entry}.") for entry in MAY_IMPORT[room] | EVERYWHERE):
        return f"{other} ({dotted})"
    private = [part for part in dotted.split(".")[2:] if part.startswith("_") and other not in EVERYWHERE]
    return f"the private {private[0]} of {other}" if private else ""


def violations(source: str, path: str) -> list[str]:
    """What a source at `path` below the package does that the tables do not allow."""
    room, imports = room_of(path), Imports(source, path)
    wrong = [
        f"{path}:{line} imports {reason}" for line, dotted in imports.taken() if (reason := wrong_import(dotted, path))
    ]
    others = set().union(*(names for owner, names in PRIVATE.items() if owner != room))
    others -= OWN.get(room, set()) | private_attributes(source, of_others=False) | TORCHS
    for node in imports.nodes:
        name = node.attr if isinstance(node, ast.Attribute) else ""
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "delattr"):
            constants = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            name = next((c for c in constants if any(c in names for names in OWN.values())), "")
        if name in others:
            wrong.append(f"{path}:{getattr(node, 'lineno', 0)} uses the private name {name} of another room")
    return wrong


def test_every_room_has_a_row():
    assert set(MAY_IMPORT) >= ROOMS
    assert set(THIRD_PARTY) <= set(MAY_IMPORT)


def test_the_tables_name_files_that_exist():
    assert set(SOURCES) >= set(DYNAMIC).union(*LIBRARY_HOMES.values())


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
        ("editing/x.py", "def f(view):\n    view._head_module_that_is_private = 1"),
        ("editing/x.py", "def f(view):\n    return getattr(view, '_head_module_that_is_private')"),
        ("solver/x.py", "from .... import editing"),
        ("solver/x.py", "from kedit_fast.__init__ import Editor"),
        ("solver/x.py", "import kedit_fast.ops\nkedit_fast.editing.editor.Editor"),
        ("solver/x.py", "import kedit_fast.__init__ as k\nk.Editor"),
        ("solver/x.py", "import kedit_fast as k\nimport json as k\nk.Editor"),
        *[("solver/x.py", f"{i}\nkedit_fast.Editor") for i in ("import os, kedit_fast", "if x: import kedit_fast")],
        *[("solver/x.py", f"import kedit_fast\n{u}(kedit_fast, 'Editor')") for u in ("getattr", "vars", "print")],
        *[("solver/x.py", f"import kedit_fast\n{u}") for u in ("k = kedit_fast\nk.Editor", "kedit_fast.__dict__")],
        *[("solver/x.py", f"from {module} import *") for module in ("kedit_fast", "kedit_fast.ops", "sys")],
        *[("solver/x.py", f"HOME = 'kedit_fast{home}'") for home in (":Editor", ".editing.editor:Editor")],
        *[("solver/x.py", u) for u in ("exec('import x')", "eval(text)", "load = __import__", "import pkgutil")],
        ("solver/x.py", "import kedit_fast\nk = m = kedit_fast.ops\nm.torch"),
        ("solver/x.py", "from kedit_fast.support import files\ngetattr(files, 'torch')"),
        ("solver/x.py", "from importlib import import_module\nimport_module('kedit_fast').Editor"),
        ("solver/x.py", "from importlib import import_module\nk = import_module('kedit_fast')"),
        ("solver/x.py", "from importlib import import_module as im\nim('kedit_fast.' + name)"),
        ("solver/x.py", "from importlib import import_module\nimport_module(name='kedit_fast.' + name)"),
        ("solver/x.py", "from importlib import import_module\nimport_module(name='transformers')"),
        ("solver/x.py", "from importlib import import_module\nimport_module('..editing', __package__)"),
        ("cli/lazy.py", "from importlib import import_module\nimport_module('..models', __package__)"),
        ("solver/x.py", "import importlib\nload = importlib.import_module\nload(name)"),
        ("solver/x.py", "import importlib\ngetattr(importlib, 'import_module')"),
        ("solver/x.py", "import importlib.util as u\nu.find_spec('kedit_fast' + '.editing')"),
        ("solver/x.py", "import importlib.util as u\nu.spec_from_file_location('editor', path)"),
        ("solver/x.py", "import importlib\nimportlib.import_module('transformers')"),
        ("solver/x.py", "__import__('kedit_fast', fromlist=['Editor']).Editor"),
        ("solver/x.py", "from builtins import exec as run"),
        ("solver/x.py", "spd_solve.__globals__['native']"),
        ("solver/x.py", "from runpy import run_module"),
        ("solver/x.py", "import sys\nsys.modules[name]"),
        ("solver/x.py", "from sys import modules as m\nm[name]"),
        ("solver/x.py", "import sys as s\ngetattr(s, 'modules')"),
        ("methods/x.py", "from kedit_fast.support.textfiles import torch"),
        ("methods/x.py", "from kedit_fast.support import textfiles\ntextfiles.torch.zeros(1)"),
        ("support/x.py", "from .figures import matplotlib"),
        ("solver/x.py", "from kedit_fast.ops.rms_norm import native"),
        *[("solver/x.py", f"{i}_checks") for i in ("import kedit_fast.ops.", "from kedit_fast.ops import ")],
        ("solver/x.py", "from kedit_fast.ops._checks import require"),
        ("solver/x.py", "from kedit_fast.ops import target_log_probs as m\nm._check"),
        ("solver/x.py", "from kedit_fast import _build_info"),
    ],
)
def test_a_violation_is_caught(path, source, monkeypatch):
    monkeypatch.setitem(OWN, "models", {*OWN["models"], "_head_module_that_is_private"})
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
        ("solver/x.py", "import kedit_fast\nkedit_fast.rank_k_update_(a, b)\nkedit_fast.__version__"),
        ("solver/x.py", "import kedit_fast.ops as ops\nops.spd_solve(a, b)"),
        ("solver/x.py", "import importlib.util as u\nu.find_spec('numpy')\nu.find_spec('kedit_fast.ops')"),
        ("solver/x.py", "import importlib.metadata, sys\nimportlib.metadata.version('torch')\nsys.stdout"),
        ("solver/x.py", "model.eval()\nself._moment = 1"),
        ("cli/lazy.py", "import importlib\nimportlib.import_module(module)"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert not violations(source, path)


MAY_INCLUDE = {"common": {"common"}, "cpu": {"common", "cpu"}, "cuda": {"common", "cuda"},
               "bind": {"common", "cpu", "cuda", "bind"}}  # fmt: skip
SYSTEM = {
    r"[a-z_]+": {*MAY_INCLUDE},
    r"(assert|errno|float|limits|math|stdbool|stddef|stdint|stdio|stdlib|string)\.h": {*MAY_INCLUDE},
    r"(dlfcn|link|unistd|sys/[a-z]+|cpuid)\.h": {"common"},
    r"immintrin\.h|arm_neon\.h": {"cpu"},
    r"pybind11/\w+\.h|Python\.h": {"bind"},
    r"cuda(_\w+)?\.h|(cub|thrust)/[\w/]+\.\w+": {"cuda", "bind"},
}
"""Headers of the system and of libraries: all of the C++ standard's, those of C, and others where they are needed."""
_SKIPPED = r'R"([^()\\\s]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<![\da-fA-F])\'(?:\\.|[^\'\\\n])*\'|(/\*.*?\*/|//[^\n]*)'
_DIRECTIVE = re.compile(r"^\s*((?:#|%:|\?\?=)\s*(?:include|import|embed)|(?:export\s+)?import\b).*$", re.MULTILINE)


def wrong_includes(source: str, path: str) -> list[str]:
    """What a C++ source at `path` below csrc includes that it may not."""
    folder, wrong = path.split("/")[0], []
    source = re.sub(r"\\[ \t]*\r?\n", "", source)
    source = re.sub(_SKIPPED, lambda match: " " if match[2] else match[0], source, flags=re.DOTALL)
    for line in _DIRECTIVE.finditer(source):
        parsed = re.fullmatch(r"""\s*#\s*include\s*(?:<([^<>"]+)>|"([^<>"]+)")\s*""", line[0])
        target = (parsed[1] or parsed[2]) if parsed else ""
        beside = Path(path).parent if target.startswith(".") or (parsed and parsed[2] and "/" not in target) else Path()
        included = Path(os.path.normpath(beside / target))
        if parsed and parsed[1] and included.parts[0] not in MAY_INCLUDE:
            fine = any(re.fullmatch(known, target) and folder in folders for known, folders in SYSTEM.items())
        else:
            fine = bool(target) and included.parts[0] in MAY_INCLUDE[folder] and (CSRC / included).is_file()
        if not fine:
            wrong.append(f"{path}: {line[0].strip()}")
    return wrong


def test_includes_are_allowed():
    if not CSRC.is_dir():
        pytest.skip("no source tree beside the installed package")
    files = [p for p in CSRC.rglob("*") if p.is_file() and p.suffix != ".md"]
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
        ("common/x.h", "#include <cpu/kernel_table.h>"),
        ("common/x.h", '# /* */ include "cpu/kernel_table.h"'),
        ("common/x.h", '/* \n */ #include /* */ "cpu/kernel_table.h"'),
        ("common/x.h", '#include \\\n"cpu/kernel_table.h"'),
        ("common/x.h", 'auto s = "/*";\n#include "cpu/kernel_table.h"\n// */'),
        ("common/x.h", '#define HEADER "cpu/kernel_table.h"\n#include HEADER'),
        *[("common/x.h", f"{d} <string>") for d in ("#include_next", "#import", "%:include", "import", "#embed")],
        *[("cpu/x.cpp", f"#include <{h}>") for h in ("cuda_runtime.h", "omp.h", "mkl.h", "dlfcn.h", "dlpack/dlpack.h")],
        ("common/x.h", "#include <../cpu/kernel_table.h>"),
        ("common/x.h", "#include <kernel_table.h>"),
        ("cpu/x.cpp", '#include "torch/extension.h"'),
        ("cpu/x.cpp", "#include <./torch/extension.h>"),
        ("cpu/x.cpp", '#include "omp.h"'),
        ("cuda/x.cu", "#include <cublas_v2.h>"),
        ("cuda/x.cu", "#include <nvtx3/nvToolsExt.h>"),
    ],
)
def test_a_wrong_include_is_caught(path, source):
    assert wrong_includes(source, path)
