"""`kedit-fast plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast import demo as bundled
from kedit_fast.cli.checks import check_device_map, check_range, checked_device
from kedit_fast.cli.console import command, output, print_json, say_skipped
from kedit_fast.cli.hparams import overridden_hparams, warn_of_ignored_settings
from kedit_fast.cli.options import (
    REQUESTS_HELP,
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
    check_form,
    read_spec,
)
from kedit_fast.cli.quantized import DequantizeEdited, dequantize_for
from kedit_fast.cli.trials import chosen_by_trials
from kedit_fast.methods.presets import is_guess, make_hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.loading import DTYPES, empty_model, load_config, load_model
from kedit_fast.reports.plan import plan as estimate
from kedit_fast.reports.trials import stored_statistics
from kedit_fast.reports.tuning_plan import RoutingCost
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.reading import as_requests, load_requests
from kedit_fast.support.messages import size_text


@command
def plan(
    model: ModelArgument,
    edits: Annotated[int, typer.Option(min=1, help="how many edits, in one batch")],
    method: MethodOption = "memit",
    requests: Annotated[
        Path | None, typer.Option(help=f"for the trial, the demo's by default; {REQUESTS_HELP}")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(help="for a model without a preset, with --requests: choose the layers by trials, as `edit` does"),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="accept files that do not record their model, as this model's")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="zero-based, 4-8 or 3,5,7")] = None,
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
    trial: Annotated[bool, typer.Option(help="load the model and try; without, bytes from its configuration")] = True,
    on_error: OnErrorOption = "raise",
    as_json: JsonOption = False,
) -> None:
    """Estimate the memory, the batch and the time of a run of edits before it is started."""
    check_form(requests, form, reading)
    chatting = chat_options(chat, system, template, template_arg)
    if dequantize and not trial:
        raise typer.BadParameter("--no-trial counts all matrices as 16-bit: leave --dequantize-edited out")
    check_device_map(device_map, device)
    architecture = read_spec(spec)
    overrides = overridden_hparams(hparams, set_, layers, method)
    warn_of_ignored_settings(hparams, dtype)
    config = load_config(model, merge_adapter)
    chosen, origin = make_hparams(method, config, overrides)
    check_range(chosen.layers, config)
    records = as_requests(bundled.requests() if trial else [])
    if requests is not None:
        records = load_requests(requests, on_error, find_recipe(method).needs_subject, form, reading)
    if trial:
        loaded, tokenizer = load_model(model, DTYPES[dtype], checked_device(device), device_map, merge_adapter)
    else:
        loaded, tokenizer = empty_model(config, DTYPES[dtype]), None
    prompt_format = None if chatting is None or tokenizer is None else chat_format(tokenizer, **chatting)
    guessed = is_guess(origin) and hparams is None and "layers" not in overrides
    tries = guessed and trial and stats is not None and requests is not None
    plain = dequantize_for(loaded, chosen, any_layer=tries, spec=architecture) if dequantize else None
    if tries and stats is not None:
        sources = None
        if chosen.uses_statistics:
            sources = stored_statistics(stats, loaded, tokenizer, trust=trust, spec=architecture)
        tried = chosen_by_trials(
            loaded,
            tokenizer,
            records,
            method,
            overrides,
            sources,
            stats,
            off="without --stats the layers are a guess",
            prompt_format=prompt_format,
            target_separator=target_separator,
            on_error=on_error,
            spec=architecture,
        )
        overrides = {**overrides, **tried.choice.hparams}
        guessed = False
        if plain is not None:
            plain.put_back(except_layers=make_hparams(method, config, overrides)[0].layers)
    planned = estimate(
        loaded,
        tokenizer,
        edits,
        method,
        requests=records,
        hparams=overrides,
        prompt_format=prompt_format,
        target_separator=target_separator,
        on_error=on_error,
        spec=architecture,
    )
    say_skipped(planned.skipped, records.total)
    if as_json:
        print_json(planned.as_dict())
        return
    title = f"{planned.method.upper()}: {edits:,} edits of {model}, layers {','.join(map(str, planned.layers))}"
    table = Table("memory", "", title=escape(title), title_justify="left")
    table.columns[1].justify = "right"
    for name, size in planned.bytes.items():
        table.add_row(name, size_text(size))
    table.add_section()
    table.add_row("in all", size_text(sum(planned.bytes.values())))
    if planned.free_bytes is not None:
        table.add_row(f"free on {planned.device}, with the weights loaded", size_text(planned.free_bytes))
    output.print(table)
    output.print(f"Numbers: {planned.hparams_from}", markup=False)
    where = f"{planned.architecture.blocks}.{planned.layers[0]}.{planned.architecture.edit}"
    output.print(f"Architecture: {planned.architecture.name}, edits {where}", markup=False)
    if guessed:
        output.print("The layers are a guess: `edit` chooses them by trials, and so does --stats with --requests")
    if planned.routing is not None:
        output.print(_routing_text(planned.routing), markup=False)
    if planned.seconds is None:
        output.print("No trial: the batch and the time are unknown", markup=False)
        return
    if planned.values_batch is not None:
        output.print(f"Values of {planned.values_batch} requests at a time", markup=False)
    spent = ", ".join(f"{phase} {seconds:,.1f}" for phase, seconds in planned.seconds.items())
    output.print(f"Seconds, at most: {spent}", markup=False)


def _routing_text(cost: RoutingCost) -> str:
    """What a memory costs where it answers, in words."""
    read = f", {size_text(cost.sequence_bytes)} read for a sequence" if cost.sequence_bytes else ""
    return (
        f"Where the memory answers, beside the layer's own product: {cost.prompt_products:g} products of the matrix a "
        f"prompt token{read}; {cost.token_products:.2g} a token of sequences that an edit answers, 0 of others"
    )
