from __future__ import annotations

import pytest
import torch
from golden_memories import golden

from kedit_fast import activation_distance


@pytest.fixture(params=("torch",))
def backend(request):
    return request.param


def test_distances_are_those_of_wise(backend):
    x, starts, weight = golden("route.x"), golden("route.starts"), golden("toy.W0")
    memories = torch.cat([golden("route.new")[None], golden("route.memories")])
    distances = activation_distance(x, x @ weight.T, memories, starts, "silu", 100, backend=backend)
    expected = torch.cat([golden("route.distance.new")[None], golden("route.distance.memories")])
    torch.testing.assert_close(distances, expected, rtol=1e-12, atol=1e-12)
