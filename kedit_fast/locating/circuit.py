"""A circuit: some edges of a model's graph, with their scores; as JSON, as Graphviz text, as a picture."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError, KeditError
from kedit_fast.locating.graph import Graph
from kedit_fast.support.files import replacing, write_text
from kedit_fast.support.messages import first_line
from kedit_fast.support.textfiles import Repeated, parse_json, read_text

FORMAT = "kedit-fast circuit"
VERSION = 1
POSITIVE, NEGATIVE = "#2166ac", "#b2182b"
"""Colors of edges whose corruption raises the loss (they help the answer), and of those that it lowers."""
PICTURES = (".png", ".svg", ".pdf")
_NAMES = ("format", "version", "about", "graph", "edges")
_WIDEST, _THINNEST = 4.0, 0.4  # points, of the edge with the largest |score| and of one with none
_DRAW_SECONDS = 600
_LARGEST = torch.finfo(torch.float32).max
_MOST = 1024  # layers, and heads of a layer, that a file may have


def node_of(target: str) -> str:
    """The node that an input belongs to: "a0.h1" of "a0.h1<q>"."""
    return target.partition("<")[0]


def nodes_of_targets(graph: Graph) -> torch.Tensor:
    """For each target [V] int64 the index of its node among the sources; their count F for the logits."""
    owners = (graph.source_of(target) for target in range(len(graph.targets)))
    return torch.tensor([len(graph.sources) if owner is None else owner for owner in owners], device="cpu")


def require_graph(expected: Graph, given: Graph, owner: str) -> None:
    """Raise InvalidArgumentError where something is of another graph than the model's."""
    if expected != given:
        raise InvalidArgumentError(
            f"{owner} belongs to another model: its graph is {_words(given)}, and the model's is {_words(expected)}"
        )


def _words(graph: Graph) -> str:
    values = asdict(graph)
    return ", ".join(f"{name} = {value}" for name, value in values.items())


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of a graph, each from the output of a node to an input of a later one.

    Raises:
        InvalidArgumentError: edges or scores of another shape than the graph's, an edge that the graph does not have,
            or the score of an edge that is not finite, named.

    Example:
        >>> from kedit_fast.locating.circuits import edge_scores
        >>> from kedit_fast.locating.pruning import greedy_edges
        >>> from kedit_fast.locating.prompt_pairs import prompt_pairs
        >>> pairs = prompt_pairs(model, tokenizer, requests, on_error="skip")
        >>> circuit = greedy_edges(edge_scores(model, pairs), 30)
        >>> circuit.nodes[0], circuit.nodes[-1]
        ('input', 'logits')
    """

    graph: Graph
    """Of which model's nodes and edges it is a part."""
    edges: torch.Tensor
    """[F, V] bool, which edges are in the circuit; on the CPU."""
    scores: torch.Tensor
    """[F, V] fp32, the scores of its edges, and 0 elsewhere; on the CPU."""
    about: str = ""
    """Whose circuit it is and how it was chosen, as files and pictures say."""

    def __post_init__(self):
        shape = tuple(self.graph.mask.shape)
        for name, dtype in (("edges", "bool"), ("scores", "a float dtype")):
            tensor = getattr(self, name)
            fits = isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == shape
            if not fits or (tensor.dtype == torch.bool) != (name == "edges") or tensor.is_complex():
                got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else repr(tensor)[:40]
                raise InvalidArgumentError(f"{name} of a circuit must be {dtype} {list(shape)}; got {got}")
        edges, mask = self.edges.detach().to("cpu", copy=True), self.graph.mask
        scores = self.scores.detach().to("cpu", torch.float32).where(edges, 0.0)
        if bool((edges & ~mask).any()):
            raise InvalidArgumentError(f"the graph has no edge {self._first(edges & ~mask)}")
        if bool((~torch.isfinite(scores)).any()):
            raise InvalidArgumentError(f"the score of {self._first(~torch.isfinite(scores))} is not finite")
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "scores", scores)

    def _first(self, where: torch.Tensor) -> str:
        source, target = torch.nonzero(where)[0].tolist()
        return f"{self.graph.sources[source]} -> {self.graph.targets[target]}"

    @property
    def edge_count(self) -> int:
        """Number of its edges."""
        return int(self.edges.sum())

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes at either end of its edges, in the order of the model: "input" first, "logits" last."""
        at = nodes_of_targets(self.graph)
        present = torch.zeros(len(self.graph.sources) + 1, dtype=torch.bool, device="cpu")
        present[:-1] = self.edges.any(1)
        present[at[self.edges.any(0)]] = True
        names = (*self.graph.sources, self.graph.targets[-1])
        return tuple(name for name, is_in in zip(names, present.tolist(), strict=True) if is_in)

    def listed(self) -> list[tuple[str, str, float]]:
        """Its edges as (source, target, score), the largest |score| first."""
        places = torch.nonzero(self.edges)
        scores = self.scores[places[:, 0], places[:, 1]]
        order = torch.argsort(scores.abs(), descending=True, stable=True)
        sources, targets = self.graph.sources, self.graph.targets
        rows = zip(places[order].tolist(), scores[order].tolist(), strict=True)
        return [(sources[source], targets[target], score) for (source, target), score in rows]

    def save(self, path: str | os.PathLike) -> None:
        """Write the circuit as JSON, which `load` reads; the file is there whole or not at all.

        Raises:
            InvalidArgumentError: the file cannot be written.
        """
        head = {"format": FORMAT, "version": VERSION, "about": self.about, "graph": asdict(self.graph)}
        lines = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        edges = ",\n  ".join(json.dumps(edge) for edge in self.listed())
        write_text(path, f'{lines},\n "edges": [\n  {edges}\n ]\n}}\n', InvalidArgumentError)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Circuit:
        """The circuit that `save` wrote.

        Raises:
            InvalidArgumentError: the file cannot be read, is no JSON, has another format or version, a name too few,
                too many or twice, a graph that is none, an edge that the graph does not have or has twice, or a score
                that is no finite number; the message names the file and the place.
        """
        record = _object(parse_json(read_text(path, InvalidArgumentError), str(path), InvalidArgumentError), path, "it")
        if record.get("format") != FORMAT or record.get("version") != VERSION:
            raise InvalidArgumentError(
                f"{path} is no circuit of version {VERSION}: its format is {record.get('format')!r}, version "
                f"{record.get('version')!r}; expected {FORMAT!r}, as Circuit.save writes it"
            )
        if set(record) != set(_NAMES) or not isinstance(record["about"], str) or not isinstance(record["edges"], list):
            raise InvalidArgumentError(f"{path} must have {', '.join(_NAMES)}; it has {', '.join(record)}")
        graph = _graph(record["graph"], path)
        sources = {name: place for place, name in enumerate(graph.sources)}
        targets = {name: place for place, name in enumerate(graph.targets)}
        edges = torch.zeros(len(sources), len(targets), dtype=torch.bool, device="cpu")
        scores = torch.zeros(len(sources), len(targets), dtype=torch.float32, device="cpu")
        for number, edge in enumerate(record["edges"], 1):
            where = f"{path}: edge {number}"
            if not isinstance(edge, list) or len(edge) != 3 or not all(isinstance(name, str) for name in edge[:2]):
                raise InvalidArgumentError(f"{where} must be [source, target, score]; got {json.dumps(edge)[:80]}")
            source, target = sources.get(edge[0]), targets.get(edge[1])
            if source is None or target is None or not bool(graph.mask[source, target]):
                raise InvalidArgumentError(f"{where}: its graph has no edge {edge[0]} -> {edge[1]}")
            if isinstance(edge[2], bool) or not isinstance(edge[2], int | float) or not abs(edge[2]) <= _LARGEST:
                raise InvalidArgumentError(f"{where}: the score of {edge[0]} -> {edge[1]} must be a finite number")
            if edges[source, target]:
                raise InvalidArgumentError(f"{where}: {edge[0]} -> {edge[1]} is there twice")
            edges[source, target], scores[source, target] = True, edge[2]
        return cls(graph, edges, scores, record["about"])

    def to_dot(self, largest: int | None = None) -> str:
        """The circuit as Graphviz text: nodes ranked by layer, input at the bottom; edges colored by sign.

        Blue edges have positive scores (corrupting them raises the loss), red ones negative; |score| is the width.

        Args:
            largest: draw only so many edges, those with the largest |score|; None for all.

        Raises:
            InvalidArgumentError: `largest` is not positive.

        Example:
            >>> from kedit_fast.locating.graph import Graph
            >>> graph = Graph(layers=1, heads=2)
            >>> Circuit(graph, graph.mask, torch.ones(graph.mask.shape)).to_dot().startswith("digraph")
            True
        """
        if largest is not None and (isinstance(largest, bool) or not isinstance(largest, int) or largest < 1):
            raise InvalidArgumentError(f"largest = {largest!r}: draw at least one edge, or None for all")
        edges = self.listed()[:largest]
        top = max((abs(score) for _, _, score in edges), default=0.0) or 1.0
        present = {name for source, target, _ in edges for name in (source, node_of(target))}
        order = [name for name in (*self.graph.sources, self.graph.targets[-1]) if name in present]
        lines = [
            "digraph circuit {",
            f"  label={_quoted(self.about)};",
            "  rankdir=BT; ranksep=0.6; splines=true;",
            '  node [shape=box, style="rounded,filled", fillcolor="#f7f7f7", fontname="Helvetica", fontsize=11];',
            '  edge [fontname="Helvetica", fontsize=8, arrowsize=0.6];',
        ]
        ranks: dict[str, list[str]] = {}
        for name in order:
            ranks.setdefault(name.partition(".")[0], []).append(name)
        for names in ranks.values():
            lines.append(f"  {{ rank=same; {' '.join(_quoted(name) + ';' for name in names)} }}")
        heads = [names[0] for names in ranks.values()]
        # Nodes of a layer that nothing connects to the one below would else be drawn at the bottom.
        lines += [
            f"  {_quoted(below)} -> {_quoted(above)} [style=invis];" for below, above in itertools.pairwise(heads)
        ]
        for source, target, score in edges:
            part = target.partition("<")[2].rstrip(">")
            width = _THINNEST + (_WIDEST - _THINNEST) * abs(score) / top
            color = NEGATIVE if score < 0 else POSITIVE
            lines.append(
                f"  {_quoted(source)} -> {_quoted(node_of(target))} [color={_quoted(color)}, "
                f"penwidth={width:.2f}, tooltip={_quoted(f'{source} -> {target}: {score:.4g}')}"
                + (f", label={_quoted(part)}];" if part else "];")
            )
        return "\n".join([*lines, "}", ""])

    def draw(self, path: str | os.PathLike, largest: int | None = None) -> None:
        """Draw the circuit with the program `dot` of Graphviz; the .dot text is written beside the picture.

        Args:
            path: of the picture: .png, .svg or .pdf.
            largest: see `to_dot`.

        Raises:
            InvalidArgumentError: another ending, or a file that cannot be written.
            KeditError: there is no `dot`, or it fails; the .dot file is there.
        """
        path = Path(path)
        if path.suffix.lower() not in PICTURES:
            raise InvalidArgumentError(f"cannot draw {path}: a picture's name ends in {', '.join(PICTURES)}")
        text = path.with_suffix(".dot")
        write_text(text, self.to_dot(largest), InvalidArgumentError)
        program = shutil.which("dot")
        if program is None:
            raise KeditError(
                f"cannot draw {path}: Graphviz's program dot is not on the path. Install it (apt install graphviz, "
                f"brew install graphviz, conda install graphviz); the graph is in {text}, and dot -T"
                f"{path.suffix[1:].lower()} draws it"
            )
        with replacing(path, InvalidArgumentError) as part:
            command = [program, f"-T{path.suffix[1:].lower()}", "-o", str(part), str(text)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_DRAW_SECONDS, check=False)
            except (OSError, subprocess.TimeoutExpired) as cause:
                raise KeditError(f"dot does not draw {text} ({first_line(cause)}): draw fewer edges") from cause
            if done.returncode or not part.stat().st_size:
                said = (done.stderr.strip().splitlines() or ["it wrote nothing"])[0]
                raise KeditError(f"dot does not draw {text}: {said}")


def _quoted(text: str) -> str:
    """A text as Graphviz reads it between quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _object(value: Any, path: str | os.PathLike, part: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{path}: {part} must be one JSON object; got {type(value).__name__}")
    if isinstance(value, Repeated):
        raise InvalidArgumentError(f"{path}: {part} has {value.names[0]!r} twice")
    return value


def _graph(value: Any, path: str | os.PathLike) -> Graph:
    """A graph from its fields, checked."""
    record = dict(_object(value, path, "its graph"))
    names = [field.name for field in fields(Graph)]
    if set(record) != set(names):
        raise InvalidArgumentError(f"{path}: its graph must have {', '.join(names)}; it has {', '.join(record)}")
    layers, heads, parallel, whole = (record[name] for name in ("layers", "heads", "parallel", "attention_whole"))
    counts = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= _MOST for n in (layers, heads))
    if not counts or not isinstance(parallel, bool) or not isinstance(whole, bool):
        raise InvalidArgumentError(
            f"{path}: its graph must have positive numbers of layers and heads, and parallel and attention_whole true "
            f"or false; got {json.dumps(record)[:120]}"
        )
    return Graph(layers, heads, parallel, whole)
