from __future__ import annotations

import pytest
import torch
from golden_memories import golden

from kedit_fast import masked_adam_


@pytest.fixture(params=("torch",))
def backend(request):
    return request.param


@pytest.mark.parametrize("counted", (torch.float32, torch.int64), ids=str)
def test_steps_are_those_of_torch(backend, counted):
    weight, count = golden("toy.W0"), torch.zeros((), dtype=counted)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    parameter = torch.nn.Parameter(golden("toy.W0"))
    adam = torch.optim.Adam([parameter], lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    for grad in golden("wise.step_grads"):
        assert masked_adam_(weight, mean, square, count, 0.05, betas=(0.8, 0.95), eps=1e-6, grad=grad, backend=backend)
        parameter.grad = grad
        adam.step()
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-12, atol=1e-12)
    assert count == 4
