"""What an evaluation measured, as files: JSON, CSV, pictures, and one page that needs nothing but a browser."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from textwrap import shorten
from typing import Any

import torch
import transformers

from kedit_fast._version import __version__
from kedit_fast.errors import KeditError
from kedit_fast.evaluation.asks import ForcedAnswer, GeneratedAnswer
from kedit_fast.evaluation.metric import Derived, Measured, Metric, State
from kedit_fast.evaluation.registry import DEFINITIONS
from kedit_fast.evaluation.results import CaseScore, Evaluation, RecordScore, Result
from kedit_fast.evaluation.sequences import Retention
from kedit_fast.requests.request import EditRequest
from kedit_fast.support import figures
from kedit_fast.support.files import new_folder, write_text

TITLES: dict[State, str] = {
    "pre": "before",
    "context": "in context",
    "first": "after the group's first edit",
    "post": "after its batch",
    "final": "after",
}
"""State -> what tables call it."""


def titles(states: Sequence[State]) -> dict[State, str]:
    """The titles of an evaluation's states; of a model that is measured alone, "now"."""
    return {state: "now" if states == ("final",) else TITLES[state] for state in states}


PICTURE = "metrics.png"
ROWS = 1000
"""Most requests in the page's table; the files have all."""
LEAST = 0.005
"""A smaller loss of a score is none."""
LONGEST = 120
"""Characters of what the model says, in the page."""
REGRESSIONS = 20
"""Most regressions in the page."""


@dataclass(frozen=True)
class Regression:
    """A prompt that a metric scores worse after the edits than before."""

    metrics: tuple[str, ...]
    """Ids of all metrics that do, the largest loss first."""
    record: str
    """The request's id, or its prompt."""
    prompt: str
    new: str | None
    """The answer that the edit brings."""
    true: str | None
    """The answer before the edit, or the one to preserve."""
    loss: float
    """The largest loss of a score, see `loss_of`."""
    before: float
    """The score of the first metric before the edits, not scaled."""
    after: float
    """And after them."""
    says_before: str
    """What the unedited model says."""
    says_after: str
    """What the edited one says."""


def loss_of(before: float, after: float, better: str) -> float:
    """How much worse a score has become: absolute of scores in [-1, 1], else relative; 0 where no value is better.

    A loss below LEAST is none.
    """
    change = {"higher": before - after, "lower": after - before}.get(better, 0.0)
    loss = change / max(1.0, abs(before), abs(after))
    return loss if loss >= LEAST else 0.0


def regressions(evaluation: Evaluation, tokenizer: Any, limit: int = REGRESSIONS) -> list[Regression]:
    """The prompts that lost most, the worst first; each once, with all metrics that say so.

    Args:
        evaluation: with the states "pre" and "final"; without, there are none.
        tokenizer: of the model, for what it said.
        limit: how many.
    """
    losses: dict[tuple[str, str], list[tuple[float, str, RecordScore, CaseScore]]] = {}
    for id, records in evaluation.scores.items():
        better = evaluation.metrics[id].metric.better
        if id.partition("/")[0].endswith(".published"):  # known to be wrong
            continue
        for record in records:
            for one in record.cases:
                if not isinstance(one.case.record, EditRequest) or not {"pre", "final"} <= one.scores.keys():
                    continue
                loss = loss_of(one.scores["pre"], one.scores["final"], better)
                if loss > 0:
                    losses.setdefault((record.name, one.case.prompt), []).append((loss, id, record, one))
    worst = []
    for losing in losses.values():
        losing.sort(key=lambda entry: -entry[0])
        worst.append((losing[0][0], len(losing), losing))
    worst.sort(key=lambda entry: (-entry[0], -entry[1]))
    result = []
    for loss, _, losing in worst[:limit]:
        _, _, record, one = losing[0]
        said = next((c for _, _, _, c in losing if _said(c, "final", tokenizer)), one)
        result.append(
            Regression(
                tuple(id for _, id, _, _ in losing),
                record.name,
                one.case.prompt,
                one.case.new,
                one.case.true,
                loss,
                one.scores["pre"],
                one.scores["final"],
                _said(said, "pre", tokenizer),
                _said(said, "final", tokenizer),
            )
        )
    return result


def _said(one: CaseScore, state: State, tokenizer: Any) -> str:
    """The generated text, or the most probable token at each place of the answer that was fed."""
    answers = one.answers.get(state, ())
    for answer in answers:
        if isinstance(answer, GeneratedAnswer):
            return shorten(answer.text, LONGEST, placeholder=" ...")
    forced = [answer for answer in answers if isinstance(answer, ForcedAnswer)]
    if not forced:
        return ""
    said = next((answer for answer in forced if all(answer.hits)), forced[0])
    return tokenizer.decode(list(said.top)).strip()


def number(value: float | None, scale: float = 1.0) -> str:
    """A value as tables show it: one decimal of percents and of 10 or more, else three."""
    if value is None:
        return ""
    if abs(value) >= 1e5:
        return f"{value:.3g}"
    text = f"{value:,.1f}" if scale >= 100 or abs(value) >= 10 else f"{value:.3f}"
    return text if float(text.replace(",", "")) else text.removeprefix("-")


def interval(measured: Measured | None, scale: float = 1.0) -> str:
    """A 95 % interval as tables show it."""
    if measured is None or measured.interval is None:
        return ""
    return " to ".join(number(limit, scale) for limit in measured.interval)


def provenance() -> dict[str, str]:
    """Versions of what measured, and the commit where the package runs in its repository: entries of `about`."""
    versions = {"kedit_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    entries = {
        "definitions": f"version {DEFINITIONS}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        entries["commit"] = subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip()
    return {name: text for name, text in entries.items() if text}


# Files ---------------------------------------------------------------------------------------------------------------


def save(
    evaluation: Evaluation,
    tokenizer: Any,
    folder: str | os.PathLike,
    about: Mapping[str, Any],
    overwrite: bool = False,
    retention: Retention | None = None,
) -> list[str]:
    """Write `evaluation.json`, `requests.csv`, `report.html` and pictures into a folder, all of them or nothing.

    Args:
        evaluation: what was measured.
        tokenizer: of the model, for what it said.
        folder: where to; it appears when it is complete.
        about: what the page says of the run: name -> text, number, or list of them.
        overwrite: whether a folder that is there already is replaced.
        retention: of a sequence of batches.

    Returns:
        the names of the files. Pictures need matplotlib: without, there are none.

    Raises:
        KeditError: the folder exists or cannot be written, or a file is read back as something else.
    """
    document = {"about": dict(about), **evaluation.as_dict(records=True)}
    if retention is not None:
        document["retention"] = retention.as_dict()
    with new_folder(folder, overwrite, KeditError) as work:
        write_text(work / "evaluation.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n", KeditError)
        write_text(work / "requests.csv", csv_of(evaluation), KeditError)
        write_text(work / "report.html", page_of(evaluation, tokenizer, about, retention), KeditError)
        if figures.available():
            figures.save(figure_of(evaluation), work / PICTURE)
            if retention is not None:
                figures.save(retention_figure(retention), work / "retention.png")
        names = sorted(path.name for path in work.iterdir())
    return names


def csv_of(evaluation: Evaluation) -> str:
    """One line for each prompt and metric: the fields of `Evaluation.rows`; None is an empty cell."""
    text = io.StringIO()
    writer: Any = None
    for row in evaluation.rows():
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()


# The picture ---------------------------------------------------------------------------------------------------------

_COLORS: dict[State, str] = {
    "pre": "0.55",
    "context": "#a3680a",
    "first": "#1a7f37",
    "post": "#6a51a3",
    "final": "#0b61c4",
}


def figure_of(evaluation: Evaluation) -> Any:
    """Shares and percents with their intervals in each state, a panel for each. Needs matplotlib."""
    panels: dict[str, list[str]] = {"percent": [], "share": []}
    for id, one in evaluation.metrics.items():
        low, high = _reach(one, scale := scale_of(evaluation, id))
        if scale == 1 and not getattr(one.metric, "share", True):  # nats and the like stand in the table alone
            continue
        if any(measured.value is not None for measured in one.states.values()) and -scale <= low and high <= scale:
            panels["percent" if scale == 100 else "share"].append(id)
    panels = {title: ids for title, ids in panels.items() if ids}
    rows = max((len(ids) for ids in panels.values()), default=1)
    figure, axes = figures.figure(max(1, len(panels)), 6.4, 1.3 + 0.34 * rows)
    states = evaluation.states
    for place, (title, ids) in enumerate(panels.items()):
        for row, id in enumerate(ids):
            for index, state in enumerate(states):
                measured = evaluation.metrics[id].states.get(state)
                if measured is None or measured.value is None:
                    continue
                y = row + 0.22 * (index - (len(states) - 1) / 2)
                limits = measured.interval or (measured.value, measured.value)
                axes[place].plot(limits, (y, y), color=_COLORS[state], linewidth=2)
                axes[place].plot([measured.value], [y], "o", color=_COLORS[state], markersize=4)
        axes[place].set_yticks(range(len(ids)), ids, fontsize=7)
        axes[place].set_ylim(rows - 0.4, -0.6)
        axes[place].set_xlabel(title)
        axes[place].grid(axis="x", alpha=0.3)
    for state in states:
        axes[0].plot([], [], "o-", color=_COLORS[state], label=TITLES[state])
    if states:
        figures.legend_beside(figure, axes[0])
    return figure


def retention_figure(retention: Retention) -> Any:
    """The score of each batch right after it and on the final model. Needs matplotlib."""
    figure, (axes,) = figures.figure()
    batches = [one.batch for one in retention.curve]
    scores: dict[State, list[float]] = {
        "post": [one.after_batch for one in retention.curve],
        "final": [one.final for one in retention.curve],
    }
    for state, values in scores.items():
        axes.plot(batches, values, "o-", markersize=3, color=_COLORS[state], label=TITLES[state])
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("batch")
    axes.set_ylabel(retention.metric)
    figures.legend_beside(figure, axes)
    return figure


# The page ------------------------------------------------------------------------------------------------------------


def page_of(
    evaluation: Evaluation, tokenizer: Any, about: Mapping[str, Any], retention: Retention | None = None
) -> str:
    """The page as text: HTML with its style and script inside; it fetches nothing.

    Args:
        evaluation: what was measured.
        tokenizer: of the model, for what it said.
        about: name -> text, number, or list of them; "title" is the heading.
        retention: of a sequence of batches.
    """
    template = Template(Path(__file__).with_name("evaluation.html").read_text(encoding="utf-8"))
    states = evaluation.states
    title = str(about.get("title", "Evaluation"))
    rows, note, columns = _requests(evaluation)
    return template.substitute(
        title=escape(title),
        about="\n".join(_entries({name: value for name, value in about.items() if name != "title"})),
        legend=_legend(states),
        metric_heads="".join(
            f'<th class="number">{escape(text)}</th>' if text not in ("metric", "") else f"<th>{escape(text)}</th>"
            for text in ("metric", "", *titles(states).values(), "95 %, " + titles(states)[states[-1]], "n")
        )
        if states
        else "<th>metric</th>",
        metric_rows="\n".join(
            _metric_row(id, one, states, scale_of(evaluation, id)) for id, one in evaluation.metrics.items()
        ),
        curves="" if retention is None else _curve(retention),
        regressions=_regressions(evaluation, tokenizer),
        requests_note=escape(note),
        request_heads="<th>request</th>" + "".join(f"<th>{_breakable(id)}</th>" for id in columns),
        request_rows="\n".join(rows),
    )


def _entries(pairs: Mapping[str, Any]) -> Iterator[str]:
    for name, value in pairs.items():
        if value is None or value == [] or value == "":
            continue
        texts = value if isinstance(value, (list, tuple)) else [value]
        text = "<br>".join(escape(f"{each:,}" if isinstance(each, int) else str(each)) for each in texts)
        yield f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{text}</dd>"


def _breakable(id: str) -> str:
    """An id that may be broken behind its points and its slash."""
    return escape(id).replace("/", "/<wbr>").replace(".", ".<wbr>")


def _legend(states: Sequence[State]) -> str:
    marks = " &ensp; ".join(
        f'<span class="dot {state}"></span>{escape(title)}' for state, title in titles(states).items()
    )
    return f'<p class="faint">{marks} &ensp; lines: 95 % intervals; n: records that count (prompts)</p>'


def _metric_row(id: str, one: Result, states: Sequence[State], scale: float) -> str:
    last = one.states.get(states[-1]) if states else None
    cells = [
        f'<th><span class="id">{escape(id)}</span><small>{escape(one.metric.definition)}</small></th>',
        f"<td>{_bars(one, states, scale)}</td>",
        *(
            f'<td class="number" data-label="{escape(title)}">{number(_value(one, state), scale)}</td>'
            for state, title in titles(states).items()
        ),
    ]
    if one.reason:
        cells.append(f'<td colspan="2"><small>{escape(one.reason)}</small></td>')
    else:
        count = "" if last is None else f"{last.records:,} ({last.prompts:,})" if last.records else "none"
        cells.append(f'<td class="number" data-label="95 %">{interval(last, scale)}</td>')
        cells.append(f'<td class="number" data-label="n">{count}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _value(one: Result, state: State) -> float | None:
    measured = one.states.get(state)
    return None if measured is None else measured.value


def scale_of(evaluation: Evaluation, id: str) -> float:
    """The factor of a metric's values; of one derived from others, theirs: 100 for percent."""
    metric = evaluation.metrics[id].metric
    if isinstance(metric, Derived):
        return metric.scale * max(scale_of(evaluation, part) for part in metric.of)
    return metric.scale


def _reach(one: Result, scale: float) -> tuple[float, float]:
    """The axis of a metric's bars: 0 to its scale where everything lies in there, else as far as it reaches."""
    values = [v for m in one.states.values() if m.value is not None for v in (m.value, *(m.interval or ()))]
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, scale if high <= scale else high * 1.05


WIDTH, HEIGHT = 150, 9  # of the bars of one metric; of each bar


def _bars(one: Result, states: Sequence[State], scale: float) -> str:
    """A small picture: a dot for each state on an axis, with its interval."""
    low, high = _reach(one, scale)

    def x(value: float) -> float:
        return round(4 + (WIDTH - 8) * (value - low) / ((high - low) or 1.0), 1)

    parts, texts = [f'<line class="axis" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{HEIGHT * len(states)}"/>'], []
    for place, state in enumerate(states):
        measured = one.states.get(state)
        if measured is None or measured.value is None:
            continue
        y = HEIGHT * place + HEIGHT / 2
        parts.append(f'<line class="axis" x1="4" x2="{WIDTH - 4}" y1="{y}" y2="{y}"/>')
        if measured.interval is not None:
            begin, end = (x(limit) for limit in measured.interval)
            parts.append(f'<line class="{state}" x1="{begin}" x2="{end}" y1="{y}" y2="{y}" stroke-width="3"/>')
        parts.append(f'<circle class="{state}" cx="{x(measured.value)}" cy="{y}" r="3.2"/>')
        texts.append(f"{TITLES[state]} {number(measured.value, scale)}")
    if not texts:
        return ""
    size = f'width="{WIDTH}" height="{HEIGHT * len(states)}" viewBox="0 0 {WIDTH} {HEIGHT * len(states)}"'
    return f'<svg class="bars" {size} role="img" aria-label="{escape(", ".join(texts))}">{"".join(parts)}</svg>'


def _curve(retention: Retention) -> str:
    """The section of a retention curve: right after each batch, and on the final model."""
    width, height, left, bottom = 480, 200, 36, 24
    last = max((one.batch for one in retention.curve), default=1)

    def point(batch: int, score: float) -> str:
        x = left + (width - left - 8) * ((batch - 1) / (last - 1) if last > 1 else 0.5)
        return f"{x:.1f},{8 + (height - bottom - 8) * (1 - score):.1f}"

    parts = []
    for score in (0.0, 0.5, 1.0):
        y = point(1, score).split(",")[1]
        parts.append(f'<line class="axis" x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{score:g}</text>')
    for batch, anchor in {last: "end", 1: "start"}.items():
        x = point(batch, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">batch {batch}</text>')
    for state, scores in (
        ("post", [(one.batch, one.after_batch) for one in retention.curve]),
        ("final", [(one.batch, one.final) for one in retention.curve]),
    ):
        parts.append(f'<polyline class="{state} curve" points="{" ".join(point(*pair) for pair in scores)}"/>')
        for pair in scores:
            x, y = point(*pair).split(",")
            parts.append(f'<circle class="{state}" cx="{x}" cy="{y}" r="2.5"/>')
    shares = "; ".join(
        f"{name} {number(share)}"
        for name, share in (("kept", retention.retained), ("forgetting", retention.forgetting))
        if share is not None
    )
    marks = " &ensp; ".join(f'<span class="dot {state}"></span>{TITLES[state]}' for state in ("post", "final"))
    text = f"{escape(retention.metric)} of {retention.batches} batches: {shares}"
    return (
        f'<section id="retention"><h2>Retention</h2><p>{text}</p><p class="faint">{marks}</p>'
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{text}">'
        f"{''.join(parts)}</svg></section>"
    )


def _regressions(evaluation: Evaluation, tokenizer: Any) -> str:
    if not {"pre", "final"} <= set(evaluation.states):
        return ""
    rows = []
    for one in regressions(evaluation, tokenizer):
        wanted = [f"{name}: {text.strip()}" for name, text in (("new", one.new), ("true", one.true)) if text]
        id, *others = one.metrics
        scale = scale_of(evaluation, id)
        scores = f"{number(one.before * scale, scale)} → {number(one.after * scale, scale)}"
        more = f" and {len(others)} more" if others else ""
        rows.append(
            f"<tr><th>{escape(one.prompt)}<small>{escape('; '.join(wanted))}</small></th>"
            f'<td data-label="says before">{escape(one.says_before)}</td>'
            f'<td data-label="says after"><span class="worse">{escape(one.says_after)}</span></td>'
            f'<td data-label="score"><span>{scores}<small class="id">'
            f"{escape(id + more)}</small></span></td>"
            "</tr>"
        )
    body = "<p>No prompt scores worse than before.</p>"
    if rows:
        heads = "<th>prompt</th><th>says before</th><th>says after</th><th>score</th>"
        body = (
            '<p class="faint">What the model says: the text that it generates, or the most probable token at each '
            "place of the answer that the metric feeds.</p>"
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n'
            + "\n".join(rows)
            + "\n</tbody></table></div>"
        )
    return f'<section id="regressions"><h2>Worst regressions</h2>{body}</section>'


def _requests(evaluation: Evaluation) -> tuple[list[str], str, list[str]]:
    """Rows of the table of requests, a line about them, and the ids of its columns."""
    requests: dict[int, EditRequest] = {}
    scores: dict[int, dict[str, RecordScore]] = {}
    columns = []
    for id, records in evaluation.scores.items():
        for record in records:
            first = record.cases[0].case.record if record.cases else None
            if isinstance(first, EditRequest):
                requests.setdefault(record.number, first)
                scores.setdefault(record.number, {})[id] = record
                if columns[-1:] != [id]:
                    columns.append(id)
    losses = {index: _worst_loss(evaluation, by_metric) for index, by_metric in scores.items()}
    chosen = sorted(scores, key=lambda index: (-losses[index], index))[:ROWS]
    rows = []
    for index in sorted(chosen):
        request, cells = requests[index], []
        for id in columns:
            cells.append(_score_cell(id, evaluation.metrics[id], scores[index].get(id), evaluation.states))
        name = f"{index}" if request.id is None else f"{index}, id {request.id}"
        mark = " data-worse" if losses[index] > 0 else ""
        head = f"{escape(request.text)} → {escape(request.target_new.strip())}<small>{escape(name)}</small>"
        rows.append(f"<tr{mark}><th>{head}</th>{''.join(cells)}</tr>")
    note = f"{len(scores):,} requests; scores before → after."
    if len(scores) > ROWS:
        note = f"The {ROWS:,} of {len(scores):,} requests that lost most; requests.csv has all. Scores before → after."
    return rows, note, columns


def _worst_loss(evaluation: Evaluation, records: Mapping[str, RecordScore]) -> float:
    return max(_losses(evaluation, records), default=0.0)


def _losses(evaluation: Evaluation, records: Mapping[str, RecordScore]) -> Iterable[float]:
    for id, record in records.items():
        if {"pre", "final"} <= record.scores.keys():
            yield loss_of(record.scores["pre"], record.scores["final"], evaluation.metrics[id].metric.better)


def _score_cell(id: str, one: Result, record: RecordScore | None, states: Sequence[State]) -> str:
    if record is None or not record.scores or not isinstance(one.metric, Metric):
        return "<td></td>"
    scale = one.metric.scale
    texts = [number(record.scores[state] * scale, scale) for state in states if state in record.scores]
    style = ""
    if {"pre", "final"} <= record.scores.keys():
        before, after = record.scores["pre"], record.scores["final"]
        if loss_of(before, after, one.metric.better) > 0:
            style = ' class="worse"'
        elif loss_of(after, before, one.metric.better) > 0:
            style = ' class="better"'
    return f'<td data-label="{escape(id)}"><span{style}>{" → ".join(texts)}</span></td>'
