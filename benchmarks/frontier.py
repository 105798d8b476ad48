"""MEMIT with and without the output metric along lambda: what the same share of paraphrases costs everything else.

    python -m benchmarks.quality --frontier [--json FILE]          measure; points that are in FILE stay
    python -m benchmarks.frontier FILE OUT                         draw both frontiers

The values of a set of requests are optimized once; then every lambda (`mom2_update_weight`) is a solve, a write and an
evaluation of the demo model. A point has, as shares of prompts whose every target token is the most probable one,
efficacy, paraphrase, neighborhood and same subject (other facts about the edited subjects, at most `FACTS` each), and
KL(unedited || edited) in nats a token on held-out text that names no edited subject.

Solves are compared at equal paraphrase: on the straight line between two neighboring lambdas that reaches that share,
the one with the least KL where several do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.harness import Row, provenance, read, require_clean, save
from benchmarks.quality import METRICS, Subject, subject
from kedit_fast import Editor, EditRequest, collect_statistics, demo
from kedit_fast.demo import world
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.statistics.labels import OutputGradients

SOLVES: dict[str, dict[str, Any]] = {"MEMIT": {}, "output metric": {"output_metric": True}}
"""Name of a solve -> the hyper-parameters that make it."""
PLAIN, WEIGHED = SOLVES
COUNTS = (100, 500)
"""Edits, in one batch, from the beginning of the requests that presets were not chosen on."""
POWERS = range(8, 29)
LAMBDAS = tuple(
    float(f"{10 ** (power / 8):.3g}")
    for power in sorted(POWERS, key=lambda power: (power % 4 != 0, power % 2 != 0, power))
)
"""From 10 to 3162, eight a decade; coarse ones first, so that a run that was ended has the whole range."""
FACTS = 2
LEVELS = {100: (0.9, 0.85, 0.8, 0.7), 500: (0.75, 0.7, 0.6, 0.5)}
"""Edits -> shares of paraphrases at which solves are compared."""
QUALITIES = (*METRICS, "same_subject", "kl")
KL, SAME = "loc.kl/text", "cf.accuracy/rewrite"


def other_facts(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """At most FACTS other facts about each subject of the requests, as requests that state what is so."""
    prompts = {(request.subject, request.prompt) for request in requests}
    facts: dict[str, list[world.Fact]] = {request.subject: [] for request in requests if request.subject}
    for fact in world.world().facts:
        known = facts.get(fact.subject)
        if known is not None and len(known) < FACTS and (fact.subject, fact.relation.phrasings[0]) not in prompts:
            known.append(fact)
    return [
        EditRequest(fact.relation.phrasings[0], fact.subject, fact.object, id=f"{fact.subject} {fact.relation.name}")
        for known in facts.values()
        for fact in known
    ]


class Measurement:
    """What a set of requests did to the model, against the model as it was when this was made."""

    def __init__(self, on: Subject, requests: Sequence[EditRequest]):
        metrics = [*METRICS.values(), KL]
        self.edits = Evaluator(on.model, on.tokenizer, requests, metrics, texts=on.text, average="prompt")
        self.same = Evaluator(on.model, on.tokenizer, other_facts(requests), [SAME], average="prompt")
        for evaluator in (self.edits, self.same):
            evaluator.measure("pre")

    def now(self) -> Row:
        """QUALITIES of the model as it is: shares, and the KL divergence in nats a token."""
        for evaluator in (self.edits, self.same):
            evaluator.measure("final")
        edits, same = self.edits.result(), self.same.result()
        shares = {**{name: edits.value(id) for name, id in METRICS.items()}, "same_subject": same.value(SAME)}
        return {**{name: (share or 0.0) / 100 for name, share in shares.items()}, "kl": edits.value(KL)}


def points(on: Subject, edits: int, present: Sequence[Row]) -> Iterator[Row]:
    """The points of one number of edits that are not present yet."""
    there = {(row["solve"], row["lambda"]) for row in present if row["edits"] == edits}
    missing = [(solve, weight) for weight in LAMBDAS for solve in SOLVES if (solve, weight) not in there]
    if not missing:
        return
    requests = on.requests[:edits]
    measurement, prefixes = Measurement(on, requests), None
    if ("unedited", None) not in there:
        yield {"edits": edits, "solve": "unedited", "lambda": None, **measurement.now()}
    for solve, weight in missing:
        changes = {"on_predicted": "allow", "mom2_update_weight": weight, **SOLVES[solve]}
        editor = Editor(
            on.model, on.tokenizer, "memit", statistics=on.moments, hparams=changes, prefixes=prefixes, values=on.store
        )
        prefixes = editor.prefixes
        try:
            editor.edit(requests, "skip")
            yield {"edits": edits, "solve": solve, "lambda": weight, **measurement.now()}
        finally:
            editor.restore()


def run(json_file: Path | None, values: Path | None, counts: Sequence[int] = COUNTS) -> list[Row]:
    """Measure the points that the file does not have yet, and write them one by one."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    rows = read(json_file)["rows"] if json_file is not None and json_file.exists() else []
    on = subject()
    on.store = ValueFile(values)
    layers = sorted(on.moments.layers)
    gradients = OutputGradients(tokens=on.moments.layers[layers[0]].count)  # as many as the second moments are of
    on.moments = collect_statistics(on.model, on.tokenizer, demo.corpus(), layers, output_metric=gradients)
    for edits in counts:
        for row in points(on, edits, rows):
            rows.append({**row, **origin})
            print(" ".join([row["solve"], str(row["lambda"]), *(f"{name} {row[name]:.4g}" for name in QUALITIES)]))
            save(json_file, {"peaks": {}, "rows": rows, "about": origin})
    return rows


def frontier(rows: Sequence[Row], solve: str, edits: int) -> list[Row]:
    """The points of a solve by lambda."""
    return sorted((r for r in rows if r["solve"] == solve and r["edits"] == edits), key=lambda row: row["lambda"])


def at(rows: Sequence[Row], paraphrase: float) -> Row | None:
    """QUALITIES where a frontier reaches a share of paraphrases with the least KL; None where it does not."""
    best: Row | None = None
    for low, high in itertools.pairwise(rows):
        ends = low["paraphrase"], high["paraphrase"]
        if min(ends) <= paraphrase <= max(ends):
            share = 0.0 if ends[0] == ends[1] else (paraphrase - ends[0]) / (ends[1] - ends[0])
            point = {name: (1 - share) * low[name] + share * high[name] for name in QUALITIES}
            point["lambda"] = math.exp((1 - share) * math.log(low["lambda"]) + share * math.log(high["lambda"]))
            best = point if best is None or point["kl"] < best["kl"] else best
    return best


def compared(rows: Sequence[Row]) -> Iterator[tuple[int, float, Row, Row]]:
    """(edits, paraphrase, MEMIT's point, the output metric's) at every level that both reach."""
    for edits in sorted({row["edits"] for row in rows}):
        for level in LEVELS[edits]:
            plain, weighed = (at(frontier(rows, solve, edits), level) for solve in SOLVES)
            if plain is not None and weighed is not None:
                yield edits, level, plain, weighed


def main(file: Path, out: Path) -> None:
    """Draw both frontiers of a file of points, into a folder."""
    from benchmarks.plots import frontier_curves

    for path in frontier_curves(read(file), out / file.stem):
        print(path)


if __name__ == "__main__":
    typer.run(main)
