"""`kedit-fast stats collect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kedit_fast.cli.checks import check_device_map, check_range, processes
from kedit_fast.cli.console import command, interactive, notices, output, print_json
from kedit_fast.cli.options import (
    DTYPE_NAMES,
    LAYERS_HELP,
    TEXT_HELP,
    DeviceMapOption,
    DeviceOption,
    JsonOption,
    MergeAdapter,
    ModelArgument,
    SpecOption,
    choice,
    parsed_layers,
    read_spec,
)
from kedit_fast.cli.stats.experts import expert_table
from kedit_fast.methods.windows import statistics_layers
from kedit_fast.models.loading import DTYPES, load_config, load_model
from kedit_fast.models.view import ModelView
from kedit_fast.reports.spectra import expert_condition
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.expert_moments import ExpertTokens
from kedit_fast.statistics.labels import LABELS, Labels, OutputGradients
from kedit_fast.statistics.memory_plan import MASTERS, Masters, Needs
from kedit_fast.statistics.resumable import Collected, check_folder, collect_into
from kedit_fast.statistics.sources import open_texts
from kedit_fast.statistics.store import read_layer
from kedit_fast.statistics.token_weights import NAMED_WEIGHTS, UNIFORM, NamedWeights
from kedit_fast.support import process_group
from kedit_fast.support.messages import comma_list, size_text

AUTO = "auto"


@command
def collect(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help=TEXT_HELP)],
    layers: Annotated[
        str, typer.Option(help=LAYERS_HELP + "; auto: every layer that a method edits by default or tries")
    ],
    out: Annotated[Path, typer.Option(help="folder for the statistics and, while it runs, for checkpoints")],
    field: Annotated[str, typer.Option(help="field of a record, or column, that holds the text")] = "text",
    tokens: Annotated[int | None, typer.Option(min=1, help="stop after this many tokens")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="stop after this many documents")] = None,
    seed: Annotated[int | None, typer.Option(help="take documents in this random order; else in their own")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="cut documents to this many tokens")] = 1024,
    token_weights: Annotated[
        NamedWeights,
        choice(NAMED_WEIGHTS, "weights of tokens: one each, or the largest probability of a next token"),
    ] = UNIFORM,
    output_metric: Annotated[
        bool, typer.Option("--output-metric", help="also second moments of gradients at the outputs, by a second pass")
    ] = False,
    metric_labels: Annotated[
        Labels,
        choice(LABELS, "--output-metric: gradients of -log p of drawn labels, or of next tokens"),
    ] = "sampled",
    metric_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="--output-metric: from the first so many tokens; by default 10 for each output"),
    ] = None,
    metric_seed: Annotated[int, typer.Option(min=0, help="--output-metric: of the labels that are drawn")] = 0,
    metric_alone: Annotated[
        bool, typer.Option("--metric-alone", help="the output metric alone, beside whatever statistics --out has")
    ] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens of a batch, padding included")] = 4096,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue where the same command stopped; start if it never began")
    ] = False,
    checkpoint_every: Annotated[float, typer.Option(min=0, help="seconds between checkpoints")] = 60.0,
    masters: Annotated[Masters, choice(MASTERS, "where the fp64 sums are kept")] = "auto",
    dtype: Annotated[str, choice(DTYPE_NAMES, "dtype the model runs in")] = "auto",
    device: DeviceOption = "cpu",
    device_map: DeviceMapOption = None,
    merge_adapter: MergeAdapter = False,
    spec: SpecOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start anew in an existing --out")] = False,
    as_json: JsonOption = False,
) -> None:
    """Collect the second moments an edit needs, in one pass over a text, with checkpoints.

    Under torchrun every process takes its share of the batches.
    """
    layer_numbers = None if layers == AUTO else parsed_layers(layers)
    check_device_map(device_map, device)
    architecture = read_spec(spec)
    check_folder(out, resume, overwrite)
    gradients = OutputGradients(metric_labels, metric_seed, metric_tokens)
    if not (output_metric or metric_alone) and gradients != OutputGradients():
        raise typer.BadParameter("--metric-labels, --metric-tokens and --metric-seed are for --output-metric")
    documents = open_texts(text, field)
    config = load_config(model, merge_adapter)
    check_range(layer_numbers or (), config)
    try:
        with processes(device) as (rank, place):
            loaded, tokenizer = load_model(model, DTYPES[dtype], place, device_map, merge_adapter)
            if layer_numbers is None:
                layer_numbers = statistics_layers(config, ModelView(loaded, architecture).editable)
            collected = collect_into(
                out,
                loaded,
                tokenizer,
                Corpus(documents, tokens, samples, max_length, seed, token_weights),
                layer_numbers,
                output_metric=gradients if output_metric or metric_alone else False,
                inputs=not metric_alone,
                batch_tokens=batch_tokens,
                checkpoint_every=checkpoint_every,
                resume=resume,
                overwrite=overwrite,
                masters=masters,
                on_plan=_say_needs,
                progress=interactive(),
                spec=architecture,
            )
    except KeyboardInterrupt:
        notices.print(f"kedit-fast: interrupted; --resume continues from the last checkpoint in {out}", markup=False)
        raise typer.Exit(130) from None
    if rank:
        return  # the first process speaks
    experts = _experts(collected)
    if as_json:
        print_json(
            {
                "layers": list(collected.layers),
                "tokens": collected.tokens,
                "output_tokens": collected.output_tokens,
                "documents": collected.documents,
                "files": [path.name for path in collected.files],
                "out": str(out),
                "resumed_tokens": collected.resumed,
                "passes": collected.passes,
                "seconds": round(collected.seconds, 3),
                "checkpoint_seconds": round(collected.checkpoint_seconds, 3),
                **(
                    {"experts": {n: {**asdict(use), "condition": c} for n, (use, c) in experts.items()}}
                    if experts
                    else {}
                ),
            }
        )
        return
    how = "was finished" if not collected.passes else f"{collected.seconds:.1f} s"
    if collected.passes and collected.resumed:
        how += f", {collected.resumed:,} tokens from a checkpoint"
    layer_list = comma_list(collected.layers)
    counts = [f"{collected.tokens:,} tokens"] if collected.tokens else []
    counts += [f"output metric of {collected.output_tokens:,} tokens"] if collected.output_tokens else []
    output.print(f"{', '.join(counts)}, layers {layer_list}, {how}: {out}", markup=False)
    if experts:
        output.print(expert_table(experts))


def _experts(collected: Collected) -> dict[int, tuple[ExpertTokens, float | None]]:
    """Layer -> how many tokens chose its experts, and the condition number of layers that this call collected."""
    files = dict(zip(collected.layers, collected.files, strict=False))  # those of inputs come first
    return {
        layer: (
            use,
            expert_condition(read_layer(files[layer].parent, files[layer].stem).second) if collected.passes else None,
        )
        for layer, use in collected.experts.items()
    }


def _say_needs(needs: Needs) -> None:
    """What the collection will take, on stderr before it starts."""
    if process_group.world()[0]:
        return
    subject = "layers" if needs.side == "input" else "output metrics of layers"
    passes = "1 pass" if needs.passes == 1 else f"{needs.passes} passes"
    waiting = f", rows that wait for them {size_text(needs.buffer_bytes)}" if needs.buffer_bytes else ""
    notices.print(
        f"kedit-fast: {subject} {comma_list(needs.layers)} ({len(needs.layers)} in {passes} over the text): "
        "fp64 sums of "
        f"{'' if needs.passes == 1 else 'up to '}{size_text(needs.sum_bytes)} "
        f"{'on the host' if needs.on_cpu else 'beside the model'}"
        f"{waiting}; files of {size_text(needs.file_bytes)}, up to "
        f"{size_text(needs.disk_bytes)} with checkpoints",
        markup=False,
    )
