"""How all commands print, log and fail.

Exit status: 0 done, 1 an error (a few lines on stderr, nothing on stdout), 2 wrong options, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from kedit_fast.errors import KeditError

notices = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: errors end in a few lines and an exit status."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        _set_up_logging()
        with report_errors():
            function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Turn the errors of a command, or of the import of its module, into a few lines and an exit status."""
    try:
        yield
    except typer.Exit:
        raise
    except KeditError as error:
        fail(str(error))
    except MemoryError:
        fail(_OUT_OF_MEMORY)
    except OSError as error:
        fail(f"{str(error.filename) + ': ' if error.filename else ''}{error.strerror or error}")
    except KeyboardInterrupt:
        interrupted()
    except Exception as error:
        if _caused_by_interrupt(error):  # an import inside a library wraps the Ctrl-C that hit it
            interrupted()
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower():
            fail(_OUT_OF_MEMORY)
        raise


_OUT_OF_MEMORY = "out of memory: use a smaller batch (edit: --set values_batch=8, stats: --batch-tokens) or --dtype"


def interrupted() -> NoReturn:
    """End with the status of an interrupt."""
    notices.print("kedit-fast: interrupted; the output was not written", markup=False)
    raise typer.Exit(130)


def _caused_by_interrupt(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def fail(message: str) -> NoReturn:
    """End with a message on stderr."""
    notices.print(f"kedit-fast: {message}", markup=False)
    raise typer.Exit(1)


def _set_up_logging() -> None:
    level = (os.environ.get("KEDIT_FAST_LOG") or "WARNING").upper()
    if not isinstance(logging.getLevelName(level), int):
        fail(f"KEDIT_FAST_LOG must be DEBUG, INFO, WARNING or ERROR; got {level}")
    log = logging.getLogger("kedit_fast")
    log.setLevel(level)
    log.handlers = [RichHandler(console=notices, show_path=False, show_time=False)]
    log.propagate = False


def say_skipped(skipped: Mapping[int, str], records: int) -> None:
    """One notice for each of the first records that were left out, and the number of all of them."""
    from kedit_fast.requests.problems import first_problems  # the console is imported before a command is known

    for reason in first_problems(skipped):
        notices.print(f"kedit-fast: skipped {reason}", markup=False)
    if skipped:
        notices.print(f"kedit-fast: {len(skipped)} of {records} records skipped", markup=False)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")


def interactive() -> bool:
    """Whether stderr is a terminal, where progress bars are shown."""
    return sys.stderr.isatty()
