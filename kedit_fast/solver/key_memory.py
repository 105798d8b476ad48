"""The keys of earlier batches in the system of every later one, exactly: MEMIT-sequential, ENCORE and AlphaEdit.

With S_0^-1 = T^T T, H = T [K_1 ... K_t] (all n keys so far), and E_t the last u columns of the identity,

    Delta_t = R_t E_t^T (I_n + H^T H)^-1 H^T T
            = R_t K_t^T (S_0 + sum_s K_s K_s^T)^-1

The *dual* form stores H and the Cholesky factor of I_n + H^T H, and appends to both. The *primal* form is a fold: the
sum I_d + H H^T is factored and replaces S_0, and the dual form starts again without columns. Both give the same update;
the memory folds where that costs fewer flops.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError, SolveError, StatisticsError
from kedit_fast.ops import symmetric_rank_k_update_
from kedit_fast.solver.least_squares import PRIMAL_ABOVE, SystemForm, check_form, checked, checked_unmoved
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.output_metric import OutputMetric
from kedit_fast.solver.preconditioner import Preconditioner, require_finite
from kedit_fast.support.files import read_file, write_file
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
FORMAT_VERSION = "2"
READABLE = ("1", "2")
MARKS = ("dropped", "dropped_keys", "summed", "folded", "fixed", "permanent", "largest")  # of a state, as stored
# Number of keys, as a share of d, above which the memory folds. By flops a fold would pay from a third on; but it runs
# at half the rate of the products that appending consists of, and at n = d both forms take about the same memory.
# Measured with d = 4096 and 100 keys per batch: a fold takes as long as five batches at n = d, and later batches take
# half as long.
FOLD_ABOVE = 1.0
# The same of a memory with a window, which has room for fewer: see `window_columns`.
WINDOW_COLUMNS, WINDOW_SHARE, LEAST_COLUMNS, MOST_COLUMNS = 0.1, 0.3, 64, 256
CHECK_EVERY = 16  # batches between checks of the factor
DRIFT_LIMIT = 1e-10  # relative residual of the factor above which it is computed anew
PROBE_TOLERANCE = 1e-6  # relative, between preconditioners made from the same statistics on different machines


def window_columns(d: int) -> int:
    """Number of keys since the last fold above which a memory with a window folds: 64 to 256, fewer where d < 220.

    A fold takes d^3 / 3 flops, appending one key 16 d n bytes of memory traffic after n keys. For single edits the sum
    is least near n = d / 10. The share of d that is never exceeded keeps the bound of the bytes in `KeyMemory`.
    """
    return max(0, min(MOST_COLUMNS, max(LEAST_COLUMNS, int(WINDOW_COLUMNS * d)), int(WINDOW_SHARE * d) - 1))


@dataclass(frozen=True)
class _State:
    """The complete state of a memory. Buffers may be longer than their content; a later state appends to them.

    Batches are counted from the first one ever, also where their keys are gone.
    """

    sizes: tuple[int, ...]
    """Number of keys of each batch after the first `dropped`."""
    raw: torch.Tensor
    """[capacity, d] rows: T k of every key of these."""
    mapped: torch.Tensor | None
    """[capacity, d] after a fold: the keys since, in the new coordinates."""
    gram: torch.Tensor
    """[capacity, capacity] lower factor of I + H^T H of the batches since the last fold."""
    pair: torch.Tensor | None
    """[d + 1, d] after a fold, two triangles with their diagonals: in rows 0 to d - 1 the upper one U of the last fold,
    U^T U = I + sum over folded batches; in rows 1 to d the lower one of that sum over the first `summed` batches."""
    dropped: int = 0
    """Number of batches of which only the sum is left."""
    dropped_keys: int = 0
    """Number of their keys."""
    summed: int = 0
    """Number of batches in the sum: up to the last fold; with a window, `dropped`, the fold that rollback may need."""
    folds: tuple[int, ...] = ()
    """Numbers of the batches that have folded after these."""
    folded: int = 0
    """Number of batches up to the last fold."""
    fixed: int = 0
    """Number of batches up to the last fold or repair: the state without one of these must be replayed."""
    permanent: int = 0
    """Number of batches that cannot be undone."""
    largest: int = 0
    """Number of keys of the largest of the `dropped` batches."""

    @property
    def batches(self) -> int:
        """Number of batches."""
        return self.dropped + len(self.sizes)

    @property
    def held(self) -> int:
        """Number of rows of `raw`."""
        return sum(self.sizes)

    @property
    def columns(self) -> int:
        """Number of keys since the last fold."""
        return sum(self.sizes[self.folded - self.dropped :])

    @property
    def upper(self) -> torch.Tensor | None:
        """U [d, d] of the last fold; only its upper triangle may be read."""
        return None if self.pair is None else self.pair[:-1]

    def rows(self) -> torch.Tensor:
        """H^T [n, d] since the last fold."""
        if self.mapped is not None:
            return self.mapped[: self.columns]
        return self.raw[: self.held]

    def factor(self) -> torch.Tensor:
        """L [n, n] of I + H^T H, always in one layout, so that LAPACK always takes the same path."""
        return self.gram[: self.columns, : self.columns].contiguous()

    def rows_of(self, begin: int, end: int) -> torch.Tensor:
        """T k [n, d] of the batches after the first `begin` up to the `end`-th; copies, so that sums round alike."""
        first, last = (sum(self.sizes[: number - self.dropped]) for number in (begin, end))
        return self.raw[first:last].clone()


@dataclass(frozen=True)
class Appended:
    """What one batch adds to a memory, for `KeyMemory.commit`."""

    base: _State
    """The state that it was solved for."""
    raw: torch.Tensor
    """[u, d] rows: the whitened keys."""
    rows: torch.Tensor | None
    """[u, d] the same in the coordinates after the last fold; None when this batch folds."""
    off: torch.Tensor | None
    """[u, n] the factor's new rows, left of the corner."""
    corner: torch.Tensor | None
    """[u, u] the factor's new corner, lower triangle."""
    pair: torch.Tensor | None
    """[d + 1, d] after a fold, see `_State`."""
    summed: int
    """Number of batches in its sum."""


class KeyMemory:
    """The exact sequential state of one layer.

    Args:
        preconditioner: S_0^-1.
        form: "auto" (fold by cost), "dual" (never fold) or "primal" (fold at every batch).
        window: how many batches can be undone, m; older ones are left as a sum alone, and the updates stay the same.
            0 for all. A memory with a window folds at every `window_columns(d)` keys, and has no form "dual".

    Cost: a batch of u keys after n keys since the last fold takes the whitening of u keys and back, and
        4 d n u + 2 n^2 u flops; a fold takes d^2 (n + u) + d^3 / 3 + 2 d^2 u, and with a window d^2 more for each key
        that can be undone. Memory: 8 (d n + n^2) bytes; after a fold 8 (d^2 + d) more and, so that batches can be
        rolled back, 8 d n_all. With a window of m batches of at most u keys never more than
        16 d^2 + 8 (d u m + (u m)^2) bytes; and for the moment of a fold 16 d^2 more.
    Source: the update is AlphaEdit's (arXiv 2410.02355, eq. 11-12), MEMIT's with earlier keys and ENCORE's
        (arXiv 2502.01636); the dual form is Woodbury's identity.

    Raises:
        InvalidArgumentError: an unknown form, or a window that is negative or does not go with the form.

    Example:
        >>> memory = KeyMemory(Identity(16))
        >>> for _ in range(2):
        ...     update, appended = memory.solve(torch.randn(16, 3), torch.randn(8, 3))
        ...     memory.commit(appended)
        >>> memory.sizes
        (3, 3)
        >>> memory.rollback()
        >>> memory.count
        3
    """

    @plain_torch()
    def __init__(self, preconditioner: Preconditioner, form: SystemForm = "auto", window: int = 0) -> None:
        check_form(form)
        if window < 0 or (window and form == "dual"):
            raise InvalidArgumentError(
                f"a window must be 0 or above, and with one the form is auto or primal; got {window} and {form!r}"
            )
        self.preconditioner: Preconditioner = preconditioner
        self.form: SystemForm = form
        self.window: int = window
        like = torch.empty(0, dtype=torch.float64, device=preconditioner.device)
        self._state = _State((), like.new_empty(0, preconditioner.size), None, like.new_empty(0, 0), None)
        self._base = self._state  # rollback of a memory without a window replays from here

    @classmethod
    @plain_torch()
    def from_sum(
        cls, preconditioner: Preconditioner, total: torch.Tensor, form: SystemForm = "auto", window: int = 0
    ) -> KeyMemory:
        """A memory of earlier keys of which only the sum of k k^T [d, d] is left: AlphaEdit's `cache_c` of a layer.

        It counts as one batch without keys; that batch cannot be rolled back.

        Raises:
            InvalidArgumentError, SolveError: another size, not finite, or not a sum of k k^T.

        Cost: whitening of d columns twice and d^3 / 3 flops.
        """
        d = preconditioner.size
        if tuple(total.shape) != (d, d):
            raise InvalidArgumentError(f"total must be [{d}, {d}]; got {list(total.shape)}")
        require_finite("total", total)
        memory, wide = cls(preconditioner, form, window), total.to(preconditioner.device, torch.float64)
        system = preconditioner.whiten(preconditioner.whiten((wide + wide.T) / 2).T.contiguous())
        system.diagonal().add_(1.0)
        system = ((system + system.T) / 2).contiguous()
        memory._state = replace(
            memory._state,
            sizes=() if window else (0,),
            mapped=system.new_empty(0, d),
            pair=_packed(system, system),
            dropped=int(window > 0),
            summed=1,
            folded=1,
            fixed=1,
            permanent=1,
        )
        if not window:
            memory._base = memory._state
        return memory

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of keys of each batch; with a window, of the last ones, whose keys are not yet a sum."""
        return self._state.sizes

    @property
    def batches(self) -> int:
        """Number of batches in the memory."""
        return self._state.batches

    @property
    def columns(self) -> int:
        """Number of keys since the last fold."""
        return self._state.columns

    @property
    def reach(self) -> int:
        """How many batches can be rolled back."""
        return self._state.batches - self._state.permanent

    @property
    def count(self) -> int:
        """Number of keys in the memory."""
        return self._state.dropped_keys + self._state.held

    @property
    def nbytes(self) -> int:
        """Bytes of the state, without the preconditioner's."""
        state = self._state
        return sum(t.nbytes for t in (state.raw, state.mapped, state.gram, state.pair) if t is not None)

    @plain_torch()
    def solve(
        self,
        keys: torch.Tensor,
        residuals: torch.Tensor,
        weights: torch.Tensor | None = None,
        unmoved: torch.Tensor | None = None,
        *,
        output_metric: OutputMetric | None = None,
    ) -> tuple[LowRankUpdate, Appended]:
        """The update of the next batch; the memory does not change until `commit`.

        Args:
            keys: K [d, u].
            residuals: R [out, u].
            weights: w [u] of the squared errors, positive; None for 1.
            unmoved: K_p [d, p], inputs whose output should stay as it is: edits whose residual is 0, in the system of
                this batch alone. They are not remembered. None for none; p may exceed d. A warning is logged when
                u + p > d / 2.
            output_metric: B, which weighs the damage, that to earlier keys and to K_p included; None for I.

        Returns:
            LowRankUpdate with left = R, or with an output metric what `OutputMetric.left` returns, and right [d, u],
            fp64; and the batch for `commit`.

        Raises:
            SolveError: values that are not finite, or a system that is not positive definite.

        Cost: of p unmoved columns, that of appending as many keys; a d x d system of its own where the batch does not
            fold and u + p > 0.67 d.
        """
        keys, residuals = checked(keys, residuals, weights)
        if keys.shape[0] != self.preconditioner.size:
            raise InvalidArgumentError(f"keys must be [{self.preconditioner.size}, u]; got {list(keys.shape)}")
        others = self.preconditioner.whiten(checked_unmoved(unmoved, keys)).T.contiguous()  # [p, d]
        appended = self._extended(self.preconditioner.whiten(keys).T.contiguous())
        if self._needs_total(appended, others):
            upper = self._total_upper(appended, others)
            solved = torch.linalg.solve_triangular(upper.mT, appended.raw.T, upper=False)
            solved = torch.linalg.solve_triangular(upper, solved, upper=True)
        else:
            part, corner = self._reduced(appended, others)
            solved = torch.cholesky_solve(part, corner).T
            if self._state.upper is not None:
                solved = torch.linalg.solve_triangular(self._state.upper, solved, upper=True)
        left = residuals if output_metric is None else output_metric.left(residuals, appended.raw @ solved)
        right = self.preconditioner.unwhiten(solved)
        require_finite("the solution", right)
        require_finite("the solution", left)
        return LowRankUpdate(left, right), appended

    @plain_torch()
    def extended(self, keys: torch.Tensor, weights: torch.Tensor | None = None) -> Appended:
        """A batch for `commit` of keys [d, u], with weights [u], whose update was solved with others than these."""
        keys, _ = checked(keys, keys, weights)
        return self._extended(self.preconditioner.whiten(keys).T.contiguous())

    @plain_torch()
    def commit(self, appended: Appended) -> None:
        """Append what `solve` returned as the next batch; after an error nothing has changed."""
        if appended.base is not self._state:
            raise InvalidArgumentError("this batch was solved for another state of the memory: solve it again")
        state = self._with(appended)
        if state.batches % CHECK_EVERY == 0 and _drift(state) > DRIFT_LIMIT:
            state = _repaired(state)
        self._state = state

    def mark(self) -> object:
        """The present state, for `return_to`. Tensors of it are held for as long as it is referenced."""
        return self._state

    def return_to(self, mark: object) -> None:
        """Take back what was committed since a `mark` of this memory, and give back the reach that it had then."""
        assert isinstance(mark, _State)
        self._state = mark

    @plain_torch()
    def appended(self, raw: torch.Tensor) -> Appended:
        """What the next batch adds, from the whitened keys [u, d] that `Appended.raw` held when it was solved before.

        Committing it again gives the state the same bits.
        """
        return self._extended(raw.to(self.preconditioner.device, torch.float64, copy=True))

    @plain_torch()
    def rollback(self, batches: int = 1) -> None:
        """Forget the last batches; the state becomes, bit for bit, what it was before them.

        Raises:
            InvalidArgumentError: there are fewer batches, or they are older than the window. Nothing changes.
        """
        state = self._state
        if not 0 <= batches <= self.reach:
            window = f": with a window of {self.window}, older ones are folded for good" if self.window else ""
            raise InvalidArgumentError(f"cannot roll back {batches} batches of {self.reach}{window}")
        remaining = state.batches - batches
        if remaining >= state.fixed:
            self._state = replace(state, sizes=state.sizes[: remaining - state.dropped])
            return
        fresh = KeyMemory(self.preconditioner, self.form, self.window)
        fresh._state = self._origin(remaining)
        for number in range(fresh.batches, remaining):
            fresh.commit(fresh._extended(state.rows_of(number, number + 1)))  # the same steps give the same bits
        self._state = replace(fresh._state, permanent=state.permanent)

    @plain_torch()
    def drift(self) -> float:
        """|(I + H^T H - L L^T) x| / |(I + H^T H) x| for a fixed x: the rounding error of the factor."""
        return _drift(self._state)

    @plain_torch()
    def repair(self) -> None:
        """Compute the factor anew from the keys: n^2 d + n^3 / 3 flops."""
        self._state = _repaired(self._state)

    @plain_torch()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as tensors, copies on the CPU."""
        state = self._state
        permanent = state.permanent if self._base.pair is None else max(state.permanent, state.folded)
        marks = {name: getattr(state, name) for name in MARKS} | {"permanent": permanent}
        parts = {
            "raw": state.raw[: state.held],
            "gram": state.factor(),
            "pair": state.pair,
            "mapped": None if state.mapped is None else state.rows(),
            "sizes": torch.tensor(state.sizes, dtype=torch.int64),
            "folds": torch.tensor(state.folds, dtype=torch.int64),
            "marks": torch.tensor(list(marks.values())),
        }
        return {name: t.detach().cpu().clone().contiguous() for name, t in parts.items() if t is not None}

    @plain_torch()
    def about(self) -> dict[str, Any]:
        """What identifies the state: the preconditioner's parameters and probe, the form and the window."""
        probe = self.preconditioner.probe().tolist()
        described = {"preconditioner": self.preconditioner.describe(), "form": self.form, "probe": probe}
        return described | ({"window": self.window} if self.window else {})

    @classmethod
    @plain_torch()
    def from_tensors(
        cls,
        preconditioner: Preconditioner,
        tensors: Mapping[str, torch.Tensor],
        about: Mapping[str, Any],
        where: str,
        form: SystemForm = "auto",
        window: int = 0,
    ) -> KeyMemory:
        """A memory from the results of `tensors` and `about`.

        Raises:
            StatisticsError: it belongs to another preconditioner, form or window, or is damaged; `where` names it.
        """
        memory = cls(preconditioner, form, window)
        mine = {"window": 0} | memory.about()
        for name, there in {"window": 0, **about}.items():
            if name != "probe" and there != mine.get(name):
                of_window = "a window of " if name == "window" else ""
                raise StatisticsError(f"{where} was kept with {of_window}{there}, here it is {mine.get(name)}")
        stored, expected = torch.tensor(about.get("probe", []), dtype=torch.float64), preconditioner.probe()
        gap = (stored - expected).abs().max() if stored.shape == expected.shape else torch.tensor(torch.inf)
        if not float(gap) <= PROBE_TOLERANCE * float(expected.abs().max()):
            raise StatisticsError(f"{where} was kept with other statistics than those given here")
        try:
            memory._state = _read_state(tensors, preconditioner.size, preconditioner.device, window)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise StatisticsError(f"{where} is damaged: {error}") from error
        return memory

    @plain_torch()
    def save(self, path: str | os.PathLike) -> None:
        """Write the state to one safetensors file; raises StatisticsError when that fails, and an older file stays."""
        metadata = {"format_version": FORMAT_VERSION, "about": json.dumps(self.about())}
        write_file(path, self.tensors(), metadata, StatisticsError)

    @classmethod
    @plain_torch()
    def load(
        cls, path: str | os.PathLike, preconditioner: Preconditioner, form: SystemForm = "auto", window: int = 0
    ) -> KeyMemory:
        """Read what `save` wrote; raises StatisticsError for another preconditioner, form or window, or a bad file."""
        tensors, metadata = read_file(path, StatisticsError)
        if metadata.get("format_version") not in READABLE or "about" not in metadata:
            raise StatisticsError(f"{path} is not a key memory (format {FORMAT_VERSION})")
        return cls.from_tensors(preconditioner, tensors, json.loads(metadata["about"]), str(path), form, window)

    def _room(self) -> int:
        """Number of keys since the last fold above which the memory folds, where that is decided by cost."""
        size = self.preconditioner.size
        return window_columns(size) if self.window else int(FOLD_ABOVE * size)

    def _folds(self, u: int) -> bool:
        if self.form == "auto":
            return u > PRIMAL_ABOVE * self.preconditioner.size or self._state.columns + u > self._room()
        return self.form == "primal"

    def _origin(self, remaining: int) -> _State:
        """The state that a replay of the first `remaining` batches begins with."""
        state = self._state
        if not state.summed or remaining < state.summed:
            return self._base
        assert state.pair is not None
        pair = state.pair if state.folded == state.summed else _packed(state.pair[1:], state.pair[1:])
        marks = {"folds": (), "folded": state.summed, "fixed": state.summed}
        sizes, gram = state.sizes[: state.summed - state.dropped], state.gram.new_empty(0, 0)
        return replace(state, sizes=sizes, mapped=state.raw.new_empty(0, pair.shape[1]), gram=gram, pair=pair, **marks)

    def _needs_total(self, appended: Appended, others: torch.Tensor) -> bool:
        """Whether a batch is solved by a d x d system: it folds, or it and unmoved rows [p, d] are too many."""
        count = appended.raw.shape[0] + others.shape[0] if others.shape[0] else 0
        return appended.pair is not None or (self.form == "auto" and count > PRIMAL_ABOVE * self.preconditioner.size)

    def _total_upper(self, appended: Appended, others: torch.Tensor) -> torch.Tensor:
        """U [d, d], U^T U = I + sum of k k^T over all keys, the batch's and unmoved ones, `others` [p, d].

        Only its upper triangle may be read.
        """
        if appended.pair is not None and not others.shape[0]:
            return appended.pair[:-1]
        total = self._begun()
        self._add(total, self._state.summed, self._state.batches)
        for rows in (appended.raw, others):
            if rows.shape[0]:
                symmetric_rank_k_update_(total, rows)
        return _cholesky(total).mT

    def _reduced(self, appended: Appended, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What earlier keys and unmoved ones leave of a batch that does not fold.

        Args:
            appended: the batch.
            others: [p, d] rows, the whitened unmoved keys.

        Returns:
            [u, d] rows P, in the coordinates since the last fold, and the lower factor C [u, u] of I + K^T S_p^-1 K,
            S_p with earlier and unmoved keys in it: the update's `right` is T^T P^T (C C^T)^-1.
        """
        state, rows, off, corner = self._state, appended.rows, appended.off, appended.corner
        assert rows is not None and off is not None and corner is not None
        part, back = rows, off.T  # [u, d], [n, u]
        if others.shape[0]:
            between, left, middle = self._rows_after(others)
            across = between @ rows.T - left @ off.T  # [p, u]
            down = torch.linalg.solve_triangular(middle, across, upper=False)
            corner = _cholesky(corner @ corner.T - down.T @ down)
            up = torch.linalg.solve_triangular(middle.mT, down, upper=True)  # [p, u]
            part, back = part - up.T @ between, back - left.T @ up
        if state.columns:
            back = torch.linalg.solve_triangular(state.factor().mT, back, upper=True)  # [n, u]
            part = part - back.T.contiguous() @ state.rows()
        return part, corner

    def _begun(self) -> torch.Tensor:
        """I + sum of k k^T over the first `summed` batches: [d, d], lower triangle, a copy."""
        state = self._state
        if state.pair is not None:
            return state.pair[1:].clone()
        return torch.eye(self.preconditioner.size, dtype=torch.float64, device=self.preconditioner.device)

    def _add(self, total: torch.Tensor, begin: int, end: int) -> None:
        """Add k k^T of the batches after the first `begin` up to the `end`-th, in the same portions every time."""
        state = self._state
        bounds = [begin, end, *(bound for fold in state.folds for bound in (fold - 1, fold) if begin < bound < end)]
        for first, last in itertools.pairwise(sorted(bounds)):
            rows = state.rows_of(first, last)
            if rows.shape[0]:
                symmetric_rank_k_update_(total, rows)

    def _rows_after(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The factor's parts for whitened keys [u, d]: rows [u, d] since the last fold, off [u, n], corner [u, u]."""
        state = self._state
        rows = raw
        if state.upper is not None:
            rows = torch.linalg.solve_triangular(state.upper.mT, raw.T, upper=False).T.contiguous()
        gram = rows @ rows.T  # [u, u]
        gram.diagonal().add_(1.0)
        off = rows.new_empty(rows.shape[0], 0)
        if state.columns:
            across = state.rows() @ rows.T  # [n, u]
            off = torch.linalg.solve_triangular(state.factor(), across, upper=False).T.contiguous()
            gram -= off @ off.T
        return rows, off, _cholesky(gram)

    def _extended(self, raw: torch.Tensor) -> Appended:
        """The state's new parts for whitened keys [u, d]."""
        if self._folds(raw.shape[0]):
            return self._refolded(raw)
        return Appended(self._state, raw, *self._rows_after(raw), None, self._state.summed)

    def _refolded(self, raw: torch.Tensor) -> Appended:
        """The same where the batch folds."""
        state, total = self._state, self._begun()
        number = summed = state.batches + 1
        base = None
        if self.window:  # the sum stays that of the last fold that no rollback can undo
            usable = [fold for fold in state.folds if fold <= number - self.window]
            summed = usable[-1] if usable else state.summed
            self._add(total, state.summed, summed)
            base = total.clone()
        self._add(total, summed if self.window else state.summed, state.batches)
        if raw.shape[0]:
            symmetric_rank_k_update_(total, raw)
        return Appended(state, raw, None, None, None, _packed(total if base is None else base, total), summed)

    def _with(self, appended: Appended) -> _State:
        """The state with one more batch; the present state does not change."""
        state, u = self._state, appended.raw.shape[0]
        n, d = state.columns, self.preconditioner.size
        sizes, number = (*state.sizes, u), state.batches + 1
        room, limit, permanent = 0, None, state.permanent
        if self.window:
            permanent, room = max(permanent, number - self.window), self._room()
            limit = 2 * room + self.window * max(state.largest, *sizes)
        if appended.pair is not None:
            dropped = appended.summed if self.window else 0
            gone = dropped - state.dropped
            first = sum(sizes[:gone])
            raw = _grown(state.raw, state.held, appended.raw, limit, first)
            _log.info("%d keys are folded into one factor, %d wide", self.count + u, d)
            return _State(
                sizes[gone:],
                raw,
                raw.new_empty(room, d),
                raw.new_zeros(room, room),
                appended.pair,
                dropped,
                state.dropped_keys + first,
                appended.summed,
                tuple(fold for fold in (*state.folds, number) if fold > appended.summed),
                number,
                number,
                permanent,
                max((state.largest, *sizes[:gone])),
            )
        assert appended.rows is not None and appended.off is not None and appended.corner is not None
        raw = _grown(state.raw, state.held, appended.raw, limit)
        mapped = None if state.mapped is None else _grown(state.mapped, n, appended.rows, room if limit else None)
        gram = state.gram
        if n + u > gram.shape[0]:
            side = max(n + u, 5 * gram.shape[0] // 4)
            side = min(side, max(n + u, room)) if limit else side
            gram = gram.new_zeros(side, side)
            gram[:n, :n] = state.factor()
        gram[n : n + u, :n] = appended.off
        gram[:n, n : n + u] = 0
        gram[n : n + u, n : n + u] = appended.corner
        return replace(state, sizes=sizes, raw=raw, mapped=mapped, gram=gram, permanent=permanent)


def _grown(
    buffer: torch.Tensor, count: int, rows: torch.Tensor, limit: int | None = None, first: int = 0
) -> torch.Tensor:
    """A buffer with `rows` after its first `count` rows; another one where they do not fit, or without `first` rows.

    A larger one has at most `limit` rows, unless more are needed.
    """
    held = count - first
    needed = held + rows.shape[0]
    if first or needed > buffer.shape[0]:
        capacity = buffer.shape[0]
        if needed > capacity:
            capacity = max(needed, 3 * capacity // 2)
            capacity = capacity if limit is None else min(capacity, max(needed, limit))
        other = buffer.new_empty(capacity, buffer.shape[1])
        other[: max(held, 0)] = buffer[first:count]
        buffer = other
    buffer[held:needed] = rows
    return buffer


def _packed(base: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """[d + 1, d]: the upper Cholesky factor of `total` above the lower triangle of `base`, both [d, d]."""
    pair = base.new_empty(base.shape[0] + 1, base.shape[1])
    pair[1:] = base
    pair[:-1].tril_(-1).add_(_cholesky(total).mT)
    return pair


def _read_state(tensors: Mapping[str, torch.Tensor], d: int, device: torch.device, window: int) -> _State:
    """The state in the result of `KeyMemory.tensors`; files of format 1 have the triangles of `pair` apart.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: it is damaged.
    """
    sizes = tuple(tensors["sizes"].tolist())
    stored = tensors["marks"].tolist()
    if len(stored) == 2:
        folded, fixed = stored
        marks = dict.fromkeys(MARKS, 0) | {"summed": folded, "folded": folded, "fixed": fixed}
        marks["permanent"] = folded if folded and not sizes[0] else 0  # of a sum without keys
        folds = ()
    else:
        marks, folds = dict(zip(MARKS, stored, strict=True)), tuple(tensors["folds"].tolist())
    dropped, summed, folded = marks["dropped"], marks["summed"], marks["folded"]
    batches = dropped + len(sizes)
    ascending = [0, dropped, summed, *folds, folded, marks["fixed"], batches]
    consistent = folded == (folds[-1] if folds else summed) and dropped == (summed if window else 0)
    if ascending != sorted(ascending) or not consistent or not dropped <= marks["permanent"] <= batches:
        raise ValueError("marks that do not fit")
    columns = sum(sizes[folded - dropped :])
    shapes = {"raw": (sum(sizes), d), "gram": (columns, columns)}
    apart = "total" in tensors
    if folded:
        shapes |= {"total": (d, d), "fold": (d, d)} if apart else {"pair": (d + 1, d)}
        shapes |= {"mapped": (columns, d)}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not float64 {list(shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite")
    mapped = pair = None
    if folded:
        mapped, pair = tensors["mapped"].to(device), None if apart else tensors["pair"].to(device)
    if folded and apart:
        pair = torch.cat([tensors["total"][:1], tensors["total"]]).to(device)
        pair[:-1].tril_(-1).add_(tensors["fold"].to(device).tril().mT)
    return _State(sizes, tensors["raw"].to(device), mapped, tensors["gram"].to(device), pair, folds=folds, **marks)


def _drift(state: _State) -> float:
    if not state.columns:
        return 0.0
    rows, factor = state.rows(), state.factor()
    x = torch.sin(torch.arange(1, state.columns + 1, dtype=torch.float64, device=rows.device))[:, None]
    expected = x + rows @ (rows.T @ x)
    return float((expected - factor @ (factor.T @ x)).norm() / expected.norm())


def _repaired(state: _State) -> _State:
    if not state.columns:
        return state
    rows = state.rows()
    gram = rows @ rows.T
    gram.diagonal().add_(1.0)
    _log.info("the factor of %d keys was computed anew", state.columns)
    return replace(state, gram=_cholesky(gram).contiguous(), fixed=state.batches)


def _cholesky(gram: torch.Tensor) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(gram)  # reads the lower triangle
    if not bool(torch.isfinite(gram).all()):
        raise SolveError("the system of the key memory has values that are not finite")
    if int(info):
        raise SolveError(f"the system of the key memory is not positive definite (leading minor {int(info)})")
    return factor
