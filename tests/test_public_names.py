"""The table of public names, and what follows from it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import kedit_fast

NAMES = kedit_fast.PUBLIC_NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_its_module_defines(name):
    assert getattr(kedit_fast, name) is getattr(importlib.import_module(NAMES[name]), name)


def test_all_and_dir_are_the_table():
    assert kedit_fast.__all__ == dir(kedit_fast) == sorted([*NAMES, "ops"])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kedit_fast.nothing


def test_type_checkers_see_the_table():
    tree = ast.parse(Path(kedit_fast.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = (node for node in block.body if isinstance(node, ast.ImportFrom))
    # `import X as X` is how a typed package says that a name is exported.
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert seen == NAMES
