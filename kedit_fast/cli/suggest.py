"""`kedit-fast suggest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kedit_fast.cli.checks import check_device_map, check_file, check_range, checked_device
from kedit_fast.cli.console import command, interactive, output, print_json, say_skipped
from kedit_fast.cli.hparams import overridden_hparams, requested_sample, warn_of_ignored_settings
from kedit_fast.cli.options import (
    REQUESTS_HELP,
    TEXT_HELP,
    ArgumentsOption,
    ChatOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    FormOption,
    HparamsOption,
    JsonOption,
    MergeAdapter,
    MethodOption,
    ModelArgument,
    OnErrorOption,
    ReadingOption,
    SeparatorOption,
    SetOption,
    SpecOption,
    SystemOption,
    TemplateOption,
    chat_options,
    parsed_layers,
    read_spec,
)
from kedit_fast.cli.quantized import DequantizeEdited, dequantize_for
from kedit_fast.cli.trials import table_of_trials
from kedit_fast.errors import KeditError
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.loading import DTYPES, load_config, load_model
from kedit_fast.reports.suggest import suggest as sweep
from kedit_fast.reports.trials import stored_statistics
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.reading import load_requests
from kedit_fast.statistics.sources import open_texts
from kedit_fast.support.files import write_text


@command
def suggest(
    model: ModelArgument,
    requests: Annotated[Path, typer.Option(help=f"better with paraphrases; {REQUESTS_HELP}")],
    method: MethodOption = "memit",
    text: Annotated[
        str | None, typer.Option(help="text for the statistics and for measuring drift: " + TEXT_HELP)
    ] = None,
    field: Annotated[str, typer.Option(help="field of a record, or column, that holds the text")] = "text",
    tokens: Annotated[int, typer.Option(min=100, help="tokens of the text to use for statistics")] = 100_000,
    stats: Annotated[
        Path | None, typer.Option(help="folder that `kedit-fast stats --layers auto` wrote; other layers are not tried")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="accept files that do not record their model, as this model's")
    ] = False,
    edits: Annotated[
        int,
        typer.Option(min=1, help="how many of the requests to use, from the first; a third of six or more is held out"),
    ] = 48,
    layers: Annotated[
        str | None,
        typer.Option(help="last edited layers to try; by default over the depth of the method's presets"),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="trace some requests, and begin with windows at the layers that the trace speaks for"
        ),
    ] = False,
    hparams: HparamsOption = None,
    set_: SetOption = None,
    form: FormOption = None,
    reading: ReadingOption = None,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    device_map: DeviceMapOption = None,
    merge_adapter: MergeAdapter = False,
    dequantize: DequantizeEdited = False,
    spec: SpecOption = None,
    out: Annotated[Path | None, typer.Option(help="write the configuration to this .toml")] = None,
    on_error: OnErrorOption = "raise",
    as_json: JsonOption = False,
) -> None:
    """Try layers and other hyper-parameters on a few requests, and print the best configuration for --hparams."""
    chatting = chat_options(chat, system, template, template_arg)
    check_device_map(device_map, device)
    architecture = read_spec(spec)
    if out is not None:
        check_file(out)
    records = load_requests(requests, on_error, find_recipe(method).needs_subject, form, reading).first(edits)
    overrides = overridden_hparams(hparams, set_, None, method)
    warn_of_ignored_settings(hparams, dtype)
    last_layers = None if layers is None else parsed_layers(layers)
    documents = [] if text is None else open_texts(text, field)
    check_range(last_layers or (), load_config(model, merge_adapter))
    loaded, tokenizer = load_model(model, DTYPES[dtype], checked_device(device), device_map, merge_adapter)
    if dequantize:
        dequantize_for(loaded, None, any_layer=True, spec=architecture)
    statistics = None
    if stats is not None:
        sample = requested_sample(hparams)
        statistics = stored_statistics(stats, loaded, tokenizer, trust=trust, spec=architecture, **sample)
    suggestion = sweep(
        loaded,
        tokenizer,
        records,
        method,
        statistics=statistics,
        texts=documents,
        max_tokens=tokens,
        last_layers=last_layers,
        trace=trace,
        hparams=overrides,
        target_separator=target_separator,
        prompt_format=None if chatting is None else chat_format(tokenizer, **chatting),
        on_error=on_error,
        progress=interactive(),
        spec=architecture,
    )
    say_skipped(suggestion.skipped, records.total)
    if out is not None:
        write_text(out, suggestion.toml(), KeditError)
    if as_json:
        print_json(suggestion.as_dict())
        return
    best = suggestion.trials.index(suggestion.best)
    fields = suggestion.as_dict()
    title = f"{suggestion.method.upper()}: {suggestion.edits} edits of {model}"
    tables = [table_of_trials(title, fields["trials"], best)]
    if suggestion.held_out:
        scores = [trial.score for trial in suggestion.held_out]
        title = f"The best with {suggestion.held_out_edits} requests more, scored on these"
        tables.append(table_of_trials(title, fields["held_out"], scores.index(suggestion.score)))
    for table, reasons in tables:
        output.print(table)
        for reason in reasons:
            output.print(reason, markup=False)
    for note in suggestion.notes:
        output.print(f"Note: {note}", markup=False)
    output.print(suggestion.toml().rstrip(), markup=False)
    if out is not None:
        output.print(f"Saved to {out}: kedit-fast edit --hparams {out}", markup=False)
