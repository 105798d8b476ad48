"""The ledger: every write in order, so that any number of batches can be undone bit for bit.

M_0 = fp32(W_0); M_t = M_{t-1} + fp32(L_t R_t^T) in batch order; W = round_nearest(M_t). An fp32 (or fp64) weight is its
own master. Undoing batches replays the others from M_0 with the same op and the same backends, which gives the same
bits as if they had never been applied. A batch is all or nothing: `transaction()` restores every matrix on any failure.

With a window, batches that can no longer be undone are folded: of all of them together one matrix is left, the master
after the last of them, from which rollback replays the others. The factors of at most a quarter more batches than the
window are held, and W_0, for `restore`, `original` and `total`.

A layer with experts has one weight [E, out, in] for all of them, which the ledger treats as one matrix.

Of a matrix that is split over processes (`models.sharded`), each process writes its own columns, by the same updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kedit_fast.backends import requested, select
from kedit_fast.errors import EditError, InvalidArgumentError
from kedit_fast.models.sharded import columns, like, local, whole
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, Update, total_of, update_of
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.matrix_bits import quick_sum
from kedit_fast.support.process_group import in_any
from kedit_fast.support.torch_state import plain_torch


@dataclass(frozen=True)
class Entry:
    """One write to one matrix."""

    name: str
    """Of the matrix."""
    update: Update
    """Its factors or matrix, fp32 (fp64 for an fp64 weight)."""
    backend: str
    """The backend that wrote it, which a replay uses again."""

    def on(self, device: torch.device) -> Entry:
        """The same with its factors on a device."""
        return replace(self, update=update_of({name: part.to(device) for name, part in vars(self.update).items()}))


@dataclass
class _Matrix:
    of_model: torch.Tensor
    """[out, in], or [E, out, in] of experts, as the model has it: whole, or split over processes."""
    weight: torch.Tensor
    """[out, c] this process's columns of it, a view on the model's memory."""
    original: torch.Tensor
    """[out, c], its value before the first write, in its dtype."""
    master: torch.Tensor | None
    """[out, c] fp32, for a 16-bit weight."""
    held: slice | None
    """Which columns these are; None for all."""
    bits: int = 0
    """Sum of the weight's bits after the last write."""

    @property
    def summed(self) -> torch.Tensor:
        """What writes are added to: the master, or the weight itself."""
        return self.weight if self.master is None else self.master

    def mark(self) -> None:
        self.bits = quick_sum(self.weight)

    @classmethod
    def of(cls, weight: torch.Tensor) -> _Matrix:
        part = local(weight)
        wide = part.dtype in (torch.float32, torch.float64)
        return cls(weight, part, part.clone(), None if wide else part.float(), columns(weight))

    def in_any(self, flag: bool) -> bool:
        """Whether a condition holds in one of the processes that have a part of the matrix."""
        return flag if self.held is None else in_any(flag)

    def require_untouched(self, name: str) -> None:
        if self.in_any(quick_sum(self.weight) != self.bits):
            raise EditError(
                f"{name} was changed by something else since this editor last wrote it (another editor, training, "
                "load_state_dict): take edits back in the reverse order they were made, or start a new Editor"
            )

    def write(self, entry: Entry) -> None:
        self._apply(entry, self.summed, None if self.master is None else self.weight)

    def _apply(self, entry: Entry, summed: torch.Tensor, rounded: torch.Tensor | None) -> None:
        update = entry.update if self.held is None else entry.update.columns_of(self.held)
        update.apply_(summed, copy=rounded, backend=entry.backend)

    def after(self, entries: list[Entry], base: torch.Tensor | None) -> torch.Tensor:
        """[out, c] `summed` as it was after some writes, from what it was before them; None for the first write."""
        summed = self.summed.clone()  # in its layout
        summed.copy_(self.original if base is None else base)
        rounded = None if self.master is None else torch.empty_like(self.weight)
        for entry in entries:
            self._apply(entry, summed, rounded)
        return summed

    def reset(self, base: torch.Tensor | None = None) -> None:
        """Give the matrix the value it had before the first write, or that of an earlier `summed`."""
        if base is None:
            self.weight.copy_(self.original)
        if self.master is not None:
            self.master.copy_(self.original if base is None else base)
        if base is not None:
            self.weight.copy_(base)


def _contiguous(update: Update) -> Update:
    """The same by rows: the rounding of a product may depend on how its operands lie in memory."""
    return update_of({name: part.contiguous() for name, part in vars(update).items()})


def _nothing(weight: torch.Tensor) -> LowRankUpdate | ExpertUpdate:
    """The update of a weight that adds nothing."""
    *experts, out, inner = weight.shape
    options: dict[str, Any] = {"dtype": accumulation_dtype(weight), "device": weight.device}
    left = torch.zeros(out, 0, **options)
    if not experts:
        return LowRankUpdate(left, torch.zeros(inner, 0, **options))
    offsets = torch.zeros(experts[0] + 1, dtype=torch.int64, device=weight.device)
    return ExpertUpdate(left, torch.zeros(0, inner, **options), offsets[:0], offsets)


@dataclass(frozen=True)
class _Past:
    """All that was written and not undone. It is replaced at once, so that an interrupt leaves no half of it."""

    count: int = 0
    """Number of batches that are folded."""
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name of a matrix that these have written -> [out, c] its master, or itself, after them."""
    batches: list[tuple[Entry, ...]] = field(default_factory=list)
    """The batches after these."""
    permanent: int = 0
    """Number of batches that cannot be undone one by one."""

    def first(self, count: int) -> _Past:
        """The same after the first `count` batches."""
        return _Past(self.count, self.masters, self.batches[: count - self.count], self.permanent)


class Ledger:
    """Writes to named matrices [out, in], or stacks of them [E, out, in], in order, with rollback.

    Args:
        window: how many batches can be undone; 0 for all.
    """

    def __init__(self, window: int = 0) -> None:
        self.window = window
        self._past = _Past()
        self._matrices: dict[str, _Matrix] = {}
        self._open: list[Entry] | None = None
        self._counts = False

    @property
    def batches(self) -> list[tuple[Entry, ...]]:
        """The batches whose updates are there one by one; without a window, all."""
        return self._past.batches

    @property
    def count(self) -> int:
        """Number of batches that were written and not undone."""
        return self._past.count + len(self._past.batches)

    @property
    def reach(self) -> int:
        """How many batches can be undone by `rollback`."""
        return self.count - self._past.permanent

    @property
    def nbytes(self) -> int:
        """Bytes of originals, masters and updates."""
        held = [t for m in self._matrices.values() for t in (m.original, m.master) if t is not None]
        factors = [t for batch in self.batches for entry in batch for t in vars(entry.update).values()]
        return sum(t.nbytes for t in (*held, *factors, *self._past.masters.values()))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Writes inside the block become one batch when it ends, and are all undone when it raises."""
        if self._open is not None:
            raise EditError("a batch is already open")
        self._fold()
        self._open, self._counts = [], False
        try:
            yield
        except BaseException:
            entries, self._open = self._open, None
            self._replay({entry.name for entry in entries}, self._past)
            self._forget()
            raise
        entries, self._open = self._open, None
        if entries or self._counts:  # a block without writes adds no batch, unless one was asked for
            past = self._past
            permanent = max(past.permanent, self.count + 1 - self.window) if self.window else 0
            self._past = replace(past, batches=[*past.batches, tuple(entries)], permanent=permanent)

    def count_batch(self) -> None:
        """Let the open batch count, though it writes no matrix: what it does is beside the weights."""
        if self._open is None:
            raise EditError("count_batch() belongs inside transaction()")
        self._counts = True

    def _fold(self) -> None:
        """Fold the batches that cannot be undone, once they are a quarter of the window."""
        past = self._past
        folding = past.permanent - past.count
        if folding < max(1, self.window // 4):
            return
        entries = [entry for batch in past.batches[:folding] for entry in batch]
        masters = dict(past.masters)
        with torch.no_grad():
            for name in {entry.name for entry in entries}:
                of_name = [entry for entry in entries if entry.name == name]
                masters[name] = self._matrices[name].after(of_name, past.masters.get(name))
        self._past = _Past(past.permanent, masters, past.batches[folding:], past.permanent)

    @plain_torch(leave_inference_mode=False)
    def write(self, name: str, weight: torch.Tensor, update: Update) -> None:
        """Add an update to a matrix, inside a transaction.

        Args:
            name: of the matrix; the same name must always come with the same weight.
            weight: [out, in] view on the model's memory, or a DTensor split over its inputs; or [E, out, in], of
                experts; written.
            update: its factors, or the matrix itself; of experts their factors, or the matrices.

        Raises:
            EditError: no open transaction, or an update that is not finite.
        """
        if self._open is None:
            raise EditError("write() belongs inside transaction()")
        if not update.is_finite():
            raise EditError(f"the update of {name} is not finite")
        matrix = self._matrix(name, weight)
        factors = _contiguous(update.compacted().to(accumulation_dtype(weight)))
        if not factors.is_finite():
            raise EditError(f"the update of {name} overflows float32")
        runs = "torch"
        if not isinstance(factors, DenseUpdate):
            copy = None if matrix.master is None else matrix.weight
            args = (matrix.summed, factors.left, factors.right, copy)
            op = "grouped_rank_k_update_" if isinstance(factors, ExpertUpdate) else "rank_k_update_"
            runs = select(op, requested(None), *args).backend
        self._add(matrix, Entry(name, factors, runs))

    @plain_torch(leave_inference_mode=False)
    def repeat(self, entries: Sequence[Entry], weights: Mapping[str, torch.Tensor]) -> None:
        """Write what a ledger has recorded again, inside a transaction, by the same op and backends: the same bits.

        Args:
            entries: in order; their factors contiguous, on the device of their weights.
            weights: name of a matrix -> its weight, as for `write`.

        Raises:
            BackendUnavailableError: a backend that wrote them cannot run here.
            EditError: the result is not finite.
        """
        if self._open is None:
            raise EditError("repeat() belongs inside transaction()")
        for entry in entries:
            self._add(self._matrix(entry.name, weights[entry.name]), entry)

    def bits(self, name: str) -> int:
        """The sum over the bits of a matrix after its last write (of this process's columns, where it is split)."""
        return self._matrices[name].bits

    def _matrix(self, name: str, weight: torch.Tensor) -> _Matrix:
        """The state of a matrix that is about to be written."""
        if name not in self._matrices:
            self._matrices[name] = _Matrix.of(weight)
        elif self._matrices[name].weight.data_ptr() != local(weight).data_ptr():
            raise EditError(f"{name} has moved in memory since its first edit: restore before moving the model")
        else:
            self._matrices[name].require_untouched(name)
        return self._matrices[name]

    def _add(self, matrix: _Matrix, entry: Entry) -> None:
        """Write an entry of the open batch."""
        assert self._open is not None
        self._open.append(entry)  # before the write, so that an interrupt in the middle of it is undone too
        matrix.write(entry)
        matrix.mark()
        if matrix.in_any(not bool(torch.isfinite(matrix.weight).all())):
            raise EditError(f"{entry.name} is not finite after the update")

    @plain_torch(leave_inference_mode=False)
    def withdraw(self) -> None:
        """Undo what the open batch has written, bit for bit. The batch stays open."""
        if self._open is None:
            raise EditError("withdraw() belongs inside transaction()")
        entries, self._open = self._open, []
        self._replay({entry.name for entry in entries}, self._past)

    @plain_torch(leave_inference_mode=False)
    def rollback(self, count: int = 1, restored: bool = False) -> None:
        """Undo the last `count` batches, bit for bit.

        Args:
            count: how many.
            restored: the caller has already restored the matrices: they are only compared.

        Raises:
            InvalidArgumentError: there are fewer batches, or they are older than the window.
            EditError: the matrices are not what this ledger wrote; with `restored`, not what they were before those
                batches. Nothing is written.
        """
        if not 0 <= count <= self.reach:
            raise InvalidArgumentError(f"cannot undo {count} batches of {self.reach}{self._why_not_more()}")
        remaining = self.count - count
        names = {entry.name for batch in self.batches[remaining - self._past.count :] for entry in batch}
        self._undo(names, self._past.first(remaining), restored)

    @plain_torch(leave_inference_mode=False)
    def restore(self, restored: bool = False) -> None:
        """Undo everything: every matrix is what it was before the first write, bit for bit.

        Also what is older than the window. `restored` and errors are those of `rollback`.
        """
        self._undo(set(self._matrices), _Past(), restored)

    def _why_not_more(self) -> str:
        if not self._past.permanent:
            return ""
        return (
            f": with memory_window = {self.window} the {self._past.permanent} batches before those are no longer there "
            "one by one; restore() undoes all"
        )

    def _undo(self, names: set[str], remaining: _Past, restored: bool) -> None:
        """Make the past what it was earlier; `names` of the matrices that have changed since then."""
        if self._open is not None:
            raise EditError("a batch is open")
        before = {name: self._matrices[name].weight.clone() for name in sorted(names)} if restored else {}
        for name in sorted(names - before.keys()):
            self._matrices[name].require_untouched(name)
        try:
            self._replay(names, remaining)
            for name, weight in before.items():
                matrix = self._matrices[name]
                if matrix.in_any(not torch.equal(weight, matrix.weight)):
                    raise EditError(f"{name} is not what it was before the batches to be undone")
        except BaseException:
            self._replay(names, self._past)  # also after an interrupt in the middle: nothing is undone
            for name, weight in before.items():
                self._matrices[name].weight.copy_(weight)
            raise
        self._past = remaining
        self._forget()

    def require_untouched(self, name: str) -> None:
        """Raise EditError when something else has changed a matrix since its last write."""
        self._matrices[name].require_untouched(name)

    def names(self) -> list[str]:
        """Names of the matrices that batches have written."""
        return list(self._matrices)

    def original(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix as it was before its first write, and the view on the model's memory; both split where that is."""
        matrix = self._matrices[name]
        return like(matrix.of_model, matrix.original), matrix.of_model

    @plain_torch(leave_inference_mode=False)
    def total(self, name: str, *, only: Container[int] | None = None, without: Container[int] = ()) -> Update:
        """The sum of what was added to a matrix, `only` by some batches (numbers from 1) or `without` some.

        Where batches are folded it is a matrix, and those of some batches are not to be told apart.

        Raises:
            InvalidArgumentError: `only` or `without`, of a matrix that folded batches have written.
        """
        if name in self._past.masters:
            if only is not None or without != ():
                raise InvalidArgumentError(f"the sum of some batches is not known{self._why_not_more()}")
            matrix = self._matrices[name]
            change = (matrix.summed.double() - matrix.original.double()).to(matrix.summed.dtype)
            return DenseUpdate(whole(like(matrix.of_model, change)))
        updates = [
            entry.update for number, batch in enumerate(self.batches, 1) for entry in batch
            if entry.name == name and number not in without and (only is None or number in only)
        ]  # fmt: skip
        if not updates:
            return _nothing(self._matrices[name].of_model)
        return total_of(updates)

    def _forget(self) -> None:
        """Drop matrices that no batch has written. They are unchanged, and others may change them."""
        written = {entry.name for batch in self.batches for entry in batch} | self._past.masters.keys()
        for name in set(self._matrices) - written:
            del self._matrices[name]

    def _replay(self, names: set[str], past: _Past) -> None:
        with torch.no_grad():
            for name in names:
                matrix = self._matrices[name]
                matrix.reset(past.masters.get(name))
                for batch in past.batches:
                    for entry in batch:
                        if entry.name == name:
                            matrix.write(entry)
                matrix.mark()
