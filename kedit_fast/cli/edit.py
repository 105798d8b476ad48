"""`kedit-fast edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kedit_fast.cli.checkpoint import going_on, read_choice, write_choice
from kedit_fast.cli.checks import check_device_map, check_file, check_range, processes
from kedit_fast.cli.console import command, interactive, notices, output, print_json, say_skipped
from kedit_fast.cli.findings import usable_requests
from kedit_fast.cli.hparams import overridden_hparams, requested_sample, warn_of_ignored_settings
from kedit_fast.cli.options import (
    DTYPE_NAMES,
    REQUESTS_HELP,
    TEXT_HELP,
    ArgumentsOption,
    ChatOption,
    DeviceMapOption,
    DeviceOption,
    FormOption,
    HparamsOption,
    JsonOption,
    JudgeLabelOption,
    JudgeOption,
    JudgeReadsOption,
    MergeAdapter,
    MethodOption,
    MetricsOption,
    ModelArgument,
    OnErrorOption,
    ReadingOption,
    SeedOption,
    SeparatorOption,
    SetOption,
    SpecOption,
    SystemOption,
    TemplateOption,
    chat_options,
    choice,
    read_judge,
    read_spec,
)
from kedit_fast.cli.quantized import DequantizeEdited, dequantize_for
from kedit_fast.cli.report import print_report, require_change, warn_of_efficacy
from kedit_fast.cli.trials import chosen_by_trials
from kedit_fast.editing.checkpoint import note_outputs, outputs_of
from kedit_fast.errors import KeditError, MethodError, StatisticsError
from kedit_fast.methods.hparams_files import read_hparams
from kedit_fast.methods.presets import is_guess, make_hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.loading import DTYPES, load_config, load_model
from kedit_fast.reports.evaluation import provenance, save
from kedit_fast.reports.harm import in_words
from kedit_fast.reports.lint import lint_requests, lint_tokens
from kedit_fast.reports.search import span
from kedit_fast.reports.trials import stored_statistics
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.reading import load_requests
from kedit_fast.solver.alphaedit_projector import load_projector
from kedit_fast.statistics.sources import open_texts
from kedit_fast.statistics.store import load_statistics
from kedit_fast.support.files import check_new, check_writable, require_space
from kedit_fast.support.textfiles import read_text
from kedit_fast.workflow import HPARAMS_FILE, MEMORY_FILE, STATE_FILE, run_edits, save_edited


@command
def edit(
    model: ModelArgument,
    requests: Annotated[Path, typer.Option(help=REQUESTS_HELP)],
    out: Annotated[
        Path | None, typer.Option(help="folder for the edited model; --out, --patch or --memory must be given")
    ] = None,
    patch: Annotated[Path | None, typer.Option(help="file for the edits only, see `kedit-fast patch`")] = None,
    memory: Annotated[
        Path | None,
        typer.Option(
            help="of wise, memoir and grace, which change no weight: file for the edits, see `kedit-fast memory`"
        ),
    ] = None,
    method: MethodOption = "memit",
    stats: Annotated[
        Path | None, typer.Option(help="folder that `kedit-fast stats` wrote, or one with memit's npz files")
    ] = None,
    projector: Annotated[
        Path | None, typer.Option(help="AlphaEdit's null_space_project.pt, instead of --stats")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="accept files that do not record their model, as this model's")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="zero-based, 4-8 or 3,5,7")] = None,
    hparams: HparamsOption = None,
    set_: SetOption = None,
    seed: SeedOption = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="requests per batch; all at once by default")] = None,
    values: Annotated[
        str | None,
        typer.Option(
            help="file of optimized values to use and add to (of methods that tune a matrix, of what they capture); or "
            "a template of memit's npz files, with three {}"
        ),
    ] = None,
    warm_up: Annotated[
        Path | None,
        typer.Option(
            help="requests that the running normalizer of ultraedit or stableedit sees first, without being written"
        ),
    ] = None,
    irrelevant: Annotated[
        str | None,
        typer.Option(help=f"texts that have nothing to do with the edits, for wise and memoir: {TEXT_HELP}"),
    ] = None,
    form: FormOption = None,
    reading: ReadingOption = None,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="continue from the state that an earlier edit left in the model's folder")
    ] = False,
    trial: Annotated[
        bool,
        typer.Option(
            help="on a model without a preset, choose layers, residual share and clamp by trials, unless --layers or "
            "--hparams is given"
        ),
    ] = True,
    metrics: MetricsOption = "default",
    judge: JudgeOption = None,
    judge_label: JudgeLabelOption = None,
    judge_reads: JudgeReadsOption = None,
    retention: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="with --batch-size: a retention curve, of at most so many requests of each batch",
        ),
    ] = None,
    eval_out: Annotated[
        Path | None, typer.Option(help="folder for what the edits did: JSON, CSV, a page, a picture, as `eval --out`")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="folder in which finished batches are safe: killed at any moment, the same command goes on there"
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="with --checkpoint: batches between two writes; by default as often as is cheap"),
    ] = None,
    on_error: OnErrorOption = "raise",
    force: Annotated[
        bool, typer.Option("--force", help="write requests that contradict each other, or that linting calls errors")
    ] = False,
    dtype: Annotated[str, choice(DTYPE_NAMES, "dtype the model is loaded and saved in")] = "auto",
    device: DeviceOption = "cpu",
    device_map: DeviceMapOption = None,
    merge_adapter: MergeAdapter = False,
    dequantize: DequantizeEdited = False,
    spec: SpecOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing --out or --eval-out")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write facts into a model and save it."""
    recipe = find_recipe(method)
    chatting = chat_options(chat, system, template, template_arg)
    check_device_map(device_map, device)
    architecture = read_spec(spec)
    _check_outputs(recipe, out, patch, memory, checkpoint)
    if irrelevant is not None and (recipe.tuning is None or not recipe.tuning.uses_irrelevant_texts):
        raise typer.BadParameter(f"--irrelevant is for wise and memoir; {recipe.name} reads no unrelated texts")
    unrelated = None if irrelevant is None else list(open_texts(irrelevant, "text"))
    if checkpoint is None and checkpoint_every is not None:
        raise typer.BadParameter("--checkpoint-every is about --checkpoint DIR: give it, too")
    paths = {"out": out, "patch": patch, "memory": memory, "eval_out": eval_out}
    outputs = [str(path.absolute()) for path in paths.values() if path is not None]
    # A run that was killed while it saved has left some of these; no other run is taken for it, see `claim`.
    again = checkpoint is not None and outputs_of(checkpoint) == set(outputs)
    overwrite = overwrite or again
    if out is not None:
        check_new(out, overwrite, KeditError)
    if patch is not None:
        check_file(patch, "--patch", again or None)
    if memory is not None:
        check_file(memory, "--memory")
    if eval_out is not None:
        check_new(eval_out, overwrite, KeditError)
    if checkpoint is not None:
        check_writable(checkpoint, KeditError)
    classifier = read_judge(metrics, judge, judge_label, judge_reads, device)
    if retention is not None and batch_size is None:
        raise typer.BadParameter("--retention is about several batches: give --batch-size, too")
    records = load_requests(requests, on_error, recipe.needs_subject, form, reading)
    records = usable_requests(
        records,
        lint_requests(records, method=recipe.name, batch_size=batch_size).findings,
        str(requests),
        on_error,
        force,
    )
    shown = None
    if warm_up is not None:
        if not recipe.gathers_gradients:
            raise MethodError(f"--warm-up: {recipe.name} has no running normalizer; ultraedit and stableedit have")
        if go_on:
            raise MethodError("--warm-up with --continue: the state of the earlier edit has its statistics already")
        shown = load_requests(warm_up, on_error, recipe.needs_subject, form, reading)
    overrides = overridden_hparams(hparams, set_, layers, method)
    warn_of_ignored_settings(hparams, dtype, None if batch_size else len(records))
    config = load_config(model, merge_adapter)
    chosen, origin = make_hparams(method, config, overrides)
    check_range(chosen.layers, config)
    guessed = is_guess(origin) and hparams is None and not {"layers", "inner_params"} & set(overrides)
    earlier = Path(model) / HPARAMS_FILE
    toml = ""
    if guessed and go_on and earlier.exists():
        toml = read_text(earlier, KeditError)
        overrides = {**read_hparams(earlier, method), **overrides}
        chosen, _ = make_hparams(method, config, overrides)
        notices.print(f"kedit-fast: hyper-parameters of the earlier edit: {earlier}", markup=False)
        guessed = False
    stored_choice = None if checkpoint is None else read_choice(checkpoint)
    if guessed and stored_choice is not None:
        overrides = {**overrides, **stored_choice["hparams"]}
        toml, guessed = stored_choice["toml"], False
        chosen, _ = make_hparams(method, config, overrides)
    else:
        stored_choice = None
    # Trials search windows of layers and closed forms' numbers.
    tries = guessed and trial and projector is None and not go_on and recipe.tuning is None
    if guessed and not tries:
        notices.print(f"kedit-fast: no preset for this model: {origin}; layers {span(chosen.layers)}", markup=False)
    if chosen.uses_statistics and stats is None and projector is None:
        layer_option = "auto" if tries else span(chosen.layers)
        raise StatisticsError(
            f"{recipe.name} needs statistics of this model for "
            f"{'the layers that trials choose from' if tries else f'layers {layer_option}'}; collect them once, then "
            f"pass --stats:\n  kedit-fast stats {model} --text FILE --layers {layer_option} --out DIR"
            + (" --output-metric" if chosen.weighs_outputs or chosen.constrains_curvature else "")
        )
    state = Path(model) / STATE_FILE
    if go_on and not state.exists():
        raise MethodError(f"--continue: {model} has no {STATE_FILE} of an earlier edit by a method that keeps one")
    if not go_on and state.exists() and recipe.keeps_state:
        notices.print(
            f"kedit-fast: {model} was edited before; without --continue {recipe.name} knows nothing of that",
            markup=False,
        )
    if (Path(model) / MEMORY_FILE).exists():
        notices.print(
            f"kedit-fast: {model} has edits beside its weights ({MEMORY_FILE}): this run knows nothing of them",
            markup=False,
        )
    with processes(device) as (rank, place), going_on(checkpoint):
        loaded, tokenizer = load_model(model, DTYPES[dtype], place, device_map, merge_adapter)
        prompt_format = None if chatting is None else chat_format(tokenizer, **chatting)
        records = usable_requests(
            records,
            lint_tokens(
                records, tokenizer, method=recipe.name, prompt_format=prompt_format, target_separator=target_separator
            ),
            str(requests),
            on_error,
            force,
            say=rank == 0,
        )
        plain = dequantize_for(loaded, chosen, any_layer=tries, spec=architecture) if dequantize else None
        statistics, tried = None, None
        if tries:
            sources = None
            if chosen.uses_statistics and stats:
                sources = stored_statistics(
                    stats, loaded, tokenizer, trust=trust, spec=architecture, **requested_sample(hparams)
                )
            tried = chosen_by_trials(
                loaded,
                tokenizer,
                records,
                recipe.name,
                overrides,
                sources,
                stats,
                seed=seed,
                prompt_format=prompt_format,
                target_separator=target_separator,
                on_error=on_error,
                spec=architecture,
            )
            overrides, toml = {**overrides, **tried.choice.hparams}, tried.choice.toml
            chosen, _ = make_hparams(method, config, overrides)
            stored_choice = {"hparams": tried.choice.hparams, "toml": toml, "chosen": tried.as_dict()}
            if checkpoint is not None and rank == 0:
                write_choice(checkpoint, stored_choice)
            if plain is not None:
                plain.put_back(except_layers=chosen.layers)
        if chosen.uses_statistics and stats:
            statistics = load_statistics(
                stats, loaded, tokenizer, chosen.layers, architecture, trust, **requested_sample(hparams)
            )
        spaces = None if projector is None else load_projector(projector, chosen.layers, trust=trust)
        if out is not None and rank == 0:
            require_space({out: loaded.get_memory_footprint()}, KeditError)
        report = run_edits(
            loaded,
            tokenizer,
            records,
            recipe.name,
            statistics=statistics,
            null_spaces=spaces,
            hparams=overrides,
            batch_size=batch_size,
            seed=seed,
            values=values,
            state=state if go_on else None,
            warm_up=shown,
            prompt_format=prompt_format,
            target_separator=target_separator,
            on_error=on_error,
            metrics=metrics,
            judge=classifier,
            retention=retention,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=interactive(),
            spec=architecture,
            irrelevant=unrelated,
        )
        require_change(report)
        if rank:
            return  # the first process saves and speaks
        if checkpoint is not None:
            note_outputs(checkpoint, outputs)
        if out is not None:
            save_edited(loaded, tokenizer, out, overwrite, report.editor, toml)
        if patch is not None and report.editor is not None:
            report.editor.patch().save(patch)
        if memory is not None and report.memory is not None:
            report.memory.save(memory)
        if eval_out is not None and report.evaluation is not None:
            about = {
                "title": f"{recipe.name.upper()}: {report.edits:,} edits of {Path(model).name}",
                "model": model,
                "patches": [] if patch is None else [str(patch)],
                "requests": f"{requests}: {report.edits:,} written",
                "judge": None if classifier is None else classifier.about,
                "update": None if report.harm is None else in_words(report.harm),
                "prompts": None if chatting is None else "in the tokenizer's chat template",
                **provenance(),
            }
            save(report.evaluation, tokenizer, eval_out, about, overwrite, report.retention)
    written = {name: path for name, path in paths.items() if path is not None}
    say_skipped(report.skipped, records.total)
    warn_of_efficacy(report, model)
    if as_json:
        places = {name: str(path) for name, path in written.items()}
        chosen_entry = {} if stored_choice is None else {"chosen": stored_choice["chosen"]}
        layers_edited = chosen.layers if report.editor is None else report.editor.hparams.layers
        print_json({**report.as_dict(), "layers": list(layers_edited), **chosen_entry, **places})
        return
    print_report(report, f"{recipe.name.upper()}: {report.edits} edits of {model}")
    output.print(f"Saved to {', '.join(map(str, written.values()))}", markup=False)


def _check_outputs(
    recipe: Recipe, out: Path | None, patch: Path | None, memory: Path | None, checkpoint: Path | None
) -> None:
    """Raise MethodError where nothing is asked for, or what is asked for does not fit the method."""
    if recipe.makes_memory and patch is not None:
        raise MethodError(
            f"--patch: {recipe.name} changes no weight, its edits stand beside them: --memory FILE writes them"
        )
    if not recipe.makes_memory and memory is not None:
        raise MethodError(f"--memory: {recipe.name} writes into the weights: --patch FILE writes its edits")
    if recipe.makes_memory and checkpoint is not None:
        raise MethodError(
            f"--checkpoint records what is written into weights, and {recipe.name} keeps its edits beside them: run it "
            "without a checkpoint"
        )
    if out is None and patch is None and memory is None:
        file = "--memory" if recipe.makes_memory else "--patch"
        raise MethodError(f"give --out for the edited model, {file} for its edits as a file, or both")
