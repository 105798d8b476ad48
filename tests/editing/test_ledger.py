from __future__ import annotations

import pytest
import torch

from kedit_fast.backends import use_backend
from kedit_fast.editing.ledger import Ledger
from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.solver.low_rank import LowRankUpdate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def update(out=20, inner=30, k=3, scale=0.1):
    return LowRankUpdate(torch.randn(out, k, dtype=torch.float64) * scale, torch.randn(inner, k, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_rollback_gives_the_bits_of_never_having_applied(dtype, transposed):
    stored = torch.randn(30, 20).to(dtype) if transposed else torch.randn(20, 30).to(dtype)
    weight = stored.T if transposed else stored
    ledger, snapshots = Ledger(), [weight.clone()]
    for _ in range(5):
        with ledger.transaction():
            ledger.write("w", weight, update())
            ledger.write("w", weight, update(k=1))
        snapshots.append(weight.clone())
    for count in (1, 3, 1):
        ledger.rollback(count)
        assert torch.equal(weight, snapshots[len(ledger.batches)])
    assert len(ledger.batches) == 0
    with pytest.raises(InvalidArgumentError, match="cannot undo 1 batches of 0"):
        ledger.rollback()


def test_replay_uses_the_backend_that_wrote():
    weight, ledger, other = torch.randn(20, 30), Ledger(), torch.randn(20, 30)
    with use_backend("torch"), ledger.transaction():
        ledger.write("w", weight, update(k=9))
    kept = weight.clone()
    with ledger.transaction():
        ledger.write("w", weight, update(k=9))
        ledger.write("other", other, update())
    ledger.rollback()
    assert torch.equal(weight, kept)
    assert ledger.batches[0][0].backend == "torch"


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_a_failure_inside_a_batch_restores_every_matrix(error):
    first, second, ledger = torch.randn(20, 30).bfloat16(), torch.randn(20, 30), Ledger()
    with ledger.transaction():
        ledger.write("first", first, update())
    before = first.clone(), second.clone()
    with pytest.raises(error), ledger.transaction():
        ledger.write("first", first, update())
        ledger.write("second", second, update())
        raise error
    assert torch.equal(first, before[0]) and torch.equal(second, before[1]) and len(ledger.batches) == 1
    with ledger.transaction():
        ledger.write("second", second, update())
    ledger.restore()
    assert torch.equal(second, before[1])


def test_small_updates_add_up_in_the_master():
    weight, ledger = torch.ones(4, 4, dtype=torch.bfloat16), Ledger()
    for _ in range(100):
        with ledger.transaction():
            ledger.write("w", weight, LowRankUpdate(torch.full((4, 1), 1e-3), torch.ones(4, 1)))
    assert torch.allclose(weight.float(), torch.full((4, 4), 1.1), atol=4e-3)


def test_updates_that_are_not_finite_or_overflow_are_refused():
    weight, ledger = torch.randn(20, 30).half(), Ledger()
    before = weight.clone()
    bad = update()
    bad.left[0, 0] = float("nan")
    for wrong in (bad, update(scale=1e300), update(scale=1e30)):
        with pytest.raises(EditError, match=r"finite|overflow"), ledger.transaction():
            ledger.write("w", weight, wrong)
        assert torch.equal(weight, before)


def test_factors_wider_than_the_matrix_are_compacted():
    weight, ledger, big = torch.zeros(20, 30), Ledger(), update(k=200)
    with ledger.transaction():
        ledger.write("w", weight, big)
    assert ledger.batches[0][0].update.rank <= 20
    torch.testing.assert_close(weight.double(), big.dense(), rtol=1e-4, atol=1e-4)


def test_writes_belong_inside_a_transaction():
    with pytest.raises(EditError, match="inside"):
        Ledger().write("w", torch.zeros(20, 30), update())


def test_a_weight_changed_by_something_else_is_not_overwritten():
    for dtype in (torch.bfloat16, torch.float32):
        weight, ledger = torch.randn(20, 30).to(dtype), Ledger()
        with ledger.transaction():
            ledger.write("w", weight, update())
        weight[3, 4] += 1.0
        changed = weight.clone()
        with pytest.raises(EditError, match="changed by something else"), ledger.transaction():
            ledger.write("w", weight, update())
        weight.copy_(changed)
        with pytest.raises(EditError, match="changed by something else"):
            ledger.rollback()
        assert torch.equal(weight, changed) and len(ledger.batches) == 1


def test_after_a_restore_the_weight_is_free_to_change():
    weight, ledger = torch.randn(20, 30).bfloat16(), Ledger()
    with ledger.transaction():
        ledger.write("w", weight, update())
    ledger.restore()
    weight.copy_(torch.randn(20, 30))
    before = weight.clone()
    with ledger.transaction():
        ledger.write("w", weight, update())
    ledger.restore()
    assert torch.equal(weight, before)


def test_an_interrupted_rollback_takes_nothing_back(monkeypatch):
    weight, ledger = torch.randn(20, 30), Ledger()
    for _ in range(3):
        with ledger.transaction():
            ledger.write("w", weight, update())
    before, real, calls = weight.clone(), Ledger._replay, []

    def interrupted(self, names, batches):
        calls.append(names)
        real(self, names, batches)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "_replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.rollback(2)
    assert torch.equal(weight, before) and len(ledger.batches) == 3
