"""The graph of a circuit: which nodes a model has, and which of them can write to which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.models.components import HEAD_INPUTS, Components, open_components
from kedit_fast.models.view import ModelView


@dataclass(frozen=True)
class Graph:
    """Nodes and possible edges. Sources are what nodes put out, targets what nodes read: F sources, V targets.

    Heads have three inputs each, for queries, keys and values. Where keys and values are shared by a group of query
    heads, each query head has its own k and v input; the sum over a group is the edge of the shared head.
    """

    layers: int
    """L, decoder blocks."""
    heads: int
    """H, query heads of a layer."""
    parallel: bool = False
    """Whether a layer's MLP reads what its attention reads, so that heads do not write to the MLP of their layer."""
    attention_whole: bool = False
    """Whether a layer's attention is one node with one input, because a norm stands behind its heads."""

    def __post_init__(self):
        if self.layers < 1 or self.heads < 1:
            raise InvalidArgumentError(
                f"a graph needs at least one layer and head; got {self.layers} layers and {self.heads} heads"
            )

    @property
    def outputs_of_layer(self) -> int:
        """Sources of one layer: its heads, or its attention, and its MLP."""
        return (1 if self.attention_whole else self.heads) + 1

    @property
    def inputs_of_layer(self) -> int:
        """Targets of one layer: q, k and v of its heads, or its attention, and its MLP."""
        return (1 if self.attention_whole else 3 * self.heads) + 1

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the F sources: "input", then by layer "a0.h0", "a0.h1", .., "m0"; attention as a whole is "a0"."""
        names = ["input"]
        for layer in range(self.layers):
            heads = [f"a{layer}"] if self.attention_whole else [f"a{layer}.h{h}" for h in range(self.heads)]
            names += [*heads, f"m{layer}"]
        return tuple(names)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names of the V targets: by layer "a0.h0<q>", .. all q, all k, all v, then "m0"; last "logits"."""
        names = []
        for layer in range(self.layers):
            if self.attention_whole:
                names.append(f"a{layer}")
            else:
                names += [f"a{layer}.h{h}<{kind}>" for kind in HEAD_INPUTS for h in range(self.heads)]
            names.append(f"m{layer}")
        return (*names, "logits")

    @cached_property
    def source_layers(self) -> tuple[int, ...]:
        """The layer of every source; -1 for the input."""
        return (-1, *(layer for layer in range(self.layers) for _ in range(self.outputs_of_layer)))

    @cached_property
    def target_layers(self) -> tuple[int, ...]:
        """The layer of every target; `layers` for the logits."""
        return (*(layer for layer in range(self.layers) for _ in range(self.inputs_of_layer)), self.layers)

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """For every target, how many of the first sources it reads."""
        counts = []
        for layer in range(self.layers):
            before = 1 + layer * self.outputs_of_layer
            counts += [before] * (self.inputs_of_layer - 1)
            counts.append(before if self.parallel else before + self.outputs_of_layer - 1)
        return (*counts, len(self.sources))

    @cached_property
    def mask(self) -> torch.Tensor:
        """[F, V] bool on the CPU: which edges exist."""
        reads = torch.tensor(self.reads, device="cpu")
        return torch.arange(len(self.sources), device="cpu")[:, None] < reads

    @property
    def edge_count(self) -> int:
        """How many edges exist."""
        return sum(self.reads)

    def source_of(self, target: int) -> int | None:
        """The source that belongs to the same node as a target; None for the logits."""
        layer = self.target_layers[target]
        if layer == self.layers:
            return None
        place = target - layer * self.inputs_of_layer
        first = 1 + layer * self.outputs_of_layer
        if place == self.inputs_of_layer - 1:
            return first + self.outputs_of_layer - 1
        return first + (0 if self.attention_whole else place % self.heads)


def graph_of(model: ModelView | Components) -> Graph:
    """The graph of a model.

    Args:
        model: a view of it, or its opened components.

    Raises:
        UnsupportedModelError: its attention cannot be opened; by the module's name.

    Example:
        >>> from kedit_fast import demo
        >>> graph = graph_of(ModelView(demo.load()[0]))
        >>> len(graph.sources), len(graph.targets), graph.edge_count
        (31, 79, 1108)
    """
    parts = model if isinstance(model, Components) else open_components(model)
    return Graph(parts.layers, parts.heads, parts.parallel, parts.attention_whole)
