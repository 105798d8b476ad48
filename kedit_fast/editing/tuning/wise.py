"""WISE: tuned copies of one matrix, each with a random part of its entries open to its edits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from kedit_fast.editing.erasure import tokenized_texts
from kedit_fast.editing.tuning.captured import CapturedRows, TuningRow, rewriting_rows
from kedit_fast.editing.tuning.history import History, PackedMatrix
from kedit_fast.editing.tuning.margin import Margin
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.editing.tuning.plateau import Ending, until_plateau
from kedit_fast.errors import MethodError, RequestError
from kedit_fast.memories.memory import ActivationMemory
from kedit_fast.memories.selection import activation_function
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.forward import evaluating
from kedit_fast.models.widened import computing_dtype
from kedit_fast.requests.irrelevant import SENTENCES, irrelevant_texts, require_unrelated, unrelated_texts
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.entry_bits import random_bits
from kedit_fast.solver.merging import merged
from kedit_fast.support.messages import comma_list

if TYPE_CHECKING:
    from kedit_fast.editing.batch_run import BatchRun
    from kedit_fast.editing.tuning.state import TuningState

_log = logging.getLogger("kedit_fast")
TOGETHER = 64
"""Requests whose rows are captured together."""
TRIMMING = ("ties", "magnitude", "magnitude_norm")
"""The merges that leave the smallest changes out."""
LATER_SHARE, EARLIER_SHARE = 0.4, 0.6
"""Coefficients of new shards together and of what was merged before, of WISE's later merges into one; as released."""


@dataclass(frozen=True)
class Shard:
    """A tuned copy of the matrix."""

    number: int
    """Which one, from 0: the seed of its mask."""
    weight: torch.Tensor | None = None
    """[h, d] fp32 (fp64 of fp64 models); None for the model's own. It is never written to."""
    threshold: float = math.inf
    """The smallest mean activation change of its edits; infinity before the first that was learned."""
    edits: int = 0
    """Edits in it."""


@dataclass(frozen=True)
class Shards:
    """All copies, after some batches."""

    current: Shard = Shard(0)
    """The one that new edits go to."""
    saved: tuple[Shard, ...] = ()
    """Those before it, oldest first."""
    whole: Shard | None = None
    """What shards were merged into, where merges make one (`retrieve` is false)."""
    edits: int = 0
    """Edits that were counted: a shard ends, and shards are merged, at multiples."""
    texts: int = 0
    """Unrelated texts that were used."""
    holders: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    """Token ids of an edited prompt -> number of the shard that holds its edit."""

    @property
    def all(self) -> list[Shard]:
        """The current one first, then the saved ones, then what was merged into one."""
        return [self.current, *self.saved, *([] if self.whole is None else [self.whole])]


class Working:
    """Shards while a batch tunes them. What they were is not changed."""

    def __init__(self, shards: Shards, base: torch.Tensor, hparams: Hparams, make: Callable[[Shard], TunedMatrix]):
        self.shards, self.base, self.hparams, self._make = shards, base, hparams, make
        self._holders = dict(shards.holders)
        self._open: dict[int, TunedMatrix] = {}  # number of a shard -> its matrix, once a request tunes it

    def holder(self, prompt: tuple[int, ...]) -> Shard:
        """The shard that an edit of this prompt goes to: the one that holds an earlier edit of it, or the current."""
        number = self._holders.get(prompt, self.shards.current.number)
        return next((shard for shard in self.shards.all if shard.number == number), self.shards.current)

    def matrix(self, shard: Shard) -> TunedMatrix:
        """A shard's matrix, to be tuned."""
        if shard.number not in self._open:
            self._open[shard.number] = self._make(shard)
        return self._open[shard.number]

    def added(self, shard: Shard, prompt: tuple[int, ...], change: float | None) -> None:
        """Count an edit in a shard, whose activation change is a bound for its threshold; None for no bound."""
        threshold = shard.threshold if change is None else min(shard.threshold, change)
        self._replace(replace(shard, threshold=threshold, edits=shard.edits + 1))
        is_new = shard.number == self.shards.current.number
        self._holders[prompt] = shard.number
        if is_new:
            self.shards = replace(self.shards, edits=self.shards.edits + 1)
            if self.shards.edits % self.hparams.save_freq == 0:
                self._save()
            if self.shards.edits % self.hparams.merge_freq == 0:
                self.merge(self.hparams.merge_freq // self.hparams.save_freq)

    def _replace(self, shard: Shard) -> None:
        shards = self.shards
        if shard.number == shards.current.number:
            self.shards = replace(shards, current=shard)
        elif shards.whole is not None and shard.number == shards.whole.number:
            self.shards = replace(shards, whole=shard)
        else:
            saved = tuple(shard if one.number == shard.number else one for one in shards.saved)
            self.shards = replace(shards, saved=saved)

    def _closed(self, shard: Shard) -> Shard:
        """A shard with the numbers that its matrix has now."""
        matrix = self._open.pop(shard.number, None)
        return shard if matrix is None else replace(shard, weight=matrix.weight)

    def _save(self) -> None:
        shards = self.shards
        following = Shard(1 + max(shard.number for shard in shards.all))
        if not self.hparams.retrieve:  # as released, one threshold for all
            following = replace(following, threshold=shards.current.threshold)
        self.shards = replace(shards, saved=(*shards.saved, self._closed(shards.current)), current=following)

    def merge(self, count: int) -> None:
        """Merge the last `count` saved shards: into one of them, or with what was merged before where that is one."""
        chosen = [self._closed(shard) for shard in self.shards.saved[-count:]]
        weights = [self.base if shard.weight is None else shard.weight for shard in chosen]
        coefficients = [1 / len(chosen)] * len(chosen)
        whole = None if self.shards.whole is None else self._closed(self.shards.whole)
        if whole is not None:
            assert whole.weight is not None
            weights = [*weights, whole.weight]
            coefficients = [LATER_SHARE / len(chosen)] * len(chosen) + [EARLIER_SHARE]
        hparams = self.hparams
        weight = merged(self.base, weights, coefficients, hparams.merge_density, hparams.merge_alg)
        parts = chosen if whole is None else [*chosen, whole]
        result = Shard(
            chosen[-1].number,
            weight.contiguous(),
            min(shard.threshold for shard in parts),
            sum(shard.edits for shard in parts),
        )
        gone = {shard.number for shard in parts}
        self._holders = {prompt: result.number if n in gone else n for prompt, n in self._holders.items()}
        rest = self.shards.saved[:-count]
        if hparams.retrieve:
            self.shards = replace(self.shards, saved=(*rest, result))
        else:
            self.shards = replace(self.shards, saved=rest, whole=result)

    def finished(self, texts: int) -> Shards:
        """The shards after the batch, which has used so many unrelated texts."""
        shards = self.shards
        closed = [self._closed(shard) for shard in shards.all]
        saved = tuple(closed[1 : 1 + len(shards.saved)])
        whole = None if shards.whole is None else closed[-1]
        return replace(
            shards,
            current=closed[0],
            saved=saved,
            whole=whole,
            texts=shards.texts + texts,
            holders=self._holders,
        )


class ActivationTuning:
    """The edits of one editor as copies of a matrix. Nothing of the model changes.

    Args:
        state: what the editor tunes.
    """

    def __init__(self, state: TuningState):
        self.state, hparams = state, state.hparams
        if hparams.merge_freq % hparams.save_freq:
            raise MethodError(
                f"merge_freq must be a multiple of save_freq; got {hparams.merge_freq} and {hparams.save_freq}: shards "
                "that are merged are whole ones"
            )
        self.layer = hparams.layers[0]
        self.texts = irrelevant_texts(state.irrelevant)
        self.activation = activation_name(state.view.config)
        self.history: History[Shards] = History(Shards(), hparams.undo_window)
        self._pending: Shards | None = None
        self._warned = False
        self._scales: tuple[float, float] | None = None

    @property
    def base(self) -> torch.Tensor:
        """The model's matrix [h, d]."""
        return self.state.view.weight(self.layer)

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias [h], or None."""
        return self.state.view.edited_module(self.layer).bias

    def scales(self) -> tuple[float, float]:
        """What act_margin and lr are multiplied by: 1 in published units; else as unrelated texts say, measured once.

        The mean |s(o0)|_2 over their tokens; and the mean |o0|^2 over the mean |x|^2, since a step of plain descent
        changes outputs by lr |x|^2 times a gradient whose scale is that of 1 / |o0|.
        """
        if self.state.hparams.units == "published":
            return 1.0, 1.0
        if self._scales is None:
            state = self.state
            ids = tokenized_texts(state.view, state.tokenizer, self.texts, state.prompt_format)
            rows = [TuningRow(tuple(row), i, len(row), role="irrelevant") for i, row in enumerate(ids)]
            captured = state.capture(rows, self.layer)
            outputs = captured.original if self.bias is None else captured.original + self.bias.to(captured.original)
            activated = torch.linalg.vector_norm(activation_function(self.activation)(outputs), dim=1).mean()
            ratio = outputs.square().sum() / captured.x.to(outputs).square().sum()
            self._scales = float(activated), float(ratio)
        return self._scales

    def write(self, batch: BatchRun) -> None:
        """Tune on the requests of a batch, one after another; `commit` makes the result the state."""
        state, shards = self.state, self.history.current
        working = Working(shards, self.base, state.hparams, self._matrix)
        texts = self._texts(batch.prepared)
        unrelated = tokenized_texts(state.view, state.tokenizer, texts, state.prompt_format)
        unlearned: list[int] = []
        self._warn_of_merges(len(batch.prepared))
        with evaluating(state.view):
            for begin in range(0, len(batch.prepared), TOGETHER):
                part = batch.prepared[begin : begin + TOGETHER]
                rows: list[TuningRow] = []
                for i, row in enumerate(part):
                    text = tuple(unrelated[(shards.texts + begin + i) % len(unrelated)])
                    mine = [replace(one, request=i) for one in rewriting_rows([row], whole=True)]
                    rows += [*mine, TuningRow(text, i, len(text), role="irrelevant")]
                with batch.timed("keys"):
                    captured = state.capture(rows, self.layer)
                for i, request in enumerate(part):
                    with batch.timed("values"):
                        ending = self._tune(working, captured.of_requests([i]), request)
                    if not math.isfinite(ending.loss):
                        batch.fail(begin + i, f"{request.name}: the loss or its gradient is not finite")
                        continue
                    if not ending.learned:
                        unlearned.append(begin + i)
                    batch.losses.append(ending.likelihood)
                    batch.steps.append(ending.steps)
        report_unlearned(batch, unlearned)
        self._pending = working.finished(len(batch.prepared))

    def _tune(self, working: Working, rows: CapturedRows, request: PreparedRequest) -> Ending:
        """Tune on one request and count it; where its loss is not finite, its shard is as it was before."""
        hparams = self.state.hparams
        prompt = request.rewriting[0].ids
        shard = working.holder(prompt)
        matrix = working.matrix(shard)
        before = matrix.weight.clone()
        margins = [self.scales()[0] * bound for bound in hparams.act_margin]
        unchanged = None if shard.edits else matrix.outputs(rows.x)  # the same product as that of the first step
        margin = Margin(rows, margins, activation_function(self.activation), self.bias, unchanged)
        objective = Objective(rows, {"likelihood": Likelihood(rows, hparams.reduction), "margin": margin})
        ending = until_plateau(
            objective,
            matrix,
            rows.x,
            lambda: matrix.outputs(rows.x),
            hparams.num_steps,
            hparams.stop_loss,
            hparams.stop_change,
        )
        changes = margin.changes(ending.outputs, hparams.threshold_tokens == "prompt")[margin.inside[0]]
        change = float(changes.mean())
        if not (math.isfinite(ending.loss) and math.isfinite(change) and bool(matrix.finite)):
            matrix.set(before)
            matrix.finite.fill_(True)
            return replace(ending, loss=math.nan)
        working.added(shard, prompt, change if ending.learned else None)
        return ending

    def _matrix(self, shard: Shard) -> TunedMatrix:
        """A copy of a shard's matrix that takes steps; the box stands around the model's own."""
        hparams, base = self.state.hparams, self.base
        wide = torch.promote_types(base.dtype, torch.float32)
        source = base if shard.weight is None else shard.weight
        weight = source.to(wide, copy=True, memory_format=torch.contiguous_format)
        assert not isinstance(hparams.lr, str)
        lr = self.scales()[1] * hparams.lr
        steps = Steps("sgd", lr, hparams.weight_decay, hparams.decay_entries == "weight", hparams.norm_constraint)
        name = f"{self.state.view.module_name(self.layer)} shard {shard.number}"
        bits = random_bits(weight.numel(), hparams.mask_ratio, self.state.seed, name).to(base.device)
        dtype = computing_dtype(self.state.view.entry)  # of a 16-bit model on a processor without units for it, fp32
        halves = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return TunedMatrix(weight, base, steps, bits, halves)

    def _texts(self, prepared: Sequence[PreparedRequest]) -> Sequence[str]:
        """The unrelated texts for some requests; built-in ones that name a subject are left out."""
        requests = [one.request for one in prepared]
        if self.texts is not SENTENCES:
            require_unrelated(self.texts, requests)
            return self.texts
        usable = unrelated_texts(self.texts, requests)
        if not usable:
            raise RequestError("every built-in irrelevant text names an edited subject: give others (irrelevant)")
        return usable

    def _warn_of_merges(self, edits: int) -> None:
        """Warn once when a merge comes near whose trim removes nothing."""
        hparams, counted = self.state.hparams, self.history.current.edits
        comes = (counted + edits) // hparams.merge_freq > counted // hparams.merge_freq
        idle = hparams.merge_alg in TRIMMING and hparams.merge_density >= hparams.mask_ratio
        if comes and idle and hparams.merge_freq > hparams.save_freq and not self._warned:
            self._warned = True
            _log.warning(
                "merge_density = %g trims nothing from shards that differ in mask_ratio = %g of their entries",
                hparams.merge_density,
                hparams.mask_ratio,
            )

    def commit(self) -> None:
        """Make the open batch the state."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        self.history.push(state, _restorer(self.history.current, state, self.base))

    def settle(self, batches: int) -> bool:
        """Drop an open batch and return to the state after so many batches; returns whether that is another one."""
        self._pending = None
        return self.history.settle(batches)

    def memory(self, about: Mapping[str, object]) -> ActivationMemory | None:
        """What answers beside the weights, or None before the first edit; `about` are fields of every memory."""
        shards, hparams = self.history.current, self.state.hparams
        if not any(shard.edits for shard in shards.all):
            return None
        base = self.base
        chosen = [
            shard
            for place, shard in enumerate(shards.all)
            if shard.edits or (place == 0 and hparams.route_order == "published")
        ]
        weights = [base if shard.weight is None else shard.weight.to(base) for shard in chosen]
        thresholds = [shard.threshold for shard in chosen]
        if not hparams.retrieve:
            thresholds = [min(thresholds)] * len(thresholds)
        return ActivationMemory(
            weights=torch.stack(weights),
            thresholds=torch.tensor(thresholds, dtype=torch.float32, device=base.device),
            bias=None if self.bias is None else self.bias.detach().clone(),
            act_ratio=hparams.act_ratio,
            activation=self.activation,
            order=hparams.route_order,
            **about,  # pyright: ignore[reportArgumentType] - fields of SideMemory
        )


def _restorer(before: Shards, after: Shards, base: torch.Tensor) -> Callable[[Shards], Shards]:
    """What makes the shards before a batch again; weights that the batch has replaced are packed."""
    present = {id(shard.weight) for shard in after.all if shard.weight is not None}
    packed = {
        shard.number: PackedMatrix.of(shard.weight, base)
        for shard in before.all
        if shard.weight is not None and id(shard.weight) not in present
    }
    slim = replace(
        before,
        current=_without(before.current, packed),
        saved=tuple(_without(shard, packed) for shard in before.saved),
        whole=None if before.whole is None else _without(before.whole, packed),
    )

    def full(shard: Shard) -> Shard:
        weight = packed.get(shard.number)
        return shard if weight is None else replace(shard, weight=weight.unpacked(base))

    def restored(_: Shards) -> Shards:
        whole = None if slim.whole is None else full(slim.whole)
        return replace(slim, current=full(slim.current), saved=tuple(map(full, slim.saved)), whole=whole)

    return restored


def _without(shard: Shard, packed: Mapping[int, PackedMatrix]) -> Shard:
    """A shard without its weight, where that is packed."""
    return replace(shard, weight=None) if shard.number in packed else shard


def activation_name(config: object) -> str:
    """The name of the model's activation function, which WISE compares outputs by.

    Raises:
        MethodError: the configuration names none.
    """
    for name in ("hidden_act", "activation_function", "hidden_activation"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return value
    raise MethodError("the model's configuration names no activation function (hidden_act), by which WISE routes")


def report_unlearned(batch: BatchRun, unlearned: Sequence[int]) -> None:
    """Say which requests of a batch ended without their targets being likely."""
    batch.unlearned = tuple(unlearned)
    if unlearned:
        _log.warning(
            "%d of %d edits ended without learning their target (%s)",
            len(unlearned),
            len(batch.prepared),
            comma_list(batch.prepared[place].name for place in unlearned[:5]) + (", ..." if len(unlearned) > 5 else ""),
        )
