"""Dense updates in the ledger, in records of batches and through a batch's `write`."""

from __future__ import annotations

import pytest
import torch
from floors import relative_error
from support import REQUESTS, make_editor

from kedit_fast.editing.batch_record import BatchRecord
from kedit_fast.editing.ledger import Ledger
from kedit_fast.editing.schedules import SCHEDULES
from kedit_fast.editing.solver_state import Committed
from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, MaskedUpdate, total_of, update_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dense(scale=0.1):
    return DenseUpdate(torch.randn(20, 30, dtype=torch.float64) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_the_weight_is_the_master_rounded_once_and_rollback_gives_the_earlier_bits(dtype, transposed):
    stored = torch.randn(30, 20).to(dtype) if transposed else torch.randn(20, 30).to(dtype)
    weight = stored.T if transposed else stored
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ledger, before, updates = Ledger(), [weight.clone()], [dense() for _ in range(4)]
    master = weight.to(wide, copy=True)
    for update in updates:
        with ledger.transaction():
            ledger.write("w", weight, update)
        master = master + update.delta.to(wide)
        assert torch.equal(weight, master.to(dtype))
        before.append(weight.clone())
    total = ledger.total("w")
    assert isinstance(total, DenseUpdate) and relative_error(total.delta, sum(u.delta for u in updates)) < 1e-6
    for count in (1, 2, 1):
        ledger.rollback(count)
        assert torch.equal(weight, before[ledger.count])


def test_what_cannot_be_written_changes_nothing():
    weight, ledger = torch.randn(20, 30), Ledger()
    before = weight.clone()
    for bad in (DenseUpdate(torch.full((20, 30), torch.inf)), DenseUpdate(torch.ones(30, 20))):
        with pytest.raises((EditError, InvalidArgumentError)), ledger.transaction():
            ledger.write("w", weight, dense())
            ledger.write("w", weight, bad)
        assert torch.equal(weight, before) and not ledger.count
    with pytest.raises(InvalidArgumentError, match="delta must be"):
        DenseUpdate(torch.ones(3))


def test_columns_are_those_of_the_matrix_and_kinds_add_up():
    factors = LowRankUpdate(torch.randn(20, 2), torch.randn(30, 2))
    masked, matrix = MaskedUpdate.from_mask(factors, torch.rand(20, 30) > 0.5), DenseUpdate(torch.randn(20, 30))
    for update in (factors, masked, matrix):
        assert update.shape == (20, 30) and update_of(vars(update)) == update
        assert torch.equal(update.columns_of(slice(3, 17)).dense(), update.dense()[:, 3:17])
        assert update.norm() == pytest.approx(float(update.dense().double().norm()), rel=1e-6)
    total = total_of([factors, masked, matrix])
    assert torch.equal(total.dense(), factors.dense() + masked.dense() + matrix.dense())
    with pytest.raises(ValueError, match="no update has the parts"):
        update_of({"left": factors.left})


def test_a_record_repeats_the_bits():
    weight, ledger = torch.randn(20, 30).bfloat16(), Ledger()
    with ledger.transaction():
        ledger.write("w", weight, dense())
    record = BatchRecord(ledger.batches[-1], Committed({}, {}, {}, {}), {"w": ledger.bits("w")}, {})
    again = BatchRecord.from_parts(record.facts(), record.tensors())
    other = Ledger()
    ledger.rollback()
    with other.transaction():
        other.repeat(again.entries, {"w": weight})
    assert other.bits("w") == record.bits["w"]


def test_an_editor_writes_it_as_it_is_and_repeats_and_undoes_it(monkeypatch):
    editor, other = (make_editor("llama", layers=(0,), frobenius_limit=1e-3) for _ in range(2))
    (module,) = editor.modules
    before = editor.modules[module].clone()
    delta = torch.randn(before.shape) * 0.01
    monkeypatch.setitem(SCHEDULES, editor.recipe.schedule, lambda batch: batch.write(module, DenseUpdate(delta)))
    result = editor.edit(REQUESTS[:1])
    edited = before + delta
    assert torch.equal(editor.modules[module], edited)
    assert result.relative_norms[f"{module}.weight"] == pytest.approx(float(delta.norm() / before.norm()), rel=1e-5)
    other.repeat(editor.recorded(result), result.requests)
    assert torch.equal(other.modules[module], edited)
    patch = editor.patch()
    assert isinstance(patch.updates[module], DenseUpdate)
    editor.rollback()
    assert torch.equal(editor.modules[module], before)
    patch.apply_(editor.view.model)
    assert torch.equal(editor.modules[module], edited)
