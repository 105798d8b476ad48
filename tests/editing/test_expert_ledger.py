"""Writes to the stacked weights of experts: in order, undone bit for bit, folded, recorded and written again."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import PREFIXES, REQUESTS
from tiny_models import make_model, make_tokenizer

pytest.importorskip("transformers.core_model_loading", reason="transformers 5 has experts modules")

from tiny_models import MIXTURES

from kedit_fast import Editor
from kedit_fast.editing.batch_record import BatchRecord
from kedit_fast.editing.ledger import Ledger
from kedit_fast.editing.solver_state import Committed
from kedit_fast.errors import EditError, MethodError
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.solver.low_rank import DenseUpdate
from kedit_fast.support.matrix_bits import edit_fingerprint, sha256
from kedit_fast.workflow import run_edits

E, OUT, INNER = 5, 12, 7
FAST = {"v_num_grad_steps": 3, "v_lr": 0.1, "clamp_norm_factor": 0.5, "mom2_adjustment": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def update(u=3, scale=0.1, seed=0, untouched=()):
    """A random update of some of the experts in fp64; none of those in `untouched`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(E, u, generator=generator) < 0.6
    chosen[0, 0] = True
    chosen[list(untouched)] = False
    offsets = torch.tensor([0, *itertools.accumulate(chosen.sum(1).tolist())])
    columns = chosen.nonzero()[:, 1]
    left = torch.randn(OUT, u, dtype=torch.float64, generator=generator) * scale
    return ExpertUpdate(
        left, torch.randn(len(columns), INNER, dtype=torch.float64, generator=generator), columns, offsets
    )


def by_hand(change):
    """Delta [E, out, m] of an update, one row of its right factor after the other."""
    delta, bounds = torch.zeros(E, OUT, INNER, dtype=torch.float64), change.offsets.tolist()
    for expert in range(E):
        for row in range(bounds[expert], bounds[expert + 1]):
            delta[expert] += torch.outer(change.left[:, int(change.columns[row])], change.right[row])
    return delta


def stack(dtype, transposed, seed=0):
    """A weight [E, out, m] as a model has it: in one piece, or each matrix stored [m, out]."""
    torch.manual_seed(seed)
    stored = torch.randn(E, INNER, OUT) if transposed else torch.randn(E, OUT, INNER)
    stored = stored.to(dtype)
    return stored.mT if transposed else stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_rollback_of_experts_gives_the_bits_of_never_having_applied(dtype, transposed):
    weight = stack(dtype, transposed)
    ledger, snapshots, expected = Ledger(), [weight.clone()], weight.double().clone()
    for number in range(4):
        changes = update(seed=number), update(u=1, seed=10 + number, untouched=(4,))
        with ledger.transaction():
            for change in changes:
                ledger.write("w", weight, change)
        snapshots.append(weight.clone())
        expected += sum(map(by_hand, changes))
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * float(torch.finfo(dtype).eps))
        torch.testing.assert_close(weight.double(), expected, rtol=tolerance, atol=tolerance)
    for count in (1, 2, 1):
        ledger.rollback(count)
        assert torch.equal(weight, snapshots[ledger.count])
    assert ledger.count == 0 and ledger.names() == []


def test_experts_without_rows_stay_as_they_are_bit_for_bit():
    weight = stack(torch.bfloat16, False)
    before, ledger = weight.clone(), Ledger()
    with ledger.transaction():
        ledger.write("w", weight, update(untouched=(1, 3)))
    changed = [not torch.equal(one, other) for one, other in zip(weight, before, strict=True)]
    assert changed[0] and not changed[1] and not changed[3]


def test_a_failure_inside_a_batch_restores_the_experts():
    weight, ledger = stack(torch.bfloat16, True), Ledger()
    with ledger.transaction():
        ledger.write("w", weight, update())
    before = weight.clone()
    with pytest.raises(KeyboardInterrupt), ledger.transaction():
        ledger.write("w", weight, update(seed=1))
        raise KeyboardInterrupt
    assert torch.equal(weight, before) and ledger.count == 1
    bad = update()
    bad.right[0, 0] = float("nan")
    with pytest.raises(EditError, match="not finite"), ledger.transaction():
        ledger.write("w", weight, bad)
    weight[2, 3, 4] += 1
    with pytest.raises(EditError, match="changed by something else"):
        ledger.rollback()


def test_the_total_of_experts_is_the_sum_of_their_updates():
    weight, ledger = stack(torch.float32, False), Ledger()
    changes = [update(seed=number) for number in range(3)]
    for change in changes:
        with ledger.transaction():
            ledger.write("w", weight, change)
    total = ledger.total("w")
    assert isinstance(total, ExpertUpdate) and total.rank == 9
    torch.testing.assert_close(total.dense().double(), sum(map(by_hand, changes)), rtol=1e-5, atol=1e-6)
    some = ledger.total("w", without={2}).dense().double()
    torch.testing.assert_close(some, by_hand(changes[0]) + by_hand(changes[2]), rtol=1e-5, atol=1e-6)
    nothing = ledger.total("w", only=())
    assert isinstance(nothing, ExpertUpdate) and nothing.shape == (E, OUT, INNER) and not nothing.dense().any()
    with ledger.transaction():
        ledger.write("w", weight, DenseUpdate(by_hand(update(seed=7))))
    assert ledger.total("w").shape == (E, OUT, INNER)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_old_batches_of_experts_are_folded_and_the_rest_is_undone_bit_for_bit(dtype):
    weight, other = stack(dtype, True), stack(dtype, True)
    original, windowed, whole = weight.clone(), Ledger(window=2), Ledger()
    snapshots = []
    for number in range(7):
        for ledger, written in ((windowed, weight), (whole, other)):
            with ledger.transaction():
                ledger.write("w", written, update(seed=number))
        assert torch.equal(weight, other)
        snapshots.append(weight.clone())
    assert len(windowed.batches) < 7 and windowed.reach == 2
    change = weight.double() - original.double()
    torch.testing.assert_close(windowed.total("w").dense().double(), change, rtol=0, atol=0.05)
    windowed.rollback(2)
    assert torch.equal(weight, snapshots[4])
    windowed.restore()
    assert torch.equal(weight, original)


def test_a_recorded_batch_of_experts_is_written_again_with_the_same_bits():
    weight, again = stack(torch.bfloat16, True), stack(torch.bfloat16, True)
    ledger, other = Ledger(), Ledger()
    with ledger.transaction():
        ledger.write("w", weight, update())
        ledger.write("w", weight, DenseUpdate(by_hand(update(seed=3))))
    record = BatchRecord(ledger.batches[-1], Committed({}, {}, {}, {}), {"w": ledger.bits("w")}, {})
    tensors = {name: tensor.clone() for name, tensor in record.tensors().items()}
    read = BatchRecord.from_parts(record.facts(), tensors)
    assert isinstance(read.entries[0].update, ExpertUpdate) and read.entries[0].backend == record.entries[0].backend
    with other.transaction():
        other.repeat([entry.on(again.device) for entry in read.entries], {"w": again})
    assert torch.equal(weight, again) and other.bits("w") == read.bits["w"]
    other.rollback()
    assert torch.equal(again, stack(torch.bfloat16, True))


def test_fingerprints_of_stacks_see_every_change_whatever_the_strides():
    weight, same = stack(torch.bfloat16, False), stack(torch.bfloat16, False).mT.contiguous().mT
    for fingerprint in (sha256, lambda tensor: edit_fingerprint([tensor])):
        before = fingerprint(weight)
        assert fingerprint(same) == before
        changed = weight.clone()
        changed[4, 3, 2] += 1
        assert fingerprint(changed) != before
        changed = weight.clone()
        changed[[0, 1]] = changed[[1, 0]]
        assert fingerprint(changed) != before


def make_editor(kind="qwen3_moe", method="memit", dtype=torch.float64):
    """An editor of a tiny mixture whose S is the identity."""
    model = make_model(kind, dtype)
    return Editor(model, make_tokenizer(), method, layers=[1, 2], hparams=FAST, prefixes=PREFIXES)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_an_editor_of_experts_rolls_back_and_its_patch_gives_another_copy_the_edits(kind, dtype):
    editor = make_editor(kind, dtype=dtype)
    model = editor.view.model
    before = bits(model)
    editor.edit(REQUESTS[:1])
    once = bits(model)
    result = editor.edit(REQUESTS[1:])
    names = {editor.view.weight_name(layer) for layer in (1, 2)}
    assert all(name.endswith("experts.down_proj") for name in names)
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, once[name])} == names
    assert set(result.updates) == names and all(norm > 0 for norm in result.relative_norms.values())
    patch, other = editor.patch(), make_model(kind, dtype)
    assert set(patch.updates) == names and all(isinstance(u, ExpertUpdate) for u in patch.updates.values())
    assert {target.transposed for target in patch.targets.values()} == {kind == "gpt_oss"}
    applied = patch.apply_(other)
    for name in names:
        there, here = other.state_dict()[name].double(), model.state_dict()[name].double()
        step = 2 * float(torch.finfo(dtype).eps)
        assert torch.allclose(there, here, rtol=max(1e-6, step), atol=1e-6)
    applied.revert_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    editor.rollback()
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())
    editor.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shaped_updates_of_experts_are_those_of_the_stacked_matrix():
    for method in ("rect", "prune"):
        editor = make_editor(method=method)
        before = bits(editor.view.model)
        editor.edit(REQUESTS)
        edited = bits(editor.view.model)
        editor.finish()
        for name in editor.ledger.names():
            delta = edited[name] - before[name]  # [E, h, m]
            if method == "rect":
                assert float((delta != 0).double().mean()) == pytest.approx(editor.hparams.rect_keep, abs=0.01)
                continue
            u, s, vh = torch.linalg.svd(delta.transpose(0, 1).flatten(1), full_matrices=False)
            original = before[name].transpose(0, 1).flatten(1)
            largest = torch.linalg.matrix_norm(original, 2)
            s = torch.where(s > largest, (s / largest).clamp(min=1).log() + largest, s)
            expected = original + (u * s) @ vh
            now = editor.view.model.state_dict()[name].transpose(0, 1).flatten(1)
            torch.testing.assert_close(now, expected, rtol=1e-9, atol=1e-9)
        editor.restore()
        assert all(torch.equal(tensor, before[name]) for name, tensor in editor.view.model.state_dict().items())


def test_a_run_on_experts_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path):
    def run(folder, requests, fails=None):
        model = make_model("mixtral", torch.bfloat16)
        options = {"hparams": {**FAST, "layers": (1, 2)}, "batch_size": 1, "on_error": "skip", "metrics": "cf.accuracy"}
        options["checkpoint_every"] = None if folder is None else 1
        with pytest.MonkeyPatch.context() as patch:
            if fails is not None:
                edit = Editor.edit
                patch.setattr(Editor, "edit", lambda self, *a, **o: fails(self) or edit(self, *a, **o))
            report = run_edits(
                model, make_tokenizer(), requests, "memit", statistics=None, checkpoint=folder, **options
            )
        return {name: sha256(tensor) for name, tensor in model.state_dict().items()}, report.editor.patch().digest

    def stop(editor):
        if editor.ledger.count == 2:
            raise KeyboardInterrupt

    whole = run(None, REQUESTS)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", REQUESTS, stop)
    assert run(tmp_path / "run", REQUESTS) == whole
    assert run(tmp_path / "run", REQUESTS, lambda editor: pytest.fail("nothing is left to edit")) == whole


def test_erasing_is_refused_at_experts():
    editor = make_editor()
    with pytest.raises(MethodError, match="has experts"):
        editor.erase(["The old tower.", "Because I saw."], [0, 1])
    assert editor.ledger.count == 0
