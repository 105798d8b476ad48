"""`kedit-fast eval`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from kedit_fast.cli.checks import check_device_map, checked_device
from kedit_fast.cli.console import command, interactive, notices, output, print_json, say_skipped
from kedit_fast.cli.options import (
    REQUESTS_HELP,
    TEXT_HELP,
    ArgumentsOption,
    ChatOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    FormOption,
    JsonOption,
    JudgeLabelOption,
    JudgeOption,
    JudgeReadsOption,
    MergeAdapter,
    MetricsOption,
    ModelArgument,
    OnErrorOption,
    OverwriteOption,
    ReadingOption,
    SeparatorOption,
    SnippetsOption,
    SpecOption,
    SystemOption,
    TemplateOption,
    chat_options,
    check_form,
    choice,
    read_judge,
    read_spec,
)
from kedit_fast.cli.report import print_harm, print_metrics
from kedit_fast.errors import KeditError, RequestError, UnsupportedModelError
from kedit_fast.evaluation.contexts import CONTEXTS
from kedit_fast.evaluation.evaluator import Average, Evaluator, evaluate
from kedit_fast.evaluation.registry import BESIDE
from kedit_fast.memories.attach import attach
from kedit_fast.memories.memory import SideMemory
from kedit_fast.models.fingerprint import tokenizer_hash
from kedit_fast.models.loading import DTYPES, load_config, load_model, load_tokenizer
from kedit_fast.patches.patch import Patch
from kedit_fast.reports import evaluation as report
from kedit_fast.reports.harm import in_words, patch_harm
from kedit_fast.requests.chat import chat_format, with_suffix
from kedit_fast.requests.datasets.choices import load_choices
from kedit_fast.requests.problems import first_problems, skipped_records
from kedit_fast.requests.reading import load_requests
from kedit_fast.requests.sampling import cases_of, first_cases, part_of, sampled
from kedit_fast.statistics.sources import open_texts
from kedit_fast.support.files import check_new
from kedit_fast.workflow import MEMORY_FILE


@command
def evaluation(
    model: ModelArgument,
    requests: Annotated[Path | None, typer.Option(help=REQUESTS_HELP)] = None,
    base: Annotated[
        str | None, typer.Option(help="the model before it was edited, folder or hub name: measured as `before`")
    ] = None,
    patch: Annotated[
        list[Path] | None,
        typer.Option(
            help="edits of MODEL, measured without them and with them; repeatable, in the order of their making"
        ),
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(help="edits beside the weights of MODEL (`edit --memory`), measured without them and with them"),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="with --patch: statistics of MODEL with output metrics, for a predicted KL")
    ] = None,
    metrics: MetricsOption = "default",
    context: Annotated[
        str | None,
        choice(CONTEXTS, "measure the unedited model also with each new fact in front of its prompts"),
    ] = None,
    texts: Annotated[str | None, typer.Option(help=f"for metrics over ordinary text: {TEXT_HELP}")] = None,
    field: Annotated[str, typer.Option(help="field of a record, or column, that holds the text")] = "text",
    choices: Annotated[
        Path | None, typer.Option(help="for metrics over multiple choice: records in MMLU's or TRAIT's form")
    ] = None,
    judge: JudgeOption = None,
    judge_label: JudgeLabelOption = None,
    judge_reads: JudgeReadsOption = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="use the first so many requests, texts and choices; a case of several counts once"),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="draw so many requests; a case of several counts once")
    ] = None,
    seed: Annotated[int, typer.Option(help="of --sample, of drawn texts, and of new answers that are drawn")] = 0,
    average: Annotated[
        str | None,
        choice(
            get_args(Average), "mean of each record first, or over all prompts alike; by default as each metric says"
        ),
    ] = None,
    form: FormOption = None,
    reading: ReadingOption = None,
    snippets: SnippetsOption = None,
    target_separator: SeparatorOption = "auto",
    suffix: Annotated[
        str, typer.Option(help="text that stands after every prompt, such as DINM's suffix_system_prompt")
    ] = "",
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
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for the results: JSON, CSV, a page, pictures; a run that was killed goes on from OUT.part"
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what edits did: every metric before and after."""
    check_form(requests, form, reading)
    chatting = chat_options(chat, system, template, template_arg)
    check_device_map(device_map, device)
    architecture = read_spec(spec)
    if sum((base is not None, bool(patch), memory is not None)) > 1:
        raise typer.BadParameter(
            "--base is the model before its edits, --patch and --memory are edits of MODEL: give one of them"
        )
    if stats is not None and not patch:
        raise typer.BadParameter("--stats is for what a --patch is predicted to do: give one")
    if requests is None and texts is None and choices is None:
        raise typer.BadParameter("give --requests, --texts or --choices to measure")
    classifier = read_judge(metrics, judge, judge_label, judge_reads, checked_device(device))
    if out is not None:
        check_new(out, overwrite, KeditError)
    records = None
    if requests is not None:
        records = load_requests(requests, on_error, form=form, reading=reading, seed=seed, snippets=snippets)
    items = [] if choices is None else load_choices(choices, on_error)
    documents = [] if texts is None else open_texts(texts, field)
    if limit is not None:
        records = None if records is None else first_cases(records, limit)
        items, documents = items[:limit], [documents[i] for i in range(min(limit, len(documents)))]
    if records is not None and sample is not None and sample < len(cases_of(records)):
        drawn = {id(request) for request in sampled(records, sample, seed)}
        records = part_of(records, [index for index, request in enumerate(records) if id(request) in drawn])
    patches = [Patch.load(path) for path in patch or ()]
    beside = None if memory is None else SideMemory.load(memory)
    metrics = BESIDE if beside is not None and metrics == "default" else metrics
    if memory is None and (Path(model) / MEMORY_FILE).exists():
        notices.print(
            f"kedit-fast: {model} is measured without its edits beside the weights: --memory "
            f"{Path(model) / MEMORY_FILE} measures them",
            markup=False,
        )
    harms = [patch_harm(loaded, stats) for loaded in patches]
    for path in (model, *filter(None, [base])):
        load_config(path, merge_adapter)
    place = checked_device(device)

    def load(path: str) -> tuple[Any, Any]:
        return load_model(path, DTYPES[dtype], place, device_map, merge_adapter)

    if base is not None and tokenizer_hash(load_tokenizer(base)) != tokenizer_hash(load_tokenizer(model)):
        raise UnsupportedModelError(f"{base} and {model} have different tokenizers: the one is not the other, edited")
    first, tokenizer = load(model if base is None else base)
    part = None if out is None else out.with_name(f"{out.name}.part")
    options: dict[str, Any] = {
        "context": context,
        "texts": documents,
        "choices": items,
        "judge": classifier,
        "prompt_format": with_suffix(None if chatting is None else chat_format(tokenizer, **chatting), suffix),
        "target_separator": target_separator,
        "spec": architecture,
        "average": average,
        "seed": seed,
        "folder": part,
        "on_error": on_error,
        "progress": interactive(),
    }
    try:
        if beside is not None:
            evaluator = Evaluator(first, tokenizer, records or [], metrics, **options)
            evaluator.measure("pre")
            if context is not None:
                evaluator.measure("context")
            with attach(first, beside, tokenizer, spec=architecture):
                evaluator.measure("final")
            measured = evaluator.result()
        elif base is None:
            measured = evaluate(first, tokenizer, records or [], metrics, patches=patches, **options)
        else:
            evaluator = Evaluator(first, tokenizer, records or [], metrics, **options)
            evaluator.measure("pre")
            if context is not None:
                evaluator.measure("context")
            evaluator.model = first = torch.nn.Module()  # lets go of it: one model in memory at a time
            evaluator.model, _ = load(model)
            evaluator.measure("final")
            measured = evaluator.result()
    except KeyboardInterrupt:
        if part is not None and part.exists():
            notices.print(f"kedit-fast: the answers so far are in {part}: the same command goes on", markup=False)
        raise
    skipped = {} if records is None else {**records.skipped, **_at_places(measured.skipped, records.places)}
    if measured.skipped and records is not None and len(measured.skipped) == len(records):
        raise RequestError("\n".join(["no request can be measured:", *first_problems(skipped)]))
    about = {
        "title": f"Evaluation of {Path(model).name}",
        "model": model,
        "before": base,
        "patches": [
            f"{path}: {p.method}, {len(p.requests):,} edits, {in_words(harm)}"
            for path, p, harm in zip(patch or (), patches, harms, strict=True)
        ],
        "memory": None if beside is None else f"{memory}: {beside.method}, {len(beside.requests):,} edits",
        "no_predicted_KL": next((harm.missing for harm in harms if harm.missing), None),
        "requests": None if records is None else f"{requests}: {len(records):,}",
        "texts": None if texts is None else f"{texts}: {len(documents):,}",
        "choices": None if choices is None else f"{choices}: {len(items):,}",
        "judge": None if classifier is None else classifier.about,
        "in_context": context,
        "prompts": None if chatting is None else "in the tokenizer's chat template",
        "suffix": suffix or None,
        **report.provenance(),
    }
    files = []
    if out is not None:
        files = report.save(measured, tokenizer, out, about, overwrite)
        shutil.rmtree(str(part), ignore_errors=True)
        if report.PICTURE not in files:
            notices.print("kedit-fast: no picture: it needs matplotlib (pip install 'kedit-fast[plot]')", markup=False)
    if as_json:
        places = {} if out is None else {"out": str(out), "files": files}
        predicted = {"harm": [harm.as_dict() for harm in harms]} if harms else {}
        print_json({"about": about, **measured.as_dict(), **predicted, "skipped": skipped_records(skipped), **places})
        return
    if records is not None:
        say_skipped(skipped, records.total)
    print_metrics(measured, about["title"])
    for path, harm in zip(patch or (), harms, strict=True):
        print_harm(harm, str(path))
    if out is not None:
        output.print(f"Saved to {out}: {', '.join(files)}", markup=False)


def _at_places(reasons: Mapping[int, str], places: Sequence[int]) -> dict[int, str]:
    """Reasons by a record's place in its file, from those by a request's index."""
    return {places[index]: f"record {places[index] + 1}: {reason}" for index, reason in reasons.items()}
