"""Made-up scores of edges: a signal that parts of some pairs share, and noise of each part."""

from __future__ import annotations

import torch

from kedit_fast.locating.circuits import EdgeScores
from kedit_fast.locating.graph import Graph
from kedit_fast.reports.circuit_statistics import PartScores

GRAPH = Graph(layers=3, heads=4)


def parts(signal: torch.Tensor, noise: float, seed: int, groups: int = 16) -> PartScores:
    """Scores of `groups` parts of two pairs: a signal, and noise of each part."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(groups):
        scores = torch.zeros(GRAPH.mask.shape)
        scores[GRAPH.mask] = signal + noise * torch.randn(len(signal), generator=generator)
        made.append(EdgeScores(GRAPH, scores, "eap-ig", 5, "logit-difference", 2, 3.0, 1.0))
    return PartScores.of(made)


def signal(seed: int) -> torch.Tensor:
    """Few large scores, many small ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(GRAPH.edge_count, generator=generator) ** 3
