"""The tables of options in `kedit_fast/cli/README.md`, written from the commands themselves.

python -m kedit_fast.cli.reference          print the tables
python -m kedit_fast.cli.reference PAGE     replace them in a page
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from kedit_fast.cli import main, requests, stats

BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"
_LAZY_GROUPS = {stats.app: stats.COMMANDS, requests.app: requests.COMMANDS}
TYPES = {str: "text", int: "integer", float: "number", Path: "path", bool: ""}


def functions(table: Mapping[str, tuple[str, str]], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Callable]]:
    """Every command's name and function, in the order of `--help`."""
    for name, (target, _) in table.items():
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, typer.Typer):
            yield " ".join((*path, name)), command
        elif command in _LAZY_GROUPS:
            yield from functions(_LAZY_GROUPS[command], (*path, name))
        else:
            for info in command.registered_commands:
                function: Any = info.callback
                yield " ".join((*path, name, info.name or function.__name__)), function


def reference() -> str:
    """Markdown: a heading, the help and a table of options for every command."""
    sections = []
    for name, function in functions(main.COMMANDS):
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
        lines = [f"### `kedit-fast {name}`", "", inspect.getdoc(function) or "", ""]
        lines += ["| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [_row(key, hints[key], parameter.default) for key, parameter in parameters.items()]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _row(key: str, hint: Any, default: Any) -> str:
    """A line of the table, from `Annotated[type, typer.Option(...)]`."""
    kind, info = get_args(hint)[:2]
    # Inside Annotated the first name of an option stands where its default would.
    names = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    if names:
        declared = [name for text in names for name in text.split("/")]
    else:
        name = key.rstrip("_").replace("_", "-")
        declared = [f"--{name}", f"--no-{name}"] if kind is bool else [f"--{name}"]
    if type(info).__name__ == "ArgumentInfo":
        declared = [key.upper()]
    spelled = ", ".join(f"`{name}`" for name in declared)
    return f"| {spelled} | {_value(kind, info)} | {_default(default)} | {_cell(info.help or '')} |"


def _value(kind: Any, info: Any) -> str:
    if info.metavar:
        return _cell(info.metavar.strip("<>").replace("|", " | "))
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is list:
        return f"{TYPES[get_args(kind)[0]]}, repeatable"
    bound = "" if info.min is None else f", at least {info.min:g}"
    return f"{TYPES[kind]}{bound}"


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False:
        return ""
    return "on" if value is True else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def replaced(page: str) -> str:
    """A page with the tables between its two marks replaced."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", flags=re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{reference()}\n{END}", page)


if __name__ == "__main__":
    if sys.argv[1:]:
        page = Path(sys.argv[1])
        page.write_text(replaced(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(reference(), end="")
