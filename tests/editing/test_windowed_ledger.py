"""A ledger and an editor with a window: the same weights, what is older is folded, and nothing grows."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support import make_editor, same, weights

from kedit_fast import EditRequest
from kedit_fast.editing.ledger import Ledger
from kedit_fast.errors import EditError, InvalidArgumentError, MethodError, StatisticsError
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, MaskedUpdate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NULL_SPACE = {"nullspace_rule": "energy", "nullspace_threshold": 0.3, "L2": 2.0}
SUBJECTS = ("Miles Davis", "Danielle Darrieux", "Ebro", "Autonomous University of Madrid")
BATCHES = [
    [EditRequest(prompt, subject, target)]
    for prompt, target in (("{} plays the", "violin"), ("{} is located in", "Sweden"))
    for subject in SUBJECTS
]


def update(k=1):
    return LowRankUpdate(torch.randn(20, k, dtype=torch.float64) * 0.1, torch.randn(30, k, dtype=torch.float64))


def masked():
    return MaskedUpdate.from_mask(update(), torch.rand(20, 30) < 0.4)


def dense():
    return DenseUpdate(torch.randn(20, 30, dtype=torch.float64) * 0.1)


def write(ledger, weight, updates):
    for one in updates:
        with ledger.transaction():
            ledger.write("w", weight, one)


@pytest.mark.parametrize("window", (1, 3, 12))
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rollback_within_the_window_gives_the_bits_of_the_full_ledger(dtype, transposed, window):
    stored = torch.randn(30, 20).to(dtype) if transposed else torch.randn(20, 30).to(dtype)
    weight = stored.T if transposed else stored
    ledger, original, after = Ledger(window), weight.clone(), [weight.clone()]
    for number in range(40):
        write(ledger, weight, [{2: masked, 4: dense}.get(number % 5, update)()])
        after.append(weight.clone())
        assert len(ledger.batches) <= window + max(1, window // 4) + 1 and ledger.count == number + 1
    assert ledger.reach == window and torch.equal(weight, after[-1])
    for undone in (1, window - 1):
        ledger.rollback(undone)
        assert torch.equal(weight, after[ledger.count])
    assert ledger.reach == 0 and ledger.count == 40 - window
    more = [update() for _ in range(3)]
    write(ledger, weight, more)
    assert ledger.reach == min(3, window)
    ledger.rollback(ledger.reach)
    assert torch.equal(weight, after[40 - window]) == (window >= 3)
    ledger.restore()
    assert torch.equal(weight, original) and ledger.count == ledger.reach == 0 and not ledger.names()
    write(ledger, weight, more)
    ledger.rollback()
    assert ledger.count == 2


def test_past_the_window_is_refused_by_name_and_nothing_changes():
    weight, ledger = torch.randn(20, 30), Ledger(3)
    write(ledger, weight, [update() for _ in range(9)])
    before, entries = weight.clone(), list(ledger.batches)
    with pytest.raises(InvalidArgumentError, match="cannot undo 4 batches of 3: with memory_window = 3 the 6 batches"):
        ledger.rollback(4)
    assert torch.equal(weight, before) and ledger.batches == entries and ledger.count == 9
    ledger.rollback(3)


def test_bytes_do_not_grow():
    weight, ledger, counted = torch.randn(20, 30).bfloat16(), Ledger(8), []
    for _ in range(60):
        write(ledger, weight, [update(2)])
        counted.append(ledger.nbytes)
    assert max(counted[:24]) == max(counted[24:]) and counted[-1] < 1.3 * min(counted[20:])


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_a_failure_with_folded_batches_restores_the_bits(monkeypatch, error):
    weight, ledger = torch.randn(20, 30).bfloat16(), Ledger(2)
    write(ledger, weight, [update() for _ in range(7)])
    before, original = weight.clone(), ledger.original("w")[0].clone()

    def failing(*args):
        raise error

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr("kedit_fast.editing.ledger._Matrix.after", failing)  # while it folds
        write(ledger, weight, [update()])
    assert torch.equal(weight, before) and ledger.count == 7 and ledger.reach == 2
    with pytest.raises(error), ledger.transaction():
        ledger.write("w", weight, update())
        ledger.write("w", weight, update())
        raise error
    assert torch.equal(weight, before) and ledger.count == 7 and ledger.reach == 2
    with ledger.transaction():
        ledger.write("w", weight, update())
        ledger.withdraw()
        assert torch.equal(weight, before)
    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr("kedit_fast.editing.ledger.Ledger._forget", failing)
        real = Ledger._replay

        def interrupted(self, names, past, calls=[]):  # noqa: B006
            real(self, names, past)
            calls.append(past)
            if len(calls) == 1:
                raise error

        patched.setattr(Ledger, "_replay", interrupted)
        ledger.restore()
    assert torch.equal(weight, before) and ledger.count == 7
    ledger.restore()
    assert torch.equal(weight, original)


def test_the_total_of_folded_batches_is_the_whole_change():
    for dtype in (torch.float32, torch.bfloat16):
        weight, ledger = torch.randn(20, 30).to(dtype), Ledger(2)
        original, updates = weight.clone(), [update() for _ in range(9)]
        write(ledger, weight, updates)
        total = ledger.total("w")
        assert total.rank == 20  # the smaller side: a matrix, and the identity
        expected = sum(one.dense() for one in updates)
        torch.testing.assert_close(total.dense().double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((original.double() + total.dense().double()).to(dtype), weight, rtol=1e-6, atol=1e-7)
        with pytest.raises(InvalidArgumentError, match="the sum of some batches is not known"):
            ledger.total("w", without={1})


def editor_of(method="alphaedit", **numbers):
    numbers = {
        **(NULL_SPACE if method == "alphaedit" else {}),
        "layers": (0, 1),
        "on_predicted": "allow",
        "v_num_grad_steps": 2,
        **numbers,
    }
    return make_editor("llama", method, torch.float32, mom2_update_weight=10.0, **numbers)


def test_an_editor_with_a_window_writes_what_one_without_writes_and_restores():
    full, bounded = editor_of(), editor_of(memory_window=2)
    original, after = weights(bounded), []
    for batch in BATCHES:
        full.edit(batch)
        bounded.edit(batch)
        after.append(weights(bounded))
        for name, weight in weights(full).items():
            torch.testing.assert_close(weights(bounded)[name], weight, rtol=1e-5, atol=1e-6)
    assert bounded.ledger.count == full.ledger.count and bounded.solver_state.batches == full.ledger.count
    before = weights(bounded)
    with pytest.raises(InvalidArgumentError, match="memory_window = 2"):
        bounded.rollback(3)
    assert same(bounded, before) and bounded.solver_state.batches == bounded.ledger.count
    patch = bounded.patch()
    assert len(patch.requests) == sum(len(bounded._written[n]) for n in range(1, bounded.ledger.count + 1))
    bounded.rollback(2)
    assert same(bounded, after[-3])
    bounded.edit(BATCHES[-2])
    assert same(bounded, after[-2])  # the same keys in the memory: the same bits
    bounded.restore()
    assert same(bounded, original) and not bounded.solver_state.memories
    bounded.edit(BATCHES[0])
    assert same(bounded, after[0])
    bounded.restore()
    applied = patch.apply_(bounded.view.model)
    for name, weight in weights(bounded).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-6, atol=1e-7)
    applied.revert_()
    assert same(bounded, original)


@pytest.mark.parametrize(
    ("place", "error"), (("write", RuntimeError), ("memory", KeyboardInterrupt), ("commit", KeyboardInterrupt))
)
def test_a_failure_after_folds_leaves_bits_state_and_reach(monkeypatch, place, error):
    editor, other = editor_of(memory_window=2, memory_form="primal"), editor_of(memory_window=2, memory_form="primal")
    for batch in BATCHES[:5]:
        editor.edit(batch)
        other.edit(batch)
    before = weights(editor)
    owner, name = {
        "write": (editor.ledger, "write"),
        "memory": (editor.solver_state.memories[1], "commit"),
        "commit": (editor.solver_state, "commit"),
    }[place]
    real = getattr(owner, name)

    def failing(*args):
        real(*args)
        raise error("injected")

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(owner, name, failing)
        editor.edit(BATCHES[5])
    assert same(editor, before) and editor.ledger.count == editor.solver_state.batches == 5
    assert editor.ledger.reach == 2 and all(memory.reach == 2 for memory in editor.solver_state.memories.values())
    for one in (editor, other):
        one.edit(BATCHES[6])
    assert same(editor, weights(other))
    for one in (editor, other):
        one.rollback(2)
    assert same(editor, weights(other))


def test_a_saved_state_continues_and_past_the_window_it_must_be_loaded_again(tmp_path):
    path, first = tmp_path / "state.safetensors", editor_of(memory_window=2)
    for batch in BATCHES[:4]:
        first.edit(batch)
    first.save_state(path)
    second = editor_of(memory_window=2)
    second.view.model.load_state_dict(weights(first))
    second.load_state(path)
    loaded = weights(second)
    for batch in BATCHES[4:7]:
        first.edit(batch)
        second.edit(batch)
        assert same(first, weights(second))
    second.rollback(2)
    with pytest.raises(InvalidArgumentError, match="cannot undo 1 batches of 0"):
        second.rollback()
    second.restore()
    assert same(second, loaded)
    with pytest.raises(EditError, match=r"with memory_window = 2 the keys .* load them again"):
        second.edit(BATCHES[4])
    with pytest.raises(EditError, match="load them again"):
        second.save_state(path)
    assert same(second, loaded)
    second.load_state(path)
    second.edit(BATCHES[4])
    assert second.solver_state.memories[1].count == 5
    other = editor_of()
    other.view.model.load_state_dict(loaded)
    with pytest.raises(StatisticsError, match="different memory_window: 2 there, 0 here"):
        other.load_state(path)


def test_restore_within_the_window_gives_back_the_loaded_state(tmp_path):
    path, first = tmp_path / "state.safetensors", editor_of(memory_window=4)
    first.edit(BATCHES[0])
    first.save_state(path)
    second = editor_of(memory_window=4)
    second.view.model.load_state_dict(weights(first))
    second.load_state(path)
    for batch in BATCHES[1:4]:
        second.edit(batch)
    second.restore()
    assert same(second, weights(first)) and second.solver_state.memories[1].count == 1
    for one in (first, second):
        one.edit(BATCHES[1])
    assert same(second, weights(first))


@pytest.mark.parametrize("method", ("alphaedit", "ultraedit"))
def test_nothing_in_an_editor_grows_with_the_number_of_batches(method):
    numbers = {"alphaedit": {"memory_form": "primal"}, "ultraedit": {"lr": 1e-2}}[method]
    editor, counted = editor_of(method, memory_window=1, **numbers), []
    for batch in (*BATCHES, *BATCHES):
        editor.edit(batch)
        counted.append((reachable_bytes(editor), editor.solver_state.nbytes + editor.ledger.nbytes))
    half = len(BATCHES)  # the same requests again: factors of the same sizes
    for one in (0, 1):
        assert max(size[one] for size in counted[half:]) <= max(size[one] for size in counted[:half])


def reachable_bytes(*roots):
    """Bytes of the tensors that can be reached from some objects."""
    seen, storages, waiting = set(), {}, list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one
        else:
            waiting += vars(one).values() if hasattr(one, "__dict__") else ()
    return sum(storages.values())


def test_methods_and_forms_that_have_no_window_are_refused_or_warned(caplog):
    with pytest.raises(MethodError, match=r"memory_form = 'dual' is out of range for alphaedit: .* with memory_window"):
        editor_of(memory_window=3, memory_form="dual")
    with pytest.raises(MethodError, match="memory_window = -1 is out of range"):
        editor_of(memory_window=-1)
    assert editor_of("memit", memory_window=3, memory_form="dual").ledger.window == 3
    pruning = editor_of("prune", memory_window=3)  # its last step needs all updates one by one
    assert "prune does not use memory_window" in caplog.text and pruning.ledger.window == 0
