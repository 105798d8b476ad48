"""Erasing the kind of a subject from the demo model: what a probe still reads of the edited layers, and what it costs.

    python -m benchmarks.erasure [--json FILE]

Texts are names of people, cities and companies, labels their kinds. A probe (least squares with a small ridge, on the
layer's output at a name's last token, of the 150 names a kind that were erased) is judged on 100 other names a kind,
before and after. Other columns: drift, what a token of held-out text costs more than before, in nats; and the share of
300 facts that the model still says. ProFS takes away 10 directions of pairs of people and cities, so its probe has two
kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, provenance, require_clean, save
from kedit_fast import Editor, EditRequest, collect_statistics, demo, evaluate
from kedit_fast.demo import world
from kedit_fast.evaluation.metrics import mean_nll
from kedit_fast.models.forward import Site, capture, evaluating, pad

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=160, highlight=False)
TRAINED, JUDGED, FACTS = 150, 100, 300
RIDGE = 1e-3
"""Of the probe, as a share of the mean variance."""
WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "LEACE": (("person", "city", "company"), {}),
    "LEACE, cost of ordinary text": (("person", "city", "company"), {"cost": "statistics"}),
    "ProFS, 10 directions": (("person", "city"), {"cost": "none", "pairs": 10, "keep_mean": False}),
}
"""Name -> the kinds that are erased, and the arguments of `Editor.erase`."""


def outputs(editor: Editor, tokenizer: Any, texts: Sequence[str], layer: int) -> torch.Tensor:
    """Outputs [n, h] of the layer's MLP at the last token of each text, fp64."""
    site = Site(layer, "mlp")
    rows = [tokenizer(text)["input_ids"] for text in texts]
    with evaluating(editor.view), torch.no_grad():
        last = torch.tensor([len(row) - 1 for row in rows])
        captured, _ = capture(editor.view, pad(rows, editor.view.device), [site], last)
    return captured[site].double()


def probe_accuracy(trained: torch.Tensor, judged: torch.Tensor, kinds: int) -> float:
    """Share of `judged` [kinds * m, h] that a linear probe of `trained` [kinds * n, h] gets right; ordered by kind."""
    labels, truth = (torch.arange(kinds).repeat_interleave(len(part) // kinds) for part in (trained, judged))
    mean = trained.mean(0)
    x = trained - mean
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-12)
    weights = torch.linalg.solve(gram, x.T @ torch.nn.functional.one_hot(labels, kinds).double())
    return float(((judged - mean) @ weights).argmax(1).eq(truth).double().mean())


def measure() -> list[Row]:
    """A row for each of WAYS."""
    model, tokenizer = demo.load()
    layers = (0, 1)
    statistics = collect_statistics(model, tokenizer, demo.corpus(), layers, progress=False)
    text = demo.held_out([])
    facts = [
        EditRequest(fact.relation.phrasings[0], fact.subject, fact.object, id=i)
        for i, fact in enumerate(world.world().facts[:: len(world.world().facts) // FACTS][:FACTS])
    ]

    def state() -> tuple[float, float]:
        said = evaluate(model, tokenizer, facts, "cf.accuracy/rewrite").value("cf.accuracy/rewrite")
        assert said is not None
        return mean_nll(model, tokenizer, text), said / 100

    before = state()
    rows = []
    for name, (kinds, arguments) in WAYS.items():
        trained, judged = ([n for kind in kinds for n in world.world().subjects[kind][part]] for part in (
            slice(0, TRAINED), slice(TRAINED, TRAINED + JUDGED)))  # fmt: skip
        labels = [kind for kind in kinds for _ in range(TRAINED)]
        editor = Editor(model, tokenizer, "memit", statistics=statistics, layers=layers, prefixes=())

        def accuracies(editor: Editor = editor, trained=trained, judged=judged, kinds=kinds) -> list[float]:
            return [
                probe_accuracy(
                    outputs(editor, tokenizer, trained, layer), outputs(editor, tokenizer, judged, layer), len(kinds)
                )
                for layer in layers
            ]

        first = accuracies()
        editor.erase(trained, labels, **arguments)
        last, after = accuracies(), state()
        editor.restore()
        for layer, old, new in zip(layers, first, last, strict=True):
            rows.append(
                {
                    "way": name, "layer": layer, "kinds": len(kinds), "before": old, "after": new,
                    "drift": after[0] - before[0], "facts_before": before[1], "facts": after[1],
                }
            )  # fmt: skip
    return rows


@app.command()
def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
) -> None:
    """Measure, print a table, and write the rows to a file when asked."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    rows = [{**row, **origin} for row in measure()]
    table = Table("way", "layer", "kinds", "probe before", "after", "drift", "facts before", "after")
    for row in rows:
        table.add_row(
            row["way"], str(row["layer"]), str(row["kinds"]), f"{row['before']:.2f}", f"{row['after']:.2f}",
            f"{row['drift']:+.3f}", f"{row['facts_before']:.2f}", f"{row['facts']:.2f}",
        )  # fmt: skip
    console.print(table)
    if json_file is not None:
        save(json_file, {"peaks": {}, "rows": rows, "about": origin})


if __name__ == "__main__":
    app()
