"""Where a model holds facts: tracing, logit lens, circuits and probes of some requests, as records and as files."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from kedit_fast.errors import InvalidArgumentError, KeditError, RequestError
from kedit_fast.locating.circuit import Circuit
from kedit_fast.locating.circuits import EdgeScores, Scoring, edge_scores
from kedit_fast.locating.faithfulness import Faithfulness, faithfulness
from kedit_fast.locating.linear_probes import LinearProbes, linear_probes
from kedit_fast.locating.logit_lens import LogitLens, Position, logit_lens
from kedit_fast.locating.metrics import Metric
from kedit_fast.locating.prompt_pairs import Answers, PromptPair, prompt_pairs
from kedit_fast.locating.pruning import greedy_edges, top_edges
from kedit_fast.locating.traced_prompts import prompts_of
from kedit_fast.locating.tracing import (
    KINDS,
    AverageEffects,
    LikelyLayers,
    Trace,
    average_effects,
    likely_layers,
    trace,
)
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.components import open_components
from kedit_fast.models.restoring import RestoredKind
from kedit_fast.models.view import ModelView
from kedit_fast.reports import locating_pictures as pictures
from kedit_fast.reports.circuit_comparison import CIRCUIT_EDGES, CircuitComparison, compare_circuits, pairs_to_compare
from kedit_fast.reports.search import named_layers
from kedit_fast.requests.problems import OnError, check_on_error, require_no_problems, skipped_records
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.reading import as_requests
from kedit_fast.requests.request import EditRequest
from kedit_fast.support import figures
from kedit_fast.support.files import new_folder, write_text
from kedit_fast.support.torch_state import plain_torch

Part = Literal["trace", "lens", "circuit", "probes"]
"""What can be asked: which states carry the answer, when it is there, through which edges, and when it can be read."""
PARTS: tuple[Part, ...] = get_args(Part)
Pruning = Literal["greedy", "top"]
"""How a circuit is chosen: from the logits down, or the edges of the largest scores."""
JSON_FILE = "locating.json"
FIRST: dict[Part, int] = {"trace": 16, "lens": 64, "circuit": 64}
"""Requests that a part takes where no number is given, the first ones; probes take all."""
WINDOW_SHARE, MOST_WINDOW = 0.2, 10
"""Layers whose MLPs or attention are restored together: this share of the depth, and at most the published 10."""
EDGES_SHARE, MOST_EDGES = 0.15, 5000
"""Edges of a circuit by default: this share of the graph's, and at most as many as KnowledgeCircuits keeps."""
TRACED = 16
"""Requests that `traced_layers` traces, at most."""


@dataclass(frozen=True)
class CircuitReport:
    """The circuit of some pairs of prompts, and how much of the model's answer it alone gives."""

    circuit: Circuit
    """Edges that were taken, after pruning."""
    scores: EdgeScores
    """Of all edges."""
    faithfulness: Faithfulness
    """Of the circuit: absent edges carry what the corrupted prompts give."""
    asked: int
    """Edges that were asked for; pruning drops those that lead nowhere."""
    pairs: tuple[PromptPair, ...]
    """The prompts."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON, edges as [source, target, score] with the largest |score| first."""
        scores, graph = self.scores, self.scores.graph
        return {
            "asked": self.asked,
            "edges": self.circuit.edge_count,
            "of": graph.edge_count,
            "nodes": list(self.circuit.nodes),
            "scoring": scores.scoring,
            "steps": scores.steps,
            "metric": scores.metric,
            "pairs": [pair.label for pair in self.pairs],
            "clean": self.faithfulness.clean,
            "corrupted": self.faithfulness.corrupted,
            "circuit": self.faithfulness.circuit,
            "faithfulness": self.faithfulness.value,
            "shares": shares_by_node(scores),
            "listed": [list(edge) for edge in self.circuit.listed()],
        }


@dataclass(frozen=True)
class Located:
    """Where some facts are in a model. Parts that were not asked for are empty."""

    requests: int
    """Requests that were given."""
    traces: tuple[Trace, ...] = ()
    """Of each request, a trace for each kind of state."""
    averages: tuple[AverageEffects, ...] = ()
    """Effects by groups of tokens, one for each kind of state."""
    likely: LikelyLayers | None = None
    """The layers that the trace speaks for, see `locating.tracing.likely_layers`."""
    lenses: tuple[LogitLens, ...] = ()
    """At the subject's last token, and at the last one."""
    circuit: CircuitReport | None = None
    """The edges that carry the answers."""
    probes: LinearProbes | None = None
    """Linear probes by layer."""
    comparison: CircuitComparison | None = None
    """Of the circuits before and after an edit, see `compare`."""
    skipped: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Part -> index of a request -> why it is not in that part."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Part -> seconds."""

    @property
    def window(self) -> int:
        """Layers whose MLPs or attention were restored together; 0 without a trace."""
        return max((one.window for one in self.averages), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it; parts that were not asked for are left out."""
        document: dict[str, Any] = {"requests": self.requests, "seconds": dict(self.seconds)}
        if self.averages:
            document["trace"] = {
                "likely": None if self.likely is None else plain_values(asdict(self.likely)),
                "averages": [plain_values(asdict(one)) for one in self.averages],
                "prompts": [plain_values(asdict(one)) for one in self.traces],
            }
        if self.lenses:
            document["lens"] = [plain_values(asdict(lens)) for lens in self.lenses]
        if self.circuit is not None:
            document["circuit"] = self.circuit.as_dict()
        if self.probes is not None:
            document["probes"] = {**plain_values(asdict(self.probes)), "from_layer": self.probes.from_layer}
        if self.comparison is not None:
            document["comparison"] = plain_values(self.comparison.as_record())
        document["skipped"] = {part: skipped_records(reasons) for part, reasons in self.skipped.items() if reasons}
        return document


def plain_values(value: Any) -> Any:
    """A value with tensors as lists, tuples as lists, and numbers that are not finite as None: what JSON holds."""
    if isinstance(value, torch.Tensor):
        return plain_values(value.double().tolist() if value.is_floating_point() else value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain_values(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def shares_by_node(scores: EdgeScores) -> dict[str, float]:
    """The share of all |score| that leaves the input, each layer's attention ("attn0") and MLP ("mlp0")."""
    sizes = scores.scores.double().abs().sum(1)
    total = float(sizes.sum())
    shares: dict[str, float] = {}
    for name, size in zip(scores.graph.sources, sizes.tolist(), strict=True):
        kind, layer = name[0], name.partition(".")[0][1:]
        node = name if name == "input" else f"{'attn' if kind == 'a' else 'mlp'}{layer}"
        shares[node] = shares.get(node, 0.0) + (size / total if total else 0.0)
    return shares


def window_of(num_layers: int) -> int:
    """The window that tracing restores by default: a fifth of the layers, and at most the published 10."""
    return min(MOST_WINDOW, max(1, round(WINDOW_SHARE * num_layers)))


@plain_torch()
def locate(
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    parts: Sequence[Part] = ("trace",),
    *,
    limit: int | None = None,
    kinds: Sequence[RestoredKind] = KINDS,
    window: int | None = None,
    samples: int = 10,
    noise: float | None = None,
    seed: int = 1,
    answers: Answers = "model",
    edges: int | None = None,
    pruning: Pruning = "greedy",
    scoring: Scoring = "eap-ig",
    steps: int = 5,
    metric: Metric = "logit-difference",
    prompt_format: PromptFormat | None = None,
    on_error: OnError = "raise",
    spec: ArchSpec | None = None,
    progress: bool = False,
) -> Located:
    """Say where a model holds the facts of some requests. No weight changes.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        requests: whose prompts are looked at; with "probes", as many of each relation as there are.
        parts: "trace" (causal tracing), "lens" (the logit lens), "circuit" (edge scores and the circuit that they
            choose), "probes" (linear probes by relation).
        limit: of trace, lens and circuit: use so many of the requests, the first ones; None for 16 in the trace and 64
            in the others. Probes, and other subjects for pairs, are taken from all.
        kinds, window, samples, noise, seed: of `locating.tracing.trace`; `window` None is a fifth of the layers.
        answers: of "lens" and "circuit": what the model says, or a request's target, which the model must say.
        edges: how many the circuit has before pruning; None for 15 %, and at most 5,000.
        pruning: "greedy" from the logits down, or "top" scores.
        scoring, steps, metric: of `locating.circuits.edge_scores`.
        prompt_format: from a prompt to the text that the model reads; None for the prompt itself.
        on_error: "raise" at requests that a part cannot use, or "skip" them; see `Located.skipped`.
        spec: an ArchSpec for an architecture that is not known.
        progress: show bars on stderr.

    Returns:
        what each part says.

    Raises:
        InvalidArgumentError: a part that there is not, or none.
        RequestError: no requests, or some that a part cannot use, named.
        UnsupportedModelError: a model whose attention cannot be opened, for "circuit".

    Cost: that of the parts; see `kedit_fast.locating`.
    """
    check_on_error(on_error)
    check_parts(parts)
    rows = list(as_requests(requests))
    if not rows:
        raise RequestError("no requests given: there is no fact to locate")
    view = ModelView(model, spec)
    seconds: dict[str, float] = {}
    skipped: dict[str, dict[int, str]] = {}
    result: dict[str, Any] = {}
    started = time.perf_counter()

    def took(part: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[part], started = now - started, now

    # What may refuse the requests comes first: nothing is computed for long and then lost.
    if "trace" in parts:
        traceable, skipped["trace"] = _traceable(
            view, tokenizer, rows[: limit or FIRST["trace"]], prompt_format, on_error
        )
    opened = open_components(view) if "circuit" in parts else None
    if {"lens", "circuit"} & set(parts):
        pairs = prompt_pairs(
            view,
            tokenizer,
            rows[: limit or FIRST["circuit"]],
            answers=answers,
            others=_subjects_by_relation(rows),
            seed=seed,
            prompt_format=prompt_format,
            on_error=on_error,
        )
        skipped["pairs"] = dict(pairs.skipped)
        took("pairs")
    if "probes" in parts:
        result["probes"] = linear_probes(
            model, tokenizer, rows, seed=seed, spec=spec, prompt_format=prompt_format, progress=progress
        )
        took("probes")
    if "lens" in parts:
        result["lenses"] = tuple(logit_lens(view, pairs, position) for position in get_args(Position))
        took("lens")
    if opened is not None:
        scores = edge_scores(opened, pairs, scoring=scoring, steps=steps, metric=metric, progress=progress)
        count = edges or edge_count_of(scores.graph.edge_count)
        chosen = (greedy_edges if pruning == "greedy" else top_edges)(scores, count)
        result["circuit"] = CircuitReport(
            chosen, scores, faithfulness(view, chosen, pairs, metric), count, tuple(pairs)
        )
        took("circuit")
    if "trace" in parts:
        with tqdm(total=len(traceable), desc="tracing", unit="prompt", disable=not progress) as bar:
            traced = trace(
                view,
                tokenizer,
                traceable,
                kinds=kinds,
                window=window or window_of(view.num_layers),
                samples=samples,
                noise=noise,
                seed=seed,
                prompt_format=prompt_format,
                progress=bar.update,
            )
        averages = averages_of(traced)
        spoken = next((one for one in averages if one.kind == "mlp"), averages[0])
        result |= {"traces": tuple(traced), "averages": averages, "likely": likely_layers(spoken)}
        took("trace")
    return Located(len(rows), **result, skipped=skipped, seconds=seconds)


def averages_of(traces: Sequence[Trace]) -> tuple[AverageEffects, ...]:
    """Average effects of each kind of state that was restored."""
    kinds = dict.fromkeys(one.kind for one in traces)
    return tuple(average_effects([one for one in traces if one.kind == kind]) for kind in kinds)


def by_prompt(traces: Sequence[Trace]) -> list[tuple[Trace, ...]]:
    """Traces of one prompt together, in the order of the prompts: a trace of the first kind begins each."""
    groups: list[list[Trace]] = []
    for one in traces:
        if not groups or one.kind == groups[-1][0].kind:
            groups.append([])
        groups[-1].append(one)
    return [tuple(group) for group in groups]


def _traceable(
    view: ModelView, tokenizer: Any, rows: Sequence[EditRequest], prompt_format: PromptFormat | None, on_error: OnError
) -> tuple[list[EditRequest], dict[int, str]]:
    """The requests that can be traced, and why the others cannot, by index."""
    prompts = prompts_of(tokenizer, rows, prompt_format, view.max_length, view.vocabulary)
    problems = {index: prompt for index, prompt in enumerate(prompts) if isinstance(prompt, str)}
    if on_error == "raise":
        require_no_problems(problems)
    if len(problems) == len(rows):
        require_no_problems(problems, "no request can be traced:")
    return [row for index, row in enumerate(rows) if index not in problems], problems


@plain_torch()
def compare(
    base: torch.nn.Module,
    edited: torch.nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    control: Sequence[EditRequest] = (),
    *,
    limit: int | None = None,
    edges: int | None = None,
    scoring: Scoring = "eap-ig",
    steps: int = 5,
    metric: Metric = "logit-difference",
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    spec: ArchSpec | None = None,
    progress: bool = False,
) -> tuple[CircuitComparison, dict[str, str]]:
    """What an edit changed in the circuit of the edited facts; see `reports.circuit_comparison`.

    Args:
        base: the model before its edits.
        edited: the edited model; both are in memory.
        tokenizer: of both.
        requests: what was edited.
        control: requests that were not edited: the control, and the subjects of corrupted prompts.
        limit: use so many of either, the first ones; None for 64.
        edges: of the circuits before pruning; None for 200.
        scoring, steps, metric, seed: of `compare_circuits`.
        prompt_format: from a prompt to the text that the model reads.
        spec: an ArchSpec for an architecture that is not known.
        progress: show each step on stderr.

    Returns:
        the comparison, and request -> why it has no pair.

    Raises:
        RequestError: no request whose edit came through, or fewer than 4.
        UnsupportedModelError: a model whose attention cannot be opened.
    """
    most = limit or FIRST["circuit"]
    pairs = pairs_to_compare(
        base,
        edited,
        tokenizer,
        requests[:most],
        control=control[:most],
        others=_subjects_by_relation(control),
        seed=seed,
        prompt_format=prompt_format,
        spec=spec,
    )
    with tqdm(bar_format="{desc}", disable=not progress, leave=False) as bar:
        comparison = compare_circuits(
            base,
            edited,
            pairs.before,
            pairs.after,
            pairs.control,
            circuit_edges=edges or CIRCUIT_EDGES,
            scoring=scoring,
            steps=steps,
            metric=metric,
            seed=seed,
            spec=spec,
            progress=bar.set_description_str,
        )
    return comparison, dict(pairs.skipped)


def check_parts(parts: Sequence[str]) -> None:
    """Raise InvalidArgumentError unless these are names of parts, and at least one."""
    wrong = [part for part in parts if part not in PARTS]
    if wrong or not parts:
        problem = repr(wrong[0]) if wrong else "none"
        raise InvalidArgumentError(f"parts = {problem}: choose of {', '.join(PARTS)}")


def edge_count_of(edge_count: int) -> int:
    """How many edges a circuit has by default, of a graph with so many."""
    return min(MOST_EDGES, max(1, round(EDGES_SHARE * edge_count)))


def _subjects_by_relation(rows: Sequence[EditRequest]) -> dict[str, list[str]]:
    """The subjects of all requests by relation, or by prompt: those of a few may have none with as many tokens."""
    subjects: dict[str, list[str]] = {}
    for row in rows:
        if row.subject:
            subjects.setdefault(row.relation or row.prompt, []).append(row.subject)
    return subjects


def save(
    located: Located,
    folder: str | os.PathLike,
    about: Mapping[str, Any],
    overwrite: bool = False,
    heat_maps: int = 8,
) -> list[str]:
    """Write `locating.json`, the circuit as JSON and Graphviz text, and pictures into a folder: all of them or nothing.

    Args:
        located: what to write.
        folder: where to; it appears when it is complete.
        about: what the file says of the run.
        overwrite: whether a folder that is there already is replaced.
        heat_maps: of the traces, how many requests get one each, the first ones.

    Returns:
        the names of the files. Pictures need matplotlib: without, there are none.

    Raises:
        KeditError: the folder exists or cannot be written.
    """
    document = {"about": plain_values(dict(about)), **located.as_dict()}
    with new_folder(folder, overwrite, KeditError) as work:
        write_text(work / JSON_FILE, json.dumps(document, ensure_ascii=False, indent=1) + "\n", KeditError)
        for name, circuit in _circuits(located).items():
            circuit.save(work / f"{name}.json")
            write_text(work / f"{name}.dot", circuit.to_dot(), KeditError)
            if shutil.which("dot"):
                circuit.draw(work / f"{name}.png")
        if figures.available():
            for name, figure in _figures(located, heat_maps):
                figures.save(figure, work / name)
        names = sorted(path.name for path in work.iterdir())
    return names


def _circuits(located: Located) -> dict[str, Circuit]:
    """File without suffix -> circuit."""
    circuits = {} if located.circuit is None else {"circuit": located.circuit.circuit}
    if located.comparison is not None:
        circuits |= {f"circuit_{name}": circuit for name, circuit in located.comparison.circuits.items()}
    return circuits


def _figures(located: Located, heat_maps: int) -> Iterator[tuple[str, Any]]:
    """File -> picture of everything that is there."""
    if located.averages:
        layers = () if located.likely is None else located.likely.layers
        yield "trace_averages.png", pictures.averages_figure(located.averages)
        yield "trace_by_layer.png", pictures.effects_figure(located.averages, layers)
        for number, traces in enumerate(by_prompt(located.traces)[:heat_maps], 1):
            yield f"trace_{number:03}.png", pictures.trace_figure(traces)
    for lens in located.lenses:
        yield f"lens_{lens.position}.png", pictures.lens_figure(lens)
    if located.circuit is not None:
        yield "circuit_shares.png", pictures.shares_figure({"all edges": shares_by_node(located.circuit.scores)})
    if located.comparison is not None:
        rows = located.comparison.shares
        shares = {"before": {row.name: row.before for row in rows}, "after": {row.name: row.after for row in rows}}
        edited = [row.name for row in rows if row.is_edited]
        yield "shares_before_after.png", pictures.shares_figure(shares, edited)
    if located.probes is not None:
        yield "probes.png", pictures.probes_figure(located.probes)


# For a search of hyper-parameters ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracedLayers(LikelyLayers):
    """The layers that a trace of some requests speaks for."""

    requests: int
    """Requests that were traced."""

    @property
    def sentence(self) -> str:
        """What the trace says, without a period."""
        low, high = self.interval
        effect = f"effect {self.effect:.2f} [{low:.2f}, {high:.2f}] at layer {self.peak}"
        if not self.layers:
            return f"the trace of {self.requests} requests speaks for no layer ({effect})"
        return f"the trace of {self.requests} requests speaks for {named_layers(self.layers)} ({effect})"


@plain_torch()
def traced_layers(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    most: int = TRACED,
    prompt_format: PromptFormat | None = None,
    spec: ArchSpec | None = None,
) -> TracedLayers:
    """Trace MLPs for some requests, and say for which layers the result speaks.

    Args:
        model: a causal language model, or its ModelView.
        tokenizer: its tokenizer.
        requests: with subjects; those that cannot be traced are left out.
        most: trace at most so many, the first ones.
        prompt_format: from a prompt to the text that the model reads.
        spec: an ArchSpec for an architecture that is not known.

    Raises:
        RequestError: none of them can be traced.
        UnsupportedModelError: outputs of the MLPs cannot be seen.
    """
    view = model if isinstance(model, ModelView) else ModelView(model, spec)
    usable, _ = _traceable(view, tokenizer, requests[:most], prompt_format, "skip")
    traces = trace(
        view, tokenizer, usable, kinds=("mlp",), window=window_of(view.num_layers), prompt_format=prompt_format
    )
    likely = likely_layers(average_effects(traces))
    return TracedLayers(**vars(likely), requests=len(usable))
