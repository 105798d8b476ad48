"""Circuits as JSON, as Graphviz text, as pictures; and from scores, as published code chooses them."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from golden_circuits import GOLDEN_KINDS, golden

from kedit_fast.errors import InvalidArgumentError, KeditError
from kedit_fast.locating.circuit import NEGATIVE, POSITIVE, Circuit, nodes_of_targets
from kedit_fast.locating.circuits import EdgeScores
from kedit_fast.locating.graph import Graph
from kedit_fast.locating.pruning import greedy_edges, pruned, top_edges

GRAPH = Graph(layers=2, heads=3)


def random_scores(graph=GRAPH, seed=0):
    scores = torch.randn(graph.mask.shape, generator=torch.Generator().manual_seed(seed)) * graph.mask
    return edge_scores_of(graph, scores)


def edge_scores_of(graph, scores):
    return EdgeScores(graph, scores, "eap-ig", 5, "logit-difference", 4, 1.0, 0.0)


def golden_scores(kind):
    tensors, about = golden()
    layers = len([name for name in about[f"{kind}.nodes_forward"] if name.startswith("m")])
    heads = len([name for name in about[f"{kind}.nodes_forward"] if name.startswith("a0.")])
    graph = Graph(layers, heads)
    assert torch.equal(graph.mask, tensors[f"{kind}.real_edge_mask"])
    return edge_scores_of(graph, tensors[f"{kind}.scores.eap_ig_inputs_5"])


@pytest.fixture
def circuit():
    return greedy_edges(random_scores(), 20)


# --- from scores to circuits ---


@pytest.mark.parametrize("count", [20, 60])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_the_largest_edges_are_those_of_published_code(kind, absolute, count):
    tensors, about = golden()
    name = f"{kind}.circuit.topn{'' if absolute else '_signed'}_{count}"
    result = top_edges(golden_scores(kind), count, absolute)
    assert torch.equal(result.edges, tensors[name])
    assert (result.edge_count, len(result.nodes) - 1) == (about[name]["edges"], about[name]["nodes"])  # and the logits


@pytest.mark.parametrize("count", [20, 60])
@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_greedy_circuits_have_the_size_of_published_ones(kind, count):
    expected = golden()[1][f"{kind}.circuit.greedy_{count}"]
    result = greedy_edges(golden_scores(kind), count)
    assert (result.edge_count, len(result.nodes) - 1) == (expected["edges"], expected["nodes"])


def greedy_by_hand(scores, count, absolute):
    """The best edge into a node that is in, again and again, by going through all edges each time."""
    graph = scores.graph
    values = scores.scores.abs() if absolute else scores.scores
    edges, reached = torch.zeros_like(graph.mask), {"logits"}
    for _ in range(count):
        best = max(
            (float(values[u, v]), -u, -v)
            for u, v in torch.nonzero(graph.mask & ~edges).tolist()
            if graph.targets[v].partition("<")[0] in reached
        )
        edges[-best[1], -best[2]] = True
        reached.add(graph.sources[-best[1]])
    return edges


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("graph", [GRAPH, Graph(2, 3, parallel=True), Graph(3, 2, attention_whole=True)])
def test_greedy_takes_the_best_edge_into_a_reached_node(graph, absolute):
    for seed, count in ((1, 1), (2, 7), (3, 25), (4, graph.edge_count)):
        scores = random_scores(graph, seed)
        expected = pruned(graph, greedy_by_hand(scores, count, absolute))
        if bool(expected.any()):
            assert torch.equal(greedy_edges(scores, count, absolute).edges, expected)
        else:
            with pytest.raises(InvalidArgumentError, match="empty circuit"):
                greedy_edges(scores, count, absolute)


def paths(graph, edges):
    """Edges on a path from the input to the logits, by walking."""
    at = [name.partition("<")[0] for name in graph.targets]
    pairs = [(graph.sources[u], at[v], (u, v)) for u, v in torch.nonzero(edges).tolist()]
    down, up = {"input"}, {"logits"}
    for _ in range(len(graph.sources)):
        down |= {target for source, target, _ in pairs if source in down}
        up |= {source for source, target, _ in pairs if target in up}
    return {place for source, target, place in pairs if source in down and target in up}


@pytest.mark.parametrize("graph", [GRAPH, Graph(2, 3, parallel=True), Graph(3, 2, attention_whole=True)])
def test_pruning_removes_what_is_on_no_path(graph):
    generator = torch.Generator().manual_seed(5)
    for share in (0.05, 0.1, 0.2, 0.5):
        edges = (torch.rand(graph.mask.shape, generator=generator) < share) & graph.mask
        assert {tuple(place) for place in torch.nonzero(pruned(graph, edges)).tolist()} == paths(graph, edges)


def test_equal_scores_are_taken_in_the_order_of_the_model():
    scores = edge_scores_of(GRAPH, GRAPH.mask.float())
    first, again = top_edges(scores, 30), top_edges(scores, 30)
    assert torch.equal(first.edges, again.edges)
    wanted = torch.nonzero(GRAPH.mask)[:30]
    expected = torch.zeros_like(GRAPH.mask)
    expected[wanted[:, 0], wanted[:, 1]] = True
    assert torch.equal(first.edges, pruned(GRAPH, expected))


@pytest.mark.parametrize("choose", [top_edges, greedy_edges])
@pytest.mark.parametrize("count", [0, -1, True, 2.0, GRAPH.edge_count + 1])
def test_a_count_that_cannot_be_taken_is_named(choose, count):
    with pytest.raises(InvalidArgumentError, match=rf"count = {count!r}: choose 1 to {GRAPH.edge_count}"):
        choose(random_scores(), count)


@pytest.mark.parametrize("choose", [top_edges, greedy_edges])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_named(choose, value):
    scores = random_scores()
    scores.scores[GRAPH.sources.index("m0"), -1] = value
    with pytest.raises(InvalidArgumentError, match=rf"the score of m0 -> logits is {value} \(1 of {GRAPH.edge_count}"):
        choose(scores, 5)


def test_what_stands_where_there_is_no_edge_is_not_read():
    scores = random_scores()
    expected = top_edges(scores, 12).edges
    scores.scores[~GRAPH.mask] = float("nan")
    assert torch.equal(top_edges(scores, 12).edges, expected)


def test_an_empty_circuit_is_refused():
    scores = edge_scores_of(GRAPH, torch.zeros(GRAPH.mask.shape))
    scores.scores[GRAPH.sources.index("m0"), GRAPH.targets.index("m1")] = 1.0
    with pytest.raises(InvalidArgumentError, match=r"among the 1 edges: pruning leaves an empty circuit.*greedy_edges"):
        top_edges(scores, 1)


# --- circuits ---


def test_nodes_are_those_with_edges_in_the_order_of_the_model():
    edges = torch.zeros_like(GRAPH.mask)
    for source, target in (("input", "a1.h2<k>"), ("a1.h2", "m1"), ("m1", "logits")):
        edges[GRAPH.sources.index(source), GRAPH.targets.index(target)] = True
    assert Circuit(GRAPH, edges, torch.ones(edges.shape)).nodes == ("input", "a1.h2", "m1", "logits")


def test_inputs_belong_to_their_nodes():
    names = (*GRAPH.sources, "logits")
    owners = [names[place] for place in nodes_of_targets(GRAPH).tolist()]
    assert owners == [target.partition("<")[0] for target in GRAPH.targets]


def test_a_circuit_has_only_the_scores_of_its_edges(circuit):
    assert bool((circuit.scores[circuit.edges] != 0).all()) and not bool(circuit.scores[~circuit.edges].any())


@pytest.mark.parametrize(
    ("edges", "scores", "message"),
    [
        (GRAPH.mask[:, 1:], torch.zeros(GRAPH.mask.shape), "edges of a circuit must be bool"),
        (GRAPH.mask.float(), torch.zeros(GRAPH.mask.shape), "edges of a circuit must be bool"),
        (GRAPH.mask, torch.zeros(3), "scores of a circuit must be a float dtype"),
        (GRAPH.mask, torch.full(GRAPH.mask.shape, float("nan")), "the score of input -> a0.h0<q> is not finite"),
        (torch.ones_like(GRAPH.mask), torch.zeros(GRAPH.mask.shape), "the graph has no edge a0.h0 -> a0.h0<q>"),
    ],
)
def test_a_circuit_that_is_none_is_refused(edges, scores, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Circuit(GRAPH, edges, scores)


# --- JSON ---


@pytest.mark.parametrize("graph", [GRAPH, Graph(2, 3, parallel=True), Graph(3, 2, attention_whole=True)])
def test_a_saved_circuit_is_read_back_bit_for_bit(graph, tmp_path):
    saved = greedy_edges(random_scores(graph, 3), 15)
    saved.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json")
    assert (loaded.graph, loaded.about) == (saved.graph, saved.about)
    assert torch.equal(loaded.edges, saved.edges) and torch.equal(loaded.scores, saved.scores)
    bytes_ = (tmp_path / "circuit.json").read_bytes()
    loaded.save(tmp_path / "circuit.json")
    assert (tmp_path / "circuit.json").read_bytes() == bytes_
    assert os.listdir(tmp_path) == ["circuit.json"]


def test_an_empty_circuit_is_saved_too(tmp_path):
    empty = Circuit(GRAPH, torch.zeros_like(GRAPH.mask), torch.zeros(GRAPH.mask.shape), 'of "nothing"')
    empty.save(tmp_path / "empty.json")
    assert Circuit.load(tmp_path / "empty.json").nodes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=2), "no circuit of version 1"),
        (lambda r: r.pop("format"), "no circuit of version 1"),
        (lambda r: r.pop("about"), "must have format, version, about, graph, edges"),
        (lambda r: r.update(more=1), "must have format"),
        (lambda r: r["graph"].pop("heads"), "its graph must have layers, heads"),
        (lambda r: r["graph"].update(heads=0), "positive numbers of layers and heads"),
        (lambda r: r["graph"].update(layers="2"), "positive numbers of layers and heads"),
        (lambda r: r["graph"].update(parallel=1), "parallel and attention_whole true or false"),
        (lambda r: r["graph"].update(layers=10**9), "positive numbers of layers and heads"),
        (lambda r: r.update(graph=[]), "its graph must be one JSON object"),
        (lambda r: r["edges"].append(["m0", "m9", 1.0]), "no edge m0 -> m9"),
        (lambda r: r["edges"].append(["m1", "m0", 1.0]), "no edge m1 -> m0"),
        (lambda r: r["edges"].append(r["edges"][0]), "is there twice"),
        (lambda r: r["edges"].append(["m0", "logits"]), r"must be \[source, target, score\]"),
        (lambda r: r["edges"].append(["m0", 3, 1.0]), r"must be \[source, target, score\]"),
        (lambda r: r["edges"][0].__setitem__(2, "1"), "must be a finite number"),
        (lambda r: r["edges"][0].__setitem__(2, float("nan")), "must be a finite number"),
        (lambda r: r["edges"][0].__setitem__(2, True), "must be a finite number"),
        (lambda r: r["edges"][0].__setitem__(2, 1e300), "must be a finite number"),
    ],
)
def test_a_damaged_file_is_named(circuit, tmp_path, change, message):
    path = tmp_path / "circuit.json"
    circuit.save(path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(InvalidArgumentError, match=message):
        Circuit.load(path)


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "one JSON object"), ("{", "malformed JSON"), ('{"a": 1, "a": 2}', "twice")]
)
def test_a_file_that_is_no_circuit_is_named(tmp_path, text, message):
    (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=rf"circuit\.json.*{message}"):
        Circuit.load(tmp_path / "circuit.json")


def test_files_that_cannot_be_read_or_written_are_named(circuit, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*none\.json"):
        Circuit.load(tmp_path / "none.json")
    with pytest.raises(InvalidArgumentError, match=r"cannot write .*none"):
        circuit.save(tmp_path / "none" / "circuit.json")


# --- pictures ---


def test_the_graphviz_text_has_every_edge_its_sign_and_its_layer(circuit):
    text = circuit.to_dot()
    lines = text.splitlines()
    drawn = [line for line in lines if "->" in line and "style=invis" not in line]
    assert text.startswith("digraph") and text.rstrip().endswith("}") and len(drawn) == circuit.edge_count
    for (source, target, score), line in zip(circuit.listed(), drawn, strict=True):
        node, _, part = target.partition("<")
        assert f'"{source}" -> "{node}"' in line and (POSITIVE if score > 0 else NEGATIVE) in line
        assert (f'label="{part[0]}"' in line) if part else ("label=" not in line)
    ranks = [line for line in lines if "rank=same" in line]
    assert {name for line in ranks for name in line.split('"')[1::2]} == set(circuit.nodes)
    for line in ranks:
        assert len({name.partition(".")[0] for name in line.split('"')[1::2]}) == 1
    assert ranks[0].split('"')[1] == "input" and ranks[-1].split('"')[1] == "logits"


def test_the_width_of_an_edge_is_its_score(circuit):
    widths = [
        float(line.partition("penwidth=")[2].partition(",")[0])
        for line in circuit.to_dot().splitlines()
        if "penwidth" in line
    ]
    assert widths == sorted(widths, reverse=True) and widths[0] == 4.0 and widths[-1] < 4.0


def test_only_the_largest_edges_are_drawn_where_that_is_asked(circuit):
    text = circuit.to_dot(largest=3)
    assert text.count("penwidth") == 3
    with pytest.raises(InvalidArgumentError, match="largest = 0"):
        circuit.to_dot(largest=0)


def test_quotes_in_a_title_are_escaped():
    edges = torch.zeros_like(GRAPH.mask)
    text = Circuit(GRAPH, edges, torch.zeros(edges.shape), 'a "name"\nand \\more').to_dot()
    assert 'label="a \\"name\\"\\nand \\\\more"' in text


def test_without_graphviz_the_text_is_written_and_the_error_says_what_to_do(circuit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KeditError, match=r"dot is not on the path\. Install it .*circuit\.dot, and dot -Tpng draws it"):
        circuit.draw(tmp_path / "circuit.png")
    assert (tmp_path / "circuit.dot").read_text() == circuit.to_dot()
    assert not (tmp_path / "circuit.png").exists()


def program(folder, text):
    path = folder / "dot"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_picture_is_drawn_by_dot(circuit, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, '[ "$1" = -Tsvg ] && [ "$2" = -o ] && cat "$4" > "$3"')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    circuit.draw(tmp_path / "circuit.svg", largest=4)
    assert (tmp_path / "circuit.svg").read_text() == circuit.to_dot(4) == (tmp_path / "circuit.dot").read_text()


@pytest.mark.parametrize(
    ("script", "message"), [("echo 'syntax error' >&2; exit 1", "syntax error"), ("exit 0", "it wrote nothing")]
)
def test_a_failure_of_dot_is_named_and_an_older_picture_stays(circuit, tmp_path, monkeypatch, script, message):
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, script)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "circuit.png").write_text("older")
    with pytest.raises(KeditError, match=rf"dot does not draw .*circuit\.dot: {message}"):
        circuit.draw(tmp_path / "circuit.png")
    assert (tmp_path / "circuit.png").read_text() == "older"


def test_another_ending_is_refused(circuit, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"ends in \.png, \.svg, \.pdf"):
        circuit.draw(tmp_path / "circuit.txt")
