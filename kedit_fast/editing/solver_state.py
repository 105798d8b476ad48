"""The linear systems of one editor: a preconditioner per layer, and what a method keeps between batches.

A batch is solved layer after layer. `commit` adds what the batch has appended once everything is written. `settle`
drops the open batch and returns to an earlier number of batches, bit for bit: with `memory_window` = m to one of the
last m. The state can be saved.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kedit_fast._version import __version__
from kedit_fast.editing.gradients import ModuleGradients
from kedit_fast.editing.preconditioners import PRECONDITIONERS
from kedit_fast.editing.stackable import require_stackable
from kedit_fast.errors import EditError, MethodError, NullSpaceError, StatisticsError
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.hparams import DECLARATIONS, Hparams
from kedit_fast.methods.recipe import Constraint, NormalizerKind, Recipe
from kedit_fast.models.sharded import whole
from kedit_fast.models.view import ModelView
from kedit_fast.solver.block_diagonal import BlockDiagonal
from kedit_fast.solver.expert_update import ExpertUpdate, stacked_matrix
from kedit_fast.solver.key_memory import PROBE_TOLERANCE, Appended, KeyMemory
from kedit_fast.solver.least_squares import SystemForm, merge_columns, rank_one_equality, scale_of_share, solve_update
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.normalizer import Normalizer, Scatter, WhitenedNormalizer, gradient_update
from kedit_fast.solver.output_metric import OutputMetric
from kedit_fast.solver.preconditioner import NullSpace, Preconditioner, Scaled
from kedit_fast.solver.shaping import attenuate, limit_norm, limit_spectrum, main_directions, spectral_norm
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.files import read_file, write_file

_log = logging.getLogger("kedit_fast")
FORMAT_VERSION = "2"
READABLE = ("1", "2")


@dataclass
class _PendingState:
    """What the open batch adds to the state."""

    appended: dict[int, Appended] = field(default_factory=dict)
    """Layer -> keys of the batch."""
    normalizers: dict[str, Normalizer] = field(default_factory=dict)
    """Shape of module, as "64x32" -> the normalizer with the batch's rows in it."""
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Shape of module -> the gradients [n, out] that its normalizer took one after another, on the host; where the
    normalizer whitens."""
    scales: dict[int, float] = field(default_factory=dict)
    """Layer -> scale of S that the batch's keys have decided."""


@dataclass(frozen=True)
class Committed:
    """What a batch has added to the state, so that another process can add it again: `SolverState.repeat`."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> the batch's whitened keys [u, d] fp64, of methods with a memory."""
    normalizers: dict[str, Normalizer] = field(default_factory=dict)
    """Shape of module, as "64x32" -> the normalizer with the batch's rows in it; without the scatter of those that
    whiten, which `gradients` give."""
    scales: dict[int, float] = field(default_factory=dict)
    """Layer -> scale of S that the batch's keys have decided."""
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Shape of module -> the gradients [n, out] that its normalizer took one after another; where it whitens."""


@dataclass(frozen=True)
class _History:
    """The committed batches. It is replaced at once, so that an interrupt leaves no half of it."""

    forgotten: int = 0
    """Number of batches that cannot be undone one by one."""
    snapshots: tuple[_Snapshot, ...] = ()
    """What the state was before each batch after these."""
    scatters: Mapping[str, Scatter] = field(default_factory=dict)
    """Shape of module -> the scatter of its whitening normalizer before the first of the snapshots."""

    @property
    def batches(self) -> int:
        """Number of committed batches."""
        return self.forgotten + len(self.snapshots)


@dataclass(frozen=True)
class _Snapshot:
    """What the state was before a batch, and what the batch added to covariances of gradients."""

    batches: dict[int, int]
    """Layer -> number of batches in its key memory."""
    normalizers: dict[str, Normalizer]
    """Those that whiten are without their scatter, 8 out^2 bytes: the `gradients` of earlier batches give it again."""
    scales: dict[int, float]
    gradients: dict[str, list[torch.Tensor]]
    """See `_PendingState`."""


class SolverState:
    """The solves of one method on one model, and the state that they share.

    Args:
        view: the model.
        recipe: the method.
        hparams: its hyper-parameters.
        statistics: second moments; None where the method uses none.
        null_spaces: layer -> null space to use instead of that of the statistics.

    Raises:
        MethodError: the method, or a hyper-parameter, does not go with the experts of an edited layer.
    """

    def __init__(
        self,
        view: ModelView,
        recipe: Recipe,
        hparams: Hparams,
        statistics: Statistics | None,
        null_spaces: Mapping[int, NullSpace] | None = None,
    ):
        require_stackable(view, recipe, hparams, null_spaces or {})
        self.view, self.recipe, self.hparams, self.statistics = view, recipe, hparams, statistics
        self.null_space_overrides = dict(null_spaces or {})
        self.memories: dict[int, KeyMemory] = {}
        self.normalizers: dict[str, Normalizer] = {}
        self._first_normalizers: dict[str, Normalizer] = {}  # before the first batch: warmed up, or of a loaded state
        self.scales: dict[int, float] = {}
        """Layer -> lambda or L2, where the hyper-parameter is "auto"; decided by the keys of the first batch."""
        self._preconditioners: dict[int, Preconditioner] = {}
        self._output_metrics: dict[int, OutputMetric] = {}
        self._history = _History()
        self._marks: dict[int, object] = {}  # of the memories before the last commit, until it is settled
        self._continues = False  # whether there were keys of earlier edits before the first batch
        self._lost = False  # whether these are gone, since all batches were undone after the window had passed them
        self._pending = _PendingState()
        self.committed = Committed()
        """What the last batch has added."""

    def preconditioner(self, layer: int) -> Preconditioner:
        """S^-1 of a layer, factored on first use and cached. Where its scale is "auto" and no batch has decided it, 1.

        Raises:
            StatisticsError: statistics that are missing, of the wrong shape, not finite, not positive definite, rank
                deficient, or without a null space; naming the layer.
        """
        if layer not in self._preconditioners:
            try:
                build = PRECONDITIONERS[self.recipe.preconditioner]
                self._preconditioners[layer] = build(self, layer)
            except StatisticsError as error:
                raise type(error)(f"layer {layer}: {error}") from None
        base = self._preconditioners[layer]
        scale = self._pending.scales.get(layer, self.scales.get(layer))
        return base if scale is None else Scaled(base, scale)

    def output_metric(self, layer: int) -> OutputMetric | None:
        """B of a layer, decomposed on first use and cached; None where outputs are not weighed.

        Raises:
            StatisticsError: statistics of outputs that are missing, of the wrong shape, not finite or not positive
                semi-definite; naming the layer.
        """
        if not self.hparams.weighs_outputs:
            return None
        if layer not in self._output_metrics:
            assert self.statistics is not None  # the editor has checked that it has what the method needs
            moment, out = self.statistics.output_metric(layer), self.view.edited_shape(layer)[0]
            if tuple(moment.shape) != (out, out):
                raise StatisticsError(
                    f"statistics of outputs are {list(moment.shape)}, {self.view.weight_name(layer)} has {out} outputs"
                )
            try:
                metric = OutputMetric.from_moment(moment.to(self._device(layer)), self.hparams.metric_mix)
            except StatisticsError as error:
                raise type(error)(f"layer {layer}: {error}") from None
            self._output_metrics[layer] = metric
        return self._output_metrics[layer]

    def without_null_space(self, layers: Sequence[int]) -> dict[int, str]:
        """The layers whose inputs have no null space below the threshold, or nothing else -> the error's message.

        The factors of the other layers are cached. A method that uses no null space has no such layers.

        Raises:
            StatisticsError: statistics that are missing or bad.
        """
        reasons = {}
        for layer in layers if self.recipe.uses_null_space else ():
            try:
                self.preconditioner(layer)
            except NullSpaceError as error:
                reasons[layer] = str(error)
        return reasons

    def _decide_scale(self, layer: int, keys: torch.Tensor) -> None:
        """Decide the scale of a layer's S by a batch's keys [d, u], where it is "auto" and not decided yet."""
        hparams = self.hparams
        if hparams.scale_name is None or layer in self.scales or layer in self._pending.scales:
            return
        rho = 1.0 if self.recipe.memory else RHOS[self.recipe.constraint](hparams)
        try:
            scale = scale_of_share(keys, self.preconditioner(layer), hparams.residual_share, rho)
        except StatisticsError as error:
            raise StatisticsError(f"layer {layer}: {error}") from None
        _log.info("layer %d: %s %.4g, residual share %g", layer, hparams.scale_name, scale, hparams.residual_share)
        self._pending.scales[layer] = scale

    def adopt(self, other: SolverState) -> None:
        """Take over the factored preconditioners of another state on the same model and statistics, where they fit.

        Those of the same layers and hyper-parameters do; the scale of S is no part of them where it is "auto".
        """
        apart = ("layers", "residual_share")
        here, there = (
            {name: value for name, value in state.hparams.identity("state").items() if name not in apart}
            for state in (self, other)
        )
        if self.view.model is other.view.model and self.recipe == other.recipe and here == there:
            common = set(self.hparams.layers) & set(other._preconditioners)
            self._preconditioners |= {layer: other._preconditioners[layer] for layer in common}
            self._output_metrics |= {n: m for n, m in other._output_metrics.items() if n in self.hparams.layers}

    def moment(self, layer: int) -> torch.Tensor:
        """The second moment [d, d] of a layer's inputs, or [E, m, m] of its experts', on the device of its weight.

        Raises:
            StatisticsError: it is missing or of another size.
        """
        assert self.statistics is not None  # the editor has checked that it has what the method needs
        second, stack = self.statistics.moment(layer), self.view.experts(layer)
        moment = second.moment
        size = self.view.edited_shape(layer)[1] if stack is None else stack.inputs
        expected = (size, size) if stack is None else (stack.count, size, size)
        if tuple(moment.shape) != expected:
            of_experts = "" if stack is None else f" in each of {stack.count} experts"
            raise StatisticsError(
                f"statistics are {list(moment.shape)}, {self.view.weight_name(layer)} takes {size} inputs{of_experts}"
            )
        return moment.to(self._device(layer))

    def shared_moment(self, layer: int) -> torch.Tensor | None:
        """The second moment [m_s, m_s] of a layer's shared experts in the stack; None where none are in it.

        Raises:
            StatisticsError: it is missing or of another size.
        """
        shared = self.view.shared_experts(layer)
        if shared is None:
            return None
        assert self.statistics is not None
        moment = self.statistics.moment(layer).shared
        if moment is None or tuple(moment.shape) != (shared.inputs, shared.inputs):
            collected = "none" if moment is None else list(moment.shape)
            raise StatisticsError(
                f"statistics of shared experts are {collected}, {shared.path} takes {shared.inputs} inputs: collect "
                "them with the same spec as here"
            )
        return moment.to(self._device(layer))

    def _device(self, layer: int) -> torch.device:
        """Of a layer's weight."""
        return self.view.weight(layer).device

    def solve_batch(
        self,
        layer: int,
        keys: torch.Tensor,
        residuals: torch.Tensor,
        weights: torch.Tensor | None = None,
        groups: Sequence[str] | None = None,
        unmoved: torch.Tensor | None = None,
        chosen: Sequence[int] | None = None,
    ) -> LowRankUpdate | ExpertUpdate:
        """The update of one layer for all requests of a batch, or for some of them; by expert where it has experts.

        With shared experts in the stack it is that of the stacked matrix [out, E m + m_s].

        A method with a memory remembers the keys of a layer once a batch: all of those of the first call. Later calls,
        of further rounds, are for the same requests.

        Args:
            layer: the layer.
            keys: K [d, u]; stacked keys, d = E m (E m + m_s with shared experts), where the layer has experts.
            residuals: R [out, u], the share that this layer takes.
            weights: [u] of the requests in the least squares; None for 1 each.
            groups: u names; requests with the same name share one column. None: each has its own.
            unmoved: K_p [d, p], inputs whose output should stay as it is: columns without a residual in this batch's
                system alone. None for none.
            chosen: places of the requests that take part in the system; None for all.
        """
        device, stack = self._device(layer), self.view.experts(layer)
        keys, residuals = keys.to(device), residuals.to(device)
        unmoved = None if unmoved is None else unmoved.to(device)
        whole_batch = (keys, weights)
        if chosen is not None:
            keys, residuals = keys[:, chosen], residuals[:, chosen]
            weights = None if weights is None else weights[chosen]
            groups = None if groups is None else [groups[i] for i in chosen]
        if groups is not None:
            if weights is not None:
                weights = merge_columns(keys, weights[None].to(keys), groups)[1][0]
            keys, residuals = merge_columns(keys, residuals, groups)
        self._decide_scale(layer, keys)
        preconditioner, metric = self.preconditioner(layer), self.output_metric(layer)
        if not self.recipe.memory:
            rho = RHOS[self.recipe.constraint](self.hparams)
            weights = None if weights is None else weights.to(device)
            update = solve_update(
                keys,
                residuals,
                preconditioner,
                rho,
                weights=weights,
                unmoved=unmoved,
                form="auto" if stack is None else "dual",
                output_metric=metric,
                sparse=stack is not None,
            )
            return self._by_expert(layer, update)
        memory = self._memory(layer)
        update, appended = memory.solve(keys, residuals, weights, unmoved, output_metric=metric)
        if layer not in self._pending.appended:
            self._pending.appended[layer] = appended if chosen is None else memory.extended(*whole_batch)
        return self._by_expert(layer, update)

    def _by_expert(self, layer: int, update: LowRankUpdate) -> LowRankUpdate | ExpertUpdate:
        """A layer's update [out, d] by expert where all of its columns are of experts; else as it is."""
        stack = self.view.experts(layer)
        if stack is None or stack.shared is not None:
            return update
        return ExpertUpdate.of_stacked(update, stack.count)

    def _memory(self, layer: int) -> KeyMemory:
        """The keys of earlier batches of a layer."""
        if layer not in self.memories:
            self.memories[layer] = KeyMemory(self.preconditioner(layer), self.memory_form(layer), self.window)
        return self.memories[layer]

    def memory_form(self, layer: int) -> SystemForm:
        """The form of a layer's key memory. That of experts never folds: their earlier keys act through n x n."""
        return self.hparams.memory_form if self.view.experts(layer) is None else "dual"

    def solve_rank_one(
        self, layer: int, key_update: torch.Tensor, key_value: torch.Tensor, residual: torch.Tensor
    ) -> tuple[LowRankUpdate | ExpertUpdate | None, float]:
        """The rank-one update of one request, and its pivot; see `rank_one_equality`."""
        device = self._device(layer)
        update, pivot = rank_one_equality(
            self.preconditioner(layer),
            key_update.to(device),
            key_value.to(device),
            residual.to(device),
            on_bad_pivot=self.hparams.on_bad_pivot,
        )
        return None if update is None else self._by_expert(layer, update), pivot

    def solve_gradients(
        self, modules: dict[str, ModuleGradients], turns: Sequence[int] = ()
    ) -> dict[str, LowRankUpdate]:
        """UltraEdit's updates [out, d] of all modules.

        Modules of one shape share a normalizer, which takes the rows of all of them before the first update is made.

        Args:
            modules: path of a module -> its keys and gradients.
            turns: numbers of rows that a normalizer takes one after another; empty for all rows at once.
        """
        shapes = self._normalize(modules, turns)
        normalizers = {shape: self._pending.normalizers[shape] for shape in shapes.values()}
        whitenings = {shape: known.whitening(self.hparams.whitening_floor) for shape, known in normalizers.items()}
        updates = {}
        for name, rows_of in modules.items():
            device, whitening = rows_of.keys.device, whitenings[shapes[name]]
            updates[name] = gradient_update(
                rows_of.keys,
                rows_of.gradients,
                normalizers[shapes[name]].to(device),
                self.hparams.lr,
                self.hparams.ridge,
                None if whitening is None else whitening.to(device),
            )
        return updates

    def _normalize(self, modules: dict[str, ModuleGradients], turns: Sequence[int]) -> dict[str, str]:
        """Add the rows of all modules to the open batch's normalizers; path of a module -> its shape."""
        kind, pending, shapes = NORMALIZERS[self.recipe.normalizer], self._pending, {}
        for name, rows_of in modules.items():
            out = rows_of.gradients.shape[1]
            rows = torch.cat([rows_of.keys.double(), rows_of.gradients.double()], 1)
            shape = shapes[name] = f"{rows_of.keys.shape[1]}x{out}"
            known = pending.normalizers.get(shape, self.normalizers.get(shape))
            normalizer = kind.empty(rows.shape[1], rows.device, out) if known is None else known.to(rows.device)
            for part in rows.split(list(turns)) if turns else (rows,):
                normalizer = normalizer.updated(part)
            pending.normalizers[shape] = normalizer
            if self.recipe.whitens_gradients:
                gradients = rows_of.gradients.cpu()
                pending.gradients.setdefault(shape, []).extend(gradients.split(list(turns)) if turns else [gradients])
        return shapes

    def warm_up(self, modules: dict[str, ModuleGradients], turns: Sequence[int] = ()) -> None:
        """Add rows to the open batch's normalizers, as `solve_gradients` does, and solve nothing."""
        self._normalize(modules, turns)

    def commit_warm_up(self) -> None:
        """Add what `warm_up` has gathered to the state, before the first batch.

        Raises:
            EditError: there are batches already.
        """
        if self._history.batches:
            raise EditError("normalizers are warmed up before the first edit; this editor has made some")
        pending, self._pending = self._pending, _PendingState()
        self.normalizers = {**self.normalizers, **pending.normalizers}
        self._set_first_normalizers()

    def limited(self, update: LowRankUpdate | ExpertUpdate, weight: torch.Tensor) -> LowRankUpdate | ExpertUpdate:
        """The update as it is written: attenuated along the main directions of `weight` [out, in] by `sphere_strength`,
        then reduced to `spectral_limit` and `frobenius_limit` of the weight.

        Of experts [E, out, m], all three are of the stacked matrix [out, E m].
        """
        hparams = self.hparams
        if isinstance(update, ExpertUpdate):
            if not self.limits:
                return update
            stacked = LowRankUpdate(update.left, update.stacked_right())
            limited = self.limited(stacked, stacked_matrix(weight))
            assert isinstance(limited, LowRankUpdate)
            return update if limited is stacked else ExpertUpdate.of_stacked(limited, update.shape[0])
        if hparams.sphere_strength and self.recipe.is_batched:
            directions = main_directions(whole(weight), hparams.sphere_energy)
            update = attenuate(update, directions, hparams.sphere_strength)
        if hparams.spectral_limit:
            update = limit_spectrum(update, hparams.spectral_limit * spectral_norm(whole(weight)))
        if hparams.frobenius_limit:
            norm = float(torch.linalg.vector_norm(whole(weight), dtype=torch.float64))
            update = limit_norm(update, hparams.frobenius_limit * norm)
        return update

    @property
    def limits(self) -> bool:
        """Whether `limited` changes anything."""
        hparams = self.hparams
        attenuates = hparams.sphere_strength and self.recipe.is_batched
        return bool(attenuates or hparams.spectral_limit or hparams.frobenius_limit)

    @property
    def window(self) -> int:
        """How many batches can be undone; 0 for all."""
        return self.hparams.undo_window

    @property
    def batches(self) -> int:
        """Number of batches that were committed and not undone."""
        return self._history.batches

    def require_state(self) -> None:
        """Raise EditError when the state that was loaded before the first edit is gone."""
        if self._lost:
            raise EditError(
                f"all edits were undone, and with memory_window = {self.window} the keys of the edits before them (of "
                "a file or another program) can no longer be told from theirs: load them again, or make a new Editor"
            )

    def set_key_memories(self, memories: Mapping[int, KeyMemory]) -> None:
        """Replace the keys of earlier batches, by layer, with those of edits made outside this editor.

        Raises:
            MethodError: there are earlier keys, and the scale of S is "auto", so unknown for them; or they are of
                experts and in another form than dual.
        """
        if memories and self.hparams.scale_name is not None:
            raise MethodError(
                f'{self.hparams.scale_name} = "{AUTO}" is decided by a first batch; with the keys of earlier edits '
                "give the number that they were made with"
            )
        for layer, memory in memories.items():
            if self.view.experts(layer) is not None and memory.form != "dual":
                raise MethodError(f"layer {layer} has experts, whose key memory has the form dual; got {memory.form!r}")
        self.memories = dict(memories)
        self._continues, self._lost = self._continues or bool(memories), False

    def commit(self) -> None:
        """Add the open batch to the state. Its updates must be written by now."""
        pending, self._pending = self._pending, _PendingState()
        counts = {layer: memory.batches for layer, memory in self.memories.items()}
        self._marks = {layer: memory.mark() for layer, memory in self.memories.items()}
        snapshot = _Snapshot(counts, _slim(self.normalizers), self.scales, pending.gradients)
        self._history = replace(self._history, snapshots=(*self._history.snapshots, snapshot))
        for layer, appended in pending.appended.items():
            self.memories[layer].commit(appended)
        self.normalizers = {**self.normalizers, **pending.normalizers}
        self.scales = {**self.scales, **pending.scales}
        keys = {layer: appended.raw for layer, appended in pending.appended.items()}
        self.committed = Committed(keys, _slim(pending.normalizers), pending.scales, pending.gradients)

    def repeat(self, committed: Committed) -> None:
        """Commit a batch again that a state like this one has committed: the same bits."""
        scatters = self._added(_scatters(self.normalizers), committed.gradients)
        normalizers = {
            shape: self._with_scatter(known, scatters.get(shape)) for shape, known in committed.normalizers.items()
        }
        self._pending = _PendingState(
            normalizers=normalizers, gradients=committed.gradients, scales=dict(committed.scales)
        )
        for layer, keys in committed.keys.items():
            self._pending.appended[layer] = self._memory(layer).appended(keys)
        self.commit()

    def settle(self, batches: int) -> None:
        """Drop the open batch, and undo what was committed beyond `batches`, also where a commit was interrupted."""
        self._pending = _PendingState()
        history = self._history
        if batches >= history.batches:
            self._marks = {}  # they hold what a fold has replaced
            excess = len(history.snapshots) - self.window
            if self.window and excess > 0:
                scatters = self._scatters_after(excess)
                self._history = _History(history.forgotten + excess, history.snapshots[excess:], scatters)
            self._drop_unscaled()
            return
        remaining = history.snapshots[: max(0, batches - history.forgotten)]
        try:
            self._return_to(batches)
        except BaseException:
            # KeyboardInterrupt during the restore: finish the restore, then re-raise, so that the state is never half
            # undone.
            self._return_to(batches)
            raise
        finally:
            scatters = history.scatters if batches >= history.forgotten else _scatters(self._first_normalizers)
            self._history = _History(min(batches, history.forgotten), remaining, scatters)
            self._marks = {}

    def _return_to(self, batches: int) -> None:
        """Make the state what it was after so many batches: one of the history, or none at all."""
        history = self._history
        if batches < history.forgotten:
            assert batches == 0  # the ledger refuses the others
            self.memories, self.normalizers, self.scales = {}, dict(self._first_normalizers), {}
            self._lost = self._continues and self.recipe.memory
            return
        snapshot = history.snapshots[batches - history.forgotten]
        self.scales, scatters = snapshot.scales, self._scatters_after(batches - history.forgotten)
        self.normalizers = {
            shape: self._with_scatter(known, scatters.get(shape)) for shape, known in snapshot.normalizers.items()
        }
        for layer, memory in self.memories.items():
            if layer in self._marks and batches == history.batches - 1:
                memory.return_to(self._marks[layer])  # with the reach that it had
            else:
                memory.rollback(max(0, memory.batches - snapshot.batches.get(layer, 0)))
        self._drop_unscaled()

    def _with_scatter(self, slim: Normalizer, scatter: Scatter | None) -> Normalizer:
        """A normalizer with its scatter, where it whitens."""
        if scatter is None:
            return slim
        device = scatter.mean.device
        return WhitenedNormalizer(slim.count, slim.mean.to(device), slim.squares.to(device), scatter)

    def _scatters_after(self, snapshots: int) -> dict[str, Scatter]:
        """Shape of module -> the scatter after so many batches of the history, by the same sums as the first time."""
        scatters = dict(self._history.scatters)
        for snapshot in self._history.snapshots[:snapshots]:
            scatters |= self._added(scatters, snapshot.gradients)
        return scatters

    def _added(
        self, scatters: Mapping[str, Scatter], gradients: Mapping[str, Sequence[torch.Tensor]]
    ) -> dict[str, Scatter]:
        """Shape of module -> its scatter with the gradients of a batch."""
        added = {}
        for shape, parts in gradients.items():
            scatter = scatters.get(shape)
            if scatter is None:
                scatter = Scatter.empty(int(shape.split("x")[1]), self.view.head.device)
            for rows in parts:
                scatter = scatter.updated(rows.to(scatter.mean.device))
            added[shape] = scatter
        return added

    def _set_first_normalizers(self) -> None:
        """Take the normalizers as they are for those before the first batch."""
        self._first_normalizers = dict(self.normalizers)
        self._history = replace(self._history, scatters=_scatters(self.normalizers))

    def _drop_unscaled(self) -> None:
        """Drop memories whose scale no batch has decided any more. They are empty."""
        if self.hparams.scale_name is not None:
            self.memories = {layer: memory for layer, memory in self.memories.items() if layer in self.scales}

    @property
    def null_spaces(self) -> dict[int, int]:
        """Layer -> dimension of its null space, where the method has one and the layer was edited; over all experts."""
        dimensions = {}
        for layer, space in self._preconditioners.items():
            if isinstance(space, NullSpace):
                dimensions[layer] = space.dimension
            elif isinstance(space, BlockDiagonal) and (of_experts := space.null_dimensions):
                dimensions[layer] = sum(of_experts)
        return dimensions

    @property
    def nbytes(self) -> int:
        """Bytes kept between batches: preconditioners, output metrics, key memories, normalizers."""
        factors = [*self._preconditioners.values(), *self._output_metrics.values()]
        systems = [*factors, *self.memories.values(), *self.normalizers.values()]
        to_undo = [
            rows.nbytes for batch in self._history.snapshots for parts in batch.gradients.values() for rows in parts
        ]
        before = self._history.scatters.values() if self._history.snapshots else ()
        return sum(system.nbytes for system in systems) + sum(to_undo) + sum(known.products.nbytes for known in before)

    def save(
        self, path: str | os.PathLike, identity: dict[str, Any], chosen: Mapping[str, float] | None = None
    ) -> None:
        """Write the state to one safetensors file, completely or not at all.

        Args:
            path: the file.
            identity: what the state belongs to, beside the hyper-parameters.
            chosen: hyper-parameters of the values that are "auto" -> the number that was chosen.

        Raises:
            StatisticsError: the file cannot be written.
        """
        self.require_state()
        tensors: dict[str, torch.Tensor] = {}
        for layer, memory in self.memories.items():
            tensors |= {f"memory.{layer}.{name}": tensor for name, tensor in memory.tensors().items()}
        for shape, normalizer in self.normalizers.items():  # files of format 1 spell the names so
            tensors |= {f"normaliser.{shape}.{name}": tensor for name, tensor in normalizer.tensors().items()}
        memories = {str(layer): memory.about() for layer, memory in self.memories.items()}
        metadata = {
            "format_version": FORMAT_VERSION,
            "kedit_fast": __version__,
            "belongs": json.dumps(self._full_identity(identity)),
            "memories": json.dumps(memories),
            **({"resolved": json.dumps(resolved)} if (resolved := self._resolved(chosen or {})) else {}),
            **(
                {"output_metrics": json.dumps(self._metric_probes(self.memories))}
                if self.hparams.weighs_outputs
                else {}
            ),
        }
        write_file(path, tensors, metadata, StatisticsError)

    def load(self, path: str | os.PathLike, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
        """Read what `save` wrote. The next updates are those of the run that wrote it.

        Args:
            path: the file.
            identity: what must be as it was for `save`; entries may be missing.

        Returns:
            the identity in the file, with all entries, and what was chosen of the values' hyper-parameters.

        Raises:
            StatisticsError: the file cannot be read, is damaged or foreign, or is of another method, configuration,
                model, edit history or statistics: the message says which.
            EditError: there are batches already.
        """
        if self._history.batches or self.normalizers or any(memory.count for memory in self.memories.values()):
            raise EditError("a state is loaded before the first edit; this editor has made some")
        tensors, metadata = read_file(path, StatisticsError)
        fields = ("belongs", "memories")
        if metadata.get("format_version") not in READABLE or any(name not in metadata for name in fields):
            raise StatisticsError(f"{path} is not a state of an editor (format {FORMAT_VERSION})")
        there, here = json.loads(metadata["belongs"]), self._full_identity(identity)
        off = {name: known.off for name, known in DECLARATIONS.items() if known.off is not None}  # left out where off
        for name in [*here, *(name for name in off if name in there and name not in here)]:
            before, value = there.get(name, off.get(name)), here.get(name, off.get(name))
            if before != value:
                both = f": {before} there, {value} here" if len(str(value)) < 80 else ""
                raise StatisticsError(f"{path} is the state of another run: different {name}{both}")
        self._check_metrics(path, json.loads(metadata.get("output_metrics", "{}")))
        resolved = json.loads(metadata.get("resolved", "{}"))
        self._pending.scales = {int(layer): float(scale) for layer, scale in resolved.get("scales", {}).items()}
        try:
            memories = self._read_memories(path, tensors, json.loads(metadata["memories"]))
        finally:
            scales, self._pending.scales = self._pending.scales, {}
        normalizers: dict[str, Normalizer] = {}
        for shape in {name.split(".")[1] for name in tensors if name.startswith("normaliser.")}:
            size, out = map(int, shape.split("x"))
            normalizers[shape] = NORMALIZERS[self.recipe.normalizer].from_tensors(
                _under(f"normaliser.{shape}.", tensors), size + out, f"{path}, modules of {shape},", out
            )
        self.memories, self.normalizers, self.scales = memories, normalizers, scales
        self._continues, self._lost = True, False
        self._set_first_normalizers()
        return there, {name: float(number) for name, number in resolved.items() if name != "scales"}

    def _metric_probes(self, layers: Iterable[int]) -> dict[str, list[float]]:
        """Layer -> the probe of its output metric, as a saved state holds it."""
        metrics = {layer: self.output_metric(layer) for layer in layers}
        return {str(layer): metric.probe().tolist() for layer, metric in metrics.items() if metric is not None}

    def _check_metrics(self, path: str | os.PathLike, stored: Mapping[str, list[float]]) -> None:
        """Raise StatisticsError when a saved state was made with other statistics of outputs."""
        here = self._metric_probes(map(int, stored))
        for layer, probe in stored.items():
            there, expected = torch.tensor(probe), torch.tensor(here[layer])
            if there.shape != expected.shape or not torch.allclose(there, expected, rtol=PROBE_TOLERANCE):
                raise StatisticsError(f"{path}, layer {layer}, was kept with other statistics of outputs")

    def _read_memories(
        self, path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], descriptions: Mapping[str, Any]
    ) -> dict[int, KeyMemory]:
        """Layer -> its key memory in a saved state; `descriptions` are by layer."""
        return {
            int(layer): KeyMemory.from_tensors(
                self.preconditioner(int(layer)),
                _under(f"memory.{layer}.", tensors),
                description,
                f"{path}, layer {layer},",
                self.memory_form(int(layer)),
                self.window,
            )
            for layer, description in descriptions.items()
        }

    def _resolved(self, chosen: Mapping[str, float]) -> dict[str, Any]:
        """What was decided in place of "auto", as a saved state holds it."""
        resolved: dict[str, Any] = dict(chosen)
        if self.scales:
            resolved["scales"] = {str(layer): scale for layer, scale in self.scales.items()}
        return resolved

    def _full_identity(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What a state belongs to, as JSON reads it back."""
        full = {"method": self.recipe.name, **self.hparams.identity("state"), **identity}
        return json.loads(json.dumps(full))


def _slim(normalizers: Mapping[str, Normalizer]) -> dict[str, Normalizer]:
    """The same without the scatters of those that whiten."""
    return {
        shape: replace(known, scatter=None) if isinstance(known, WhitenedNormalizer) else known
        for shape, known in normalizers.items()
    }


def _scatters(normalizers: Mapping[str, Normalizer]) -> dict[str, Scatter]:
    """Shape of module -> the scatter, of those that whiten."""
    whole = {shape: known.scatter for shape, known in normalizers.items() if isinstance(known, WhitenedNormalizer)}
    return {shape: scatter for shape, scatter in whole.items() if scatter is not None}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, named by the rest."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


NORMALIZERS: dict[NormalizerKind, type[Normalizer]] = {"standard": Normalizer, "whitened": WhitenedNormalizer}
"""The running normalizers of gradient methods."""

RHOS: dict[Constraint, Callable[[Hparams], float]] = {
    "ridge": lambda hparams: 1.0,
    "soft_equality": lambda hparams: hparams.emmet_lambda,
}
"""rho of a batch's system. Equality constraints have no batch form: they are solved by `SolverState.solve_rank_one`."""
