"""Names say what a thing is, in American spelling; what a field is stands in a docstring below it."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import kedit_fast

ROOT = Path(kedit_fast.__file__).parent
TREE = Path(__file__).parents[1]
SAYS_NOTHING = {"found", "kept", "what", "numbers", "own", "look", "move", "keep", "leave"}
BRITISH = re.compile(
    r"(al|an|art|in|ir|im|or|on|og|yn|om)is(e|ed|er|es|ation|ing|ers)(?![a-z])|colour|centre|neighbour|behaviour|analys(e|ed)(?![a-z])"
)
SPELLED_SO = {"raise", "precise", "promise", "otherwise", "noise"}


def identifiers(tree: ast.AST):
    """Every name that a source binds: variables, arguments, functions, classes, attributes, renamed imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def bad_names(source: str) -> list[str]:
    names = ((name.strip("_"), line) for name, line in identifiers(ast.parse(source)))
    return [
        f"{line}: {name}"
        for name, line in sorted(set(names), key=lambda pair: pair[1])
        if name in SAYS_NOTHING or (BRITISH.search(name.lower()) and name.lower() not in SPELLED_SO)
    ]


def commented_fields(source: str) -> list[str]:
    """Annotated fields of classes whose meaning stands in a trailing comment, which help() does not show."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        f"{node.lineno}: {ast.unparse(node.target)}"
        for owner in ast.walk(ast.parse(source))
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign)
        and any(
            line in comments and not re.match(r"# (noqa|type:|pyright:|fmt:)", comments[line])
            for line in range(node.lineno, node.end_lineno + 1)
        )
    ]


SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
BESIDE = sorted(path.relative_to(TREE).as_posix() for path in (*TREE.glob("benchmarks/*.py"), *TREE.glob("setup.py")))
needs_source_tree = pytest.mark.skipif(not (TREE / "setup.py").exists(), reason="no source tree")


@pytest.mark.parametrize("path", SOURCES)
def test_names_say_what_a_thing_is(path):
    assert not bad_names((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES)
def test_fields_are_explained_below_them(path):
    assert not commented_fields((ROOT / path).read_text(encoding="utf-8"))


@needs_source_tree
@pytest.mark.parametrize("path", BESIDE)
def test_names_beside_the_package_say_what_a_thing_is(path):
    assert not bad_names((TREE / path).read_text(encoding="utf-8"))


@needs_source_tree
@pytest.mark.parametrize("path", BESIDE)
def test_fields_beside_the_package_are_explained_below_them(path):
    assert not commented_fields((TREE / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "def keep(): ...",
        "def f(what): ...",
        "self.own = 1",
        "def normalise(x): ...",
        "_kept = 2",
        "import statistics as numbers",
    ],
)
def test_a_bad_name_is_noticed(source):
    assert bad_names(source)


def test_a_trailing_comment_of_a_field_is_noticed():
    assert commented_fields("class A:\n    x: int  # of what\n")
    assert not commented_fields('class A:\n    x: int\n    """Of what."""\n')
