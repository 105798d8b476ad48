"""`kedit-fast locate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from kedit_fast.cli.checks import check_device_map, checked_device
from kedit_fast.cli.console import command, interactive, notices, output, print_json, say_skipped
from kedit_fast.cli.locate_tables import print_comparison, print_located
from kedit_fast.cli.options import (
    REQUESTS_HELP,
    ArgumentsOption,
    ChatOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    FormOption,
    JsonOption,
    MergeAdapter,
    ModelArgument,
    OnErrorOption,
    OverwriteOption,
    ReadingOption,
    SpecOption,
    SystemOption,
    TemplateOption,
    chat_options,
    choice,
    read_spec,
)
from kedit_fast.errors import KeditError, UnsupportedModelError
from kedit_fast.locating.circuits import Scoring
from kedit_fast.locating.metrics import Metric
from kedit_fast.locating.prompt_pairs import Answers
from kedit_fast.models.fingerprint import tokenizer_hash
from kedit_fast.models.loading import DTYPES, load_config, load_model, load_tokenizer
from kedit_fast.reports import locating as report
from kedit_fast.reports.evaluation import provenance
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.reading import load_requests
from kedit_fast.support.files import check_new


def _parts(text: str) -> tuple[report.Part, ...]:
    """The parts of --parts."""
    names = list(report.PARTS) if text == "all" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in report.PARTS]:
        raise typer.BadParameter(f"--parts takes {', '.join(report.PARTS)} with commas, or all; got {unknown[0]!r}")
    return tuple(part for part in report.PARTS if part in names)


@command
def locate(
    model: ModelArgument,
    requests: Annotated[Path, typer.Option(help=f"facts to locate: {REQUESTS_HELP}")],
    parts: Annotated[
        str | None,
        typer.Option(
            help=f"what to ask: {', '.join(report.PARTS)} with commas, or all; by default trace, with --base none"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="the model before its edits: compare its circuits of the edited facts with those of MODEL"),
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="with --base: requests that were not edited, better as many as --requests")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="requests to trace and to find circuits of, the first ones; by default 16 and 64; probes take all",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1, help="layers whose MLPs or attention are restored together; by default a fifth, at most 10"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="draws of the noise at each prompt's subject")] = 10,
    noise: Annotated[
        float | None,
        typer.Option(
            min=0, help="standard deviation of the noise; by default 3 times that of the subjects' embeddings"
        ),
    ] = None,
    answers: Annotated[
        Answers, choice(get_args(Answers), "of lens and circuit: what the model says, or a target, which it must say")
    ] = "model",
    edges: Annotated[
        int | None,
        typer.Option(
            min=1, help="edges of the circuit; by default 15 % of the model's, at most 5,000, and 200 with --base"
        ),
    ] = None,
    pruning: Annotated[
        report.Pruning,
        choice(get_args(report.Pruning), "edges from the logits down, or the largest scores"),
    ] = "greedy",
    scoring: Annotated[Scoring, choice(get_args(Scoring), "how edges are scored")] = "eap-ig",
    steps: Annotated[int, typer.Option(min=1, help="steps of the integrated gradients")] = 5,
    metric: Annotated[Metric, choice(get_args(Metric), "what a circuit explains")] = "logit-difference",
    seed: Annotated[int, typer.Option(help="of the noise, of other subjects and of samples")] = 1,
    form: FormOption = None,
    reading: ReadingOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    device_map: DeviceMapOption = None,
    merge_adapter: MergeAdapter = False,
    spec: SpecOption = None,
    on_error: OnErrorOption = "raise",
    out: Annotated[Path | None, typer.Option(help="folder for the results: JSON, pictures, circuits as .dot")] = None,
    heat_maps: Annotated[
        int, typer.Option(min=0, help="with --out: of how many requests, the first ones, a heat map is drawn")
    ] = 8,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say in which layers a model holds facts, and through which edges it answers.

    Nothing is changed. Tracing restores states of prompts whose subject got noise; the lens reads the answer after
    each layer; a circuit is the edges that carry the answer; probes read it linearly.
    """
    names = () if parts is None and base is not None else _parts("trace" if parts is None else parts)
    if control is not None and base is None:
        raise typer.BadParameter("--control is for the circuits before and after an edit: give --base, too")
    chatting = chat_options(chat, system, template, template_arg)
    check_device_map(device_map, device)
    architecture = read_spec(spec)
    if out is not None:
        check_new(out, overwrite, KeditError)
    records = load_requests(requests, on_error, need_subject=True, form=form, reading=reading)
    unedited = []
    if control is not None:
        unedited = load_requests(control, on_error, need_subject=True, form=form, reading=reading)
    for path in (model,) if base is None else (model, base):
        load_config(path, merge_adapter)
    if base is not None and tokenizer_hash(load_tokenizer(base)) != tokenizer_hash(load_tokenizer(model)):
        raise UnsupportedModelError(f"{base} and {model} have different tokenizers: the one is not the other, edited")
    place = checked_device(device)
    loaded, tokenizer = load_model(model, DTYPES[dtype], place, device_map, merge_adapter)
    formatted = None if chatting is None else chat_format(tokenizer, **chatting)
    located, comparison = report.Located(len(records)), None
    left_out: dict[str, str] = {}
    if base is not None:
        before, _ = load_model(base, DTYPES[dtype], place, device_map, merge_adapter)
        comparison, left_out = report.compare(
            before,
            loaded,
            tokenizer,
            records,
            unedited,
            limit=limit,
            edges=edges,
            scoring=scoring,
            steps=steps,
            metric=metric,
            seed=seed,
            prompt_format=formatted,
            spec=architecture,
            progress=interactive(),
        )
        del before  # from here on one model is needed
    if names:
        located = report.locate(
            loaded,
            tokenizer,
            records,
            names,
            limit=limit,
            window=window,
            samples=samples,
            noise=noise,
            seed=seed,
            answers=answers,
            edges=edges,
            pruning=pruning,
            scoring=scoring,
            steps=steps,
            metric=metric,
            prompt_format=formatted,
            on_error=on_error,
            spec=architecture,
            progress=interactive(),
        )
    located = dataclasses.replace(located, comparison=comparison)
    about: dict[str, Any] = {"model": model, "base": base, "requests": str(requests), "parts": names, **provenance()}
    files = []
    if out is not None:
        files = report.save(located, out, about, overwrite, heat_maps)
        if not any(name.endswith(".png") for name in files):
            notices.print(
                "kedit-fast: no pictures: they need matplotlib (pip install 'kedit-fast[plot]')", markup=False
            )
    if as_json:
        places = {} if out is None else {"out": str(out), "files": files}
        print_json({"about": about, **located.as_dict(), **({"left_out": left_out} if base else {}), **places})
        return
    say_skipped(records.skipped, records.total)
    if comparison is not None:
        print_comparison(comparison, left_out)
    print_located(located)
    if out is not None:
        output.print(f"Saved to {out}: {', '.join(files)}", markup=False)
