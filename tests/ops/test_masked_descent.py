from __future__ import annotations

import pytest
import torch
from golden_memories import golden

from kedit_fast import masked_descent_
from kedit_fast.ops import pack_bits


@pytest.fixture(params=("torch",))
def backend(request):
    return request.param


@pytest.mark.parametrize("decay_all", (True, False))
@pytest.mark.parametrize("given", ("grad", "factors"))
def test_four_steps_are_those_of_wise(backend, decay_all, given):
    lr, decay, bound = golden("wise.step").tolist()
    weight, origin, entries = golden("toy.W0"), golden("toy.W0"), golden("wise.keep_bits")
    path = golden(f"wise.steps.decay_{'all' if decay_all else 'masked'}")
    box = {"entries": entries, "decay": decay, "decay_all": decay_all, "origin": origin, "bound": bound}
    for grad, expected in zip(golden("wise.step_grads"), path, strict=True):
        eye = torch.eye(len(grad), dtype=grad.dtype)
        gradient = {"grad": grad} if given == "grad" else {"left": eye, "right": grad}
        assert masked_descent_(weight, lr, **gradient, **box, backend=backend)
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


def test_bits_are_those_of_the_mask():
    assert torch.equal(pack_bits(golden("wise.keep")), golden("wise.keep_bits"))
