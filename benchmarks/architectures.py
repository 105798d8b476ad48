"""Which decoders of the installed transformers can be edited, tried one by one on tiny random models.

    python -m benchmarks.architectures [--only TYPE ...] [--json FILE]

Each type gets a model of random weights (`benchmarks.tiny_decoders`), on which everything is compared with the plain
computation, every row alone and unpadded: values with the published serial loop, keys, statistics, MEMIT's written
update; then rollback to the bit, and logits after saving and loading. A child process with a time limit does it, so
that no model can end the run. Verdicts:

`tails`: values by the fast path.
`whole`: values by passes of the whole model, probabilities from decoder states and the head's matrix.
`logits`: by passes of the whole model and its own logits.
`wrong`: something differs from the plain computation, or failed; `reason` has it.
`refused`: with a message.
`no decoder`: an encoder-decoder, or later tokens change earlier ones.
`not built`: no tiny model could be made.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from benchmarks.harness import Row, console, document_of, provenance, read, require_clean, save
from benchmarks.published import as_stored, keys_at, memit, see_inputs, serial_value
from benchmarks.tiny_decoders import decoder_types, tiny_decoder, tiny_tokenizer
from kedit_fast import Editor, EditRequest, collect_statistics
from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.values.loop import find_values
from kedit_fast.errors import KeditError, UnsupportedModelError
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models.architectures import known_architecture
from kedit_fast.models.forward import Site
from kedit_fast.models.loading import load_model
from kedit_fast.models.prompt_runner import pass_kind
from kedit_fast.models.saving import save_model
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest, prepare

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

SECONDS = 120  # of a type
TEXTS = (
    "The mother tongue of Danielle Darrieux is French. Marcel Maupoint speaks English very well.",
    "Autonomous University of Madrid is located in Spain, and Ebro, which is located in Sweden.",
    "Because I saw the old tower, you and I walked home; therefore nobody waited.",
    "Miles Davis plays the trumpet. The instrument that Thelonious Monk plays is the piano.",
)
PREFIXES = ("The old tower. ", "Because I saw. ")
REQUESTS = (
    EditRequest("{} plays the", "Miles Davis", "violin and cello"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("Because you saw {}", "Ebro", "Spain"),
)
HPARAMS = dict(v_num_grad_steps=5, v_lr=0.1, clamp_norm_factor=0.5, v_weight_decay=0.5, mom2_update_weight=10.0,
               mom2_ridge=1e-3)  # fmt: skip
LIMITS = {"values": 1e-3, "keys": 1e-4, "statistics": 1e-4, "update": 1e-2, "saved": 1e-5}
"""Errors, relative, past which a row is wrong: ten times what float32 leaves of the worst right ones."""
VERDICTS = ("tails", "whole", "logits", "wrong", "refused", "no decoder", "not built")
NO_DECODER = ("encoder-decoder", "no causal language model", "no decoder")


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """|ours - expected| / |expected|."""
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def edited_layers(view: ModelView) -> tuple[int, ...]:
    """The first two layers with an edited matrix, but for the last one: blocks follow whose states depend on it.

    In the last block a value at another token than a prompt's last has no gradient but the rounding of the KL term, of
    which Adam makes steps of full size: no two loops agree there, and none is wrong.
    """
    editable = [layer for layer in view.editable if layer < view.num_layers - 1]
    return tuple(editable[:2])


def value_errors(
    view: ModelView, prepared: Sequence[PreparedRequest], layer: int, site: str, hparams: Any
) -> list[float]:
    """Distance of each value from the serial loop's, over the size of what the loop added."""
    values = find_values(view, prepared, layer, site, hparams)
    module = view.block(layer) if site == "block" else view.mlp(layer)
    errors = []
    for i, request in enumerate(prepared):
        alone = serial_value(view.model, [module], request, hparams, side=None)
        errors.append(float((values.targets[:, i] - alone.targets[0]).norm() / alone.deltas[0].norm()))
    return errors


def key_error(view: ModelView, prepared: Sequence[PreparedRequest], layers: Sequence[int]) -> float:
    """The worst difference of keys and outputs at the layers, read one after another, from each prompt alone."""
    errors = []
    keys = KeyPass(view, prepared, Site(layers[-1], "mlp"), "bare_half")
    bare = [request.rewriting[0] for request in prepared]
    for layer in layers:
        ours = keys.at(layer)
        expected = keys_at(view.model, view.edited_module(layer), bare, output=False, side=None)
        outputs = keys_at(view.model, view.mlp(layers[-1]), bare, output=True, side=None)
        errors += [relative(ours.bare_keys.T, expected), relative(ours.outputs.T, outputs)]
    return max(errors)


@torch.no_grad()
def moment_alone(view: ModelView, layer: int, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The second moment [d, d] of a layer's inputs, each row alone; of experts [E, m, m], one block an expert."""
    total, count = torch.zeros(()), 0
    for row in rows:
        inputs: list[torch.Tensor] = []
        hook = see_inputs(view.edited_module(layer), inputs)
        view.model(input_ids=torch.tensor([row]), use_cache=False)
        hook.remove()
        keys = inputs[0].flatten(0, -2).double()  # [T, d]
        if (stack := view.experts(layer)) is not None:
            blocks = keys.unflatten(1, (stack.count, stack.inputs)).transpose(0, 1)  # [E, T, m]
            total = total + blocks.mT @ blocks
        else:
            total = total + keys.T @ keys
        count += len(keys)
    return total / count


def update_error(
    editor: Editor, prepared: Sequence[PreparedRequest], moments: Mapping[int, torch.Tensor], values: torch.Tensor
) -> float:
    """How far the weights that an edit writes are from the published formula's; the edit is undone."""
    view, layers = editor.view, editor.hparams.layers
    weights = {layer: view.weight(layer) for layer in layers}
    before = {layer: weight.clone() for layer, weight in weights.items()}
    editor.edit(list(REQUESTS))
    written = {layer: weight - before[layer] for layer, weight in weights.items()}
    editor.rollback()
    for layer in layers:
        if not torch.equal(weights[layer], before[layer]):
            raise AssertionError(f"layer {layer} is not what it was before the edit that was undone")
    site = view.mlp(layers[-1]) if editor.value_sites == "mlp" else view.block(layers[-1])
    blocks = [site] * view.num_layers  # it looks at the last one alone
    edited = {layer: view.edited_module(layer) for layer in layers}
    ridge = editor.hparams.mom2_ridge
    whole = {layer: torch.block_diag(*m) if m.ndim == 3 else m for layer, m in moments.items()}
    ridged = {layer: m + ridge * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype) for layer, m in whole.items()}
    expected = memit(view.model, blocks, edited, weights, ridged, prepared, editor.hparams, targets=values, side=None)
    with torch.no_grad():
        for layer in layers:
            weights[layer].copy_(before[layer])
    return max(relative(written[layer], as_stored(expected[layer], written[layer])) for layer in layers)


def same_after_saving(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> str:
    """ "", or how a model that was saved and loaded differs from itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(model, tokenizer, path)
        try:
            loaded, _ = load_model(path)
        except KeditError as error:
            return f"saving: {first_line(error).replace(str(path), 'its folder')}"
    if type(loaded) is not type(model):
        return f"it was saved as a {type(loaded).__name__}"
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            here, there = (each(input_ids=ids, use_cache=False).logits for each in (model, loaded))
            if not relative(there, here) <= LIMITS["saved"]:
                return "logits differ after saving and loading"
    return ""


def path_of(view: ModelView) -> str:
    """By which passes values are optimized."""
    if view.head.matrix is None:
        return "logits"
    return "whole" if pass_kind(view, (Site(view.editable[0], "mlp"),)) == "whole prompts" else "tails"


def head_in_words(view: ModelView) -> str:
    """What the head does besides its matrix product."""
    head = view.head
    parts = [f"scale {head.scale:g}" if head.scale != 1 else "", f"cap {head.softcap:g}" if head.softcap else "",
             "bias" if head.bias is not None else ""]  # fmt: skip
    return ", ".join(part for part in parts if part)


class Lines(logging.Handler):
    """A log in memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Add a line."""
        self.lines.append(record.getMessage())


def first_line(error: BaseException) -> str:
    """The first line of an error with its type, unless it is the package's own."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, KeditError) else f"{type(error).__name__}: {text}"


def examine(kind: str, row: Row) -> Row:
    """Fill the row of a type: everything that is known of it up to the first failure."""
    log = Lines()
    package = logging.getLogger("kedit_fast")
    package.setLevel(logging.INFO)
    package.addHandler(log)
    tokenizer = tiny_tokenizer(TEXTS)
    try:
        model = tiny_decoder(kind)
    except Exception as error:  # it may be any code
        return {**row, "verdict": "not built", "reason": first_line(error)}
    row["class"] = type(model).__name__
    try:
        tried(model, tokenizer, row)
    except UnsupportedModelError as error:
        refused = "no decoder" if any(words in str(error) for words in NO_DECODER) else "refused"
        row |= {"verdict": refused, "reason": first_line(error)}
    except Exception as error:
        row |= {"verdict": "wrong", "reason": first_line(error)}
    return {**row, "log": list(dict.fromkeys(each for each in log.lines if "whole" in each))}


def tried(model: Any, tokenizer: Any, row: Row) -> None:
    """Everything that editing needs of a model, compared; the results go into the row."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    view = ModelView(model)
    spec = view.spec
    row |= {
        "spec": "known" if known_architecture(view.config) is not None else "found",
        "edited": f"{spec.blocks}.*.{spec.edit}", "mlp": spec.mlp, "post_norm": spec.post_norm,
        "editable": f"{len(view.editable)} of {view.num_layers}",
    }  # fmt: skip
    layers = edited_layers(view)
    prepared = prepare(tokenizer, REQUESTS, PREFIXES, 128)
    hparams, _ = make_hparams("memit", view.config, {**HPARAMS, "layers": layers})
    problems: list[str] = []

    def compare(name: str, measure: Callable[[], list[float] | float]) -> None:
        try:
            errors = measure()
        except UnsupportedModelError:
            raise
        except Exception as error:
            problems.append(f"{name}: {first_line(error)}")
            return
        errors = errors if isinstance(errors, list) else [errors]
        row[f"{name}_error"] = max(errors)
        if len(errors) > 1:
            row[f"{name}_error_median"] = statistics.median(errors)
        if not max(errors) <= LIMITS[name.split(" ")[0]]:
            problems.append(f"{name}: error {max(errors):.1e}")

    sites = ("mlp",) if spec.post_norm else ("mlp", "block")
    for site in sites:
        compare(f"values {site}", lambda site=site: value_errors(view, prepared, layers[-1], site, hparams))
    kind = pass_kind(view, (Site(view.editable[0], "mlp"),))
    row |= {"path": path_of(view), "passes": kind, "head": head_in_words(view)}
    compare("keys", lambda: key_error(view, prepared, layers))
    moments = collect_statistics(model, tokenizer, TEXTS, layers, progress=False)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    dense = {layer: moments.moment(layer).moment.double() for layer in layers}
    compare("statistics", lambda: max(relative(dense[layer], moment_alone(view, layer, rows)) for layer in layers))
    editor = Editor(model, tokenizer, "memit", statistics=moments, hparams={**HPARAMS, "layers": layers},
                    prefixes=PREFIXES)  # fmt: skip
    values = find_values(view, prepared, layers[-1], editor.value_sites, editor.hparams).targets
    compare("update", lambda: update_error(editor, prepared, dense, values))
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    if changed:
        problems.append(f"rollback: {changed[0]} is another tensor than before")
    try:
        if difference := same_after_saving(model, tokenizer, rows):
            problems.append(difference)
    except Exception as error:
        problems.append(f"saving: {first_line(error)}")
    row |= {"verdict": "wrong", "reason": "; ".join(problems)} if problems else {"verdict": row["path"]}


def in_child(kind: str, seconds: float) -> Row:
    """`examine` in a process of its own, which is ended after a time."""
    row: Row = {"type": kind}
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(kind, theirs))
    begin = time.perf_counter()
    child.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(seconds) else {**row, "verdict": "wrong", "reason": f"no end in {seconds:.0f} s"}
    except EOFError:
        child.join()
        row |= {"verdict": "wrong", "reason": f"the process ended with {child.exitcode}"}
    if child.is_alive():
        child.terminate()
    child.join()
    return {**row, "seconds": round(time.perf_counter() - begin, 1)}


def _send(kind: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pipe.send(examine(kind, {"type": kind}))
    pipe.close()


def line(row: Row) -> str:
    """A row in words."""
    errors = " ".join(f"{name.removesuffix('_error')} {value:.0e}" for name, value in row.items()
                      if name.endswith("_error"))  # fmt: skip
    return f"{row['type']:26} {row['verdict']:10} {row.get('spec', ''):5} {errors} {row.get('reason', '')}"


def merge(path: Path, row: Row, origin: Row) -> None:
    """Write a row into a file, in place of the older one of its type."""
    document = document_of([row], origin)
    older = read(path)["rows"] if path.exists() else []
    rows = [old for old in older if old["type"] != row["type"]] + document["rows"]
    order = {kind: place for place, kind in enumerate(decoder_types())}
    save(path, {**document, "rows": sorted(rows, key=lambda row: order.get(row["type"], len(order)))})


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="a type; repeat it for several; all without")] = None,
    seconds: Annotated[float, typer.Option(help="time of a type")] = SECONDS,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the rows here, in place of those of the same types")
    ] = None,
) -> None:
    """Which decoders of the installed transformers can be edited, tried one by one on tiny random models."""
    origin = provenance("cpu")
    origin["versions"] = {**origin["versions"], "transformers": transformers.__version__}
    require_clean(json_file, origin)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for kind in only or decoder_types():
        rows.append(in_child(kind, seconds))
        console.print(line(rows[-1]), soft_wrap=True)
        if json_file is not None:
            merge(json_file, rows[-1], origin)
    if any(row["verdict"] == "wrong" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
