"""The command line: `kedit-fast demo | stats | edit | patch | plan | suggest | methods | backends`.

Exit status: 0 done, 1 an error (a few lines on stderr, nothing on stdout), 2 wrong options, 130 interrupted.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import kedit_fast
from kedit_fast.cli import patch, stats
from kedit_fast.cli.console import (
    ON_ERROR_HELP,
    ArgumentsOption,
    ChatOption,
    Dtype,
    MergeAdapter,
    OnError,
    SeparatorOption,
    SystemOption,
    TemplateOption,
    assignments,
    chat_options,
    check_file,
    check_range,
    checked_device,
    command,
    interactive,
    notices,
    output,
    parsed_layers,
    print_json,
    processes,
    say_skipped,
)
from kedit_fast.errors import KeditError, MethodError, StatisticsError
from kedit_fast.support.files import check_new, write_text

app = typer.Typer(
    help="Closed-form knowledge editing of language models.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(stats.app, name="stats")
app.add_typer(patch.app, name="patch")
METHOD_HELP = "a method's name, see `kedit-fast methods`"
REQUESTS_HELP = "edit requests: .json, .jsonl, .csv or .tsv, also .gz; - for stdin"


@app.command()
@command
def demo(
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "memit",
    edits: Annotated[int | None, typer.Option(min=1, help="requests to write, of 600; default 100, 5 for rome")] = None,
    seed: Annotated[int, typer.Option(help="seed of the context prefixes")] = 0,
    out: Annotated[Path | None, typer.Option(help="save the edited model here")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Change facts inside the bundled demo model and show what changed. Saves nothing without --out."""
    from kedit_fast import demo as bundled
    from kedit_fast.methods.hparams import make_hparams
    from kedit_fast.methods.registry import find_recipe
    from kedit_fast.models.loading import save_model
    from kedit_fast.statistics.collect import collect_statistics
    from kedit_fast.workflow import complete, run_edits

    recipe = find_recipe(method)
    edits = edits or (100 if recipe.is_batched else 5)
    if out is not None:
        check_new(out, overwrite, KeditError)
    requests = bundled.requests()
    if edits > len(requests):
        raise MethodError(f"--edits {edits}: the demo has {len(requests)} requests")
    requests = requests[:edits]
    model, tokenizer = bundled.load()
    hparams, _ = make_hparams(method, model.config)
    begin = time.perf_counter()
    statistics = None
    if hparams.uses_statistics:
        statistics = collect_statistics(model, tokenizer, bundled.corpus(), hparams.layers, progress=interactive())
    spent = time.perf_counter() - begin
    shown = requests[:3]
    before = [complete(model, tokenizer, request.text) for request in shown]
    report = run_edits(
        model, tokenizer, requests, recipe.name, statistics=statistics, statistics_seconds=spent, seed=seed,
        progress=interactive(),
    )  # fmt: skip
    after = [complete(model, tokenizer, request.text) for request in shown]
    if out is not None:
        save_model(model, tokenizer, out, overwrite)
    if as_json:
        print_json(report.as_dict())
        return
    _print_report(report, f"{recipe.name.upper()}: {report.edits} edits of the demo model")
    table = Table(title="Completions", title_justify="left")
    for column in ("prompt", "before", "after", "asked for"):
        table.add_column(column)
    for request, old, new in zip(shown, before, after, strict=True):
        table.add_row(*map(escape, (request.text, old, new, request.target_new)))
    output.print(table)
    if out is not None:
        output.print(f"Saved to {out}", markup=False)


@app.command()
@command
def edit(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    requests: Annotated[Path, typer.Option(help=REQUESTS_HELP)],
    out: Annotated[Path | None, typer.Option(help="folder for the edited model")] = None,
    patch: Annotated[Path | None, typer.Option(help="file for the edits alone, see `kedit-fast patch`")] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "memit",
    stats: Annotated[
        Path | None, typer.Option(help="folder that `kedit-fast stats` wrote, or one with memit's npz files")
    ] = None,
    projector: Annotated[
        Path | None, typer.Option(help="AlphaEdit's null_space_project.pt, instead of --stats")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="take files that do not say what model they are of for this model's")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="zero-based, 4-8 or 3,5,7")] = None,
    hparams: Annotated[Path | None, typer.Option(help="our .toml, EasyEdit's .yaml or memit's .json")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="hyper-parameter, key=value; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="seed of the context prefixes")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="requests a batch; all at once by default")] = None,
    values: Annotated[
        str | None, typer.Option(help="file of optimised values to use and add to; or memit's npz, with three {}")
    ] = None,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="go on from the state an earlier edit left in the model's folder")
    ] = False,
    on_error: Annotated[OnError, typer.Option(help=ON_ERROR_HELP)] = OnError.stop,
    dtype: Annotated[Dtype, typer.Option(help="dtype the model is loaded and saved in")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    merge_adapter: MergeAdapter = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Write facts into a model and save it."""
    from kedit_fast.methods.hparams import make_hparams
    from kedit_fast.methods.registry import find_recipe
    from kedit_fast.models.loading import DTYPES, load_config, load_model
    from kedit_fast.requests.chat import chat_format
    from kedit_fast.requests.reading import load_requests
    from kedit_fast.solver.alphaedit_projector import load_projector
    from kedit_fast.statistics.store import load_statistics
    from kedit_fast.workflow import STATE_FILE, run_edits, save_edited

    recipe = find_recipe(method)
    chatting = chat_options(chat, system, template, template_arg)
    if out is None and patch is None:
        raise MethodError("give --out for the edited model, --patch for its edits as a file, or both")
    if out is not None:
        check_new(out, overwrite, KeditError)
    if patch is not None:
        check_file(patch, "--patch")
    records = load_requests(requests, on_error.value, recipe.needs_subject)
    overrides = _overrides(hparams, set_, layers, method)
    _name_unfollowed(hparams, dtype, None if batch_size else len(records))
    config = load_config(model, merge_adapter)
    chosen, origin = make_hparams(method, config, overrides)
    check_range(chosen.layers, config)
    if origin.startswith("guess") and hparams is None and layers is None:
        notices.print(
            f"kedit-fast: no preset for this model: {origin}; layers {','.join(map(str, chosen.layers))}", markup=False
        )
    if chosen.uses_statistics and stats is None and projector is None:
        span = ",".join(map(str, chosen.layers))
        raise StatisticsError(
            f"{recipe.name} needs statistics of this model for layers {span}; collect them once, then pass --stats:\n"
            f"  kedit-fast stats {model} --text FILE --layers {span} --out DIR"
        )
    state = Path(model) / STATE_FILE
    if go_on and not state.exists():
        raise MethodError(f"--continue: {model} has no {STATE_FILE} of an earlier edit by a method that keeps one")
    if not go_on and state.exists() and recipe.keeps_state:
        notices.print(f"kedit-fast: {model} was edited before; without --continue {recipe.name} knows nothing of that",
                      markup=False)  # fmt: skip
    with processes(device) as (rank, where):
        loaded, tokenizer = load_model(model, DTYPES[dtype.value], where, merge_adapter=merge_adapter)
        prompt_format = None if chatting is None else chat_format(tokenizer, **chatting)
        statistics = None
        if chosen.uses_statistics and stats:
            statistics = load_statistics(stats, loaded, tokenizer, chosen.layers, trust=trust, **_sample(hparams))
        spaces = None if projector is None else load_projector(projector, chosen.layers, chosen.L2, trust)
        report = run_edits(
            loaded, tokenizer, records, recipe.name, statistics=statistics, null_spaces=spaces, hparams=overrides,
            batch_size=batch_size, seed=seed, values=values, state=state if go_on else None,
            prompt_format=prompt_format, target_separator=target_separator, on_error=on_error.value,
            progress=interactive(),
        )  # fmt: skip
        if rank:
            return  # the first process saves and speaks
        if out is not None:
            save_edited(loaded, tokenizer, out, overwrite, report.editor)
        if patch is not None:
            report.editor.patch().save(patch)
    say_skipped(report.skipped, records.total)
    if as_json:
        places = {name: str(path) for name, path in (("out", out), ("patch", patch)) if path is not None}
        print_json({**report.as_dict(), "layers": list(chosen.layers), **places})
        return
    _print_report(report, f"{recipe.name.upper()}: {report.edits} edits of {model}")
    output.print(f"Saved to {', '.join(str(path) for path in (out, patch) if path is not None)}", markup=False)


@app.command()
@command
def plan(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    edits: Annotated[int, typer.Option(min=1, help="how many edits, in one batch")],
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "memit",
    requests: Annotated[
        Path | None, typer.Option(help=f"for the trial, the demo's by default; {REQUESTS_HELP}")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="zero-based, 4-8 or 3,5,7")] = None,
    hparams: Annotated[Path | None, typer.Option(help="our .toml, EasyEdit's .yaml or memit's .json")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="hyper-parameter, key=value; repeatable")] = None,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype the model is loaded in")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    merge_adapter: MergeAdapter = False,
    trial: Annotated[bool, typer.Option(help="load the model and try; without, bytes from its configuration")] = True,
    on_error: Annotated[OnError, typer.Option(help=ON_ERROR_HELP)] = OnError.stop,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Estimate the memory, the batch and the time of a run of edits before it is started."""
    from kedit_fast import demo as bundled
    from kedit_fast.methods.hparams import make_hparams
    from kedit_fast.methods.registry import find_recipe
    from kedit_fast.models.loading import DTYPES, empty_model, load_config, load_model
    from kedit_fast.reports.plan import plan as estimate
    from kedit_fast.requests.chat import chat_format
    from kedit_fast.requests.reading import as_requests, load_requests

    chatting = chat_options(chat, system, template, template_arg)
    overrides = _overrides(hparams, set_, layers, method)
    _name_unfollowed(hparams, dtype)
    config = load_config(model, merge_adapter)
    chosen, _ = make_hparams(method, config, overrides)
    check_range(chosen.layers, config)
    records = as_requests(bundled.requests() if trial else [])
    if requests is not None:
        records = load_requests(requests, on_error.value, find_recipe(method).needs_subject)
    if trial:
        loaded, tokenizer = load_model(model, DTYPES[dtype.value], checked_device(device), merge_adapter=merge_adapter)
    else:
        loaded, tokenizer = empty_model(config, DTYPES[dtype.value]), None
    prompt_format = None if chatting is None or tokenizer is None else chat_format(tokenizer, **chatting)
    found = estimate(
        loaded, tokenizer, edits, method, requests=records, hparams=overrides, prompt_format=prompt_format,
        target_separator=target_separator, on_error=on_error.value,
    )  # fmt: skip
    say_skipped(found.skipped, records.total)
    if as_json:
        print_json(found.as_dict())
        return
    title = f"{found.method.upper()}: {edits:,} edits of {model}, layers {','.join(map(str, found.layers))}"
    table = Table("memory", "", title=escape(title), title_justify="left")
    table.columns[1].justify = "right"
    for name, size in found.bytes.items():
        table.add_row(name, _size(size))
    table.add_section()
    table.add_row("in all", _size(sum(found.bytes.values())))
    if found.free_bytes is not None:
        table.add_row(f"free on {found.device}, with the weights loaded", _size(found.free_bytes))
    output.print(table)
    output.print(f"Numbers: {found.hparams_from}", markup=False)
    if found.seconds is None:
        output.print("No trial: the batch and the time are unknown", markup=False)
        return
    output.print(f"Values of {found.values_batch} requests at a time", markup=False)
    spent = ", ".join(f"{phase} {seconds:,.1f}" for phase, seconds in found.seconds.items())
    output.print(f"Seconds, at most: {spent}", markup=False)


@app.command()
@command
def suggest(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    requests: Annotated[Path, typer.Option(help=f"better with paraphrases; {REQUESTS_HELP}")],
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "memit",
    text: Annotated[
        str | None, typer.Option(help="for statistics and for the drift of text: " + stats.TEXT_HELP)
    ] = None,
    field: Annotated[str, typer.Option(help="field of a record, or column, that holds the text")] = "text",
    tokens: Annotated[int, typer.Option(min=100, help="of the text, for statistics")] = 100_000,
    stats: Annotated[
        Path | None, typer.Option(help="folder that `kedit-fast stats` wrote, for all layers tried")
    ] = None,
    edits: Annotated[int, typer.Option(min=1, help="requests to try on, the first ones")] = 16,
    layers: Annotated[str | None, typer.Option(help="last edited layers to try; eight up to 60 % of depth")] = None,
    hparams: Annotated[Path | None, typer.Option(help="our .toml, EasyEdit's .yaml or memit's .json")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="hyper-parameter, key=value; repeatable")] = None,
    target_separator: SeparatorOption = "auto",
    chat: ChatOption = False,
    system: SystemOption = None,
    template: TemplateOption = None,
    template_arg: ArgumentsOption = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype the model is loaded in")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    merge_adapter: MergeAdapter = False,
    out: Annotated[Path | None, typer.Option(help="write the configuration to this .toml")] = None,
    on_error: Annotated[OnError, typer.Option(help=ON_ERROR_HELP)] = OnError.stop,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Try layers and lambda on a few requests, and print a configuration for --hparams."""
    from kedit_fast.methods.registry import find_recipe
    from kedit_fast.models.loading import DTYPES, load_config, load_model
    from kedit_fast.reports.suggest import suggest as sweep
    from kedit_fast.requests.chat import chat_format
    from kedit_fast.requests.reading import load_requests
    from kedit_fast.statistics.sources import open_texts
    from kedit_fast.statistics.store import load_statistics

    chatting = chat_options(chat, system, template, template_arg)
    if out is not None:
        check_file(out)
    records = load_requests(requests, on_error.value, find_recipe(method).needs_subject).first(edits)
    overrides = _overrides(hparams, set_, None, method)
    _name_unfollowed(hparams, dtype)
    tried = None if layers is None else parsed_layers(layers)
    documents = [] if text is None else open_texts(text, field)
    check_range(tried or (), load_config(model, merge_adapter))
    loaded, tokenizer = load_model(model, DTYPES[dtype.value], checked_device(device), merge_adapter=merge_adapter)
    statistics = None if stats is None else load_statistics(stats, loaded, tokenizer, **_sample(hparams))
    found = sweep(
        loaded, tokenizer, records, method, statistics=statistics, texts=documents, max_tokens=tokens,
        last_layers=tried, hparams=overrides, target_separator=target_separator,
        prompt_format=None if chatting is None else chat_format(tokenizer, **chatting), on_error=on_error.value,
        progress=interactive(),
    )  # fmt: skip
    say_skipped(found.skipped, records.total)
    if out is not None:
        write_text(out, found.toml(), KeditError)
    if as_json:
        print_json(found.as_dict())
        return
    table = Table(title=escape(f"{found.method.upper()}: {found.edits} edits of {model}"), title_justify="left")
    for column in ("layers", found.swept, "efficacy", "paraphrase", "neighborhood", "drift", "norm", "score"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for trial in found.trials:
        mark = " *" if trial is found.best else ""
        shown = ["" if v is None else f"{v:.3f}" for v in (trial.efficacy, trial.paraphrase, trial.neighborhood,
                                                           trial.drift, trial.norm)]  # fmt: skip
        value = "" if trial.value is None else f"{trial.value:g}"
        table.add_row(",".join(map(str, trial.layers)), value, *shown, f"{trial.score:.3f}{mark}")
    output.print(table)
    output.print(found.toml(), markup=False, end="")
    if out is not None:
        output.print(f"Saved to {out}: kedit-fast edit --hparams {out}", markup=False)


@app.command()
@command
def methods(as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """List the methods, where each is from, and what it keeps between batches."""
    from kedit_fast.methods.registry import RECIPES

    if as_json:
        print_json({name: recipe.as_dict() for name, recipe in RECIPES.items()})
        return
    table = Table.grid(padding=(0, 2))
    for recipe in RECIPES.values():
        how = "One request at a time, one layer" if not recipe.is_batched else "A batch at once"
        how = "A batch at once, several modules" if not recipe.optimizes_values else how
        text = f"{recipe.title}\n{recipe.source}\n{how}; keeps {recipe.keeps}\n"
        table.add_row(recipe.name, escape(text))
    output.print(table)


@app.command()
@command
def backends(as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """Show which backends can run here, and why the others cannot."""
    rows = kedit_fast.backends()
    if as_json:
        print_json({row.name: {"available": row.available, "detail": row.detail} for row in rows})
        return
    for row in rows:
        output.print(str(row), markup=False)


def print_environment() -> None:
    """Backends, processor features, versions and build information: what a bug report needs."""
    import importlib.metadata

    from kedit_fast.kernels.native import cpu as native_cpu
    from kedit_fast.kernels.native.loader import build_reason

    print(f"kedit_fast {kedit_fast.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\nBackends")
    for row in kedit_fast.backends():
        print(f"  {row}")
    print("\nNative modules")
    for module in ("_cpu", "_cuda"):
        print(f"  {module}: {build_reason(module) or 'built'}")
    if not native_cpu.probe().reason:
        cpu = native_cpu.module()
        print(f"  compiler {cpu.compiler()}, threads of {cpu.thread_source()}")
        print(f"  processor features: {' '.join(cpu.cpu_features()) or 'none of those used'}")
        for name, reason in cpu.isas().items():
            print(f"  isa {name}: {reason or ('in use' if name == cpu.isa() else 'usable')}")
    print("\nVersions")
    for package in ("torch", "triton", "numpy", "transformers", "safetensors", "pybind11"):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    print("\nEnvironment")
    for name in sorted(n for n in os.environ if n.startswith(("KEDIT_FAST_", "OMP_NUM_THREADS", "TRITON_INTERPRET"))):
        print(f"  {name}={os.environ[name]}")


def _print_report(report: Any, title: str) -> None:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("share of prompts")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = report.before.as_dict(), report.after.as_dict()
    for name, value in after.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{before[name]:.3f}", f"{value:.3f}")
    output.print(table)
    spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    output.print(f"Seconds: {spent}", markup=False)
    if joined := sum(request["target_separator"] != " " for request in report.requests):
        output.print(f"Targets: {joined} of {report.edits} follow their prompts without a space", markup=False)
    if report.null_spaces:
        dimensions = ", ".join(f"layer {layer} {count}" for layer, count in sorted(report.null_spaces.items()))
        output.print(f"Null space dimensions: {dimensions}", markup=False)


def _overrides(hparams: Path | None, set_: list[str] | None, layers: str | None, method: str) -> dict[str, Any]:
    """Hyper-parameters that the command line gives: a file, then --set, then --layers."""
    from kedit_fast.methods.hparams import read_hparams, unused, worth_a_warning
    from kedit_fast.methods.registry import find_recipe

    found = read_hparams(hparams, method, warn_of_loading=False) if hparams is not None else {}
    recipe, by_hand = find_recipe(method), assignments(set_)
    for name in set(unused(recipe, by_hand)) - set(worth_a_warning(recipe, by_hand)):  # the editor says the others
        notices.print(f"kedit-fast: {recipe.name} does not use {name}", markup=False)
    found.update(by_hand)
    if layers is not None:
        found["layers"] = parsed_layers(layers)
    return found


def _sample(hparams: Path | None) -> dict[str, Any]:
    """Which of several npz files of a layer a framework's file asks for."""
    from kedit_fast.integrations.framework_statistics import requested_sample
    from kedit_fast.methods.hparams import read_raw

    samples, precision = requested_sample(read_raw(hparams)) if hparams is not None else (None, None)
    return {"samples": samples, "precision": precision}


def _name_unfollowed(hparams: Path | None, dtype: Dtype, one_batch: int | None = None) -> None:
    """Say which settings of a framework's file, about loading and batches, are options of the command line here.

    Args:
        hparams: the file.
        dtype: what --dtype says.
        one_batch: requests that are about to be written as one batch.
    """
    from kedit_fast.methods.hparams import read_raw

    raw = read_raw(hparams) if hparams is not None else {}
    said = [f"{name}: true, and the model keeps the dtype of its files (--dtype float16 follows it)"
            for name in ("half", "fp16") if _is_true(raw.get(name)) and dtype is Dtype.auto]  # fmt: skip
    if _is_true(raw.get("model_parallel")):
        said.append("model_parallel: true, and the model is loaded on one device")
    size = str(raw.get("batch_size", ""))
    if one_batch is not None and size.isdigit() and 1 < int(size) < one_batch:
        said.append(f"batch_size: {size}, and all {one_batch} requests are one batch (--batch-size {size} follows it)")
    for what in said:
        notices.print(f"kedit-fast: {hparams} says {what}", markup=False)


def _is_true(value: Any) -> bool:
    """Whether a file says true, as a word or as a text."""
    return str(value).lower() == "true"


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def main() -> None:
    """The entry point `kedit-fast`."""
    app()
