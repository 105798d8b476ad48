"""The state of one call of `Editor.edit`, which a schedule fills."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import torch

from kedit_fast.editing.gradients import AnswerGradients
from kedit_fast.editing.keys import StateBudget, bare_outputs
from kedit_fast.editing.ledger import Ledger
from kedit_fast.editing.result import EditResult
from kedit_fast.editing.shaping import SHAPINGS
from kedit_fast.editing.solver_state import SolverState
from kedit_fast.editing.tuning.state import TuningState
from kedit_fast.editing.values.chunks import Columns, find_chunk_values, spans_of
from kedit_fast.editing.values.clamp import choose_clamp, trial_places
from kedit_fast.editing.values.loop import SITES
from kedit_fast.editing.values.objective import EarlierChunks
from kedit_fast.editing.values.protocol import ValueStore
from kedit_fast.editing.values.result import PROBLEMS, Values
from kedit_fast.editing.values.shared import find_shared_values
from kedit_fast.editing.values.slot_shape import SlotShape
from kedit_fast.editing.values.slots import RecordedIteration
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import EditError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Recipe, ValueSites
from kedit_fast.models.forward import Site, SiteKind
from kedit_fast.models.sharded import whole
from kedit_fast.models.view import ModelView
from kedit_fast.models.weight_names import module_path_of, weight_name_of
from kedit_fast.requests.problems import OnError, require_no_problems
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.expert_update import ExpertUpdate, split_update
from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, MaskedUpdate, Update, total_of, update_of
from kedit_fast.solver.norm_anchor import DROPPED_ABOVE, anchored, norm_anchor
from kedit_fast.solver.value_descent import Status
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.timing import timed

_log = logging.getLogger("kedit_fast")
NORM_WARNING = 2.0
"""|Delta| / |W| above which an edit is more likely to harm than to teach."""

ANCHOR_REQUESTS = 200
"""Requests over which a norm anchor is measured, at least, without a warning."""
MOST_ANCHOR_REQUESTS = 1000
"""Requests over which a norm anchor is measured, at most, as published."""

Factors = LowRankUpdate | ExpertUpdate
Written = TypeVar("Written", Factors, DenseUpdate)
Phase = Literal["keys", "values", "solve", "write"]
"""What the time of a batch is counted to."""


@dataclass(frozen=True)
class EditContext:
    """What a batch works with: the parts of an editor that a schedule needs."""

    view: ModelView
    tokenizer: Any
    recipe: Recipe
    hparams: Hparams
    modules: Mapping[str, torch.Tensor]
    """Path of an edited module -> its weight [out, in], a view on the model's memory (a DTensor where it is split); of
    a layer with experts, their weights [E, out, in]."""
    value_sites: ValueSites
    """Where values are optimized."""
    ledger: Ledger
    """Open: writes belong to the batch."""
    solver_state: SolverState
    value_store: ValueStore | None
    """Where values are looked up before they are optimized."""
    state_budget: StateBudget | None
    """Bytes for the hidden states between layers."""
    gather_gradients: Callable[..., AnswerGradients]
    """What gathers the keys and gradients of methods without values; `answer_gradients` or one like it."""
    on_keys: Callable[[int, torch.Tensor], None] | None
    """Called with a layer and its keys [d, u]."""
    progress: bool
    values_most: int | None = None
    """Requests whose values are optimized together, at most; None for as many as fit in memory."""
    tuning: TuningState | None = None
    """What methods without a closed form keep from batch to batch."""
    seed: int = 0
    """Of orders and masks."""

    @property
    def site(self) -> SiteKind:
        """The site of the value that the last layer is to put out, of methods that optimize values."""
        return SITES[self.value_sites][-1]


class BatchRun:
    """One batch while it is computed and written.

    Args:
        context: what it works with.
        prepared: the requests.
        on_error: "raise" at a request that turns out to be unusable, or "skip" it.
    """

    def __init__(self, context: EditContext, prepared: list[PreparedRequest], on_error: OnError):
        self.context, self.prepared = context, prepared
        self.on_error: OnError = on_error
        self.skipped: dict[int, str] = {}
        """Index in `prepared` -> why the request is not written."""
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.rounds: tuple[int, ...] = ()
        self.collisions: list[tuple[int, int]] = []
        self.unlearned: tuple[int, ...] = ()
        """Of methods that tune a matrix, indices in `prepared` of requests that ended without learning their target."""
        self.residual_before = self.residual_after = 0.0
        """Squared norms of the residuals, summed over requests."""
        self.seconds: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        self._unshaped: dict[str, list[Factors]] = {}  # by name of the weight; what `write_shaped` starts from
        self._updates: dict[str, list[Update]] = {}  # by name of the weight; final, on the host
        self._norms: dict[str, list[float]] = {}  # of each of these
        self._weight_norms: dict[str, float] = {}
        self._shape = SHAPINGS[context.recipe.shaping].of_batch
        view, layers = context.view, () if context.hparams.inner_params else context.hparams.layers
        self._with_shared = {view.module_name(n): n for n in layers if view.shared_experts(n) is not None}

    @property
    def writes_again(self) -> bool:
        """Whether `write_shaped` must follow the last layer."""
        return self._shape is not None

    def value_groups(self, prepared: Sequence[PreparedRequest]) -> list[str] | None:
        """The subject of each request, where requests on one subject share a value; else None."""
        return [(p.request.subject or "").strip() for p in prepared] if self.context.recipe.merge else None

    def find_values(
        self, indices: Sequence[int], layer: int, recorded: RecordedIteration | None = None
    ) -> tuple[list[PreparedRequest], Values]:
        """Values of some requests, and which of them can be written; the others are skipped or raised.

        The values are in the order of `Columns`: where targets are taken in chunks, a request has several. Calls that
        share a `recorded` iteration (`recorded_iteration`) record it once.
        """
        context = self.context
        prepared = [self.prepared[i] for i in indices]
        values = self._optimized(prepared, layer, context.hparams, context.value_store, recorded)
        problems = self._problems(prepared, values)
        if self.on_error == "raise":
            require_no_problems(problems)
        self.skipped |= {indices[place]: reason for place, reason in problems.items()}
        usable = [place for place in range(len(prepared)) if place not in problems]
        columns = Columns.of(prepared, spans_of(prepared, context.hparams))
        prepared, values = [prepared[place] for place in usable], values.select(columns.of_requests(usable))
        if not context.hparams.norm_anchor or not prepared:
            return prepared, values
        return self._anchored([indices[place] for place in usable], prepared, values, layer)

    def recorded_iteration(self) -> RecordedIteration | None:
        """An iteration for calls of `find_values` with any requests of the batch; None where none is recorded."""
        if not self.context.hparams.values_graph:
            return None
        shape = SlotShape.of(self.prepared, self.context.view.max_length)
        return None if shape is None else RecordedIteration(shape)

    def _problems(self, prepared: Sequence[PreparedRequest], values: Values) -> dict[int, str]:
        """Place of a request -> why its value cannot be written."""
        allowed = {Status.PREDICTED} if self.context.hparams.on_predicted == "allow" else set()
        columns = Columns.of(prepared, spans_of(prepared, self.context.hparams))
        return {
            place: f"{prepared[place].name}: {PROBLEMS[code]}"
            for place, code in enumerate(columns.statuses(values))
            if code in PROBLEMS and code not in allowed
        }

    def _anchored(
        self, indices: Sequence[int], prepared: list[PreparedRequest], values: Values, layer: int
    ) -> tuple[list[PreparedRequest], Values]:
        """Values whose part of the MLP has the norm of the anchor; requests beyond twice the norm are skipped."""
        anchor = self.context.hparams.norm_anchor
        if isinstance(anchor, str):
            raise EditError('norm_anchor = "auto": no request that it is measured on has a value')
        rest, asked = self._parts(prepared, values, layer)
        scaled, dropped = anchored(asked, anchor)
        targets = values.all_targets.clone()
        targets[-1] = rest + scaled
        deltas = values.all_deltas.clone()
        deltas[-1] += (scaled - asked).to(deltas)
        columns = Columns.of(prepared, spans_of(prepared, self.context.hparams))
        norms = torch.linalg.vector_norm(asked, dim=0).tolist()
        beyond: dict[int, float] = {}  # place of a request -> the norm of a value that is too large
        for place, norm, drop in zip(columns.owner, norms, dropped.tolist(), strict=True):
            if drop:
                beyond.setdefault(place, norm)
        for place, norm in beyond.items():
            self.skipped[indices[place]] = (
                f"{prepared[place].name}: its value asks the MLP for an output of norm {norm:.3g}, more than "
                f"{DROPPED_ABOVE:g} times norm_anchor = {anchor:.3g}: the edit is dropped"
            )
        if beyond:
            _log.warning("%d of %d edits are dropped by norm_anchor", len(beyond), len(prepared))
        written = [place for place in range(len(prepared)) if place not in beyond]
        values = replace(values, all_targets=targets, all_deltas=deltas)
        return [prepared[place] for place in written], values.select(columns.of_requests(written))

    def _parts(
        self, prepared: Sequence[PreparedRequest], values: Values, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets [h, n] as h - m and v = m + delta: what the block adds to its MLP, and what the MLP is asked for.

        Where the value is that of the MLP the first part is 0.
        """
        if self.context.site == "mlp":
            return torch.zeros_like(values.targets), values.targets
        sites = [Site(layer, self.context.site), Site(layer, "mlp")]
        spans = spans_of(prepared, self.context.hparams)
        if spans is not None:
            prepared = [one.chunk(*span) for one, chunks in zip(prepared, spans, strict=True) for span in chunks]
        with self.timed("keys"):
            block, mlp = (states.to(values.targets) for states in bare_outputs(self.context.view, prepared, sites))
        return block - mlp, values.targets - (block - mlp)

    def settle_anchor(self, anchor: float | None) -> float | None:
        """Edit with this norm anchor in place of "auto", and return it; None measures it on the requests.

        It is measured with the model as it is now. The values are used again: they go to the value store, or into
        memory where there is none. Where no request has a value that can be written, there is no anchor: None.
        """
        if anchor is None:
            context = self.context
            store = context.value_store
            if store is None:
                self.context = replace(context, value_store=(store := ValueFile(None)))
            prepared = [self.prepared[i] for i in trial_places(len(self.prepared), MOST_ANCHOR_REQUESTS)]
            layer = context.hparams.layers[-1]
            values = self._optimized(prepared, layer, context.hparams, store)
            problems = self._problems(prepared, values)
            usable = [place for place in range(len(prepared)) if place not in problems]
            if not usable:
                return None
            columns = Columns.of(prepared, spans_of(prepared, context.hparams)).of_requests(usable)
            _, asked = self._parts([prepared[i] for i in usable], values.select(columns), layer)
            anchor = norm_anchor(torch.linalg.vector_norm(asked, dim=0))
            _log.info("norm_anchor %.4g, measured on %d requests", anchor, len(usable))
            if len(usable) < ANCHOR_REQUESTS:
                _log.warning(
                    "norm_anchor is measured on %d requests; %d or more give a steady number "
                    "(Editor.measure_norm_anchor takes others than those of the first batch)",
                    len(usable),
                    ANCHOR_REQUESTS,
                )
        self.context = replace(self.context, hparams=replace(self.context.hparams, norm_anchor=anchor))
        return anchor

    def _optimized(
        self,
        prepared: Sequence[PreparedRequest],
        layer: int,
        hparams: Hparams,
        store: ValueStore | None,
        recorded: RecordedIteration | None = None,
    ) -> Values:
        """The values of requests at a layer, by these hyper-parameters, in the order of `Columns`."""
        context = self.context
        if not context.recipe.guards_subjects:
            hparams = replace(hparams, kl_factor=0.0)

        def find(requests: Sequence[PreparedRequest], earlier: Sequence[EarlierChunks] | None = None) -> Values:
            return find_shared_values(
                context.view,
                context.tokenizer,
                requests,
                layer,
                context.value_sites,
                hparams,
                stop_rule=context.recipe.stop_rule,
                groups=self.value_groups(requests),
                earlier=earlier,
                store=store,
                most=context.values_most,
                progress=context.progress,
                recorded=recorded,
            )

        spans = spans_of(prepared, hparams)
        with self.timed("values"), torch.enable_grad():
            return find(prepared) if spans is None else find_chunk_values(find, prepared, spans)

    def settle_clamp(self, clamp: float | None) -> float:
        """Edit with this clamp in place of "auto", and return it; None chooses one on some of the requests.

        The values of these are used again: they go to the value store, or into memory where there is none.
        """
        context = self.context
        if clamp is None:
            prepared = [self.prepared[place] for place in trial_places(len(self.prepared))]
            store = context.value_store if isinstance(context.value_store, ValueFile) else ValueFile(None)
            if context.value_store is None:
                context = replace(context, value_store=store)
            layer = context.hparams.layers[-1]
            clamp = choose_clamp(context.hparams, lambda hparams: self._optimized(prepared, layer, hparams, store))
        self.context = replace(context, hparams=replace(context.hparams, clamp_norm_factor=clamp))
        return clamp

    def fail(self, index: int, problem: str) -> None:
        """Leave out a request, by its index in `prepared`, that turned out to be unusable; raises it, or skips it."""
        if self.on_error == "raise":
            require_no_problems({index: problem})
        self.skipped[index] = problem

    def record(self, values: Values, columns: Columns, rounds: tuple[int, ...] = ()) -> None:
        """Note losses and steps of values that are written, and how many requests each round wrote."""
        self.losses += columns.losses(values)
        self.steps += columns.steps(values)
        self.rounds = rounds

    def write(self, module: str, update: Written) -> Written:
        """Add an update to a module's weight, factors within the limits of its norm; returns what was written.

        A dense update is the end of a tuning run, which has its own constraints: it is written as it is. With
        shared experts in the stack the update is of the stacked matrix, and each part is written to its own weight.
        """
        name, weight = weight_name_of(module), self.context.modules[module]
        # A weight that is offloaded to the host is written there.
        moved = replace(update, **{part: tensor.to(weight.device) for part, tensor in vars(update).items()})
        self._note_norms(module)
        if isinstance(moved, DenseUpdate):
            with self.timed("write"):
                self.context.ledger.write(name, weight, moved)
            self._record_update(name, moved)
            return moved
        with self.timed("solve"):
            state = self.context.solver_state
            limited = state.limited(moved, self._matrix(module)) if state.limits else moved
        with self.timed("write"):
            parts = self._written(module, limited)
        if self.writes_again:
            self._unshaped.setdefault(name, []).append(limited)
        else:
            for one, part in parts.items():
                self._record_update(one, part)
        return limited  # pyright: ignore[reportReturnType]  # limits change no dense update, which has returned above

    def write_shaped(self) -> None:
        """Undo the writes of the batch and write the part of each update that the method's shaping selects."""
        assert self._shape is not None
        context = self.context
        with self.timed("write"):
            context.ledger.withdraw()
        for name, updates in list(self._unshaped.items()):
            module = module_path_of(name)
            weight = self._matrix(module)
            with self.timed("solve"):
                shaped = [self._shape(update, whole(weight), context.hparams) for update in updates]
            del self._unshaped[name]
            with self.timed("write"):
                for update in shaped:
                    for one, part in self._written(module, update).items():
                        self._record_update(one, part)

    def _matrix(self, module: str) -> torch.Tensor:
        """What an update of a module is of: [out, in] or [E, out, m]; with shared experts the stacked matrix."""
        layer = self._with_shared.get(module)
        return self.context.modules[module] if layer is None else self.context.view.edited_matrix(layer)

    def _note_norms(self, module: str) -> None:
        """Note the norms of the weights that an update of a module is written to, before the first one."""
        modules, layer = self.context.modules, self._with_shared.get(module)
        for path in [module] if layer is None else self.context.view.edited_weights(layer):
            if (name := weight_name_of(path)) not in self._weight_norms:
                self._weight_norms[name] = _norm(modules[path])

    def _written(self, module: str, update: Update) -> dict[str, Update]:
        """Write an update of a module into the ledger: name of each weight -> its part."""
        context, parts, layer = self.context, {module: update}, self._with_shared.get(module)
        if layer is not None:
            stack = context.view.experts(layer)
            assert stack is not None and isinstance(update, (LowRankUpdate, MaskedUpdate))
            parts = dict(
                zip(context.view.edited_weights(layer), split_update(update, stack.count, stack.inputs), strict=True)
            )
        for path, part in parts.items():
            weight = context.modules[path]
            there = update_of({one: tensor.to(weight.device) for one, tensor in vars(part).items()})
            context.ledger.write(weight_name_of(path), weight, there)
        return {weight_name_of(path): part for path, part in parts.items()}

    def _record_update(self, name: str, update: Update) -> None:
        """Note a final update. It goes to the host: in fp64, beside the ledger's factors, it would fill a GPU."""
        self._norms.setdefault(name, []).append(update.norm())
        self._updates.setdefault(name, []).append(update.cpu())

    def timed(self, phase: Phase) -> AbstractContextManager[None]:
        """Count the time of a block to a phase."""
        return timed(self.seconds, phase, self.context.view.device)

    def changed_weights(self) -> list[str]:
        """Names of the weights that the batch has written."""
        return list(self._updates)

    def result(
        self, number: int, written: Sequence[PreparedRequest], skipped: dict[int, str], prefixes: tuple[str, ...]
    ) -> EditResult:
        """What the batch did.

        Args:
            number: of the batch in the ledger; 0 when nothing was written.
            written: the requests that were written.
            skipped: index in the call -> why a request was left out.
            prefixes: the context prefixes.
        """
        norms = {
            name: (self._norms[name][0] if len(updates) == 1 else total_of(updates).norm())
            / max(self._weight_norms[name], 1e-30)
            for name, updates in self._updates.items()
        }
        for name, norm in norms.items():
            if norm > NORM_WARNING:
                _log.warning("%s: the update is %.1f times the weight's norm", name, norm)
        return EditResult(
            batch=number,
            requests=tuple(p.request for p in written),
            separators=tuple(p.separator for p in written),
            targets=tuple(p.target for p in written),
            updates={name: tuple(updates) for name, updates in self._updates.items()},
            losses=tuple(self.losses),
            steps=tuple(self.steps),
            relative_norms=norms,
            residual=(self.residual_after / self.residual_before) ** 0.5 if self.residual_before else 0.0,
            collisions=tuple(self.collisions),
            skipped=skipped,
            prefixes=prefixes,
            seconds={**self.seconds},
            rounds=self.rounds,
            unlearned=tuple(sum(i not in self.skipped for i in range(index)) for index in self.unlearned),
        )


def request_weights(prepared: Sequence[PreparedRequest]) -> torch.Tensor | None:
    """[u] weights of the requests in the batch's least squares, fp64; None where all are 1."""
    weights = [p.request.weight for p in prepared]
    return None if all(w == 1 for w in weights) else torch.tensor(weights, dtype=torch.float64)


def _norm(weight: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(whole(weight), dtype=accumulation_dtype(weight)))
