"""Sequential states: both forms against the dense recursion, taken back to the bit, saved and loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from floors import relative_error

from kedit_fast.errors import InvalidArgumentError, SolveError, StatisticsError
from kedit_fast.solver.key_memory import CHECK_EVERY, DRIFT_LIMIT, FOLD_ABOVE, KeyMemory
from kedit_fast.solver.preconditioner import Covariance, Identity, NullSpace

D, OUT = 60, 20


def moment(seed=0, low=-4.0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(1, low, D, dtype=torch.float64)) @ q.T


def batches(count, u, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield tuple(torch.randn(rows, u, generator=generator, dtype=torch.float64) for rows in (D, OUT))


PRECONDITIONERS = {
    "identity": lambda: Identity(D),
    "covariance": lambda: Covariance.from_moment(moment(), weight=30.0, norm_lambda=2.0),
    "null space, own basis": lambda: NullSpace.from_covariance(moment(), 3e-3),
    "null space, rest's basis": lambda: NullSpace.from_covariance(moment(), 0.3, l2=4.0),
}


def run(memory, work):
    updates = []
    for keys, residuals in work:
        update, appended = memory.solve(keys, residuals)
        memory.commit(appended)
        updates.append(update)
    return updates


def same_state(one, other):
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def dense_recursion(preconditioner, work):
    """The published d x d solves: P (K K^T + cache) + L2 I, or S_0 + cache + K K^T."""
    eye, cache = torch.eye(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    for keys, residuals in work:
        if isinstance(preconditioner, NullSpace):
            p = preconditioner.project(eye)
            system = p @ (keys @ keys.T + cache) + preconditioner.l2 * eye
            yield torch.linalg.solve(system, p @ keys @ residuals.T).T
        else:
            base = eye if isinstance(preconditioner, Identity) else 30.0 * moment() + 2.0 * eye
            yield residuals @ torch.linalg.solve(base + cache + keys @ keys.T, keys).T
        cache = cache + keys @ keys.T


@pytest.mark.parametrize("form", ("auto", "dual", "primal"))
@pytest.mark.parametrize("u", (1, 7, D // 2, D, 2 * D))
@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_ten_batches_equal_the_dense_recursion(kind, u, form):
    preconditioner = PRECONDITIONERS[kind]()
    memory = KeyMemory(preconditioner, form)
    work = list(batches(10, u))
    for update, expected in zip(run(memory, work), dense_recursion(preconditioner, work), strict=True):
        assert relative_error(update.dense(), expected) < 1e-9
    assert memory.count == 10 * u and memory.drift() < DRIFT_LIMIT


@pytest.mark.parametrize("form", ("auto", "dual", "primal"))
@pytest.mark.parametrize("kept", (0, 1, 3, 6, 19, 20))
def test_rollback_gives_the_bits_of_never_having_seen_a_batch(form, kept):
    """Across folds: 5 keys a batch fold at the thirteenth in the automatic form, each time in the primal one."""
    preconditioner = PRECONDITIONERS["covariance"]()
    work = list(batches(20, 5))
    memory, fresh = KeyMemory(preconditioner, form), KeyMemory(preconditioner, form)
    run(memory, work)
    memory.rollback(20 - kept)
    run(fresh, work[:kept])
    assert same_state(memory, fresh) and memory.sizes == (5,) * kept
    more = list(batches(3, 4, seed=9))
    for one, other in zip(run(memory, more), run(fresh, more), strict=True):
        assert torch.equal(one.right, other.right)


def test_rollback_past_a_repair(monkeypatch):
    monkeypatch.setattr("kedit_fast.solver.key_memory.DRIFT_LIMIT", -1.0)  # every check repairs
    preconditioner = PRECONDITIONERS["covariance"]()
    work = list(batches(CHECK_EVERY + 2, 1))
    memory, fresh = KeyMemory(preconditioner), KeyMemory(preconditioner)
    run(memory, work)
    memory.rollback(4)
    run(fresh, work[: CHECK_EVERY - 2])
    assert same_state(memory, fresh)


def test_auto_folds_by_cost_and_appends_below():
    memory = KeyMemory(Identity(D))
    run(memory, batches(6, 10))
    assert memory._state.pair is None and memory._state.columns == FOLD_ABOVE * D
    run(memory, batches(1, 1))
    assert memory._state.pair is not None and memory._state.columns == 0
    run(memory, batches(1, 10))
    assert memory._state.columns == 10
    whole = KeyMemory(Identity(D))
    run(whole, batches(1, 41))  # one batch above two thirds
    assert whole._state.pair is not None


@pytest.mark.parametrize("form", ("dual", "primal"))
def test_drift_is_seen_and_repaired(form):
    memory, fresh = (KeyMemory(PRECONDITIONERS["covariance"](), form) for _ in range(2))
    run(memory, batches(4, 5))
    if form == "primal":
        assert memory.drift() == 0.0  # nothing has been appended since the fold
        return
    memory._state.gram[:20, :20] += 1e-6 * torch.randn(20, 20).tril()
    assert memory.drift() > 1e-8
    memory.repair()
    assert memory.drift() < 1e-14
    run(fresh, batches(4, 5))
    work = list(batches(1, 5, seed=5))
    assert relative_error(run(memory, work)[0].dense(), run(fresh, work)[0].dense()) < 1e-12


@pytest.mark.parametrize("form", ("auto", "dual", "primal"))
@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_a_saved_state_gives_the_same_next_updates(tmp_path, kind, form):
    memory = KeyMemory(PRECONDITIONERS[kind](), form)
    run(memory, batches(7, 5))
    memory.save(tmp_path / "memory.safetensors")
    loaded = KeyMemory.load(tmp_path / "memory.safetensors", PRECONDITIONERS[kind](), form)
    assert same_state(memory, loaded)
    work = list(batches(8, 5, seed=3))
    for one, other in zip(run(memory, work), run(loaded, work), strict=True):
        assert torch.equal(one.right, other.right)
    loaded.rollback(9)
    memory.rollback(9)
    assert same_state(memory, loaded) and len(loaded.sizes) == 6


def test_a_state_of_other_numbers_or_statistics_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    memory = KeyMemory(PRECONDITIONERS["covariance"]())
    run(memory, batches(2, 5))
    memory.save(path)
    with pytest.raises(StatisticsError, match=r"'weight': 30\.0"):
        KeyMemory.load(path, Covariance.from_moment(moment(), weight=31.0, norm_lambda=2.0))
    with pytest.raises(StatisticsError, match="other statistics"):
        KeyMemory.load(path, Covariance.from_moment(moment(seed=5), weight=30.0, norm_lambda=2.0))
    with pytest.raises(StatisticsError, match="null space"):
        KeyMemory.load(path, PRECONDITIONERS["null space, own basis"]())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StatisticsError, match="cannot read"):
        KeyMemory.load(path, PRECONDITIONERS["covariance"]())
    with pytest.raises(StatisticsError, match="cannot write"):
        memory.save(tmp_path / "nowhere" / "memory.safetensors")
    with pytest.raises(StatisticsError, match="cannot write"):
        memory.save(path / "below a file")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bad_calls_are_named_and_change_nothing():
    memory = KeyMemory(Identity(D))
    (keys, residuals), *_ = batches(1, 3)
    _, appended = memory.solve(keys, residuals)
    memory.commit(appended)
    before = memory.tensors()
    with pytest.raises(InvalidArgumentError, match="solve it again"):
        memory.commit(appended)
    with pytest.raises(InvalidArgumentError, match="cannot roll back 2 batches of 1"):
        memory.rollback(2)
    keys[0, 0] = float("nan")
    with pytest.raises(SolveError, match="keys has values"):
        memory.solve(keys, residuals)
    with pytest.raises(InvalidArgumentError, match="form"):
        KeyMemory(Identity(D), "dense")
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())


def test_a_batch_solved_for_another_state_is_refused():
    memory = KeyMemory(Identity(D))
    (first, second, third) = batches(3, 3)
    run(memory, [first])
    _, stale = memory.solve(*second)
    memory.rollback()
    run(memory, [third])
    with pytest.raises(InvalidArgumentError, match="solve it again"):
        memory.commit(stale)
    assert memory.drift() < DRIFT_LIMIT


@pytest.mark.parametrize("form", ("dual", "primal"))
@pytest.mark.parametrize("stage", ("_grown", "_drift", "_repaired"))
def test_a_failure_inside_commit_keeps_nothing(monkeypatch, form, stage):
    from kedit_fast.solver import key_memory

    monkeypatch.setattr(key_memory, "CHECK_EVERY", 1)
    monkeypatch.setattr(key_memory, "DRIFT_LIMIT", -1.0)
    memory, fresh = KeyMemory(Identity(D), form), KeyMemory(Identity(D), form)
    work = list(batches(3, 3))
    for one in (memory, fresh):
        run(one, work[:1])
    _, appended = memory.solve(*work[1])

    def failing(*args):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(key_memory, stage, failing)
        memory.commit(appended)
    assert same_state(memory, fresh)
    assert torch.equal(run(memory, work[2:])[0].right, run(fresh, work[2:])[0].right)


def test_a_state_fits_any_basis_of_the_same_null_space(tmp_path):
    """The basis of a degenerate space is arbitrary: another process may find another one."""
    space = PRECONDITIONERS["null space, own basis"]()
    turn, _ = torch.linalg.qr(torch.randn(space.basis.shape[1], space.basis.shape[1], dtype=torch.float64))
    turned = replace(space, basis=space.basis @ turn)
    memory = KeyMemory(space)
    run(memory, batches(3, 5))
    memory.save(tmp_path / "memory.safetensors")
    loaded = KeyMemory.load(tmp_path / "memory.safetensors", turned)
    work = list(batches(1, 5, seed=4))
    assert relative_error(run(loaded, work)[0].dense(), run(memory, work)[0].dense()) < 1e-12
    moved = replace(space, basis=torch.roll(space.basis, 1, 0))
    with pytest.raises(StatisticsError, match="other statistics"):
        KeyMemory.load(tmp_path / "memory.safetensors", moved)
    with pytest.raises(StatisticsError, match="kept with auto, here it is dual"):
        KeyMemory.load(tmp_path / "memory.safetensors", space, "dual")


def test_an_interrupted_rollback_takes_nothing_back(monkeypatch):
    memory = KeyMemory(Identity(D), "primal")
    run(memory, batches(4, 5))
    before = memory.tensors()

    def interrupted(self, appended):
        raise KeyboardInterrupt

    monkeypatch.setattr(KeyMemory, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.rollback(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())


def test_the_state_is_smaller_than_the_published_projector_and_cache():
    """At d = 1024, a null space of nine tenths and 200 edits: basis, keys and factor against P and cache."""
    d = 1024
    values = torch.logspace(2, -6, d, dtype=torch.float64)
    space = NullSpace.from_covariance(torch.diag(values), float(values[d // 10]))
    memory = KeyMemory(space)
    for _ in range(2):
        _, appended = memory.solve(torch.randn(d, 100), torch.randn(8, 100))
        memory.commit(appended)
    assert space.nbytes + memory.nbytes < 2 * d * d * 4 / 2


@pytest.mark.parametrize("padding", range(0, 64, 8))
def test_tensors_of_a_file_begin_where_torchs_own_do_so_that_products_round_alike(tmp_path, padding):
    from kedit_fast.support.files import ALIGNMENT, read_file, write_file

    written = {"x": torch.randn(7, 9, dtype=torch.float64), "none": torch.empty(0, 4)}
    write_file(tmp_path / "f.safetensors", written, {"padding": "." * padding}, StatisticsError)
    read, _ = read_file(tmp_path / "f.safetensors", StatisticsError)
    assert read["x"].data_ptr() % ALIGNMENT == 0 and torch.equal(read["x"], written["x"])
    assert read["none"].shape == (0, 4)
