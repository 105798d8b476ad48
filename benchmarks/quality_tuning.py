"""What the methods that tune a matrix or keep a memory do to the demo model, beside three with a closed form.

    python -m benchmarks.quality --tuning [--methods NAMES] [--scenarios 1,100,500,sequence] [--json FILE] [--missing]

NAMES are those of `ROWS`, with ; between them. Every row is measured by itself and written to FILE when it is done;
with `--missing` rows that FILE has are left out, so that a run that was ended goes on, and rows can be made on several
machines. Requests and scenarios are those of `benchmarks.quality`.

Columns: efficacy, paraphrase and neighborhood teacher-forced (every token of the answer is the most probable one) and
generated (`wild.em`: the greedy answer up to its first full stop is the right one, in SQuAD's form), as shares of all
prompts alike on the final model; drift, in nats a token of held-out text that names no edited subject; retention,
efficacy of all requests on the final model over that of each right after its batch; of memories the shares of edited
prompts and paraphrases that they do not answer, and of neighbors and sentences that they do; `unlearned`, requests
whose loss stayed above that of a probability of one half; seconds of editing without evaluation; bytes of what stands
beside the weights. A memory's routes are decided on the prompts alone, never on the answer that is fed behind them.
DINM is tuned with the first neighborhood prompts of each request as its general prompts, and measured on the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, provenance, read, require_clean, save
from benchmarks.quality import NEIGHBORS, SCENARIOS, SINGLE_EDITS, TITLES, Subject, console, subject, timed_edit
from kedit_fast import Editor, EditRequest, evaluate
from kedit_fast.editing.tuning.summary import unlearned_places
from kedit_fast.evaluation.metrics import mean_nll
from kedit_fast.methods.hparams import reads
from kedit_fast.methods.registry import RECIPES, find_recipe
from kedit_fast.reports.evaluation import scale_of
from kedit_fast.requests.probes import Probe, Question

COMPARED = ("memit", "alphaedit", "ultraedit")
"""The closed forms that the others are compared with."""
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in COMPARED},
    **{name: (name, {}) for name, recipe in RECIPES.items() if recipe.tuning is not None},
}
"""Name of a row -> (method, hyper-parameters)."""
ROWS["locft-bf, end token"] = ("locft-bf", {"train_end": True})
ROWS["wise, merge"] = ("wise", {"retrieve": False})
TUNING_SCENARIOS = ("1", "100", "500", "sequence")
METRICS = {
    "efficacy": "cf.accuracy/rewrite",
    "paraphrase": "cf.accuracy/paraphrase",
    "neighborhood": "cf.accuracy/neighborhood",
    "said": "wild.em/rewrite",
    "said_paraphrase": "wild.em/paraphrase",
    "said_neighborhood": "wild.em/neighborhood",
}
"""Column -> metric; the last three are of generated answers."""
ROUTES = {
    "missed": "memory.missed_route/rewrite",
    "missed_paraphrase": "memory.missed_route/paraphrase",
    "false_route": "memory.false_route/neighborhood",
    "false_route_text": "memory.false_route/text",
}
"""Column -> metric, of methods that keep a memory: edited prompts that it does not answer, and others that it does."""
TABLES = {
    "forced": ("efficacy", "paraphrase", "neighborhood"),
    "said": ("said", "said_paraphrase", "said_neighborhood"),
    "routes": tuple(ROUTES),
    "cost": ("drift", "retention", "unlearned", "seconds", "bytes"),
}
"""Name of a table -> the columns that its cells hold, with / between them."""
FORMS: dict[str, Callable[[Any], str]] = {
    "drift": lambda value: f"{value:+.3f}",
    "unlearned": str,
    "seconds": lambda value: f"{value:.0f} s",
    "bytes": lambda value: f"{value / 2**20:.1f} MiB" if value else "0",
}
"""Column -> how it is written; others are shares."""


@dataclass
class _Batches:
    """What the calls of `edit` of one row did."""

    seconds: float = 0.0
    skipped: int = 0
    unlearned: int = 0
    """Requests whose loss stayed above that of a probability of one half; of closed forms 0."""

    def write(self, editor: Editor, requests: Sequence[EditRequest]) -> Any:
        """One call of `edit`."""
        spent, result = timed_edit(editor, requests)
        self.seconds += spent
        self.skipped += len(result.skipped)
        self.unlearned += 0 if editor.recipe.tuning is None else len(unlearned_places(result))
        return result


def measure(on: Subject, name: str, scenario: str) -> Row:
    """One row of the table."""
    method, overrides = ROWS[name]
    recipe = find_recipe(method)
    count, size = SCENARIOS[scenario]
    row: Row = {"variant": name, "method": method, "scenario": scenario}
    if not recipe.optimizes_values and recipe.tuning is None and size == 1:
        return {**row, "n/a": "its normalizer needs more than one token"}
    requests = on.requests[:count]
    if recipe.tuning is not None and recipe.tuning.extra_rows == "general":
        requests = [with_general_prompts(request) for request in requests]
    editor = Editor(
        on.model, on.tokenizer, method, statistics=on.moments if recipe.uses_statistics else None,
        hparams={**({"on_predicted": "allow"} if reads(recipe, "on_predicted") else {}), **overrides},
    )  # fmt: skip
    try:
        if scenario == "1":
            return {**row, **_singles(on, editor, requests)}
        return {**row, **_together(on, editor, requests, size or count)}
    finally:
        editor.restore()


def with_general_prompts(request: EditRequest) -> EditRequest:
    """The request with its first neighborhood prompts as general prompts, which are tuned with, instead of measured."""
    assert request.target_true is not None
    answer = ((request.target_true,),)
    questions = tuple(Question(prompt, answer) for prompt in request.neighborhood_prompts[:NEIGHBORS])
    rest = request.neighborhood_prompts[NEIGHBORS:]
    return replace(request, probes=(Probe("locality", questions),), neighborhood_prompts=rest)


def _singles(on: Subject, editor: Editor, requests: Sequence[EditRequest]) -> Row:
    """Every request alone on the unedited model: means over them."""
    measured, drifts, batches, held = [], [], _Batches(), []
    for request in requests:
        if batches.write(editor, [request]).batch:
            measured.append(shares(on, [request]) | routes(on, editor, [request]))
            drifts.append(mean_nll(on.model, on.tokenizer, on.text) - on.before)
            held.append(bytes_beside(editor))
            editor.restore()
    if not measured:
        return {"n/a": "no request could be written", "skipped": batches.skipped}
    columns = {
        column: [each[column] for each in measured if each[column] is not None] for column in (*METRICS, *ROUTES)
    }
    means = {column: statistics.mean(present) if present else None for column, present in columns.items()}
    return {
        **means, "drift": statistics.mean(drifts), "seconds": batches.seconds, "retention": None,
        "skipped": batches.skipped, "unlearned": batches.unlearned, "bytes": max(held),
    }  # fmt: skip


def _together(on: Subject, editor: Editor, requests: Sequence[EditRequest], size: int) -> Row:
    """Requests in batches, measured at the end."""
    efficacies, batches = [], _Batches()
    parts = [requests[i : i + size] for i in range(0, len(requests), size)]
    for part in parts:
        batches.write(editor, part)
        if len(parts) > 1:
            efficacies.append(shares(on, part, ("efficacy",))["efficacy"])
    begin = time.perf_counter()
    editor.finish()
    batches.seconds += time.perf_counter() - begin
    measured = shares(on, requests) | routes(on, editor, requests)
    mean = statistics.mean(efficacies) if efficacies else None
    return {
        **measured, "drift": mean_nll(on.model, on.tokenizer, on.text) - on.before, "seconds": batches.seconds,
        "retention": None if mean is None else measured["efficacy"] / max(mean, 1e-9), "own_efficacy": mean,
        "skipped": batches.skipped, "unlearned": batches.unlearned, "bytes": bytes_beside(editor),
    }  # fmt: skip


def shares(on: Subject, requests: Sequence[EditRequest], columns: Sequence[str] = tuple(METRICS)) -> dict[str, Any]:
    """METRICS of the model as it is, as shares of all prompts alike."""
    ids = {column: METRICS[column] for column in columns}
    measured = evaluate(on.model, on.tokenizer, requests, ids.values(), average="prompt")
    values = {column: (measured.value(id), scale_of(measured, id)) for column, id in ids.items()}
    return {column: None if value is None else value / scale for column, (value, scale) in values.items()}


def routes(on: Subject, editor: Editor, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """ROUTES of the memory that answers now, as shares; None for methods without one."""
    if not editor.recipe.makes_memory:
        return dict.fromkeys(ROUTES)
    measured = evaluate(on.model, on.tokenizer, requests, ROUTES.values(), average="prompt", texts=on.text)
    values = {column: (measured.value(id), scale_of(measured, id)) for column, id in ROUTES.items()}
    return {column: None if value is None else value / scale for column, (value, scale) in values.items()}


def bytes_beside(editor: Editor) -> int:
    """Bytes of the memory that an editor holds beside the weights; 0 where edits are in them."""
    return editor.memory.nbytes if editor.recipe.makes_memory and editor.ledger.count else 0


def cell(row: Row | None, columns: Sequence[str]) -> str:
    """The columns of a row, with / between them; "-" for one that was not measured."""
    if row is None or "n/a" in row:
        return "" if row is None else "n/a"
    values = [row.get(column) for column in columns]
    return " / ".join(
        "-" if value is None else FORMS.get(column, lambda share: f"{share:.2f}")(value)
        for column, value in zip(columns, values, strict=True)
    )


def show(row: Row) -> None:
    """A row on the terminal."""
    parts = [cell(row, columns) for columns in TABLES.values()]
    console.print(f"{row['variant']}, {TITLES[row['scenario']]}: {'; '.join(dict.fromkeys(parts))}")


def missing(chosen: Sequence[tuple[str, str]], file: Path | None) -> Iterator[tuple[str, str]]:
    """Of (scenario, name), those that a file of rows does not have."""
    rows = read(file)["rows"] if file is not None and file.exists() else []
    there = {(row["scenario"], row["variant"]) for row in rows}
    return (pair for pair in chosen if pair not in there)


def run(
    chosen: Sequence[tuple[str, str]], file: Path | None = None, only_missing: bool = False, validation: bool = False
) -> None:
    """Measure rows, (scenario, name), one by one; print each, and write it to `file`."""
    left = list(missing(chosen, file)) if only_missing else chosen
    origin = provenance("cpu")
    require_clean(file, origin)
    on = subject(validation)
    for scenario, name in left:
        row = {**measure(on, name, scenario), "threads": torch.get_num_threads(), **origin}
        show(row)
        if file is not None:
            older = read(file)["rows"] if file.exists() else []
            others = [row for row in older if (row["variant"], row["scenario"]) != (name, scenario)]
            save(file, {"peaks": {}, "rows": [*others, row], "about": {**origin, "single_edits": SINGLE_EDITS}})
