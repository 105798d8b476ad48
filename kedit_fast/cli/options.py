"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from kedit_fast.errors import KeditError
from kedit_fast.evaluation.judge import Judge, Reads
from kedit_fast.evaluation.metric import Metric
from kedit_fast.evaluation.registry import select
from kedit_fast.methods.hparams_files import parse_layers, parse_values
from kedit_fast.models.architectures import ArchSpec, SharedExperts, spec_from_json
from kedit_fast.models.loading import DTYPES
from kedit_fast.requests.datasets.registry import DATA_SETS
from kedit_fast.requests.problems import OnError
from kedit_fast.requests.spacing import check_separator

REQUESTS_HELP = "edit requests: .json, .jsonl, .csv or .tsv, also .gz; - for stdin"
TEXT_HELP = ".txt (one document per line), .jsonl, .json, .csv or .tsv, also .gz; or datasets:NAME[:CONFIG[:SPLIT]]"
LAYERS_HELP = "zero-based, 4-8 (both ends count) or 3,5,7"


def choice(values: Iterable[str], help: str, *names: str) -> Any:
    """An option that takes one of these values.

    Args:
        values: what the library accepts: a table's names, or `get_args` of a Literal. (typer reads a Literal from
            0.19 on; older versions are supported.)
        help: the line of `--help`.
        names: of the option, where they are not those of the parameter.
    """
    accepted = tuple(values)

    def parsed(text: str) -> str:
        if text not in accepted:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, accepted))}.")
        return text

    return typer.Option(*names, help=help, parser=parsed, metavar=f"<{'|'.join(accepted)}>")


DTYPE_NAMES = sorted(DTYPES, key=lambda name: name != "auto")
DtypeOption = Annotated[str, choice(DTYPE_NAMES, "dtype the model is loaded in")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace an existing --out")]
OnErrorOption = Annotated[
    OnError,
    choice(
        get_args(OnError),
        "records that cannot be read, written or measured: raise, naming them all, or skip and report them",
    ),
]
FormOption = Annotated[
    str | None,
    choice(DATA_SETS, "the form of the requests' records, where it is not to be recognized from their fields"),
]
ReadingOption = Annotated[
    str | None,
    typer.Option(
        help="which published reading of the requests is meant, of a form with several: answers or alt of zsRE"
    ),
]
LabelsOption = Annotated[
    Path | None, typer.Option(help="JSON file of names of identifiers, for forms that give these alone (RippleEdits)")
]
RelationPromptsOption = Annotated[
    Path | None, typer.Option(help="JSON file of other phrasings by relation, as ConflictEdit and RoundEdit have them")
]
SnippetsOption = Annotated[
    Path | None,
    typer.Option(help="CounterFact's attribute_snippets.json: reference texts of generated ones, for gen.consistency"),
]
RequestSeedOption = Annotated[int, typer.Option("--seed", help="of new answers, which some forms leave to be drawn")]


def _checked_separator(value: str) -> str:
    try:
        return check_separator(value)
    except KeditError as error:
        raise typer.BadParameter(str(error)) from None


SeparatorOption = Annotated[
    str,
    typer.Option(
        help="what to put between prompt and target of requests without a target_separator: "
        '"auto" decides from the text; or " ", or ""',
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
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="of an adapter's folder: add it to its model's weights (needs peft)")
]
ModelArgument = Annotated[str, typer.Argument(help="model folder or hub name")]
HparamsOption = Annotated[Path | None, typer.Option(help="our .toml, EasyEdit's .yaml or memit's .json")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="hyper-parameter, key=value; repeatable")]
DeviceOption = Annotated[str, typer.Option(help="torch device")]
DeviceMapOption = Annotated[
    str | None, typer.Option(help="spread the model over devices: auto, balanced, sequential (needs accelerate)")
]
SpecOption = Annotated[
    Path | None,
    typer.Option(help="JSON file of the names of the model's modules, as `kedit-fast spec` prints it"),
]
SharedExpertsOption = Annotated[
    SharedExperts,
    choice(
        get_args(SharedExperts),
        "of a mixture, the experts that every token passes: leave them as they are, stack them with the others, or "
        "edit them alone",
    ),
]
MetricsOption = Annotated[
    str,
    typer.Option(help="what to measure: ids, definitions or families with commas between them, or all"),
]
JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", help="for metrics of defense (safe): a sequence classifier of answers, folder or hub name"),
]
JudgeLabelOption = Annotated[
    str | None,
    typer.Option(help="with --judge: its label that means safe, name or number; by default the one called safe"),
]
JudgeReadsOption = Annotated[
    Reads | None,
    choice(get_args(Reads), "with --judge: the answer alone, or prompt and answer as a pair of texts"),
]
MethodOption = Annotated[str, typer.Option(help="a method's name, see `kedit-fast methods`")]
SeedOption = Annotated[int, typer.Option(help="seed of the context prefixes")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def read_spec(path: Path | None) -> ArchSpec | None:
    """The ArchSpec in the file of --spec; None without one."""
    return None if path is None else spec_from_json(path)


def read_judge(metrics: str, judge: str | None, label: str | None, reads: Reads | None, device: str) -> Judge | None:
    """The classifier of --judge, whose weights are loaded when it is asked; None without one.

    Metrics, too, are checked: their names, and that some need a judge where one is given.
    """
    needed = any(isinstance(metric, Metric) and metric.needs == "judge" for metric in select(metrics))
    if judge is None and (label is not None or reads is not None):
        raise typer.BadParameter("--judge-label and --judge-reads are about a judge: give --judge, too")
    if judge is not None and not needed:
        raise typer.BadParameter("--judge is for metrics that need one: --metrics safe")
    return None if judge is None else Judge(judge, label, reads or "answer", device)


def check_form(requests: Path | None, form: str | None, reading: str | None) -> None:
    """Raise BadParameter for --form or --reading without --requests, which alone they are about."""
    if requests is None and (form is not None or reading is not None):
        raise typer.BadParameter("--form and --reading say how --requests is read: give it, too")


def parsed_layers(text: str) -> tuple[int, ...]:
    """The layers of `4-8` or `3,5,7`."""
    try:
        return parse_layers(text)
    except ValueError:
        raise typer.BadParameter(f"layers are written 4-8 or 3,5,7; got {text!r}") from None


def assignments(texts: list[str] | None) -> dict[str, Any]:
    """Hyper-parameters of `--set key=value` options."""
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
    """Arguments of `chat_format` from --chat, --system, --template and --template-arg; None without --chat."""
    values = {"--system": system, "--template": template, "--template-arg": arguments}
    unused = [name for name, value in values.items() if value]
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
    """JSON's true, false, null, numbers, lists and objects, and Python's True, False and None; all else is text.

    Text that begins like a list or an object is written in double quotes.
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
