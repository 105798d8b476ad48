"""What all commands share: how they print, fail, and read devices and layers.

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
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from kedit_fast.errors import KeditError, MethodError
from kedit_fast.support.messages import first_line

notices = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)


def _checked_separator(value: str) -> str:
    from kedit_fast.requests.spacing import check_separator

    try:
        return check_separator(value)
    except KeditError as error:
        raise typer.BadParameter(str(error)) from None


SeparatorOption = Annotated[
    str,
    typer.Option(
        help='between prompt and target of requests that say nothing: "auto" by the text, " " or ""',
        callback=_checked_separator,
    ),
]
ChatOption = Annotated[bool, typer.Option("--chat", help="prompts as messages in the tokenizer's chat template")]
SystemOption = Annotated[str | None, typer.Option(help="with --chat: the system message")]
TemplateOption = Annotated[str | None, typer.Option(help="with --chat: name of one of several chat templates")]
ArgumentsOption = Annotated[
    list[str] | None,
    typer.Option("--template-arg", help="with --chat: what the template reads, key=value; repeatable"),
]


class Dtype(str, Enum):
    """Dtypes a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OnError(str, Enum):
    """What to do with records and requests that cannot be used."""

    stop = "raise"
    skip = "skip"


ON_ERROR_HELP = "records that cannot be read, written or measured: raise, naming them all, or skip and report them"
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="of an adapter's folder: add it to its model's weights (needs peft)")
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into a few lines and an exit status."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        _set_up_logging()
        try:
            function(*args, **kwargs)
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
            if _caused_by_interrupt(error):  # a lazy import wraps the Ctrl-C that hit it
                interrupted()
            if "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower():
                fail(_OUT_OF_MEMORY)
            raise

    return wrapped


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
    """One notice for each of the first records that were left out, and how many they are."""
    from kedit_fast.requests.problems import first_problems

    for reason in first_problems(skipped):
        notices.print(f"kedit-fast: skipped {reason}", markup=False)
    if skipped:
        notices.print(f"kedit-fast: {len(skipped)} of {records} records skipped", markup=False)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")


def interactive() -> bool:
    """Whether stderr is a terminal, where bars are shown."""
    return sys.stderr.isatty()


def parsed_layers(text: str) -> tuple[int, ...]:
    """The layers of `4-8` or `3,5,7`."""
    from kedit_fast.methods.hparams import parse_layers

    try:
        return parse_layers(text)
    except ValueError:
        raise typer.BadParameter(f"layers are written 4-8 or 3,5,7; got {text!r}") from None


def assignments(texts: list[str] | None) -> dict[str, Any]:
    """Hyper-parameters of `--set key=value` options."""
    from kedit_fast.methods.hparams import parse_values

    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--set takes key=value; got {text!r}")
        pairs[name.strip()] = value.strip()
    return parse_values(pairs, "--set")


def chat_options(
    chat: bool, system: str | None, template: str | None, arguments: list[str] | None
) -> dict[str, Any] | None:
    """What `chat_format` takes, of the options --chat, --system, --template and --template-arg; None without a chat."""
    given = {"--system": system, "--template": template, "--template-arg": arguments}
    unused = [name for name, value in given.items() if value]
    if not chat and unused:
        raise typer.BadParameter(f"{unused[0]} is for a chat: give --chat too")
    pairs: dict[str, Any] = {"system": system, "template": template}
    for text in arguments or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier() or name.strip() in pairs:
            raise typer.BadParameter(f"--template-arg takes key=value, such as enable_thinking=false; got {text!r}")
        pairs[name.strip()] = _parsed(value.strip())
    return pairs if chat else None


def _parsed(text: str) -> Any:
    """true, false, null, numbers, lists and objects of JSON, also True, False and None; everything else as it stands.

    Text that begins as a list or an object does is one in double quotes.
    """
    plain = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        value = json.loads(plain)
    except ValueError as error:
        if text.startswith(("[", "{")):
            raise typer.BadParameter(
                f"--template-arg takes lists and objects as JSON, and text that begins like one in double quotes; "
                f"got {text!r}: {error}"
            ) from error
        return text
    return text if isinstance(value, str) and not value.startswith(("[", "{")) else value


def check_file(path: Path, option: str = "--out") -> None:
    """Raise KeditError when a new file cannot be made there; `option` names it."""
    if path.exists():
        raise KeditError(f"{path} exists: choose another {option}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise KeditError(f"cannot write {path}: its folder is not there or read-only")


def check_range(layers: tuple[int, ...], config: Any) -> None:
    """Raise MethodError when a model has no such layer."""
    outside = [layer for layer in layers if layer >= config.num_hidden_layers]
    if outside:
        raise MethodError(f"layer {outside[0]} is out of range: the model has layers 0-{config.num_hidden_layers - 1}")


def checked_device(name: str) -> str:
    """The name of a device that can be used here."""
    import torch

    try:
        if torch.empty(0, device=name).device.type == "meta":
            raise KeditError("device 'meta' holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise KeditError(f"device {name!r} cannot be used: {first_line(error)}") from None
    return name


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[int, str]]:
    """The rank of this process and its device, in the group that torchrun describes if there is one."""
    from kedit_fast.support import process_group

    made = process_group.start()
    rank, size = process_group.world()
    try:
        yield (
            rank,
            checked_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if size > 1 and device == "cuda" else device),
        )
    finally:
        if made:
            process_group.stop()
