"""A memory with a window: the updates of the full one, taken back to the bit within it, in bytes with a bound."""

from __future__ import annotations

import random

import pytest
import torch
from floors import relative_error

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.solver.key_memory import KeyMemory, window_columns
from kedit_fast.solver.least_squares import solve_update
from kedit_fast.solver.preconditioner import Covariance, Identity, NullSpace, Preconditioner

D, OUT = 48, 4


def moment():
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(1, -4, D, dtype=torch.float64)) @ q.T


def covariance():
    return Covariance.from_moment(moment(), weight=30.0, norm_lambda=2.0)


def null_space():
    return NullSpace.from_covariance(moment(), 0.3, l2=4.0)


def batches(sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(rows, u, generator=generator, dtype=torch.float64) for rows in (D, OUT)) for u in sizes]


def run(memory, work):
    updates = []
    for keys, residuals in work:
        update, appended = memory.solve(keys, residuals)
        memory.commit(appended)
        updates.append(update)
    return updates


def next_rights(memory, work):
    """What a memory solves next, without changing it."""
    mark = memory.mark()
    rights = [update.right for update in run(memory, work)]
    memory.return_to(mark)
    return rights


def bound(d, u, m):
    return 16 * d * d + 8 * (d * u * m + (u * m) ** 2)


def mixed(count, seed=0, most=3):
    draw = random.Random(seed)
    return [draw.randint(1, most) for _ in range(count)]


@pytest.mark.parametrize(
    "space, window, form, count",
    (
        (covariance, 1, "auto", 200),
        (null_space, 7, "auto", 300),
        (covariance, 40, "auto", 200),
        (null_space, 3, "primal", 60),
    ),
)
def test_the_updates_are_those_of_the_full_memory_over_hundreds_of_batches(space, window, form, count):
    work = batches(mixed(count))
    full, bounded = KeyMemory(space()), KeyMemory(space(), form, window)
    for one, other in zip(run(full, work), run(bounded, work), strict=True):
        assert relative_error(other.dense(), one.dense()) < 1e-9
    assert bounded.count == full.count and bounded.batches == len(work)
    assert bounded.reach == window and len(bounded.sizes) < 3 * window_columns(D) + window


def test_the_last_update_is_the_published_solve_with_all_keys():
    """After 400 single edits and some 30 folds: R K^T (S_0 + sum K K^T)^-1, solved densely."""
    work = batches([1] * 400)
    last = run(KeyMemory(covariance(), window=5), work)[-1]
    keys, (key, residual) = torch.cat([k for k, _ in work], 1), work[-1]
    base = 30.0 * moment() + 2.0 * torch.eye(D, dtype=torch.float64)
    assert relative_error(last.dense(), residual @ torch.linalg.solve(base + keys @ keys.T, key).T) < 1e-9


@pytest.mark.parametrize("batch", (0, 1, 9, 30))
def test_the_bytes_have_a_bound_whatever_the_number_of_batches(batch):
    window = 6
    sizes = [batch] * 150 if batch else mixed(300, most=12)
    memory, most, counted = KeyMemory(Identity(D), window=window), 0, []
    for (keys, residuals), u in zip(batches(sizes), sizes, strict=True):
        most = max(most, u)
        memory.commit(memory.solve(keys, residuals)[1])
        counted.append(memory.nbytes)
        assert memory.nbytes < bound(D, most, window)
    assert len(set(counted[100:])) == 1  # flat, not only bounded
    state = memory._state
    assert sum(t.untyped_storage().nbytes() for t in (state.raw, state.mapped, state.gram, state.pair)) == counted[-1]


@pytest.mark.parametrize("d", (1, 2, 4, 10, 64, 300, 1024, 4096, 14336))
def test_the_bound_holds_by_the_number_of_columns(d):
    columns = window_columns(d)
    assert d + 3 * columns * d + columns**2 <= d * d  # beside d u m: the pair, three times the columns, their factor
    assert d < 220 or 64 <= columns <= 256


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", (1, 4, 30))
def test_rollback_within_the_window_gives_the_bits_of_never_having_seen_the_batches(window, seed):
    """Across folds, and again after more batches and a second rollback."""
    draw, space = random.Random(seed), covariance()
    sizes = mixed(draw.randint(60, 110), seed)
    work, more = batches(sizes), batches(mixed(25, 9), seed=9)
    memory = KeyMemory(space, window=window)
    run(memory, work)
    for _ in range(2):
        undone = draw.randint(1, window)
        memory.rollback(undone)
        work = work[: len(work) - undone]
        fresh = KeyMemory(space, window=window)
        run(fresh, work)
        assert memory.batches == fresh.batches and memory.count == fresh.count and memory.reach == window - undone
        for one, other in zip(next_rights(memory, more), next_rights(fresh, more), strict=True):
            assert torch.equal(one, other)
        work += batches(mixed(window, undone), seed=undone)
        run(memory, work[-window:])
        assert memory.reach == window


def test_rollback_past_the_window_is_refused_and_changes_nothing():
    memory, more = KeyMemory(covariance(), window=4), batches([2] * 3, seed=5)
    run(memory, batches([2] * 30))
    before, rights = memory.mark(), next_rights(memory, more)
    with pytest.raises(InvalidArgumentError, match="cannot roll back 5 batches of 4: with a window of 4, older ones"):
        memory.rollback(5)
    assert memory.mark() is before
    memory.rollback(3)
    with pytest.raises(InvalidArgumentError, match="cannot roll back 2 batches of 1"):
        memory.rollback(2)
    memory.rollback(1)
    run(memory, batches([2] * 30)[-4:])
    assert all(torch.equal(a, b) for a, b in zip(next_rights(memory, more), rights, strict=True))


def test_a_mark_gives_back_state_and_reach_also_across_a_fold():
    memory, more = KeyMemory(covariance(), window=3), batches([1] * 40, seed=5)
    run(memory, batches([1] * 40))
    mark, before, rights = memory.mark(), memory.tensors(), next_rights(memory, more)
    run(memory, batches([1] * 40, seed=8))
    memory.return_to(mark)
    assert memory.reach == 3 and all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(next_rights(memory, more), rights, strict=True))


@pytest.mark.parametrize("interrupted", ("commit", "_refolded"))
def test_an_interrupted_rollback_takes_nothing_back(monkeypatch, interrupted):
    memory, more = KeyMemory(covariance(), window=30), batches([2] * 3, seed=5)
    run(memory, batches([1] * 60))
    mark, rights = memory.mark(), next_rights(memory, more)

    def stop(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(KeyMemory, interrupted, stop)
        memory.rollback(30)
    assert memory.mark() is mark
    assert all(torch.equal(a, b) for a, b in zip(next_rights(memory, more), rights, strict=True))


@pytest.mark.parametrize("count", (10, 18, 75))
def test_a_saved_state_continues_with_the_same_bits_and_can_be_undone(tmp_path, count):
    path, space = tmp_path / "memory.safetensors", covariance()
    memory = KeyMemory(space, window=9)
    run(memory, batches([1] * count))
    memory.save(path)
    loaded, more = KeyMemory.load(path, space, window=9), batches(mixed(40), seed=3)
    assert loaded.reach == memory.reach == 9 and loaded.batches == count
    for one, other in zip(next_rights(memory, more), next_rights(loaded, more), strict=True):
        assert torch.equal(one, other)
    for one in (memory, loaded):
        one.rollback(7)
    for one, other in zip(next_rights(memory, more), next_rights(loaded, more), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(StatisticsError, match="kept with a window of 9, here it is 8"):
        KeyMemory.load(path, space, window=8)
    with pytest.raises(StatisticsError, match="kept with a window of 9, here it is 0"):
        KeyMemory.load(path, space)
    KeyMemory(space).save(path)
    with pytest.raises(StatisticsError, match="kept with a window of 0, here it is 9"):
        KeyMemory.load(path, space, window=9)


def test_marks_that_do_not_fit_are_damage():
    memory = KeyMemory(Identity(D), window=3)
    run(memory, batches([1] * 60))
    tensors, about = memory.tensors(), memory.about()
    for place, value in ((0, 7), (2, 5), (3, 90), (5, 61)):
        wrong = dict(tensors, marks=tensors["marks"].clone())
        wrong["marks"][place] = value
        with pytest.raises(StatisticsError, match="damaged"):
            KeyMemory.from_tensors(Identity(D), wrong, about, "the state", window=3)
    with pytest.raises(StatisticsError, match="pair"):
        KeyMemory.from_tensors(Identity(D), dict(tensors, pair=tensors["pair"][1:]), about, "the state", window=3)


def test_files_of_the_first_format_are_read():
    """They hold the sum and the factor apart, and two marks."""
    memory, more = KeyMemory(covariance(), "primal"), batches([2] * 3, seed=3)
    run(memory, batches([3] * 5))
    tensors, about = memory.tensors(), memory.about()
    pair, marks = tensors.pop("pair"), tensors.pop("marks")
    del tensors["folds"]
    tensors |= {"fold": pair[:-1].triu().mT.contiguous(), "total": pair[1:].tril(), "marks": marks[[3, 4]]}
    loaded = KeyMemory.from_tensors(covariance(), tensors, about, "the state", "primal")
    for one, other in zip(next_rights(memory, more), next_rights(loaded, more), strict=True):
        assert torch.equal(one, other)
    loaded.rollback(3)
    memory.rollback(3)
    for one, other in zip(next_rights(memory, more), next_rights(loaded, more), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", (0, 4))
def test_a_sum_from_elsewhere_is_the_first_batch_also_after_a_file(tmp_path, window):
    earlier, work, more = batches([30])[0][0], batches([1] * 30, seed=2), batches([2] * 3, seed=3)
    memory = KeyMemory.from_sum(covariance(), earlier @ earlier.T, window=window)
    full = KeyMemory(covariance())
    run(full, [(earlier, torch.zeros(OUT, 30, dtype=torch.float64))])
    for one, other in zip(run(memory, work), run(full, work), strict=True):
        assert relative_error(one.dense(), other.dense()) < 1e-9
    memory.save(tmp_path / "memory.safetensors")
    loaded = KeyMemory.load(tmp_path / "memory.safetensors", covariance(), window=window)
    for one in (memory, loaded):
        one.rollback(4)
    for one, other in zip(next_rights(memory, more), next_rights(loaded, more), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InvalidArgumentError, match="cannot roll back"):
        memory.rollback(27)
    if window:
        assert memory.nbytes < bound(D, 1, window) and memory._base.pair is None


@pytest.mark.parametrize("columns", (3, 60))
def test_unmoved_columns_stand_in_one_batch_also_where_it_folds(columns):
    memory, unmoved = KeyMemory(covariance(), window=3), torch.randn(D, columns, dtype=torch.float64)
    seen = torch.zeros(D, 0, dtype=torch.float64)
    base = 30.0 * moment() + 2.0 * torch.eye(D, dtype=torch.float64)
    for keys, residuals in batches([1] * 40):
        update, appended = memory.solve(keys, residuals, unmoved=unmoved)
        seen = torch.cat([seen, keys], 1)
        system = base + unmoved @ unmoved.T + seen @ seen.T
        assert relative_error(update.dense(), residuals @ torch.linalg.solve(system, keys).T) < 1e-9
        memory.commit(appended)
    assert memory.count == 40


def test_a_window_that_cannot_be_is_refused():
    for window, form in ((-1, "auto"), (3, "dual")):
        with pytest.raises(InvalidArgumentError, match="window must be 0 or above, and with one"):
            KeyMemory(Identity(D), form, window)


def test_the_first_batch_of_a_window_is_that_of_one_batch():
    (work,) = batches([4])
    space: Preconditioner = covariance()
    one = run(KeyMemory(space, window=2), [work])[0]
    assert relative_error(one.dense(), solve_update(*work, space).dense()) < 1e-12
