"""`kedit-fast requests lint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kedit_fast.cli.checks import checked_device
from kedit_fast.cli.console import command, print_json
from kedit_fast.cli.findings import print_findings
from kedit_fast.cli.hparams import overridden_hparams, requested_sample
from kedit_fast.cli.options import (
    REQUESTS_HELP,
    ArgumentsOption,
    ChatOption,
    DeviceOption,
    DtypeOption,
    FormOption,
    HparamsOption,
    JsonOption,
    MethodOption,
    ReadingOption,
    RequestSeedOption,
    SeparatorOption,
    SetOption,
    SpecOption,
    SystemOption,
    TemplateOption,
    chat_options,
    read_spec,
)
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.loading import DTYPES, load_model
from kedit_fast.reports.lint import lint_requests
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.reading import load_requests
from kedit_fast.requests.relations import PUBLISHED, RelationRules
from kedit_fast.statistics.store import load_statistics


@command
def lint(
    file: Annotated[Path, typer.Argument(help=REQUESTS_HELP)],
    model: Annotated[
        str | None, typer.Option(help="model folder or hub name, for the rules that need its tokenizer or run it")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats",
            "--statistics",
            help="with --model: folder of its statistics, to compare keys as the method's solve does",
        ),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="accept files that do not record their model, as this model's")
    ] = False,
    method: MethodOption = "memit",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="requests per batch, as of `edit`; all at once by default")
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(
            help='TOML file of more relations that imply each other: reverse = ["P22>P40"], composite = [...]'
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="edited layers, zero-based, 4-8 or 3,5,7")] = None,
    hparams: HparamsOption = None,
    set_: SetOption = None,
    form: FormOption = None,
    reading: ReadingOption = None,
    seed: RequestSeedOption = 0,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    spec: SpecOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="print notes, too")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check requests before any edit: duplicates, contradictions, what the model knows, tokens across boundaries.

    Exit status 1 where there are errors.
    """
    recipe = find_recipe(method)
    chatting = chat_options(chat, system, template, template_arg)
    if model is None and (stats is not None or chatting is not None):
        raise typer.BadParameter("--stats and --chat are for a model: give --model, too")
    architecture = read_spec(spec)
    relations = PUBLISHED if rules is None else PUBLISHED.extended(RelationRules.load(rules))
    overrides = overridden_hparams(hparams, set_, layers, method)
    requests = load_requests(file, "skip", recipe.needs_subject or None, form, reading, seed)
    options: dict[str, Any] = {}
    loaded = tokenizer = None
    if model is not None:
        loaded, tokenizer = load_model(model, DTYPES[dtype], checked_device(device))
        if stats is not None:
            chosen, _ = make_hparams(method, loaded.config, overrides)
            options["statistics"] = load_statistics(
                stats, loaded, tokenizer, chosen.layers, architecture, trust, **requested_sample(hparams)
            )
        if chatting is not None:
            options["prompt_format"] = chat_format(tokenizer, **chatting)
    report = lint_requests(
        requests,
        loaded,
        tokenizer,
        method=recipe.name,
        batch_size=batch_size,
        hparams=overrides,
        relations=relations,
        target_separator=target_separator,
        seed=seed,
        spec=architecture,
        **options,
    )
    if as_json:
        print_json({"file": str(file), "form": requests.form, "method": recipe.name, **report.as_dict()})
    else:
        print_findings(report, str(file), verbose)
    if report.errors:
        raise typer.Exit(1)
