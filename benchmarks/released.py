"""Time edits against the released code of memit and AlphaEdit, imported from your own checkout of it.

    python -m benchmarks.released --memit PATH [--alphaedit PATH] [--model demo|gpt2] [--edits 100] [--single 10]
                                  [--runs 5] [--threads 1] [--device cuda] [--json FILE]

The checkouts (github.com/kmeng01/memit, github.com/jianghoucheng/AlphaEdit) are not part of this package and are not
changed. Both sides get the same model, tokenizer, requests, context prefixes, statistics and numbers, in one process,
in turns. Before a row is timed the updates of both are compared; a row whose updates differ has no ratio.

What is done so that the released code runs here at all, none of it on a path whose time counts: "cuda" in its source is
read as the device; hooks on decoder blocks see the tuple that blocks returned before transformers 5; its context
prefixes and second moments are given; a tokenizer that adds no BOS, since its token positions take none into account;
`datasets` may be absent. Its statistics use two worker processes for tokenizing, as released.

`compare` and `markdown` of benchmarks.run read the rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.util
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import (
    Row,
    document_of,
    fail_on_wrong_results,
    provenance,
    save,
    synchronize,
    timing,
    with_baseline,
)
from benchmarks.run import show
from benchmarks.values import row_of
from kedit_fast import Editor, NullSpace, collect_statistics, demo
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.integrations import alphaedit
from kedit_fast.integrations.sessions import detach_session
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.presets import is_guess, make_hparams, published_values
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import prepare
from kedit_fast.requests.request import EditRequest
from kedit_fast.statistics.collect import Statistics

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=180, highlight=False)
PACKAGES = ("memit", "rome", "util", "AlphaEdit")
ERROR_LIMIT = 1e-2  # of an update, relative: 1e-6 on the demo model, 1e-3 where random weights amplify rounding
MOMENT_LIMIT = 1e-5
DOCUMENTS = 400  # of the statistics row
CORPUS = 3000  # documents of the second moments that both sides are given
NAME = "benchmark"


class _Source(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of a checkout, with "cuda" in their source read as another device; nothing is written there."""

    def __init__(self, root: Path, device: str):
        self.root, self.device = root, device

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] not in PACKAGES:
            return None
        place = self.root.joinpath(*name.split("."))
        if (place / "__init__.py").exists():
            file, parts = place / "__init__.py", [str(place)]
        elif place.with_suffix(".py").exists():
            file, parts = place.with_suffix(".py"), None
        elif place.is_dir():
            file, parts = None, [str(place)]
        else:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=str(file), is_package=parts is not None)
        if spec is not None and parts is not None:
            spec.submodule_search_locations = parts
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        origin = module.__spec__.origin if module.__spec__ else None
        if origin is None or origin == "None":
            return
        source = Path(origin).read_text(encoding="utf-8")
        if self.device != "cuda":
            source = source.replace('"cuda"', f'"{self.device}"').replace("'cuda'", f"'{self.device}'")
            source = source.replace(".cuda()", f'.to("{self.device}")')
        module.__file__ = origin
        exec(compile(source, origin, "exec"), module.__dict__)


class Released:
    """Modules of a checkout by their names, as they are there but for the device and the blocks' tuples."""

    def __init__(self, root: Path, names: Sequence[str], device: str, blocks: set[str]):
        if not (root / "rome").is_dir():
            raise typer.BadParameter(f"{root} is no checkout: it has no folder rome")
        self.commit = commit_of(root)
        finder, before = _Source(root, device), dict(sys.modules)
        here = os.getcwd()
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
        absent = importlib.util.find_spec("datasets") is None
        if absent:
            sys.modules["datasets"] = types.ModuleType("datasets")
            sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
        sys.meta_path.insert(0, finder)
        try:
            os.chdir(root)  # util.globals reads globals.yml from where it is run
            _block_tuples(importlib.import_module("util.nethook"), blocks)
            self.modules = {name: importlib.import_module(name) for name in names}
        finally:
            os.chdir(here)
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.partition(".")[0] in (*PACKAGES, "datasets")]:
                if name not in before:
                    del sys.modules[name]

    def __getitem__(self, name: str) -> Any:
        return self.modules[name]


def commit_of(root: Path) -> str:
    """The commit of a checkout, or a hash of its sources where it is no repository."""
    if (root / ".git").exists():
        run = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(run, capture_output=True, text=True, cwd=root, check=True).stdout.strip()
    digest = hashlib.sha256()
    for name in PACKAGES:
        for path in sorted((root / name).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"sources {digest.hexdigest()[:16]}"


def _block_tuples(nethook: Any, blocks: set[str]) -> None:
    """Traces of decoder blocks see (hidden states,), which is what the released code takes apart."""
    base = nethook.Trace

    class Trace(base):
        def __init__(self, module: Any, layer: Any = None, edit_output: Any = None, **options: Any):
            self.block = layer in blocks
            if edit_output is not None and self.block:
                inner = edit_output

                def edit_output(output: Any, layer: Any) -> Any:
                    if isinstance(output, tuple):
                        return inner(output, layer)
                    return inner((output,), layer)[0]

            super().__init__(module, layer, edit_output=edit_output, **options)

        @property
        def output(self) -> Any:
            as_returned = isinstance(self.captured, tuple) or not self.block
            return self.captured if as_returned else (self.captured,)

        @output.setter
        def output(self, value: Any) -> None:
            self.captured = value

    nethook.Trace = Trace


@dataclass
class Subject:
    """What both sides edit, and with what."""

    name: str
    model: Any
    tokenizer: Any
    view: ModelView
    device: str
    requests: list[EditRequest]
    prefixes: tuple[str, ...]
    rome_prefixes: tuple[str, ...]
    moments: Statistics

    def hparams_of(self, method: str) -> Hparams:
        """The preset of a method, or the published numbers of the model's family."""
        hparams, _ = make_hparams(method, self.model.config, self.options_of(method))
        return hparams

    def options_of(self, method: str) -> dict[str, Any]:
        """What `hparams_of` overrides: the released code knows no number that is "auto"."""
        _, origin = make_hparams(method, self.model.config)
        published = published_values(method, self.model.config) if is_guess(origin) else {}
        return {**published, "on_predicted": "allow"}

    def records(self, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
        """Requests as the released code takes them."""
        return [{"case_id": n, "prompt": r.prompt, "subject": r.subject, "target_new": {"str": r.target_new}}
                for n, r in enumerate(requests)]  # fmt: skip

    def theirs(self, kind: Any, hparams: Hparams) -> Any:
        """An object of the released class of hyper-parameters."""
        spec, last = self.view.spec, self.view.num_layers - 1
        block = spec.blocks + ".{}"
        edited = self.view.module_name(0).replace(f"{spec.blocks}.0.", f"{spec.blocks}.{{}}.", 1)
        known = {
            "layers": list(hparams.layers), "layer_selection": "all", "fact_token": "subject_last",
            "v_loss_layer": last, "rewrite_module_tmp": edited, "layer_module_tmp": block,
            "mlp_module_tmp": edited.rpartition(".")[0], "attn_module_tmp": block, "ln_f_module": spec.norm,
            "lm_head_module": name_of(self.model, self.model.get_input_embeddings()), "mom2_dataset": "wikipedia",
            "mom2_n_samples": DOCUMENTS, "mom2_dtype": "float32", "model_name": NAME, "stats_dir": "",
            "context_template_length_params": [],
        }  # fmt: skip
        names = [field.name for field in fields(kind)]
        return kind(**{name: known[name] if name in known else getattr(hparams, name) for name in names})


def name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    """The path of a module."""
    return next(name for name, candidate in model.named_modules() if candidate is module)


def subject(name: str, edits: int, device: str) -> Subject:
    """The demo model, or a random one of GPT-2 small's shape, with the demo's tokenizer, texts and requests."""
    model, tokenizer = demo.load()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # no BOS, which the released code counts wrong
    if name == "gpt2":
        torch.manual_seed(0)
        shape = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2)
        model = AutoModelForCausalLM.from_config(shape).eval()
    config = model.config  # its names for sizes, on other architectures
    config.n_embd, config.n_positions = config.hidden_size, config.max_position_embeddings
    config._name_or_path = NAME
    model = model.to(device)
    view = ModelView(model)
    layers = sorted({layer for method in ("memit", "rome") for layer in make_hparams(method, config)[0].layers})
    short = generate_prefixes(view, tokenizer, ((10, 5),), 0)
    rome = generate_prefixes(view, tokenizer, ((5, 10), (10, 10)), 0)
    moments = ridged(collect_statistics(model, tokenizer, demo.corpus(CORPUS), layers))
    return Subject(name, model, tokenizer, view, device, demo.requests(edits), short, rome, moments)


def ridged(moments: Statistics, ridge: float = 1e-3) -> Statistics:
    """Second moments with a ridge relative to their mean diagonal, so that both sides' solves are well-conditioned."""
    layers = {}
    for layer, second in moments.layers.items():
        eye = torch.eye(len(second.moment), dtype=second.moment.dtype, device=second.moment.device)
        layers[layer] = replace(second, moment=second.moment + ridge * second.moment.diagonal().mean() * eye)
    return replace(moments, layers=layers)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The released code prints every iteration."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def in_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], undo: Callable[[], None], runs: int, device: str
) -> tuple[list[float], list[float]]:
    """Seconds of both, A B A B, after what the comparison of their results has warmed up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for seconds, call in zip(times, (ours, theirs), strict=True):
            begin = time.perf_counter()
            call()
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
            undo()
    return times


def gap(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor; infinite where one is not finite."""
    worst = 0.0
    for name, tensor in expected.items():
        error = float((result[name].double() - tensor.double()).norm() / tensor.double().norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def edited_row(
    on: Subject, op: str, case: str, baseline: str, layers: Sequence[int], ours: Callable[[], Any],
    theirs: Callable[[], Any], runs: int, count: int,
) -> Row:  # fmt: skip
    """Whole calls that write to the model, gated by their updates."""
    weights = {on.view.module_name(layer): on.view.weight(layer) for layer in layers}
    before = {name: weight.clone() for name, weight in weights.items()}

    def undo() -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])

    def written(call: Callable[[], Any]) -> dict[str, torch.Tensor]:
        call()
        updates = {name: weight - before[name] for name, weight in weights.items()}
        undo()
        return updates

    error = gap(written(ours), written(theirs))
    row = limited(row_of(op, case, error, None, None, "", on.device), ERROR_LIMIT)
    if not error <= ERROR_LIMIT:
        return {**row, "baseline": baseline, "ratio": None}
    mine, others = in_turns(ours, theirs, undo, runs, on.device)
    return with_baseline({**row, **timing(mine), "edits_per_s": count / statistics.median(mine)}, baseline, others)


def limited(row: Row, limit: float) -> Row:
    return {**row, "error_limit": limit}


def part_row(
    on: Subject, op: str, case: str, baseline: str, ours: Callable[[], dict], theirs: Callable[[], dict], runs: int,
    limit: float, note: str = "",
) -> Row:  # fmt: skip
    """A part that writes nothing, gated by its results."""
    error = gap(ours(), theirs())
    row = limited(row_of(op, case, error, None, None, note, on.device), limit)
    if not error <= limit:
        return {**row, "baseline": baseline, "ratio": None}
    mine, others = in_turns(ours, theirs, lambda: None, runs, on.device)
    return with_baseline({**row, **timing(mine)}, baseline, others)


def memit_rows(on: Subject, root: Path, single: int, runs: int) -> tuple[list[Row], str]:
    """A batch of MEMIT, its values, keys and statistics, and single ROME edits, against memit's repository."""
    names = ("memit.memit_main", "memit.compute_z", "memit.compute_ks", "rome.rome_main", "rome.compute_u",
             "rome.layer_stats")  # fmt: skip
    blocks = {f"{on.view.spec.blocks}.{layer}" for layer in range(on.view.num_layers)}
    checkout = Released(root, names, on.device, blocks)
    main, rome = checkout["memit.memit_main"], checkout["rome.rome_main"]
    baseline = "memit as released"
    hparams, rome_hparams = on.hparams_of("memit"), on.hparams_of("rome")
    main.CONTEXT_TEMPLATES_CACHE = [["{}"], [prefix + "{}" for prefix in on.prefixes]]
    rome.CONTEXT_TEMPLATES_CACHE = ["{}", *(prefix + "{}" for prefix in on.rome_prefixes)]
    for layer in hparams.layers:
        main.COV_CACHE[NAME, on.view.module_name(layer)] = on.moments.moment(layer).moment.float()
    for layer in rome_hparams.layers:
        inverse = torch.inverse(on.moments.moment(layer).moment.double()).float().to(on.device)
        checkout["rome.compute_u"].inv_mom2_cache[NAME, on.view.module_name(layer)] = inverse
    theirs, theirs_rome = on.theirs(main.MEMITHyperParams, hparams), on.theirs(rome.ROMEHyperParams, rome_hparams)
    requests, count = on.requests, len(on.requests)
    records, options, rome_options = on.records(requests), on.options_of("memit"), on.options_of("rome")

    def our_memit() -> None:
        editor = Editor(on.model, on.tokenizer, "memit", statistics=on.moments, prefixes=on.prefixes, hparams=options)
        editor.edit(requests)

    def their_memit() -> None:
        with quiet():
            main.apply_memit_to_model(on.model, on.tokenizer, records, theirs)

    singles = [on.requests[i * count // single] for i in range(single)]

    def our_rome() -> None:
        for request in singles:
            editor = Editor(on.model, on.tokenizer, "rome", statistics=on.moments, prefixes=on.rome_prefixes,
                            hparams=rome_options)  # fmt: skip
            editor.edit([request])

    def their_rome() -> None:
        with quiet():
            for record in on.records(singles):
                rome.apply_rome_to_model(on.model, on.tokenizer, [record], theirs_rome)

    last, contexts = hparams.layers[-1], main.CONTEXT_TEMPLATES_CACHE
    spaced = [{**r, "target_new": {"str": " " + r["target_new"]["str"]}} for r in records]

    def our_values() -> dict[str, torch.Tensor]:
        ready = prepare(on.tokenizer, requests, on.prefixes, on.view.max_length)
        return {"values": find_values(on.view, ready, last, "block", hparams).targets}

    def their_values() -> dict[str, torch.Tensor]:
        with quiet():
            values = [main.compute_z(on.model, on.tokenizer, record, theirs, last, contexts) for record in spaced]
        return {"values": torch.stack(values, 1).detach()}

    def our_keys() -> dict[str, torch.Tensor]:
        ready = prepare(on.tokenizer, requests, on.prefixes, on.view.max_length)
        tensors = {}
        with torch.no_grad():
            passes = KeyPass(on.view, ready, Site(last, "block"), "bare_half")
            for layer in hparams.layers:
                states = passes.at(layer)
                tensors |= {f"keys {layer}": states.keys, f"outputs {layer}": states.outputs}
        return tensors

    def their_keys() -> dict[str, torch.Tensor]:
        tensors = {}
        with quiet():
            for layer in hparams.layers:
                keys = main.compute_ks(on.model, on.tokenizer, spaced, theirs, layer, contexts).T
                outputs = main.get_module_input_output_at_words(
                    on.model, on.tokenizer, last, context_templates=[r["prompt"] for r in spaced],
                    words=[r["subject"] for r in spaced], module_template=theirs.layer_module_tmp,
                    fact_token_strategy=theirs.fact_token,
                )[1].T  # fmt: skip
                tensors |= {f"keys {layer}": keys, f"outputs {layer}": outputs}
        return tensors

    texts = demo.corpus()[:DOCUMENTS]
    stats = checkout["rome.layer_stats"]
    stats.load_dataset = lambda *_: {"train": [{"text": text} for text in texts]}

    def our_statistics() -> dict[str, torch.Tensor]:
        collected = collect_statistics(on.model, on.tokenizer, texts, hparams.layers)
        return {str(layer): second.moment for layer, second in collected.layers.items()}

    def their_statistics() -> dict[str, torch.Tensor]:
        moments = {}
        with quiet(), tempfile.TemporaryDirectory() as folder:
            for layer in hparams.layers:
                moments[str(layer)] = stats.layer_stats(
                    on.model, on.tokenizer, on.view.module_name(layer), folder, "wikipedia", ["mom2"],
                    sample_size=len(texts), precision="float32", download=False, progress=lambda loader, **_: loader,
                ).mom2.moment()  # fmt: skip
        return moments

    where = f"{on.name} model"
    return [
        edited_row(on, "Editor.edit", f"{where}, MEMIT, {count} edits, statistics ready", baseline, hparams.layers,
                   our_memit, their_memit, runs, count),
        part_row(on, "values", f"{where}, {count} requests", baseline, our_values, their_values, runs, ERROR_LIMIT),
        part_row(on, "keys", f"{where}, {count} requests, layers {','.join(map(str, hparams.layers))}", baseline,
                 our_keys, their_keys, runs, 1e-4),
        part_row(on, "statistics", f"{where}, {len(texts)} documents, {len(hparams.layers)} layers", baseline,
                 our_statistics, their_statistics, runs, MOMENT_LIMIT, "theirs tokenises in two worker processes"),
        edited_row(on, "Editor.edit", f"{where}, ROME, {single} single edits", baseline, rome_hparams.layers, our_rome,
                   their_rome, runs, single),
    ], checkout.commit  # fmt: skip


def alphaedit_rows(on: Subject, root: Path, runs: int) -> tuple[list[Row], str]:
    """A batch of AlphaEdit, with `cache_c` and `P` as its evaluate.py passes them."""
    blocks = {f"{on.view.spec.blocks}.{layer}" for layer in range(on.view.num_layers)}
    checkout = Released(root, ("AlphaEdit.AlphaEdit_main",), on.device, blocks)
    main, hparams = checkout["AlphaEdit.AlphaEdit_main"], on.hparams_of("alphaedit")
    main.CONTEXT_TEMPLATES_CACHE = [["{}"], [prefix + "{}" for prefix in on.prefixes]]
    spaces = [
        NullSpace.from_covariance(
            on.moments.moment(layer).moment, hparams.nullspace_threshold, hparams.nullspace_rule, hparams.L2
        )
        for layer in hparams.layers
    ]
    size = spaces[0].size
    P = torch.stack([space.project(torch.eye(size, dtype=torch.float64, device=on.device)) for space in spaces])
    P = P.float().cpu()
    theirs, records = on.theirs(main.AlphaEditHyperParams, hparams), on.records(on.requests)
    caches: list[torch.Tensor] = []

    def fresh() -> torch.Tensor:
        caches.append(torch.zeros(len(hparams.layers), size, size))
        return caches[-1]

    def ours() -> None:
        detach_session(on.model)  # a first batch each time
        with fixed_prefixes(on.prefixes):
            alphaedit.apply_AlphaEdit_to_model(
                on.model, on.tokenizer, records, on.options_of("alphaedit"), cache_c=fresh(), P=P
            )

    def released() -> None:
        with quiet():
            main.apply_AlphaEdit_to_model(on.model, on.tokenizer, records, theirs, cache_c=fresh(), P=P)

    case = f"{on.name} model, AlphaEdit, {len(records)} edits, P ready"
    row = edited_row(on, "apply_AlphaEdit_to_model", case, "AlphaEdit as released", hparams.layers, ours,
                     released, runs, len(records))  # fmt: skip
    error = gap({"cache_c": caches[0]}, {"cache_c": caches[1]})
    if not error <= ERROR_LIMIT:
        row = {**row, "ratio": None, "note": f"cache_c differs by {error:.1e}"}
    return [row], checkout.commit


@contextlib.contextmanager
def fixed_prefixes(prefixes: tuple[str, ...]) -> Iterator[None]:
    """Editors made in the block take these context prefixes instead of generating some."""
    import kedit_fast.editing.editor as module

    before = module.generate_prefixes
    module.generate_prefixes = lambda *_: prefixes
    try:
        yield
    finally:
        module.generate_prefixes = before


@app.command()
def main(
    memit: Annotated[Path | None, typer.Option(help="checkout of github.com/kmeng01/memit")] = None,
    alphaedit_: Annotated[
        Path | None, typer.Option("--alphaedit", help="checkout of github.com/jianghoucheng/AlphaEdit")
    ] = None,
    model: Annotated[str, typer.Option(help="demo, or gpt2: GPT-2 small's shape with random weights")] = "demo",
    edits: Annotated[int, typer.Option(min=2, help="requests of a batch")] = 100,
    single: Annotated[int, typer.Option(min=1, help="single ROME edits of a run")] = 10,
    runs: Annotated[int, typer.Option(min=2, help="of each side, in turns")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option()] = "cpu",
    json_: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
) -> None:
    """Time edits against the released code."""
    if memit is None and alphaedit_ is None:
        raise typer.BadParameter("give --memit PATH, --alphaedit PATH, or both")
    if model not in ("demo", "gpt2"):
        raise typer.BadParameter(f"--model {model}: choose demo or gpt2")
    torch.set_num_threads(threads)
    origin = provenance(device)
    origin["versions"]["transformers"] = transformers.__version__
    on = subject(model, edits, device)
    rows: list[Row] = []
    for root, measured in ((memit, lambda path: memit_rows(on, path, min(single, edits), runs)),
                           (alphaedit_, lambda path: alphaedit_rows(on, path, runs))):  # fmt: skip
        if root is not None:
            new_rows, commit = measured(root.resolve())
            rows += new_rows
            origin["versions"][f"released {root.resolve().name}"] = commit
    save(json_, document_of(rows, origin))
    show(rows, origin, {})
    fail_on_wrong_results(rows)


if __name__ == "__main__":
    app()
