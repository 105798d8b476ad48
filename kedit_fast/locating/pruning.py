"""From scores of edges to circuits: the largest ones, or greedily from the logits down, without loose ends."""

from __future__ import annotations

import heapq

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.locating.circuit import Circuit, nodes_of_targets
from kedit_fast.locating.circuits import EdgeScores
from kedit_fast.locating.graph import Graph


def top_edges(scores: EdgeScores, count: int, absolute: bool = True) -> Circuit:
    """The circuit of the `count` edges with the largest scores, without those that lead nowhere.

    Args:
        scores: of all edges of a model.
        count: how many edges are chosen; pruning may leave fewer.
        absolute: choose by |score|; else by the score, so that edges whose corruption would help come last.

    Returns:
        a Circuit; of edges with equal scores, those of earlier nodes are chosen.

    Raises:
        InvalidArgumentError: `count` is not positive or larger than the number of edges; a score that is not finite,
            named; or no path from the input to the logits is among the chosen edges.

    Cost: one sort of all scores.

    Source: EAP-IG (arXiv 2403.17806), its released `apply_topn` and `prune`.

    Example:
        >>> from kedit_fast.locating.circuits import edge_scores
        >>> from kedit_fast.locating.prompt_pairs import prompt_pairs
        >>> pairs = prompt_pairs(model, tokenizer, requests, on_error="skip")
        >>> circuit = top_edges(edge_scores(model, pairs), 200)
        >>> circuit.edge_count <= 200
        True
    """
    values = _checked(scores, count, absolute)
    order = torch.argsort(values.flatten(), descending=True, stable=True)
    edges = torch.zeros(values.numel(), dtype=torch.bool, device="cpu")
    edges[order[:count]] = True
    return _circuit(scores, edges.view_as(values), count, absolute, "top")


def greedy_edges(scores: EdgeScores, count: int, absolute: bool = True) -> Circuit:
    """The circuit that grows from the logits down, one edge after another, without edges that lead nowhere.

    Each step takes, of all edges into nodes that the circuit has, the one with the largest score. So every edge leads
    on to the logits, and pruning takes away only what the input does not reach.

    Args:
        scores: of all edges of a model.
        count: how many edges are taken; pruning may leave fewer.
        absolute: choose by |score|; else by the score.

    Returns:
        a Circuit; of edges with equal scores, those that could be taken first come first.

    Raises:
        InvalidArgumentError: see `top_edges`.

    Cost: the edges into each node are sorted once, when the circuit reaches it.

    Source: EAP-IG (arXiv 2403.17806), its released `apply_greedy` and `prune`.

    Example:
        >>> from kedit_fast.locating.circuits import edge_scores
        >>> from kedit_fast.locating.prompt_pairs import prompt_pairs
        >>> pairs = prompt_pairs(model, tokenizer, requests, on_error="skip")
        >>> greedy_edges(edge_scores(model, pairs), 40).nodes[-1]
        'logits'
    """
    values = _checked(scores, count, absolute)
    edges = torch.zeros(values.shape, dtype=torch.bool, device="cpu")
    at = nodes_of_targets(scores.graph)
    width = values.shape[1]
    waiting: list[tuple[float, int, int]] = []  # (-score, which node, place in its list): one edge of each node
    lists: list[tuple[list[float], list[int]]] = []

    def reach(node: int) -> None:
        """Let the edges into a node be taken, the largest first."""
        into = values[:, at == node]
        places = torch.arange(values.numel(), device="cpu").view_as(values)[:, at == node]
        exists = into > float("-inf")
        ordered, order = torch.sort(into[exists], descending=True, stable=True)
        if len(order):
            lists.append((ordered.tolist(), places[exists][order].tolist()))
            heapq.heappush(waiting, (-lists[-1][0][0], len(lists) - 1, 0))

    reached = {len(scores.graph.sources)}
    reach(len(scores.graph.sources))
    for _ in range(count):
        _, number, place = heapq.heappop(waiting)
        ordered, places = lists[number]
        source, target = divmod(places[place], width)
        edges[source, target] = True
        if place + 1 < len(places):
            heapq.heappush(waiting, (-ordered[place + 1], number, place + 1))
        if source not in reached:
            reached.add(source)
            reach(source)
    return _circuit(scores, edges, count, absolute, "greedy")


def pruned(graph: Graph, edges: torch.Tensor) -> torch.Tensor:
    """Edges [F, V] without those that are on no path from the input to the logits.

    Nodes without an edge in or without an edge out are removed with their edges, again and again until none is left.

    Example:
        >>> graph = Graph(layers=1, heads=2)
        >>> edges = torch.zeros_like(graph.mask)
        >>> edges[graph.sources.index("a0.h0"), -1] = True  # nothing goes into this head
        >>> bool(pruned(graph, edges).any())
        False
    """
    at = nodes_of_targets(graph)
    sources = len(graph.sources)
    edges = edges.cpu() & graph.mask
    while True:
        entered = torch.zeros(sources + 1, dtype=torch.bool, device="cpu")
        entered[at[edges.any(0)]] = True
        entered[0] = True  # the input needs nothing
        alive = entered[:sources] & edges.any(1)
        beyond = torch.cat([alive, torch.ones(1, dtype=torch.bool, device="cpu")])  # and nothing follows the logits
        remaining = edges & alive[:, None] & beyond[at]
        if torch.equal(remaining, edges):
            return edges
        edges = remaining


def _checked(scores: EdgeScores, count: int, absolute: bool) -> torch.Tensor:
    """What edges are chosen by, [F, V] fp64 on the CPU; -inf where there is no edge."""
    graph = scores.graph
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= graph.edge_count:
        raise InvalidArgumentError(
            f"count = {count!r}: choose 1 to {graph.edge_count:,}, the number of edges of the model"
        )
    mask, values = graph.mask, scores.scores.detach().to("cpu", torch.float64)
    if values.shape != mask.shape:
        raise InvalidArgumentError(f"scores have shape {list(values.shape)}, and the graph {list(mask.shape)}")
    wrong = mask & ~torch.isfinite(values)
    if bool(wrong.any()):
        source, target = torch.nonzero(wrong)[0].tolist()
        raise InvalidArgumentError(
            f"the score of {graph.sources[source]} -> {graph.targets[target]} is {float(values[source, target])} "
            f"({int(wrong.sum()):,} of {graph.edge_count:,} are not finite): no circuit can be chosen by such scores"
        )
    return (values.abs() if absolute else values).masked_fill(~mask, float("-inf"))


def _circuit(scores: EdgeScores, edges: torch.Tensor, count: int, absolute: bool, way: str) -> Circuit:
    remaining = pruned(scores.graph, edges)
    if not bool(remaining.any()):
        raise InvalidArgumentError(
            f"no path from the input to the logits is among the {count} edges: pruning leaves an empty circuit. "
            "Choose more edges" + (", or greedy_edges" if way == "top" else "")
        )
    chosen = f"{way} {count} edges by {'|score|' if absolute else 'score'}"
    about = f"{chosen}; {scores.scoring}, {scores.metric}, {scores.pairs} prompt pairs"
    return Circuit(scores.graph, remaining, scores.scores, about)
