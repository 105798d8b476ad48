"""What only a GPU can show: devices, streams, capture, layouts of the CUDA kernel. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from floors import HEAD, HEAD_GRADIENT, RANK_K, relative_error

from kedit_fast import (
    distribution_kl,
    grouped_rank_k_update_,
    grouped_symmetric_rank_k_update_,
    rank_k_update_,
    symmetric_rank_k_update_,
    target_log_probs,
)
from kedit_fast.backends import explain, probe
from kedit_fast.errors import InvalidArgumentError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
WIDE_KL = {  # KL of states [40, 4096] on torch's own products; worst measured on an H200
    torch.float32: 1e-6,  # 2.7e-7
    torch.bfloat16: 4e-6,  # 1.8e-6
    torch.float16: 4e-6,  # 2.2e-6
}
WIDE_KL_GRADIENT = 4e-6  # of fp32 states: 3.1e-6; that of 16-bit states is rounded to their dtype


@pytest.fixture(params=("cuda", "triton"))
def writer(request):
    """A backend of rank_k_update_ on a GPU."""
    if reason := probe(request.param).reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def like(host, dtype):
    """The numbers of `host` on the GPU, with its strides and as far from a 16-byte boundary."""
    storage = torch.zeros(host.untyped_storage().nbytes() // 4, dtype=dtype, device="cuda")
    return storage.as_strided(host.shape, host.stride(), host.storage_offset()).copy_(host)


def factors(weight, k):
    out, inner = weight.shape
    return torch.randn(out, k, device=weight.device) / 4, torch.randn(k, inner, device=weight.device).T / 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("k", (1, 5, 16, 17, 100))
def test_every_layout_is_updated(writer, dtype, k):
    for out, inner in ((1, 1), (7, 63), (129, 1000), (64, 4097), (4096, 256)):
        layouts = (
            torch.randn(out, inner), torch.randn(inner, out).T, torch.randn(2 * out, 3 * inner)[::2, ::3],
            torch.randn(out + 3, inner + 5)[1 : out + 1, 2 : inner + 2],
        )  # fmt: skip
        for host in layouts:
            weight = host.to("cuda", dtype) if host.is_contiguous() else like(host, dtype)
            left, right = factors(weight, k)
            expected = weight.double() - 0.5 * left.double() @ right.double().T
            plain = rank_k_update_(weight.clone(), left, right, -0.5, backend="torch")
            copy = torch.empty(inner, out, dtype=torch.bfloat16, device="cuda").T if dtype == torch.float32 else None
            rank_k_update_(weight, left, right, -0.5, copy, backend=writer)
            assert relative_error(weight, expected) <= max(RANK_K[dtype], 2 * relative_error(plain, expected))
            if copy is not None:
                assert torch.equal(copy, weight.bfloat16())


def test_the_current_stream_is_used(writer):
    weight = torch.zeros(2048, 2048, device="cuda")
    left, right = torch.ones(2048, 1, device="cuda"), torch.ones(2048, 1, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what waits for this stream must come after it
        weight.fill_(1.0)
        rank_k_update_(weight, left, right, backend=writer)
        acc = symmetric_rank_k_update_(
            torch.zeros(64, 64, device="cuda"), weight[:, :64].contiguous(), backend="triton"
        )
    side.synchronize()
    assert bool((weight == 2.0).all()) and float(acc[5, 3]) == 4.0 * 2048


def test_calls_can_be_captured(writer):
    weight, x = torch.zeros(256, 512, device="cuda"), torch.ones(128, 64, device="cuda")
    left, right = torch.ones(256, 3, device="cuda"), torch.ones(512, 3, device="cuda")
    acc, head = torch.zeros(64, 64, device="cuda"), torch.randn(999, 64, device="cuda")
    targets = torch.zeros(128, dtype=torch.int64, device="cuda")

    def step():
        rank_k_update_(weight, left, right, backend=writer)
        symmetric_rank_k_update_(acc, x, backend="triton")
        log_prob = target_log_probs(x, head, targets, backend="triton").log_prob
        return log_prob + distribution_kl(x, x, head, backend="triton")

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        expected = step()
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert bool((weight == 4 * 3.0).all()) and float(acc[1, 0]) == 4 * 128.0
    assert torch.equal(captured, expected)


def test_a_captured_call_runs_the_tile_that_was_tuned_before_it(monkeypatch):
    from kedit_fast.kernels.triton import configs, launch

    if reason := probe("triton").reason:
        pytest.skip(f"triton: {reason}")
    monkeypatch.setenv("KEDIT_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_tuned", {})
    monkeypatch.setattr(launch, "candidates", lambda *kind: configs.candidates(*kind)[:2])
    ran, real = [], launch._run
    monkeypatch.setattr(launch, "_run", lambda launches: (ran.append(launches[0].config), real(launches)))
    x, acc = torch.ones(512, 128, device="cuda").bfloat16(), torch.zeros(128, 128, device="cuda")
    symmetric_rank_k_update_(acc, x, backend="triton")
    torch.cuda.synchronize()
    (found,) = launch.tuned().values()
    launch._tuned.update({key: launch.Tuned(configs.candidates(*key[:2])[1], 1.0, 2.0) for key in launch._tuned})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        symmetric_rank_k_update_(acc, x, backend="triton")
    assert ran[-1] == configs.candidates(configs.SYMMETRIC, "native")[1] and found.milliseconds > 0
    graph.replay()
    torch.cuda.synchronize()
    assert float(acc[5, 3]) == 2 * 512.0


def test_the_same_bits_at_every_run():
    x = torch.randn(20_000, 96, device="cuda").bfloat16()
    first, second = (
        symmetric_rank_k_update_(torch.zeros(96, 96, device="cuda"), x, backend="triton") for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one_is_written(writer):
    weight = torch.zeros(100, 200, device="cuda:1")
    rank_k_update_(weight, torch.ones(100, 2, device="cuda:1"), torch.ones(200, 2, device="cuda:1"), backend=writer)
    assert bool((weight == 2.0).all()) and torch.cuda.current_device() == 0


def test_tensors_on_two_devices_are_named():
    with pytest.raises(InvalidArgumentError, match="left on cpu"):
        rank_k_update_(torch.zeros(3, 4, device="cuda"), torch.ones(3, 1), torch.ones(4, 1, device="cuda"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_head_ops_are_right_on_torchs_own_products(dtype):
    """Which they run on by automatic choice: the values to fp32's precision, the gradients to that of the states.

    A KL divergence is a mean of differences of log probabilities, so its error is several times theirs. In 16 bits the
    matrix unit truncates sums of 1024 terms on top.
    """
    hidden, other = (torch.randn(40, 4096, device="cuda").to(dtype).requires_grad_(i == 0) for i in range(2))
    head = (torch.randn(40_000, 4096, device="cuda") / 40).to(dtype)
    targets = torch.randint(0, 40_000, (40,), device="cuda")
    assert explain("target_log_probs", hidden, head, targets).runs.startswith("torch")
    wide = hidden.detach().double().requires_grad_()
    log_p, log_q = (torch.log_softmax(h.double() @ head.double().T, -1) for h in (wide, other))
    for found, expected, limit, gradient_limit in (
        (target_log_probs(hidden, head, targets).log_prob, log_p.gather(1, targets[:, None])[:, 0],
         HEAD[dtype], HEAD_GRADIENT[dtype]),
        (distribution_kl(hidden, other, head), (log_p.exp() * (log_p - log_q)).sum(-1),
         WIDE_KL[dtype], max(HEAD_GRADIENT[dtype], WIDE_KL_GRADIENT)),
    ):  # fmt: skip
        (slope,) = torch.autograd.grad(expected.sum(), wide, retain_graph=True)
        (gradient,) = torch.autograd.grad(found.sum(), hidden)
        assert relative_error(found, expected) < limit
        assert relative_error(gradient, slope) < gradient_limit


def test_the_offsets_of_groups_are_not_waited_for():
    offsets, columns = torch.tensor([0, 3, 8], device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    acc, weight = torch.zeros(2, 4, 4, device="cuda"), torch.zeros(2, 5, 4, device="cuda")
    x, left = torch.ones(8, 4, device="cuda"), torch.ones(5, 1, device="cuda")
    grouped_symmetric_rank_k_update_(acc, x, offsets)  # compiles
    grouped_rank_k_update_(weight, left, x, columns, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_symmetric_rank_k_update_(acc, x, offsets)
        grouped_rank_k_update_(weight, left, x, columns, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(acc[1, 1, 0]) == 10.0 and bool((weight[1] == 10.0).all())
