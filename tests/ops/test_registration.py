"""opcheck and torch.compile(fullgraph=True) for every op."""

from __future__ import annotations

import pytest
import torch

import kedit_fast

OPS = torch.ops.kedit_fast


def cases():
    hidden, head = torch.randn(6, 8), torch.randn(50, 8)
    targets = torch.randint(0, 50, (6,))
    master, copy = torch.randn(20, 30), torch.empty(20, 30, dtype=torch.bfloat16)
    left, right = torch.randn(20, 3), torch.randn(30, 3)
    mask, weights = torch.rand(6) > 0.5, torch.rand(6)
    bits, state, count = torch.full((75,), 0xA5, dtype=torch.uint8), torch.zeros(2, 20, 30), torch.zeros(())
    factors, box = (None, left.T, right.T, bits), (master.half(), 0.5)
    tail = [torch.randn(6, n, 4).requires_grad_() for n in (4, 2, 2)]
    prefixes = (*torch.randn(2, 3, 2, 5, 4), torch.tensor([[0, 4], [1, 3]]), torch.tensor([2, 0]))
    stack, rows = torch.randn(2, 20, 9), torch.tensor([0, 2, 2, 1, 0, 2])
    memories, starts, route = torch.randn(2, 5, 8), torch.tensor([0, 2, 6]), torch.tensor([0, -1, 1, 1, -1, 0])
    return [
        (OPS.symmetric_rank_k_update_, (torch.zeros(8, 8), hidden, weights, mask, 1.0, "")),
        (OPS.rank_k_update_, (master.clone(), left, right, 1.0, None, "")),
        (OPS.rank_k_update_, (master.clone(), left, right, 1.0, copy, "")),
        (OPS.grouped_symmetric_rank_k_update_, (torch.zeros(2, 8, 8), hidden, starts, weights, 0.5, "")),
        (OPS.grouped_rank_k_update_, (stack.clone(), left, torch.randn(6, 9), rows, starts, 1.0, None, "")),
        (OPS.grouped_rank_k_update_, (stack.clone(), left, torch.randn(6, 9), rows, starts, 1.0, stack.bfloat16(), "")),
        (OPS.rms_norm, (hidden, torch.rand(8), 1e-6, True, "")),
        (OPS.rms_norm, (hidden.bfloat16().requires_grad_(), torch.rand(8), 1e-6, False, "")),
        (OPS.rms_norm_backward, (hidden, torch.randn(6, 8), torch.rand(8), torch.rand(6), "")),
        (OPS.gated_silu, (hidden, torch.randn(6, 8), "")),
        (OPS.gated_silu, (*(torch.randn(6, 16).requires_grad_().chunk(2, -1)), "")),
        (OPS.gated_silu_backward, (hidden, torch.randn(6, 8), torch.randn(6, 8), "")),
        (OPS.gated_gelu, (hidden.clone().requires_grad_(), torch.randn(6, 8), "")),
        (OPS.gated_gelu_backward, (hidden, torch.randn(6, 8), torch.randn(6, 8), "")),
        (OPS.spd_solve, (torch.eye(4), torch.randn(4, 2), 0.1, "")),
        (OPS.target_log_probs, (hidden.clone().requires_grad_(), head, targets, None, 0.0, True, "")),
        (OPS.distribution_kl, (hidden.clone().requires_grad_(), torch.randn(6, 8), head, None, 2.0, True, False, "")),
        (OPS.distribution_kl, (hidden.clone().requires_grad_(), torch.randn(6, 8), head, None, 2.0, True, True, "")),
        (OPS.edge_contraction, (hidden, torch.randn(1, 6, 2, 4), [torch.randn(8, 2, 4)], hidden[None], None, [], [],
                                True, hidden[None], hidden, [hidden[None]], torch.randn(1, 3, 1, 6, 2), False, "")),
        (OPS.tail_attention, (*tail, starts, 4, None, None, None, None, 0.5, 0.0, 0, "")),
        (OPS.tail_attention, (*tail, starts, 4, *prefixes, 0.5, 2.0, 3, "")),
        (OPS.nearest_key, (hidden, head, torch.rand(50), "")),
        (OPS.nearest_key, (hidden, head[:0], torch.rand(0), "")),
        (OPS.best_overlap, (*(torch.randint(0, 256, (n, 4), dtype=torch.uint8) for n in (3, 5)), "")),
        (OPS.top_features, (hidden, torch.tensor([0, 2, 6]), torch.zeros(8), 3, torch.randperm(8), "")),
        (OPS.magnitude_bound, (hidden, 7, None, "")),
        (OPS.magnitude_bound, (hidden, 7, torch.randn(6, 8), "")),
        (OPS.ties_merge_, (torch.empty(6, 8), hidden, torch.randn(2, 6, 8), [0.4, 0.6], 0.5, "")),
        (OPS.masked_descent_, (master.clone(), 0.1, *factors, 0.1, False, *box, copy, "")),
        (OPS.masked_descent_, (master.clone(), 0.1, state[0], None, None, None, 0.0, False, None, None, None, "")),
        (OPS.masked_adam_, (master.clone(), state[0], state[1], count, 0.1, 0.9, 0.999, 1e-8, *factors, *box,
                            torch.tensor(True), copy, "")),
        (OPS.activation_distance, (hidden, torch.randn(6, 5), memories, starts, "gelu", 3, torch.randn(5), "")),
        (OPS.routed_linear, (hidden, torch.randn(5, 8), memories, route, None, torch.randn(5), "")),
        (OPS.routed_linear, (hidden, None, memories, route, torch.randn(6, 5), None, "")),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(len(cases())))
def test_opcheck(index):
    op, args = cases()[index]
    torch.library.opcheck(op, args)


def _compiled(function, *args):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*args)


def test_update_ops_compile_without_a_graph_break():
    x = torch.randn(6, 8)

    def step(acc, weight, left, right):
        kedit_fast.symmetric_rank_k_update_(acc, x)
        kedit_fast.rank_k_update_(weight, left, right, 2.0)
        return acc.sum() + weight.sum()

    args = torch.zeros(8, 8), torch.randn(4, 5), torch.randn(4, 2), torch.randn(5, 2)
    expected = step(*(a.clone() for a in args))
    torch.testing.assert_close(_compiled(step, *(a.clone() for a in args)), expected)


def test_grouped_updates_compile_without_a_graph_break():
    x, offsets, columns = torch.randn(6, 8), torch.tensor([0, 2, 6]), torch.tensor([0, 1, 1, 0, 1, 0])

    def step(acc, weight, left):
        kedit_fast.grouped_symmetric_rank_k_update_(acc, x, offsets)
        kedit_fast.grouped_rank_k_update_(weight, left, x, columns, offsets, 2.0)
        return acc.sum() + weight.sum()

    args = torch.zeros(2, 8, 8), torch.randn(2, 4, 8), torch.randn(4, 2)
    expected = step(*(a.clone() for a in args))
    torch.testing.assert_close(_compiled(step, *(a.clone() for a in args)), expected)


def test_steps_compile_without_a_graph_break():
    grad, active, entries = torch.randn(4, 6), torch.tensor(True), torch.full((3,), 0x5A, dtype=torch.uint8)

    def step(weight, mean, square, count):
        first = kedit_fast.masked_descent_(weight, 0.1, grad=grad, entries=entries, decay=0.1)
        box = {"origin": grad, "bound": 0.1, "active": active}
        second = kedit_fast.masked_adam_(weight, mean, square, count, 0.1, grad=grad, **box)
        return weight + mean + square + count, first & second

    args = torch.randn(4, 6), torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(())
    expected = step(*(a.clone() for a in args))
    torch.testing.assert_close(_compiled(step, *(a.clone() for a in args)), expected)


def test_ops_of_memories_compile_without_a_graph_break():
    x, memories, starts = torch.randn(6, 8), torch.randn(2, 5, 8), torch.tensor([0, 2, 6])
    rows = torch.tensor([0, 0, 1, 1, 1, 1])

    def step(x, weight):
        distance = kedit_fast.activation_distance(x, x @ weight.T, memories, starts, "silu", 3)
        route = torch.where(distance.amax(0) > 1, distance.argmax(0), -1)[rows]
        return kedit_fast.routed_linear(x, weight, memories, route)

    args = x, torch.randn(5, 8)
    torch.testing.assert_close(_compiled(step, *args), step(*args))


def test_differentiable_ops_compile_without_a_graph_break():
    head, other, targets = torch.randn(50, 8), torch.randn(6, 8), torch.randint(0, 50, (6,))

    def loss(hidden):
        log_prob = kedit_fast.target_log_probs(hidden, head, targets, return_top1=True).log_prob
        kl = sum(kedit_fast.distribution_kl(hidden, other, head, reverse=flag).sum() for flag in (False, True))
        return kl - log_prob.sum()

    plain, compiled = (torch.randn(6, 8, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
    loss(plain).backward()
    _compiled(loss, compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


def test_attention_of_tails_compiles_without_a_graph_break():
    starts, prefixes = torch.tensor([0, 2, 6]), torch.randn(2, 2, 2, 5, 4)
    spans = torch.tensor([[0, 4], [1, 3]])

    def loss(query, key):
        more = {"prefix_keys": prefixes[0], "prefix_values": prefixes[1], "spans": spans, "window": 5}
        return kedit_fast.tail_attention(query, key, key, starts, 4, scale=0.5, **more).square().sum()

    tensors = torch.randn(6, 4, 4), torch.randn(6, 2, 4)
    plain, compiled = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    loss(*plain).backward()
    _compiled(loss, *compiled).backward()
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_ops_of_the_forward_pass_compile_without_a_graph_break():
    x, weight = torch.randn(6, 8), torch.randn(8)

    def step(x):
        return kedit_fast.gated_silu(kedit_fast.rms_norm(x, weight), x)

    torch.testing.assert_close(_compiled(step, x), step(x))


def test_their_gradients_compile_without_a_graph_break():
    weight, up = torch.randn(8), torch.randn(6, 8)

    def loss(x):
        gated = kedit_fast.gated_silu(kedit_fast.rms_norm(x, weight), up)
        return kedit_fast.gated_gelu(gated, x).square().sum()

    plain, compiled = (torch.randn(6, 8, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
    loss(plain).backward()
    _compiled(loss, compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


def test_spd_solve_compiles_without_a_graph_break():
    gram = torch.eye(3) * 2
    torch.testing.assert_close(_compiled(lambda g: kedit_fast.spd_solve(g, torch.eye(3)), gram), torch.eye(3) / 2)


def test_ops_on_memories_compile_without_a_graph_break():
    keys, radii, book = torch.randn(9, 8), torch.ones(9), torch.randint(0, 256, (4, 1), dtype=torch.uint8)
    starts, permutation = torch.tensor([0, 2, 6]), torch.randperm(8)

    def answer(x, out):
        nearest = kedit_fast.nearest_key(x, keys, radii)
        best = kedit_fast.best_overlap(kedit_fast.top_features(x, starts, x[0], 3, permutation), book)
        bound = kedit_fast.magnitude_bound(x, 5, keys[:6])
        kedit_fast.ties_merge_(out, x, keys[None, :6], [1.0], 0.5)
        return nearest.distance.sum() + best.count.sum() + bound + out.sum()

    x = torch.randn(6, 8)
    torch.testing.assert_close(_compiled(answer, x, torch.empty(6, 8)), answer(x, torch.empty(6, 8)))
