"""Groups of commands whose modules are imported when a command is called, so that `--help` is quick."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from kedit_fast.cli.console import report_errors


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and one line of help, and imports the one that is called."""

    lazy_commands: Mapping[str, tuple[str, str]] = {}
    """Name -> ("module:attribute", one line of help). The attribute is a function of a command, or a group's app."""

    def load(self, name: str) -> Any:
        """The command of this name with its options: the module is imported here."""
        module, _, attribute = self.lazy_commands[name][0].partition(":")
        with report_errors():
            target = getattr(importlib.import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            target = _app_of(name, target)
        loaded = typer.main.get_command(target)
        loaded.name = name
        self.commands[name] = loaded
        return loaded

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is about to run."""
        if args and args[0] in self.lazy_commands:
            self.load(args[0])
        return super().resolve_command(ctx, args)


def lazy_app(
    commands: Mapping[str, tuple[str, str]], base: type[LazyGroup] = LazyGroup, **settings: Any
) -> typer.Typer:
    """A Typer app whose commands are imported when they are called.

    Args:
        commands: name -> ("module:attribute", one line of help), in the order of `--help`.
        base: the group's class.
        settings: of `typer.Typer`.
    """
    group = type("Commands", (base,), {"lazy_commands": commands})
    app = typer.Typer(cls=group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, **settings)
    for name, (_, line) in commands.items():
        app.command(name, help=line)(_not_loaded)
    return app


def _app_of(name: str, function: Any) -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command(name)(function)
    return app


def _not_loaded() -> None:
    """Stands for a command in the help of its group."""
