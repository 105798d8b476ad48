"""The face for frameworks: functions on tensors, no model and no tokenizer of ours."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from floors import relative_error
from support import random_patch
from tiny_models import make_model

import kedit_fast
from kedit_fast import Covariance, KeyMemory, NullSpace, optimize_values, second_moment, solve_update
from kedit_fast.errors import EditError, InvalidArgumentError, SolveError, StatisticsError
from kedit_fast.patches.gate import Gate


def test_second_moments_of_one_matrix_or_many():
    rows, weights = torch.randn(200, 12), torch.rand(200)
    mask = torch.rand(200) > 0.3
    expected = rows.double().T @ rows.double() / 200
    assert relative_error(second_moment(rows), expected) < 1e-6
    assert relative_error(second_moment(rows.split(33)), expected) < 1e-6
    w = weights.double() * mask
    expected = (rows.double() * w[:, None]).T @ rows.double() / w.sum()
    assert relative_error(second_moment(rows, weights, mask), expected) < 1e-6
    with pytest.raises(StatisticsError, match="no rows"):
        second_moment([])
    with pytest.raises(StatisticsError, match="not finite"):
        second_moment(rows * torch.nan)
    with pytest.raises(InvalidArgumentError, match=r"rows must be \[n, d\]"):
        second_moment(rows[0])
    with pytest.raises(InvalidArgumentError, match="single matrix"):
        second_moment([rows], weights)


def test_memits_solve_is_one_line():
    """Ten lines of a framework: the dense system in fp64; and ours."""
    keys, residuals, corpus = torch.randn(20, 4), torch.randn(6, 4), torch.randn(500, 20)
    cov = corpus.double().T @ corpus.double() / 500
    dense = torch.linalg.solve(100 * cov + keys.double() @ keys.double().T, keys.double())
    expected = residuals.double() @ dense.T
    update = solve_update(keys, residuals, Covariance.from_moment(second_moment(corpus), weight=100))
    assert relative_error(update.dense(), expected) < 1e-5
    weight = torch.randn(6, 20)
    wanted = weight.double() + expected
    update.apply_(weight)
    assert relative_error(weight, wanted) < 1e-6


def test_a_memory_from_the_sum_of_its_keys_solves_as_one_of_the_keys():
    moment = second_moment(torch.randn(300, 20) * torch.logspace(0, -3, 20))
    for preconditioner in (Covariance.from_moment(moment, weight=50), NullSpace.from_covariance(moment, 1e-4, l2=2.0)):
        memory, total = KeyMemory(preconditioner), torch.zeros(20, 20, dtype=torch.float64)
        for _ in range(3):
            keys, residuals = torch.randn(20, 4).double(), torch.randn(5, 4).double()
            memory.commit(memory.solve(keys, residuals)[1])
            total += keys @ keys.T
        again = KeyMemory.from_sum(preconditioner, total)
        for _ in range(2):
            keys, residuals = torch.randn(20, 4).double(), torch.randn(5, 4).double()
            (expected, one), (found, other) = memory.solve(keys, residuals), again.solve(keys, residuals)
            assert relative_error(found.dense(), expected.dense()) < 1e-9
            memory.commit(one)
            again.commit(other)
        again.rollback(2)
        assert again.sizes == (0,)
        with pytest.raises(InvalidArgumentError, match="cannot roll back 1 batches of 0"):
            again.rollback(1)
        for form in ("primal", "dual"):  # a rollback that replays starts from the sum
            folded, steps = KeyMemory.from_sum(preconditioner, total, form), []
            for _ in range(3):
                keys, residuals = torch.randn(20, 9).double(), torch.randn(5, 9).double()
                update, appended = folded.solve(keys, residuals)
                steps.append((keys, residuals, update.dense()))
                folded.commit(appended)
            folded.rollback(2)
            found = folded.solve(*steps[1][:2])[0].dense()
            assert relative_error(found, steps[1][2]) < 1e-12
    with pytest.raises(InvalidArgumentError, match=r"total must be \[20, 20\]"):
        KeyMemory.from_sum(preconditioner, total[:5, :5])
    with pytest.raises(SolveError):
        KeyMemory.from_sum(preconditioner, -1e6 * torch.eye(20, dtype=torch.float64))


class Plain:
    """The published loop with torch's own Adam, a row at a time."""

    def __init__(self, loss, h0, steps, lr, decay, clamp, stop):
        self.deltas, self.losses, self.steps = [], [], []
        for i, h in enumerate(h0):
            delta = torch.zeros_like(h).requires_grad_()
            adam, count = torch.optim.Adam([delta], lr=lr), 0
            for iteration in range(steps):
                adam.zero_grad()
                value = loss(delta, i) + decay * delta.norm() / h.norm() ** 2
                if value < stop or iteration == steps - 1:
                    break
                value.backward()
                adam.step()
                count += 1
                with torch.no_grad():
                    if delta.norm() > clamp * h.norm():
                        delta.mul_(clamp * h.norm() / delta.norm())
            self.deltas.append(delta.detach())
            self.losses.append(float(value.detach()))
            self.steps.append(count)


def test_values_are_those_of_the_published_loop_row_by_row():
    h0, head, targets = torch.randn(6, 16), torch.randn(40, 16), torch.randint(0, 40, (6,))
    head[targets[5]] = 30 * h0[5] / h0[5].norm()  # the last row says its target already

    def loss(delta, i):
        return -torch.log_softmax(head @ (h0[i] + delta), -1)[targets[i]]

    def forward(delta):
        return -torch.log_softmax((h0 + delta) @ head.T, -1).gather(1, targets[:, None])[:, 0]

    numbers = dict(v_num_grad_steps=12, v_lr=0.3, v_weight_decay=0.5, clamp_norm_factor=0.6, v_stop_loss=0.2)
    found = optimize_values(forward, h0, **numbers)
    plain = Plain(loss, h0, *numbers.values())
    assert found.steps.tolist() == plain.steps and len(set(plain.steps)) > 1
    assert found.predicted.tolist() == [steps == 0 for steps in plain.steps] and bool(found.predicted[5])
    assert relative_error(found.deltas, torch.stack(plain.deltas)) < 1e-5
    assert torch.allclose(found.losses, torch.tensor(plain.losses), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.targets, h0.double() + found.deltas.double())
    assert bool((found.deltas.norm(dim=1) <= 0.6 * h0.norm(dim=1) * (1 + 1e-6)).all())


def test_values_with_hooks_on_a_model_of_the_callers_own():
    """A framework's forward: its own hook adds the deltas; ours is the descent alone."""
    model, ids = make_model("gpt2"), torch.randint(3, 300, (3, 9))
    targets, seen = torch.tensor([5, 6, 7]), []
    block = model.transformer.h[1]
    first = block.register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[:, -1])
    )
    with torch.no_grad():
        model(ids)
    first.remove()

    def forward(delta):
        def add(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = torch.cat([hidden[:, :-1], hidden[:, -1:] + delta[:, None]], 1)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(add)
        try:
            logits = model(ids).logits[:, -1]
        finally:
            handle.remove()
        return -torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]

    found = optimize_values(forward, seen[0], v_num_grad_steps=15, v_lr=0.2)
    with torch.no_grad():
        before = forward(torch.zeros_like(found.deltas))
    assert bool((found.losses < 0.7 * before).all())


def test_bad_forwards_and_numbers_are_named():
    h0 = torch.randn(3, 4)
    cases = [
        (lambda d: d.sum(), {}, InvalidArgumentError, r"losses \[3\]"),
        (lambda d: 1.0, {}, InvalidArgumentError, "got float"),
        (lambda d: torch.ones(3), {}, InvalidArgumentError, "depend on the deltas"),
        (lambda d: torch.ones(3, requires_grad=True) * 2, {}, InvalidArgumentError, "depend on the deltas"),
        (lambda d: d.sum(1), {"v_lr": 0.0}, InvalidArgumentError, "v_lr = 0.0 is out of range"),
        (lambda d: d.sum(1) * torch.tensor([1, torch.nan, 1]), {}, EditError, "loss of row 1 is not finite"),
        (lambda d: 5 + d.abs().sqrt().sum(1), {}, EditError, "gradient of rows 0, 1, 2 is not finite"),
    ]
    for forward, numbers, error, message in cases:
        with pytest.raises(error, match=message):
            optimize_values(forward, h0, **numbers)
    with pytest.raises(InvalidArgumentError, match="h0 has values"):
        optimize_values(lambda d: d.sum(1), h0 * torch.nan)
    with pytest.raises(InvalidArgumentError, match="rows of zeros"):
        optimize_values(lambda d: d.sum(1), h0 * torch.tensor([[1.0], [0.0], [1.0]]))
    with torch.inference_mode(), pytest.raises(EditError, match="inference_mode"):
        optimize_values(lambda d: d.sum(1), h0)
    with pytest.raises(InvalidArgumentError, match=r"h0 must be \[b, h\]"):
        optimize_values(lambda d: d.sum(1), h0[0])


def test_everything_that_is_promised_is_at_the_top():
    for name in kedit_fast.__all__:
        assert getattr(kedit_fast, name) is not None


def test_a_gate_lets_swaps_pass_alone_and_requests_together():
    gate, log, most = Gate(), [], 0
    inside = {"serving": 0, "swapping": 0}
    lock = threading.Lock()

    def enter(kind):
        nonlocal most
        with lock:
            inside[kind] += 1
            most = max(most, inside["serving"])
            log.append((inside["serving"], inside["swapping"]))

    def leave(kind):
        with lock:
            inside[kind] -= 1

    def worker(kind, rounds):
        for _ in range(rounds):
            with getattr(gate, kind)():
                enter(kind)
                time.sleep(0.001)
                leave(kind)

    threads = [threading.Thread(target=worker, args=("serving", 60)) for _ in range(4)]
    threads += [threading.Thread(target=worker, args=("swapping", 20)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert all(swapping == 0 or (serving, swapping) == (0, 1) for serving, swapping in log)
    assert most > 1 and len(log) == 4 * 60 + 2 * 20


def test_no_request_sees_half_a_batch():
    """Every answer is that of the model with all edited matrices or with none, to the bit."""
    model, ids = make_model("llama"), torch.arange(5, 25)[None]
    patch, gate, stop = random_patch(model, scale=0.3), Gate(), threading.Event()
    with torch.no_grad():
        plain = model(ids).logits
        applied = patch.apply_(model)
        edited = model(ids).logits
        applied.revert_()
    answers = []

    def serve():
        while not stop.is_set():
            with gate.serving(), torch.no_grad():
                answers.append(model(ids).logits)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        prepared = patch.prepare(model)
        with gate.swapping():
            applied = prepared.swap_()
        time.sleep(0.01)
        with gate.swapping():
            applied.revert_()
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
    kinds = {(torch.equal(answer, plain), torch.equal(answer, edited)) for answer in answers}
    assert kinds <= {(True, False), (False, True)} and (False, True) in kinds and len(answers) > 20


def test_an_error_inside_opens_the_gate_again():
    gate = Gate()
    for kind in ("serving", "swapping"):
        with pytest.raises(ZeroDivisionError), getattr(gate, kind)():
            raise ZeroDivisionError
    with gate.swapping():
        pass
    with gate.serving(), gate.serving():
        pass
