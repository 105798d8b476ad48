from __future__ import annotations

import pytest
import torch
from golden_memories import golden

from kedit_fast import routed_linear


@pytest.fixture(params=("torch",))
def backend(request):
    return request.param


def test_outputs_are_those_of_wise(backend):
    x, starts, weight = golden("route.x"), golden("route.starts"), golden("toy.W0")
    memories = torch.cat([golden("route.new")[None], golden("route.memories")])
    route = golden("route.retrieve.choice.mended").repeat_interleave(starts.diff())
    expected = golden("route.retrieve.output.mended")
    for beside in ({"weight": weight}, {"weight": None, "output": x @ weight.T}):
        out = routed_linear(x, memories=memories, route=route, **beside, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
