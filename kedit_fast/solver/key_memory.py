"""The keys of earlier batches in the system of every later one, exactly: MEMIT-sequential, ENCORE and AlphaEdit.

With S_0^-1 = T^T T, H = T [K_1 ... K_t] (all n keys so far), and E_t the last u columns of the identity,

    Delta_t = R_t E_t^T (I_n + H^T H)^-1 H^T T
            = R_t K_t^T (S_0 + sum_s K_s K_s^T)^-1

The *dual* form stores H and the Cholesky factor of I_n + H^T H, and appends to both. The *primal* form is a fold: the
sum I_d + H H^T is factored and replaces S_0, and the dual form starts again without columns. Both give the same update;
the memory folds where that costs fewer flops.
"""

from __future__ import annotations

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
FORMAT_VERSION = "1"
# Number of keys, as a share of d, above which the memory folds. By flops a fold would pay from a third on; but it runs
# at half the rate of the products that appending consists of, and at n = d both forms take about the same memory.
# Measured with d = 4096 and 100 keys per batch: a fold takes as long as five batches at n = d, and later batches take
# half as long.
FOLD_ABOVE = 1.0
CHECK_EVERY = 16  # batches between checks of the factor
DRIFT_LIMIT = 1e-10  # relative residual of the factor above which it is computed anew
PROBE_TOLERANCE = 1e-6  # relative, between preconditioners made from the same statistics on different machines


@dataclass(frozen=True)
class _State:
    """The complete state of a memory. Buffers may be longer than their content; a later state appends to them."""

    sizes: tuple[int, ...]
    """Number of keys of each batch."""
    raw: torch.Tensor
    """[capacity, d] rows: T k of every key."""
    mapped: torch.Tensor | None
    """[capacity, d] after a fold: the keys since, in the new coordinates."""
    gram: torch.Tensor
    """[capacity, capacity] lower factor of I + H^T H of the batches since the last fold."""
    total: torch.Tensor | None
    """[d, d] I + sum over folded batches, lower triangle."""
    fold: torch.Tensor | None
    """[d, d] Cholesky factor of `total`."""
    folded: int
    """Number of batches up to the last fold."""
    fixed: int
    """Number of batches up to the last fold or repair: the state without one of these must be replayed."""

    @property
    def count(self) -> int:
        """Number of keys."""
        return sum(self.sizes)

    @property
    def columns(self) -> int:
        """Number of keys since the last fold."""
        return sum(self.sizes[self.folded :])

    def rows(self) -> torch.Tensor:
        """H^T [n, d] since the last fold."""
        if self.mapped is not None:
            return self.mapped[: self.columns]
        return self.raw[: self.count]

    def factor(self) -> torch.Tensor:
        """L [n, n] of I + H^T H, always in one layout, so that LAPACK always takes the same path."""
        return self.gram[: self.columns, : self.columns].contiguous()


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
    total: torch.Tensor | None
    """[d, d] after a fold: I + sum of k k^T over all keys, lower triangle."""
    factor: torch.Tensor | None
    """[d, d] Cholesky factor of `total`."""


class KeyMemory:
    """The exact sequential state of one layer.

    Args:
        preconditioner: S_0^-1.
        form: "auto" (fold by cost), "dual" (never fold) or "primal" (fold at every batch).

    Cost: a batch of u keys after n keys since the last fold takes the whitening of u keys and back, and
        4 d n u + 2 n^2 u flops; a fold takes d^2 (n + u) + d^3 / 3 + 2 d^2 u. Memory: 8 (d n + n^2) bytes; after a fold
        16 d^2 more and, so that batches can be rolled back, 8 d n_all.
    Source: the update is AlphaEdit's (arXiv 2410.02355, eq. 11-12), MEMIT's with earlier keys and ENCORE's
        (arXiv 2502.01636); the dual form is Woodbury's identity.

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
    def __init__(self, preconditioner: Preconditioner, form: SystemForm = "auto") -> None:
        check_form(form)
        self.preconditioner: Preconditioner = preconditioner
        self.form: SystemForm = form
        like = torch.empty(0, dtype=torch.float64, device=preconditioner.device)
        self._state = _State((), like.new_empty(0, preconditioner.size), None, like.new_empty(0, 0), None, None, 0, 0)
        self._base = self._state  # rollback replays from here

    @classmethod
    @plain_torch()
    def from_sum(cls, preconditioner: Preconditioner, total: torch.Tensor, form: SystemForm = "auto") -> KeyMemory:
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
        memory, wide = cls(preconditioner, form), total.to(preconditioner.device, torch.float64)
        system = preconditioner.whiten(preconditioner.whiten((wide + wide.T) / 2).T.contiguous())
        system.diagonal().add_(1.0)
        system = ((system + system.T) / 2).contiguous()
        empty = system.new_empty(0, d)
        memory._state = _State((0,), empty, empty, system.new_empty(0, 0), system, _cholesky(system), 1, 1)
        memory._base = memory._state
        return memory

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of keys of each batch."""
        return self._state.sizes

    @property
    def count(self) -> int:
        """Number of keys in the memory."""
        return self._state.count

    @property
    def nbytes(self) -> int:
        """Bytes of the state, without the preconditioner's."""
        state = self._state
        return sum(t.nbytes for t in (state.raw, state.mapped, state.gram, state.total, state.fold) if t is not None)

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
            solved = torch.cholesky_solve(appended.raw.T, self._total_factor(appended, others))
        else:
            part, corner = self._reduced(appended, others)
            solved = torch.cholesky_solve(part, corner).T
            if self._state.fold is not None:
                solved = torch.linalg.solve_triangular(self._state.fold.mT, solved, upper=True)
        left = residuals if output_metric is None else output_metric.left(residuals, appended.raw @ solved)
        right = self.preconditioner.unwhiten(solved)
        require_finite("the solution", right)
        require_finite("the solution", left)
        return LowRankUpdate(left, right), appended

    @plain_torch()
    def commit(self, appended: Appended) -> None:
        """Append what `solve` returned as the next batch; after an error nothing has changed."""
        if appended.base is not self._state:
            raise InvalidArgumentError("this batch was solved for another state of the memory: solve it again")
        state = self._with(appended)
        if len(state.sizes) % CHECK_EVERY == 0 and _drift(state) > DRIFT_LIMIT:
            state = _repaired(state)
        self._state = state

    @plain_torch()
    def rollback(self, batches: int = 1) -> None:
        """Forget the last batches; the state becomes, bit for bit, what it was before them."""
        state = self._state
        permanent = len(self._base.sizes)
        if not 0 <= batches <= len(state.sizes) - permanent:
            raise InvalidArgumentError(f"cannot roll back {batches} batches of {len(state.sizes) - permanent}")
        remaining = state.sizes[: len(state.sizes) - batches]
        if len(remaining) >= state.fixed:
            self._state = replace(state, sizes=remaining)
            return
        fresh = KeyMemory(self.preconditioner, self.form)
        fresh._state = self._base
        for rows in state.raw[: sum(remaining)].split(remaining[permanent:]) if remaining[permanent:] else ():
            fresh.commit(fresh._extended(rows.clone()))  # the same steps give the same bits
        self._state = fresh._state

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
        parts = {
            "raw": state.raw[: state.count],
            "gram": state.factor(),
            "total": state.total,
            "fold": state.fold,
            "mapped": None if state.mapped is None else state.rows(),
            "sizes": torch.tensor(state.sizes, dtype=torch.int64),
            "marks": torch.tensor([state.folded, state.fixed]),
        }
        return {name: t.detach().cpu().clone().contiguous() for name, t in parts.items() if t is not None}

    @plain_torch()
    def about(self) -> dict[str, Any]:
        """What identifies the state: the preconditioner's parameters and probe, and the form."""
        probe = self.preconditioner.probe().tolist()
        return {"preconditioner": self.preconditioner.describe(), "form": self.form, "probe": probe}

    @classmethod
    @plain_torch()
    def from_tensors(
        cls,
        preconditioner: Preconditioner,
        tensors: Mapping[str, torch.Tensor],
        about: Mapping[str, Any],
        where: str,
        form: SystemForm = "auto",
    ) -> KeyMemory:
        """A memory from the results of `tensors` and `about`.

        Raises:
            StatisticsError: it belongs to another preconditioner or form, or is damaged; `where` names it.
        """
        memory = cls(preconditioner, form)
        mine = memory.about()
        for name in ("preconditioner", "form"):
            if about.get(name) != mine[name]:
                raise StatisticsError(f"{where} was kept with {about.get(name)}, here it is {mine[name]}")
        stored, expected = torch.tensor(about.get("probe", []), dtype=torch.float64), preconditioner.probe()
        gap = (stored - expected).abs().max() if stored.shape == expected.shape else torch.tensor(torch.inf)
        if not float(gap) <= PROBE_TOLERANCE * float(expected.abs().max()):
            raise StatisticsError(f"{where} was kept with other statistics than those given here")
        try:
            sizes = tuple(tensors["sizes"].tolist())
            folded, fixed = tensors["marks"].tolist()
            raw, gram, d, device = tensors["raw"], tensors["gram"], preconditioner.size, preconditioner.device
            columns = sum(sizes[folded:])
            shapes = {"raw": (sum(sizes), d), "gram": (columns, columns)}
            if folded:
                shapes |= {"total": (d, d), "fold": (d, d), "mapped": (columns, d)}
            for name, shape in shapes.items():
                tensor = tensors[name]
                if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not float64 {list(shape)}")
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"{name} has values that are not finite")
            if not 0 <= folded <= fixed <= len(sizes):
                raise ValueError("marks that do not fit")
            mapped, total, fold = (tensors[n].to(device) if folded else None for n in ("mapped", "total", "fold"))
            if fold is not None:
                fold = fold.mT.contiguous().mT  # by columns, as LAPACK returned it
            memory._state = _State(sizes, raw.to(device), mapped, gram.to(device), total, fold, folded, fixed)
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
    def load(cls, path: str | os.PathLike, preconditioner: Preconditioner, form: SystemForm = "auto") -> KeyMemory:
        """Read what `save` wrote; raises StatisticsError for another preconditioner, or a damaged or foreign file."""
        tensors, metadata = read_file(path, StatisticsError)
        if metadata.get("format_version") != FORMAT_VERSION or "about" not in metadata:
            raise StatisticsError(f"{path} is not a key memory (format {FORMAT_VERSION})")
        return cls.from_tensors(preconditioner, tensors, json.loads(metadata["about"]), str(path), form)

    def _folds(self, u: int) -> bool:
        if self.form == "auto":
            size = self.preconditioner.size
            return u > PRIMAL_ABOVE * size or self._state.columns + u > FOLD_ABOVE * size
        return self.form == "primal"

    def _needs_total(self, appended: Appended, others: torch.Tensor) -> bool:
        """Whether a batch is solved by a d x d system: it folds, or it and unmoved rows [p, d] are too many."""
        count = appended.raw.shape[0] + others.shape[0] if others.shape[0] else 0
        return appended.factor is not None or (self.form == "auto" and count > PRIMAL_ABOVE * self.preconditioner.size)

    def _total_factor(self, appended: Appended, others: torch.Tensor) -> torch.Tensor:
        """Cholesky factor [d, d] of I + sum of k k^T over all keys, the batch's and unmoved ones, `others` [p, d]."""
        if appended.factor is not None and not others.shape[0]:
            return appended.factor
        total = self._summed(appended.raw) if appended.total is None else appended.total.clone()
        if others.shape[0]:
            symmetric_rank_k_update_(total, others)
        return _cholesky(total)

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

    def _summed(self, raw: torch.Tensor) -> torch.Tensor:
        """I + sum of k k^T over the keys of the memory and whitened ones [u, d]: [d, d], lower triangle."""
        state = self._state
        total = torch.eye(self.preconditioner.size, dtype=torch.float64, device=raw.device)
        if state.total is not None:
            total.copy_(state.total)
        since = state.raw[state.count - state.columns : state.count]
        for rows in (since, raw):
            if rows.shape[0]:
                symmetric_rank_k_update_(total, rows)
        return total

    def _rows_after(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The factor's parts for whitened keys [u, d]: rows [u, d] since the last fold, off [u, n], corner [u, u]."""
        state = self._state
        rows = raw
        if state.fold is not None:
            rows = torch.linalg.solve_triangular(state.fold, raw.T, upper=False).T.contiguous()
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
            total = self._summed(raw)
            return Appended(self._state, raw, None, None, None, total, _cholesky(total))
        return Appended(self._state, raw, *self._rows_after(raw), None, None)

    def _with(self, appended: Appended) -> _State:
        """The state with one more batch; the present state does not change."""
        state = self._state
        sizes = (*state.sizes, appended.raw.shape[0])
        raw = _grown(state.raw, state.count, appended.raw)
        if appended.factor is not None:
            empty = state.gram.new_empty(0, 0)
            mapped = raw.new_empty(0, raw.shape[1])
            _log.info("%d keys are folded into one factor, %d wide", sum(sizes), raw.shape[1])
            return _State(sizes, raw, mapped, empty, appended.total, appended.factor, len(sizes), len(sizes))
        assert appended.rows is not None and appended.off is not None and appended.corner is not None
        mapped = None if state.mapped is None else _grown(state.mapped, state.columns, appended.rows)
        n, u, gram = state.columns, appended.rows.shape[0], state.gram
        if n + u > gram.shape[0]:
            side = max(n + u, 5 * gram.shape[0] // 4)
            gram = gram.new_zeros(side, side)
            gram[:n, :n] = state.factor()
        gram[n : n + u, :n] = appended.off
        gram[:n, n : n + u] = 0
        gram[n : n + u, n : n + u] = appended.corner
        return replace(state, sizes=sizes, raw=raw, mapped=mapped, gram=gram)


def _grown(buffer: torch.Tensor, count: int, rows: torch.Tensor) -> torch.Tensor:
    """A buffer with `rows` after its first `count` rows; a larger one where they do not fit."""
    needed = count + rows.shape[0]
    if needed > buffer.shape[0]:
        larger = buffer.new_empty(max(needed, 3 * buffer.shape[0] // 2), buffer.shape[1])
        larger[:count] = buffer[:count]
        buffer = larger
    buffer[count:needed] = rows
    return buffer


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
    return replace(state, gram=_cholesky(gram).contiguous(), fixed=len(state.sizes))


def _cholesky(gram: torch.Tensor) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(gram)  # reads the lower triangle
    if not bool(torch.isfinite(gram).all()):
        raise SolveError("the system of the key memory has values that are not finite")
    if int(info):
        raise SolveError(f"the system of the key memory is not positive definite (leading minor {int(info)})")
    return factor
