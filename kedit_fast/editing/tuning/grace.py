"""GRACE: a codebook of a layer's inputs, and of the outputs that take the place of its own.

All keys and labels of a batch are known before any value is: keys are inputs of the layer, which no value changes. So
edits enter the codebook one after another first, and then the values of all different entries are optimized together,
by the engine of the closed forms' values, at the output of the MLP. Edits that share an entry form a chain: each starts
from the value that the one before it has left. The result is that of one edit after another.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from kedit_fast.editing.erasure import tokenized_texts
from kedit_fast.editing.keys import bare_outputs
from kedit_fast.editing.tuning.captured import TuningRow, rewriting_rows
from kedit_fast.editing.tuning.codebook import Codebook, Entered, Entering, Label, enter
from kedit_fast.editing.tuning.history import History
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.editing.values.result import PROBLEMS
from kedit_fast.editing.values.shared import find_shared_values
from kedit_fast.editing.values.store import model_identity
from kedit_fast.memories.memory import KeyValueMemory
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.hparams import Hparams
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.ops import nearest_key
from kedit_fast.requests.irrelevant import irrelevant_texts
from kedit_fast.requests.prompts import PreparedRequest, Prompt
from kedit_fast.solver.value_descent import Status, clamped_step
from kedit_fast.support.matrix_bits import sha256

if TYPE_CHECKING:
    from kedit_fast.editing.batch_run import BatchRun
    from kedit_fast.editing.tuning.state import TuningState

_log = logging.getLogger("kedit_fast")
NEVER = -1.0
"""A loss that no value reaches: descents take all their steps."""
UNBOUNDED = 1e30
"""A clamp that no value reaches, in units of the output's norm."""
ROWS_TOGETHER = 64
"""Requests whose values are optimized together where these stand at several tokens."""


@dataclass(frozen=True)
class ValuesAndLosses:
    """What a descent of values gives for u requests."""

    values: torch.Tensor
    """[u, h]."""
    losses: list[float]
    """[u] at the last forward pass, in nats."""
    steps: list[int]
    """[u]."""
    status: list[Status]
    """[u] COMPLETED, or what is wrong."""

    def block(self) -> dict[str, torch.Tensor]:
        """The same as tensors, for a file."""
        counts = {"steps": torch.tensor(self.steps), "status": torch.tensor([int(one) for one in self.status])}
        return {"values": self.values, "losses": torch.tensor(self.losses, dtype=torch.float64), **counts}

    @classmethod
    def of_block(cls, block: Mapping[str, torch.Tensor], like: torch.Tensor) -> ValuesAndLosses:
        """What `block` has made tensors of, on the device of `like`."""
        status = [Status(code) for code in block["status"].tolist()]
        return cls(block["values"].to(like.device), block["losses"].tolist(), block["steps"].tolist(), status)


class CodebookTuning:
    """The edits of one editor as a codebook. Nothing of the model changes.

    Args:
        state: what the editor tunes.
    """

    def __init__(self, state: TuningState):
        self.state = state
        (self.layer,) = state.hparams.layers
        self.history: History[Codebook] = History(Codebook(), state.hparams.undo_window)
        self._pending: Codebook | None = None
        computed = state.view.weight(self.layer).dtype
        self.dtype = torch.promote_types(computed, torch.float32)
        """Of keys and values."""
        self.rounding = 0.0 if computed == self.dtype else torch.finfo(computed).eps
        self.texts = irrelevant_texts(state.irrelevant)

    def write(self, batch: BatchRun) -> None:
        """Let the requests of a batch enter the codebook; those that fail leave no trace in it.

        Cost: a pass over the prompts up to the layer; distances to all keys; and per round of chains the descent of
        values, whose iterations run the blocks above the layer from the last prompt token on.
        """
        prepared, earlier = batch.prepared, self.history.current
        with batch.timed("keys"):
            queries, outputs = self._captured(prepared)
        problems = {
            place: f"{prepared[place].name}: the input of layer {self.layer} is not finite on its prompt"
            for place, finite in enumerate(torch.isfinite(queries).all(1).tolist())
            if not finite
        }
        chosen = list(range(len(prepared)))
        while True:
            for place, reason in problems.items():
                batch.fail(place, reason)
            chosen = [place for place in chosen if place not in problems]
            if not chosen:
                return
            with batch.timed("keys"):
                some = [prepared[place] for place in chosen]
                book, entered = self._enter(earlier, queries[chosen], some)
            problems = self._unreachable(chosen, some, entered)
            if problems:
                continue
            with batch.timed("values"):
                book, losses, steps, problems = self._trained(batch, book, some, outputs[chosen], entered)
            problems = {chosen[place]: reason for place, reason in problems.items()}
            if not problems:
                break
        batch.losses += losses
        batch.steps += steps
        _report(batch, chosen, book, queries[chosen], entered)
        self._pending = book

    def commit(self) -> None:
        """Make the open batch the state."""
        if self._pending is not None:
            before, state, self._pending = self.history.current, self._pending, None
            self.history.push(state, lambda _: before)

    def settle(self, batches: int) -> bool:
        """Drop an open batch and return to the state after so many batches; returns whether that is another one."""
        self._pending = None
        return self.history.settle(batches)

    def memory(self, about: Mapping[str, object]) -> KeyValueMemory | None:
        """What answers beside the weights, or None before the first edit; `about` are fields of every memory."""
        book = self.history.current
        if not book.entries:
            return None
        return KeyValueMemory(
            keys=book.keys,
            values=book.values,
            radii=book.radii,
            replacement=self.state.hparams.replacement,
            **about,  # pyright: ignore[reportArgumentType] - fields of SideMemory
        )

    def _captured(self, prepared: Sequence[PreparedRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [u, d] and outputs [u, h] of the layer at the last prompt tokens, fp32 (fp64 of fp64 models)."""
        sites = [Site(self.layer, "key"), Site(self.layer, "mlp")]
        inputs, outputs = bare_outputs(self.state.view, [_at_last_token(one) for one in prepared], sites)
        return inputs.T.to(self.dtype).contiguous(), outputs.T.to(self.dtype).contiguous()

    @functools.cached_property
    def center(self) -> torch.Tensor:
        """[d] the mean input of the layer in the middle of unrelated texts: what all inputs have in common, which says
        nothing of how far apart two of them are."""
        state = self.state
        ids = tokenized_texts(state.view, state.tokenizer, self.texts, state.prompt_format)
        rows = [TuningRow(tuple(row[: (len(row) + 1) // 2]), i, 1) for i, row in enumerate(ids)]
        with evaluating(state.view), torch.no_grad():
            captured = state.capture(rows, self.layer)
        return captured.x[captured.starts[1:] - 1].to(self.dtype).mean(0)

    def _radius(self, query: torch.Tensor) -> float:
        """The radius of a new key."""
        if self.state.hparams.units == "published":
            return self.state.hparams.eps
        return self.state.hparams.eps * float(torch.linalg.vector_norm(query - self.center.to(query)))

    def _enter(
        self, book: Codebook, queries: torch.Tensor, prepared: Sequence[PreparedRequest]
    ) -> tuple[Codebook, list[Entered]]:
        """Let requests enter a codebook."""
        hparams = self.state.hparams
        labels = [Label(one.target, len(one.rewriting[0].ids)) for one in prepared]
        return enter(
            book,
            queries,
            labels,
            self._radius,
            rule=hparams.label_rule,
            expand=hparams.eps_expand,
            rounding=self.rounding,
        )

    def _unreachable(
        self, places: Sequence[int], prepared: Sequence[PreparedRequest], entered: Sequence[Entered]
    ) -> dict[int, str]:
        """Place of a request -> why no value of its entry can teach it anything."""
        problems = {}
        for place, request, one in zip(places, prepared, entered, strict=True):
            if not one.inside:
                problems[place] = f"{request.name}: its prompt lies outside the radius of the entry that it has moved"
            elif self.state.hparams.replacement == "replace_prompt" and len(request.rewriting[0].ids) == 1:
                problems[place] = f"{request.name}: replace_prompt replaces tokens before the last; its prompt has none"
        return problems

    def _trained(
        self,
        batch: BatchRun,
        book: Codebook,
        prepared: Sequence[PreparedRequest],
        outputs: torch.Tensor,
        entered: Sequence[Entered],
    ) -> tuple[Codebook, list[float], list[int], dict[int, str]]:
        """The codebook with the values of all entries that requests train; losses and steps of these; and problems."""
        losses, steps = [0.0] * len(prepared), [0] * len(prepared)
        problems: dict[int, str] = {}
        first_number = self.history.current.edits
        for members in rounds(entered):
            starting = [
                self._first_value(first_number + place, outputs[place])
                if entered[place].begins
                else book.entries[entered[place].entry].value
                for place in members
            ]
            result = self._descend(batch, [prepared[place] for place in members], outputs[members], starting)
            for place, loss, count, status in zip(members, result.losses, result.steps, result.status, strict=True):
                losses[place], steps[place] = loss, count
                if status in PROBLEMS:
                    problems[place] = f"{prepared[place].name}: {PROBLEMS[status]}"
            if problems:
                break
            values = result.values.to(book.entries[0].key)
            book = book.with_values({entered[place].entry: values[row] for row, place in enumerate(members)})
        return book, losses, steps, problems

    def _first_value(self, number: int, output: torch.Tensor) -> torch.Tensor | None:
        """Where the value of a new entry starts, by the number of its edit; None for the layer's output."""
        if self.state.hparams.val_init == "warm":
            return None
        generator = torch.Generator().manual_seed((self.state.seed << 32) + number)
        return torch.rand(len(output), generator=generator).to(output)

    def _descend(
        self,
        batch: BatchRun,
        prepared: Sequence[PreparedRequest],
        outputs: torch.Tensor,
        starting: Sequence[torch.Tensor | None],
    ) -> ValuesAndLosses:
        """The values of requests whose entries differ; those of a descent that the editor's file has, from there."""
        file = self.state.file
        if file is None:
            return self._descended(batch, prepared, outputs, starting)
        key = self._key(batch, prepared, outputs, starting)
        block = file.load_block(key)
        if block is not None:
            return ValuesAndLosses.of_block(block, outputs)
        result = self._descended(batch, prepared, outputs, starting)
        if not set(result.status) & PROBLEMS.keys():
            file.store_block(key, result.block())
        return result

    def _key(
        self,
        batch: BatchRun,
        prepared: Sequence[PreparedRequest],
        outputs: torch.Tensor,
        starting: Sequence[torch.Tensor | None],
    ) -> str:
        """A hash of everything that a descent depends on, to the bit."""
        state = self.state
        identity = {
            **model_identity(state.view, state.tokenizer),
            "descent": asdict(descent_hparams(state.hparams)),
            "layer": self.layer,
            "requests": [[one.rewriting, one.target] for one in prepared],
            "outputs": sha256(outputs),
            "starting": [None if one is None else sha256(one[None]) for one in starting],
            "together": batch.context.values_most,
            "device": outputs.device.type,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def _descended(
        self,
        batch: BatchRun,
        prepared: Sequence[PreparedRequest],
        outputs: torch.Tensor,
        starting: Sequence[torch.Tensor | None],
    ) -> ValuesAndLosses:
        """The values, by the engine of the closed forms' values, or over whole rows."""
        if self.state.hparams.replacement != "replace_last":
            parts = [
                self._descend_in_rows(
                    prepared[begin : begin + ROWS_TOGETHER],
                    outputs[begin : begin + ROWS_TOGETHER],
                    starting[begin : begin + ROWS_TOGETHER],
                )
                for begin in range(0, len(prepared), ROWS_TOGETHER)
            ]
            return ValuesAndLosses(
                torch.cat([part.values for part in parts]),
                [loss for part in parts for loss in part.losses],
                [count for part in parts for count in part.steps],
                [status for part in parts for status in part.status],
            )
        context = batch.context
        with torch.enable_grad():
            optimized = find_shared_values(
                context.view,
                context.tokenizer,
                [_at_last_token(one) for one in prepared],
                self.layer,
                "mlp",
                descent_hparams(self.state.hparams),
                starting=starting,
                most=context.values_most,
                progress=context.progress,
            )
        status = [Status(code) for code in optimized.status.tolist()]
        return ValuesAndLosses(optimized.targets.T, optimized.losses.tolist(), optimized.steps.tolist(), status)

    def _descend_in_rows(
        self, prepared: Sequence[PreparedRequest], outputs: torch.Tensor, starting: Sequence[torch.Tensor | None]
    ) -> ValuesAndLosses:
        """Values that stand at several tokens of each row, whose keys and queries above the layer they change, too."""
        hparams, view = self.state.hparams, self.state.view
        rows = rewriting_rows([replace(one, rewriting=one.rewriting[:1]) for one in prepared])
        with evaluating(view):
            captured = self.state.capture(rows, self.layer)
            objective = Objective(captured, {"likelihood": Likelihood(captured)})
            bias = view.edited_module(self.layer).bias
            original = captured.original if bias is None else captured.original + bias.detach().to(captured.original)
            placed = [
                (hparams.replacement == "replace_all" or place < row.prompt - 1, row.request)
                for row in rows
                for place in range(len(row.ids))
            ]
            is_placed, owner = (torch.tensor(part, device=original.device) for part in zip(*placed, strict=True))
            origin = outputs.to(original)
            value = torch.stack([one if first is None else first for one, first in zip(origin, starting, strict=True)])
            value = value.to(original)
            mean, square = torch.zeros_like(value), torch.zeros_like(value)
            active = torch.ones(len(value), 1, dtype=torch.bool, device=value.device)
            rate = hparams.lr
            if hparams.units == "relative":
                rate = hparams.lr * origin.square().mean(1, keepdim=True).sqrt()
            unbounded = torch.full((len(value), 1), torch.inf, dtype=value.dtype, device=value.device)

            def losses_at(point: torch.Tensor) -> torch.Tensor:
                whole_output = torch.where(is_placed[:, None], point[owner], original)
                return objective.losses(
                    whole_output if bias is None else whole_output - bias.detach().to(original)
                ).total

            for step in range(hparams.num_steps):
                with torch.enable_grad():
                    point = value.clone().requires_grad_(True)
                    (gradient,) = torch.autograd.grad(losses_at(point).sum(), point)
                count = torch.full((len(value), 1), step + 1, device=value.device)
                value, mean, square = clamped_step(value, gradient, mean, square, count, active, rate, unbounded)
            with torch.no_grad():
                losses = losses_at(value)
        bad = ~(torch.isfinite(losses) & torch.isfinite(value).all(1).to(losses.device))
        status = [Status.BAD_LOSS if flag else Status.COMPLETED for flag in bad.tolist()]
        return ValuesAndLosses(value, losses.tolist(), [hparams.num_steps] * len(prepared), status)


def rounds(entered: Sequence[Entered]) -> list[list[int]]:
    """The edits that first train their entry, those that are the second ones of theirs, and so on: no two of one entry
    in a round."""
    counts: dict[int, int] = {}
    result: list[list[int]] = []
    for place, one in enumerate(entered):
        number = counts.get(one.entry, 0)
        counts[one.entry] = number + 1
        if number == len(result):
            result.append([])
        result[number].append(place)
    return result


def descent_hparams(hparams: Hparams) -> Hparams:
    """The numbers of the value engine that make it GRACE's loop: all steps, no drift, no decay, no clamp."""
    relative = hparams.units == "relative"
    return replace(
        hparams,
        v_num_grad_steps=hparams.num_steps + 1,  # the last iteration takes no step
        v_lr=AUTO if relative else hparams.lr,
        v_lr_scale=hparams.lr if relative else hparams.v_lr_scale,
        v_weight_decay=0.0,
        clamp_norm_factor=UNBOUNDED,
        v_stop_loss=NEVER,
        kl_factor=0.0,
    )


def _at_last_token(prepared: PreparedRequest) -> PreparedRequest:
    """A request whose value stands at the last token of its bare prompt."""
    ids = prepared.rewriting[0].ids
    return replace(prepared, rewriting=(Prompt(ids, len(ids) - 1),), kl=Prompt(ids[:1], 0))


def _report(
    batch: BatchRun, places: Sequence[int], book: Codebook, queries: torch.Tensor, entered: Sequence[Entered]
) -> None:
    """Say which edits of a batch share an entry, and which ones it does not answer."""
    last: dict[int, int] = {}
    for place, one in enumerate(entered):
        if one.entry in last:
            batch.collisions.append((places[last[one.entry]], places[place]))
        last[one.entry] = place
    again = [place for place, one in enumerate(entered) if one.how == Entering.TAKEN_OVER]
    if again:
        _log.warning("%d of %d edits replace one of the same prompt that had another target", len(again), len(entered))
    nearest, _, answered = nearest_key(queries, book.keys, book.radii)
    targets = [batch.prepared[place].target for place in places]
    lost = [
        place
        for place, (entry, inside) in enumerate(zip(nearest.tolist(), answered.tolist(), strict=True))
        if not inside or book.entries[entry].label.target != targets[place]
    ]
    if len(lost) > len(again):
        _log.warning(
            "%d of %d edits are not answered with their target: later ones of the batch have taken their prompts",
            len(lost),
            len(entered),
        )
