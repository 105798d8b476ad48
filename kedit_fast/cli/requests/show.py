"""`kedit-fast requests show`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kedit_fast.cli.console import command, output, print_json, say_skipped
from kedit_fast.cli.options import (
    REQUESTS_HELP,
    FormOption,
    JsonOption,
    LabelsOption,
    OnErrorOption,
    ReadingOption,
    RelationPromptsOption,
    RequestSeedOption,
)
from kedit_fast.requests.datasets.registry import DATA_SETS
from kedit_fast.requests.problems import skipped_records
from kedit_fast.requests.reading import RequestList, load_requests
from kedit_fast.requests.request import EditRequest

_LONGEST = 60  # characters of a text in the table


@command
def show(
    file: Annotated[Path, typer.Argument(help=REQUESTS_HELP)],
    count: Annotated[int, typer.Option("--records", "-n", min=0, help="how many requests to print")] = 5,
    form: FormOption = None,
    reading: ReadingOption = None,
    labels: LabelsOption = None,
    relation_prompts: RelationPromptsOption = None,
    seed: RequestSeedOption = 0,
    on_error: OnErrorOption = "raise",
    as_json: JsonOption = False,
) -> None:
    """Show which data set's form a file has, what its requests hold, and a few of them."""
    requests = load_requests(
        file, on_error, form=form, reading=reading, seed=seed, labels=labels, relation_prompts=relation_prompts
    )
    counts = _counts(requests)
    probes = _probes(requests)
    if as_json:
        print_json(
            {
                "file": str(file),
                "form": requests.form,
                "title": DATA_SETS[requests.form].title,
                "reading": reading,
                "counts": counts,
                "probes": [dict(zip(_PROBE_COLUMNS, row, strict=True)) for row in probes],
                "skipped": skipped_records(requests.skipped),
                "requests": [request.as_record() for request in requests[:count]],
            }
        )
        return
    say_skipped(requests.skipped, requests.total)
    as_read = f", read by {reading}" if reading else ""
    output.print(f"{file}: {requests.form} ({DATA_SETS[requests.form].title}){as_read}", markup=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, value in counts.items():
        if value:
            table.add_row(name.replace("_", " "), str(value))
    output.print(table)
    if probes:
        asked = Table(title="Probes", title_justify="left")
        for name in _PROBE_COLUMNS:
            asked.add_column(name, justify="right" if name in ("requests", "questions") else "left")
        for row in probes:
            asked.add_row(*(escape(str(cell)) for cell in row))
        output.print(asked)
    if count:
        output.print(_table(requests[:count]))


def _counts(requests: RequestList) -> dict[str, int]:
    """How many requests have what."""
    return {
        "requests": len(requests),
        "skipped": len(requests.skipped),
        "cases_of_several": len({request.group for request in requests if request.group is not None}),
        "with_a_subject": sum(request.subject is not None for request in requests),
        "with_the_true_answer": sum(request.target_true is not None for request in requests),
        "with_aliases": sum(bool(request.target_aliases or request.true_aliases) for request in requests),
        "with_a_relation": sum(request.relation is not None for request in requests),
        "relations": len({request.relation for request in requests if request.relation is not None}),
        "with_paraphrases": sum(bool(request.paraphrase_prompts) for request in requests),
        "with_neighbors": sum(bool(request.neighborhood_prompts) for request in requests),
        "with_prompts_to_continue": sum(bool(request.generation_prompts) for request in requests),
        "with_probes": sum(bool(request.probes) for request in requests),
    }


_PROBE_COLUMNS = ("kind", "name", "requests", "questions")


def _probes(requests: Sequence[EditRequest]) -> list[tuple[str, str, int, int]]:
    """Kind and name of each sort of probe, how many requests have it, and the number of its questions."""
    having: Counter[tuple[str, str]] = Counter()
    questions: Counter[tuple[str, str]] = Counter()
    for request in requests:
        having.update({(probe.kind, probe.name) for probe in request.probes})
        for probe in request.probes:
            questions[probe.kind, probe.name] += len(probe.questions)
    return [(kind, name, having[kind, name], questions[kind, name]) for kind, name in sorted(having)]


def _table(requests: Sequence[EditRequest]) -> Table:
    table = Table(title=f"The first {len(requests)}", title_justify="left")
    for name in ("id", "prompt", "subject", "target_new", "target_true", "also asked"):
        table.add_column(name, overflow="fold")
    for request in requests:
        texts: list[Any] = [request.id, request.prompt, request.subject, request.target_new, request.target_true]
        asked = Counter(
            {"paraphrases": len(request.paraphrase_prompts), "neighbors": len(request.neighborhood_prompts)}
        )
        for probe in request.probes:
            asked[probe.name or probe.kind] += len(probe.questions)
        also = ", ".join(f"{name} {number}" for name, number in asked.items() if number)
        table.add_row(*(escape(_short(text)) for text in texts), escape(also))
    return table


def _short(value: Any) -> str:
    """A value on one line, shortened; "-" for none."""
    text = "-" if value is None else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
